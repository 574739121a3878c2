"""The Triton kernels compiled for GPUs that are not at hand, and checked by helpers/triton_gate.py.

By default every kernel for sm_80 and sm_90, and fewer kinds of call: all pairs take over three
minutes; candidates that only tuning launches are compiled for sm_90. HYLORA_TEST_ALL=1 (make
test-all) compiles all of them for every target, and one configuration of each kernel with the
oldest Triton that is supported.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.triton_code import MACHINES, Case, Code, faults, of_amd, of_nvidia

from hylora_kernels.backends.triton.config import BACKWARD, AdapterGradientsConfig, Config, Problem

ALL = os.environ.get("HYLORA_TEST_ALL") == "1"
OLDEST = "3.6.0"  # pairs with torch 2.10, the oldest supported
TESTS = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton isn't installed"
)


def run(script: str, *words: str, first: Path | None = None) -> subprocess.CompletedProcess:
    """A module of tests/ run in a process of its own; `first` is where it imports from first."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    places = [str(TESTS), *sys.path] if first is None else [str(first), str(TESTS), *sys.path]
    environment["PYTHONPATH"] = os.pathsep.join(places)
    command = [sys.executable, "-m", script, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000)


@pytest.mark.slow
@pytest.mark.parametrize("target", MACHINES if ALL else ["sm_80", "sm_90"])
def test_every_shipped_configuration_passes(target, tmp_path):
    table = tmp_path / "table.json"
    amd = MACHINES[target].kind == "hip"  # 20 seconds a kernel
    done = run(
        *("helpers.triton_gate", "--targets", target, "--json", str(table)),
        *(["--quick"] if amd or not ALL else []),
        *(["--defaults"] if target == "sm_80" and not ALL else []),
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = json.loads(table.read_text(encoding="utf-8"))
    plain = {"layer", "group", "adapter_gradients", "merge_pivots"}
    assert {line["kernel"] for line in lines} == plain | {"product", "dequantize"}


@pytest.mark.slow
def test_the_gate_holds_back_what_is_broken():
    done = run("helpers.triton_broken")
    assert done.returncode == 0, done.stderr
    found = {name: "; ".join(words) for name, words in json.loads(done.stdout).items()}
    print(found)
    assert "spilled" in found["sums beyond the registers, sm_80"]
    assert "bytes of stack" in found["sums beyond the registers, sm_80"]
    assert "spilled" in found["sums beyond the registers, gfx1100"]
    assert "shared, 99 at most" in found["stages beyond shared memory, sm_86"]
    assert "loads of operands not async" in found["rows that start anywhere, sm_80"]
    wrong_kind = found["exact float32 taken for bfloat16, sm_80"]
    assert wrong_kind == "no HMMA; 2 loads of operands not async"
    assert "wgmma serialised" in found["products on two branches, sm_90"]
    assert "no atomic with acquire, release" in found["products on two branches, sm_90"]
    assert found["nothing wrong, sm_80"] == ""


@pytest.mark.slow
@pytest.mark.skipif(not ALL, reason="make test-all does it: it installs another Triton")
def test_the_oldest_triton_compiles_each_kernel(tmp_path):
    folder = Path(os.environ["HYLORA_CACHE"]) / f"triton-{OLDEST}"
    if not folder.is_dir():
        install = [*(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"), "--target"]
        done = subprocess.run(
            [*install, str(folder), f"triton=={OLDEST}"], capture_output=True, text=True
        )
        if done.returncode != 0:
            pytest.skip(f"triton {OLDEST} can't be installed: {done.stderr.strip()[-300:]}")
    version = run("helpers.triton_gate", "--version", first=folder)
    assert version.stdout.strip() == OLDEST, version.stderr
    done = run("helpers.triton_gate", "--one-each", "--targets", "sm_80", "sm_90", first=folder)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


# ------------------------------------------------------------------ the judgement, on code made up

PROBLEM = Problem(200, 2048, 2048, 512, 32, torch.bfloat16)
TILES = Config(64, 64, 64, 128, 64, split=2, warps=4, stages=3)
CASE = Case(PROBLEM, TILES)
ORDERS = frozenset({"acquire", "release", "acq_rel"})
GOOD = {
    "sm_80": Code(200, 70_000, 0, 0, 0, Counter(HMMA=9, LDGSTS=9), ORDERS),
    "sm_90": Code(200, 70_000, 0, 0, 0, Counter(HGMMA=9, WARPGROUP=6, LDGSTS=9), ORDERS),
    "sm_100": Code(200, 70_000, 0, 0, 0, Counter(UTCHMMA=9, UTMALDG=9), ORDERS),
    "gfx942": Code(200, 60_000, 0, 0, 0, Counter(v_mfma=9), ORDERS),
}


@pytest.mark.parametrize("target", GOOD)
def test_good_code_has_no_fault(target):
    assert faults(GOOD[target], CASE, MACHINES[target]) == []


@pytest.mark.parametrize(
    ("target", "change", "fault"),
    [
        ("sm_80", {"spills": 3}, "3 spilled"),
        ("gfx942", {"spills": 3}, "3 spilled"),
        ("sm_90", {"stack": 8}, "8 bytes of stack"),
        ("sm_80", {"shared": 163 * 1024 + 1}, "163 KiB shared, 163 at most"),
        ("gfx942", {"shared": 65 * 1024}, "65 KiB shared, 64 at most"),
        ("sm_80", {"opcodes": Counter(LDGSTS=9)}, "no HMMA"),
        ("sm_90", {"opcodes": Counter(HMMA=9, LDGSTS=9)}, "no HGMMA"),
        ("sm_100", {"opcodes": Counter(HMMA=9, LDGSTS=9)}, "no UTCHMMA"),
        ("gfx942", {"opcodes": Counter(v_fma=9)}, "no v_mfma"),
        ("sm_80", {"opcodes": Counter(HMMA=9)}, "no async copies"),
        ("sm_80", {"waiting": 2}, "2 loads of operands not async"),
        (
            "sm_90",
            {"opcodes": Counter(HGMMA=9, WARPGROUP=18, LDGSTS=9)},
            "wgmma serialised: 18 WARPGROUP",
        ),
        ("sm_80", {"orders": ORDERS - {"acquire"}}, "no atomic with acquire"),
        ("gfx942", {"orders": ORDERS - {"release"}}, "no atomic with release"),
    ],
)
def test_each_fault_is_named(target, change, fault):
    assert faults(replace(GOOD[target], **change), CASE, MACHINES[target]) == [fault]


def test_what_a_call_excuses():
    code, sm_80 = GOOD["sm_80"], MACHINES["sm_80"]
    exact = Case(PROBLEM._replace(dtype=torch.float32), TILES)
    assert faults(replace(code, waiting=2, opcodes=Counter(LDGSTS=9)), exact, sm_80) == []
    odd = Case(PROBLEM._replace(K=2049), TILES)
    assert faults(replace(code, waiting=9, opcodes=Counter(HMMA=9)), odd, sm_80) == []
    pivoted = Case(PROBLEM._replace(pivoted=True, direction=BACKWARD), TILES)
    assert faults(replace(code, waiting=2), pivoted, sm_80) == []
    assert faults(replace(code, waiting=3), pivoted, sm_80) != []
    without_atomics = replace(code, orders=frozenset())
    whole, split = (Case(PROBLEM, AdapterGradientsConfig(64, 64, 32, split=n)) for n in (1, 2))
    assert faults(without_atomics, whole, sm_80) == []
    assert faults(without_atomics, split, sm_80) == ["no atomic with acq_rel"]
    one_row = Case(PROBLEM, Config(1, 8, 512, 16, 512, swap=True))
    assert faults(replace(code, waiting=9, opcodes=Counter()), one_row, sm_80) == []
    few_rows = Case(PROBLEM, Config(16, 16, 64, 16, 64, swap=True))
    assert faults(replace(GOOD["sm_80"]), few_rows, MACHINES["sm_90"]) == []


def test_reading_nvidias_tools():
    resources = "Function layer:\n  REG:72 STACK:16 SHARED:1024 LOCAL:0 CONSTANT[0]:680\n"
    sass = (
        "        /*0010*/                   LDC R1, c[0x0][0x28] ;\n"
        "        /*0020*/              @!P0 LDGSTS.E.BYPASS.128 [R5], desc[UR8][R2.64] ;\n"
        "        /*0030*/             @!UP1 HMMA.16816.F32.BF16 R4, R8, R16, R4 ;\n"
        "        /*10040*/                  STL.64 [R1+0x8], R4 ;\n"
        "        /*0050*/                   WARPGROUP.ARRIVE ;\n"
    )
    ptx = "ld.global.gpu.acquire.b32 %r1, [%rd1];\n@%p1 atom.global.gpu.relaxed.add.u32 %r2;\n"
    code = of_nvidia(resources, sass, ptx, 49152)
    assert (code.registers, code.stack, code.spills, code.shared) == (72, 16, 1, 49152)
    assert code.opcodes == Counter(LDC=1, LDGSTS=1, HMMA=1, STL=1, WARPGROUP=1)
    assert code.orders == {"acquire"}


def test_reading_amds_assembly():
    assembly = (
        "\tv_mfma_f32_32x32x8_bf16 a[0:15], v[2:3], v[4:5], a[0:15]\n"
        "\tglobal_load_dwordx4 v[0:3], v[8:9], off\n"
        "    .group_segment_fixed_size: 128\n    .private_segment_fixed_size: 24\n"
        "    .vgpr_count:     226\n    .vgpr_spill_count: 7\n"
    )
    llvm = (
        '  fence syncscope("workgroup") release\n'
        '  %3 = atomicrmw add ptr addrspace(1) %2, i32 1 syncscope("agent") acq_rel, align 4\n'
    )
    code = of_amd(assembly, llvm, 4096)
    assert (code.registers, code.stack, code.spills, code.shared) == (226, 24, 7, 4096)
    assert code.opcodes == Counter(v_mfma=1, global_load_dwordx4=1)
    assert code.orders == {"acq_rel"}
