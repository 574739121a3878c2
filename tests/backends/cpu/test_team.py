"""The worker threads of the CPU kernels (csrc/cpu/team.h), by themselves: a C++ program that a race
detector watches, and seeded bugs that it must catch."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest
from helpers.building import ROOT
from helpers.mutants import TESTS, Mutant

CHECKS = ["chain", "changing_threads", "several_callers", "as_many_as_asked", "nested"]
CHECKS += ["exceptions", "late_workers", "fork_child", "idle", "leave"]
SANITIZERS = {"none": [], "thread": ["-fsanitize=thread"], "address": ["-fsanitize=address"]}

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or not (ROOT / "csrc").is_dir(), reason="needs g++ and a checkout"
)


def compiled(folder, sanitizer: str, sources=ROOT):
    """The stress program, with the team of `sources`."""
    program = folder / f"team_{sanitizer}"
    flags = ["-std=c++17", "-O1", "-g1", "-pthread", "-Wall", "-Wextra", *SANITIZERS[sanitizer]]
    files = [TESTS / "helpers" / "team.cpp", sources / "csrc" / "cpu" / "team.cpp"]
    command = ["g++", *flags, f"-I{sources / 'csrc'}", *map(str, files), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode and "cannot find" in built.stderr:
        pytest.skip(f"g++ has no sanitizer of {sanitizer}s here")
    assert built.returncode == 0, built.stderr
    return program


def failure(program, check: str) -> str:
    """Why the check failed, "" if it passed."""
    try:
        done = subprocess.run([str(program), check], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return "waits for ever"
    return done.stderr[-3000:] or f"exit {done.returncode}" if done.returncode else ""


@pytest.fixture(scope="module", params=SANITIZERS)
def program(request, tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("team"), request.param)


@pytest.mark.parametrize("check", CHECKS)
def test_a_team(program, check):
    if program.name == "team_thread" and check == "fork_child":
        pytest.skip("ThreadSanitizer lets no child of a process with threads start threads")
    assert failure(program, check) == ""


# Name: the text of team.cpp, what it becomes, and the check that must fail because of it.
MUTANTS = {
    "a caller that does not wait": ("  pool.wait_for_parts();\n", "", "chain"),
    "a caller that nobody wakes": ("caller_asleep.load()", "false", "as_many_as_asked"),
    "a part that is left out": ("left.store(parts)", "left.store(parts - 1)", "chain"),
    "what a part throws is lost": (
        "if (pool.failed.exchange(false)) throw",
        "if (false) throw",
        "exceptions",
    ),
    "workers that a child does not have": ("  process_pool.store(nullptr);\n", "", "fork_child"),
    "workers that never sleep": ("          sleep_while(me.asleep, 1);\n", "", "idle"),
    "two callers at once": ("if (pool.has_caller.exchange(true)) return;", "", "several_callers"),
}


@pytest.mark.skipif(
    os.environ.get("HYLORA_TEST_ALL") != "1", reason="takes long: HYLORA_TEST_ALL=1"
)
@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_of_the_team_is_caught(name, tmp_path):
    old, new, check = MUTANTS[name]
    mutant = Mutant("csrc/cpu/team.cpp", old, new, "")
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    mutant.write(tmp_path)
    sanitizer = "thread" if check in ("chain", "several_callers") else "none"
    assert failure(compiled(tmp_path, sanitizer, tmp_path), check), "survives"
