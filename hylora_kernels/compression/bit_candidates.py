"""The candidates of a model's matrices in bits: their codes in the workspace, and what each width
loses."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hylora_kernels.compression.bits import BitBudget
from hylora_kernels.compression.calibration import Statistics
from hylora_kernels.compression.costs import as_is
from hylora_kernels.compression.embedding import place_terms
from hylora_kernels.compression.options import FACTOR_BITS, CompressOptions
from hylora_kernels.compression.quantize import error, quantize_each, quantize_embedding
from hylora_kernels.compression.rank_candidates import take_least_sibling
from hylora_kernels.compression.ranks import Choice
from hylora_kernels.compression.replace import factors_in
from hylora_kernels.compression.tokens import TokenStatistics
from hylora_kernels.compression.workspace import Codes
from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.layers.quantized import QuantizedLinear
from hylora_kernels.model.structure import Group, Target
from hylora_kernels.reference import dequantize
from hylora_kernels.support.processes import ALONE, Processes
from hylora_kernels.support.storage import require_disk
from hylora_kernels.weights import QuantizedMatrix

TABLE_BLOCKS = 16  # Blocks of text, spread over all, that give embedding and head their metric.


class BitCandidates:
    """The linears of a budget, and its embedding and output head, in each width that it may choose.

    codes: gets the quantised matrices, and has those of an earlier run.
    """

    def __init__(
        self,
        model: nn.Module,
        budget: BitBudget,
        codes: Codes,
        options: CompressOptions,
        processes: Processes = ALONE,
    ):
        self._model, self._budget, self._options = model, budget, options
        self.codes, self._processes = codes, processes

    def missing(self, target: Target) -> list[int]:
        """The widths of a matrix that are not in the workspace."""
        return [b for b in self._budget.widths(target) if not self.codes.has(target.path, b)]

    def require_disk(self) -> None:
        """Raise OSError if the codes to come don't fit on the disk."""
        needed = sum(
            self._budget.costs.bytes(target, Choice(as_is(target).rank, bits))
            for target in self._budget.targets
            for bits in self.missing(target)
        )
        require_disk(self.codes.folder, needed, "quantised matrices")

    @torch.no_grad()
    def quantize(self, statistics: Statistics) -> None:
        """Quantise the linears of `statistics` in all widths, the groups divided among the
        processes; the workspace gets them and their errors."""
        groups = [g for g in statistics.groups if any(map(self.missing, g.targets))]
        widths = [(t.path, b) for g in groups for t in g.targets for b in self.missing(t)]
        own = self._processes.share({g.leader.path: _cost(g) for g in groups})
        groups, hidden = [g for g in groups if g.leader.path in own], not self._options.progress
        for group in tqdm(groups, "quantising", unit="group", disable=hidden, leave=False):
            self._quantize_group(group, statistics)
        self.codes.receive(widths, self._processes)

    def _quantize_group(self, group: Group, statistics: Statistics) -> None:
        """The linears of a group read one input: one sweep over its columns serves all of them."""
        leader, rounding = group.leader.path, self._options.rounding
        G, nats = statistics.inputs.get(leader), statistics.nats(leader)
        wanted = {t: widths for t in group.targets if (widths := self.missing(t))}
        dense = [t for t in wanted if not isinstance(t.module, SVDLoRALinear)]
        reached = G is None or bool(G.diagonal().mean() > 0)

        def lost(target: Target, matrix: Tensor) -> float:
            C = statistics.gradients.get(target.path)
            return nats * error(target.matrix.float() - matrix.float(), G, C)

        if dense:
            all_widths = sorted({bits for t in dense for bits in wanted[t]})
            found = quantize_each([t.matrix for t in dense], all_widths, G, method=rounding)
            for target, by_width in zip(dense, found, strict=True):
                for bits in wanted[target]:
                    matrix = by_width.pop(bits)
                    loss = lost(target, dequantize(matrix))
                    self.codes.store(target.path, bits, matrix, loss, reached)
        for target in wanted:
            if isinstance(target.module, SVDLoRALinear):
                weights = factors_in(target.module, FACTOR_BITS, rounding)
                loss = lost(target, QuantizedLinear.from_weights(weights).weight)
                self.codes.store(target.path, FACTOR_BITS, None, loss, reached)

    def quantize_tables(self, statistics: TokenStatistics | None) -> None:
        """Quantise embedding and output head in all their widths, by the first process; statistics
        None for method "svd"."""
        widths = [(target.path, b) for target in self._budget.tables for b in self.missing(target)]
        self._processes.by_first(lambda: self._quantize_tables(statistics), "quantising")
        self.codes.receive(widths, self._processes)

    def _quantize_tables(self, statistics: TokenStatistics | None) -> None:
        o = self._options
        for target in self._budget.tables:
            if not (widths := self.missing(target)):
                continue
            terms = place_terms(self._model, target, statistics, o.method)
            found = quantize_embedding(target.matrix, widths, terms, method=o.rounding)
            in_nats = statistics is not None and o.method == "two_sided"
            for bits, (matrix, lost) in found.items():
                lost = statistics.nats(lost) if in_nats else lost
                self.codes.store(target.path, bits, matrix, lost, True)

    def errors(self) -> tuple[dict[str, dict[int, float]], list[str]]:
        """(path -> bits -> what the matrix loses, the paths of experts that no token reached), once
        all are quantised."""
        found: dict[Target, dict[int, float]] = {}
        reached: dict[Target, bool] = {}
        for target in self._budget.targets:
            measured = {b: self.codes.error(target.path, b) for b in self._budget.widths(target)}
            found[target] = {bits: lost for bits, (lost, _) in measured.items()}
            reached[target] = all(seen for _, seen in measured.values())
        unreached = take_least_sibling(found, reached.__getitem__, lambda e: sum(e.values()))
        return {target.path: errors for target, errors in found.items()}, unreached

    def matrix(self, target: Target, choice: Choice) -> QuantizedMatrix | None:
        """The codes of a matrix, None for one that gets others or none."""
        if choice.rank or choice.bits not in self._budget.widths(target):
            return None
        return self.codes.matrix(target.path, choice.bits)


def _cost(group: Group) -> float:
    """Of rounding a group, whose columns are rounded one after the other, by its Gram matrix."""
    K = group.leader.shape[1]
    return float(K * K * (K + sum(target.shape[0] for target in group.targets)))
