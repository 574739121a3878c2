"""One layer on a GPU, forward and a training step, against its rivals in the same process.

    python benchmarks/gpu_layers.py [--quick] [--compile] [--out runs/gpu]

layers.json is rewritten after every layer; gpu_prediction.py --compare reads it. All in bfloat16.
Regimes: "graph cold", replays of a CUDA graph that goes round copies of the weights larger than L2;
"graph warm", the same weights again and again; "eager cold", called from Python. A ratio is a
rival's time over that of `auto`: above 1, auto is faster.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gpu_rivals as rivals
import torch
from gpu_rivals import DEVICE, DTYPE, Layer

from hylora_kernels.backends import cuda, triton
from hylora_kernels.machine import tune
from hylora_kernels.support.console import show, table
from hylora_kernels.support.storage import write_json

ROWS, QUICK_ROWS = (1, 16, 64, 256, 2048, 8192), (1, 16, 256, 2048)
QUICK_SHAPES = tune.SHAPES[2:4]
TRAINING_ROWS = (2048, 8192)
WARM_UP_TO = 64  # rows; with more the weights are read once for many rows, and L2 matters little
WARM_CALLS = 20  # in one graph or one run, of the same weights
FORMS = ("pair", "pivoted")


# ------------------------------------------------------------------------------------------- clocks


def graph_of(calls: list[Callable]) -> Callable:
    """A CUDA graph of all the calls, as one call.

    Each is made once before: a pivoted layer keeps the order of its outputs from its first call on,
    and a graph that has to find it takes 50 us more a layer.
    """
    here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        for call in calls:
            call()
    here.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def one_by_one(calls: list[Callable]) -> Callable:
    def run():
        for call in calls:
            call()

    return run


def in_turns(contest: dict[str, tuple[Callable, int]], rounds: int) -> dict[str, float]:
    """Median seconds of a call, by name; a contest maps a name to (a run, the calls in it). Every
    round times each run once."""
    repeats, samples = {}, {name: [] for name in contest}
    for name, (run, _) in contest.items():
        run()
        seconds = _timed(run, 1)
        repeats[name] = max(1, min(50, round(2e-3 / max(seconds, 1e-6))))
    names = list(contest)
    for round_ in range(rounds):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            run, calls = contest[name]
            samples[name].append(_timed(run, repeats[name]) / calls)
    return {name: statistics.median(values) for name, values in samples.items()}


def _timed(run: Callable, repeats: int) -> float:
    """Seconds a run, by the device's clock."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


def limits() -> dict[str, float]:
    """Bytes/s of memory (the better of copying and reading) and bf16 FLOP/s of a large product."""
    source = torch.zeros(1 << 28, device=DEVICE)
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device=DEVICE).to(DTYPE) for _ in range(2))
    runs = {
        "copy": (lambda: target.copy_(source), 1),
        "read": (source.sum, 1),
        "product": (lambda: a @ b, 1),
    }
    seconds = in_turns(runs, 15)
    copied, read = 2 * source.nbytes / seconds["copy"], source.nbytes / seconds["read"]
    return {"hbm": max(copied, read), "product": 2 * 8192**3 / seconds["product"]}


# ------------------------------------------------------------------------------------------ forward


