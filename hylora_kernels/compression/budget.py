"""A budget in other words than keep: the whole model's parameters, or its megabytes as saved.

Only the selected linears shrink, so keep follows from what the rest of the model takes. It is known
before any text is read, and a target is met from below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from hylora_kernels.compression.options import CompressOptions
from hylora_kernels.compression.ranks import DENSE, Choice, Curve, Infeasible
from hylora_kernels.model.modules import tensors_saved_once
from hylora_kernels.model.structure import Target

MB = 1_000_000
PIVOT_BYTES = 4  # An int32 for each rank of the pivoted form.
ENTRY_BYTES = 110  # Of a tensor in a safetensors header, besides its name: dtype, shape, offsets.
PARTS = 5  # Tensors in the place of a weight, at most: SVh, U, A, B, pivots.


@dataclass(frozen=True)
class Size:
    """A whole model: its parameters and the bytes of its saved weights, a tied one once. The file's
    header adds about 0.1 MB for a thousand tensors."""

    parameters: int
    bytes: int


class Budget:
    """The size of a compressed model, from the ranks of its linears or, at most, from keep.

    dense: the size of the model as it is now.
    """

    def __init__(self, model: nn.Module, targets: Sequence[Target], form: str):
        tensors = model.state_dict()
        self.dense = Size(
            sum(p.numel() for p in model.parameters()),
            sum(t.nbytes for t in tensors_saved_once(model)),
        )
        self.linears = sum(target.matrix.numel() for target in targets)
        self._element = {t.path: t.matrix.element_size() for t in targets}
        self._pivot = PIVOT_BYTES if form == "pivoted" else 0
        self._rest = Size(
            self.dense.parameters - self.linears,
            self.dense.bytes - sum(target.matrix.nbytes for target in targets),
        )
        names = [*tensors, *(target.path for target in targets for _ in range(PARTS))]
        self._header = sum(len(name) + ENTRY_BYTES for name in names)  # At most.
        # A rank of the pivoted form has max(N, K) parameters or more, and one pivot.
        self._bytes_per_parameter = max(
            self._element[t.path] + self._pivot / max(t.shape) for t in targets
        )

    def size(self, curves: Sequence[Curve], choices: Mapping[str, Choice]) -> Size:
        """The size with these ranks, counted as the curves count; bits are not read."""
        parameters, size = self._rest.parameters, self._rest.bytes
        for c in curves:
            rank = choices[c.path].rank
            count = c.dense_cost if rank == DENSE else c.cost(rank)
            parameters += count
            size += count * self._element[c.path] + rank * self._pivot
        return Size(parameters, size)

    def keep(self, options: CompressOptions, ranks_at: Callable[[float], object]) -> float:
        """The keep that the options ask for, by itself or by a target.

        ranks_at: keep -> ranks; raises Infeasible for a keep too small. Feasibility depends on
                  costs only, so it may know any singular values.

        Raises ValueError naming the argument, and the smallest feasible one or the dense model's.
        """
        if options.keep is not None:
            ranks_at(options.keep)
            return options.keep
        name = "target_mb" if options.target_params is None else "target_params"
        target = getattr(options, name)
        dense, rest, full = self._line(name)
        if target >= dense:
            raise ValueError(
                f"{name}={format_size(target)} is at or above the dense model, which has"
                f" {format_size(dense)}: nothing would be compressed"
            )
        # Past a tie, where keep * parameters may come out slightly below the need.
        keep = max((target - rest) / full * (1 + 1e-12), 1e-12)
        try:
            ranks_at(keep)
        except Infeasible as error:
            smallest = math.ceil(rest + full * error.smallest)
            if name == "target_mb":
                smallest = math.ceil((rest + full * error.smallest) * 100) / 100
            raise ValueError(
                f"{name}={format_size(target)} can't be met: the smallest feasible one with this"
                f" form and rank_multiple is {format_size(smallest)}, of the dense model's"
                f" {format_size(dense)}"
                " (a smaller rank_multiple allows less)"
            ) from None
        return keep

    def _line(self, name: str) -> tuple[float, float, float]:
        """(size of the dense model, intercept, slope) in the unit of an argument: a model with the
        linears at `keep` has at most intercept + slope * keep."""
        if name == "target_params":
            return self.dense.parameters, self._rest.parameters, self.linears
        slope = self.linears * self._bytes_per_parameter
        return self.dense.bytes / MB, (self._rest.bytes + self._header) / MB, slope / MB


def format_size(number: float) -> str:
    """12_345_678 -> 12,345,678 and 80.5 -> 80.50."""
    return f"{number:,.0f}" if number == int(number) else f"{number:,.2f}"
