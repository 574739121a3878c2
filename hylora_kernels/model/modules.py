"""A model's modules: switched to eval() for a while, frozen but for the adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from hylora_kernels.layers.linear import SVDLoRALinear


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """All modules in eval(), and back to what each of them was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def freeze_all_but_adapters(model: nn.Module) -> nn.Module:
    """Make A and B of the model's SVDLoRALinears the only parameters that require grad."""
    model.requires_grad_(False)
    for layer in model.modules():
        if isinstance(layer, SVDLoRALinear) and layer.A is not None:
            layer.A.requires_grad_()
            layer.B.requires_grad_()
    return model
