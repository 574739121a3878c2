"""The rates of this machine, by running what a compression runs, in a minute at most."""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from hylora_kernels.compression.calibration import add_gram
from hylora_kernels.compression.chain import Call
from hylora_kernels.compression.quantize import quantize_each
from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.model.hollow import filled, first_call
from hylora_kernels.model.loss import output_loss
from hylora_kernels.planning.machine import EIGH, Machine
from hylora_kernels.planning.stages import cut_flops
from hylora_kernels.planning.work import Work
from hylora_kernels.support.cache import load_tensors, save_tensors
from hylora_kernels.support.devices import device_name, free_memory
from hylora_kernels.support.hashing import fingerprint

SECONDS = 50.0  # No measurement begins after them.
SIZES = (256, 768, 1536)  # Of square matrices.
LARGEST_BLOCK = 4e9  # Bytes of a block that is run as it is.
WORDS = 8192  # Of the output head, whose time is that of each word.
FILE = 2**23  # float32 numbers in a file that is written and read.
LEAST = 0.2  # Seconds that a measurement is repeated for.

Clock = Callable[[], float]


class Probe:
    """One probe: each measurement returns FLOP, bytes or weights a second.

    clock: time.process_time on a machine whose cores other work shares.
    """

    def __init__(self, work: Work, device: torch.device, clock: Clock = time.perf_counter):
        self.work, self.device, self.clock = work, device, clock
        self.dtype = work.structure.targets[0].matrix.dtype
        self.begun = time.perf_counter()

    def machine(self) -> Machine:
        """All rates."""
        base = psutil.Process().memory_info().rss
        memory = free_memory(self.device)
        if self.device.type == "cpu":
            memory = psutil.virtual_memory().total
        forward, training = self.block()
        write, read, load = self.files()
        return Machine(
            name=device_name(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            memory=memory,
            base=base,
            forward=forward,
            training=training,
            head=self.head(),
            gram=self.by_size(self.gram),
            matmul=self.by_size(self.matmul),
            eigh=self.by_size(self.eigh),
            cut=self.by_size(self.cut),
            rounding=self.rounding(),
            write=write,
            read=read,
            load=load,
            bandwidth=self.bandwidth(),
            shared=self.device.type == "cpu",
        )

    def block(self) -> tuple[float, float]:
        """A decoder block on one block of text, in the model's dtype, without and with gradients:
        the model's first one with random weights, or a product alone where that is too large."""
        w, L = self.work, self.work.length
        if w.block_bytes[0] > min(LARGEST_BLOCK, free_memory(self.device) / 3):
            return self._product()
        call, hidden = self._call()
        x = self._random(*hidden.shape, dtype=self.dtype)
        with filled(w.module) as block:
            block.to(self.device)

            def forward() -> None:
                with torch.no_grad():
                    call.run(block, x)

            def training() -> None:
                leaf = x.clone().requires_grad_()
                y = call.run(block, leaf)
                torch.autograd.grad(y, leaf, torch.ones_like(y))

            alone, both = self.seconds(forward), self.seconds(training)
            block.to("cpu")
        return L * w.forward_flops(0) / alone, L * w.training_flops(0) / both

    def _call(self) -> tuple[Call, Tensor]:
        """How the model calls its first block, and with which hidden states."""
        args, kwargs = first_call(self.work.model, self.work.module, self.work.length)
        args = _moved(args, self.device)
        kwargs = {name: _moved(value, self.device) for name, value in kwargs.items()}
        places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        for place, value in places:
            if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 2:
                return Call(args, kwargs, place), value
        raise ValueError("the model calls its first block without hidden states: set probe=False")

    def _product(self) -> tuple[float, float]:
        """One product of the model's width instead of a block."""
        rows, n = self.work.length, self.work.head_shape[1]
        x, weight = (self._random(m, n, dtype=self.dtype) for m in (rows, n))
        rate = 2.0 * rows * n * n / self.seconds(lambda: x @ weight.T)
        return rate, rate

    def head(self) -> float:
        """The output head with the loss and the gradient of its input."""
        words, d = self.work.head_shape
        rows = 128
        head = nn.Linear(d, min(words, WORDS), bias=False, dtype=self.dtype, device=self.device)
        head.requires_grad_(False)
        x = self._random(rows, d, dtype=self.dtype).requires_grad_()
        labels = torch.zeros(rows, dtype=torch.int64, device=self.device)

        def run() -> None:
            torch.autograd.grad(output_loss(x, head, labels), x)

        return 4.0 * rows * head.weight.numel() / self.seconds(run)

    def by_size(self, rate: Callable[[int], float]) -> list[tuple[int, float]]:
        """(size, rate) of the sizes that the time allows, the smallest always."""
        found: list[tuple[int, float]] = []
        for n in SIZES:
            if not found or time.perf_counter() - self.begun < SECONDS:
                found.append((n, rate(n)))
        return found

    def gram(self, n: int) -> float:
        rows = self.work.length
        x, total = self._random(rows, n, dtype=self.dtype), self._random(n, n)
        return 2.0 * rows * n * n / self.seconds(lambda: add_gram(total, x))

    def matmul(self, n: int) -> float:
        a, b = self._random(n, 2 * n, dtype=torch.float64), self._random(2 * n, 2 * n)
        b = b.double()
        return 8.0 * n**3 / self.seconds(lambda: a @ b)

    def eigh(self, n: int) -> float:
        a = self._random(n, n, dtype=torch.float64)
        a = a @ a.T
        return EIGH * n**3 / self.seconds(lambda: torch.linalg.eigh(a, UPLO="U"))

    def cut(self, n: int) -> float:
        rank = n // 2
        U, SVh = self._random(n, rank), self._random(rank, n)
        make = functools.partial(SVDLoRALinear.from_product, U, SVh, rank, dtype=self.dtype)
        seconds = self.seconds(lambda: make(form="pivoted"))
        return cut_flops((n, n), rank) / seconds

    def rounding(self) -> float:
        W, x = self._random(256, 512), self._random(1024, 512)
        G, widths = x.T @ x, (3, 4)
        seconds = self.seconds(lambda: quantize_each([W], widths, G))
        return len(widths) * W.numel() / seconds

    def files(self) -> tuple[float, float, float]:
        """(written, read, loaded) bytes a second. The clock is a wall's: a disk takes no CPU."""
        x = torch.randn(FILE, device="cpu")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "probe.safetensors"
            write = self._once(lambda: save_tensors(path, {"x": x}, "probe"))
            read = self.seconds(lambda: load_tensors(path, "probe"))
        hashed = self.seconds(lambda: fingerprint(x=x))
        checked = self.seconds(lambda: x.to(self.dtype).isfinite().all())
        return x.nbytes / write, x.nbytes / read, x.nbytes / (read + hashed + checked)

    def bandwidth(self) -> float:
        """Bytes a second at which a product with one row reads its weights."""
        n = 4096
        weights = [self._random(n, n, dtype=self.dtype) for _ in range(4)]
        x = self._random(1, n, dtype=self.dtype)

        def run() -> None:
            for weight in weights:
                x @ weight.T

        return sum(w.nbytes for w in weights) / self.seconds(run)

    def seconds(self, call: Callable[[], Any]) -> float:
        """The least seconds of a call: other processes add to the others."""
        call()
        found: list[float] = []
        begun = time.perf_counter()
        while len(found) < 3 or time.perf_counter() - begun < LEAST:
            found.append(self._once(call))
            if time.perf_counter() - self.begun > SECONDS:
                break
        return min(found)

    def _once(self, call: Callable[[], Any]) -> float:
        self._wait()
        start = self.clock()
        call()
        self._wait()
        return max(self.clock() - start, 1e-9)

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def _random(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device=self.device).to(dtype)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return tuple(_moved(v, device) for v in value) if type(value) is tuple else value
