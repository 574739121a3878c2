"""Devices and dtypes by name."""

from __future__ import annotations

import psutil
import pytest
import torch

from hylora_kernels.support import devices
from hylora_kernels.support.devices import fast_dtype, resolve_device, resolve_dtype


def test_devices(monkeypatch):
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device(torch.device("cpu")) == torch.device("cpu")
    for cuda, mps, wanted in ((2, True, "cuda"), (0, True, "mps"), (0, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=cuda: count)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=mps: there)
        assert resolve_device("auto").type == wanted
        assert resolve_device().type == wanted


def test_devices_that_are_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device 'cuda' is not available; there is: cpu$"):
        resolve_device("cuda")
    with pytest.raises(ValueError, match=r"device 'mps' is not available; there is: cpu$"):
        resolve_device(torch.device("mps"))
    with pytest.raises(ValueError, match="device must be one of auto, cpu, got 'gpu'"):
        resolve_device("gpu")
    with pytest.raises(TypeError, match=r"device must be a str or torch\.device, got int"):
        resolve_device(0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(ValueError, match="device 'cuda:1' is not available; there is: cuda, cpu"):
        resolve_device("cuda:1")


@pytest.mark.parametrize(
    "level, wanted",
    [("AVX2", "float32"), ("DEFAULT", "float32"), ("AVX512", "bfloat16"), ("SVE256", "bfloat16")],
)
def test_the_fast_dtype_depends_on_the_processor(monkeypatch, level, wanted):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: level)
    assert fast_dtype(torch.device("cpu")) == getattr(torch, wanted)
    assert fast_dtype(torch.device("cuda")) == torch.bfloat16


def test_dtypes():
    assert resolve_dtype("auto") is None
    assert resolve_dtype(None) is None
    assert resolve_dtype("bfloat16") is torch.bfloat16
    assert resolve_dtype(torch.float64) is torch.float64
    for wrong in ("int8", torch.int8, 16):
        with pytest.raises(ValueError, match="dtype must be one of auto, bfloat16, float16, float"):
            resolve_dtype(wrong)


class TestFreeMemory:
    """The least of what the machine and the memory cgroups leave."""

    @pytest.fixture
    def group(self, tmp_path, monkeypatch):
        """Makes a cgroup: (kind, path, limit, used, page cache that can be given up)."""
        monkeypatch.setattr(devices, "GROUPS", tmp_path / "groups")
        monkeypatch.setattr(devices, "OWN_GROUPS", tmp_path / "own")
        (tmp_path / "own").write_text("4:memory:/jobs/mine\n3:cpuset:/\n0::/a/b\n")

        def make(kind, path, *values):
            folder = tmp_path / "groups" / kind / path
            folder.mkdir(parents=True, exist_ok=True)
            limit, used, cache = devices.MEMORY_FILES[kind]
            for name, value in zip((limit, used, "memory.stat"), values, strict=True):
                text = f"anon 5\n{cache} {value}\n" if name == "memory.stat" else f"{value}\n"
                (folder / name).write_text(text)

        return make

    @pytest.mark.parametrize("kind", ["memory", ""])
    @pytest.mark.parametrize("place", ["own", "parent", "root"])
    def test_of_a_group(self, kind, place, group):
        own = "jobs/mine" if kind else "a/b"
        group(kind, {"own": own, "parent": own.split("/")[0], "root": "."}[place], 5000, 3000, 700)
        assert devices.free_memory(torch.device("cpu")) == 2700

    def test_the_least_of_several(self, group):
        group("", "a", 9000, 1000, 0)
        group("", "a/b", "max", 1000, 0)
        group("memory", "jobs", 4000, 1500, 0)
        assert devices.free_memory(torch.device("cpu")) == 2500

    def test_without_a_limit(self, group):
        group("memory", ".", 9223372036854771712, 1000, 0)
        free, there = devices.free_memory(torch.device("cpu")), psutil.virtual_memory().available
        assert abs(free - there) < 2**30

    def test_without_groups(self, group, tmp_path):
        (tmp_path / "own").unlink()
        assert devices.free_memory(torch.device("cpu")) > 2**26
