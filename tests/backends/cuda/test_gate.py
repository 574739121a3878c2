"""The CUDA kernels' machine code, without a GPU: the library's code for each architecture, and the
PTX of each primitive against a table written from the PTX ISA, since the emulator can't see it."""

from __future__ import annotations

import importlib.util
import math
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.triton_code import KIB, Code, of_nvidia

from hylora_kernels.backends.shared.library import LIBRARY, MISSING
from hylora_kernels.weights import PLANES

TESTS = Path(__file__).resolve().parents[2]
ARCHS = [] if MISSING else [f"sm_{arch}" for arch in torch.ops.hylora.cuda_archs().split()]
needs_kernels = pytest.mark.skipif(not ARCHS, reason="the library holds no CUDA kernels")
needs_tools = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="cuobjdump comes with triton, not installed"
)

# -------------------------------------------------------------------- the library's machine code

# kernel -> opcodes that it must hold, and the blocks that a multiprocessor's 65536 registers must
# hold: with fewer, too little is on its way from memory.
LOADS_TILES = {"HMMA", "LDSM", "LDGSTS"}
BUDGETS = {
    "layer 64": (LOADS_TILES, 3),
    "layer 128": (LOADS_TILES, 2),
    "decode": ({"HMMA", "LDG"}, 3),
    "adapter_gradients": (LOADS_TILES, 3),
    "quantized 8 warps": ({"HMMA", "LDG"}, 2),
    "quantized 16 warps": ({"HMMA", "LDG"}, 1),
}
LEAST_BLOCKS = 2  # blocks that a multiprocessor's shared memory must hold at the least
SHARED = {"sm_80": 164, "sm_86": 100, "sm_89": 100, "sm_90": 228, "sm_100": 228, "sm_120": 100}
WAITING = {"layer", "decode", "decode_group"}  # kernels in which blocks wait for one another
QUANTIZED = (  # as C++ mangles it: type, bits, QuantizedShape's four
    r"_ZN6hylora4cuda9quantizedINS0_4(bf16|fp16)ELi(\d)E"
    r"NS0_14QuantizedShapeILi(\d)ELi(\d)ELi(\d)ELi(\d+)E"
)
SHOWN = ("HMMA", "LDSM", "LDGSTS", "LDG", "ATOMG", "MEMBAR")


@needs_kernels
@needs_tools
@pytest.mark.parametrize("arch", ARCHS)
def test_machine_code(arch):
    found, faults = kernels_in_library(arch), {}
    names = [f"layer {side}{way}" for side in (64, 128) for way in ("", " transposed")]
    names += ["decode", "decode_group", "adapter_gradients"]
    names += [
        f"quantized {warps} warps, {bits} bits, {8 * tiles} x {columns}"
        for bits in PLANES
        for tiles in (1, 2)
        for warps, columns in ((16, 16), (8, 32 if tiles == 1 and bits < 8 else 16))
    ]
    assert sorted(found) == sorted(f"{n} {t}" for n in names for t in ("bf16", "fp16"))
    for name, code in sorted(found.items()):
        counts = " ".join(f"{opcode}={code.opcodes[opcode]}" for opcode in SHOWN)
        print(f"{arch:7} {name:28} reg {code.registers} shared {code.shared / KIB:.1f}K {counts}")
        if wrong := faults_of(name, code, arch):
            faults[name] = wrong
    assert not faults


