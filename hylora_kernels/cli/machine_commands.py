"""The commands of `hylora` about this machine: its hardware, correctness and speed of the backends,
and the cache."""

# No `from __future__ import annotations`: typer reads the annotations themselves.

from typing import Annotated, Any

from hylora_kernels.cli.options import (
    Device,
    Json,
    Option,
    Seed,
    read_numbers,
    read_shapes,
)
from hylora_kernels.cli.output import write_report
from hylora_kernels.support.console import format_bytes, format_seconds, show


def info(json_path: Json = None) -> None:
    """Versions, devices, CPU features, each backend or why it can't run, and the cache folder."""
    from hylora_kernels.machine.info import info as collect

    report = collect()
    for name, text in report.rows():
        show(f"{name:<16}{text}")
    write_report(report, json_path)


def selftest(
    device: Device = "auto",
    full: Annotated[
        bool, Option("--full", help="All sizes and launches; takes many minutes on a GPU.")
    ] = False,
    repeats: Annotated[
        int | None, Option(min=1, help="Runs of each call, to find races. By default 20 on a GPU.")
    ] = None,
    seed: Seed = 0,
    seconds: Annotated[
        float | None, Option(min=0, help="No case is begun after them; those left are counted.")
    ] = None,
    json_path: Json = None,
) -> None:
    """Check every backend against the formula in float64, and for races, on this machine."""
    from hylora_kernels.machine.selftest.run import selftest as run

    report = run(device, full, repeats, seed, seconds)
    show(report.render())
    for name, reason in report.skipped.items():
        show(f"not tested: {name}: {reason}")
    for failure in report.failures[:20]:
        show(f"FAILED: {failure}")
    write_report(report, json_path)
    cases = sum(line.cases for line in report.lines)
    if report.failures:
        raise FloatingPointError(f"{len(report.failures)} failures in {cases} cases")
    show(f"{cases} cases passed in {format_seconds(report.seconds)}")


def tune(
    device: Annotated[
        str, Option(help="cpu, cuda, cuda:1, ...; auto: the CPU, and a GPU if there is one.")
    ] = "auto",
    shapes: Annotated[
        str | None,
        Option(
            help="Layers KxNxrxra for a GPU's launches, several with commas between, for example"
            " 2048x2048x512x32."
        ),
    ] = None,
    rows: Annotated[
        str | None, Option(help="Rows of x, several with commas between, for example 1,16,256.")
    ] = None,
    dtype: Annotated[
        str | None,
        Option(
            help="bfloat16, float16 or float32, several with commas between. By default bfloat16, "
            "and on a CPU float32, too."
        ),
    ] = None,
    model: Annotated[
        str | None, Option(help="Folder of a compressed model, for whose layers a GPU's launches.")
    ] = None,
    quick: Annotated[
        bool,
        Option("--quick", help="Launches for few shapes and rows, forward alone; a minute or two."),
    ] = False,
    json_path: Json = None,
) -> None:
    """Measure this machine once: a GPU's fastest launch for each layer, which its backend reads,
    and the rates of layers in each width, which predict times (compress --time)."""
    from hylora_kernels.evaluation.rates import MOST_ROWS, rates_of, rates_path
    from hylora_kernels.support.devices import resolve_device, resolve_dtype

    if shapes is not None and model is not None:
        raise ValueError("--shapes and --model both say which layers: give one of them")
    found = [resolve_device(device)]
    if device == "auto" and found[0].type != "cpu":
        found.append(resolve_device("cpu"))
    asked: dict[str, Any] = {}
    if rows is not None:
        asked["rows"] = read_numbers(rows, int, "rows")
    if dtype is not None:
        asked["dtypes"] = [resolve_dtype(name.strip()) for name in dtype.split(",")]
    for_launches = {"--shapes": shapes, "--model": model, "--quick": quick or None}
    given = [flag for flag, value in for_launches.items() if value is not None]
    if given and found[0].type != "cuda":
        raise ValueError(f"{given[0]} is about a GPU's launches, and the device is {found[0]}")
    written: dict[str, Any] = {}
    if found[0].type == "cuda":
        written = _tune_launches(found[0], shapes, model, quick, asked)
    written["rates"] = []
    for where in found:
        both = ["bfloat16", "float32"] if where.type == "cpu" else ["bfloat16"]
        dtypes = asked.get("dtypes") or [resolve_dtype(name) for name in both]
        rates = rates_of(where, dtypes, asked.get("rows") or (1, MOST_ROWS), again=True)
        show(rates.render())
        show(f"written to {rates_path(where)}, which compress and quantize read for --time")
        written["rates"].append(rates.to_dict())
    write_report(written, json_path)


def _tune_launches(
    device: Any, shapes: str | None, model: str | None, quick: bool, asked: dict[str, Any]
) -> dict[str, Any]:
    """The report of machine.tune, as JSON has it."""
    from hylora_kernels.machine import tune as tuning

    options: dict[str, Any] = {}
    if quick:
        options = {"shapes": tuning.SHAPES[2:4], "rows": (1, 16, 256), "directions": ("forward",)}
    if shapes is not None:
        options["shapes"] = read_shapes(shapes, "shapes")
    if model is not None:
        from hylora_kernels.model.checkpoint import layer_shapes

        options["shapes"], options["forms"] = layer_shapes(model)
    report = tuning.tune(str(device), **options | asked)
    show(report.render())
    show(f"written to {tuning.table_path(report.device)}, which the backend reads from now on")
    return report.to_dict()


def cache(
    clear: Annotated[bool, Option("--clear", help="Delete its files.")] = False,
    json_path: Json = None,
) -> None:
    """Path and size of the cache (HYLORA_CACHE); everything in it is made again when needed."""
    from hylora_kernels.machine import info
    from hylora_kernels.support.cache import clear_cache

    report = info.cache()
    show(f"{report.path}: {format_bytes(report.bytes)}")
    if clear:
        show(f"deleted {format_bytes(clear_cache())}")
    write_report(report, json_path)
