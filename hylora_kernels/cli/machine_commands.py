"""The commands behind `hylora` that are about the machine: what it has, whether the backends are
right on it, and what is fastest on it."""

# No `from __future__ import annotations`: typer reads the annotations themselves.

from typing import Annotated

from hylora_kernels.cli.options import (
    Device,
    Json,
    Option,
    Seed,
    numbers_option,
    shapes_option,
    write_report,
)
from hylora_kernels.support.console import format_bytes, format_seconds, show


def info(json_path: Json = None) -> None:
    """Versions, devices, what the CPU can do, backends and why not, the cache."""
    from hylora_kernels.machine.info import info as look

    report = look()
    for name, text in report.rows():
        show(f"{name:<16}{text}")
    write_report(report, json_path)


def selftest(
    device: Device = "auto",
    full: Annotated[
        bool, Option("--full", help="All sizes and launches: many minutes on a GPU.")
    ] = False,
    repeats: Annotated[
        int | None, Option(help="Runs of each call, for races; by default 20 on a GPU.")
    ] = None,
    seed: Seed = 0,
    seconds: Annotated[
        float | None, Option(help="No case is begun after them; those left are counted.")
    ] = None,
    json_path: Json = None,
) -> None:
    """Check every backend against the formula in float64, and for races, on this machine."""
    from hylora_kernels.machine.selftest.run import selftest as run

    report = run(device, full, repeats, seed, seconds)
    show(report.render())
    for what, why in report.skipped.items():
        show(f"not tested: {what}: {why}")
    for failure in report.failures[:20]:
        show(f"FAILED: {failure}")
    write_report(report, json_path)
    cases = sum(line.cases for line in report.lines)
    if report.failures:
        raise FloatingPointError(f"{len(report.failures)} failures in {cases} cases")
    show(f"{cases} cases passed in {format_seconds(report.seconds)}")


def tune(
    device: Annotated[str, Option(help="The GPU: cuda, cuda:1, ...")] = "cuda",
    shapes: Annotated[
        str | None, Option(help='Layers KxNxrxra with commas between: "2048x2048x512x32,...".')
    ] = None,
    rows: Annotated[
        str | None, Option(help="Rows of x (M) with commas between, e.g. 1,16,256.")
    ] = None,
    dtype: Annotated[
        str, Option(help="bfloat16, float16, float32, or several with commas between.")
    ] = "bfloat16",
    model: Annotated[
        str | None, Option(help="Folder of a compressed model: the shapes of its layers.")
    ] = None,
    quick: Annotated[
        bool, Option("--quick", help="Few shapes and rows, forward alone: a minute or two.")
    ] = False,
    json_path: Json = None,
) -> None:
    """Measure what serves a layer fastest on this GPU, for the backend to read."""
    from hylora_kernels.machine import tune as tuning
    from hylora_kernels.support.devices import resolve_device, resolve_dtype

    if shapes is not None and model is not None:
        raise ValueError("--shapes and --model both say which layers: give one of them")
    resolve_device(device)
    asked = {}
    if quick:
        asked = {"shapes": tuning.SHAPES[2:4], "rows": (1, 16, 256), "directions": ("forward",)}
    if shapes is not None:
        asked["shapes"] = shapes_option(shapes, "shapes")
    if model is not None:
        from hylora_kernels.model.checkpoint import layer_shapes

        asked["shapes"], asked["forms"] = layer_shapes(model)
    if rows is not None:
        asked["rows"] = numbers_option(rows, int, "rows")
    asked["dtypes"] = [resolve_dtype(name.strip()) for name in dtype.split(",")]
    report = tuning.tune(device, **asked)
    show(report.render())
    show(f"written to {tuning.table_path(report.device)}, which the backend reads from now on")
    write_report(report, json_path)


def cache(
    clear: Annotated[bool, Option("--clear", help="Delete what is in it.")] = False,
    json_path: Json = None,
) -> None:
    """Where the cache is (HYLORA_CACHE) and how large; everything in it can be made again."""
    from hylora_kernels.machine import info
    from hylora_kernels.support import storage

    report = info.cache()
    show(f"{report.path}: {format_bytes(report.bytes)}")
    if clear:
        show(f"deleted {format_bytes(storage.clear_cache())}")
    write_report(report, json_path)
