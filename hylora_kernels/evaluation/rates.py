"""Rates: the seconds that a layer takes on this machine, by its form, its bits and the rows of x.

Layers of a few sizes are timed as optimize_for_inference packs them, all kinds in turns, so that
each finds its weights displaced from the caches by the others' and disturbances hit all alike. A
line is fitted to each kind: seconds = latency + per_weight * weights. At one row per_weight is the
time to read a weight, at many rows that of as many products.

Measurements are kept in a table for the device. There is none that comes with the package: another
processor, or another number of threads, has other ratios between widths, and a missing measurement
is made in seconds where it is first asked for.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from hylora_kernels.inference.optimize import optimize_for_inference
from hylora_kernels.layers.factors import factor_count
from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.layers.quantized import QuantizedLinear
from hylora_kernels.support.cache import TUNED, cache_dir, cache_root, table_name
from hylora_kernels.support.console import table
from hylora_kernels.support.devices import device_name
from hylora_kernels.support.report import Report
from hylora_kernels.support.storage import write_json
from hylora_kernels.weights import GROUP, PLANES, QuantizedMatrix, Weights

_log = logging.getLogger(__name__)
PLAIN = 16  # Bits of a matrix that is not quantised, of any dtype.
KINDS = (
    *(("dense", bits) for bits in (PLAIN, *sorted(PLANES, reverse=True))),
    *((form, bits) for form in ("pair", "pivoted") for bits in (PLAIN, 8)),
)
# K, N, r: those of small models on a CPU, of large ones on a GPU.
SIZES = ((512, 512, 128), (576, 1536, 208), (1024, 2048, 288))
GPU_SIZES = ((2048, 2048, 512), (2048, 5632, 768), (4096, 11008, 1536))
CALL = (64, 64, 16)  # On a CPU the least time of such a layer is that of the call from Python.
MOST_ROWS = 512  # More rows take as much longer as there are more of them.
CACHE = 32e6  # Bytes, where the system doesn't say.
SWEEPS, LEAST_SWEEPS, SECONDS = 40, 3, 6.0  # For one dtype and number of rows.
FORMAT = 1


class Size(NamedTuple):
    """A layer's inputs K, outputs N, and rank unless it is dense."""

    K: int
    N: int
    rank: int


@dataclass(frozen=True)
class Rate:
    """Seconds of a packed layer without adapter at `rows` rows: latency + per_weight * weights.

    form: "dense", "pair" or "pivoted". bits: 16 for matrices of `dtype`.
    off:  the largest deviation of a measurement from the line, as a share of it.
    """

    dtype: str
    form: str
    bits: int
    rows: int
    latency: float
    per_weight: float
    off: float

    def bytes_per_second(self) -> float:
        """Of the weights as they are stored."""
        element = getattr(torch, self.dtype).itemsize * 8
        scales = 0 if self.bits == PLAIN else 16 + (0 if self.bits == 8 else self.bits)
        bits = element if self.bits == PLAIN else self.bits + scales / GROUP
        return bits / 8 / self.per_weight


@dataclass(frozen=True)
class Rates(Report):
    """The rates of one device. version: of the package, whose kernels another one may have changed.

    device: its name, and for a CPU the instruction set and the threads.
    """

    device: str
    rates: list[Rate]
    version: str
    torch_version: str = torch.__version__
    format: int = FORMAT

    def seconds(self, dtype: torch.dtype, form: str, bits: int, weights: int, rows: float) -> float:
        """Of a layer with so many weights, one at least of 2 dimensions.

        rows: of x. Of fewer than one, as an expert sees on average, the share of one; of more than
        MOST_ROWS the multiple. Raises KeyError for a rate that the table lacks.
        """
        at = measured_rows(rows)
        rate = self._found[_word(dtype), form, bits, at]
        return (rate.latency + rate.per_weight * weights) * rows / at

    def lacks(self, dtype: torch.dtype, rows: int) -> bool:
        """True if a kind of layer in this dtype is not measured at so many rows."""
        return any((_word(dtype), *kind, rows) not in self._found for kind in KINDS)

    @cached_property
    def _found(self) -> dict[tuple[str, str, int, int], Rate]:
        return {(r.dtype, r.form, r.bits, r.rows): r for r in self.rates}

    def render(self) -> Any:
        """A line a rate."""
        columns = (
            *("dtype", "layer", "bits", "rows", "latency, us"),
            *("GB/s of weights", "G products/s", "line off by"),
        )
        rows = [
            (
                *(r.dtype, r.form, r.bits, r.rows, round(1e6 * r.latency, 1)),
                *(r.bytes_per_second() / 1e9, r.rows / r.per_weight / 1e9, f"{100 * r.off:.0f} %"),
            )
            for r in self.rates
        ]
        return table(f"rates of {self.device}", columns, rows)


