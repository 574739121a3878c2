"""Properties of machine code, and the faults that keep it from being shipped.

Nothing here imports a kernel, so tests can look for the same faults in invented code.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from hylora_kernels.backends.triton import config as configs
from hylora_kernels.backends.triton.config import FORWARD, AdapterGradientsConfig, Config, Problem

KIB = 1024


@dataclass(frozen=True)
class Machine:
    """A target of compilation.

    arch: 90, or "gfx942". shared: KiB a block may use. multiprocessors: of a typical card, for the
    configurations that depend on them. gated: a fault fails the gate, not only warns.
    """

    kind: str
    arch: int | str
    shared: int
    multiprocessors: int
    lanes: int = 32
    gated: bool = True

    @property
    def target(self) -> configs.Target:
        return configs.Target(self.kind, self.arch, self.multiprocessors)


# shared: CUDA programming guide, "maximum shared memory per thread block"; the LDS of CDNA 3.
MACHINES = {
    "sm_80": Machine("cuda", 80, 163, 108),
    "sm_86": Machine("cuda", 86, 99, 84),
    "sm_89": Machine("cuda", 89, 99, 128),
    "sm_90": Machine("cuda", 90, 227, 132),
    "sm_100": Machine("cuda", 100, 227, 148),
    "sm_120": Machine("cuda", 120, 99, 170),
    "gfx942": Machine("hip", "gfx942", 64, 304, lanes=64),
    "gfx1100": Machine("hip", "gfx1100", 64, 96, gated=False),
}


@dataclass(frozen=True)
class Case:
    """One kernel in one configuration for one problem. config None: merge_pivots, which has none.
    tf32: float32 may be rounded to it. members: of a group, (form, N, r, ra) each."""

    problem: Problem
    config: Config | AdapterGradientsConfig | None
    tf32: bool = False
    members: tuple[tuple[str, int, int, int], ...] = ()

    @property
    def kernel(self) -> str:
        if self.config is None:
            return "merge_pivots"
        if self.members:
            return "group"
        return "layer" if isinstance(self.config, Config) else "adapter_gradients"

    @property
    def tiled(self) -> bool:
        """True if tensor cores multiply tiles; a single row uses neither them nor shared memory."""
        return self.kernel == "adapter_gradients" or (self._is_launch and self.config.BM > 1)

    @property
    def _is_launch(self) -> bool:
        return isinstance(self.config, Config)

    @property
    def ieee(self) -> bool:
        return self.problem.dtype == torch.float32 and not self.tf32

    @property
    def aligned(self) -> bool:
        """True if every row of every matrix starts on 16 bytes."""
        p = self.problem
        sizes = (p.K, p.N, p.rank, p.others, p.lora_rank)
        sizes += tuple(size for _, *member in self.members for size in member)
        return all(size * p.dtype.itemsize % 16 == 0 for size in sizes)

    @property
    def sums(self) -> list[tuple[int, int]]:
        """Rows and columns of the tiles that the tensor cores add up."""
        c = self.config
        if isinstance(c, AdapterGradientsConfig):
            return [(c.BA, c.BC)]
        tiles = [(c.BM, c.BR), (c.BM, c.BN)]
        return [tile[::-1] for tile in tiles] if c.swap else tiles

    def why_illegal(self, target: configs.Target) -> str | None:
        """The reason why config.py would refuse the config; None if it wouldn't."""
        return self.config and configs.why_illegal(self.config, self.problem.dtype, target)

    @property
    def waiting_allowed(self) -> int:
        """The loads of tiles that may pass through registers.

        These are the parts of a split sum, where they have the problem's dtype; h at the pivots,
        which a group always may have; in the pivoted backward, dy by its index lists; in
        adapter_gradients, both operands of dB in each stage, since dy is summed as well as
        multiplied.
        """
        p, c = self.problem, self.config
        parts = 2 if c.split > 1 and p.dtype == torch.float32 else 0
        if self.kernel == "adapter_gradients":
            return 2 * parts + 2 * c.stages
        if not p.pivoted and not self.members:
            return parts
        return parts + (1 if p.direction == FORWARD else 2)

    @property
    def orders_wanted(self) -> set[str]:
        """Of the flag that says that h is there, and of the arrivals of a split sum."""
        arrivals = {"acq_rel"} if self.config is not None and self.config.split > 1 else set()
        hands_over = self.kernel in ("layer", "group")
        return {"acquire", "release"} | arrivals if hands_over else arrivals

    def __str__(self):
        p, c = self.problem, self.config
        dtype = "tf32" if self.tf32 else str(p.dtype).removeprefix("torch.")
        forms = [form for form, *_ in self.members] or ["pivoted" if p.pivoted else "pair"]
        words = [self.kernel, dtype, *dict.fromkeys(forms)]
        if self.kernel == "layer":
            words.append(p.direction)
        words += [*([] if self.aligned else ["odd"]), f"ra={p.lora_rank}", f"M={p.M}"]
        sizes = {} if c is None else asdict(c)
        words += [f"{name}{size}" for name, size in sizes.items() if name.startswith("B")]
        return " ".join(
            [*words, *(f"{name}={size}" for name, size in sizes.items() if name[0] != "B")]
        )


