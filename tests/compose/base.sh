#!/usr/bin/env bash
# A root file system and wheels for an engine without a network: kept in COMPOSE_TEST_HOME between runs.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
cd "$COMPOSE_TEST_HOME"
if [ ! -f rootfs.done ]; then
    rm -rf rootfs
    debootstrap --variant=minbase --include=python3-minimal,python3-pip,python3-venv,ca-certificates bookworm rootfs >debootstrap.log
    touch rootfs.done
fi
if [ ! -f wheels.done ] || [ "$root/constraints.txt" -nt wheels.done ]; then
    mkdir -p wheels
    python3.11 -m pip download -q -d wheels -c "$root/constraints.txt" 'setuptools>=77' wheel torch "$root[offline-encoder,dicom]"
    rm -f wheels/fedhypevae-*
    touch wheels.done
fi
ln -sf python3 rootfs/usr/bin/python
rm -f rootfs/usr/lib/python3*/EXTERNALLY-MANAGED
printf '[global]\nno-index = true\nfind-links = /wheels\n' >rootfs/etc/pip.conf
