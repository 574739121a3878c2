"""Code that the compile gate must reject, compiled by the real compiler.

    PYTHONPATH=tests python -m helpers.triton_broken        prints name -> faults found, as JSON

Run it in a process of its own, like the gate.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile

os.environ.pop("TRITON_INTERPRET", None)  # before triton.jit decorates

import torch
import triton
import triton.language as tl
from helpers.triton_code import MACHINES, Case, examined, faults
from helpers.triton_gate import LAYER, _Driver, compiled
from triton.runtime import driver

from hylora_kernels.backends.triton.config import Config, Problem

PLAIN = Problem(200, **LAYER, lora_rank=32, dtype=torch.bfloat16)
BRANCHES = Config(64, 64, 64, 64, 64, warps=4, stages=3)


@triton.jit
def two_branches(X, W, V, Y, Flag, K, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A product loop on each side of a branch, whose last waits end up behind it; the flag orders
    nothing."""
    rows, k = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    acc = tl.zeros((ROWS, ROWS), tl.float32)
    if tl.program_id(0) < 3:
        for start in range(0, K, BLOCK):
            x = tl.load(X + rows[:, None] * K + (start + k)[None, :])
            w = tl.load(W + rows[:, None] * K + (start + k)[None, :])
            acc = tl.dot(x, tl.trans(w), acc)
    else:
        for start in range(0, K, BLOCK):
            x = tl.load(X + rows[:, None] * K + (start + k)[None, :])
            w = tl.load(V + rows[:, None] * K + (start + k)[None, :])
            acc = tl.dot(x, tl.trans(w), acc)
    tl.store(Y + rows[:, None] * ROWS + rows[None, :], acc)
    tl.atomic_add(Flag, 1, sem="relaxed")


def faults_of_two_branches(target: str, rows: int = 64, warps: int = 4) -> list[str]:
    driver.set_active(_Driver(MACHINES[target]))
    x, w, v = (torch.empty(rows, 1024, dtype=torch.bfloat16, device="meta") for _ in range(3))
    y = torch.empty(rows, rows, device="meta")
    flag = torch.empty(1, dtype=torch.int32, device="meta")
    options = {"ROWS": rows, "BLOCK": 64, "num_warps": warps, "num_stages": 3}
    kernel = two_branches.warmup(x, w, v, y, flag, 1024, **options, grid=(4,))
    case = Case(PLAIN, BRANCHES)
    return faults(examined(kernel, case, MACHINES[target]), case, MACHINES[target])


def faults_of(target: str, case: Case, judged_as: Case | None = None) -> list[str]:
    machine = MACHINES[target]
    code = examined(compiled(case, machine), case, machine)
    return faults(code, judged_as or case, machine)


def main() -> None:
    few_rows = PLAIN._replace(M=16)
    fair = Case(few_rows, Config(16, 16, 128, 16, 128, split=2, swap=True))
    exact = Case(
        few_rows._replace(dtype=torch.float32), Config(16, 16, 64, 16, 64, split=2, swap=True)
    )
    odd = Case(few_rows._replace(K=2049, rank=767), fair.config)
    too_many_stages = Case(few_rows, Config(16, 128, 256, 16, 256, swap=True, stages=4))
    found = {
        "sums beyond the registers, sm_80": faults_of_two_branches("sm_80", 128, warps=2),
        "sums beyond the registers, gfx1100": faults_of_two_branches("gfx1100", 128, warps=2),
        "stages beyond shared memory, sm_86": faults_of("sm_86", too_many_stages),
        "rows that start anywhere, sm_80": faults_of("sm_80", odd, judged_as=fair),
        "exact float32 taken for bfloat16, sm_80": faults_of("sm_80", exact, judged_as=fair),
        "products on two branches, sm_90": faults_of_two_branches("sm_90"),
        "nothing wrong, sm_80": faults_of("sm_80", fair),
    }
    json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
        main()
