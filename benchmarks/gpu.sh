#!/usr/bin/env bash
# Everything that needs a GPU, in one go: build, gpu tests, compute-sanitizer on every kernel, op
# benchmarks, captured loops against eager ones. Made for a machine with torch 2.11 and Triton 3.6 and
# without network: only what is installed there is used. Tables and logs go to $OUT (default:
# gpu-results); card, clocks and power stand in each table where nvidia-ml-py is installed.
#
#   OUT=/tmp/out benchmarks/gpu.sh [python]
#   OUT=/tmp/out benchmarks/gpu.sh --cpu [python]    # rehearsal: what runs without a GPU
#
# A step that fails does not stop the next; the exit status says whether all went well.
set -uo pipefail
cpu=
if [ "${1:-}" = --cpu ]; then
  cpu=yes
  shift
fi
python=$(command -v "${1:-python}")
cd "$(dirname "$0")/.."
export OUT=${OUT:-$PWD/gpu-results}
mkdir -p "$OUT"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
failed=()

step() { # step <name> <command...>: run, log, go on
  local name=$1
  shift
  echo "== $name"
  if "$@" >"$OUT/$name.log" 2>&1; then tail -n 3 "$OUT/$name.log"; else
    failed+=("$name")
    tail -n 30 "$OUT/$name.log"
  fi
}

if [ -n "$cpu" ]; then
  # the steps of a GPU machine that have a CPU side, short; the gpu tests are only collected
  step doctor "$python" -c 'from zsu_fast.doctor import render; print(render())'
  step collect-gpu-tests "$python" -m pytest -q -p no:cacheprovider tests -m gpu --collect-only
  step touch "$python" benchmarks/touch_every_kernel.py --device cpu
  step gpu-state "$python" -c 'import sys; sys.path.insert(0, "benchmarks"); import harness; print(harness.gpu_state())'
  step bench-loops "$python" -m pytest -q -p no:cacheprovider benchmarks/bench_loops.py
  [ ${#failed[@]} -eq 0 ] && echo "rehearsal passed" && exit 0
  echo "failed: ${failed[*]}"
  exit 1
fi

"$python" - <<'PY' || exit 1
import torch
assert torch.cuda.is_available(), "no CUDA device"
print(torch.__version__, torch.cuda.get_device_name(), torch.cuda.get_device_capability())
PY
capability=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
command -v nvidia-smi >/dev/null && nvidia-smi >"$OUT/nvidia-smi.txt"

# without nvcc the CUDA library is left out and Triton is tested alone
step build env TORCH_CUDA_ARCH_LIST="$capability" "$python" setup.py build_ext --inplace
step doctor "$python" -c 'from zsu_fast.doctor import render; print(render())'
cat "$OUT/doctor.log"

step tests-gpu "$python" -m pytest -q -p no:cacheprovider tests -m gpu
step tests-cpu "$python" -m pytest -q -p no:cacheprovider tests/ops -m "not gpu" -x

if sanitizer=$(command -v compute-sanitizer); then
  for tool in memcheck racecheck initcheck synccheck; do
    step "sanitizer-$tool" "$sanitizer" --tool "$tool" --error-exitcode 9 --target-processes all \
      "$python" benchmarks/touch_every_kernel.py
  done
else
  echo "no compute-sanitizer on PATH: skipped" | tee "$OUT/sanitizer.log"
fi

for op in signed_cross_entropy masked_cross_entropy ascent_step loops; do
  step "bench-$op" "$python" -m pytest -q -p no:cacheprovider "benchmarks/bench_$op.py"
done
cat "$OUT"/cuda_*.md 2>/dev/null

if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all steps passed"
