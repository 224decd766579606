#!/usr/bin/env bash
# One wheel, two torches: builds the wheel with the torch of this environment, then imports and tests
# it under torch 2.11 in a separate environment. Takes a few minutes and needs the network (or a local
# index) for torch 2.11; not part of CI.
#
#   benchmarks/tools/check_torch_211.sh [python]
set -euo pipefail
python=$(command -v "${1:-python}")
root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -c 'import torch; print("building with torch", torch.__version__)'
"$python" -m pip wheel "$root" --no-build-isolation --no-deps -q -w "$work"
ls "$work"/*.whl

"$python" -m venv --without-pip "$work/venv"
old="$work/venv/bin/python"
site=$("$old" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
"$python" -m pip install -q --target "$site" --no-deps "torch==2.11.*"
# Dependencies of torch and of the tests, CUDA libraries included, are linked from the environment
# that built the wheel.
"$python" - "$site" <<'PY'
import pathlib, sys, sysconfig
here = sysconfig.get_paths()["purelib"]
target = pathlib.Path(sys.argv[1])
skip = ("torch", "functorch", "zsu_fast", "__editable__", "triton")
for item in pathlib.Path(here).iterdir():
    if not item.name.startswith(skip) and not (target / item.name).exists():
        (target / item.name).symlink_to(item)
PY
"$python" -m pip install -q --target "$site" --no-deps "$work"/*.whl
if [ -d "$site/nvidia" ]; then
  LD_LIBRARY_PATH=$(find -L "$site/nvidia" -maxdepth 3 -name lib -type d | paste -sd:)
  export LD_LIBRARY_PATH
fi

cd "$work"
cp -r "$root/tests" tests
cp "$root/pyproject.toml" .
"$old" - <<'PY'
import torch
from zsu_fast.runtime.doctor import render
from zsu_fast.ops import library
assert torch.__version__.startswith("2.11"), torch.__version__
print(render())
assert library.CPU.loaded, library.CPU.reason
PY
OMP_NUM_THREADS=1 "$old" -m pytest -q -p no:cacheprovider tests/ops \
  --deselect tests/ops/test_triton_interpreted.py --ignore tests/ops/test_gpu_code_without_gpu.py
