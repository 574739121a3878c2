"""The CUDA kernels on the CPU emulator: built, given tensors, run, their results read back.

A Script collects launches; run() has one process do all of them. layer() adds the launches that the
backend would make for a layer.
"""

from __future__ import annotations

import fcntl
import functools
import os
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
# -fno-strict-aliasing: the kernels read numbers as words, as nvcc lets them. -Og: compiling what
# AddressSanitizer checks takes 19 s where the compiler is asked to optimise it, 8 so.
_COMMON = ("-std=c++17", "-DHYLORA_EMULATION", "-fno-strict-aliasing", "-g1", "-Wall", "-Wextra")
_COMMON += ("-Wno-unknown-pragmas",)
FLAGS = {
    "plain": (*_COMMON, "-Og"),
    "address": (*_COMMON, "-Og", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": (*_COMMON, "-Og", "-fsanitize=thread"),
}
TILE_64, TILE_128, DECODE = range(3)  # call.h's Kernel
TYPES = {torch.bfloat16: 0, torch.float16: 1}


class Fault(AssertionError):
    """The emulator or a sanitizer has caught a kernel in a fault."""


@functools.cache
def driver(sanitizer: str = "plain") -> Path:
    """The driver with the kernels as they are, built by the first of a session's workers."""
    folder = Path(os.environ["HYLORA_CACHE"]) / "emulator"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder / f"driver-{sanitizer}"
        return done if done.exists() else build(folder, sanitizer)


def build(
    folder: Path, sanitizer: str = "plain", kernels: Path = KERNELS, frame=None, changed: str = ""
) -> Path:
    """The driver with the kernels of one folder, built into another. frame: a folder where it has
    been built before and all but the file `changed` of the kernels is the same."""
    flags = [*FLAGS[sanitizer], f"-I{kernels}", f"-I{HERE}"]
    sources = sorted(kernels.glob("*.cu"))
    if frame:  # quantized.h includes other headers, but what they are changed for is elsewhere
        sources = [
            source for source in sources if ("quantized" in changed) == (source.stem == "quantized")
        ]
    else:
        sources = [*sources, HERE / "driver.cpp", kernels / "plan.cpp"]
        # Built without sanitizers: one thread runs all fibers, which orders what they share.
        _do(
            "-O2",
            "-std=c++17",
            "-Wall",
            "-Wextra",
            "-c",
            HERE / "fibers.cpp",
            "-o",
            folder / "fibers.o",
        )
    built = {f"{source.stem}-{sanitizer}.o": source for source in sources}
    for name, source in built.items():
        _do(*flags, "-x", "c++", "-c", source, "-o", folder / name)
    # The linker takes the first of several inline functions of one name: that of what is new.
    objects = [folder / name for name in built]
    names = ("driver", "kernels", "plan", "quantized")
    kept = [f"{name}-{sanitizer}.o" for name in names if f"{name}-{sanitizer}.o" not in built]
    objects += [frame / name for name in kept]
    done = folder / f"driver-{sanitizer}"
    _do(*flags, *objects, (frame or folder) / "fibers.o", "-o", done.with_suffix(".new"))
    return done.with_suffix(".new").rename(done)


def _do(*words) -> None:
    result = subprocess.run([COMPILER, *map(str, words)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]


@dataclass
class Launch:
    """The driver's line about one launch."""

    kernel: int
    split: int
    programs: int
    order: str
    seconds: float
    left: int  # counters that are not zero afterwards
    error: str


@dataclass
class Script:
    """Launches to be made, and their inputs."""

    lines: list[str] = field(default_factory=list)
    data: list[bytes] = field(default_factory=list)
    size: int = 0
    outputs: list[tuple[str, torch.dtype, tuple]] = field(default_factory=list)
    names: int = 0

    def give(self, tensor: Tensor | None, shift: int = 0) -> str | None:
        """A buffer with a tensor's storage from its first element to its last."""
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


def run(driver: Path, script: Script, timeout=300) -> tuple[list[Tensor], list[Launch]]:
    """(results, launches). Raises Fault where a launch went wrong, or left counters behind."""
    with tempfile.TemporaryDirectory() as name:
        paths = [Path(name, part) for part in ("script", "input", "output")]
        paths[0].write_text("\n".join(script.lines) + "\n")
        paths[1].write_bytes(b"".join(script.data))
        command = [*(_unshuffled() if driver.name.endswith("thread") else ()), driver, *paths]
        environment = {"TSAN_OPTIONS": "halt_on_error=1 exitcode=66"}
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env=environment, check=False
        )
        if done.returncode:
            raise Fault(f"exit {done.returncode}: {done.stderr[-6000:]}")
        raw = paths[2].read_bytes()
    launches = [_launch_of(line) for line in done.stdout.splitlines()]
    for launch in launches:
        if launch.left or launch.error:
            raise Fault(f"{launch.left} counters left, error {launch.error!r}: {launch}")
    results, at = [], 0
    for _, dtype, shape in script.outputs:
        flat = torch.empty(torch.Size(shape).numel() * dtype.itemsize, dtype=torch.uint8)
        flat.numpy()[:] = bytearray(raw[at : at + len(flat)])
        results.append(flat.view(dtype).reshape(shape))
        at += len(flat)
    assert at == len(raw)
    return results, launches


@functools.cache
def _unshuffled() -> tuple[str, ...]:
    """The words before a command that put its memory where ThreadSanitizer expects it; none where
    that isn't allowed."""
    prefix = ("setarch", "-R")
    allowed = (
        shutil.which("setarch") and not subprocess.run([*prefix, "true"], check=False).returncode
    )
    return prefix if allowed else ()


def why_no_sanitizer(sanitizer: str) -> str:
    """The reason why programs built with a sanitizer can't run here; "" if they can."""
    found = run_only(sanitizer)
    return "" if found.returncode == 0 else f"-fsanitize={sanitizer}: {found.stderr.strip()[-200:]}"


@functools.cache
def run_only(sanitizer: str) -> subprocess.CompletedProcess:
    """An empty program with a sanitizer, compiled and run."""
    with tempfile.TemporaryDirectory() as name:
        command = [COMPILER, "-x", "c++", "-", f"-fsanitize={sanitizer}", "-o", f"{name}/empty"]
        text = {"capture_output": True, "text": True, "check": False}
        built = subprocess.run(command, input="int main() {}", **text)
        if built.returncode:
            return built
        return subprocess.run([*_unshuffled(), f"{name}/empty"], **text)


def _launch_of(line: str) -> Launch:
    words = dict(re.findall(r"(\w+)=(\S*)", line))
    kinds = Launch.__annotations__
    return Launch(
        **{k: {"int": int, "float": float}.get(kinds[k], str)(v) for k, v in words.items()}
    )


def quantized(script: Script, x: Tensor, W, bias=None, h_a=None, B=None, **how) -> int:
    """The product of x [M, K] with W, a Words: the place of y.

    how: processors; seed; shift, the bytes that x, bias, h_a and B are off their alignment;
    shift_groups, those of the scales.
    """
    shift, shift_groups = how.pop("shift", 0), how.pop("shift_groups", 0)
    names = {"codes": script.give(W.words), "scales": script.give(W.scales, shift_groups)}
    names["zeros"] = script.give(W.zeros, shift_groups // 2)
    more = {"x": x, "bias": bias, "h_a": h_a, "B": B}
    names |= {name: script.give(tensor, shift) for name, tensor in more.items()}
    (M, K), N = x.shape, len(W.words)
    y = script.empty(x.dtype, M, N)
    sizes = {"M": M, "K": K, "N": N, "bits": W.bits, "lora_rank": 0 if B is None else B.shape[1]}
    script.launch("quantized", type=TYPES[x.dtype], y=y, **sizes, **names, **how)
    return script.write(y, x.dtype, M, N)


# ----------------------------------------------------------------------------------- of one layer


@dataclass(frozen=True)
class Choice:
    """How a layer's launches are made. kernel None: the plan's own choice, for four processors."""

    kernel: int | None = None
    split: int = 1
    adapter_split: int | None = None
    programs: int = 4
    alive: int | None = None  # blocks alive together, all of them if None
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
    script.launch("layer", transposed=0, **one, **pair)
    dx, dh_a = script.empty(dtype, M, K), script.empty(dtype, M, lora_rank)
    back = {"W1": gU, "w1_stride": rank, "W1a": gB, "w1a_stride": lora_rank}
    back |= {"W2": gSVh, "w2_stride": K, "W2a": gA, "w2a_stride": K}
    back |= {"x": gdy, "x_stride": dy.stride(0), "y": dx, "h_a": dh_a, "K": N, "N": K}
    if one.get("kernel") == DECODE:
        one["kernel"] = TILE_64
    script.launch("layer", transposed=1, **one, **back)
    places = {"y": script.write(y, dtype, M, N), "dx": script.write(dx, dtype, M, K)}
    places |= {"h_a": script.write(h_a, dtype, M, lora_rank), "dA": None, "dB": None, "db": None}
    if A is not None:
        grads = {"dA": (lora_rank, K), "dB": (N, lora_rank), "db": (N,)}
        names = {name: script.empty(dtype, *shape) for name, shape in grads.items()}
        if bias is None:
            del names["db"]
        made = {"dh_a": dh_a, "x": gx, "h_a": h_a, "dy": gdy, "K": K, "N": N}
        strides = {
            "x_stride": x.stride(0),
            "dy_stride": dy.stride(0),
            "split": choice.adapter_split,
        }
        script.launch("adapter_gradients", **same, **made, **strides, **names)
        places |= {name: script.write(at, dtype, *grads[name]) for name, at in names.items()}
    script.lines.append("drop")
    return places


def _order(choice: Choice) -> dict:
    return {"seed": choice.seed, "alive": choice.alive}


def _others(pivots: Tensor, N: int) -> Tensor:
    is_other = torch.ones(N, dtype=torch.bool)
    is_other[pivots.long()] = False
    return is_other.nonzero().flatten()
