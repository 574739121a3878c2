"""The factors of a compressed model as what finetune() trains: balanced, float32, and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm import tqdm

from hylora_kernels.layers import factors
from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.layers.quantized import QuantizedLinear
from hylora_kernels.model.modules import (
    freeze_all_but_adapters,
    holder_counts,
    unshared_layers,
)
from hylora_kernels.weights import Weights


class BalancedFactors(nn.Module):
    """x [..., K] -> y [..., N] = x right^T left^T + bias, in x's dtype; float32 products.

    left, right: U sqrt(S) [N, R] and sqrt(S) Vh [R, K] trainable parameters, float32 (float64 of a
                 float64 layer). Row i of right is as long as column i of left, so that one learning
                 rate suits both.
    bias:        that of the layer, frozen.

    R is the layer's rank with its adapter merged, min(K, N) at most: a layer that is its dense
    matrix has factors of full rank.
    """

    def __init__(self, layer: SVDLoRALinear) -> None:
        super().__init__()
        U, SVh = factors.components(_weights(layer))
        right, left = factors.balanced_adapter(SVh, U, alpha=1.0)
        wide = torch.promote_types(layer.SVh.dtype, torch.float32)
        self.left = nn.Parameter(left.to(layer.SVh.device, wide).contiguous())
        self.right = nn.Parameter(right.to(layer.SVh.device, wide).contiguous())
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(F.linear(x.to(self.right.dtype), self.right), self.left)
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    @torch.no_grad()
    def fold(self, layer: SVDLoRALinear) -> SVDLoRALinear:
        """A layer with these factors and without an adapter: rank, form, dtype, alpha and dropout
        of `layer` merged. The bias is shared."""
        U, SVh = factors.components(Weights(self.right, self.left))
        shared = {"bias": self.bias, "alpha": layer.alpha, "lora_dropout": layer.lora_dropout}
        dtype, device, rank = layer.SVh.dtype, layer.SVh.device, layer.rank + layer.lora_rank
        if layer.form == "pivoted" and (rank > layer.in_features or rank >= layer.out_features):
            made = SVDLoRALinear.from_dense((U @ SVh).to(device, dtype), **shared)
        else:
            made = SVDLoRALinear.from_product(
                U, SVh, len(SVh), form=layer.form, dtype=dtype, **shared
            ).to(device)
        return made.train(layer.training)


def starting_tensors(model: nn.Module) -> dict[str, Tensor]:
    """name -> tensor of all that balanced_factors() will train: of each layer everything but the
    bias, and the norms' weights.

    Raises ValueError if the model has no compressed layer with factors of its own, or a quantised
    one.
    """
    tensors: dict[str, Tensor] = {}
    for path, layer in unshared_layers(model).items():
        if isinstance(layer, QuantizedLinear):
            raise ValueError(
                f"train must be 'adapters' for a quantised model, got 'factors': {path} is codes"
            )
        own = layer.state_dict(keep_vars=True) | {"alpha": torch.tensor(layer.alpha)}
        tensors |= {f"{path}.{name}": t for name, t in own.items() if name != "bias"}
    if not tensors:
        raise ValueError(
            "model is dense and has no factors to train: compress() it first (factors that several "
            "modules share stay frozen)"
        )
    return tensors | {f"{path}.weight": norm.weight for path, norm in _norms(model).items()}


@contextmanager
def balanced_factors(
    model: nn.Module, progress: bool, under: str = ""
) -> Iterator[dict[str, nn.Parameter]]:
    """In the block every compressed layer of `model`, or of its module at the path `under`, is a
    BalancedFactors, and it and the weights of the norms there alone require gradients; yields
    name -> what is to be trained.

    Afterwards the layers are plain factors without adapters, of the same size and form as the old
    ones merged, and frozen. An exception puts the old layers and norms back. A norm's weight may
    be made wider in the block: the norm reads it in its own dtype.

    Layers whose factors another module holds too (a head and its low-rank embedding) stay as they
    are; an expert's layers are trained like all others.
    """
    layers, norms = _inside(unshared_layers(model), under), _inside(_norms(model), under)
    weights = {f"{path}.weight": norm.weight for path, norm in norms.items()}
    copies = {name: weight.detach().clone() for name, weight in weights.items()}
    back, made, trained = layers, {}, {}
    try:
        for path, layer in tqdm(layers.items(), "factors", unit="layer", disable=not progress):
            if layer not in made:
                made[layer] = BalancedFactors(layer)
                trained |= {f"{path}.left": made[layer].left, f"{path}.right": made[layer].right}
            model.set_submodule(path, made[layer])
        for norm in norms.values():
            dtype = _InDtype(norm.weight.dtype)
            parametrize.register_parametrization(norm, "weight", dtype, unsafe=True)
        trained |= weights
        model.requires_grad_(False)
        for parameter in trained.values():
            parameter.requires_grad_()
        yield trained
        bar = tqdm(made.items(), "plain factors", unit="layer", disable=not progress)
        folded = {layer: module.fold(layer) for layer, module in bar}
        back = {path: folded[layer] for path, layer in layers.items()}
    except BaseException:
        for name, weight in weights.items():
            weight.data.copy_(copies[name])
        raise
    finally:
        for path, layer in back.items():
            model.set_submodule(path, layer)
        for norm in norms.values():
            if parametrize.is_parametrized(norm, "weight"):
                parametrize.remove_parametrizations(norm, "weight", leave_parametrized=False)
        freeze_all_but_adapters(model)


class _InDtype(nn.Module):
    """A parametrization: the weight in a dtype that it may not be stored in."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, weight: Tensor) -> Tensor:
        return weight.to(self.dtype)


def _weights(layer: SVDLoRALinear) -> Weights:
    return Weights(layer.SVh, layer.U, layer.A, layer.B, None, layer.alpha, layer.pivots)


def _inside(modules: dict[str, Any], under: str) -> dict[str, Any]:
    """Those of the modules by path that stand in the module at the path `under`."""
    return {path: m for path, m in modules.items() if not under or path.startswith(f"{under}.")}


def _norms(model: nn.Module) -> dict[str, nn.Module]:
    """path -> module whose weight is a vector of floats, which only norms have."""
    norms, counts = {}, holder_counts(model)
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        is_vector = weight is not None and weight.dim() == 1 and weight.is_floating_point()
        if is_vector and counts[id(weight)] == 1:
            norms[path] = module
    return norms