def rates_of(
    device: torch.device | str,
    dtypes: Sequence[torch.dtype],
    rows: Iterable[float],
    progress: bool = True,
    again: bool = False,
) -> Rates:
    """The table of a device, with what it lacks measured and written to it.

    dtypes: of x and of plain weights. rows: of x, each rounded as measured_rows() says.
    again:  measure all of them, not only what is missing.

    The threads are torch's own in this process. A table that can't be read is measured anew, and a
    line of the log says why.
    """
    device, path = torch.device(device), rates_path(device)
    found = _read(path) or Rates(_name(device), [], version("hylora-kernels"))
    wanted = [
        (dtype, M)
        for dtype in dtypes
        for M in sorted({measured_rows(M) for M in rows})
        if again or found.lacks(dtype, M)
    ]
    for dtype in dict.fromkeys(dtype for dtype, _ in wanted):
        new = _measure(device, dtype, [M for d, M in wanted if d == dtype], progress)
        replaced = {(rate.dtype, rate.rows) for rate in new}
        kept = [rate for rate in found.rates if (rate.dtype, rate.rows) not in replaced]
        found = Rates(found.device, [*kept, *new], found.version)
        cache_dir(TUNED)
        write_json(path, found.to_dict())
    return found


def measured_rows(rows: float) -> int:
    """The whole number of rows whose measurement stands for `rows`."""
    return min(max(round(rows), 1), MOST_ROWS)


def rates_path(device: torch.device | str) -> Path:
    """The file of the table of a device."""
    return cache_root() / TUNED / table_name(f"rates of {_name(torch.device(device))}")


def _name(device: torch.device) -> str:
    parts = [device_name(device)]
    if device.type == "cpu":
        level = os.environ.get("HYLORA_ISA") or torch.backends.cpu.get_cpu_capability()
        threads = torch.get_num_threads()
        parts += [level, f"{threads} thread{'s' if threads > 1 else ''}"]
    forced = os.environ.get("HYLORA_BACKEND", "auto")
    return ", ".join(parts if forced == "auto" else [*parts, forced])


