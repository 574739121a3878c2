"""PREDICTION, nothing here is measured: how long a GPU should take for one layer.

    python benchmarks/gpu_prediction.py                          the design's rows, on an H100
    python benchmarks/gpu_prediction.py --gpu A100 --M 1 --K 2048 --N 2048 --rank 512 --lora-rank 32
    python benchmarks/gpu_prediction.py --bits 4 8               quantised matrices of a 1B model
    python benchmarks/gpu_prediction.py --groups                 q, k, v and gate, up as one launch
    python benchmarks/gpu_prediction.py --compare measured.json  measured over predicted, row by row

The model is gpu_roofline.py. A measured file is what gpu_layers.py writes, a table of `hylora
tune`, or a JSON list of {K, N, r, ra, M, form, candidate, seconds, regime}: form "pair" or
"pivoted"; candidate a name of gpu_roofline.CANDIDATES; regime "graph" or "eager" and, where all
that is read was in L2 already, "warm" ("graph warm").
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from gpu_roofline import (
    FORMS,
    GPUS,
    INSTRUCTIONS,
    MODES,
    Layer,
    group,
    machine_named,
    predict,
    quantized,
)

# The design's first estimate, microseconds of a replayed graph on an H100, kept to compare with:
# (K, N, r, ra) -> M -> four products, two products, h on chip, one launch; dense where it was
# estimated.
FIRST_ESTIMATE = {
    (2048, 2048, 512, 32): {
        1: (14.0, 6.5, 59.3, 5.6, 5.3),
        16: (14.1, 6.5, 59.3, 5.6),
        128: (19.5, 10.5, 60.9, 10.5),
        2048: (36.9, 21.2, 77.2, 26.7, 28.0),
        8192: (124.7, 69.9, 106.2, 94.8, 106.0),
    },
    (2048, 5632, 768, 32): {
        1: (16.6, 9.1, 86.2, 8.3, 10.2),
        16: (16.9, 9.2, 86.2, 8.4),
        128: (22.0, 12.0, 91.1, 12.3),
        2048: (76.8, 46.9, 145.8, 63.7),
        8192: (302.5, 172.5, 321.0, 243.0),
    },
    (4096, 4096, 1024, 32): {
        1: (18.3, 10.7, 216.6, 10.1),
        16: (18.6, 10.8, 216.6, 10.2),
        128: (23.9, 13.5, 223.1, 13.7),
        2048: (85.7, 75.3, 277.8, 94.5),
        8192: (334.4, 232.4, 442.9, 332.0),
    },
    (4096, 11008, 1536, 32): {
        1: (28.2, 20.7, 320.5, 20.6, 32.4),
        16: (28.8, 20.9, 320.5, 20.8),
        128: (34.9, 22.8, 343.5, 22.8),
        2048: (228.5, 156.9, 739.8, 222.7),
        8192: (851.6, 604.3, 2252.2, 878.9, 1085.0),
    },
}


def geometric_mean(values) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def micro(seconds: float) -> str:
    return f"{1e6 * seconds:.1f}" if seconds < 1e-4 else f"{1e6 * seconds:.0f}"


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))


def design_rows(gpu: str, form: str, mode: str, warm: bool) -> str:
    """PREDICTION for the layers of the design, the first estimate behind it where there is one."""
    rows = []
    comparable = (gpu, form, mode, warm) == ("H100", "pair", "graph", False)
    for (K, N, r, ra), estimates in FIRST_ESTIMATE.items():
        for M, first in estimates.items():
            predicted = predict(Layer(M, K, N, r, ra, form), gpu, warm)
            cells = [micro(prediction.seconds(mode)) for prediction in predicted.values()]
            if comparable:
                cells = [
                    f"{c} ({first[i]:g})" if i < len(first) else c for i, c in enumerate(cells)
                ]
            rows.append([f"{K}->{N} ({r}+{ra})", str(M), *cells])
    regime = f"{mode}{' warm' if warm else ''}"
    title = f"PREDICTION, {gpu}, {form} form, {regime}, microseconds"
    note = " (in brackets the first estimate)" if comparable else ""
    return f"{title}{note}\n" + markdown(["layer (r+ra)", "M", *predicted], rows)


# (K, N) -> how often a token meets it in a model of Llama 3.2's 1B shape, its output head last.
ONE_B = {(2048, 2048): 32, (2048, 512): 32, (2048, 8192): 32, (8192, 2048): 16, (2048, 128256): 1}


def quantized_rows(gpu: str, widths: list[int]) -> str:
    """PREDICTION for the matrices of a 1B model in bfloat16 and in codes, replayed graphs; the last
    line adds up all of a decoded token's."""
    machine, rows, total = machine_named(gpu), [], defaultdict(float)
    for (K, N), times in ONE_B.items():
        for M in (1, 16, 64, 2048):
            seconds = {"bf16": machine.by_torch([machine.product("x W^T", M, N, K)]).seconds()}
            for bits in widths:
                predicted = quantized(M, K, N, bits, machine)
                seconds[f"{bits} bits"] = predicted.seconds()
            if M == 1:
                for name, value in seconds.items():
                    total[name] += times * value
            rows.append([f"{K} to {N}", str(M), *_over_first(seconds)])
    rows.append(["all of a token's matrices", "1", *_over_first(total)])
    title = f"PREDICTION, {gpu}, microseconds (times as fast as bf16)"
    return f"{title}\n{markdown(['matrix', 'M', *total], rows)}"


