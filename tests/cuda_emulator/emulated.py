"""The CUDA kernels on the CPU emulator: built, given tensors, run, their results read back.

A Script collects launches; run() has one process do all of them. forward() and backward() add what
the room would launch for a layer.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "csrc" / "cuda"
COMPILER = shutil.which("g++")
SANITIZERS = {"plain": [], "address": ["-fsanitize=address,undefined"], "thread": ["-fsanitize=thread"]}
TILE_64, TILE_128, DECODE = range(3)  # call.h's Kernel
TYPES = {torch.bfloat16: 0, torch.float16: 1}


class Fault(AssertionError):
    """The emulator or a sanitizer has seen the kernel do what it must not do."""


def build(folder: Path, sanitizer: str = "plain", kernels: Path = KERNELS) -> Path:
    """The driver with the kernels of a folder, built into `folder`."""
    flags = ["-std=c++17", "-fno-strict-aliasing", "-fno-omit-frame-pointer", "-DHYLORA_EMULATION"]
    flags += ["-g1", "-O2" if sanitizer == "plain" else "-O1", *SANITIZERS[sanitizer]]
    if sanitizer == "address":
        flags += ["-fno-sanitize-recover=all"]
    fibers, driver = folder / "fibers.o", folder / f"driver-{sanitizer}"
    compile_one = [COMPILER, "-Wall", "-Wno-unknown-pragmas", f"-I{kernels}", f"-I{HERE}"]
    parts = [HERE / "driver.cpp", kernels / "plan.cpp", kernels / "kernels.cu"]
    if not fibers.exists():
        _do([*compile_one, "-std=c++17", "-O2", "-c", HERE / "fibers.cpp", "-o", fibers])
    _do([*compile_one, *flags, "-x", "c++", *parts, "-x", "none", fibers, "-o", driver])
    return driver


def _do(command) -> None:
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]


@dataclass
class Launch:
    """What the driver says about one."""

    kernel: int
    split: int
    programs: int
    order: str
    seconds: float
    left: int  # counters that are not zero afterwards
    error: str


@dataclass
class Script:
    """Launches to be made, and what they are made with."""

    lines: list[str] = field(default_factory=list)
    data: list[bytes] = field(default_factory=list)
    size: int = 0
    outputs: list[tuple[str, torch.dtype, tuple]] = field(default_factory=list)
    names: int = 0

    def give(self, tensor: Tensor | None, shift: int = 0) -> str | None:
        """A buffer with what a tensor's storage holds from its first element to its last."""
        if tensor is None:
            return None
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        flat = tensor.as_strided((last + 1,), (1,)).contiguous()
        raw = flat.view(torch.uint8).numpy().tobytes()
        name = self._name()
        self.lines.append(f"buffer name={name} bytes={len(raw)} at={self.size} shift={shift}")
        self.data.append(raw)
        self.size += len(raw)
        return name

    def empty(self, dtype: torch.dtype, *shape: int) -> str:
        """A buffer for a result, NaN until it is written."""
        name, bytes_ = self._name(), torch.Size(shape).numel() * dtype.itemsize
        self.lines.append(f"buffer name={name} bytes={bytes_}")
        return name

    def launch(self, verb: str, **values) -> None:
        given = (f"{name}={value}" for name, value in values.items() if value is not None)
        self.lines.append(f"{verb} {' '.join(given)}")

    def write(self, name: str, dtype: torch.dtype, *shape: int) -> int:
        """Read a buffer back: its place in run()'s results."""
        self.lines.append(f"write name={name}")
        self.outputs.append((name, dtype, shape))
        return len(self.outputs) - 1

    def _name(self) -> str:
        self.names += 1
        return f"b{self.names}"


def run(driver: Path, script: Script, wrapper=(), timeout=300) -> tuple[list[Tensor], list[Launch]]:
    """(results, launches). Raises Fault where a launch went wrong, or left counters behind."""
    with tempfile.TemporaryDirectory() as name:
        paths = [Path(name, part) for part in ("script", "input", "output")]
        paths[0].write_text("\n".join(script.lines) + "\n")
        paths[1].write_bytes(b"".join(script.data))
        command = [*wrapper, driver, *paths]
        environment = {"TSAN_OPTIONS": "halt_on_error=1 report_signal_unsafe=0"}
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env=environment, check=False
        )
        if done.returncode:
            raise Fault(f"exit {done.returncode}: {done.stderr[-3000:]}")
        raw = paths[2].read_bytes()
    launches = [_launch_of(line) for line in done.stdout.splitlines()]
    for launch in launches:
        if launch.left or launch.error:
            raise Fault(f"{launch.left} counters left, error {launch.error!r}: {launch}")
    results, at = [], 0
    for _, dtype, shape in script.outputs:
        count = torch.Size(shape).numel()
        flat = torch.frombuffer(bytearray(raw), dtype=dtype, count=count, offset=at)
        results.append(flat.reshape(shape))
        at += count * dtype.itemsize
    assert at == len(raw)
    return results, launches


