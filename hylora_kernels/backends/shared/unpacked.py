"""The packing functions of a backend that packs nothing: its kernels read the weights in place."""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor

from hylora_kernels.weights import Weights


def pack(weights: Weights) -> None:
    """None: packing would gain nothing."""


def forward_packed(x: Tensor, packed: object, bias: Tensor | None) -> NoReturn:
    raise AssertionError("this backend packs nothing")


def rows_packed(ids: Tensor, packed: object) -> NoReturn:
    raise AssertionError("this backend packs nothing")


def unpack(packed: object) -> NoReturn:
    raise AssertionError("this backend packs nothing")
