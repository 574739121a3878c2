"""The compile gate: every shipped configuration of the Triton kernels, compiled for GPUs that are
not at hand, and its machine code checked.

    PYTHONPATH=tests python -m helpers.triton_gate [--targets sm_80 ...] [--quick] [--defaults]
        [--json FILE]

It prints a line for each kernel, configuration and target; the exit status is 1 if one has a fault.
Run it in a process of its own: kernels imported for the interpreter don't compile, and a warm cache
would hide an error, so the cache is a fresh folder.

launch.py runs unaltered, on meta tensors, with Triton's own specialisation for their strides and
alignment. Only the launch itself is left out.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from helpers import triton_quantized
from helpers.triton_code import KIB, MACHINES, Case, Machine, examined, faults

from hylora_kernels.backends.triton import config as configs
from hylora_kernels.backends.triton.config import BACKWARD, FORWARD, Config, Problem

# ------------------------------------------------------------------------- shipped configurations

LAYER = {"K": 2048, "N": 5632, "rank": 768}
KERNELS = ("layer", "adapter_gradients", "merge_pivots")
# q, k and v: TinyLlama's as pairs; in other forms, with adapters apart; with sizes of no multiple
GROUPS = (
    (("pair", 2048, 512, 0), ("pair", 256, 112, 0), ("pair", 256, 112, 0)),
    (("pivoted", 2048, 512, 32), ("dense", 256, 256, 0), ("pivoted", 256, 96, 8)),
    (("pivoted", 2048, 512, 32), ("pair", 256, 97, 0), ("pivoted", 256, 97, 3)),
)
QUICK_GROUPS = {(1, GROUPS[1]), (16, GROUPS[0])}
ARCHES = {"NVIDIA H100 80GB HBM3": 90}  # of the devices that the package has tables for
ROWS = (1, 16, 33, 200, 2048)  # one for each of config.py's steps


def cases(machine: Machine, quick: bool, defaults: bool = False) -> list[Case]:
    """Every kind of call in all of its configurations, each once.

    quick: all configurations of the plain call; the others' first one, for one row; and what a
    table adds, in one kind of call each. defaults: of the plain call, too, the first one alone, not
    the candidates that only tuning launches.
    """
    target, found = machine.target, {}
    for M in ROWS:
        plain, *others = problems(M)
        for config in shipped(plain[0], target)[: 1 if defaults else None]:
            found.setdefault(Case(plain[0], config))
        for problem, tf32 in others if M == 1 or not quick else ():
            for config in shipped(problem, target)[: 1 if quick else None]:
                found.setdefault(Case(problem, config, tf32))
    known = {case.config for case in found}
    for problem, config in tuned(target):
        if not quick or config not in known:
            found.setdefault(Case(problem, config))
            known.add(config)
    for M in (2048,) if quick else (64, 2048, 8000):
        for ra, dtype in ((32, torch.bfloat16), (8, torch.float16), (64, torch.float32)):
            problem = Problem(M, **LAYER, lora_rank=ra, dtype=dtype, direction=BACKWARD)
            found.setdefault(Case(problem, configs.adapter_gradients_config(problem, target)))
    for M in (1, 16, configs.GROUP_ROWS):
        for members in GROUPS:
            if not quick or (M, members) in QUICK_GROUPS:
                problem = group_of(members, M)[1]
                config = configs.group_config(problem, target, captured=True)
                found.setdefault(Case(problem, config, members=members))
    merged = Problem(2048, **LAYER, lora_rank=0, dtype=torch.bfloat16, pivoted=True)
    return [*found, Case(merged, None), *triton_quantized.cases(target, quick)]


def problems(M: int) -> list[tuple[Problem, bool]]:
    """Calls of M rows that compile to different code, and whether float32 may be tf32; the plain
    one first."""
    plain = Problem(M, **LAYER, lora_rank=32, dtype=torch.bfloat16)
    changes = (
        {},
        {"K": 2049, "rank": 767},
        {"lora_rank": 0},
        {"direction": BACKWARD},
        {"pivoted": True},
        {"pivoted": True, "direction": BACKWARD},
        {"dtype": torch.float16},
        {"dtype": torch.float32},
    )
    calls = [(plain._replace(**change), False) for change in changes]
    return [*calls, (plain._replace(dtype=torch.float32), True)]


def shipped(problem: Problem, target: configs.Target) -> list[Config]:
    """The configurations that may be launched for a problem: the default and the candidates."""
    options = [configs.default_config(problem, target), *configs.candidate_configs(problem, target)]
    return [option for option in dict.fromkeys(options) if isinstance(option, Config)]


def tuned(target: configs.Target) -> Iterator[tuple[Problem, Config]]:
    """The winners in the tables that come with the package, where the target can run them, each for
    one layer: the code is the same for all sizes that are multiples of 16."""
    names = Problem._fields
    for path in sorted(configs.SHIPPED_TABLES.glob("*.json")):
        whole = json.loads(path.read_text(encoding="utf-8"))
        if ARCHES[whole["device"]] != target.arch:  # no other device reads this table
            continue
        for row in whole["rows"]:
            known = {name: row[name] for name in names} | {"dtype": getattr(torch, row["dtype"])}
            for winner in (row["graph"], row["eager"]):
                if winner == configs.TORCH_PRODUCTS_WORD:
                    continue
                config = Config(**winner)
                known |= LAYER | {"M": 16 if config.BM <= 16 else 2048}
                if configs.why_illegal(config, known["dtype"], target) is None:
                    yield Problem(**known), config


# -------------------------------------------------------------------------------------- compilation


class _Driver:
    """The part of a Triton driver that compiling for an absent device needs."""

    def __init__(self, machine: Machine):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget(machine.kind, machine.arch, machine.lanes)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return str(self.target)  # Triton keeps what it has compiled by device

    def get_current_stream(self, device):
        return 0


class _Compiled:
    """A kernel whose kernel[grid](...) compiles and keeps the result."""

    def __init__(self, kernel, kept: list):
        self.kernel, self.kept = kernel, kept

    def __getitem__(self, grid):
        return functools.partial(self.warmup, grid=grid)

    def warmup(self, *arguments, **named):
        self.kept.append(self.kernel.warmup(*arguments, **named))


def compiled(case: Case, machine: Machine):
    """Triton's CompiledKernel of the launch that launch.py would make."""
    from triton.runtime import driver

    from hylora_kernels.backends.triton import group_kernels, kernels, launch

    kept = []
    stand_in = {name: _Compiled(getattr(kernels, name), kept) for name in KERNELS}
    driver.set_active(_Driver(machine))
    torch.set_float32_matmul_precision("high" if case.tf32 else "highest")
    if isinstance(case, triton_quantized.QuantizedCase):
        triton_quantized.launch(case, machine, lambda kernel: _Compiled(kernel, kept))
        return kept[0]
    with mock.patch.object(launch, "kernels", SimpleNamespace(**stand_in)):
        if case.kernel == "layer":
            launch_layer(case, machine)
        elif case.kernel == "adapter_gradients":
            launch_adapter_gradients(case)
        elif case.kernel == "group":
            launch_group(case, machine, _Compiled(group_kernels.group, kept))
        else:
            launch_merge_pivots(case.problem)
    (one,) = kept
    return one