def _read(path: Path) -> Rates | None:
    """The table in the file, None where there is none that this version can use."""
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        if (whole["format"], whole["version"]) != (FORMAT, version("hylora-kernels")):
            return None
        rates = [Rate(**rate) for rate in whole["rates"]]
        if not all(0 <= r.latency < math.inf and 0 < r.per_weight < math.inf for r in rates):
            raise ValueError("rates must be finite and above 0")
        return Rates(whole["device"], rates, whole["version"], whole["torch_version"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("%s can't be read (%r): measured again", path, error)
        return None


# ------------------------------------------------------------------------------------ measurement


@torch.no_grad()
def _measure(
    device: torch.device, dtype: torch.dtype, rows: Sequence[int], progress: bool
) -> list[Rate]:
    """The rates of all kinds of layers."""
    sizes = [Size(*s) for s in (GPU_SIZES if device.type == "cuda" else (CALL, *SIZES))]
    keys = [(kind, size) for kind in KINDS for size in sizes]
    layers = {key: [_layer(*key, dtype, device)] for key in keys}
    held = sum(t.nbytes for (m,) in layers.values() for t in m.state_dict().values())
    copies = min(max(math.ceil(2 * _cache_bytes(device) / held), 2), 16)
    for key in keys:
        layers[key] += [_layer(*key, dtype, device) for _ in range(copies - 1)]
    everything = nn.ModuleList(layer for found in layers.values() for layer in found).eval()
    optimize_for_inference(everything, group=False)
    rates = []
    for M in rows:
        xs = {size.K: torch.randn(M, size.K, device=device).to(dtype) for size in sizes}
        runs = {
            # At many rows the weights are read once for many products.
            key: [partial(m, xs[key[1].K]) for m in (layers[key] if M == 1 else layers[key][:1])]
            for key in keys
        }
        label = f"rates, {_word(dtype)}, {M} row{'s' if M > 1 else ''}"
        seconds = _in_turns(runs, device, label, progress)
        call = 0.0
        if device.type != "cuda":  # A Decoder's step is one call for all layers.
            call = min(seconds[kind, Size(*CALL)] for kind in KINDS)
        for kind in KINDS:
            points = [
                (_weights(kind[0], size), max(seconds[kind, size] - call, 1e-9))
                for size in sizes
                if size != CALL
            ]
            rates.append(Rate(_word(dtype), *kind, M, *_line(points)))
    return rates


def _layer(
    kind: tuple[str, int], size: Size, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """A layer without bias and adapter, of numbers in a plausible range."""
    (form, bits), (K, N, rank) = kind, size
    on: dict[str, Any] = {"device": device, "dtype": dtype}
    if bits == PLAIN and form == "dense":
        return nn.Linear(K, N, bias=False, **on)
    if bits == PLAIN:
        return SVDLoRALinear(K, N, rank, 0, bias=False, form=form, **on)
    rank = N if form == "dense" else rank
    pivots = None if form == "pair" else torch.arange(rank, dtype=torch.int32, device=device)
    SVh = _codes(rank, K, bits, device)
    others = N if form == "pair" else N - rank
    U = _codes(others, rank, bits, device) if others else torch.empty(0, rank, **on)
    return QuantizedLinear.from_weights(Weights(SVh, U, pivots=pivots), dtype=dtype)


def _codes(n: int, k: int, bits: int, device: torch.device) -> QuantizedMatrix:
    groups = -(-k // GROUP)

    def some(*shape: int) -> Tensor:
        return torch.randint(256, shape, dtype=torch.uint8, device=device)

    scales = torch.full((n, groups), 2.0**-bits / k**0.5, dtype=torch.float16, device=device)
    zeros = None if bits == 8 else some(-(-n * groups // GROUP), 8 * bits)
    return QuantizedMatrix(some(n, groups, 8 * bits), scales, zeros, bits, k)


def _weights(form: str, size: Size) -> int:
    return size.K * size.N if form == "dense" else factor_count(size.rank, size.K, size.N, form)


def _in_turns(
    runs: Mapping[Any, Sequence[Callable[[], Any]]],
    device: torch.device,
    label: str,
    progress: bool,
) -> dict[Any, float]:
    """The least seconds a call of each, all of them once in every sweep: other processes add to the
    others."""
    timed = {key: _timer(calls, device) for key, calls in runs.items()}
    samples: dict[Any, list[float]] = {key: [] for key in runs}
    start = time.perf_counter()
    for sweep in tqdm(range(SWEEPS), label, unit="sweep", disable=not progress, leave=False):
        if sweep > LEAST_SWEEPS and time.perf_counter() - start > SECONDS:
            break
        for key, measure in timed.items():
            taken = measure()
            if sweep:  # The first one wakes threads and allocates.
                samples[key].append(taken)
    return {key: min(found) for key, found in samples.items()}


def _timer(calls: Sequence[Callable[[], Any]], device: torch.device) -> Callable[[], float]:
    """A function that measures the seconds of one of the calls, a mean; on a GPU as a graph."""

    def run() -> None:
        for call in calls:
            call()

    if device.type != "cuda":

        def measure() -> float:
            _synchronize(device)
            start = time.perf_counter()
            run()
            _synchronize(device)
            return (time.perf_counter() - start) / len(calls)

        return measure
    aside = torch.cuda.Stream(device)
    with torch.cuda.stream(aside):  # Compiles and allocates what can't be made during capture.
        run()
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def measure_graph() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / len(calls)

    return measure_graph


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _line(points: Sequence[tuple[int, float]]) -> tuple[float, float, float]:
    """(weights, seconds) of several layers -> latency and per_weight with the least sum of squared
    relative deviations, neither below 0, and the largest deviation."""
    weights, seconds = np.array(points, dtype=np.float64).T
    terms = np.stack([1 / seconds, weights / seconds], 1)
    latency, per_weight = np.linalg.lstsq(terms, np.ones(len(points)), rcond=None)[0]
    if latency < 0 or per_weight <= 0:
        latency, per_weight = 0.0, terms[:, 1].sum() / (terms[:, 1] ** 2).sum()
    off = float(np.abs((latency + per_weight * weights) / seconds - 1).max())
    return float(latency), float(per_weight), off


def _cache_bytes(device: torch.device) -> float:
    """Of the largest cache."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    try:
        return max(os.sysconf("SC_LEVEL3_CACHE_SIZE"), CACHE)
    except (AttributeError, ValueError, OSError):
        return CACHE


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
