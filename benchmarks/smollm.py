"""SmolLM2-135M, dense, and compressed without an SVD: every linear gets random pivoted factors of
the largest rank at keep 0.6. Times don't depend on the values."""

from __future__ import annotations

import pytest
import torch
from layers import Shape, kept_rank, random_factors
from torch import nn

from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.model import load as models
from hylora_kernels.model.structure import linears

KEEP = 0.6


def dense(dtype: torch.dtype) -> nn.Module:
    """The model as it comes; the test is skipped where its package is missing."""
    try:
        return models.load_model(models.DEMO_MODEL, "cpu", dtype)[0]
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


def compressed(dtype: torch.dtype, lora_rank: int = 0) -> nn.Module:
    """The model at KEEP; the rank includes the adapter's, so `keep` holds with and without one."""
    model = dense(dtype)
    for seed, (path, linear) in enumerate(linears(model).items()):
        K, N = linear.in_features, linear.out_features
        shape = Shape(K, N, kept_rank(K, N, KEEP, "pivoted") - lora_rank, lora_rank)
        SVh, U, A, B, _, alpha, pivots = random_factors(shape, dtype, "pivoted", seed)
        layer = SVDLoRALinear.from_factors(SVh, U, A, B, linear.bias, alpha, pivots)
        model.set_submodule(path, layer.eval())
    return model.requires_grad_(False)
