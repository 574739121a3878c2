"""Parts of both GPU backends: when one launch beats the torch products, the device, its guard."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import replace

import torch

from hylora_kernels.weights import Weights


def one_launch_is_faster(rows: int, factor_bytes: int, lora_rank: int) -> bool:
    """True where one launch serves a forward faster than the torch products do.

    Measured on an H100 with the Triton launch, captured in a CUDA graph. Without an adapter one
    launch replaces two products: 7.6 us against 10.0 at K = N = 2048, M = 1, 9.3 against 9.8 at
    M = 16, but 27 against 25 at 4096 x 11008 and rank 1568, whose factors are 47 MB. With one it
    replaces four: 10 us against 17 at 2048 x 2048, 28 against 34 at 4096 x 11008, M = 64 at most.
    """
    is_small = factor_bytes < 32e6
    saves_one_launch = lora_rank == 0 and is_small and rows <= 16
    saves_three_launches = lora_rank > 0 and rows <= 64
    return saves_one_launch or saves_three_launches


def rows_of_one_launch(factor_bytes: int) -> int:
    """The most rows for which one C++ launch serves a plain call of a packed layer faster than two
    torch products do.

    Called one by one the host is the limit. Beside an H200 the launch costs it 31 us, one product
    26 (nn.Linear). A launch that reads 64 MB runs for about as long.
    """
    return 64 if factor_bytes < 64e6 else 0


def adapter_gradients_launch_is_faster(rows: int, in_features: int, out_features: int) -> bool:
    """True where one launch for dA, dB and db is faster than torch's three operations.

    On an H100 with the Triton launch, ra = 32, in us: K = N = 2048, M = 2048 15 against 22;
    N = 5632 26 against 30; 4096 x 11008, M = 8192 196 against 174.
    """
    return rows * (in_features + out_features) <= 2**26


def alpha_in_B_of_float16(weights: Weights) -> Weights:
    """The weights that a launch's forward takes: it stores alpha x A^T in their dtype, and a large
    alpha takes that beyond float16's range where y is inside."""
    if weights.B is None or weights.B.dtype != torch.float16 or abs(weights.alpha) <= 1:
        return weights
    return replace(weights, B=weights.alpha * weights.B, alpha=1.0)


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Make `device` the current one, which a kernel launch uses, if it is another GPU's."""
    is_current = device.type != "cuda" or device.index == torch.cuda.current_device()
    return contextlib.nullcontext() if is_current else torch.cuda.device(device)


def is_captured(device: torch.device) -> bool:
    """True while a CUDA graph is captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@functools.cache
def target_of(device: torch.device) -> tuple[int, int]:
    """(multiprocessors, architecture as in sm_90)."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, 10 * properties.major + properties.minor
