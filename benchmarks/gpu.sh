#!/usr/bin/env bash
# Everything that needs a GPU, most valuable first, within --minutes: gpu_session.py has the steps.
#
#   benchmarks/gpu.sh --minutes 11 --out runs/gpu        results.md, session.json, ... in runs/gpu
#   benchmarks/gpu.sh --only tinyllama                   one step (--help names them in its errors)
#   PYTHON=/path/to/python benchmarks/gpu.sh             with this Python
#
# Without PYTHON it is that of .venv, or python3 where that has torch: then nothing is installed or
# downloaded, and the library is built in place. With neither, make venv comes first (a few minutes).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

has_torch() { "$1" -c 'import importlib.util as u; raise SystemExit(not u.find_spec("torch"))' 2>/dev/null; }

python=${PYTHON:-}
for candidate in .venv/bin/python python3; do
  if [ -z "$python" ] && has_torch "$candidate"; then python=$candidate; fi
done
if [ -z "$python" ]; then
  make venv
  python=.venv/bin/python
  "$python" -m pip install --quiet --disable-pip-version-check -c constraints.txt peft # a rival
fi
exec "$python" benchmarks/gpu_session.py "$@"
