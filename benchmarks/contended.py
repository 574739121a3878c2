"""Few rows on a machine whose cores are shared: medians beside busy processes.

    python benchmarks/contended.py [--busy 0 1 2] [--threads 2] [--seconds 4] [--dtype bf16 fp32]

A container with a CPU quota, a laptop, a server with two jobs: some of the cores that a call counts
on are taken. Each rival runs alone for a while, then the next; their turns go round, so all of them
meet the same load. The median is the time that a user sees, the 95th percentile the worst of a
token's layers.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import ours
import torch
from baselines import rivals
from layers import Case, Shape, check, random_factors

from hylora_kernels.machine.info import info
from hylora_kernels.support.console import as_text, table
from hylora_kernels.support.storage import write_json

CASES = (  # shape and rows
    (Shape(3072, 3072, 768, 0), 1),
    (Shape(1536, 8960, 704, 0), 7),
    (Shape(896, 896, 256, 16), 1),
    (Shape(576, 1536, 208, 16), 1),
)
TURN = 0.1  # seconds; OpenMP's threads go on spinning for some milliseconds after a call
UNTIMED = 0.02  # at the start of a turn: the other rival's threads fall asleep
LEAST_CALLS = 20
BASELINES = ("b", "d")  # torch's two products, oneDNN prepacked


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """So many processes that each keep a core busy."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def turn(call: Callable[[], object]) -> list[float]:
    """Seconds of each call of one rival's turn."""
    start = time.perf_counter()
    samples = []
    while (begin := time.perf_counter()) - start < TURN:
        call()
        if begin - start > UNTIMED:
            samples.append(time.perf_counter() - begin)
    return samples


def measure(case: Case, seconds: float) -> dict[str, list[float]]:
    """rival -> the seconds of each of its calls."""
    factors, x = random_factors(case.shape, case.torch_dtype), case.x()
    calls = {"ours": ours.packed(x, factors, case.regime)[0]}
    for name, copies in rivals(x, case.shape, factors, case.regime, BASELINES).items():
        calls[name] = copies[0]
    for name, call in calls.items():
        check(call(), x, factors, name)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or min(map(len, samples.values())) < LEAST_CALLS:
        for name, call in calls.items():
            samples[name] += turn(call)
    return samples


def line(case: Case, busy: int, samples: dict[str, list[float]]) -> dict:
    """Milliseconds: the median of each rival, and its 95th percentile."""
    found: dict = {"layer": str(case.shape), "dtype": case.dtype, "M": case.M, "busy": busy}
    for name, times in samples.items():
        found[name] = 1e3 * statistics.median(times)
        found[f"{name} p95"] = 1e3 * statistics.quantiles(times, n=20)[-1]
    found["ours / b"] = found["ours"] / found["b"]
    return found


def show(lines: list[dict], threads: int) -> None:
    """Print the lines as a table; oneDNN prepacks bf16 on some processors only."""
    heads = list(dict.fromkeys(head for found in lines for head in found))
    rows = [[_cell(found.get(head, "")) for head in heads] for found in lines]
    print(as_text(table(f"{threads} threads beside busy processes, ms", heads, rows)))


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--busy", type=int, nargs="+", default=[0, 1, 2], help="busy processes beside"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each line")
    parser.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), nargs="+", default=["bf16", "fp32"]
    )
    parser.add_argument("--out", default="runs/contended.json")
    arguments = parser.parse_args()
    if reason := ours.missing():
        raise SystemExit(reason)
    torch.set_num_threads(arguments.threads)
    lines = []
    for busy in arguments.busy:
        with busy_processes(busy):
            for dtype in arguments.dtype:
                for shape, M in CASES:
                    case = Case(shape, dtype, M, "one copy", arguments.threads)
                    lines.append(line(case, busy, measure(case, arguments.seconds)))
    show(lines, arguments.threads)
    write_json(arguments.out, {"machine": dict(info().rows()), "lines": lines})


if __name__ == "__main__":
    main()
