"""hylora selftest: every backend against the formula on this machine, and every call repeated.

Each backend that can be used here runs forward and backward over a grid of shapes (grid.py) and is
compared with the formula in float64. Its error may be twice that of the plain formula, four
products in the same dtype. Layers that it packs, in groups (groups.py) or of codes of few bits
(codes.py), are judged alike. Then the calls are repeated (races.py): a race shows as bits that
differ. Uninitialised memory is NaN in half of the runs.
"""

from __future__ import annotations

import itertools
import math
import os
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from hylora_kernels import backends, reference
from hylora_kernels.backends import triton as triton_backend
from hylora_kernels.backends.triton import dispatch
from hylora_kernels.backends.triton.config import TORCH_PRODUCTS, Problem, candidate_configs
from hylora_kernels.machine.selftest import codes, groups
from hylora_kernels.machine.selftest.grid import DTYPES, FORMS, Call, Case, Entry, plan
from hylora_kernels.machine.selftest.races import Race, races, run
from hylora_kernels.ops.linear import svd_lora_linear
from hylora_kernels.support.console import table
from hylora_kernels.support.devices import device_name, resolve_device
from hylora_kernels.support.report import Report
from hylora_kernels.weights import Needs, Saved, Weights

GRADS = ("dx", "dA", "dB", "db")
CPU_REPEATS, GPU_REPEATS, INTERPRETED_REPEATS = 3, 20, 1


@dataclass(frozen=True)
class Line:
    """The result for one backend, dtype and form.

    worst: the largest ratio of error to allowed error, found in the case that `where` names.
    failures: one sentence each; empty if all is well.
    """

    backend: str
    device: str
    dtype: str
    form: str
    cases: int
    worst: float
    where: str
    repeats: int
    bit_equal: bool
    failures: list[str]


@dataclass(frozen=True)
class SelftestReport(Report):
    """devices: name -> model. skipped: the backend, dtype or case not tested -> the reason."""

    torch: str
    devices: dict[str, str]
    seconds: float
    lines: list[Line] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def failures(self) -> list[str]:
        return [failure for line in self.lines for failure in line.failures]

    def render(self):
        columns = ("backend", "device", "dtype", "form", "cases", "worst error / allowed")
        rows = [
            (
                *(line.backend, line.device, line.dtype, line.form, line.cases, line.worst),
                f"{line.repeats} x {'bit-equal' if line.bit_equal else 'DIFFERENT'}",
                "FAILED" if line.failures else "ok",
            )
            for line in self.lines
        ]
        where = ", ".join(f"{name}: {model}" for name, model in self.devices.items())
        return table(f"selftest on {where}", (*columns, "repeated", "verdict"), rows)


def selftest(
    device: str = "auto",
    full: bool = False,
    repeats: int | None = None,
    seed: int = 0,
    seconds: float | None = None,
) -> SelftestReport:
    """Test each backend that can be used on `device` ("auto": the CPU, and a GPU if there is one).

    full:    more sizes, and every launch that tuning may pick in every dtype: many minutes on a
             GPU, most of them compilation.
    repeats: how often each call is repeated; by default 20 times on a GPU and 3 on a CPU.
    seconds: no case is begun after them; the report's `skipped` counts those that are left. Each
             backend has its share of them, and each dtype and form of a backend. None: no limit.

    Failures are in the report's lines. Raises ValueError for a device that isn't there.
    """
    # cuBLAS repeats itself on several streams only with a workspace of its own.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    first = resolve_device(device)
    found = {first.type: first}
    if device == "auto":
        found["cpu"] = torch.device("cpu")
    start, lines, skipped = time.perf_counter(), [], {}
    deadline = math.inf if seconds is None else start + seconds
    skipped.update({name: why for name, why in backends.available_backends().items() if why})
    usable = [name for name in backends.BACKENDS if name not in skipped]
    tested = list(itertools.product(usable, found.values()))
    for left, (name, where) in zip(range(len(tested), 0, -1), tested, strict=True):
        share = _share(deadline, left)
        lines += _test_backend(name, where, full, repeats, seed, skipped, share)
    models = {str(where): device_name(where) for where in found.values()}
    return SelftestReport(torch.__version__, models, time.perf_counter() - start, lines, skipped)


def _share(deadline: float, left: int) -> float:
    """The deadline of the first of `left` parts that share the time until `deadline`."""
    now = time.perf_counter()
    return now + max(0.0, deadline - now) / left


