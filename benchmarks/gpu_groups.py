"""Layers on one x on a GPU, as a group and one by one: q, k, v and gate, up of TinyLlama, keep 0.5.

    python benchmarks/gpu_groups.py [--out runs/gpu] [--seconds 40]

group              one Triton launch, as a CUDA graph gets it
group, C++         one launch of the C++ kernel, as a plain call gets it; up to 16 rows
group's products   one torch product for h, one for each member
members            the packed layers, one after the other
dense              F.linear with each matrix that was compressed

Regimes as in gpu_layers.py: "graph cold", replays of a CUDA graph that goes round copies of the
weights larger than L2; "eager cold", called from Python. groups.json is rewritten after each
measurement. All in bfloat16; every result is checked against the members'.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gpu_layers
import gpu_results
import torch
import torch.nn.functional as F
from torch import Tensor

from hylora_kernels import reference
from hylora_kernels.backends import cuda, triton
from hylora_kernels.backends.shared import group_gpu, packed_gpu
from hylora_kernels.backends.triton import groups
from hylora_kernels.support.storage import write_json
from hylora_kernels.weights import Weights

DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
K = 2048
GROUPS = {  # outputs and rank of each member: half of the dense parameters
    "q, k, v": ((2048, 512), (256, 112), (256, 112)),
    "gate, up": ((5632, 752), (5632, 752)),
}
ROWS = (1, 8, 64)
ROUNDS = 15


def random_members(sizes) -> list[Weights]:
    """Pairs whose outputs are of order one."""

    def normal(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, device=DEVICE) / math.sqrt(columns)).to(DTYPE)

    return [Weights(normal(rank, K), normal(N, rank)) for N, rank in sizes]


def rivals(sizes, x: Tensor) -> dict[str, Callable[[], Tensor | list[Tensor]]]:
    """name -> a call that gives y [M, sum of N], or the members' [M, N] as a list: a model needs no
    concatenation. Its weights are its own."""
    members = random_members(sizes)
    alone = [packed_gpu.pack(weights, "triton") for weights in members]
    matrices = [reference.dense_weight(weights) for weights in members]
    group = triton.group([packed_gpu.pack(weights, "triton") for weights in members])
    operands, nothing = group.operands, [None] * len(members)
    target = triton.dispatch.target_of(x.device)
    problem = groups.problem_of(x, operands)
    config = triton.dispatch.group_config_for(problem, x.device, captured=True)
    found = {
        "group": lambda: groups.launch(x, operands, nothing, config, target),
        "members": lambda: [packed.forward(x, None, triton.forward) for packed in alone],
        "group's products": lambda: group_gpu.torch_products_of(x, operands, nothing),
        "dense": lambda: [F.linear(x, matrix) for matrix in matrices],
    }
    by_cpp = group_gpu.target_of(operands)
    if by_cpp is not None and len(x) <= group_gpu.LAUNCHED_ROWS:
        found["group, C++"] = functools.partial(group_gpu.one_launch, x, operands, nothing, by_cpp)
    return found


def check(by_name: dict[str, Callable], where: str) -> None:
    """Raise FloatingPointError unless all rivals give the members' outputs."""
    expected = torch.cat(by_name["members"](), -1).double()
    for name, call in by_name.items():
        y = call()
        y = torch.cat(y, -1) if isinstance(y, list) else y[:, : expected.shape[1]]
        error = float((y.double() - expected).norm() / expected.norm())
        if not error < 3e-2:
            raise FloatingPointError(f"{name} of {where} is wrong: relative error {error:.1e}")


def measure(name: str, M: int) -> list[dict]:
    """A row for each rival and regime."""
    x = torch.randn(M, K, device=DEVICE).to(DTYPE)
    sizes = GROUPS[name]
    size = DTYPE.itemsize * sum(rank * (K + N) for N, rank in sizes)
    cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    copies = [rivals(sizes, x) for _ in range(max(2, min(64, math.ceil(2.5 * cache / size))))]
    check(copies[0], f"{name}, M = {M}")
    rows = []
    for regime, run_of in (
        ("graph cold", gpu_layers.graph_of),
        ("eager cold", gpu_layers.one_by_one),
    ):
        contest = {
            rival: (run_of([copy[rival] for copy in copies]), len(copies)) for rival in copies[0]
        }
        for rival, seconds in gpu_layers.in_turns(contest, ROUNDS).items():
            row = {"group": name, "M": M, "candidate": rival, "regime": regime}
            rows.append({**row, "seconds": seconds})
    return rows


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--seconds", type=float, default=40.0, help="begin nothing after them")
    given = parser.parse_args(words)
    if reason := triton.why_not() or ("" if torch.cuda.is_available() else "no CUDA device"):
        sys.exit(f"benchmarks/gpu_groups.py needs a GPU: {reason}")
    if reason := cuda.why_not():
        print(f"without the C++ launch: {reason}")
    run(given.out, given.seconds)


@torch.no_grad()
def run(out: Path, seconds: float) -> None:
    deadline, rows = time.monotonic() + seconds, []
    out.mkdir(parents=True, exist_ok=True)
    for name in GROUPS:
        for M in ROWS:
            if time.monotonic() < deadline:
                rows += measure(name, M)
                write_json(out / "groups.json", rows)
    print(gpu_results.groups(rows))


if __name__ == "__main__":
    main()
