#!/usr/bin/env bash
# Compiles the Paddle binding, with its GPU branch, against the headers of paddlepaddle-gpu 2.6.2, the newest
# GPU build on PyPI. Only the headers of the wheel (760 MB) are unpacked; nothing is installed or run.
#
#   PYTHON      a Python with pip (default: python3)
#   CUDA_HOME   the CUDA toolkit (default: /usr/local/cuda)
#   WHEELS      a directory that keeps the wheel for the next time (default: a temporary one)
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cuda=${CUDA_HOME:-/usr/local/cuda}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
wheels=${WHEELS:-$scratch}

# The wheel is for other Pythons than ours may be; its headers are the same.
"${PYTHON:-python3}" -m pip download -qq --no-deps --only-binary=:all: --python-version 3.10 \
  --implementation cp --platform manylinux1_x86_64 -d "$wheels" paddlepaddle-gpu==2.6.2
"${PYTHON:-python3}" - "$wheels" "$scratch" <<'UNPACK'
import sys
import zipfile
from pathlib import Path

[wheel] = Path(sys.argv[1]).glob("paddlepaddle_gpu-2.6.2-*.whl")
with zipfile.ZipFile(wheel) as archive:
    headers = [name for name in archive.namelist() if name.startswith("paddle/include/")]
    archive.extractall(sys.argv[2], headers)
UNPACK
include=$scratch/paddle/include
"${CXX:-g++}" -std=c++17 -O1 -Wall -DPADDLE_WITH_CUDA -DPADDLE_NO_PYTHON -I"$repository/csrc" \
  -isystem "$include" -isystem "$include/third_party" -isystem "$cuda/include" -isystem "$cuda/include/cccl" \
  -c "$repository/csrc/bindings/paddle_ops.cc" -o "$scratch/paddle_ops.o"
# Not through a pipe: grep would leave before nm has written all, which pipefail takes for a failure.
grep -q 'U paddle::Tensor::stream() const' <(nm -C "$scratch/paddle_ops.o") ||
  { echo "error: the compiled binding has no GPU branch" >&2; exit 1; }
echo "paddle_ops.cc compiles against paddlepaddle-gpu 2.6.2"
