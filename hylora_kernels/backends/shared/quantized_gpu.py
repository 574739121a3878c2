"""The C++ launch for up to 16 rows of x and a quantised matrix on a GPU (csrc/cuda/quantized.h)."""

from __future__ import annotations

from torch import Tensor

from hylora_kernels.backends.shared import packed_gpu
from hylora_kernels.backends.shared.library import op_or_none

LAUNCHED_ROWS = 16  # the most of x: csrc/cuda/call.h

LAUNCH = op_or_none("cuda_quantized")


def target_for(x: Tensor, *others: Tensor | None) -> tuple[int, int] | None:
    """The (multiprocessors, architecture) of the launch that serves x [..., K] and others, such as
    a bias; None where none does."""
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    if not 1 <= rows <= LAUNCHED_ROWS or x.dtype not in packed_gpu.HALVES or LAUNCH is None:
        return None
    for tensor in others:
        if tensor is not None and not (tensor.dtype == x.dtype and tensor.is_contiguous()):
            return None
    return packed_gpu.kernels_target(x.device)
