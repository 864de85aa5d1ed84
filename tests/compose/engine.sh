#!/usr/bin/env bash
# Runs a command beside a container engine of its own, in mount, network, pid and other namespaces that end with it.
#   engine.sh COMMAND [ARG ...]
set -eu
if [ -z "${COMPOSE_TEST_INSIDE:-}" ]; then
    export COMPOSE_TEST_INSIDE=1
    exec unshare --mount --cgroup --net --pid --ipc --uts --fork --kill-child --mount-proc --propagation private \
        bash "$0" "$@"
fi
umount -R /sys/fs/cgroup 2>/dev/null || true
mount -t sysfs none /sys 2>/dev/null || true
mount -t tmpfs none /sys/fs/cgroup
for controller in cpu cpuacct cpuset memory devices freezer blkio pids; do
    mkdir "/sys/fs/cgroup/$controller"
    mount -t cgroup -o "$controller" none "/sys/fs/cgroup/$controller"
done
mkdir /sys/fs/cgroup/systemd
mount -t cgroup -o none,name=systemd none /sys/fs/cgroup/systemd
mkdir -p /run/netns
mount -t tmpfs none /run/netns
mount -t tmpfs none /dev/shm
ip link set lo up
home="$COMPOSE_TEST_HOME/engine"
mkdir -p "$home"
rm -rf "$home/exec" "$home/pid"
export DOCKER_HOST="unix://$home/d.sock" DOCKER_BUILDKIT=0
dockerd --data-root "$home/data" --exec-root "$home/exec" -p "$home/pid" -H "$DOCKER_HOST" \
    --storage-driver overlay2 --oom-score-adjust 0 >"$home/dockerd.log" 2>&1 &
daemon=$!
end_engine() {
    kill "$daemon" 2>/dev/null
    wait "$daemon" 2>/dev/null
    # groups of ended containers are all that namespaces do not take with them
    find /sys/fs/cgroup -mindepth 2 -depth -type d -path '*/docker*' -exec rmdir {} + 2>/dev/null
    rm -rf "$home/d.sock" "$home/pid" "$home/exec"
}
trap end_engine EXIT
trap 'exit 143' TERM INT
for _ in $(seq 100); do
    docker info >/dev/null 2>&1 && break
    sleep 0.3
done
docker info >/dev/null 2>&1 || { tail -20 "$home/dockerd.log" >&2; echo "0 passed, 1 failed (the engine did not start)"; exit 1; }
# what a test that was killed left: this engine is the tests' own
docker ps --all --quiet | xargs -r docker rm --force --volumes >/dev/null
for kind in network volume image; do docker "$kind" prune --force >/dev/null; done
# what the base image was made of: other wheels make another one
made="fedhypevae-rootfs:$(sha256sum "$COMPOSE_TEST_HOME/wheels.done" | cut -c 1-12)"
if ! docker image inspect python:3.11-slim "$made" >/dev/null 2>&1; then
    tar -C "$COMPOSE_TEST_HOME/rootfs" --numeric-owner -c . | docker import - "$made" >/dev/null
    mkdir -p "$home/base" && rm -rf "$home/base/wheels" && cp -rl "$COMPOSE_TEST_HOME/wheels" "$home/base/wheels"
    printf 'FROM %s\nCOPY wheels /wheels\n' "$made" >"$home/base/Dockerfile"
    docker build -q -t python:3.11-slim "$home/base" >/dev/null
fi
"$@"