def faults_of(name: str, code: Code, arch: str) -> list[str]:
    """The faults that keep a kernel from being shipped."""
    opcodes, blocks_per_sm = next(BUDGETS[kernel] for kernel in BUDGETS if name.startswith(kernel))
    threads, found = sizes_of(name)[0], []
    if code.spills or code.stack:
        found.append(f"{code.spills} spilled, {code.stack} bytes of stack")
    by_registers = 65536 // (threads * 8 * math.ceil(code.registers / 8))
    if by_registers < blocks_per_sm:
        found.append(f"{code.registers} registers: {by_registers} blocks, not {blocks_per_sm}")
    # Each block pays a KiB on top of its own.
    if LEAST_BLOCKS * (code.shared + KIB) > SHARED[arch] * KIB:
        found.append(f"{code.shared} bytes shared: fewer than {LEAST_BLOCKS} blocks")
    if missing := sorted(opcode for opcode in opcodes if not code.opcodes[opcode]):
        found.append(f"no {', '.join(missing)}")
    if name.split()[0] in WAITING and not code.opcodes["MEMBAR"]:
        found.append("nothing is released before a flag is raised: no MEMBAR")
    return found


def kernels_in_library(arch: str) -> dict[str, Code]:
    """Name -> properties of the library's machine code."""
    resources = by_function(r" Function (\S+?):", tool("--dump-resource-usage", "-arch", arch))
    listings = by_function(r"\t\tFunction : (\S+)", tool("-sass", "-arch", arch))
    assert sorted(resources) == sorted(listings)
    return {
        name: of_nvidia(resources[name], listings[name], "", sizes_of(name)[1])
        for name in resources
    }


def by_function(heading: str, text: str) -> dict[str, str]:
    _, *parts = re.split(heading, text)
    return {kernel_name(mangled): part for mangled, part in zip(*[iter(parts)] * 2, strict=True)}


def kernel_name(mangled: str) -> str:
    """As in "layer 64 transposed bf16"."""
    if found := re.match(QUANTIZED, mangled):
        dtype, *sizes = found.groups()
        bits, tiles, tall, _, warps = map(int, sizes)
        size = f"{8 * tiles} x {16 * tall}"
        return f"quantized {warps} warps, {bits} bits, {size} {dtype}"
    shape = r"_ZN6hylora4cuda\d+([a-z_]+)INS0_4(bf16|fp16)E(?:Li(\d)ELb([01])E)?E"
    kernel, dtype, tile, transposed = re.match(shape, mangled).groups()
    words = [kernel, tile and ("64", "128")[int(tile)], transposed == "1" and "transposed", dtype]
    return " ".join(filter(None, words))


def sizes_of(name: str) -> tuple[int, int]:
    """(threads of a block, bytes of its shared memory), by the plan for a call that takes it."""
    device = (132, 90)
    if found := re.match(r"quantized (\d+) warps, . bits, (\d+) x (\d+)", name):
        warps, rows, columns = map(int, found.groups())
        return 32 * warps, 4 * warps * rows * columns
    if name.startswith("adapter_gradients"):
        return torch.ops.hylora.cuda_adapter_gradients_sizes(2048, 2048, 2048, 32, *device)[3:]
    rows = {"decode": 1, "layer 64": 17, "layer 128": 8192}
    M = next(M for kernel, M in rows.items() if name.startswith(kernel))
    sizes = (False, False, M, 4096, 4096, 1024, 32)
    return torch.ops.hylora.cuda_layer_sizes(*sizes, *device)[3:]


def tool(*words: str) -> str:
    """The output of cuobjdump, from triton's wheel, for the library."""
    program = (
        Path(importlib.util.find_spec("triton").origin).parent / "backends/nvidia/bin/cuobjdump"
    )
    command = [program, *words, LIBRARY]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


GOOD = Code(112, 49152, 0, 0, 0, Counter(HMMA=9, LDSM=9, LDGSTS=9, LDG=9, MEMBAR=1))


@needs_kernels
@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"spills": 3}, "3 spilled, 0 bytes of stack"),
        ({"stack": 8}, "0 spilled, 8 bytes of stack"),
        ({"registers": 169}, "169 registers: 2 blocks, not 3"),
        ({"shared": 49 * KIB + 1}, f"{49 * KIB + 1} bytes shared: fewer than 2 blocks"),
        ({"opcodes": Counter(LDSM=9, MEMBAR=1)}, "no HMMA, LDGSTS"),
        (
            {"opcodes": Counter(HMMA=9, LDSM=9, LDGSTS=9)},
            "nothing is released before a flag is raised: no MEMBAR",
        ),
    ],
)
def test_each_fault_is_named(change, fault):
    found = faults_of("layer 64 bf16", replace(GOOD, **change), "sm_86")
    assert found == ([] if fault is None else [fault])