def _over_first(seconds: dict[str, float]) -> list[str]:
    first, *others = seconds.values()
    return [micro(first), *(f"{micro(value)} ({first / value:.2f})" for value in others)]


# TinyLlama's, half of their parameters kept: (K, N, r) of each member.
GROUPS = {
    "q, k, v": ((2048, 2048, 512), (2048, 256, 112), (2048, 256, 112)),
    "gate, up": ((2048, 5632, 752), (2048, 5632, 752)),
}


def group_rows(gpu: str, mode: str) -> str:
    """PREDICTION for layers on one x: one launch beside the members one by one."""
    rows, at = [], machine_named(gpu)
    for name, sizes in GROUPS.items():
        for M in (1, 8, 64):
            layers = [Layer(M, *size) for size in sizes]
            alone = [predict(layer, gpu) for layer in layers]
            times = [group(layers, at).seconds(mode)]
            for candidate in ("one_launch", "two_products", "dense"):
                times.append(sum(predicted[candidate].seconds(mode) for predicted in alone))
            ratios = [f"{micro(time)} ({time / times[0]:.2f})" for time in times[1:]]
            rows.append([name, str(M), micro(times[0]), *ratios])
    heads = ["group", "M", "one launch", "a launch each", "two products each", "dense"]
    title = f"PREDICTION, {gpu}, {mode}, microseconds (in brackets over the group's launch)"
    return f"{title}\n{markdown(heads, rows)}"


def breakdown(layer: Layer, gpu: str, warm: bool) -> str:
    """PREDICTION for one layer: both modes, the limit of each, and every product by itself."""
    predicted, rows, parts = predict(layer, gpu, warm), [], []
    for name, prediction in predicted.items():
        times = [f"{micro(prediction.seconds(m))} ({prediction.bound(m)})" for m in MODES]
        rows.append([name, str(prediction.launches), *times, micro(prediction.overhead)])
        for s in prediction.stages:
            parts.append([name, s.what, *map(micro, (s.tensor, s.hbm, s.l2)), s.bound])
    heads = ["candidate", "launches", *(f"{m}, bound by" for m in MODES), "launches and waits"]
    title = f"PREDICTION, {gpu}{', warm L2' if warm else ''}, {layer}, microseconds"
    columns = ["candidate", "product", "tensor cores", "HBM", "L2", "bound by"]
    return f"{title}\n{markdown(heads, rows)}\n\n{title}, by product\n{markdown(columns, parts)}"


