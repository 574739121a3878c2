"""Weights as the kernels read them, in panels: packing, and what is kept from call to call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hylora_kernels.backends.cpu.library import op
from hylora_kernels.backends.cpu.limbs import fit_limbs
from hylora_kernels.backends.shared.kept import KeptWhileUnwritten


def pack_matrix(W: Tensor) -> Tensor:
    """W [n, k] -> its panels; an empty matrix has none."""
    return op("pack")(W) if W.numel() else W.new_empty(0)


# ------------------------------------------------------------------ panels kept for the next step


class FactorPanels(NamedTuple):
    """Panels of what a call's shrink and expand products multiply by, and whether limbs hold it."""

    shrink: Tensor
    expand: Tensor
    fit_limbs: bool


@dataclass(slots=True)
class KeptPanels:
    """Panels of one layer's SVh and U."""

    backward: FactorPanels
    forward: FactorPanels | None = None


def fingerprint(matrix: Tensor) -> int:
    """A number that differs after any write to the matrix, but for a chance of 2^-64."""
    return op("fingerprint")(matrix)


kept_panels: KeptWhileUnwritten[KeptPanels] = KeptWhileUnwritten(fingerprint=fingerprint)


def forget(SVh: Tensor) -> None:
    """Drop the panels kept for a layer with this SVh."""
    kept_panels.forget(SVh)


def panels_forward(SVh: Tensor, U: Tensor) -> FactorPanels:
    """Panels of SVh and U. They are kept only after a backward: a model that is only run forward
    holds nothing but its factors."""
    kept = kept_panels.get(SVh, U)
    if kept is not None and kept.forward is not None:
        return kept.forward
    fit = fit_limbs(SVh.dtype, (SVh, 1), (U, 1))
    panels = FactorPanels(pack_matrix(SVh), pack_matrix(U), fit)
    if kept is not None:
        kept.forward = panels
    return panels


def panels_backward(SVh: Tensor, U: Tensor) -> FactorPanels:
    """Panels of U^T and SVh^T, kept for the next step."""
    kept = kept_panels.get(SVh, U)
    if kept is not None:
        return kept.backward
    fit = fit_limbs(SVh.dtype, (U, 0), (SVh, 0))
    panels = FactorPanels(pack_matrix(U.T), pack_matrix(SVh.T), fit)
    kept_panels.keep(KeptPanels(panels), SVh, U)
    return panels


# --------------------------------------------------------------------------------- the pivot table


class PivotTable(NamedTuple):
    """The pivoted form's outputs as the kernels need them.

    table:   cpu_pivot_table's result.
    outputs: int64, the outputs sorted: pivots, N (no output) up to a multiple of 32, others.
    """

    table: Tensor
    outputs: Tensor

    def others(self, rank: int) -> Tensor:
        """int64 [N - r], ascending."""
        return self.outputs[rank + -rank % 32 :]

    def sort_rows(self, B: Tensor) -> Tensor:
        """B [N, ra] -> its rows in this order, with zeros for "no output"."""
        return torch.cat((B, B.new_zeros(1, B.shape[1]))).index_select(0, self.outputs)


# pivots -> (N, PivotTable)
_tables: KeptWhileUnwritten[tuple[int, PivotTable]] = KeptWhileUnwritten(compares_copies=True)


def pivot_table(pivots: Tensor, out_features: int) -> PivotTable:
    """Raises ValueError unless pivots are strictly ascending within [0, out_features)."""
    kept = _tables.get(pivots)
    if kept is not None and kept[0] == out_features:
        return kept[1]
    try:
        table = op("pivot_table")(pivots, out_features)
    except RuntimeError as error:
        raise ValueError(_pivots_error(pivots, out_features)) from error
    is_other = torch.ones(out_features, dtype=torch.bool, device=pivots.device)
    is_other[pivots.long()] = False
    padding = pivots.new_full((-len(pivots) % 32,), out_features, dtype=torch.int64)
    outputs = torch.cat((pivots.long(), padding, is_other.nonzero().squeeze(1)))
    result = PivotTable(table, outputs)
    _tables.keep((out_features, result), pivots)
    return result


def _pivots_error(pivots: Tensor, out_features: int) -> str:
    wanted, values = f"must be strictly ascending within [0, {out_features})", pivots.tolist()
    if len(values) <= 32:
        return f"pivots {wanted}, got {values}"
    return (
        f"pivots {wanted}, got {len(values)} values from {values[0]} to {values[-1]} that are not"
    )