# ----------------------------------------------------------------------------------- the primitives

# kernel of cuda_primitives.cu -> its instructions. p0, p1, .. are its parameters, p0[4] is the
# memory 4 bytes from p0, d0, d1, .. are an instruction's results. The order of registers in each
# operand is that of the PTX ISA's figures for mma.m16n8k16 and ldmatrix.x4; cvt.*x2 puts its first
# operand into the upper half.
TABLE = {
    "mma_bf16": [
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {d0, d1, d2, d3},"
        " {p1[0], p1[4], p1[8], p1[12]}, {p2[0], p2[4]}, {p0[0], p0[4], p0[8], p0[12]}",
        *(f"p0[{16 + 4 * i}] = d{i}" for i in range(4)),
    ],
    "ldmatrix_plain": [
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {d0, d1, d2, d3}, shared[0]",
        *(f"p0[{4 * i}] = d{i}" for i in range(4)),
    ],
    "ldmatrix_turned": [
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {d0, d1, d2, d3}, shared[0]",
        *(f"p0[{4 * i}] = d{i}" for i in range(4)),
    ],
    "cp_async": [
        "cp.async.cg.shared.global shared[0], p0[0], 16, p1",
        "cp.async.commit_group",
        "cp.async.wait_group 2",
    ],
    "pack_bf16": ["cvt.rn.bf16x2.f32 d0, p1[4], p1[0]", "p0[0] = d0"],
    "load_once": [
        "ld.global.nc.L1::no_allocate.v4.u32 {d0, d1, d2, d3}, p1[0]",
        *(f"p0[{4 * i}] = d{i}" for i in range(4)),
    ],
    "load_two_once": [
        "ld.global.nc.L1::no_allocate.v2.u32 {d0, d1}, p1[0]",
        *(f"p0[{4 * i}] = d{i}" for i in range(2)),
    ],
    "load_one_once": ["ld.global.nc.L1::no_allocate.u32 d0, p1[0]", "p0[0] = d0"],
    # 0xBF80 is -1 in bfloat16; a look-up table of 0xEA is (a & b) | c.
    "minus_bf16": [f"fma.rn.bf16x2 d0, p2[0], {0xBF80BF80 - 2**32}, p1[0]", "p0[0] = d0"],
    "minus_fp16": ["sub.f16x2 d0, p1[0], p2[0]", "p0[0] = d0"],
    "choose": ["lop3.b32 d0, p1[0], p1[4], p1[8], 0xEA", "p0[0] = d0"],
    "load_fresh": [
        "ld.global.cg.v4.u32 {d0, d1, d2, d3}, p1[0]",
        *(f"p0[{4 * i}] = d{i}" for i in range(4)),
    ],
    "ticket": ["atom.relaxed.gpu.global.add.s32 d0, p1[0], 3", "p0[0] = d0"],
    "publish": ["red.release.gpu.global.add.s32 p0[0], 3"],
    "arrive": ["atom.acq_rel.gpu.global.add.s32 d0, p1[0], 3", "p0[0] = d0"],
    "look": ["ld.acquire.gpu.global.s32 d0, p1[0]", "p0[0] = d0"],
}
TABLE["mma_fp16"] = [line.replace("bf16", "f16") for line in TABLE["mma_bf16"]]
TABLE["pack_fp16"] = [line.replace("bf16x2", "f16x2") for line in TABLE["pack_bf16"]]
GIVES_NOTHING = ("cp.", "red.")


