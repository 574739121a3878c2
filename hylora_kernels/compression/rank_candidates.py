"""The candidates of a model's matrices in rank: their factors in the workspace, and what each rank
costs and loses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hylora_kernels.compression.calibration import Statistics
from hylora_kernels.compression.embedding import embedding_curve, factorize_embedding
from hylora_kernels.compression.factors import factor_bytes
from hylora_kernels.compression.options import CompressOptions
from hylora_kernels.compression.ranks import Curve, curve
from hylora_kernels.compression.tokens import TokenStatistics
from hylora_kernels.compression.whiten import factorize_whitened
from hylora_kernels.compression.workspace import Workspace
from hylora_kernels.model.structure import Target
from hylora_kernels.support.processes import ALONE, Processes
from hylora_kernels.support.storage import require_disk

Value = TypeVar("Value")


class RankCandidates:
    """The candidates in rank of linears and of an embedding, which is None where it has none.

    Without low_rank no linear has any, and there is nothing to factorize.
    """

    def __init__(
        self,
        model: nn.Module,
        linears: Sequence[Target],
        embedding: Target | None,
        workspace: Workspace,
        options: CompressOptions,
        processes: Processes = ALONE,
    ):
        self._model, self._options, self._workspace = model, options, workspace
        self._processes = processes
        self._linears, self._embedding = linears, embedding

    def missing(self, targets: Sequence[Target]) -> list[Target]:
        """Those of `targets` that have no factors in the workspace and need some."""
        if not self._options.low_rank:
            return []
        return [target for target in targets if not self._workspace.has(target.path)]

    def factorize(self, statistics: Statistics) -> None:
        """Whiten and factorize the linears of `statistics`, divided among the processes; the
        workspace gets their Factors."""
        o, processes = self._options, self._processes
        linears = [(g.leader.path, t) for g in statistics.groups for t in self.missing(g.targets)]
        costs = {t.path: float(math.prod(t.shape) * min(t.shape)) for _, t in linears}
        own = processes.share(costs)
        for leader, target in tqdm(
            [linear for linear in linears if linear[1].path in own],
            desc="factorizing",
            unit="layer",
            disable=not o.progress,
            leave=False,
        ):
            factors = factorize_whitened(
                target.path,
                target.matrix,
                statistics.inputs.get(leader),
                statistics.gradients.get(target.path),
                o.factorizer,
                o.seed,
            )
            factors.S.mul_(statistics.nats(leader) ** 0.5)
            self._workspace.save(target.path, factors)
        self._workspace.receive([*costs], processes)

    def factorize_embedding(self, target: Target, statistics: TokenStatistics | None) -> None:
        """The same for the embedding, by the first process; statistics None for method "svd"."""
        o, folder = self._options, self._workspace.folder

        def work() -> None:
            require_disk(folder, factor_bytes(target.shape), "the embedding's factors")
            factors = factorize_embedding(self._model, target, statistics, o.method)
            self._workspace.save(target.path, factors)

        self._processes.by_first(work, "factorizing")
        self._workspace.receive([target.path], self._processes)

    def curves(self) -> tuple[list[Curve], list[str]]:
        """(the candidates of every matrix, the paths of experts that no token reached), once all
        are factorized."""
        if not self._options.low_rank:
            return [], []
        targets = [*self._linears, *([self._embedding] if self._embedding else [])]
        found = {t: self._workspace.singular_values(t.path) for t in targets}
        unreached: list[str] = []
        if self._options.method != "svd":
            unreached = take_least_sibling(
                found, lambda t: self._workspace.reached(t.path), torch.linalg.vector_norm
            )
        return rank_curves(found, self._embedding, self._options), unreached


def rank_curves(
    singular_values: Mapping[Target, Tensor], embedding: Target | None, options: CompressOptions
) -> list[Curve]:
    """The candidates of matrices with these singular values, falling; one may be the embedding."""
    o = options
    shared = o.form, o.rank_multiple, o.lora_rank, o.count
    return [
        embedding_curve(target, S, o.embedding_rank, o.rank_multiple)
        if target is embedding
        else curve(target.path, target.shape, S, *shared)
        for target, S in singular_values.items()
    ]


def take_least_sibling(
    found: dict[Target, Value], reached: Callable[[Target], bool], size: Callable[[Value], float]
) -> list[str]:
    """Give experts that no token reached, of which calibration says nothing, what the least of
    their siblings has, so that they get about its rank and bits; return their paths.

    found: changed in place. Of a stack that no token reached nothing changes.
    """
    least: dict[str, Value] = {}
    unreached = []
    for target, value in found.items():
        stack = target.path.rpartition(".")[0]
        if not target.routed:
            continue
        if not reached(target):
            unreached.append(target)
        elif stack not in least or size(value) < size(least[stack]):
            least[stack] = value
    for target in unreached:
        found[target] = least.get(target.path.rpartition(".")[0], found[target])
    return [target.path for target in unreached]
