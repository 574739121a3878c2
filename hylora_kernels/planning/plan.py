"""plan(): what a compression will need and what will come of it, from the config alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from transformers import PreTrainedModel

from hylora_kernels.model.coverage import body_parameters
from hylora_kernels.model.hollow import hollow_model
from hylora_kernels.planning.devices import DEVICES, machine_of
from hylora_kernels.planning.machine import Machine, without_rates
from hylora_kernels.planning.machine import read as read_machine
from hylora_kernels.planning.options import BY_BLOCK, ROUTES, PlanOptions
from hylora_kernels.planning.probe import Probe
from hylora_kernels.planning.speeds import PROMPT, Speed, speeds
from hylora_kernels.planning.stages import Cost, Stage
from hylora_kernels.planning.work import Result, Work
from hylora_kernels.support.console import format_bytes, format_seconds, table
from hylora_kernels.support.devices import free_memory, resolve_device, resolve_dtype
from hylora_kernels.support.options import reported_options, takes_options
from hylora_kernels.support.report import Report

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table


@dataclass
class Plan(Report):
    """What a compression will need, and what will come of it; times and memory are predictions.

    parameters, bytes: of the dense model, a tied weight once. linears: of the selected ones.
    result:   the compressed model, at most.
    machine:  whose rates were taken; None without any, and then all seconds are 0.
    memory:   bytes that a process may take. passes: over the text.
    peak:     the most that a stage needs of it. disk: the most that lies there at the end.
    advice:   what does not fit, and the way out.
    """

    model: str
    options: dict[str, Any]
    blocks: int
    parameters: int
    body_parameters: int
    linears: int
    bytes: int
    result: Result
    machine: Machine | None
    device: str
    processes: int
    route: str
    memory: int
    passes: int
    calibration_tokens: int
    stages: list[Stage]
    peak: int = 0
    disk: int = 0
    seconds: float = 0.0
    advice: list[str] = field(default_factory=list)
    speeds: list[Speed] = field(default_factory=list)

    def render(self) -> Group:
        """Rich tables: the model and the result, the machine's rates, stages, speeds; advice."""
        from rich.console import Group

        rates = [] if self.machine is None else [self.machine.render()]
        total = f"{format_seconds(self.seconds)}, " if self.machine else ""
        line = (
            f"in all, predicted: {total}{format_bytes(self.peak)} of memory in a process (allowed:"
            f" {format_bytes(self.memory)}), {format_bytes(self.disk)} on disk; text:"
            f" {self.calibration_tokens:,} tokens, {self.passes} pass(es)"
        )
        return Group(
            self._sizes_table(),
            *rates,
            self._stages_table(),
            line,
            *self.advice,
            self._speeds_table(),
        )

    def _sizes_table(self) -> Table:
        r = self.result
        rows = [
            (name, count, f"{count / self.parameters:.4f}", size / 1e6)
            for name, count, size in (
                ("dense", self.parameters, self.bytes),
                ("result, adapters folded in", r.parameters, r.bytes),
                ("result, adapters separate", r.parameters_as_is, r.bytes_as_is),
            )
        ]
        title = (
            f"{self.model}: {self.blocks} blocks, {self.linears:,} parameters in the linears, keep"
            f" {r.keep:.4f}"
        )
        return table(title, ("at most", "parameters", "share", "MB"), rows)

    def _stages_table(self) -> Table:
        several = f", {self.processes} processes" if self.processes > 1 else ""
        rows = [
            (
                s.name,
                format_seconds(s.seconds) if self.machine else None,
                format_bytes(s.memory),
                format_bytes(s.disk) if s.disk else None,
            )
            for s in self.stages
        ]
        title = f"predicted, {self.route.replace('_', ' ')}, {self.device}{several}"
        return table(title, ("stage", "time", "memory of a process", "on disk"), rows)

    def _speeds_table(self) -> Table:
        rows = [
            (
                s.device,
                *(f"{speed:,.4g}" for speed in (s.dense_decode, s.decode, s.prefill)),
                "yes" if s.fits else "no",
            )
            for s in self.speeds
        ]
        columns = (
            "device",
            "dense, decoded",
            "result, decoded",
            f"of a prompt of {PROMPT}",
            "fits",
        )
        return table("predicted tokens/s, batch 1, adapters folded in", columns, rows)


@takes_options(PlanOptions)
def plan(model_or_id: PreTrainedModel | str | Path, options: PlanOptions) -> Plan:
    """Predict what compress() with these options will need in memory, on disk and in hours, what
    the result will weigh, and how fast it will be. Nothing but the model's config is read.

    model_or_id: a hub id, a folder, a config.json, or a model of model.hollow.hollow_model_of().

    Counts of the dense model are exact; those of the result are the most that the budget allows.
    Times and memory are predictions; docs/scale.md has their formulas.

    Raises ValueError naming the argument, also for a budget that can't be met, CheckpointError
    naming the config's file.

    Example:
        report = plan("my-org/my-model", keep=0.8, samples=64, length=64, probe=False)
        report.peak, report.result.bytes
    """
    return make_plan(model_or_id, options)


