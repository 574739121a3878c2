"""A bench run's JSON -> the README's tables in markdown and a roofline plot.

    python benchmarks/report.py runs/bench/X.json        tables to stdout, X.png beside the JSON

Ratios are geometric means over a row's cases, of medians over interleaved rounds; the least of them
stands behind it. The last row of a table is over all of its cases.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections import defaultdict
from pathlib import Path

BASELINES = {"a": "(a) naive", "b": "(b) two products", "d": "(d) oneDNN", "dense": "dense"}
COLORS = {"ours": "#1f6fd0", "b": "#e07b1a", "d": "#6b7280"}


def main(words: list[str]) -> None:
    if len(words) != 1:
        sys.exit("usage: python benchmarks/report.py runs/bench/X.json")
    path = Path(words[0])
    results = read(path)
    print(tables(results))
    picture = path.with_suffix(".png")
    if draw(results, picture):
        print(f"\nroofline: {picture}")


def read(path: Path) -> dict[str, list[dict]]:
    """suite -> its results, in the order of the run."""
    found = defaultdict(list)
    for benchmark in json.loads(path.read_text(encoding="utf-8"))["benchmarks"]:
        result = benchmark["extra_info"]
        found[result.get("suite", "other")].append(result)
    return found


def geometric_mean(values) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


# ------------------------------------------------------------------------------------------- tables


def tables(results: dict[str, list[dict]]) -> str:
    parts = [
        ("Limits measured", limits_table(results["limits"])),
        ("One layer, forward", ratio_table(results["linear"], forward_row)),
        ("Layers of models, forward", models_table(results["models"])),
        ("One layer, backward", ratio_table(results["backward"], training_row)),
        ("One layer, forward and backward", ratio_table(results["fwd+bwd"], training_row)),
        ("Two threads over one, and the pivoted form", scaling_table(results["linear"])),
        ("SmolLM2's training step", training_table(results["training"])),
        ("SmolLM2, tokens a second", model_table(results["model"])),
        ("A decode step, milliseconds", breakdown_table(results["breakdown"])),
        ("Random shapes over (b)", random_table(results["random shapes"])),
        ("One call, microseconds", overhead_table(results["overhead"])),
    ]
    return "\n\n".join(f"### {title}\n{table}" for title, table in parts if table)


def markdown(heads, rows) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines)


def forward_row(result: dict) -> str:
    """The row of the table a case belongs to."""
    M, dtype = result["M"], result["dtype"]
    width = "K ≥ 2048" if result["K"] >= 2048 else "K < 2048"
    if dtype != "bf16":
        return f"{dtype} " + ("M = 1" if M == 1 else "M = 4..16" if M <= 16 else "M ≥ 128")
    if result["regime"] == "DRAM":
        return "bf16 M = 1, DRAM"
    if M <= 16:
        return f"bf16 M = 1..16, {width}, L3"
    if width == "K ≥ 2048":
        return f"bf16 M = 128..2048, {width}"
    return f"bf16 M = {'128..512' if M <= 512 else '2048'}, {width}"


def training_row(result: dict) -> str:
    return f"{result['dtype']} M = {result['M']}, K {'≥' if result['K'] >= 2048 else '<'} 2048"


def ratio_table(results: list[dict], row_of) -> str:
    """Rows of cases alike, for each number of threads, and one of all."""
    if not results:
        return ""
    names = [name for name in BASELINES if any(name in r["times_faster_than"] for r in results)]
    groups = defaultdict(list)
    for result in results:
        groups[f"{row_of(result)}, {result['threads']}T"].append(result)
    heads = ["regime", "cases", *(f"over {BASELINES[n]}" for n in names), "TFLOP/s", "% of limit"]
    rows = [ratio_row(label, group, names) for label, group in groups.items()]
    rows.append(ratio_row("**geometric mean**", results, names))
    return markdown(heads, rows)


def ratio_row(label: str, group: list[dict], names: list[str]) -> list:
    cells = [label, len(group)]
    for name in names:
        values = [r["times_faster_than"][name] for r in group if name in r["times_faster_than"]]
        cells.append(f"{geometric_mean(values):.2f} ({min(values):.2f})" if values else "")
    cells.append(f"{geometric_mean(r['tflops'] for r in group):.3f}")
    cells.append(f"{geometric_mean(r['percent_of_limit'] for r in group):.0f}")
    return cells


def models_table(results: list[dict]) -> str:
    """A row for each layer, dtype and number of threads, a column for each number of rows. A cell:
    times faster than oneDNN's products (torch's, where oneDNN prepacks no such weights), and the
    percentage of the limit that few rows have, reading the weights from where they are."""
    rows, columns = defaultdict(dict), {}
    for r in results:
        few = r["M"] <= 16
        column = f"M = {r['M']}" + (f", {r['regime']}" if few else "")
        columns[column] = None
        ratios = r["times_faster_than"]
        rival = "d" if "d" in ratios else "b"
        share = f" {r['percent_of_limit']:.0f} %" if few else ""
        label = f"{r['K']} to {r['N']} r{r['r']} {r['dtype']}", r["threads"], BASELINES[rival]
        rows[label][column] = f"{ratios[rival]:.2f}{share}"
    heads = ["layer", "threads", "over", *columns]
    cells = [[*label, *(row.get(c, "") for c in columns)] for label, row in rows.items()]
    return markdown(heads, cells) if cells else ""


def scaling_table(results: list[dict]) -> str:
    single = {_without_threads(r): r for r in results if r["threads"] == 1}
    ratios, pivoted = defaultdict(list), defaultdict(list)
    for result in results:
        ours = result["ours"]
        alone = single.get(_without_threads(result))
        if result["threads"] == 2 and alone is not None:
            ratio = alone["seconds"][ours] / result["seconds"][ours]
            ratios[forward_row(result)].append(ratio)
        if result["pivoted_times_faster"] is not None:
            pivoted[forward_row(result)].append(result["pivoted_times_faster"])
    rows = [
        [row, *(f"{geometric_mean(t[row]):.2f}" if t[row] else "" for t in (ratios, pivoted))]
        for row in list(dict.fromkeys([*ratios, *pivoted]))
    ]
    heads = ["regime", "2 threads over 1", "pivoted over the pair of the same rank"]
    return markdown(heads, rows) if rows else ""


def _without_threads(result: dict) -> str:
    return result["case"].rpartition(" ")[0]


def limits_table(results: list[dict]) -> str:
    rows = [
        [
            r["threads"],
            f"{r['compute']['bf16'] / 1e12:.2f}",
            "" if r["bf16_from_l1"] is None else f"{r['bf16_from_l1'] / 1e12:.2f}",
            "" if not r.get("bf16_median") else f"{r['bf16_median'] / 1e12:.2f}",
            "" if r.get("throttled") is None else f"{100 * r['throttled']:.0f} %",
            f"{r['compute']['fp32'] / 1e9:.0f}",
            *(f"{rate / 1e9:.1f}" for rate in r["read"].values()),
        ]
        for r in results
    ]
    heads = ["threads", "bf16 TFLOP/s", "from L1", "1T, median", "throttled", "fp32 GFLOP/s"]
    heads += ["L2 GB/s", "L3 GB/s", "DRAM GB/s"]
    return markdown(heads, rows) if rows else ""


def training_table(results: list[dict]) -> str:
    rows = [
        [
            r["threads"],
            r["tokens"],
            ", ".join(f"{name} {speed:.0f}" for name, speed in r["tokens_per_second"].items()),
            f"{r['ratio']:.2f}",
        ]
        for r in results
    ]
    return markdown(["threads", "tokens", "tokens/s", "over eager"], rows) if rows else ""


def model_table(results: list[dict]) -> str:
    """A column for each phase and number of threads; in brackets, ours over it."""
    rivals = list(dict.fromkeys(name for r in results for name in r["tokens_per_second"]))
    rows = []
    for name in rivals:
        cells = [name]
        for result in results:
            speed = result["tokens_per_second"].get(name)
            ratio = result["times_faster_than"].get(name)
            shown = "" if speed is None else f"{speed:.1f}"
            cells.append(shown if ratio is None else f"{shown} ({ratio:.2f}x)")
        rows.append(cells)
    heads = ["", *(f"{r['what']}, {r['threads']}T" for r in results)]
    return markdown(heads, rows) if rows else ""


def breakdown_table(results: list[dict]) -> str:
    columns = {
        f"{name}, {r['threads']}T": parts
        for r in results
        for name, parts in r.items()
        if isinstance(parts, dict)
    }
    kinds = list(dict.fromkeys(kind for parts in columns.values() for kind in parts))
    rows = [
        [kind, *(f"{1e3 * parts.get(kind, 0):.2f}" for parts in columns.values())] for kind in kinds
    ]
    return markdown(["", *columns], rows) if rows else ""


def random_table(results: list[dict]) -> str:
    if not results:
        return ""
    result = results[0]
    rows = [
        [case, f"{result['ratios'][case]:.3f}", ", ".join(f"{value:.3f}" for value in again)]
        for case, again in result["repeated"].items()
    ]
    rows.append([f"**geometric mean of {result['count']}**", f"{result['geometric_mean']:.2f}", ""])
    return markdown(["the lowest", "ratio", "measured three times more"], rows)


def overhead_table(results: list[dict]) -> str:
    rows = [[name, f"{1e6 * s:.1f}"] for r in results for name, s in r["seconds"].items()]
    return markdown(["", "µs"], rows) if rows else ""


# ----------------------------------------------------------------------------------------- roofline


def draw(results: dict[str, list[dict]], path: Path) -> bool:
    """TFLOP/s over the formula's FLOPs per byte, a panel for each dtype and number of threads."""
    points, limits = results["linear"], {r["threads"]: r for r in results["limits"]}
    panels = [
        (dtype, threads)
        for dtype in ("bf16", "fp32")
        for threads in sorted(limits)
        if any(p["dtype"] == dtype and p["threads"] == threads for p in points)
    ]
    if not panels:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = len({threads for _, threads in panels})
    lines = math.ceil(len(panels) / columns)
    size = (5.2 * columns, 3.9 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (dtype, threads) in zip(axes.flat, panels, strict=False):
        mine = [p for p in points if p["dtype"] == dtype and p["threads"] == threads]
        _panel(axis, mine, limits[threads], dtype)
        axis.set_title(f"{dtype}, {threads} thread{'s' if threads > 1 else ''}", fontsize=10)
    axes.flat[0].legend(fontsize=8, frameon=False, loc="lower right")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def _panel(axis, points: list[dict], limits: dict, dtype: str) -> None:
    """Roofs of read bandwidth (slanted) and multiply-adds (flat), and every case under them."""
    peak = limits["compute"][dtype] / 1e12
    intensity = [point["flops_per_byte"] for point in points]
    low, high = 0.4, 1500.0  # the same for all panels
    for name, style in (("L2", ":"), ("L3", "-"), ("DRAM", "--")):
        rate = limits["read"][name] / 1e12
        corner = min(max(peak / rate, low), high)
        roof = [(x, min(peak, rate * x)) for x in (low, corner, high)]
        axis.plot(*zip(*roof, strict=True), style, color="#374151", lw=1)
        above = min(peak, rate * low) * 1.25
        axis.text(low, above, name, fontsize=7, color="#374151", va="bottom", ha="left")
    for name in ("d", "b", "ours"):
        heights = [
            point["tflops"] / (1 if name == "ours" else point["times_faster_than"].get(name, 1))
            for point in points
        ]
        label = "ours, packed" if name == "ours" else BASELINES[name]
        marks = {"s": 22, "alpha": 0.8, "linewidths": 0}
        axis.scatter(intensity, heights, color=COLORS[name], label=label, **marks)
    axis.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s")
    axis.grid(True, which="major", color="#e5e7eb", lw=0.6)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main(sys.argv[1:])
