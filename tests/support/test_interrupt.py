"""Ctrl-C while a command is still imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import hylora_kernels

ROOT = Path(hylora_kernels.__file__).resolve().parents[1]
SCRIPT = "from hylora_kernels.cli.main import main\nmain()\n"  # as pip writes it


@pytest.mark.parametrize("module", ["torch", "typer"])
@pytest.mark.parametrize("words", [["-m", "hylora_kernels", "info"], ["hylora", "info"]])
def test_a_command_ends_in_one_line(module, words, tmp_path):
    done = interrupted_while_importing(module, words, tmp_path)
    assert done.stderr == "\ninterrupted. Nothing was written.\n" and done.returncode == 130


@pytest.mark.parametrize("words", [["-c", SCRIPT], ["-m", "mine"]])
def test_a_program_of_ones_own_gets_the_exception(words, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("import hylora_kernels\n")
    done = interrupted_while_importing("torch", words, tmp_path)
    assert done.stderr.endswith("KeyboardInterrupt\n") and "interrupted." not in done.stderr


def interrupted_while_importing(module: str, words: list[str], folder: Path):
    """A process in which the import of `module` raises what Ctrl-C does there."""
    (folder / f"{module}.py").write_text("raise KeyboardInterrupt")
    (folder / "hylora").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