def make_plan(
    model_or_id: PreTrainedModel | str | Path,
    options: PlanOptions,
    clock: Callable[[], float] | None = None,
) -> Plan:
    """plan(). clock: of the probe, time.process_time where other work shares the cores."""
    o = options
    if isinstance(model_or_id, str | Path):
        dtype = resolve_dtype(o.dtype or "auto")
        model = hollow_model(model_or_id, dtype, trust_remote_code=o.trust_remote_code)
        name = str(model_or_id)
    else:
        model, name = model_or_id, model_or_id.name_or_path or type(model_or_id).__name__
    work = Work(model, o)
    machine, device, here = _machine(work, o, clock)
    memory = here if o.memory is None else o.memory
    rates = machine or without_rates(here)
    if rates.shared:
        memory //= o.processes
    costs = _costs(work, o, rates, memory)
    fitting = (route for route, cost in costs.items() if cost.peak <= memory)
    route = o.route or next(fitting, BY_BLOCK)
    cost, stages = costs[route], costs[route].stages
    return Plan(
        model=name,
        options=reported_options(o) | ({} if o.is_priced else {"keep": work.keep}),
        blocks=len(work.structure.blocks),
        parameters=work.budget.dense.parameters,
        body_parameters=body_parameters(model),
        linears=work.budget.linears,
        bytes=work.budget.dense.bytes,
        result=work.result,
        machine=machine,
        device=device,
        processes=o.processes,
        route=route,
        memory=memory,
        passes=cost.passes,
        calibration_tokens=cost.tokens,
        stages=stages,
        peak=cost.peak,
        disk=sum(stage.disk for stage in stages),
        seconds=0.0 if machine is None else sum(stage.seconds for stage in stages),
        advice=_advice(work, costs, route, memory, o.route is None),
        speeds=speeds(work, machine),
    )


def _machine(
    work: Work, o: PlanOptions, clock: Callable[[], float] | None
) -> tuple[Machine | None, str, int]:
    """(the rates, the device in words, its memory)."""
    if o.machine is not None:
        found = machine_of(str(o.machine)) if o.machine in DEVICES else read_machine(o.machine)
        return found, found.name, found.memory
    device = resolve_device(o.device or "auto")
    here = free_memory(device) if device.type == "cuda" else psutil.virtual_memory().total
    if not o.probe:
        return None, str(device), here
    found = (Probe(work, device) if clock is None else Probe(work, device, clock)).machine()
    return found, f"{found.name} ({device})", here


def _costs(work: Work, o: PlanOptions, machine: Machine, memory: int) -> dict[str, Cost]:
    """route -> its cost. As in compress(), half of what is free may be statistics."""
    budget = o.max_memory
    if budget is None:
        budget = max(memory - machine.base - work.budget.dense.bytes, 1) // 2
    return {route: Cost(work, machine, route, o.processes, budget) for route in ROUTES}


def _advice(
    work: Work, costs: dict[str, Cost], route: str, memory: int, is_chosen: bool
) -> list[str]:
    """A sentence for each stage that doesn't fit into `memory`, and the way out. is_chosen: the
    route is plan()'s own choice."""
    found = []

    def over(route: str) -> list[Stage]:
        return [stage for stage in costs[route].stages if stage.memory > memory]

    for stage in over(route):
        found.append(
            f"does not fit: {stage.name} needs {format_bytes(stage.memory)} of"
            f" {format_bytes(memory)} {route.replace('_', ' ')}"
        )
    in_memory, by_block = (costs[name] for name in ROUTES)
    if route == BY_BLOCK and work.shares:
        found.append(
            "compress refuses stacks of experts by block today: this is what it would take"
        )
    if route == BY_BLOCK and is_chosen:
        worst = max(in_memory.stages, key=lambda stage: stage.memory)
        found.append(
            f"the model as a whole in memory would need {format_bytes(worst.memory)} ({worst.name})"
        )
    elif route != BY_BLOCK and over(route):
        fewer = in_memory.largest_budget(memory)
        if fewer is not None:
            found.append(
                f"max_memory of {format_bytes(fewer)} or less makes it fit, in more passes"
            )
        elif by_block.peak <= memory:
            found.append(f"one block at a time fits, in {format_bytes(by_block.peak)}")
    if route == BY_BLOCK:
        found.append(
            "by block these are lower bounds: of SmolLM2-135M a run took 1.6 times the memory and"
            " 2.7 times the calibration predicted (docs/scale.md)"
        )
    if route == BY_BLOCK and over(route):
        found.append(
            "shorter blocks of text (length), fewer refitted ones (refit_samples) and method"
            " whitened, which has no gradients, need less"
        )
    return found
