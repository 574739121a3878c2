"""The backend that serves everything: torch products on any device, in any floating dtype."""

from __future__ import annotations

from torch import Tensor

from hylora_kernels.backends.shared import torch_products
from hylora_kernels.backends.shared.torch_products import backward
from hylora_kernels.backends.shared.unpacked import (
    decoder_plan,
    forward_group,
    forward_packed,
    group,
    pack,
    rows_packed,
    unpack,
    why_no_group,
)
from hylora_kernels.weights import Weights

__all__ = [
    "backward",
    "decoder_plan",
    "forward_group",
    "forward_packed",
    "group",
    "pack",
    "rows_packed",
    "unpack",
    "why_no_group",
]


def is_available() -> bool:
    return True


def why_not() -> str:
    """The reason why this backend can't be used here, "" where it can."""
    return ""


def unsupported(x: Tensor, weights: Weights) -> str | None:
    """The reason why this backend can't serve these tensors: None, it serves all."""
    return None


def is_faster_than_next(x: Tensor, weights: Weights) -> bool:
    """Whether this backend is faster than the next one: there is none after it."""
    return True


def forward(x: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    """x [M, K] -> (y [M, N], h_a [M, ra] before alpha)."""
    return torch_products.forward(x, weights)


def forget(SVh: Tensor) -> None:
    """Drop what is kept for a layer with this SVh: nothing is."""
