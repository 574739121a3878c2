"""hylora info: what stands in the environment, and a library that is not ours."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import safetensors._safetensors_rust as foreign

from hylora_kernels.backends.shared import library
from hylora_kernels.machine.info import info

SAY = """
import torch, hylora_kernels
from hylora_kernels.machine.info import info
print(*(f"{name}: {text}" for name, text in info().rows()), sep="\\n")
layer = hylora_kernels.SVDLoRALinear(64, 64, 16)
print("y:", tuple(layer(torch.zeros(2, 64)).shape))
"""


def test_every_variable_of_ours_is_shown(monkeypatch):
    monkeypatch.setenv("HYLORA_CSRC", "/elsewhere/_csrc.so")
    monkeypatch.setenv("HYLORA_BACKEND", "eager")
    rows = dict(info().rows())
    assert rows["HYLORA_CSRC"] == "/elsewhere/_csrc.so"
    assert rows["HYLORA_BACKEND"] == "eager"
    assert info().variables.keys() == {name for name in os.environ if name.startswith("HYLORA_")}


@pytest.mark.parametrize("kind", ["text", "missing", "folder", "FIFO"])
def test_a_path_that_is_no_library_is_named(kind, tmp_path, monkeypatch):
    """A FIFO is not waited for."""
    path = tmp_path / "_csrc.so"
    monkeypatch.setenv("HYLORA_CSRC", str(path))
    monkeypatch.setattr(library, "LIBRARY", path)
    make = {"text": path.touch, "folder": path.mkdir, "FIFO": lambda: os.mkfifo(path)}
    make.get(kind, list)()
    wanted = "file too short" if kind == "text" else f"HYLORA_CSRC={path} is no file"
    assert wanted in library._load()


def test_a_library_without_our_ops_is_refused_and_the_package_works_without():
    path = foreign.__file__
    environment = os.environ | {"HYLORA_CSRC": path}
    command = [sys.executable, "-c", SAY]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    rows = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    reason = f"{path} lacks the op cpu_isa: it is older than the package (build it again) or no"
    assert rows["backend cpu"].startswith(reason)
    assert rows["HYLORA_CSRC"] == path
    assert rows["y"] == "(2, 64)"