def _launch_of(line: str) -> Launch:
    words = dict(re.findall(r"(\w+)=(\S*)", line))
    kinds = Launch.__annotations__
    return Launch(**{k: {"int": int, "float": float}.get(kinds[k], str)(v) for k, v in words.items()})


# ----------------------------------------------------------------------------------- of one layer


@dataclass(frozen=True)
class Choice:
    """How a layer's launches are made; kernel None: as the plan has it, for four processors."""

    kernel: int | None = None
    split: int = 1
    thin_split: int | None = None
    programs: int = 4
    residents: int | None = None  # blocks alive together, all of them if None
    seed: int = 0
    shift: int = 0  # bytes that every input is off its 16-byte alignment


def layer(script: Script, inputs, dy: Tensor, choice: Choice) -> dict[str, int | None]:
    """Forward and backward of numerics.Inputs: the places of y, h_a and the gradients."""
    x, SVh, U, A, B, bias, alpha, pivots = inputs
    x, dy = (t.reshape(-1, t.shape[-1]) for t in (x, dy))
    x, dy = (t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous() for t in (x, dy))
    (M, K), N, (rank, _), dtype = x.shape, dy.shape[1], SVh.shape, x.dtype
    lora_rank = 0 if A is None else len(A)
    others = None if pivots is None else _others(pivots, N)
    given = [script.give(t, choice.shift) for t in (x, SVh, U, A, B, bias, dy)]
    gx, gSVh, gU, gA, gB, gbias, gdy = given
    lists = {"pivots": script.give(pivots), "others": script.give(others)}
    lists["others_count"] = None if others is None else len(others)
    same = _order(choice) | {"type": TYPES[dtype], "M": M, "lora_rank": lora_rank, "alpha": alpha}
    one = same | lists | {"rank": rank}
    if choice.kernel is not None:
        one |= {"kernel": choice.kernel, "split": choice.split, "programs": choice.programs}
    y, h_a = script.empty(dtype, M, N), script.empty(dtype, M, lora_rank)
    pair = {"W1": gSVh, "w1_stride": K, "W1a": gA, "w1a_stride": K}
    pair |= {"W2": gU, "w2_stride": rank, "W2a": gB, "w2a_stride": lora_rank}
    pair |= {"x": gx, "x_stride": x.stride(0), "bias": gbias, "y": y, "h_a": h_a, "K": K, "N": N}
    script.launch("dataflow", transposed=0, **one, **pair)
    dx, dh_a = script.empty(dtype, M, K), script.empty(dtype, M, lora_rank)
    back = {"W1": gU, "w1_stride": rank, "W1a": gB, "w1a_stride": lora_rank}
    back |= {"W2": gSVh, "w2_stride": K, "W2a": gA, "w2a_stride": K}
    back |= {"x": gdy, "x_stride": dy.stride(0), "y": dx, "h_a": dh_a, "K": N, "N": K}
    if one.get("kernel") == DECODE:
        one["kernel"] = TILE_64
    script.launch("dataflow", transposed=1, **one, **back)
    places = {"y": script.write(y, dtype, M, N), "dx": script.write(dx, dtype, M, K)}
    places |= {"h_a": script.write(h_a, dtype, M, lora_rank), "dA": None, "dB": None, "db": None}
    if A is not None:
        grads = {"dA": (lora_rank, K), "dB": (N, lora_rank), "db": (N,)}
        names = {name: script.empty(dtype, *shape) for name, shape in grads.items()}
        if bias is None:
            del names["db"]
        made = {"dh_a": dh_a, "x": gx, "h_a": h_a, "dy": gdy, "K": K, "N": N}
        strides = {"x_stride": x.stride(0), "dy_stride": dy.stride(0), "split": choice.thin_split}
        script.launch("thin", **same, **made, **strides, **names)
        places |= {name: script.write(at, dtype, *grads[name]) for name, at in names.items()}
    script.lines.append("drop")
    return places


def _order(choice: Choice) -> dict:
    return {"seed": choice.seed, "residents": choice.residents}


def _others(pivots: Tensor, N: int) -> Tensor:
    is_other = torch.ones(N, dtype=torch.bool)
    is_other[pivots.long()] = False
    return is_other.nonzero().flatten()
