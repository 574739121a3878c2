"""What a run of gpu.sh has measured so far, as Markdown: results.md, ready for docs/performance.md.

    python benchmarks/gpu_results.py runs/gpu      prints it from the folder's JSON files

A file that is missing leaves its section out. Standard library only: it runs after every step, and
on a machine without torch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def render(folder: Path) -> str:
    """The whole of results.md."""
    session = _read(folder, "session.json") or {}
    sections = [
        _title(session.get("machine", {}), session.get("started", "")),
        _models(_read(folder, "models.json") or []),
        _host_cost(_read(folder, "host_cost.json") or {}),
        one_row(_read(folder, "one_row.json") or {}),
        _quantized(_read(folder, "quantized.json") or []),
        groups(_read(folder, "groups.json") or []),
        _layers(_read(folder, "layers.json") or {}),
        *(_selftest(_read(folder, name)) for name in ("selftest.json", "selftest-full.json")),
        _tuned(_read(folder, "tune.json") or {}),
        _steps(session.get("steps", [])),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _read(folder: Path, name: str):
    """The JSON of a file; None where it is missing or was cut off while it was written."""
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def markdown(heads, rows) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in cells) + " |" for cells in lines)


def one_cell(text: str, most: int = 120) -> str:
    """Text that fits a cell of a table."""
    return " ".join(text.replace("|", "/").split())[:most]


def _title(machine: dict, started: str) -> str:
    card = machine.get("card", "no card")
    versions = ", ".join(f"{name} {found}" for name, found in machine.get("versions", {}).items())
    driver, commit = machine.get("driver", "?"), machine.get("commit", "?")
    where = f"driver {driver}, {versions}; commit {commit}, {started}, `benchmarks/gpu.sh`."
    return f"### {card}\n\n{where}"


# ------------------------------------------------------------------------------------- whole models

UNITS = {"host cost of a layer's call": ("µs", 1e6), "training step": ("ms", 1e3)}


def _models(rows: list[dict]) -> str:
    parts = []
    for model in dict.fromkeys(row["model"] for row in rows):
        for adapters in ("merged", "apart"):
            mine = [r for r in rows if (r["model"], r["adapters"]) == (model, adapters)]
            if mine:
                parts.append(f"{model}, adapters {adapters}:\n\n{_model_table(mine)}")
    if not parts:
        return ""
    note = (
        "Random weights, bfloat16, one rank for each size of layer. Tokens a second, a training "
        "step in ms, a layer's call on the host in µs; in brackets how many times as fast as "
        "dense, the median of interleaved rounds. Dense is trained with LoRA of the same rank. "
        "Peak: own weights and what the call allocates."
    )
    return "\n\n".join(["#### Whole models", note, *parts])


def _model_table(rows: list[dict]) -> str:
    """A column for each measurement, a row for each candidate; the least and the largest peak."""
    columns = list(dict.fromkeys((r["what"], r["mode"], r["batch"]) for r in rows))
    cells: dict[str, dict[tuple, str]] = {}
    peaks: dict[str, dict[str, float]] = {}
    for r in rows:
        unit, scale = UNITS.get(r["what"], ("", 0))
        value = f"{scale * r['seconds']:.1f}" if unit else f"{r['tokens_per_second']:.0f}"
        cell = f"{value} ({r['times_faster_than_dense']:.2f})"
        cells.setdefault(r["candidate"], {})[r["what"], r["mode"], r["batch"]] = cell
        if r["peak_bytes"] is not None:
            of_candidate = peaks.setdefault(r["candidate"], {})
            most = max(of_candidate.get(r["what"], 0), r["peak_bytes"])
            of_candidate[r["what"]] = most
    kinds = list(dict.fromkeys(what for found in peaks.values() for what in found))
    heads = ["", *map(_head, columns), *(f"peak GB, {what}" for what in kinds)]
    lines = [
        [
            name,
            *(found.get(column, "") for column in columns),
            *(f"{peaks[name][what] / 1e9:.2f}" if name in peaks else "" for what in kinds),
        ]
        for name, found in cells.items()
    ]
    return markdown(heads, lines)


def _head(column: tuple) -> str:
    what, mode, batch = column
    unit = UNITS.get(what, ("",))[0]
    if what == "decode":
        return f"decode {mode}, batch {batch}"
    if mode != "eager":
        what = f"{what} {mode}"
    return f"{what}, {unit}" if unit else what


# ---------------------------------------------------------------------------------- the other steps


def _layers(report: dict) -> str:
    means = report.get("geometric_means", {})
    if not means:
        return ""
    rivals = list(dict.fromkeys(name for found in means.values() for name in found))
    rows = [
        [group, *(f"{found[name]:.2f}" if name in found else "" for name in rivals)]
        for group, found in means.items()
    ]
    limits = report.get("limits", {})
    note = (
        "A rival's time over that of `auto`, geometric mean of the layers; above 1, `auto` is "
        f"faster. Memory {limits.get('hbm', 0) / 1e12:.2f} TB/s, a large bf16 product "
        f"{limits.get('product', 0) / 1e12:.0f} TFLOP/s."
    )
    listed = [f"FAILED: {failure}" for failure in report.get("failures", [])]
    listed += behind_two_products(report.get("forward", []))
    items = "".join(f"\n* {item}" for item in listed)
    return f"#### One layer\n\n{note}\n\n{markdown(['', *rivals], rows)}{items}"


def behind_two_products(rows: list[dict], least: float = 0.97) -> list[str]:
    """Each layer and regime in which ours has less than `least` times the speed of two torch
    products, in words, the slowest first."""
    seconds = {}
    for r in rows:
        where = (r["K"], r["N"], r["r"], r["ra"], r["form"], r["M"], r["regime"])
        seconds.setdefault(where, {})[r["candidate"]] = r["seconds"]
    found = []
    for (K, N, rank, lora_rank, form, M, regime), by_name in seconds.items():
        for name in ("optimised", "auto"):
            if name in by_name and "two_products" in by_name:
                speed = by_name["two_products"] / by_name[name]
                layer = f"{K} to {N} ({rank} + {lora_rank}) {form}, M = {M}, {regime}"
                found.append((speed, f"{layer}: {name} has {speed:.2f} of two products' speed"))
    return [words for speed, words in sorted(found) if speed < least]


def _host_cost(report: dict) -> str:
    found = report.get("microseconds", {})
    if not found:
        return ""
    note = "" if report["on_gpu"] else " Without a GPU: all but the driver's launch."
    rows = [[name, f"{us:.1f}"] for name, us in found.items()]
    return f"#### Host, µs a call{note}\n\n{markdown(['layer', 'µs'], rows)}"


def one_row(report: dict) -> str:
    """Variants of one launch at M = 1: cold and warm, by blocks on a multiprocessor."""
    rows = report.get("rows", [])
    if not rows:
        return ""
    blocks = list(dict.fromkeys(row["blocks"] for row in rows))
    cells: dict[str, dict[int, str]] = {}
    for row in rows:
        times = f"{row['cold_us']:.1f} / {row['warm_us']:.1f}"
        cells.setdefault(row["variant"], {})[row["blocks"]] = times
    lines = [[name, *(found.get(b, "") for b in blocks)] for name, found in cells.items()]
    heads = ["µs of a pass, cold / warm", *(f"{b} blocks" for b in blocks)]
    title = f"#### One row: {report['K']} to {report['N']}, rank {report['rank']}"
    return f"{title}\n\n{markdown(heads, lines)}"


def _quantized(rows: list[dict]) -> str:
    """A line for each matrix and number of rows, a column for each width."""
    cells: dict[tuple, dict[str, str]] = {}
    for r in rows:
        speed, rate = r["times_faster_than_bf16"], r["bytes_per_second"] / 1e12
        words = f"{1e6 * r['seconds']:.1f} ({speed:.2f}; {rate:.2f})"
        cells.setdefault((r["K"], r["N"], r["M"]), {})[r["candidate"]] = words
    if not cells:
        return ""
    names = list(dict.fromkeys(r["candidate"] for r in rows))
    lines = [
        [f"{K} to {N}, M = {M}", *(found.get(name, "") for name in names)]
        for (K, N, M), found in cells.items()
    ]
    note = "µs a call (times as fast as bf16; TB/s of the matrix), weights out of memory."
    return f"#### Quantised matrices\n\n{note}\n\n{markdown(['', *names], lines)}"


def groups(rows: list[dict]) -> str:
    """Layers on one x: microseconds, and how many times as fast as the members one by one."""
    if not rows:
        return ""
    heads = list(dict.fromkeys(row["candidate"] for row in rows))
    cells: dict[tuple, dict[str, float]] = {}
    for row in rows:
        key = row["group"], row["M"], row["regime"]
        cells.setdefault(key, {})[row["candidate"]] = row["seconds"]
    lines = [
        [
            *key,
            *(
                f"{1e6 * found[name]:.1f} ({found['members'] / found[name]:.2f})"
                if name in found
                else ""
                for name in heads
            ),
        ]
        for key, found in cells.items()
    ]
    note = "In brackets how many times as fast as the members one by one."
    return f"#### Groups, µs\n\n{note}\n\n{markdown(['', 'M', 'regime', *heads], lines)}"


def _selftest(report: dict | None) -> str:
    if not report:
        return ""
    rows = [
        [
            *(line["backend"], line["dtype"], line["form"], line["cases"], f"{line['worst']:.2f}"),
            f"{line['repeats']} x {'bit-equal' if line['bit_equal'] else 'DIFFERENT'}",
            f"FAILED: {len(line['failures'])}" if line["failures"] else "ok",
        ]
        for line in report["lines"]
    ]
    heads = ["backend", "dtype", "form", "cases", "worst error / allowed", "repeated", "verdict"]
    failures = [failure for line in report["lines"] for failure in line["failures"]]
    notes = [f"not tested: {what}: {why}" for what, why in report["skipped"].items()]
    notes += [f"FAILED: {failure}" for failure in failures[:20]]
    listed = "".join(f"\n* {note}" for note in notes)
    return f"#### Selftest, {report['seconds']:.0f} s\n\n{markdown(heads, rows)}\n{listed}"


def _tuned(report: dict) -> str:
    rows = report.get("rows", [])
    return f"#### Tuned\n\n{len(rows)} problems, in tune.json." if rows else ""


def _steps(steps: list[dict]) -> str:
    rows = [[s["name"], s["status"], f"{s['seconds']:.0f}", s["last_line"]] for s in steps]
    return f"#### Steps\n\n{markdown(['step', 'status', 'seconds', 'last line'], rows)}"


if __name__ == "__main__":
    print(render(Path(sys.argv[1])), end="")