@torch.no_grad()
def forward(layer: Layer, quick: bool, compiled: bool, rounds: int) -> list[dict]:
    """A row for each rival and regime, of the forward."""
    x = torch.randn(layer.M, layer.K, device=DEVICE).to(DTYPE)
    weights = rivals.random_weights(layer)
    calls = {
        name: rivals.forward_calls(name, layer, x, weights)
        for name in rivals.names_of(rivals.FORWARD)
    }
    config = _best_launch(layer, calls["one_launch"], quick)
    calls["one_launch"] = [rivals.under(config, call) for call in calls["one_launch"]]
    for name, rival in calls.items():
        rivals.check(rival[0](), x, weights, f"{name} of {layer} M={layer.M}")
    regimes = {
        "graph cold": {name: (graph_of(rival), len(rival)) for name, rival in calls.items()},
        "eager cold": {name: (one_by_one(rival), len(rival)) for name, rival in calls.items()},
    }
    if layer.M <= WARM_UP_TO:
        again = {
            name: (graph_of(rival[:1] * WARM_CALLS), WARM_CALLS) for name, rival in calls.items()
        }
        regimes["graph warm"] = again
    if compiled:
        names = ("auto", "four_products", "two_products")
        made = {f"{n} compiled": rivals.compiled_call(n, layer, x, weights) for n in names}
        regimes["eager warm"] = {
            name: (one_by_one([call] * WARM_CALLS), WARM_CALLS) for name, call in made.items()
        }
    sizes = {"K": layer.K, "N": layer.N, "r": layer.r, "ra": layer.ra, "M": layer.M}
    rows = []
    for regime, contest in regimes.items():
        for name, seconds in in_turns(contest, rounds).items():
            row = {**sizes, "form": layer.form, "candidate": name, "regime": regime}
            extra = {"config": str(config)} if name == "one_launch" else {}
            rows.append({**row, "seconds": seconds, **extra})
    return rows


def _best_launch(layer: Layer, calls: list[Callable], quick: bool):
    found = rivals.launches(layer, quick)
    if len(found) == 1:
        return found[0]
    contest = {
        str(config): (graph_of([rivals.under(config, call) for call in calls]), len(calls))
        for config in found
    }
    seconds = in_turns(contest, 5)
    return min(found, key=lambda config: seconds[str(config)])


# ----------------------------------------------------------------------------------------- training


def training(layer: Layer, rounds: int) -> list[dict]:
    """A row for each rival: forward and backward with gradients of x, A and B."""
    x = torch.randn(layer.M, layer.K, device=DEVICE).to(DTYPE).requires_grad_()
    dy = torch.randn(layer.M, layer.N, device=DEVICE).to(DTYPE)
    steps = {
        name: rivals.training_step(name, layer, x, dy) for name in rivals.names_of(rivals.TRAINING)
    }
    regimes = {
        "graph": {name: (graph_of([step] * 2), 2) for name, step in steps.items()},
        "eager": {name: (step, 1) for name, step in steps.items()},
    }
    sizes = {"K": layer.K, "N": layer.N, "r": layer.r, "ra": layer.ra, "M": layer.M}
    return [
        {**sizes, "form": layer.form, "candidate": name, "regime": regime, "seconds": seconds}
        for regime, contest in regimes.items()
        for name, seconds in in_turns(contest, rounds).items()
    ]


# ------------------------------------------------------------------------------------------- tables


def geometric_mean(values) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def tables(rows: list[dict], found: dict[str, float] | None, kind: str) -> tuple[list, dict]:
    """(a table for each form and regime, {form and regime: {rival: geometric mean of ratios}}).

    found: the limits, for a layer's share of them; None for training."""
    made, means = [], {}
    groups = dict.fromkeys((row["form"], row["regime"]) for row in rows)
    for form, regime in groups:
        of_group = [r for r in rows if (r["form"], r["regime"]) == (form, regime)]
        names = list(dict.fromkeys(r["candidate"] for r in of_group))
        first, others = names[0], names[1:]
        cells, ratios = {}, {name: [] for name in others}
        for r in of_group:
            key = r["K"], r["N"], r["r"], r["ra"], r["M"]
            cells.setdefault(key, {})[r["candidate"]] = r["seconds"]
        lines = []
        for (K, N, r, ra, M), seconds in cells.items():
            quotients = [seconds[name] / seconds[first] for name in others]
            for name, quotient in zip(others, quotients, strict=True):
                ratios[name].append(quotient)
            times = [f"{1e6 * seconds[name]:.1f}" for name in names]
            share = _share(Layer(M, K, N, r, ra, form, ra), seconds[first], found)
            lines.append((f"{K}->{N} {r}+{ra}", M, *times, *(f"{q:.2f}" for q in quotients), share))
        mean = {name: geometric_mean(values) for name, values in ratios.items()}
        means[f"{kind}, {form}, {regime}"] = mean
        blank = [""] * (1 + len(names))
        lines.append(("geometric mean", *blank, *(f"{m:.2f}" for m in mean.values()), ""))
        heads = ("layer", "M", *names, *(f"{n} / {first}" for n in others), f"{first} reaches")
        made.append(table(f"{kind}, {form}, {regime}: microseconds", heads, lines))
    return made, means


