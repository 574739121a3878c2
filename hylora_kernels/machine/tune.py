"""Measure which config serves a layer fastest on this GPU, and keep it in a table for the backend.

Every candidate's result is checked against the first candidate's. Then all candidates are timed in
turns: as replays of a CUDA graph with the weights in L2 ("warm") and displaced from it ("cold", as
a model's other layers displace them), and called one by one from Python ("eager", cold). Cold times
decide for graphs, eager times for calls from Python.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from hylora_kernels.backends import triton as backend
from hylora_kernels.backends.triton import dispatch
from hylora_kernels.backends.triton.config import (
    BACKWARD,
    FORWARD,
    TABLE_FORMAT,
    TORCH_PRODUCTS,
    TORCH_PRODUCTS_WORD,
    Problem,
    candidate_configs,
    table_path,
    table_rows,
)
from hylora_kernels.support.cache import TUNED, cache_dir
from hylora_kernels.support.console import table
from hylora_kernels.support.report import Report
from hylora_kernels.support.storage import write_json
from hylora_kernels.weights import Needs, Saved, Weights

# K, N, r, ra of SmolLM2's, TinyLlama's and Llama 7B's at keeps between 0.5 and 0.8.
SHAPES = (
    (576, 576, 144, 16),
    (576, 1536, 208, 16),
    (2048, 2048, 512, 32),
    (2048, 5632, 768, 32),
    (5632, 2048, 768, 32),
    (4096, 4096, 1024, 32),
    (4096, 11008, 1536, 32),
)
ROWS = (1, 4, 16, 64, 256, 2048)
BACKWARD_ROWS = (256, 2048)
WARM_CALLS = 10  # in one graph, of the same weights


@dataclass(frozen=True)
class Timing:
    """Seconds a call. config: the candidate's fields, or "torch products"."""

    config: dict | str
    graph_warm: float
    graph_cold: float
    eager: float


@dataclass(frozen=True)
class Row:
    """One problem and its timings. graph, eager: the winners."""

    M: int
    K: int
    N: int
    rank: int
    lora_rank: int
    dtype: str
    pivoted: bool
    direction: str
    graph: dict | str
    eager: dict | str
    timings: list[Timing]


@dataclass(frozen=True)
class TuneReport(Report):
    """The table of one device.

    device, torch, triton: where it was measured. copied_gbs: the device's read + write bandwidth,
    measured beside it. format: the version of the table's words.
    """

    device: str
    torch: str
    triton: str
    copied_gbs: float
    rows: list[Row] = field(default_factory=list)
    format: int = TABLE_FORMAT

    def render(self):
        """A line a problem: microseconds of torch's products and of the best launch."""
        columns = (
            "problem",
            "torch cold",
            "one launch cold",
            "ratio",
            "warm",
            "eager",
            "graph by",
        )
        return table(f"tuned on {self.device}", columns, [_cells(row) for row in self.rows])


def _cells(row: Row) -> tuple:
    torchs = next(t for t in row.timings if t.config == TORCH_PRODUCTS_WORD)
    launches = [t for t in row.timings if t.config != TORCH_PRODUCTS_WORD]
    form = "pivoted" if row.pivoted else "pair"
    name = f"{row.K}x{row.N} r{row.rank}+{row.lora_rank} M={row.M} {form} {row.dtype}"
    name += " backward" if row.direction == BACKWARD else ""
    cold = f"{1e6 * torchs.graph_cold:.1f}"
    if not launches:
        return name, cold, "-", "-", "-", "-", TORCH_PRODUCTS_WORD
    best = {
        key: min(getattr(t, key) for t in launches) for key in ("graph_cold", "graph_warm", "eager")
    }
    ratios = [f"{getattr(torchs, key) / best[key]:.2f}" for key in best]
    return name, cold, f"{1e6 * best['graph_cold']:.1f}", *ratios, _words(row.graph)


