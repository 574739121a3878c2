"""The command `hylora plan`: what a compression will need, before it is begun."""

# No `from __future__ import annotations`: typer reads the annotations themselves.

from typing import Annotated, Any

from hylora_kernels.cli.options import (
    Argument,
    Device,
    Dtype,
    Json,
    library_options,
)
from hylora_kernels.cli.output import write_report
from hylora_kernels.planning.options import PlanOptions
from hylora_kernels.support.console import show

Config = Annotated[
    str,
    Argument(
        metavar="MODEL", help="Hub id, folder or config.json; nothing but the config is read."
    ),
]


@library_options(PlanOptions, without=("tokenizer", "device", "dtype", "progress", "cache"))
def plan(
    model: Config,
    *,
    options: dict[str, Any],
    device: Device = "auto",
    dtype: Dtype = "auto",
    json_path: Json = None,
) -> None:
    """Predict the memory, disk and hours that `hylora compress` with these options would take, and
    the size and speed of its result."""
    from hylora_kernels.planning.plan import plan as make

    report = make(model, device=device, dtype=dtype, **options)
    show(report.render())
    write_report(report, json_path)