def _share(layer: Layer, seconds: float, found: dict[str, float] | None) -> str:
    """The share of the measured bandwidth that few rows reach, or the TFLOP/s of many."""
    if found is None:
        return ""
    if layer.M <= 16:
        moved = DTYPE.itemsize * (layer.weights + layer.M * (layer.K + layer.N))
        return f"{100 * moved / seconds / found['hbm']:.0f} % HBM"
    flops = 2 * layer.M * layer.weights / seconds
    return f"{flops / 1e12:.0f} TFLOP/s"


# --------------------------------------------------------------------------------------------- main


def layers(shapes, rows, merged: bool) -> list[Layer]:
    """The shapes in both forms with all rows. merged: pivoted layers have their adapter folded in,
    as they are deployed."""
    found = []
    for K, N, r, ra in shapes:
        for form in FORMS:
            ranks = (r + ra, 0) if merged and form == "pivoted" else (r, ra)
            found += [Layer(M, K, N, *ranks, form, ra) for M in rows]
    return found


def run(quick: bool, compiled: bool, out: Path) -> None:
    """Measure everything, write it, print the tables; exits with an error if a layer failed."""
    start, rounds = time.perf_counter(), 7 if quick else 15
    shapes, rows = (QUICK_SHAPES, QUICK_ROWS) if quick else (tune.SHAPES, ROWS)
    found = limits()
    report = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "lora_on_dense": "peft" if rivals.LoraConfig is not None else "peft's arithmetic",
        "limits": found,
        "forward": [],
        "training": [],
        "geometric_means": {},
        "failures": [],
    }
    say = functools.partial(print, flush=True)
    say(
        f"{report['device']}, torch {torch.__version__}: {found['hbm'] / 1e12:.2f} TB/s, "
        f"{found['product'] / 1e12:.0f} TFLOP/s in bf16; LoRA on dense: {report['lora_on_dense']}"
    )
    if reason := cuda.why_not():
        say(f"without cuda_launch: {reason}")

    def attempt(kind: str, layer: Layer, function: Callable, *arguments) -> None:
        words = f"{kind} {layer} M={layer.M}"
        say(f"{time.perf_counter() - start:6.1f} s  {words}")
        try:
            report[kind] += function(layer, *arguments)
        # One layer that fails, in whatever way, is not to lose the others.
        except Exception as error:
            report["failures"].append(f"{words}: {type(error).__name__}: {error}")
            say(f"FAILED: {report['failures'][-1]}")
        torch.cuda.empty_cache()
        report["geometric_means"] = all_tables(report)[1]
        write_json(out / "layers.json", report)

    for layer in layers(shapes, rows, merged=True):
        also_compiled = compiled and shapes[0][:2] == (layer.K, layer.N)
        attempt("forward", layer, forward, quick, also_compiled, rounds)
    for layer in layers(shapes, TRAINING_ROWS[: 1 if quick else 2], merged=False):
        attempt("training", layer, training, rounds)
    for one in all_tables(report)[0]:
        show(one)
    say(f"{time.perf_counter() - start:.0f} s; written to {out / 'layers.json'}")
    if failures := report["failures"]:
        sys.exit(f"layers that failed: {len(failures)}, the first: {failures[0]}")


def all_tables(report: dict) -> tuple[list, dict]:
    """The tables of both kinds, and their geometric means."""
    shown, means = tables(report["forward"], report["limits"], "forward")
    more, training_means = tables(report["training"], None, "training step")
    return shown + more, means | training_means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="two layers, under 90 s on an H100")
    parser.add_argument("--compile", action="store_true", help="torch.compile too, one layer")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    given = parser.parse_args()
    if reason := triton.why_not() or ("" if torch.cuda.is_available() else "no CUDA device"):
        sys.exit(f"benchmarks/gpu_layers.py needs a GPU: {reason}")
    torch.manual_seed(0)
    run(given.quick, given.compile, given.out)


if __name__ == "__main__":
    main()
