"""A result: one printed line, the same in the JSON, and geometric means at the end of the run."""

from __future__ import annotations

import math
from collections import defaultdict

from layers import Case
from limits import Limits
from timing import Times

_ratios: dict[tuple[str, str], list[float]] = defaultdict(list)


def geometric_mean(values) -> float:
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values))


def record(
    benchmark, suite: str, case: Case, times: Times, limits: Limits, ours: str, work: float = 1.0
) -> dict:
    """Put `case`'s result into the benchmark's extra_info and print it.

    Ratios say how many times as fast as each rival `ours` is. The work counted is `work` times that
    of the forward's fewest products in the pair form, for every rival.
    """
    seconds, shape = times.median(ours), case.shape
    flops = work * shape.flops(case.M)
    moved = work * shape.bytes_moved(case.M, case.torch_dtype)
    roof = limits.roof_seconds(flops, moved, case.dtype, case.regime)
    pivoted = "pivoted" in times.samples
    others = [name for name in times.samples if name not in (ours, "pivoted")]
    result = {
        "suite": suite,
        "case": str(case),
        "K": shape.K,
        "N": shape.N,
        "r": shape.r,
        "ra": shape.ra,
        "M": case.M,
        "dtype": case.dtype,
        "regime": case.regime,
        "threads": case.threads,
        "rounds": times.rounds,
        "ours": ours,
        "seconds": {name: times.median(name) for name in times.samples},
        "times_faster_than": {name: times.ratio(name, ours) for name in others},
        "pivoted_times_faster": times.ratio(ours, "pivoted") if pivoted else None,
        "tflops": flops / seconds / 1e12,
        "gbs": moved / seconds / 1e9,
        "flops_per_byte": flops / moved,
        "percent_of_limit": 100 * roof / seconds,
    }
    benchmark.extra_info.update(result)
    keep_ratios(f"{suite} {regime_of(case)}", result["times_faster_than"])
    if pivoted:
        keep_ratios("pivoted form", {"the pair": result["pivoted_times_faster"]})
    print("\n" + line(result), end="")
    return result


def line(result: dict) -> str:
    ratios = "  ".join(f"{k} {v:.2f}x" for k, v in result["times_faster_than"].items())
    pivoted = result["pivoted_times_faster"]
    ratios += "" if pivoted is None else f"  (pivoted is {pivoted:.2f}x the pair's speed)"
    seconds = format_time(result["seconds"][result["ours"]])
    return (
        f"{result['suite']:8} {result['case']:44} {result['ours']} {seconds}"
        f"  {result['tflops']:.3f} TFLOP/s  {result['gbs']:.1f} GB/s"
        f"  {result['percent_of_limit']:.0f} % of the limit  over {ratios}"
    )


def format_time(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def regime_of(case: Case) -> str:
    """The group that a case is summed up in."""
    rows = "M<=16" if case.M <= 16 else "M>16"
    width = "K<2048" if case.shape.K < 2048 else "K>=2048"
    return f"{case.dtype} {rows} {width} {case.regime} {case.threads}T"


def keep_ratios(group: str, ratios: dict[str, float]) -> None:
    for name, ratio in ratios.items():
        _ratios[group, name].append(ratio)


def summary() -> list[str]:
    """Geometric means of the session's results, by group."""
    if not _ratios:
        return []
    groups = defaultdict(list)
    for (group, name), ratios in _ratios.items():
        groups[group].append(f"{name} {geometric_mean(ratios):.2f}x (least {min(ratios):.2f})")
    lines = ["", "geometric means, ours over"]
    return lines + [f"  {group:36} {'  '.join(cells)}" for group, cells in groups.items()]
