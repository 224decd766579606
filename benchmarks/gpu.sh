#!/usr/bin/env bash
# Everything that needs a GPU: build, GPU tests, compute-sanitizer on every kernel, op benchmarks,
# captured loops against eager ones, full shapes, whole calls. Runs without network, with the torch
# (2.11 or later) and Triton that are installed. Tables and logs go to $OUT (default: gpu-results);
# tables name card, clocks, power and temperature if nvidia-ml-py is installed, and a benchmark fails
# if the card was throttled.
#
#   OUT=/tmp/out benchmarks/gpu.sh                   # all of it
#   OUT=/tmp/out benchmarks/gpu.sh check             # build, tests, sanitizer
#   OUT=/tmp/out benchmarks/gpu.sh bench [-k EXPR]   # build, benchmarks (pytest's -k picks cases)
#   OUT=/tmp/out benchmarks/gpu.sh --cpu             # rehearsal: what runs without a GPU
#
# PYTHON names the interpreter. A failing step does not stop the next; the exit status is 1 if any
# step failed.
set -uo pipefail
what=${1:-all}
[ $# -gt 0 ] && shift
python=$(command -v "${PYTHON:-python3}")
cd "$(dirname "$0")/.."
export OUT=${OUT:-$PWD/gpu-results}
mkdir -p "$OUT"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

step() { # step <name> <command...>: run, log, continue
  local name=$1 from=$SECONDS
  shift
  if timeout 300 "$@" >"$OUT/$name.log" 2>&1; then
    echo "== $name ($((SECONDS - from)) s)"
    tail -n 2 "$OUT/$name.log"
  else
    echo "$name" >>"$OUT/failed.txt"
    echo "== $name FAILED ($((SECONDS - from)) s)"
    tail -n 30 "$OUT/$name.log"
  fi
}
finish() {
  [ ! -f "$OUT/failed.txt" ] && echo "$1" && exit 0
  echo "failed: $(tr '\n' ' ' <"$OUT/failed.txt")"
  exit 1
}
pytest=("$python" -m pytest -q -p no:cacheprovider)
doctor=("$python" -c 'from zsu_fast.runtime.doctor import render; print(render())')
rm -f "$OUT/failed.txt"

if [ "$what" = --cpu ]; then
  # the steps that also run on a CPU; GPU tests are only collected
  step doctor "${doctor[@]}"
  step collect-gpu-tests "${pytest[@]}" tests -m gpu --collect-only
  step touch "$python" -m benchmarks.tools.touch_every_kernel --device cpu
  step gpu-state "$python" -c 'from benchmarks import harness; print(harness.gpu_facts())'
  step bench-loops "${pytest[@]}" benchmarks/end_to_end/bench_loops.py
  finish "rehearsal passed"
fi

"$python" - <<'PY' || exit 1
import torch
assert torch.cuda.is_available(), "no CUDA device"
print(torch.__version__, torch.cuda.get_device_name(), torch.cuda.get_device_capability())
PY
capability=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
command -v nvidia-smi >/dev/null && nvidia-smi >"$OUT/nvidia-smi.txt"

# without nvcc there is no CUDA library, and only Triton is tested
step build env TORCH_CUDA_ARCH_LIST="$capability" "$python" setup.py build_ext --inplace

if [ "$what" != bench ]; then
  step doctor "${doctor[@]}"
  cat "$OUT/doctor.log"
  # in parallel: nothing here is timed
  step tests-gpu "${pytest[@]}" tests -m gpu -n 6 &
  step tests-cpu "${pytest[@]}" tests/ops -m "not gpu" -n 4 &
  if sanitizer=$(command -v compute-sanitizer); then
    for tool in memcheck racecheck initcheck synccheck; do
      step "sanitizer-$tool" "$sanitizer" --tool "$tool" --error-exitcode 9 \
        --target-processes all "$python" -m benchmarks.tools.touch_every_kernel &
    done
  else
    echo "no compute-sanitizer on PATH: skipped" | tee "$OUT/sanitizer.log"
  fi
  wait
fi

if [ "$what" != check ]; then
  for name in signed_cross_entropy masked_cross_entropy ascent_step loops full_shapes; do
    step "bench-$name" "${pytest[@]}" benchmarks/*/bench_$name.py "$@"
  done
  step whole-calls "$python" -m benchmarks.end_to_end.bench_gpu_calls
  cat "$OUT"/cuda_*.md 2>/dev/null
fi
finish "all steps passed"