def measured_rows(path: Path) -> list[dict]:
    """The rows of a measured file. Of a table of `hylora tune`: for each forward problem the times
    of torch's own products and of the fastest launch."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(found, list):
        return found
    if "forward" in found:
        return found["forward"]
    rows = []
    for tuned in (row for row in found["rows"] if row["direction"] == "forward"):
        M, K, N, r, ra = (tuned[name] for name in ("M", "K", "N", "rank", "lora_rank"))
        sizes = {"M": M, "K": K, "N": N, "r": r, "ra": ra}
        sizes["form"] = "pivoted" if tuned["pivoted"] else "pair"
        launches = [t for t in tuned["timings"] if t["config"] != "torch products"]
        torchs = next(t for t in tuned["timings"] if t["config"] == "torch products")
        timings = {"four_products" if ra else "two_products": torchs}
        if launches:
            timings["one_launch"] = min(launches, key=lambda t: t["graph_cold"])
        if ra and (r + ra) * (K + N) < M * N:  # torch's products lay factors side by side each call
            del timings["four_products"]
        for candidate, timing in timings.items():
            for cache in ("cold", "warm"):
                seconds = timing[f"graph_{cache}"]
                rows.append(
                    sizes | {"candidate": candidate, "seconds": seconds, "regime": f"graph {cache}"}
                )
    return rows


def compared(measured: list[dict], gpu: str) -> Iterator[tuple[dict, float | None]]:
    """(row, measured over predicted); None for a candidate that the model doesn't know."""
    for row in measured:
        mode, _, cache = row["regime"].partition(" ")
        if mode not in MODES or cache not in ("", "cold", "warm"):
            raise ValueError(f"regime must be graph or eager [cold or warm], got {row['regime']!r}")
        layer = Layer(row["M"], row["K"], row["N"], row["r"], row["ra"], row["form"])
        prediction = predict(layer, gpu, warm=cache == "warm").get(row["candidate"])
        yield row, None if prediction is None else row["seconds"] / prediction.seconds(mode)


def comparison(measured: list[dict], gpu: str) -> str:
    """Measured over PREDICTION, row by row, and the geometric mean of each candidate and regime."""
    rows, ratios = [], defaultdict(list)
    for row, ratio in compared(measured, gpu):
        layer = Layer(row["M"], row["K"], row["N"], row["r"], row["ra"], row["form"])
        cells = [str(layer), row["candidate"], row["regime"], micro(row["seconds"])]
        if ratio is None:
            rows.append([*cells, "no prediction", ""])
            continue
        rows.append([*cells, micro(row["seconds"] / ratio), f"{ratio:.2f}"])
        ratios[row["candidate"], row["regime"]].append(ratio)
    means = [
        [candidate, regime, str(len(found)), f"{geometric_mean(found):.2f}"]
        for (candidate, regime), found in ratios.items()
    ]
    heads = ["layer", "candidate", "regime", "measured", "PREDICTION", "measured / PREDICTION"]
    return (
        f"{gpu}, microseconds, measured beside the PREDICTION\n{markdown(heads, rows)}\n\n"
        "Geometric means of measured / PREDICTION\n"
        + markdown(["candidate", "regime", "rows", "mean"], means)
    )


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--gpu", default="H100", choices=list(GPUS))
    for name, dimension in (("M", "rows"), ("K", "inputs"), ("N", "outputs"), ("rank", "r")):
        parser.add_argument(f"--{name}", type=int, help=f"{dimension} of the one layer to predict")
    parser.add_argument("--lora-rank", type=int, default=0, help="ra of that layer")
    parser.add_argument("--form", default="pair", choices=FORMS)
    parser.add_argument("--mode", default="graph", choices=MODES, help="of the table of all rows")
    parser.add_argument("--warm", action="store_true", help="what is read is in L2 already")
    parser.add_argument("--bits", type=int, nargs="+", choices=list(INSTRUCTIONS), help="quantised")
    parser.add_argument("--groups", action="store_true", help="layers on one x as one launch")
    parser.add_argument("--compare", type=Path, metavar="JSON", help="measured times")
    given = parser.parse_args(words)
    sizes = (given.M, given.K, given.N, given.rank)
    if given.bits is not None:
        print(quantized_rows(given.gpu, given.bits))
    elif given.groups:
        print(group_rows(given.gpu, given.mode))
    elif given.compare is not None:
        print(comparison(measured_rows(given.compare), given.gpu))
    elif all(size is not None for size in sizes):
        layer = Layer(*sizes, given.lora_rank, given.form)
        print(breakdown(layer, given.gpu, given.warm))
    elif any(size is not None for size in sizes):
        parser.error("one layer needs all of --M, --K, --N and --rank")
    else:
        print(design_rows(given.gpu, given.form, given.mode, given.warm))


if __name__ == "__main__":
    main(sys.argv[1:])
