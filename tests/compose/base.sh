#!/usr/bin/env bash
# A root file system and wheels for an engine without a network: kept in COMPOSE_TEST_HOME between runs.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
cd "$COMPOSE_TEST_HOME"
if [ ! -f rootfs.done ]; then
    rm -rf rootfs
    debootstrap --variant=minbase --include=python3-minimal,python3-pip,python3-venv,ca-certificates bookworm rootfs >debootstrap.log
    ln -sf python3 rootfs/usr/bin/python
    rm -f rootfs/usr/lib/python3*/EXTERNALLY-MANAGED
    printf '[global]\nno-index = true\nfind-links = /wheels\n' >rootfs/etc/pip.conf
    touch rootfs.done
fi
# by content, not by date: a fresh clone's files are all new
wanted=$(sed -n '/^\[build-system\]/,/^\[project.scripts\]/p' "$root/pyproject.toml" | cat - "$root"/deploy/locks/{site,torch}.txt | sha256sum)
if [ "$(cat wheels.done 2>/dev/null)" != "$wanted" ]; then
    rm -f wheels.done
    mkdir -p wheels
    download() { "${PYTHON:-python3.11}" -m pip download -q -d wheels "$@" >wheels.log 2>&1 || { tail -5 wheels.log >&2; exit 1; }; }
    download 'setuptools>=77' wheel -r "$root/deploy/locks/torch.txt"
    download --no-deps --require-hashes -r "$root/deploy/locks/site.txt"
    rm -f wheels/fedhypevae-*
    printf '%s\n' "$wanted" >wheels.done
fi
