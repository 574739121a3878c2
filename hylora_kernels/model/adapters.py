"""Adapters on a whole model: added to dense linears, folded into compressed ones and renewed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from hylora_kernels.layers import factors
from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.layers.quantized import QuantizedLinear
from hylora_kernels.model.check import check_model
from hylora_kernels.model.coverage import body_parameters, skipped_parameters, warn_if_little
from hylora_kernels.model.modules import (
    freeze_all_but_adapters,
    keep_unscaled,
    parameter_count,
    unshared_layers,
)
from hylora_kernels.model.saving import save_in_hylora_format
from hylora_kernels.model.structure import as_matrix, select
from hylora_kernels.support.console import format_bytes, table
from hylora_kernels.support.report import Report
from hylora_kernels.weights import Weights

if TYPE_CHECKING:
    from rich.table import Table

LORA_RANKS = (4, 8, 16, 32, 64)
_log = logging.getLogger(__name__)


def add_adapters(
    model: nn.Module,
    lora_rank: int = 64,
    alpha: float = 1.0,
    lora_dropout: float = 0.0,
    include: list[str] | None = None,
    exclude: list[str] | None = None,
    seed: int = 0,
) -> nn.Module:
    """Give linears a trainable adapter on their dense weight (plain LoRA, arXiv:2106.09685), in
    place; returns the model.

    lora_rank:        rank ra of A [ra, K], random by `seed`, and B [N, ra], zero.
    alpha:            the scale of the adapter. lora_dropout: on the adapter's input in training.
    include, exclude: regular expressions searched in the path; by default all linears but the
                      output head.

    The dense weight, which is shared and not copied, becomes a pivoted base of rank N, so the
    adapter runs through the same op as after compress(). A weight that is codes stays so (QLoRA,
    arXiv:2305.14314). All else is frozen. Stacks of experts get no adapter; a warning comes where
    the linears are under half of the body. Raises ValueError for a lora_rank below 1 or a model
    that has been compressed to factors or has adapters already.

    Example:
        model = add_adapters(model, lora_rank=4)
    """
    if lora_rank < 1:
        raise ValueError(f"lora_rank must be at least 1, got {lora_rank}")
    check_model(model, "adapt")
    keep_unscaled(model)
    targets, reasons = select(model, include, exclude)
    for path, linear in targets.items():
        if isinstance(linear, SVDLoRALinear) and not _is_dense_codes(linear):
            raise ValueError(
                f"model must be dense to take adapters, but its layer {path} is an SVDLoRALinear"
            )
    warn_if_little(
        sum(as_matrix(linear).numel() for linear in targets.values()),
        body_parameters(model),
        skipped_parameters(model, targets, reasons),
    )
    for index, (path, linear) in enumerate(targets.items()):
        kind: dict[str, Any] = {"alpha": alpha, "lora_dropout": lora_dropout, "seed": seed + index}
        if isinstance(linear, QuantizedLinear):
            layer: SVDLoRALinear = linear.with_adapter(lora_rank, **kind)
        else:
            bias = getattr(linear, "bias", None)
            layer = SVDLoRALinear.from_dense(as_matrix(linear), lora_rank, bias=bias, **kind)
        model.set_submodule(path, layer.train(linear.training))
    return save_in_hylora_format(freeze_all_but_adapters(model))


def renew_adapters(model: nn.Module, lora_rank: int = 64, seed: int = 0) -> nn.Module:
    """Give the merged layers of a compressed model a trainable adapter again, in place; returns it.

    lora_rank: rank ra of A and B. They are made of the layer's last ra singular components (of all
               but the first, if it has no more), as compress() makes them of the next ones: the
               model has as many parameters when they are merged, and computes the same up to
               rounding. A layer that is its dense matrix or codes gets A random by `seed` and B
               zero.

    Layers that share a factor, as a head with a low-rank embedding, get none: it would be theirs no
    more. All else is frozen. Raises ValueError for a lora_rank below 1 or a layer that has an
    adapter.
    """
    if lora_rank < 1:
        raise ValueError(f"lora_rank must be at least 1, got {lora_rank}")
    check_model(model, "train")
    for path, layer in model.named_modules():
        if isinstance(layer, SVDLoRALinear) and layer.lora_rank:
            raise ValueError(f"model must be merged to get new adapters, but {path} has one")
    renewed: dict[int, SVDLoRALinear] = {}
    for index, (path, layer) in enumerate(unshared_layers(model).items()):
        if id(layer) not in renewed:
            renewed[id(layer)] = _with_adapter(layer, lora_rank, seed + index)
        model.set_submodule(path, renewed[id(layer)])
    return save_in_hylora_format(freeze_all_but_adapters(model))


def _with_adapter(layer: SVDLoRALinear, lora_rank: int, seed: int) -> SVDLoRALinear:
    """A layer that computes the same, with an adapter; the bias is shared."""
    if isinstance(layer, QuantizedLinear):
        return layer.with_adapter(lora_rank, lora_dropout=layer.lora_dropout, seed=seed)
    shared: dict[str, Any] = {"bias": layer.bias, "lora_dropout": layer.lora_dropout, "seed": seed}
    if layer.form == "pivoted" and layer.rank == layer.out_features:
        made = SVDLoRALinear.from_dense(layer.SVh, lora_rank, **shared)
    else:
        U, SVh = factors.components(Weights(layer.SVh, layer.U, pivots=layer.pivots))
        adapter = min(lora_rank, layer.rank - 1)
        made = SVDLoRALinear.from_product(
            U, SVh, layer.rank - adapter, adapter, form=layer.form, dtype=layer.SVh.dtype, **shared
        ).to(layer.SVh.device)
    return made.train(layer.training)


def _is_dense_codes(layer: SVDLoRALinear) -> bool:
    is_dense = layer.form == "pivoted" and layer.rank == layer.out_features
    return isinstance(layer, QuantizedLinear) and is_dense and not layer.lora_rank


def merge_adapters(model: nn.Module, requantize: bool = True) -> nn.Module:
    """Fold every adapter into its base, exactly, in place (SVDLoRALinear.merge); returns the model.

    requantize: a base of codes is rounded again, and a line of the log says with which errors
                (QuantizedLinear.merge_error); False leaves such a layer its adapter.

    Example:
        model = merge_adapters(load_pretrained("my-folder"))
    """
    errors = {}
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            had_adapter = module.lora_rank > 0
            module.merge(requantize)
            if had_adapter and requantize:
                errors[path] = module.merge_error or 0.0
        elif isinstance(module, SVDLoRALinear):
            module.merge()
    log_rounding(errors)
    return model


def log_rounding(errors: dict[str, float]) -> None:
    """Log what rounding quantised layers again has cost. errors: path -> its merge_error."""
    if not errors:
        return
    worst = max(errors, key=errors.__getitem__)
    _log.warning(
        "rounded %d layers to their bits again, relative error %.3f on average, at most %.3f (%s)",
        *(len(errors), sum(errors.values()) / len(errors), errors[worst], worst),
    )


@dataclass
class LoraSize(Report):
    """Adapters of one rank on all linears. share: of the model's parameters. bytes: in the dtype of
    each linear."""

    rank: int
    parameters: int
    share: float
    bytes: int


@dataclass
class LoraSizes(Report):
    """linears: how many get an adapter. model: the parameters of the model as it is."""

    linears: int
    model: int
    ranks: list[LoraSize]

    def render(self) -> Table:
        rows = [
            (str(size.rank), size.parameters, f"{size.share:.3%}", format_bytes(size.bytes))
            for size in self.ranks
        ]
        title = f"LoRA on {self.linears} linears of a model of {self.model:,} parameters"
        return table(title, ("rank", "parameters", "of the model", "bytes"), rows)


def lora_sizes(
    model: nn.Module,
    ranks: Sequence[int] = LORA_RANKS,
    include: list[str] | None = None,
    exclude: list[str] | None = None,
) -> LoraSizes:
    """The size of a LoRA by its rank: r (K + N) parameters for each linear [N, K] that add_adapters
    or PEFT's "all-linear" would take, in a model as it is, dense or compressed.

    include, exclude: as for add_adapters. Raises ValueError for a rank below 1.

        print(lora_sizes(load_pretrained("small")))
    """
    check_model(model, "generate")
    if not ranks or min(ranks) < 1:
        raise ValueError(f"ranks must be one or more ints of at least 1, got {list(ranks)}")
    targets = select(model, include, exclude)[0].values()
    total = parameter_count(model)
    per_rank = wide = 0
    for linear in targets:
        if isinstance(linear, SVDLoRALinear):
            features, dtype = linear.out_features + linear.in_features, linear.SVh.dtype
        else:
            W = as_matrix(linear)
            features, dtype = sum(W.shape), W.dtype
        per_rank, wide = per_rank + features, wide + features * dtype.itemsize
    sizes = [LoraSize(r, r * per_rank, r * per_rank / max(total, 1), r * wide) for r in ranks]
    return LoraSizes(len(targets), total, sizes)
