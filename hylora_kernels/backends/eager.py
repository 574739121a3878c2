"""The room that is always there: torch's own products (products.py), on any device, in any floating
dtype."""

from __future__ import annotations

from torch import Tensor

from hylora_kernels.backends.shared import torch_products
from hylora_kernels.backends.shared.torch_products import backward
from hylora_kernels.weights import Weights

__all__ = ["backward"]


def is_available() -> bool:
    return True


def why_not() -> str:
    """Why this room can't be used here; "" where it can."""
    return ""


def unsupported(x: Tensor, weights: Weights) -> str | None:
    """The reason why this room can't serve these tensors, in words; None where it can. It always
    can."""
    return None


def is_faster_than_next(x: Tensor, weights: Weights) -> bool:
    """Whether a call that this room can serve is faster here than in the next room: there is none
    after it."""
    return True


def forward(x: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    """x [M, K] -> (y [M, N], h_a [M, ra]); h_a before alpha."""
    return torch_products.forward(x, weights)


def forget(SVh) -> None:
    """Drop what is kept for a layer with this SVh: nothing is."""


def pack(weights: Weights) -> None:
    """What forward_packed wants, or None where this room gains nothing by packing: never."""


def forward_packed(x, packed) -> Tensor:
    raise AssertionError("the eager room packs nothing")


def rows_packed(ids, packed) -> Tensor:
    raise AssertionError("the eager room packs nothing")


def unpack(packed) -> Weights:
    raise AssertionError("the eager room packs nothing")
