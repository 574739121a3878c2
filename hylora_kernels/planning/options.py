"""The options of plan(): those of compress(), and where it is to run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hylora_kernels.compression.options import CompressOptions
from hylora_kernels.support.options import check_options, option

IN_MEMORY, BY_BLOCK = ROUTES = ("in_memory", "by_block")


@dataclass(frozen=True, kw_only=True)
class PlanOptions(CompressOptions):
    """All arguments of plan() but the model, checked: those of compress(), and its own.

    memory:    bytes that the compression may take; None: what the machine has. Stages that need
               more are named, with the option or the route that makes them fit.
    machine:   a device of planning.devices.DEVICES, whose rates are those of its data sheet, or a
               JSON file that an earlier plan wrote, on this machine or another.
    processes: of `torchrun --nproc-per-node`: they divide the text and the matrices, and each has
               its own memory, on a GPU of its own or beside the others. On a CPU they share its
               cores, so no stage is quicker.

    Raises ValueError or TypeError naming the argument, what was given and what is allowed.
    """

    memory: int | None = option(
        None, "Bytes that the compression may take. By default all that the machine has."
    )
    machine: str | Path | None = option(
        None,
        "In place of a probe: laptop, h100, h200, a100 or rtx-4090, by data sheet, or the JSON of"
        " an earlier plan.",
    )
    probe: bool = option(
        True, "Measure this machine for a minute; without, sizes and memory alone are told."
    )
    processes: int = option(1, "Processes that divide the work.", least=1)
    route: str | None = option(
        None,
        "The model in memory, or one block of it at a time. By default the first that fits.",
        choices=ROUTES,
    )

    def __post_init__(self) -> None:
        check_options(self)
        super().__post_init__()
        if self.memory is not None and not (type(self.memory) is int and self.memory > 0):
            raise ValueError(f"memory must be a number of bytes above 0, got {self.memory!r}")
