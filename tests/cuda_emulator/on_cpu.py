"""The cuda backend on a CPU: its ops compiled with the emulated kernels, a CPU as its device."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

from hylora_kernels.backends import cuda as backend
from hylora_kernels.backends.cuda import launch
from hylora_kernels.backends.shared import packed_gpu

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
COMPILER = shutil.which("g++")
TARGET = (3, 80)  # multiprocessors, architecture
TORCH_TARGET = "0x020a000000000000"  # setup.py's


KERNELS = (*sorted((CSRC / "cuda").glob("*.cu")), HERE / "fibers.cpp")
NO_LAUNCH = (HERE / "no_launch.cpp",)


def build(kernels: tuple[Path, ...] = KERNELS) -> Path:
    """The ops as a library, built once for all workers of a test run; with NO_LAUNCH its launches
    do nothing."""
    folder = Path(os.environ["HYLORA_CACHE"]) / "cuda_emulated"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{kernels[0].stem}.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(library, kernels)
    return library


def _compile(library: Path, kernels: tuple[Path, ...]) -> None:
    torch_folder = Path(torch.__file__).parent
    command = [COMPILER, "-shared", "-fPIC", "-std=c++17", "-O1", "-fno-strict-aliasing"]
    command += [
        "-fvisibility=hidden",
        "-DHYLORA_EMULATION",
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
    ]
    command += [f"-I{CSRC}", f"-I{CSRC / 'cuda'}", f"-I{HERE}"]
    command += ["-isystem", torch_folder / "include", "-Wno-unknown-pragmas", "-x", "c++"]
    command += [
        CSRC / "cuda" / "bindings.cpp",
        CSRC / "cuda" / "plan.cpp",
        *kernels,
    ]
    command += ["-x", "none", f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
    command += ["-Wl,-z,defs", "-o", library.with_suffix(".tmp")]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    library.with_suffix(".tmp").rename(library)


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """Inside it the backend serves tensors on the CPU; the library must be loaded."""
    on_a_cpu = {"DEVICE": "cpu", "why_not": lambda: "", "_device_lacks": lambda device: ""}
    with (
        mock.patch.multiple(backend, **on_a_cpu),
        mock.patch.object(launch, "target_of", lambda device: TARGET),
        mock.patch.object(packed_gpu, "kernels_target", lambda device: TARGET),
    ):
        yield
