"""Options and fixtures of all benchmarks: kept memory, measured limits, a printed summary.

    python -m pytest benchmarks -s --benchmark-only [--quick | --full] [--threads 1,2]

No time is asserted. Outputs are checked against reference.py before anything is timed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # the helpers beside this file

import limits as measured_limits
import ours
import record
from timing import keep_freed_memory

BUSY = 0.5  # load average above which another process holds a core


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="few, small cases: under a minute in all")
    parser.addoption("--full", action="store_true", help="every case, also those of many minutes")
    parser.addoption("--threads", help="numbers of threads to measure (1,2; 1 with --quick)")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    # The plugin's closing table has a row per case and no ratios; record.py has a better one.
    config.option.benchmark_quiet = True
    keep_freed_memory()


def pytest_generate_tests(metafunc):
    if "threads" in metafunc.fixturenames:
        metafunc.parametrize("threads", thread_counts(metafunc.config), ids=lambda n: f"{n}T")


def thread_counts(config) -> list[int]:
    """The numbers asked for, without those that this machine has no cores for."""
    words = config.getoption("--threads") or ("1" if config.getoption("--quick") else "1,2")
    wanted = [int(word) for word in words.split(",")]
    return [count for count in wanted if count <= (os.cpu_count() or 1)] or [1]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def quick(request) -> bool:
    return request.config.getoption("--quick")


@pytest.fixture
def with_threads():
    """A function that sets the number of threads; the test's end restores the former one."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def limits(quick):
    """number of threads -> Limits, measured at first use."""
    return lambda threads: measured_limits.measure(threads, quick)


@pytest.fixture
def backend() -> str:
    """The name of the measured backend; the test is skipped with the reason where it can't be
    used."""
    reason = ours.missing()
    if reason:
        pytest.skip(reason)
    return ours.backend_name()


def pytest_sessionstart(session):
    session.config.load_before = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["hylora"] = {
        "torch": torch.__version__,
        "backend": ours.backend_name(),
        "isa": ours.isa(),
        "float32_products": ours.float32_products(),
        "caches": measured_limits.cache_bytes(),
        "load_before": config.load_before,
    }


def pytest_terminal_summary(terminalreporter, config):
    for line in record.summary():
        terminalreporter.write_line(line)
    if config.load_before > BUSY:
        terminalreporter.write_line(
            f"the machine was busy before the start (load {config.load_before:.1f}): only ratios "
            "of one thread are reliable"
        )