def _test_backend(name, device, full, repeats, seed, skipped, deadline) -> list[Line]:
    interpreted = name == "triton" and device.type == "cpu"
    if repeats is None:
        repeats = GPU_REPEATS if device.type == "cuda" else CPU_REPEATS
        repeats = INTERPRETED_REPEATS if interpreted else repeats
    entries = plan(name, device, full)
    if reason := _refusal(name, entries[0], entries[0].dtypes[0], device):
        skipped[f"{name} on {device}"] = reason
        return []
    if interpreted:
        skipped[f"{name} bfloat16 on {device}"] = "Triton's interpreter gets its products wrong"
    elif name == "triton":
        _compile(entries, device, seed, _share(deadline, 2))
    lines, total = [], sum(len(entry.dtypes) for entry in entries)
    with tqdm(total=total, desc=f"{name} on {device}", unit="case", disable=None) as bar:
        kinds = list(itertools.product(DTYPES, FORMS))
        for left, (dtype, form) in zip(range(len(kinds), 0, -1), kinds, strict=True):
            share = _share(deadline, left)
            chosen = [e for e in entries if e.case.form == form and dtype in e.dtypes]
            if chosen and (reason := _refusal(name, chosen[0], dtype, device)):
                skipped[f"{name} {_word(dtype)} on {device}"] = reason
                continue
            tally = _Tally(name, device, dtype, repeats, seed)
            for done, entry in enumerate(chosen):
                if time.perf_counter() >= share:
                    kind = f"{name} {_word(dtype)} {form} on {device}"
                    skipped[kind] = f"{len(chosen) - done} of {len(chosen)} cases: out of time"
                    break
                for config in _launches(name, entry, dtype, device):
                    tally.add(entry.case, config)
                bar.update()
            if tally.cases:
                lines.append(tally.line(form))
    for kind in (groups, codes):
        lines += _test_packed(kind, name, device, repeats, seed, skipped, deadline)
    return lines


def _test_packed(kind, name, device, repeats, seed, skipped, deadline) -> list[Line]:
    """A line for each dtype of the layers that a backend packs: groups or codes."""
    lines = []
    for dtype in DTYPES:
        tally = _Tally(name, device, dtype, repeats, seed)
        for layer in kind.layers(name, dtype, device, seed):
            if layer.packed is None and not layer.why_not:
                continue
            why_not = "out of time" if time.perf_counter() >= deadline else layer.why_not
            if why_not:
                skipped[f"{name} {_word(dtype)} {kind.FORM} on {device}"] = why_not
                break
            tally.add_packed(layer)
        if tally.cases:
            lines.append(tally.line(kind.FORM))
    return lines


def _refusal(name: str, entry: Entry, dtype: torch.dtype, device: torch.device) -> str | None:
    """The reason why a backend can't serve calls of a dtype on a device; None if it can."""
    x, *factors, _ = entry.case.call(dtype, device, 0)
    return backends.BACKENDS[name].unsupported(x, Weights(*factors))


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -------------------------------------------------------------------------------------- launches


def _launches(name: str, entry: Entry, dtype, device) -> list:
    """The choices to force in turn: None is the backend's own, GPU backends add launches to it."""
    if name == "cuda":
        return [None, "kernels"] if dtype != torch.float32 else [None]
    if name != "triton" or not entry.launches:
        return [None]
    case, (K, N, r, ra) = entry.case, entry.case.sizes
    rank, pivoted = (N if case.form == "dense" else r), case.form != "pair"
    problem = Problem(case.M, K, N, rank, ra, dtype, pivoted)
    found = candidate_configs(problem, dispatch.target_of(device))
    return [None, *[c for c in found if c is not TORCH_PRODUCTS][: entry.launches]]


def _forced(name: str, config):
    return nullcontext() if config is None else backends.BACKENDS[name].forcing(config)


def _compile(entries: list[Entry], device: torch.device, seed: int, deadline: float) -> None:
    """Compile the launches of these cases on all cores until the deadline: one takes seconds, and
    those that are left are compiled where they are launched."""
    import triton

    workers = ThreadPoolExecutor(os.cpu_count())
    with workers, triton.AsyncCompileMode(workers, ignore_errors=True):
        for entry in tqdm(entries, desc="compiling", unit="case", disable=None):
            if time.perf_counter() >= deadline:
                break
            for dtype in entry.dtypes:
                call = entry.case.call(dtype, device, seed)
                for config in _launches("triton", entry, dtype, device)[1:]:
                    with triton_backend.forcing(config, compile_only=True):
                        run(triton_backend, call, Needs(True, False, False, False))


# --------------------------------------------------------------------------------------- judgement


