"""The GPU backend in Triton: both products of a layer in one launch, or torch's own products where
those are faster.

kernels.py has the kernels, launch.py their workspace and arguments, config.py the tile sizes,
dispatch.py the choice for a call. With TRITON_INTERPRET=1 in the environment the backend serves
tensors on the CPU, in Triton's interpreter: slow, and right in float32 and float16.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hylora_kernels.backends.shared import group_gpu, packed_gpu
from hylora_kernels.backends.shared import torch_products as shared_products
from hylora_kernels.backends.shared.backward import backward as shared_backward
from hylora_kernels.backends.shared.gpu import on_device
from hylora_kernels.backends.shared.tracing import assume_constant_result
from hylora_kernels.backends.shared.unpacked import decoder_plan
from hylora_kernels.backends.triton import dispatch, groups, torch_products
from hylora_kernels.backends.triton.config import (
    BACKWARD,
    FORWARD,
    TORCH_PRODUCTS,
    Problem,
)
from hylora_kernels.backends.triton.dispatch import forcing
from hylora_kernels.backends.triton.quantized import groups as quantized_groups
from hylora_kernels.backends.triton.quantized import packed as quantized
from hylora_kernels.backends.triton.quantized.groups import PackedQuantizedGroup
from hylora_kernels.backends.triton.quantized.packed import PackedQuantizedLayer
from hylora_kernels.weights import Needs, Saved, Weights

__all__ = ["decoder_plan", "forcing"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Triton's interpreter multiplies the bits of bfloat16 as if they were integers (3.6 to 3.9).
INTERPRETED_DTYPES = (torch.float32, torch.float16)
INSTALLED = importlib.util.find_spec("triton") is not None
OLDEST_ARCH = 80  # with bf16 tensor cores and asynchronous copies
MOST = 2**31  # numbers in a weight: what 32-bit indices reach


def is_available() -> bool:
    return not why_not()


def why_not() -> str:
    """The reason why this backend can't be used here; "" if it can."""
    if not INSTALLED:
        return "triton is not installed: pip install triton (it comes with torch's CUDA builds)"
    if _interpreted() or torch.cuda.is_available():
        return ""
    return "no CUDA device; TRITON_INTERPRET=1 in the environment lets a CPU play one"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def unsupported(x: Tensor, weights: Weights) -> str | None:
    """The reason why this backend can't serve these tensors; None if it can."""
    wanted = "cpu" if _interpreted() else "cuda"
    if x.device.type != wanted or not INSTALLED:
        interpreter = ", TRITON_INTERPRET=1 being set" if wanted == "cpu" else ""
        return why_not() or f"serves tensors on {wanted}{interpreter}, got {x.device}"
    if x.dtype not in DTYPES:
        return f"serves float32, bfloat16 and float16, got {x.dtype}"
    if wanted == "cpu" and x.dtype not in INTERPRETED_DTYPES:
        return f"serves float32 and float16 in Triton's interpreter, got {x.dtype}"
    if wanted == "cuda" and (reason := _device_lacks(x.device)):
        return reason
    if weights.is_empty:
        SVh, U = weights.SVh, weights.U
        return f"serves no empty factors, got SVh {list(SVh.shape)} and U {list(U.shape)}"
    if max(weights.SVh.shape.numel(), weights.U.shape.numel()) >= MOST:
        got = list(weights.U.shape)
        return f"serves factors of less than {MOST} numbers, got U {got}"
    return None


@assume_constant_result  # compiled code serves the device that it was compiled for
def _device_lacks(device: torch.device) -> str:
    target = dispatch.target_of(device)
    if target.kind == "cuda" and target.arch < OLDEST_ARCH:
        return f"serves GPUs from sm_{OLDEST_ARCH} on, got sm_{target.arch}"
    return ""


def is_faster_than_next(x: Tensor, weights: Weights) -> bool:
    """True if this backend serves a call faster than the next one: always on a GPU, where each call
    takes the fastest way, never in the interpreter."""
    return x.device.type == "cuda"


# ----------------------------------------------------------------------------- forward and backward