def steps_of(kernel: str, ptx: str) -> list[str]:
    """A kernel's inline assembly and stores, in the words of TABLE."""
    body = re.search(rf"\.entry {kernel}\(.*?\n}}", ptx, re.DOTALL)[0]
    values, steps, inline = {}, [], False

    def named(operand: str) -> str:
        """An operand: registers by what they hold, an address by where it points."""
        if at := re.fullmatch(r"\[(\S+?)(?:\+(\d+))?\]", operand):
            return f"{values[at[1]]}[{at[2] or 0}]"
        return re.sub(r"%\w+", lambda register: values[register[0]], operand)

    for line in body.splitlines():
        line = line.strip().rstrip(";")
        if line.startswith("// "):
            inline = line == "// begin inline asm" or (inline and line != "// end inline asm")
            continue
        opcode, _, rest = line.partition(" ")
        operands = re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s]+", rest)
        if inline:
            gives = [] if opcode.startswith(GIVES_NOTHING) else re.findall(r"%\w+", operands[0])
            read = [named(operand) for operand in operands[bool(gives) :]]
            values |= {register: f"d{i}" for i, register in enumerate(gives)}
            given = [named(operands[0])] if gives else []
            steps.append(f"{opcode} {', '.join(given + read)}".strip())
        elif opcode.startswith("ld.param"):
            values[operands[0]] = "p" + operands[1].rstrip("]").rpartition("_")[2]
        elif opcode.startswith("ld.global"):
            values[operands[0]] = named(operands[1])
        elif opcode.startswith(("mov", "cvta")):
            source = operands[1]
            is_symbol = not source.startswith("%") and not source.lstrip("-").isdigit()
            values[operands[0]] = "shared" if is_symbol else values.get(source, source)
        elif opcode.startswith("st.global"):
            steps.append(f"{named(operands[0])} = {named(operands[1])}")
    return steps


def compiled_to_ptx(folder: Path, primitives: str) -> str:
    """cuda_primitives.cu with this text for csrc/cuda/primitives.h."""
    (folder / "cuda").mkdir()
    (folder / "cuda" / "primitives.h").write_text(primitives)
    source, ptx = TESTS / "helpers" / "cuda_primitives.cu", folder / "primitives.ptx"
    command = [NVCC, "-std=c++17", "-arch=compute_80", "-ptx", f"-I{folder}", source, "-o", ptx]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return ptx.read_text()


PRIMITIVES = TESTS.parent / "csrc" / "cuda" / "primitives.h"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc here")


@needs_nvcc
def test_primitives_are_as_the_isa_has_them(tmp_path):
    ptx = compiled_to_ptx(tmp_path, PRIMITIVES.read_text())
    assert {kernel: steps_of(kernel, ptx) for kernel in TABLE} == TABLE
    source = (TESTS / "helpers" / "cuda_primitives.cu").read_text()
    assert set(re.findall(r"__global__ void (\w+)", source)) == set(TABLE)


BROKEN = {
    "the order of an operand": ("mma_bf16", '"r"(a[0]), "r"(a[1])', '"r"(a[1]), "r"(a[0])'),
    "the halves of a pair": ("pack_fp16", '"f"(high), "f"(low)', '"f"(low), "f"(high)'),
    "a transpose": ("ldmatrix_turned", "x4.trans.shared", "x4.shared"),
    "the zeros behind a row": ("cp_async", "[%0], [%1], 16, %2", "[%0], [%1], 16"),
    "a release": ("publish", "red.release.gpu", "red.relaxed.gpu"),
    "an acquire": ("look", "ld.acquire.gpu", "ld.relaxed.gpu"),
}


@needs_nvcc
@pytest.mark.parametrize("what", BROKEN)
def test_the_table_tells(what, tmp_path):
    kernel, right, wrong = BROKEN[what]
    text = PRIMITIVES.read_text()
    assert right in text
    ptx = compiled_to_ptx(tmp_path, text.replace(right, wrong))
    assert steps_of(kernel, ptx) != TABLE[kernel]
