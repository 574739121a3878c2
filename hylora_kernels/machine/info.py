"""info(): versions, devices, instruction sets, backends and why they can't be used, the cache."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from hylora_kernels.backends import available_backends, cpu_levels, cuda_code
from hylora_kernels.support.cache import cache_root, cache_size
from hylora_kernels.support.console import format_bytes
from hylora_kernels.support.devices import cpu_field, device_name
from hylora_kernels.support.report import Report

PACKAGES = (
    "hylora-kernels",
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "safetensors",
    "datasets",
)
# The instruction sets that decide the speed of a linear, as /proc/cpuinfo spells them, by the field
# that lists them: "flags" on x86, "Features" on Arm.
ISA_FLAGS = {
    "flags": ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8"),
    "Features": ("asimd", "asimddp", "bf16", "i8mm", "sve"),
}


@dataclass(frozen=True)
class Device:
    """name: torch's name for it ("cuda:0"). memory: bytes."""

    name: str
    model: str
    memory: int


@dataclass(frozen=True)
class Environment(Report):
    """The software and hardware of this computer.

    versions:       package -> version, None if it isn't installed.
    cores, threads: physical cores; threads that torch uses.
    cpu_capability: the instruction set that torch picks its own kernels for.
    isa:            flag -> True if this CPU has it; empty where the system has no /proc/cpuinfo.
    """

    versions: dict[str, str | None]
    system: str
    devices: list[Device]
    cores: int
    threads: int
    cpu_capability: str
    isa: dict[str, bool]


@dataclass(frozen=True)
class Cache(Report):
    """The cache folder (HYLORA_CACHE, else the system's) and the bytes of the files in it."""

    path: Path
    bytes: int


@dataclass(frozen=True)
class Info(Report):
    """What `hylora info` prints and writes as JSON.

    backends:   name -> "" if it can be used, else the reason why not. Where the C++ library wasn't
                built, that is the reason which the build gave.
    cpu_level:  the instruction set that the backend "cpu" uses, or "".
    cpu_levels: each instruction set it has kernels for -> "" or the reason why this CPU can't.
    cuda_code:  the GPUs that the backend "cuda" has machine code for, or why it has none.
    variables:  every HYLORA_* of the environment: HYLORA_CSRC, for one, names code that runs.
    """

    environment: Environment
    backends: dict[str, str]
    cpu_level: str
    cpu_levels: dict[str, str]
    cuda_code: str
    cache: Cache
    variables: dict[str, str]

    def rows(self) -> list[tuple[str, str]]:
        """(name, text) of each line to print."""
        env = self.environment
        rows = [(name, version or "not installed") for name, version in env.versions.items()]
        rows.append(("system", env.system))
        rows += [(d.name, f"{d.model}, {format_bytes(d.memory)}") for d in env.devices]
        rows.append(("threads", f"{env.threads} of {env.cores} cores"))
        rows.append(("CPU kernels", f"{env.cpu_capability} (what torch picks them for)"))
        if env.isa:
            for word, wanted in (("CPU has", True), ("CPU lacks", False)):
                flags = ", ".join(flag for flag, has in env.isa.items() if has is wanted)
                rows.append((word, flags or "none of those asked for"))
        rows += [(f"backend {k}", reason or "available") for k, reason in self.backends.items()]
        if self.cpu_level:
            rows.append(("cpu level", f"{self.cpu_level} (HYLORA_ISA forces another)"))
            rows += [(f"cpu {k}", reason) for k, reason in self.cpu_levels.items() if reason]
        rows.append(("cuda code", self.cuda_code))
        rows.append(("cache", f"{self.cache.path}, {format_bytes(self.cache.bytes)}"))
        return [*rows, *self.variables.items()]


def info() -> Info:
    """Look at this computer."""
    variables = {k: v for k, v in sorted(os.environ.items()) if k.startswith("HYLORA_")}
    return Info(environment(), available_backends(), *cpu_levels(), cuda_code(), cache(), variables)


def cache() -> Cache:
    return Cache(cache_root(), cache_size())


def environment() -> Environment:
    versions = {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
    return Environment(
        versions=versions,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        devices=_devices(),
        cores=psutil.cpu_count(logical=False) or os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        isa=_isa(),
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[Device]:
    memory = psutil.virtual_memory().total
    found = [Device("cpu", device_name(torch.device("cpu")), memory)]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(Device(f"cuda:{index}", properties.name, properties.total_memory))
    if torch.backends.mps.is_available():
        found.append(Device("mps", "Apple GPU (shares the CPU's memory)", memory))
    return found


def _isa() -> dict[str, bool]:
    for field, flags in ISA_FLAGS.items():
        if listed := cpu_field(field).split():
            return {flag: flag in listed for flag in flags}
    return {}
