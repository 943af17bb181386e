#!/usr/bin/env bash
# Brings nvcc without a CUDA installation: NVIDIA's wheels, all pinned (their own dependencies are not, and mixed versions
# do not work), into the folder build.rs looks in; and nvdisasm, for tools/kernel_budget.py. About 110 MB to download, 276 MB
# on disk.
#
# usage: tools/get-nvcc.sh [folder]     (default: .cuda in the repository)
set -euo pipefail
folder=${1:-$(dirname "$0")/../.cuda}
mkdir -p "$folder"
folder=$(realpath "$folder")
nvcc=$folder/nvidia/cu13/bin/nvcc
# Into a folder, in place of what an interrupted call may have left there.
fetch() { python3 -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target "$@"; }
if [[ ! -x $nvcc ]]; then
    fetch "$folder" \
        nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 \
        nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
fi
# In a folder of its own, as pip adds nothing to one that is there. No version of it is as old as nvcc's.
if [[ ! -x $folder/nvdisasm/nvidia/cu13/bin/nvdisasm ]]; then
    fetch "$folder/nvdisasm" nvidia-cuda-nvdisasm==13.2.51 || echo "no nvdisasm: tools/kernel_budget.py will not work; builds do" >&2
fi
"$nvcc" --version | tail -2
echo "NVCC=$nvcc"
# Cargo looks for nvcc again when its build script has changed.
touch "$(dirname "$0")/../build.rs"
