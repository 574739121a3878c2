"""quantize_model(): the bits of a model's matrices, without touching a rank."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from hylora_kernels.compression.compress import compress
from hylora_kernels.compression.options import QuantizeOptions
from hylora_kernels.compression.report import CompressReport
from hylora_kernels.support.options import takes_options


@takes_options(QuantizeOptions)
def quantize_model(
    model_or_id: nn.Module | str | Path, options: QuantizeOptions
) -> tuple[nn.Module, CompressReport]:
    """Replace the matrices of a causal language model by codes of few bits, in place: compress()
    with low_rank=False.

    model_or_id: a transformers causal LM, dense or compressed, or a hub id or folder to load. The
                 factors of low-rank layers, which keep their rank, can have 8 bits or stay.

    Returns and raises what compress() does.

    Example:
        model, report = quantize_model(
            "my-org/my-model", bits=8, calibration="my.txt", samples=8, length=64
        )
        report.layers[0].bits
    """
    return compress(model_or_id, **options.for_compress())
