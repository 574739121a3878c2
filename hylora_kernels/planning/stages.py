"""Seconds, memory and disk of each stage of a compression, from its work and a machine's rates.

docs/scale.md has the formulas in words, their constants, and what they were checked against.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from hylora_kernels.compression.ranks import DENSE, adapter_rank
from hylora_kernels.layers.factors import factor_count
from hylora_kernels.model.structure import Target
from hylora_kernels.planning.machine import Machine, rate_at
from hylora_kernels.planning.options import BY_BLOCK, IN_MEMORY
from hylora_kernels.planning.work import Work

HEAD_ROWS = 128  # Rows of logits at a time (model/loss.py).
START = 2.0  # Seconds to make the model and read its tokenizer.
HEAP = 2**25  # Bytes of a freed tensor that the C library keeps for the next one, at most.
OWN_ROWS = 16  # Blocks that a model writes at a time on a CPU (text/self_text.py).


@dataclass(frozen=True)
class Stage:
    """A stage: seconds, the most memory that a process has meanwhile, and what the workspace, or
    the result, has on the disk after it; bytes."""

    name: str
    seconds: float
    memory: int
    disk: int = 0


class Cost:
    """The stages of one compression by one route on a machine.

    budget: bytes of memory that the statistics of one pass may take.
    """

    def __init__(self, work: Work, machine: Machine, route: str, processes: int, budget: int):
        self.work, self.machine, self.processes = work, machine, processes
        self.by_block, self.budget, o = route == BY_BLOCK, budget, work.options
        # The text that a model writes itself is left out where it is not in memory.
        self.own_blocks = 0 if self.by_block else work.own_blocks
        self.blocks = work.blocks - work.own_blocks + self.own_blocks
        self.tokens = self.blocks * work.length
        self.refit_tokens = min(o.refit_samples, self.blocks) * work.length

    @property
    def passes(self) -> int:
        """Over the text."""
        return 1 if self.by_block else len(self.work.runs(self.budget))

    @cached_property
    def peak(self) -> int:
        """The most memory that a stage needs."""
        return max(stage.memory for stage in self.stages)

    def largest_budget(self, memory: int) -> int | None:
        """The most bytes of statistics with which all stages fit into `memory`; None if there are
        none."""
        w = self.work
        groups = w.structure.groups
        least = max(w.statistics([group]) for group in groups)
        spare = memory - (self.peak - self._statistics())
        fits = spare >= least and self.blocks
        if not fits:
            return None
        tried = Cost(w, self.machine, IN_MEMORY, self.processes, spare)
        return spare if tried.peak <= memory else None

    @cached_property
    def stages(self) -> list[Stage]:
        """In the order of the work."""
        o = self.work.options
        found = [self._load()]
        if self.own_blocks:
            found.append(self._own_text())
        if self.blocks:
            found.append(self._calibrate())
        if o.low_rank:
            found.append(self._factorize())
        if o.widths:
            found.append(self._quantise())
        if o.refit:
            found.append(self._refit())
        found.append(self._replace())
        if self.blocks and o.measure:
            found.append(self._measure())
        found.append(self._save())
        return found

    # ------------------------------------------------------------------------------------ memory

    @property
    def _weights(self) -> int:
        """Bytes of weights in memory throughout."""
        return self.work.resident_bytes if self.by_block else self.work.budget.dense.bytes

    @property
    def _block(self) -> int:
        return max(self.work.block_bytes) if self.by_block else 0

    @property
    def _loaded(self) -> int:
        return self.machine.base + self._weights

    def _statistics(self) -> int:
        """Of one pass, or of one block."""
        w = self.work
        if not self.blocks:
            return 0
        if self.by_block:
            return max(w.statistics(block.groups) for block in w.structure.blocks)
        return max(map(w.statistics, w.runs(self.budget)))

    def _heap(self) -> int:
        """What the Gram matrices leave behind once they are freed: those that are small stay in the
        process."""
        w = self.work
        if not (self.blocks and self.machine.shared):
            return 0
        sizes = [
            4 * n * n
            for group in w.structure.groups
            for n in (
                group.leader.shape[1],
                *(t.shape[0] for t in group.targets if w.has_gradients),
            )
        ]
        return min(sum(size for size in sizes if size < HEAP), self._statistics())

    def _calibration_memory(self) -> int:
        w, L = self.work, self.work.length
        kept = w.activations.one_block if self.by_block else w.activations.all_blocks
        words, _ = w.head_shape
        widest = max(max(t.shape) for t in w.structure.targets)
        # float32 logits with their gradient; a batch of rows in float32 for a Gram product.
        passing = max(12 * HEAD_ROWS * words, 8 * L * widest)
        if not w.has_gradients:
            kept = w.activations.one_block
        return self._loaded + self._block + self._statistics() + int(L * kept) + passing

    def _factors_memory(self) -> int:
        """The largest linear's float64 temporaries beside the statistics."""
        most = max(map(factorize_bytes, (t.shape for t in self.work.targets)))
        return self._loaded + self._block + self._statistics() + most

    def _refit_memory(self) -> int:
        w = self.work
        T, element = self.refit_tokens, w.element
        _, d = w.head_shape
        block = max(w.structure.blocks, key=lambda b: sum(t.shape[0] for t in b.targets))
        inputs = sum(g.leader.shape[1] for g in block.groups if not g.leader.routed)
        outputs = sum(t.shape[0] for t in block.targets if not t.routed)
        # Streams in front of and behind the block, of both models; what the dense linears read and
        # what the student's gave.
        streams = element * T * (4 * d + inputs + outputs + 2 * d)
        largest = max((t.shape for t in block.targets), key=lambda s: s[0] * s[1])
        solving = 8 * (5 * largest[0] * largest[1] + 4 * largest[1] ** 2)
        held = w.refit_bytes // len(w.structure.blocks) if self.by_block else w.refit_bytes
        copy = max(w.block_bytes)  # The student's block.
        return self._loaded + self._block + self._heap() + copy + streams + solving + held

    # ------------------------------------------------------------------------------------ stages

    def _shared(self, seconds: float) -> float:
        """Of work that processes divide; on shared cores none of it is done sooner."""
        return seconds if self.machine.shared else seconds / self.processes

    def _reading(self, times: int) -> float:
        """Of the blocks' weights from their files, where they are not in memory."""
        return times * sum(self.work.block_bytes) / self.machine.load if self.by_block else 0.0

    def _load(self) -> Stage:
        w = self.work
        size = w.resident_bytes if self.by_block else w.budget.dense.bytes
        return Stage("load", START + size / self.machine.load, self._loaded)

    def _own_text(self) -> Stage:
        """Decoded OWN_ROWS at a time; each step reads all weights and computes for its rows."""
        w, m = self.work, self.machine
        steps = -(-self.own_blocks // OWN_ROWS) * w.length
        flops = OWN_ROWS * (w.forward_flops() + w.head_flops / 2)
        step = max(w.budget.dense.bytes / m.bandwidth, flops / m.forward)
        step += m.latency * len(w.structure.blocks)
        cache = 4 * OWN_ROWS * w.length * w.head_shape[1] * len(w.structure.blocks)
        return Stage("own text", steps * step, self._loaded + w.budget.dense.bytes + cache)

    def _calibrate(self) -> Stage:
        w, m = self.work, self.machine
        flops = w.training_flops()
        if not w.has_gradients:
            body = w.forward_flops() / m.forward
        else:
            body = flops / m.training + w.head_flops / m.head
            if self.by_block:  # A forward that stores the states comes before.
                body += w.forward_flops() / m.forward
        gram = sum(
            w.share(t) * gram_seconds(m, n)
            for group in w.structure.groups
            for t, n in [
                (group.leader, group.leader.shape[1]),
                *((t, t.shape[0]) for t in group.targets if w.has_gradients),
            ]
        )
        seconds = self._shared(self.tokens * (self.passes * body + gram))
        disk = 0
        if self.by_block:
            states = self.tokens * w.head_shape[1] * w.element
            disk = states * (len(w.structure.blocks) + 3)  # And the gradients.
            seconds += disk / m.write + disk / m.read + self._reading(2)
        return Stage("calibrate", seconds, self._calibration_memory(), disk)

    def _factorize(self) -> Stage:
        w, m = self.work, self.machine
        has_inputs = w.options.method != "svd"
        seconds = sum(factorize_seconds(m, t.shape, has_inputs, w.has_gradients) for t in w.targets)
        seconds += w.factor_bytes / m.write
        return Stage("factorize", self._shared(seconds), self._factors_memory(), w.factor_bytes)

    def _quantise(self) -> Stage:
        w, m = self.work, self.machine
        weights = sum(len(w._bits.widths(t)) * t.matrix.numel() for t in w._bits.targets)
        size = weights / 2  # Codes of 2 to 8 bits and their scales, 4 in the mean.
        seconds = weights / m.rounding + size / m.write
        return Stage("quantise", self._shared(seconds), self._factors_memory(), int(size))

    def _refit(self) -> Stage:
        w, m = self.work, self.machine
        _, d = w.head_shape
        seconds = self._reading(2)
        for index, block in enumerate(w.structure.blocks):
            groups = [g for g in block.groups if not g.leader.routed]
            # The model's own forward, the dense block's and the student's; the student's attention
            # and row operations run again in front of every group but the first.
            flops = 3 * w.forward_flops(index) + max(len(groups) - 1, 0) * w.attention
            seconds += self.refit_tokens * flops / m.forward
            for group in groups:
                K = group.leader.shape[1]
                writes = len(group.targets) == 1 and group.leader.shape[0] == d
                products = 3 * gram_seconds(m, K) + (2 * gram_seconds(m, K) * d / K) * writes
                seconds += self.refit_tokens * products
            for target in block.targets:
                seconds += self._solve(target)
        return Stage("refit", seconds, self._refit_memory(), w.refit_bytes)

    def _solve(self, target: Target) -> float:
        """One ridge regression, and the weight that comes of it."""
        m, (N, K), R = self.machine, target.shape, self.work.rank(target)
        fetch = 2 * 4 * min(N, K) * (N + K) / m.read
        if target.routed:
            return m.products(2.0 * N * R * K, R or K) + fetch
        T = m.products(2.0 * N * K * K, min(N, K))
        if R == DENSE:
            return T + m.products(2.0 * N * K * K + K**3 / 3, K)
        flops = 4.0 * R * K * (R + K) / 2 + 4.0 * N * K * R + 2.0 * N * R * R + R**3 / 3
        written = 4 * N * R
        return T + m.products(flops, R) + fetch + written / m.write + written / m.read

    def _replace(self) -> Stage:
        w, m = self.work, self.machine
        seconds, temporary = self._reading(1), 0
        for target in w.targets:
            if (R := w.rank(target)) != DENSE:
                seconds += cut_seconds(m, target.shape, R, w.options.lora_rank, w.options.form)
            if w.options.low_rank:
                N, K = target.shape
                size = 4 * min(N, K) * (N + K)
                seconds += size / m.read
                temporary = max(temporary, size + 24 * N * (R or 1) + 16 * N * K)
        made = 0 if self.by_block else w.result.bytes_as_is
        held = 0 if self.by_block else w.refit_bytes
        memory = self._loaded + self._block + self._heap() + held + made + temporary
        return Stage("replace", seconds, memory)

    def _measure(self) -> Stage:
        w, m = self.work, self.machine
        tokens = min(w.options.measure, self.blocks) * w.length
        body = w.forward_flops() / m.forward
        after = w.result.parameters_as_is / w.budget.dense.parameters
        seconds = tokens * (body * (1 + after) + w.head_flops / m.head)
        seconds += self._reading(2)
        memory = self._loaded + self._block + self._heap()
        memory += 0 if self.by_block else w.result.bytes_as_is
        return Stage("measure", seconds, memory)

    def _save(self) -> Stage:
        w = self.work
        size = w.result.bytes_as_is
        made = self._block if self.by_block else 2 * size
        return Stage("save", size / self.machine.write, self.machine.base + made, size)


# ------------------------------------------------------------------------------------ one matrix


def gram_seconds(machine: Machine, n: int) -> float:
    """Of one row's share in a Gram matrix [n, n], whose upper half alone is made."""
    return 2.0 * n * n / rate_at(machine.gram, n)


def factorize_seconds(
    machine: Machine, shape: tuple[int, int], has_inputs: bool, has_gradients: bool
) -> float:
    """Of compression.whiten.factorize_whitened on a matrix [N, K]."""
    (n, m), wide = sorted(shape), shape[0] <= shape[1]
    outer, inner = (has_gradients, has_inputs) if wide else (has_inputs, has_gradients)
    products = 3.0 * n * n * m  # A A^T, of which half is made, and Q^T A.
    if inner:
        products += 2.0 * n * m * m
    if outer:
        products += 2.0 * n * n * m + n**3 / 3 + n**3  # L, L^T W, L^-T Q.
    return machine.products(products, n) + machine.eigenvectors(n)


def factorize_bytes(shape: tuple[int, int]) -> int:
    """Its float64 temporaries at most."""
    n, m = sorted(shape)
    return 8 * max(3 * n * m + m * m + n * n, 3 * n * m + 5 * n * n)


def cut_flops(shape: tuple[int, int], rank: int) -> float:
    """Of a base of `rank` in the pivoted form: QR, LU, the coefficients, the pivots' rows."""
    (N, K), r = shape, rank
    return 4 * N * r**2 - 4 / 3 * r**3 + N * r**2 - r**3 / 3 + (N - r) * r**2 + 2 * r**2 * K


def cut_seconds(
    machine: Machine, shape: tuple[int, int], rank: int, lora_rank: int, form: str
) -> float:
    """Of making a layer of total rank `rank`."""
    base = rank - adapter_rank(rank, lora_rank)
    if form == "pair":
        return factor_count(base, shape[1], shape[0], form) * 8 / machine.read
    return cut_flops(shape, base) / rate_at(machine.cut, 2 * base)
