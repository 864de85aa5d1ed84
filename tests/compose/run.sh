#!/usr/bin/env bash
# The compose demo on a real container engine, with sites killed, paused and cut off; prints "N passed, N failed".
#
# Needs docker with the compose plugin. Without a running daemon it starts one of its own in namespaces, which ends
# with it: then it also needs root, dockerd, debootstrap (install.sh gets them) and COMPOSE_TEST_HOME, a folder with room
# (about 15 GB) in which it keeps a base image and wheels between runs. Where that is not to be had it says so and passes.
set -u
here=$(cd "$(dirname "$0")" && pwd)
export COMPOSE_TEST_HOME="${COMPOSE_TEST_HOME:-${TMPDIR:-/tmp}/fedhypevae-compose}"
# where install.sh put the compose plugin
if ! docker compose version >/dev/null 2>&1 && [ -d "$COMPOSE_TEST_HOME/docker-config" ]; then
    export DOCKER_CONFIG="$COMPOSE_TEST_HOME/docker-config"
fi
if docker info >/dev/null 2>&1; then
    exec bash "$here/cases.sh"
fi
for tool in dockerd debootstrap unshare ip; do
    if ! command -v "$tool" >/dev/null; then
        echo "skipped: no container engine runs here, and $tool is not installed to start one"
        exit 0
    fi
done
if [ "$(id -u)" -ne 0 ] || ! unshare --mount --net --pid --fork true 2>/dev/null; then
    echo "skipped: no container engine runs here, and starting one needs root and namespaces"
    exit 0
fi
if ! docker compose version >/dev/null 2>&1; then
    echo "skipped: docker has no compose plugin"
    exit 0
fi
mkdir -p "$COMPOSE_TEST_HOME"
need=15
[ -d "$COMPOSE_TEST_HOME/engine/data" ] && need=5 # the images are there
room=$(df --output=avail --block-size=1G "$COMPOSE_TEST_HOME" | tail -1)
if [ "$room" -lt "$need" ]; then
    echo "skipped: images need $need GB in $COMPOSE_TEST_HOME, $room are free"
    exit 0
fi
bash "$here/base.sh" || { echo "0 passed, 1 failed (no base image)"; exit 1; }
exec bash "$here/engine.sh" bash "$here/cases.sh"