@dataclass(frozen=True)
class Code:
    """Properties of compiled code.

    shared: bytes. stack: bytes of a thread's local memory. spills: instructions on NVIDIA,
    registers on AMD. waiting: loads of tiles in the problem's dtype that are not asynchronous.
    opcodes: the count of each. orders: memory orders of the atomics.
    """

    registers: int
    shared: int
    stack: int = 0
    spills: int = 0
    waiting: int = 0
    opcodes: Counter = field(default_factory=Counter)
    orders: frozenset[str] = frozenset()


def examined(kernel, case: Case, machine: Machine) -> Code:
    """The properties of a compiled kernel."""
    if machine.kind == "hip":
        return of_amd(kernel.asm["amdgcn"], kernel.asm["llir"], kernel.metadata.shared)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        resources = _tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    code = of_nvidia(resources, sass, kernel.asm["ptx"], kernel.metadata.shared)
    element = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
    kinds = f"(?:{element[case.problem.dtype]}|i32)"  # i32: the planes of a quantised matrix
    load = rf"= tt\.load [^\n]*tensor<\d+x\d+x!tt\.ptr<{kinds}>"
    return replace(code, waiting=len(re.findall(load, kernel.asm["ttgir"])))


def _tool(name: str, *words: str) -> str:
    """Output of a program that comes with Triton."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([program, *words], capture_output=True, text=True, check=True).stdout


def of_nvidia(resources: str, sass: str, ptx: str, shared: int) -> Code:
    usage = dict(re.findall(r"(\w+):(\d+)", resources))
    instruction = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)"
    opcodes = Counter(re.findall(instruction, sass, re.MULTILINE))
    orders = re.findall(r"\b(?:atom|red|ld|st)\.[\w.]*?\b(acquire|release|acq_rel)\b", ptx)
    return Code(
        registers=int(usage["REG"]),
        shared=shared,
        stack=int(usage["STACK"]) + int(usage["LOCAL"]),
        spills=opcodes["LDL"] + opcodes["STL"],
        opcodes=opcodes,
        orders=frozenset(orders),
    )


def of_amd(assembly: str, llvm: str, shared: int) -> Code:
    notes = {name: int(count) for name, count in re.findall(r"\.(\w+):\s+(\d+)\n", assembly)}
    mnemonics = re.findall(r"^\t([a-z]\w+)", assembly, re.MULTILINE)
    # A barrier's fences are of the workgroup's scope: they order nothing between programs.
    device = [line for line in llvm.splitlines() if 'syncscope("agent")' in line]
    orders = re.findall(r"\b(acquire|release|acq_rel)\b", "\n".join(device))
    return Code(
        registers=notes["vgpr_count"],
        shared=max(shared, notes["group_segment_fixed_size"]),
        stack=notes["private_segment_fixed_size"],
        spills=notes["vgpr_spill_count"],
        # v_mfma_f32_32x32x8_bf16 and its like are told apart by nobody here
        opcodes=Counter(re.match(r"v_wmma|v_mfma|\w+", name)[0] for name in mnemonics),
        orders=frozenset(orders),
    )


def faults(code: Code, case: Case, machine: Machine) -> list[str]:
    """The faults that keep the code from being shipped."""
    found = []
    if code.spills:
        found.append(f"{code.spills} spilled")
    if code.stack:
        found.append(f"{code.stack} bytes of stack")
    if code.shared > machine.shared * KIB:
        found.append(f"{code.shared / KIB:.0f} KiB shared, {machine.shared} at most")
    wanted = tensor_opcode(case, machine)
    if wanted and not code.opcodes[wanted]:
        found.append(f"no {wanted}")
    if machine.kind == "cuda" and case.tiled and case.aligned:
        if not any(code.opcodes[name] for name in ("LDGSTS", "UTMALDG", "UBLKCP")):
            found.append("no async copies")
        if code.waiting > case.waiting_allowed:
            found.append(f"{code.waiting - case.waiting_allowed} loads of operands not async")
    if code.opcodes["WARPGROUP"] > code.opcodes["HGMMA"]:
        found.append(f"wgmma serialised: {code.opcodes['WARPGROUP']} WARPGROUP")
    missing = sorted(case.orders_wanted - code.orders)
    if missing:
        found.append(f"no atomic with {', '.join(missing)}")
    return found


def tensor_opcode(case: Case, machine: Machine) -> str | None:
    """The instruction that multiplies the tiles, None where there is none. Hopper's and Blackwell's
    own take 64 rows and 4 warps at least; tf32 can't be transposed on its way into them."""
    if case.ieee or not case.tiled:
        return None
    if machine.kind == "hip":
        return "v_mfma" if str(machine.arch).startswith("gfx9") else "v_wmma"
    is_tall = any(rows >= 64 for rows, _ in case.sums) and case.config.warps >= 4
    tall = is_tall and not case.tf32
    return {90: "HGMMA", 100: "UTCHMMA"}.get(machine.arch, "HMMA") if tall else "HMMA"
