"""The packing functions of a backend that packs nothing, or computes no groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from hylora_kernels.weights import Weights


def pack(weights: Weights, dtype: torch.dtype | None = None, for_group: bool = False) -> None:
    """None: packing would gain nothing."""


def forward_packed(x: Tensor, packed: object, bias: Tensor | None) -> NoReturn:
    raise AssertionError("this backend packs nothing")


def why_no_group(members: Sequence[object]) -> str:
    """The reason why these layers on one x can't be computed as one."""
    return "their backend computes each by itself"


def group(members: Sequence[object]) -> NoReturn:
    raise AssertionError("this backend computes no groups")


def forward_group(x: Tensor, group: object, biases: Sequence[Tensor | None]) -> NoReturn:
    raise AssertionError("this backend computes no groups")


def rows_packed(ids: Tensor, packed: object) -> NoReturn:
    raise AssertionError("this backend packs nothing")


def unpack(packed: object) -> NoReturn:
    raise AssertionError("this backend packs nothing")


def decoder_plan(form: object, dtype: object) -> NoReturn:
    raise AssertionError("this backend computes no decoder as a whole")