def forward(x: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    """x [M, K] -> (y [M, N], h_a [M, ra]); h_a before alpha."""
    problem = _problem(x, weights, FORWARD)
    is_first = dispatch.is_first_call(problem, x.device)
    with on_device(x.device):
        return _by_choice(
            dispatch.config_for,
            lambda config: _launch().forward(x, weights, problem, config),
            lambda: torch_products.forward(x, weights, problem, is_first),
            *(problem, x.device, is_first),
        )


def backward(dy: Tensor, saved: Saved, weights: Weights, needs: Needs) -> tuple[Tensor | None, ...]:
    """dy [M, N] -> (dx [M, K], dA [ra, K], dB [N, ra], db [N]), None where not needed."""
    problem = _problem(dy, weights, BACKWARD)
    if not problem.M or not (problem.lora_rank or needs.dx):
        return shared_products.backward(dy, saved, weights, needs)
    call = problem, dy.device, dispatch.is_first_call(problem, dy.device)
    with on_device(dy.device):
        return shared_backward(
            dy,
            saved,
            weights,
            needs,
            functools.partial(_backward_x, call=call),
            functools.partial(_adapter_gradients, call=call),
        )


def _backward_x(dy, weights, call) -> tuple[Tensor, Tensor | None]:
    """(dx [M, K], dh_a [M, ra] = alpha dy B)."""
    return _by_choice(
        dispatch.config_for,
        lambda config: _launch().backward_x(dy, weights, call[0], config),
        lambda: shared_products.backward_x(dy, weights),
        *call,
    )


def _adapter_gradients(dh_a, x, h_a, dy, alpha, needs_db, call) -> tuple[Tensor | None, ...]:
    given = (None if dh_a is None else dh_a.contiguous(), x, h_a, dy, alpha, needs_db)
    return _by_choice(
        dispatch.adapter_gradients_config_for,
        lambda config: _launch().adapter_gradients(*given, config, call[0].lora_rank),
        lambda: shared_products.adapter_gradients(*given),
        *call,
    )


def _by_choice(
    choose: Callable,
    launch: Callable,
    products: Callable,
    problem: Problem,
    device: torch.device,
    is_first: bool,
) -> tuple[Tensor | None, ...]:
    """The result of launch(config) or of torch's products, as `choose` says for this call.

    A problem's first call also makes the launch that a CUDA graph of it would need: nothing can be
    compiled while a graph is captured, and the warm-up before is calls from Python.
    """
    config = choose(problem, device)
    if is_first:
        captured = choose(problem, device, captured=True)
        if captured not in (TORCH_PRODUCTS, config):
            launch(captured)
    return products() if config is TORCH_PRODUCTS else launch(config)


def _problem(rows: Tensor, weights: Weights, direction: str) -> Problem:
    return Problem(
        M=len(rows),
        K=weights.in_features,
        N=weights.out_features,
        rank=weights.rank,
        lora_rank=weights.lora_rank,
        dtype=rows.dtype,
        pivoted=weights.pivots is not None,
        direction=direction,
    )


@functools.cache
def _launch():
    """launch.py, which imports triton: this package doesn't need it before the first launch."""
    from hylora_kernels.backends.triton import launch

    return launch


def forget(SVh: Tensor) -> None:
    """Nothing: this backend keeps nothing of a layer's factors."""


# ----------------------------------------------------------------------------- packed for inference


def pack(
    weights: Weights, dtype: torch.dtype | None = None, for_group: bool = False
) -> packed_gpu.PackedLayer | PackedQuantizedLayer | None:
    """The weights packed, without the bias; None in the interpreter and for a dense matrix that
    isn't quantised and in no group. dtype: of x, by default SVh's."""
    if weights.SVh.device.type != "cuda":
        return None
    if weights.is_quantized:
        return quantized.pack(weights, dtype or weights.SVh.dtype)
    return packed_gpu.pack(weights, "triton", for_group)


def forward_packed(
    x: Tensor, packed: packed_gpu.PackedLayer | PackedQuantizedLayer, bias: Tensor | None
) -> Tensor:
    """x [..., K] and bias [N] of packed.dtype -> y [..., N]."""
    return packed.forward(x, bias, forward)


def why_no_group(members: Sequence[object]) -> str:
    """The reason why these packed layers on one x can't be computed as one, or ""."""
    kind = quantized_groups if _are_quantized(members) else group_gpu
    return kind.why_no_group(members)


def group(members: Sequence[Any]) -> group_gpu.PackedGroup | PackedQuantizedGroup:
    """Layers for which why_no_group gives ""."""
    kind = PackedQuantizedGroup if _are_quantized(members) else group_gpu.PackedGroup
    return kind.of(members)


def _are_quantized(members: Sequence[object]) -> bool:
    return any(isinstance(member, PackedQuantizedLayer) for member in members)


def forward_group(
    x: Tensor,
    group: group_gpu.PackedGroup | PackedQuantizedGroup,
    biases: Sequence[Tensor | None],
) -> Tensor:
    """x [..., K] -> y [..., group.width]; no biases are as many Nones."""
    return group.forward(x, biases, groups.forward)


def rows_packed(ids: Tensor, packed: PackedQuantizedLayer) -> Tensor:
    """ids [...] -> [..., K]: rows of a dense quantised matrix; torch reads those of others."""
    return packed.rows(ids)


def unpack(packed: packed_gpu.PackedLayer | PackedQuantizedLayer) -> Weights:
    """The weights as they were packed, bit for bit."""
    return packed.unpack()


packed_gpu.define("triton", forward)
group_gpu.define("triton", groups.forward)
