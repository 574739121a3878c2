"""Fixtures of every test: poisoned memory, fixed seeds, one thread a worker, a temporary cache.

Torch's deterministic mode poisons memory: everything allocated without a value (torch.empty,
empty_like, new_empty, resize_, and at::empty in C++) is filled with NaN, or with the largest
integer, so an output that a kernel forgets to write fails its test. Patched functions would do the
same, but break torch.compile, fake and meta tensors.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

# Without a GPU Triton's kernels run in its interpreter. Triton reads the variable when it is
# imported, which the package does.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hylora_kernels.backends import triton as triton_backend
from hylora_kernels.backends.cpu import limbs, packed

# Without it cuBLAS warns in deterministic mode. It must be set before CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_configure(config):
    """HYLORA_CACHE is a temporary folder for the session, or $HYLORA_TEST_CACHE, which is kept."""
    if hasattr(config, "workerinput"):
        cache = config.workerinput["hylora_cache"]
        torch.set_num_threads(1)
    elif kept := os.environ.get("HYLORA_TEST_CACHE"):
        cache = str(Path(kept).resolve())
    else:
        cache = tempfile.mkdtemp(prefix="hylora-tests-")
        config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))
    config.hylora_cache = cache
    os.environ["HYLORA_CACHE"] = cache
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(cache) / "inductor")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    """All workers of pytest-xdist share the controller's cache."""
    node.workerinput["hylora_cache"] = node.config.hylora_cache


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Tests marked slow come first: workers give out the rest in ever smaller parts and so end
    together, where a test of a minute among the last would leave the others idle."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_generate_tests(metafunc):
    """A test with the argument `device` runs on the CPU, and on a GPU (marked gpu) if any."""
    if "device" in metafunc.fixturenames:
        cuda = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else []
        metafunc.parametrize("device", ["cpu", *cuda])


@pytest.fixture(scope="session", autouse=True)
def _interpreter():
    """Triton's interpreter, with bfloat16 repaired and without work that slows it fivefold."""
    if os.environ.get("TRITON_INTERPRET") != "1" or not triton_backend.INSTALLED:
        yield
        return
    from triton_interpreter import bf16, internals

    triton_backend.INTERPRETED_DTYPES = triton_backend.DTYPES
    with bf16.repaired(), internals.hurried():
        yield


@pytest.fixture(autouse=True)
def _seeded_and_poisoned(monkeypatch):
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Deterministic mode multiplies many rows of float32 by multiply-adds. The tests take the other
    # path instead, bf16 limbs: bf16 pieces whose sum is a float32.
    monkeypatch.setattr(limbs, "six_products_serve", lambda: True)
    monkeypatch.setattr(packed, "six_products_stay_faster", lambda: True)


@pytest.fixture
def plain_plot(monkeypatch):
    """Write a text instead of a picture: drawing takes longer than any training of these tests."""
    module = sys.modules["hylora_kernels.recovery.finetune"]
    monkeypatch.setattr(module, "loss_plot", lambda curves, path: path.write_text(str(curves)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a checkpoint, shared by the tests of a module; `copied` may be changed."""
    folder = tmp_path_factory.mktemp("saved")
    from helpers import checkpoints

    from hylora_kernels.model.saving import save_pretrained

    torch.manual_seed(0)
    save_pretrained(checkpoints.build("llama, scaled rope"), folder)
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    """A copy of the folder `saved`."""
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path
