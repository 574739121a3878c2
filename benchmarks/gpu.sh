#!/usr/bin/env bash
# Everything that needs a GPU, in one go: build, tests, selftest, tuning, benchmarks.
#
#   benchmarks/gpu.sh                       builds .venv first (CUDA torch, a few minutes)
#   PYTHON=python3 benchmarks/gpu.sh        with a Python that has torch; nothing is installed, the
#                                           library is built in place, its CUDA part where nvcc is
#
#   OUT     folder of the results (runs/gpu)
#   QUICK   1: two layers, few rows, nothing compiled: about five minutes on an H100
#   STEPS   which to run ("build tests selftest tune bench compare")
#   LIMIT   seconds that each step may take (1200)
#
# A step that fails or hangs doesn't keep the others from running. The exit code is that of the
# first one that failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=${OUT:-runs/gpu} QUICK=${QUICK:-0} LIMIT=${LIMIT:-1200}
STEPS=${STEPS:-build tests selftest tune bench compare}
if [ -z "${PYTHON:-}" ]; then
  make venv || exit
  PYTHON=.venv/bin/python
  "$PYTHON" -m pip install --quiet --disable-pip-version-check -c constraints.txt peft # a rival
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$OUT"
LOG=$OUT/log.txt
: >"$LOG"
quick=() compile=(--compile)
if [ "$QUICK" = 1 ]; then quick=(--quick) compile=(); fi
failed=0
summary=()

# step NAME WORDS...: run WORDS with a time limit, their output on the screen and in the log.
step() {
  local name=$1 begin=$SECONDS code verdict=ok
  shift
  case " $STEPS " in *" $name "*) ;; *) return ;; esac
  printf '\n==== %s: %s\n' "$name" "$*" | tee -a "$LOG"
  timeout --kill-after=20 "$LIMIT" "$@" 2>&1 | tee -a "$LOG"
  code=${PIPESTATUS[0]}
  if [ "$code" -ne 0 ]; then
    verdict="FAILED ($code)"
    if [ "$code" = 124 ] || [ "$code" = 137 ]; then verdict="FAILED (over $LIMIT s)"; fi
    if [ "$failed" = 0 ]; then failed=$code; fi
  fi
  summary+=("$(printf '%-10s %5d s  %s' "$name" $((SECONDS - begin)) "$verdict")")
}

{
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv 2>&1
  "$PYTHON" - <<'PY'
import importlib.metadata, platform, torch
print("python", platform.python_version(), "torch", torch.__version__, "cuda", torch.version.cuda)
for name in ("triton", "numpy", "transformers", "peft", "pytest"):
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "is not installed")
if not torch.cuda.is_available():
    raise SystemExit("torch sees no CUDA device")
print(torch.cuda.get_device_properties(0))
PY
} 2>&1 | tee -a "$LOG"
if [ "${PIPESTATUS[0]}" -ne 0 ]; then exit 1; fi

arch=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
HYLORA_CUDA_ARCHS=${HYLORA_CUDA_ARCHS:-$arch} step build "$PYTHON" setup.py --quiet build_csrc

# Tests that run on a GPU, in the files whose imports are there, on several cores where pytest-xdist
# is: most of the time is compilation.
mapfile -t files < <("$PYTHON" - <<'PY'
import ast, importlib.util, pathlib, sys
for path in sorted(pathlib.Path("tests").glob("test_*.py")):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    takes_device = any(a.arg == "device" for f in functions for a in f.args.args)
    if not takes_device and "mark.gpu" not in text:
        continue
    names = {a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in tree.body if isinstance(n, ast.ImportFrom) and n.module}
    sys.path[:0] = ["tests"]
    lacking = sorted(n for n in {n.partition(".")[0] for n in names} if not importlib.util.find_spec(n))
    if lacking:
        print(f"left out: {path}, without {', '.join(lacking)}", file=sys.stderr)
    else:
        print(path)
PY
)
workers=()
if "$PYTHON" -c 'import xdist' 2>/dev/null; then workers=(-n 8); fi
step tests "$PYTHON" -m pytest -m gpu -q "${workers[@]}" "${files[@]}"
step selftest "$PYTHON" -m hylora_kernels selftest --device cuda --json "$OUT/selftest.json"
step tune "$PYTHON" -m hylora_kernels tune --device cuda "${quick[@]}" --json "$OUT/tune.json"
step bench "$PYTHON" benchmarks/gpu_layers.py "${quick[@]}" "${compile[@]}" --out "$OUT"
card=$("$PYTHON" -c '
import torch
known = ("H100", "A100", "L4", "RTX 4090", "MI300X")
print(next((k for k in known if k in torch.cuda.get_device_name(0)), ""))')
if [ -n "$card" ]; then
  step compare "$PYTHON" benchmarks/gpu_prediction.py --gpu "$card" --compare "$OUT/layers.json"
fi

printf '\n==== summary\n' | tee -a "$LOG"
printf '%s\n' "${summary[@]}" | tee -a "$LOG"
echo "results in $OUT"
exit "$failed"
