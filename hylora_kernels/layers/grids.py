"""The grids of numbers that groups of weights are rounded to, and rounding to nearest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hylora_kernels import reference
from hylora_kernels.weights import GROUP, QuantizedMatrix

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # Shares of a group's range that a grid may span,
MOST_CLIPPED_BITS = 5  # up to this width: a grid of 64 levels gains nothing by clipping.
LEAST_SCALE = 2.0**-24  # float16's smallest number above 0.


@dataclass(frozen=True)
class Grid:
    """The numbers that each group of 64 weights may become: scale * (code - zero).

    scales: float32 [n, G], rounded to float16.
    zeros:  float32 [n, G], integers.
    top:    the largest code.
    """

    scales: Tensor
    zeros: Tensor
    top: int

    @property
    def span(self) -> tuple[Tensor, Tensor, Tensor]:
        """scales, and the least and the largest of code - zero, [n, G]."""
        return self.scales, -self.zeros, self.top - self.zeros

    def nearest(self, W: Tensor) -> Tensor:
        """W float32 [n, k] -> the codes uint8 [n, k] of the grid's nearest numbers."""
        group = torch.arange(W.shape[1], device=W.device) // GROUP
        scales, least, largest = (t[:, group] for t in self.span)
        return (W / scales).round_().clamp_(least, largest).sub_(least).to(torch.uint8)

    def where(self, chosen: Tensor, other: Grid) -> Grid:
        """This grid in the groups that are `chosen`, bool [n, G], the other one elsewhere."""
        pairs = ((self.scales, other.scales), (self.zeros, other.zeros))
        return Grid(*(torch.where(chosen, *pair) for pair in pairs), self.top)


def find_grid(W: Tensor, bits: int, weights: Tensor | None, clip: bool) -> Grid:
    """W float32 [n, k] -> the grid of each group that holds its range, or with `clip` the share of
    it that rounds with the least error, columns weighted by `weights` [k].

    Every grid has a 0. Raises ValueError for a range beyond float16 scales.
    """
    X = F.pad(W, (0, -W.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    low, high = X.amin(-1).clamp_max(0), X.amax(-1).clamp_min(0)
    if bits == 8:
        scales = _scales(torch.maximum(high, -low), 127, bits)
        return Grid(scales, torch.full_like(scales, 128), 255)
    best = _grid(low, high, 1.0, bits)
    if not clip or bits > MOST_CLIPPED_BITS:
        return best
    root = torch.ones_like(W[0]) if weights is None else weights.sqrt()
    root = F.pad(root, (0, -len(root) % GROUP)).reshape(-1, GROUP)
    least = _rounding_error(X, best, root)
    for share in CLIPS[1:]:
        tried = _grid(low, high, share, bits)
        errors = _rounding_error(X, tried, root)
        best = tried.where(errors < least, best)
        least = torch.minimum(errors, least)
    return best


def _grid(low: Tensor, high: Tensor, share: float, bits: int) -> Grid:
    top = 2**bits - 1
    scales = _scales((high - low) * share, top, bits)
    return Grid(scales, (-share * low / scales).round().clamp(0, top), top)


def _scales(span: Tensor, steps: int, bits: int) -> Tensor:
    scales = (span / steps).half().float()
    if not scales.isfinite().all():
        raise ValueError(
            f"W: a group spans {float(span.max()):.3g}, and scales of {bits} bits are float16:"
            f" at most {65504.0 * steps:.3g}"
        )
    return scales.clamp_min(LEAST_SCALE)


def _rounding_error(X: Tensor, grid: Grid, root: Tensor) -> Tensor:
    """X [n, G, 64], root of the columns' weights [G, 64] -> the squared error of each group."""
    scales, least, largest = (t[..., None] for t in grid.span)
    exact = X / scales
    error = exact.round().clamp_(least, largest).sub_(exact).mul_(root)
    return error.square_().sum(-1) * grid.scales.square()


def requantized(W: Tensor, bits: int, old: QuantizedMatrix | None = None) -> QuantizedMatrix:
    """W [n, k] in `bits` bits, each weight rounded to the nearest number of its group's grid.

    old: a matrix of the same shape and bits. Each group keeps its old grid or gets a new one,
         whichever is nearer: a weight that stayed as it was then keeps its code.
    """
    W = W.detach().float()
    grid = find_grid(W, bits, None, clip=True)
    if old is not None:
        before = Grid(old.scales.float(), reference.zero_points(old).float(), 2**bits - 1)
        groups = F.pad(W, (0, -W.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
        errors = [_rounding_error(groups, g, torch.ones_like(groups[0])) for g in (before, grid)]
        grid = before.where(errors[0] <= errors[1], grid)
    zeros = None if bits == 8 else grid.zeros.to(torch.uint8)
    return reference.quantized(grid.nearest(W), grid.scales, zeros, bits)
