"""Shared by the tests of setup.py: setup.py as a module, a small stand-in for a checkout, and tools
that look into the library. Fixtures have other names than their functions, so that a test file can
import the functions without shadowing the fixtures."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hylora_kernels

ROOT = Path(hylora_kernels.__file__).resolve().parents[1]
LEVELS = ("avx2", "avx512", "avx512_bf16", "amx_bf16")
needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")


@pytest.fixture(name="setup_py")
def a_setup_py(monkeypatch):
    spec = importlib.util.spec_from_file_location("hylora_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("CXX", "CUDA_HOME", "MAX_JOBS", *(n for n in os.environ if n[:7] == "HYLORA_")):
        monkeypatch.delenv(name, raising=False)
    return module


@pytest.fixture(name="checkout")
def a_checkout(tmp_path):
    """A copy of what a build needs, with a small csrc/ that compiles in no time."""
    folder = tmp_path / "check out"  # a space, for the quoting
    (folder / "hylora_kernels").mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "hylora_kernels" / "__init__.py").write_text("")
    (folder / "csrc" / "cpu" / "kernels").mkdir(parents=True)
    (folder / "csrc" / "cpu" / "call.h").write_text("#pragma once\n")
    (folder / "csrc" / "cpu" / "bindings.cpp").write_text(
        '#include "call.h"\nint binding() { return 1; }\n'
    )
    for level in ("scalar", *LEVELS):
        source = f"namespace {{ int f() {{ return 0; }} }}\nint {level}() {{ return f(); }}\n"
        (folder / "csrc" / "cpu" / "kernels" / f"{level}.cpp").write_text(source)
    return folder


def run_setup(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k != "CXX" and not k.startswith("HYLORA_")}
    return subprocess.run(
        [sys.executable, "setup.py", *words],
        cwd=folder,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def run_python_in(folder: Path, code: str) -> str:
    """What `code` prints in a process that imports the package from `folder`."""
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def tool(name: str, *words: object) -> str:
    if shutil.which(name) is None:
        pytest.skip(f"{name} isn't installed")
    return subprocess.run(
        [name, *map(str, words)], capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture(name="library")
def the_library():
    path = ROOT / "hylora_kernels" / "_csrc.so"
    if not path.is_file():
        pytest.skip("hylora_kernels/_csrc.so isn't built")
    return path
