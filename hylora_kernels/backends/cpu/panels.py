"""Weights as the kernels read them, in panels: packing, and what is kept from call to call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from hylora_kernels.backends.cpu.library import op
from hylora_kernels.backends.cpu.limbs import fit_limbs


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
class Kept:
    """Panels of one (SVh, U), valid while `stamp` and `sample` still describe the two."""

    U: TensorWeakRef
    stamp: tuple
    sample: tuple[Tensor, ...]
    backward: FactorPanels
    forward: FactorPanels | None = None


# SVh -> Kept, while SVh lives. Single operations on it are atomic. Two threads that find nothing
# both pack, and store the same values.
kept_panels = WeakTensorKeyDictionary()


def forget(SVh: Tensor) -> None:
    """Drop the panels kept for a layer with this SVh."""
    kept_panels.pop(SVh, None)


def panels_forward(SVh: Tensor, U: Tensor) -> FactorPanels:
    """Panels of SVh and U. They are kept only after a backward: a model that is only run forward
    holds nothing but its factors."""
    kept = _lookup(SVh, U)
    if kept is not None and kept.forward is not None:
        return kept.forward
    fit = fit_limbs(SVh.dtype, (SVh, 1), (U, 1))
    panels = FactorPanels(pack_matrix(SVh), pack_matrix(U), fit)
    if kept is not None:
        kept.forward = panels
    return panels


def panels_backward(SVh: Tensor, U: Tensor) -> FactorPanels:
    """Panels of U^T and SVh^T, kept for the next step."""
    kept = _lookup(SVh, U)
    if kept is not None:
        return kept.backward
    fit = fit_limbs(SVh.dtype, (U, 0), (SVh, 0))
    panels = FactorPanels(pack_matrix(U.T), pack_matrix(SVh.T), fit)
    if not (SVh.is_inference() or U.is_inference()):  # these have no version that counts writes
        sample = tuple(_sample(t).clone() for t in (SVh, U))
        kept_panels[SVh] = Kept(TensorWeakRef(U), _stamp(SVh, U), sample, panels)
    return panels


def _lookup(SVh: Tensor, U: Tensor) -> Kept | None:
    kept = kept_panels.get(SVh)
    if kept is None or kept.U() is not U or kept.stamp != _stamp(SVh, U):
        return None
    # Writes through .data leave no trace in the version, so some numbers are compared.
    same = all(torch.equal(_sample(t), old) for t, old in zip((SVh, U), kept.sample, strict=True))
    return kept if same else None


def _stamp(*tensors: Tensor) -> tuple:
    return tuple((t._version, t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors)


def _sample(matrix: Tensor) -> Tensor:
    """At most 15 x 15 numbers from all over the matrix, as a view."""
    return matrix[:: max(1, matrix.shape[0] // 8), :: max(1, matrix.shape[1] // 8)]


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


# pivots -> (its version or a copy, N, PivotTable), while it lives and isn't written to.
_tables = WeakTensorKeyDictionary()


def pivot_table(pivots: Tensor, out_features: int) -> PivotTable:
    """Raises ValueError unless pivots are strictly ascending within [0, out_features)."""
    kept = _tables.get(pivots)
    if kept is not None and kept[1] == out_features and _unwritten(pivots, kept[0]):
        return kept[2]
    try:
        table = op("pivot_table")(pivots, out_features)
    except RuntimeError as error:
        raise ValueError(_pivots_error(pivots, out_features)) from error
    is_other = torch.ones(out_features, dtype=torch.bool)
    is_other[pivots.long()] = False
    padding = torch.full((-len(pivots) % 32,), out_features)
    outputs = torch.cat((pivots.long(), padding, is_other.nonzero().squeeze(1)))
    stamp = pivots.clone() if pivots.is_inference() else pivots._version
    _tables[pivots] = (stamp, out_features, PivotTable(table, outputs))
    return PivotTable(table, outputs)


def _unwritten(pivots: Tensor, stamp: int | Tensor) -> bool:
    return torch.equal(pivots, stamp) if pivots.is_inference() else pivots._version == stamp


def _pivots_error(pivots: Tensor, out_features: int) -> str:
    wanted, values = f"must be strictly ascending within [0, {out_features})", pivots.tolist()
    if len(values) <= 32:
        return f"pivots {wanted}, got {values}"
    return (
        f"pivots {wanted}, got {len(values)} values from {values[0]} to {values[-1]} that are not"
    )