def launch_layer(case: Case, machine: Machine) -> None:
    from hylora_kernels.backends.triton import launch

    p = case.problem
    tensor = functools.partial(torch.empty, dtype=p.dtype, device="meta")
    SVh, U, bias = tensor(p.rank, p.K), tensor(p.others, p.rank), tensor(p.N)
    A = B = pivots = others = None
    if p.lora_rank:
        A, B = tensor(p.lora_rank, p.K), tensor(p.N, p.lora_rank)
    if p.pivoted:
        pivots = tensor(p.rank, dtype=torch.int32)
        others = tensor(p.others, dtype=torch.int64)
    if p.direction == FORWARD:
        factors = (tensor(p.M, p.K), SVh, A, U, B, bias)
    else:
        A, B = (None, None) if A is None else (A.T, B.T)
        factors = (tensor(p.M, p.N), U.T, B, SVh.T, A, None)
    launch.layer(*factors, 0.5, pivots, others, p, case.config, machine.target)


def group_of(members, M: int):
    """(operands, problem) of a group on meta tensors."""
    from hylora_kernels.backends.shared.group_gpu import Member, Operands
    from hylora_kernels.backends.triton import groups

    places, p, q, y = [], 0, 0, 0
    for form, N, rank, lora_rank in members:
        others = N if form == "pair" else N - rank
        step, lora_step = (size + -size % 8 for size in (rank, lora_rank))
        aB = q + others * step
        places.append(Member(N, rank, lora_rank, form != "pair", p, q, step, aB, lora_step, y))
        p, q, y = p + step + lora_step, aB + N * lora_step, y + N
    tensor = functools.partial(torch.empty, dtype=torch.bfloat16, device="meta")
    columns = torch.empty(y, dtype=torch.int32, device="meta")
    factors = tensor(p, LAYER["K"]), tensor(q)
    operands = Operands(*factors, columns, columns.long(), tuple(places), y)
    return operands, groups.problem_of(tensor(M, LAYER["K"]), operands)


