"""The replacement of a model's matrices by smaller ones: the only step that changes the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hylora_kernels.compression.embedding import holders
from hylora_kernels.compression.factors import Factors
from hylora_kernels.compression.options import AS_IS, CompressOptions
from hylora_kernels.compression.quantize import quantize, quantize_weights
from hylora_kernels.compression.ranks import DENSE, Choice, adapter_rank
from hylora_kernels.compression.report import LayerReport
from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.layers.quantized import QuantizedEmbedding, QuantizedLinear, dense_weights
from hylora_kernels.model.structure import Target, as_matrix
from hylora_kernels.weights import QuantizedMatrix, Weights


def replace_linear(
    model: nn.Module,
    target: Target,
    factors: Factors | None,
    choice: Choice,
    refitted: Tensor | None,
    codes: QuantizedMatrix | None,
    options: CompressOptions,
    seed: int,
) -> LayerReport:
    """Put an SVDLoRALinear in the place of `target`, unless its rank is DENSE, and a
    QuantizedLinear in the place of either, unless its bits are AS_IS.

    factors:  None for a linear that keeps its rank and has none.
    choice:   its rank is r + ra: the first r components of the factors are the base, the next ra
              the adapter.
    refitted: float32, U [N, rank] ([N, r] under init="classic") instead of the factors' own, or
              the weight [N, K] of a linear left dense; None where nothing was refitted.
    codes:    of the dense matrix; None rounds it or the layer's factors to nearest.
    seed:     of a classic adapter.
    """
    N, K = target.shape
    rank, bits = choice
    in_nats = options.method == "two_sided"
    damping = (0.0, 0.0) if factors is None else factors.damping
    report = LayerReport(target.path, N, K, rank, 0, N * K, N * K, 0.0, 0.0, damping, bits=bits)
    report.predicted_loss = 0.0 if in_nats else None
    if isinstance(target.module, SVDLoRALinear):
        _describe(report, target.module)
    elif rank != DENSE:
        assert factors is not None, "a rank is cut from factors"
        layer = _cut(target, factors, rank, refitted, options, seed)
        model.set_submodule(target.path, layer)
        _describe(report, layer)
        at_start = layer.rank if options.init == "classic" else rank
        report.lost_energy = factors.lost_energy(at_start)
        report.predicted_loss = factors.dropped(at_start) if in_nats else None
    elif refitted is not None:
        target.matrix.copy_(refitted)
    if bits != AS_IS:
        _quantize(model, target.path, bits, codes, options.rounding)
    return report


def replace_table(
    model: nn.Module, target: Target, choice: Choice, codes: QuantizedMatrix | None, in_nats: bool
) -> LayerReport:
    """Put a QuantizedEmbedding, a QuantizedLinear or, for tied ones, both on the same codes in the
    places of an embedding and an output head, unless the bits are AS_IS."""
    V, d = target.shape
    report = LayerReport(target.path, V, d, DENSE, 0, V * d, V * d, 0.0, 0.0, (0.0, 0.0))
    report.bits, report.predicted_loss = choice.bits, 0.0 if in_nats else None
    if codes is None:
        return report
    weight, training = target.module.weight, target.module.training
    places = holders(model, weight)
    bias = getattr(model.get_submodule(places[-1]), "bias", None)  # An embedding has none.
    made: tuple[nn.Module, ...] = QuantizedEmbedding.tied_pair(codes, bias, weight.dtype)
    if not isinstance(target.module, nn.Embedding):
        made = made[1:]
    for path, module in zip(places, made, strict=False):  # Of an untied model the first alone.
        model.set_submodule(path, module.to(weight.device).train(training))
    return report


def _cut(
    target: Target,
    factors: Factors,
    rank: int,
    refitted: Tensor | None,
    options: CompressOptions,
    seed: int,
) -> SVDLoRALinear:
    linear: Any = target.module
    lora_rank = adapter_rank(rank, options.lora_rank)
    layer = SVDLoRALinear.from_product(
        factors.U[:, :rank] if refitted is None else refitted,
        factors.SVh[:rank],
        rank - lora_rank,
        lora_rank,
        bias=linear.bias,
        dtype=linear.weight.dtype,
        form=options.form,
        init=options.init,
        seed=seed,
    )
    return layer.to(linear.weight.device).train(linear.training)


def _describe(report: LayerReport, layer: SVDLoRALinear) -> None:
    report.lora_rank = layer.lora_rank
    report.parameters = layer.parameter_count()
    report.parameters_as_is = layer.parameter_count(merged=False)
    if layer.form == "pivoted" and layer.U.numel():
        report.largest_coefficient = float(layer.U.abs().max())


def _quantize(
    model: nn.Module, path: str, bits: int, codes: QuantizedMatrix | None, rounding: str
) -> None:
    """Put a QuantizedLinear in the place of a linear or of a low-rank layer."""
    module: Any = model.get_submodule(path)
    if isinstance(module, SVDLoRALinear):
        weights, dtype = factors_in(module, bits, rounding), module.SVh.dtype
    else:
        matrix = as_matrix(module)
        codes = quantize(matrix, bits, method="rtn") if codes is None else codes
        weights, dtype = dense_weights(codes, module.bias, matrix.dtype), matrix.dtype
    layer = QuantizedLinear.from_weights(weights, dtype=dtype)
    device = module.SVh.device if isinstance(module, SVDLoRALinear) else module.weight.device
    model.set_submodule(path, layer.to(device).train(module.training))


def factors_in(layer: SVDLoRALinear, bits: int, rounding: str) -> Weights:
    """A low-rank layer's weights, its factors in `bits` bits."""
    m = layer
    given = Weights(m.SVh, m.U, m.A, m.B, m.bias, m.alpha, m.pivots)
    with torch.no_grad():
        return quantize_weights(given, bits, method=rounding)
