"""Device and dtype names, as users write them, resolved to torch's objects."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from itertools import chain
from pathlib import Path, PurePosixPath

import psutil
import torch
from torch import nn

CPUINFO, OWN_GROUPS = Path("/proc/cpuinfo"), Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")
# Of a memory cgroup, version 1 and 2: its limit, what is used of it, and the line of memory.stat
# that says how much of that is page cache which the system gives up.
MEMORY_FILES = {
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    "": ("memory.max", "memory.current", "inactive_file"),
}

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """A device or its name -> an available torch.device; "auto" is cuda, else mps, else cpu.

    Raises ValueError naming the devices that are available, TypeError for any other type.
    """
    if not isinstance(device, str | torch.device):
        raise TypeError(f"device must be a str or torch.device, got {type(device).__name__}")
    counts = {
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
        "cpu": 1,
    }
    available = [kind for kind, count in counts.items() if count]
    if device == "auto":
        return torch.device(available[0])
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(
            f"device must be one of auto, {', '.join(available)}, got {device!r}"
        ) from None
    if (found.index or 0) >= counts.get(found.type, 0):
        raise ValueError(
            f"device {str(found)!r} is not available; there is: {', '.join(available)}"
        )
    return found


def device_name(device: torch.device) -> str:
    """The device's model: "NVIDIA H100 80GB HBM3", "AMD EPYC 9R14"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return cpu_field("model name") or platform.processor() or "CPU"
    return device.type.upper()


def cpu_field(name: str) -> str:
    """The first CPU's field of this name in /proc/cpuinfo; "" if there is none."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return ""
    fields = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in fields if key.strip() == name), "")


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU, or in the machine and in the limit of this process's container
    or job, whichever is less."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([psutil.virtual_memory().available, *_free_in_groups()])


def _free_in_groups() -> Iterator[int]:
    """What the memory cgroups of this process, and those that these stand in, leave it."""
    try:
        lines = OWN_GROUPS.read_text().splitlines()
    except OSError:
        return  # Not Linux.
    for _, kind, path in (line.split(":", 2) for line in lines):
        if kind not in MEMORY_FILES:
            continue
        limit, used, cache = MEMORY_FILES[kind]
        group = PurePosixPath(path)
        # A container sees its own group at the root.
        for inner in (group, *group.parents):
            folder = GROUPS / kind / inner.relative_to("/")
            try:
                most, now = int((folder / limit).read_text()), int((folder / used).read_text())
                stat = dict(
                    line.split() for line in (folder / "memory.stat").read_text().splitlines()
                )
            except (OSError, ValueError):  # No such group, or "max".
                continue
            yield max(most - now + int(stat.get(cache, 0)), 0)


def input_device(model: nn.Module) -> torch.device:
    """The device that a causal LM takes token ids on: that of its embedding, packed or not, or the
    one to which accelerate moves an offloaded embedding."""
    embedding = model.get_input_embeddings()
    device = next(chain(embedding.parameters(), embedding.buffers())).device
    hook = getattr(embedding, "_hf_hook", None)
    return torch.device(hook.execution_device) if device.type == "meta" and hook else device


def floating_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the model's first floating parameter, the one that it computes in; parameters
    that are codes come before it."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where `device` multiplies it fast, else float32.

    torch has no fast bfloat16 product on an x86 processor without AVX-512: on two AVX2 cores a
    gradient of 64 tokens of a 135M model takes 17 s in bfloat16 and 2.6 s in float32.
    """
    level = torch.backends.cpu.get_cpu_capability()
    is_slow = device.type == "cpu" and not level.startswith(("AVX512", "SVE"))
    return torch.float32 if is_slow else torch.bfloat16


def resolve_dtype(dtype: str | torch.dtype | None = "auto") -> torch.dtype | None:
    """A name or a floating torch.dtype -> that dtype; "auto" or None -> None: keep the model's own.

    Raises ValueError for anything else.
    """
    if dtype is None or dtype == "auto":
        return None
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    raise ValueError(f"dtype must be one of auto, {', '.join(DTYPES)}, got {dtype!r}")