def launch_group(case: Case, machine: Machine, kernel: object) -> None:
    from hylora_kernels.backends.triton import groups

    operands, problem = group_of(case.members, case.problem.M)
    tensor = functools.partial(torch.empty, dtype=problem.dtype, device="meta")
    biases = [tensor(member.N) if member.is_pivoted else None for member in operands.members]
    with mock.patch.object(groups, "_kernel", lambda: kernel):
        groups.launch(tensor(problem.M, problem.K), operands, biases, case.config, machine.target)


def launch_adapter_gradients(case: Case) -> None:
    from hylora_kernels.backends.triton import launch

    p = case.problem
    tensor = functools.partial(torch.empty, dtype=p.dtype, device="meta")
    dh_a, h_a = tensor(p.M, p.lora_rank), tensor(p.M, p.lora_rank)
    x, dy = tensor(p.M, p.K), tensor(p.M, p.N)
    launch.adapter_gradients(dh_a, x, h_a, dy, 0.5, True, case.config, p.lora_rank)


def launch_merge_pivots(p: Problem) -> None:
    from hylora_kernels.backends.triton import launch

    tensor = functools.partial(torch.empty, dtype=p.dtype, device="meta")
    order = tensor(p.N, dtype=torch.int64)
    launch.merge_pivots(tensor(p.M, p.rank), tensor(p.M, p.others), tensor(p.N), order)


# ------------------------------------------------------------------------------------------ the run

SHOWN = ("HMMA", "HGMMA", "UTCHMMA", "LDGSTS", "UTMALDG", "LDSM", "LDL", "STL", "v_mfma", "v_wmma")


def checked(case: Case, name: str) -> dict:
    """One line of the table; a kernel that doesn't compile has that for a fault."""
    machine, start = MACHINES[name], time.perf_counter()
    line = {"target": name, "kernel": case.kernel, "case": str(case), "gated": machine.gated}
    illegal = case.why_illegal(machine.target)
    refused = [f"config.py would refuse it: {illegal}"] if illegal else []
    try:
        kernel = compiled(case, machine)
    except Exception as error:
        words = str(error).strip().splitlines() or [repr(error)]
        return line | {"faults": [f"does not compile: {words[-1]}", *refused]}
    code = examined(kernel, case, machine)
    return line | {
        "registers": code.registers,
        "shared": code.shared,
        "stack": code.stack,
        "spills": code.spills,
        "opcodes": {opcode: code.opcodes[opcode] for opcode in SHOWN if code.opcodes[opcode]},
        "seconds": round(time.perf_counter() - start, 1),
        "faults": faults(code, case, machine) + refused,
    }


def shown(line: dict) -> str:
    verdict = "; ".join(line["faults"])
    if verdict:
        verdict = f"{'FAIL' if line['gated'] else 'warning'}: {verdict}"
    if "registers" not in line:
        return f"{line['target']:7} {line['case']}  {verdict}"
    opcodes = " ".join(f"{name}={count}" for name, count in line["opcodes"].items())
    return (
        f"{line['target']:7} {line['case']}  reg {line['registers']} shared"
        f" {line['shared'] / KIB:.0f}K stack {line['stack']} {opcodes} [{line['seconds']} s] "
        f"{verdict or 'ok'}"
    )


def one_of_each(found: list[Case]) -> list[Case]:
    """The first configuration of each kernel."""
    return list({case.kernel: case for case in reversed(found)}.values())


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    gated = [name for name, machine in MACHINES.items() if machine.gated]
    parser.add_argument("--targets", nargs="+", default=gated, choices=list(MACHINES))
    parser.add_argument("--quick", action="store_true", help="fewer kinds of call")
    parser.add_argument("--defaults", action="store_true", help="no candidates of tuning")
    parser.add_argument("--one-each", action="store_true", help="one configuration a kernel")
    parser.add_argument("--json", type=Path, help="write the table there as well")
    parser.add_argument("--version", action="version", version=importlib.metadata.version("triton"))
    given = parser.parse_args(words)
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    lines, start = [], time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        for name in given.targets:
            found = cases(MACHINES[name], given.quick, given.defaults)
            for case in one_of_each(found) if given.one_each else found:
                lines.append(checked(case, name))
                print(shown(lines[-1]), flush=True)
    failed = sum(bool(line["faults"]) and line["gated"] for line in lines)
    print(f"{len(lines)} compiled, {failed} failed, {time.perf_counter() - start:.0f} s")
    if given.json is not None:
        given.json.write_text(json.dumps(lines, indent=1), encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
