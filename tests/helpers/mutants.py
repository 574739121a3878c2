"""Mutants: seeded bugs, each a textual change of one file, and the test that must catch it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from helpers.building import ROOT

TESTS = Path(__file__).resolve().parents[1]


class Mutant(NamedTuple):
    """`new` in the place of `old`, which has to be in the file exactly once.

    file: relative to the checkout. test: "file::function" below tests/, or BATTERY.
    """

    file: str
    old: str
    new: str
    test: str

    def write(self, checkout: Path) -> None:
        """Put the bug into a copy of the checkout."""
        (checkout / self.file).write_text(self.mutated(), encoding="utf-8")

    def mutated(self) -> str:
        source = (ROOT / self.file).read_text(encoding="utf-8")
        assert source.count(self.old) == 1, f"{self.file}: {source.count(self.old)} x {self.old!r}"
        return source.replace(self.old, self.new)


def copy_checkout(to: Path) -> Path:
    """A copy of the package and its tests; all else of the checkout is linked to."""
    shutil.copytree(ROOT / "hylora_kernels", to / "hylora_kernels", ignore=_no_bytecode)
    shutil.copytree(TESTS, to / "tests", ignore=_no_bytecode)
    for entry in ROOT.iterdir():
        if not (to / entry.name).exists() and entry.name not in (".git", "build"):
            (to / entry.name).symlink_to(entry)
    return to


_no_bytecode = shutil.ignore_patterns("__pycache__")


def run_tests(checkout: Path, *tests: str, **environment: str) -> subprocess.CompletedProcess:
    """pytest of these tests on the package of a copy, up to the first failure."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "HYLORA_"))}
    words = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    return subprocess.run(
        [sys.executable, *words, *(str(checkout / "tests" / test) for test in tests)],
        cwd=checkout,
        env=clean | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
