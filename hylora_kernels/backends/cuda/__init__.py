"""The GPU backend without Triton: the CUDA C++ kernels of csrc/cuda/, or torch's own products where
those should be faster.

Both products of a layer are one launch of the same design as the Triton backend's, the adapter's
gradients another. The kernels take bfloat16 and float16; float32, float64 and empty tensors go to
torch's products. Nothing is compiled at run time.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hylora_kernels.backends.cuda import launch
from hylora_kernels.backends.shared import group_gpu, packed_gpu, torch_products
from hylora_kernels.backends.shared.backward import backward as shared_backward
from hylora_kernels.backends.shared.gpu import (
    adapter_gradients_launch_is_faster,
    on_device,
    one_launch_is_faster,
)
from hylora_kernels.backends.shared.group_gpu import why_no_group
from hylora_kernels.backends.shared.library import LIBRARY, MISSING
from hylora_kernels.backends.shared.tracing import assume_constant_result
from hylora_kernels.backends.shared.unpacked import decoder_plan, rows_packed
from hylora_kernels.weights import Needs, Saved, Weights

__all__ = ["decoder_plan", "rows_packed", "why_no_group"]

HALVES = (torch.bfloat16, torch.float16)
KERNELS, TORCH_PRODUCTS = "kernels", "torch products"  # arguments of forcing()
DEVICE = "cuda"  # tests run the emulated kernels on a CPU

_ops = torch.ops.hylora


def _no_kernels() -> str:
    """The reason why the library has no kernels for any GPU; "" if it has."""
    if MISSING:
        return MISSING
    if not hasattr(_ops, "cuda_layer"):
        return f"{LIBRARY.name} is older than the package: build it again"
    return "" if _ops.cuda_archs.default() else _ops.cuda_lacks.default(0)


NO_KERNELS = _no_kernels()


def code() -> str:
    """The architectures with machine code in the library, or the reason why there are none."""
    if NO_KERNELS:
        return NO_KERNELS
    names = ", ".join(f"sm_{arch}" for arch in _ops.cuda_archs.default().split())
    return f"{names}; PTX for others"


def is_available() -> bool:
    return not why_not()


def why_not() -> str:
    """The reason why this backend can't be used here; "" if it can."""
    if NO_KERNELS:
        return NO_KERNELS
    if torch.version.hip:
        return "the kernels are for CUDA, torch is built for ROCm"
    return _driver_lacks() if torch.cuda.is_available() else "no CUDA device"


@assume_constant_result
def _driver_lacks() -> str:
    return _answer("cuda_driver_lacks")


@functools.cache
def _answer(question: str, *given) -> str:
    return getattr(_ops, question).default(*given)


def unsupported(x: Tensor, weights: Weights) -> str | None:
    """The reason why this backend can't serve these tensors; None if it can."""
    if reason := why_not():
        return reason
    if x.device.type != DEVICE:
        return f"serves tensors on {DEVICE}, got {x.device}"
    return _device_lacks(x.device) or None


@assume_constant_result  # compiled code serves the device that it was compiled for
def _device_lacks(device: torch.device) -> str:
    return _answer("cuda_lacks", launch.target_of(device)[1])


def is_faster_than_next(x: Tensor, weights: Weights) -> bool:
    """True if this backend serves a call faster than the next one."""
    return x.dtype in HALVES


# ----------------------------------------------------------------------------- forward and backward


def forward(x: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    """x [M, K] -> (y [M, N], h_a [M, ra]); h_a before alpha."""
    if _can_launch(x, weights) and _launches_forward(len(x), weights):
        return launch.forward(x, weights)
    return torch_products.forward(x, weights)


def backward(dy: Tensor, saved: Saved, weights: Weights, needs: Needs) -> tuple[Tensor | None, ...]:
    """dy [M, N] -> (dx [M, K], dA [ra, K], dB [N, ra], db [N]), None where not needed."""
    if not _can_launch(dy, weights):
        return torch_products.backward(dy, saved, weights, needs)
    # On an H100 dx was faster by torch's products in most cases (measured with the Triton launch).
    backward_x = launch.backward_x if _forced == KERNELS else torch_products.backward_x
    return shared_backward(dy, saved, weights, needs, backward_x, _adapter_gradients)


def _can_launch(rows: Tensor, weights: Weights) -> bool:
    """True if the kernels take such tensors."""
    empty = not (len(rows) and weights.SVh.numel() and weights.U.numel())
    has_ranks = weights.A is None or weights.lora_rank > 0
    return rows.dtype in HALVES and not empty and has_ranks


def _launches_forward(M: int, weights: Weights) -> bool:
    if _forced is not None:
        return _forced == KERNELS
    return one_launch_is_faster(M, weights.factor_bytes, weights.lora_rank)


def _adapter_gradients(dh_a, x, h_a, dy, alpha, needs_db) -> tuple[Tensor | None, ...]:
    K = 0 if dh_a is None else x.shape[1]
    N = 0 if h_a is None else dy.shape[1]
    launches = adapter_gradients_launch_is_faster(len(dy), K, N)
    if _forced is not None:
        launches = _forced == KERNELS
    if launches:
        return launch.adapter_gradients(dh_a, x, h_a, dy, alpha, needs_db)
    return torch_products.adapter_gradients(dh_a, x, h_a, dy, alpha, needs_db)


_forced: str | None = None


@contextlib.contextmanager
def forcing(choice: str) -> Iterator[None]:
    """Serve every call inside the `with` that the kernels can take by KERNELS, or every call by
    TORCH_PRODUCTS, for measuring and testing."""
    global _forced
    before, _forced = _forced, choice
    try:
        yield
    finally:
        _forced = before


def forget(SVh: Tensor) -> None:
    """Nothing: this backend keeps nothing for a layer."""


# ----------------------------------------------------------------------------- packed for inference


def pack(
    weights: Weights, dtype: torch.dtype | None = None, for_group: bool = False
) -> packed_gpu.PackedLayer | None:
    """The weights packed, without the bias; None for a quantised matrix, and a dense one that is in
    no group. dtype: of x."""
    return packed_gpu.pack(weights, "cuda", for_group)


def forward_packed(x: Tensor, packed: packed_gpu.PackedLayer, bias: Tensor | None) -> Tensor:
    """x [..., K] and bias [N] of packed.dtype -> y [..., N]."""
    return packed.forward(x, bias, forward)


def group(members: Sequence[packed_gpu.PackedLayer]) -> group_gpu.PackedGroup:
    """Layers for which why_no_group gives ""."""
    return group_gpu.PackedGroup.of(members)


def forward_group(
    x: Tensor, group: group_gpu.PackedGroup, biases: Sequence[Tensor | None]
) -> Tensor:
    """x [..., K] -> y [..., group.width]; no biases are as many Nones."""
    return group.forward(x, biases, _launch_group)


def _launch_group(x: Tensor, operands: group_gpu.Operands, biases) -> Tensor | None:
    target = group_gpu.target_of(operands)
    if target is None or len(x) > group_gpu.LAUNCHED_ROWS or _forced == TORCH_PRODUCTS:
        return None
    with on_device(x.device):
        return group_gpu.one_launch(x, operands, biases, target)


def unpack(packed: packed_gpu.PackedLayer) -> Weights:
    """The weights as they were packed, bit for bit."""
    return packed.unpack()


packed_gpu.define("cuda", forward)
group_gpu.define("cuda", _launch_group)
