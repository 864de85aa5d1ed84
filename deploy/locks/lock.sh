#!/usr/bin/env bash
# Writes the locks again: bash deploy/locks/lock.sh (needs uv). Each names every package with its hashes, for every platform
# and Python from 3.11 on, but torch and what comes with its builds: these differ by machine (torch.txt).
set -euo pipefail
cd "$(dirname "$0")/../.."
export UV_NO_CONFIG=1
# flwr 1.39 asks for cryptography < 47, which has known faults (GHSA-537c-gmf6-5ccf, CVE-2026-69247, -69248, -69249)
echo 'cryptography>=50' > deploy/locks/.override
left_out=()
for package in torch triton cuda-bindings cuda-pathfinder cuda-toolkit nvidia-cublas nvidia-cuda-cccl nvidia-cuda-cupti \
    nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cudnn-cu13 nvidia-cufft nvidia-cufile nvidia-curand nvidia-cusolver \
    nvidia-cusparse nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvjitlink nvidia-nvshmem-cu13 nvidia-nvtx; do
    left_out+=(--no-emit-package "$package")
done
lock() {
    name=$1 && shift
    uv pip compile pyproject.toml "${@/#/--extra=}" --override deploy/locks/.override --generate-hashes --universal \
        --python-version 3.11 --no-header --no-annotate --no-emit-index-url --no-emit-find-links "${left_out[@]}" \
        --output-file "deploy/locks/$name.txt" --quiet
}
# the largest first: the others take its versions
lock development simulation offline-encoder dicom release documentation development
for name in server:release site:offline-encoder,dicom; do
    cp deploy/locks/development.txt "deploy/locks/${name%%:*}.txt"
    IFS=, read -ra extras <<< "${name#*:}"
    lock "${name%%:*}" "${extras[@]}"
done
rm deploy/locks/.override