def _words(config: dict | str) -> str:
    if isinstance(config, str):
        return config
    return " ".join(f"{name}{int(value)}" for name, value in config.items())


def tune(
    device: str = "cuda",
    shapes: Sequence[tuple[int, int, int, int]] = SHAPES,
    rows: Sequence[int] = ROWS,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,),
    forms: Sequence[str] = ("pair", "pivoted"),
    directions: Sequence[str] = (FORWARD, BACKWARD),
    candidates: Callable = candidate_configs,
    save: Path | None = None,
) -> TuneReport:
    """Measure every problem of shapes (K, N, r, ra) x rows x dtypes x forms x directions.

    The rows are written to `save`, by default the file where the backend looks for this device's
    table. They replace the file's rows of the same problems; others stay. The file is written after
    every problem, so an interruption loses one. Raises ValueError if the backend can't serve the
    device, FloatingPointError if a candidate's result is wrong.
    """
    where = torch.device(device)
    if where.type != "cuda":
        raise ValueError(f"device must be a GPU, got {device!r}")
    if reason := backend.why_not():
        raise ValueError(f"device must be one that backend 'triton' serves: {reason}")
    where = torch.device(
        "cuda", torch.cuda.current_device() if where.index is None else where.index
    )
    target, name = dispatch.target_of(where), torch.cuda.get_device_name(where)
    problems = [
        Problem(M, K, N, rank, lora_rank, dtype, form == "pivoted", direction)
        for (K, N, r, ra), dtype, form, direction in itertools.product(
            shapes, dtypes, forms, directions
        )
        for rank, lora_rank in dict.fromkeys([(r + ra, 0), (r, ra)])  # adapter merged, and not
        for M in rows
        if direction == FORWARD or M in BACKWARD_ROWS
    ]
    import triton

    report = TuneReport(name, torch.__version__, triton.__version__, _copy_bandwidth(where) / 1e9)
    if save is None:
        cache_dir(TUNED)
        save = table_path(name)
    compile_all(problems, where, target, candidates)
    for problem in tqdm(problems, desc="tuning", unit="problem"):
        report.rows.append(measure(problem, where, candidates(problem, target)))
        _save(report, save)
    dispatch.read_tables_again()
    return report


def _save(report: TuneReport, path: Path) -> None:
    """Write the report and, of the rows in the file, those of other problems: they may come from a
    second `hylora tune` that runs beside this one."""
    before = table_rows(path) if path.is_file() else []
    sizes = list(Problem._fields)
    whole = report.to_dict()
    measured = {tuple(row[size] for size in sizes) for row in whole["rows"]}
    kept = [row for row in before if tuple(row[size] for size in sizes) not in measured]
    write_json(path, whole | {"rows": kept + whole["rows"]})


def compile_all(problems, device, target, candidates) -> None:
    """Compile all kernels that will be measured, on all cores: one takes seconds."""
    import triton

    seen = set()
    workers = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    with workers, triton.AsyncCompileMode(workers, ignore_errors=True):
        for problem in tqdm(problems, desc="compiling", unit="problem", delay=2):
            call = None
            for config in candidates(problem, target):
                compiled = (
                    config,
                    problem.dtype,
                    problem.pivoted,
                    problem.direction,
                    problem.lora_rank > 0,
                    problem.M == 1,
                    problem.M % 16,
                )
                if config is TORCH_PRODUCTS or compiled in seen:
                    continue
                seen.add(compiled)
                call = call or _calls(problem, device, 1)[0]
                with backend.forcing(config, compile_only=True):
                    call()


