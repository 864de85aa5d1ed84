#!/usr/bin/env bash
# Every measurement that needs a GPU, and the tests that do, in under eight minutes: the private step, embedding, a
# paper-sized run. Results lie beside the processor's, as results/*_cuda.json.
#
#     bash benchmarks/gpu.sh                                # in an environment that has the project's packages
#     WHEELS=FOLDER bash benchmarks/gpu.sh                  # on a bare machine with torch, transformers and no network
#     DEVICE=cpu QUICK=1 OUT=FOLDER bash benchmarks/gpu.sh  # the same on small sizes and the processor, to try it out
#
# WHEELS is a folder of what the machine lacks (flwr, opacus, dp-accounting, randomgen, opendp and what they need). It
# goes into an environment of its own, .gpu-venv, which also sees the machine's packages: torch is the machine's.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
device=${DEVICE:-cuda}
out=${OUT:-benchmarks/results}
if [ "$device" != cpu ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "gpu.sh: expected a GPU that torch can use, found none; DEVICE=cpu QUICK=1 OUT=FOLDER tries it out without" >&2
    exit 2
fi

if [ -n "${WHEELS:-}" ]; then
    # An environment made with --system-site-packages does not see packages of another environment: a .pth file names
    # where torch lies.
    machine=$("$python" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])')
    "$python" -m venv --system-site-packages .gpu-venv
    python=$PWD/.gpu-venv/bin/python
    own=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "$machine" > "$own/machine.pth"
    "$python" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl
fi

export PYTHONPATH=$PWD FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
mkdir -p "$out"
failed=""
part() {  # NAME LIMIT_S COMMAND...: a part that fails or takes too long leaves the others their time
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    echo "== $name"
    timeout "$limit" "$@" || failed="$failed $name"
    echo "== $name: $((SECONDS - start)) s"
}

if [ -n "${QUICK:-}" ]; then
    part tests 120 "$python" -m pytest -q -rs -m gpu tests/common/test_devices.py
    part step 300 "$python" -m benchmarks.step_cost --device "$device" --seconds 0.1 --batches 64 --dims 384 --out "$out/step_cost_$device.json"
    part embedding 300 "$python" -m benchmarks.embedding --device "$device" --only throughput --small 64 --large 64 --turns 1 --out "$out/embedding_$device.json"
    part whole 300 "$python" -m benchmarks.whole --device "$device" --rounds 1 --turns 1 --records 64 --out "$out/whole_$device.json"
else
    part tests 90 "$python" -m pytest -q -rs -m gpu tests
    part step 120 "$python" -m benchmarks.step_cost --device "$device" --seconds 3 --out "$out/step_cost_$device.json"
    part embedding 180 "$python" -m benchmarks.embedding --device "$device" --out "$out/embedding_$device.json"
    part whole 90 "$python" -m benchmarks.whole --device "$device" --rounds 2 --turns 2 --out "$out/whole_$device.json"
fi
if [ -n "$failed" ]; then
    echo "gpu.sh: failed:$failed" >&2
    exit 1
fi