class _Tally:
    """The findings for one line of the report."""

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype, repeats: int, seed):
        self.name, self.device, self.dtype = name, device, dtype
        self.repeats, self.seed = repeats, seed
        self.cases, self.worst, self.where, self.bit_equal = 0, 0.0, "", True
        self.failures: list[str] = []

    def add(self, case: Case, config) -> None:
        """Judge a case under a forced launch, or None."""
        self.cases += 1
        words = str(case) if config is None else f"{case} by {config}"
        try:
            with _forced(self.name, config):
                self._judge(case, words, config is not None)
        except Exception as error:
            self._fail_by(error, words)

    def _fail_by(self, error: Exception, words: str) -> None:
        """A kernel may fail in any way, and the report says which one and how."""
        text = " ".join(str(error).split())[:300]
        self._fail(words, f"{type(error).__name__}: {text}", float("inf"))

    def add_packed(self, layer: groups.GroupOfLayers | codes.LayerOfCodes) -> None:
        """Judge packed layers on one x."""
        self.cases += 1
        words = str(layer)
        try:
            for poison in (True, False):
                with poisoned(poison):
                    x = layer.calls[0].x
                    (y,) = run(layer, layer.two_calls[0])
                    for call, exact, part in layer.parts(x, y):
                        expected, bound = _truth(call, exact)
                        self._compare({"y": part}, {"y": expected["y"]}, bound, words)
            races(layer, layer.two_calls, self.repeats, forced=False)
        except Race as race:
            self.bit_equal = False
            self._fail(words, str(race), self.worst)
        except Exception as error:
            self._fail_by(error, words)

    def _judge(self, case: Case, words: str, forced: bool) -> None:
        calls = [case.call(self.dtype, self.device, self.seed + i) for i in range(2)]
        # The second call is of the same layer: it has the same frozen factors.
        calls[1] = calls[0]._replace(**{n: getattr(calls[1], n) for n in ("x", "A", "B", "dy")})
        expected, bound = _truth(calls[0], calls[0].in_float64())
        interpreted = self.name == "triton" and self.device.type == "cpu"
        for poison in (True,) if interpreted else (True, False):
            with poisoned(poison):
                got = _by_autograd(self.name, calls[0])
                self._compare(got, expected, bound, words)
                if poison and not interpreted:
                    continue
                try:
                    races(backends.BACKENDS[self.name], calls, self.repeats, forced)
                except Race as race:
                    self.bit_equal = False
                    self._fail(words, str(race), self.worst)

    def _compare(self, got, expected, bound, words: str) -> None:
        for tensor, exact in expected.items():
            ratio = _distance(got[tensor], exact) / bound[tensor]
            if not ratio <= 1:
                self._fail(words, f"{tensor}: error {ratio:.3g} x what is allowed", ratio)
            elif ratio > self.worst:
                self.worst, self.where = ratio, f"{words}: {tensor}"

    def _fail(self, words: str, what: str, ratio: float) -> None:
        self.failures.append(f"{self.name} {_word(self.dtype)} on {self.device}: {words}: {what}")
        if not ratio <= self.worst:
            self.worst, self.where = ratio, words

    def line(self, form: str) -> Line:
        kind = self.name, str(self.device), _word(self.dtype), form, self.cases
        found = self.worst, self.where, self.repeats, self.bit_equal, self.failures
        return Line(*kind, *found)


def _truth(call: Call, wide: Call) -> tuple[dict[str, Tensor], dict[str, float]]:
    """(y and the gradients in float64, the error allowed for each); wide: the call in float64.

    Allowed are twice the plain formula's own error in the call's dtype, and a few roundings: the
    formula's error is random, and small by luck where there are few numbers.
    """
    exact, plain = _by_formula(wide), _by_formula(call)
    bound = {}
    for name, truth in exact.items():
        size = max(1.0, float(truth.abs().max()))
        roundings = 8 if truth.numel() <= 256 else 2
        slack = roundings * torch.finfo(call.x.dtype).eps * size
        bound[name] = 2 * _distance(plain[name], truth) + slack
    return exact, bound


def _by_formula(call: Call) -> dict[str, Tensor]:
    x, *factors, dy = call
    weights = Weights(*factors)
    y, h_a = reference.forward(x, weights)
    grads = reference.backward(dy, Saved(x, h_a), weights)
    named = {"y": y} | dict(zip(GRADS, grads, strict=True))
    if weights.bias is None:
        del named["db"]
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def _by_autograd(name: str, call: Call) -> dict[str, Tensor]:
    leaves = {n: getattr(call, n) for n in ("x", "A", "B", "bias")}
    leaves = {n: t.detach().requires_grad_() for n, t in leaves.items() if t is not None}
    with backends.use_backend(name):
        y = svd_lora_linear(*call._replace(**leaves)[:-1])
    grads = torch.autograd.grad(y, list(leaves.values()), call.dy)
    names = [{"bias": "db"}.get(n, f"d{n}") for n in leaves]
    return {"y": y.detach()} | dict(zip(names, grads, strict=True))


def _distance(a: Tensor, b: Tensor) -> float:
    """The largest difference, in float64; infinite if there is a NaN or the shapes differ."""
    if a.shape != b.shape:
        return float("inf")
    difference = (a.double() - b.double()).abs()
    return float(difference.nan_to_num(float("inf")).max())


@contextmanager
def poisoned(on: bool) -> Iterator[None]:
    """Fill uninitialised memory with NaN inside the `with`, or (on=False) leave it as it is."""
    fills = torch.utils.deterministic.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = on
    torch.use_deterministic_algorithms(on, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*[Dd]eterministic")
            yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fills
        torch.use_deterministic_algorithms(before, warn_only=only_warns)