def measure(problem: Problem, device: torch.device, candidates, rounds: int = 7) -> Row:
    """All candidates of a problem, timed in turns."""
    copies = _copies_that_displace(problem, device)
    calls = _calls(problem, device, copies)
    expected = None
    contests: dict[str, dict[int, tuple[Callable, int]]] = {
        "graph_warm": {},
        "graph_cold": {},
        "eager": {},
    }
    for index, config in enumerate(candidates):
        with backend.forcing(config):
            y = calls[0]()
            if expected is None:
                expected = y.double()
            error = float((y.double() - expected).norm() / expected.norm())
            if not error < 2e-2:
                raise FloatingPointError(
                    f"{config} computes {problem} with relative error {error:.1e}"
                )
            contests["graph_warm"][index] = _graph(calls[:1] * WARM_CALLS), WARM_CALLS
            contests["graph_cold"][index] = _graph(calls), len(calls)
        contests["eager"][index] = _eager(calls, config), len(calls)
    found = {kind: _in_turns(contest, rounds) for kind, contest in contests.items()}
    timings = [
        Timing(_plain(config), *(found[kind][index] for kind in contests))
        for index, config in enumerate(candidates)
    ]
    fields = problem._asdict() | {"dtype": str(problem.dtype).removeprefix("torch.")}
    winners = {
        kind: min(timings, key=lambda t, k=key: getattr(t, k)).config
        for kind, key in (("graph", "graph_cold"), ("eager", "eager"))
    }
    return Row(**fields, **winners, timings=timings)


def _plain(config) -> dict | str:
    return TORCH_PRODUCTS_WORD if config is TORCH_PRODUCTS else dataclasses.asdict(config)


def _graph(calls) -> Callable:
    """A CUDA graph of all the calls, as one call."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def _eager(calls, config) -> Callable:
    def run():
        with backend.forcing(config):
            for call in calls:
                call()

    return run


def _in_turns(contest: dict, rounds: int, budget: float = 0.05) -> dict:
    """The median seconds a call of each of (run, calls a run)."""
    samples = {index: [] for index in contest}
    repeats = {}
    for index, (run, _) in contest.items():
        run()
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        repeats[index] = max(1, min(20, round(budget / rounds / max(seconds, 1e-6))))
    for _ in range(rounds):
        for index, (run, count) in contest.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(repeats[index]):
                run()
            end.record()
            end.synchronize()
            samples[index].append(begin.elapsed_time(end) / 1e3 / repeats[index] / count)
    return {index: statistics.median(values) for index, values in samples.items()}


def _copies_that_displace(problem: Problem, device) -> int:
    """The number of copies of the weights that displace one another from L2 when taken in turns."""
    size = problem.dtype.itemsize * (problem.rank + problem.lora_rank) * (problem.K + problem.N)
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(4, min(300, math.ceil(2 * cache / size)))


def _calls(problem: Problem, device, copies: int) -> list[Callable[[], Tensor]]:
    """The problem's call on fresh random tensors, once for each copy of the weights."""
    M, K, N, r, ra = problem.M, problem.K, problem.N, problem.rank, problem.lora_rank
    kind = {"device": device, "dtype": problem.dtype}
    forward = problem.direction == FORWARD
    rows = torch.randn(M, K if forward else N, **kind)
    pivots = None
    if problem.pivoted:
        pivots = torch.randperm(N, device=device)[:r].sort().values.int()
    bias = torch.randn(N, **kind) if forward else None

    def one():
        SVh, U = torch.randn(r, K, **kind) / K**0.5, torch.randn(problem.others, r, **kind) / r**0.5
        A = B = None
        if ra:
            A, B = torch.randn(ra, K, **kind) / K**0.5, torch.randn(N, ra, **kind) / ra**0.5
        weights = Weights(SVh, U, A, B, bias, 0.7, pivots)
        if forward:
            return lambda: backend.forward(rows, weights)[0]
        needs = Needs(True, False, False, False)
        return lambda: backend.backward(rows, Saved(None, None), weights, needs)[0]

    return [one() for _ in range(copies)]


def _copy_bandwidth(device) -> float:
    """Bytes read plus written per second by a copy much larger than any cache."""
    source = torch.randint(0, 255, (1 << 30,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    run = _in_turns({0: (lambda: target.copy_(source), 1)}, 7)
    return 2 * source.nbytes / run[0]
