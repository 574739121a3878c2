"""The GPU's room without Triton: the CUDA C++ kernels of csrc/cuda/, or torch's own products where
those should be faster.

Both products of a layer are one launch of the same design as the Triton room's, the adapter's
gradients another. They take bfloat16 and float16; float32, float64 and empty tensors go to torch's
products. Nothing is compiled at run time.
"""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor

from hylora_kernels.backends.shared import counters
from hylora_kernels.backends.shared import torch_products as products
from hylora_kernels.backends.shared.library import LIBRARY, MISSING
from hylora_kernels.backends.shared.tracing import assume_constant_result
from hylora_kernels.weights import Needs, Saved, Weights

HALVES = (torch.bfloat16, torch.float16)
KERNELS, PRODUCTS = "kernels", "products"  # what forcing() takes
DEVICE = "cuda"  # the tests have the kernels emulated on a CPU

_ops = torch.ops.hylora


def _no_kernels() -> str:
    """Why there are no kernels for any GPU, in words; "" where there are."""
    if MISSING:
        return MISSING
    if not hasattr(_ops, "cuda_archs"):
        return f"{LIBRARY.name} is older than the package: build it again"
    return "" if _ops.cuda_archs.default() else _ops.cuda_lacks.default(0)


NO_KERNELS = _no_kernels()


def code() -> str:
    """What the library holds machine code for, or why there is none, in words."""
    if NO_KERNELS:
        return NO_KERNELS
    names = ", ".join(f"sm_{arch}" for arch in _ops.cuda_archs.default().split())
    return f"{names}; PTX for others"


def is_available() -> bool:
    return not why_not()


def why_not() -> str:
    """Why this room can't be used here; "" where it can."""
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
    """The reason why this room can't serve these tensors, in words; None where it can."""
    if reason := why_not():
        return reason
    if x.device.type != DEVICE:
        return f"serves tensors on {DEVICE}, got {x.device}"
    return _device_lacks(x.device) or None


@assume_constant_result  # the device compiled for is the device
def _device_lacks(device: torch.device) -> str:
    return _answer("cuda_lacks", _target(device)[1])


def is_faster_than_next(x: Tensor, weights: Weights) -> bool:
    """Whether a call that this room can serve is faster here than in the next room."""
    return x.dtype in HALVES


# ------------------------------------------------------------------------------------- what serves


def _can_launch(rows: Tensor, weights: Weights) -> bool:
    """Whether the kernels take such tensors."""
    empty = not (len(rows) and weights.SVh.numel() and weights.U.numel())
    return rows.dtype in HALVES and not empty and (weights.A is None or weights.lora_rank > 0)


def one_launch_gains(M: int, factor_bytes: int, lora_rank: int, backward: bool) -> bool:
    """Whether both products are left to one launch where nobody forces it.

    Not measured for these kernels: it is what an H100 showed of the Triton room's launch, from
    which these should not be far (README). One launch against two of torch's products took 7.6 us
    and 9.9 at K = N = 2048, M = 1, 27 and 25 at 4096 x 11008; against four, adapter apart, 12.7 and
    18.1 at M = 64, 15.3 and 19.4 at M = 256, but with larger layers torch was ahead there. dx was
    torch's in most of all cases.
    """
    is_small = factor_bytes < 32e6
    saves_one_launch = lora_rank == 0 and is_small and M <= 16
    saves_three_launches = lora_rank > 0 and M <= 64
    return not backward and (saves_one_launch or saves_three_launches)


def thin_gains(M: int, K: int, N: int) -> bool:
    """Whether the adapter's gradients are left to one launch where nobody forces it: on an H100
    the Triton room's was behind torch's three operations from M = 8192 at 4096 x 11008 on."""
    return M * (K + N) <= 2**26


def _one_launch(rows: Tensor, weights: Weights, backward: bool) -> bool:
    if _forced is not None:
        return _forced == KERNELS
    return one_launch_gains(len(rows), weights.factor_bytes, weights.lora_rank, backward)


_forced: str | None = None


@contextlib.contextmanager
def forcing(what: str):
    """Serve every call inside the `with` that the kernels can take by KERNELS or by PRODUCTS, for
    measuring and testing."""
    global _forced
    before, _forced = _forced, what
    try:
        yield
    finally:
        _forced = before


# ----------------------------------------------------------------------------- forward and backward


def forward(x: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    """x [M, K] -> (y [M, N], h_a [M, ra]); h_a before alpha."""
    if not (_can_launch(x, weights) and _one_launch(x, weights, False)):
        return products.forward(x, weights)
    SVh, U, A, B, bias, alpha, pivots = weights
    y, h_a = _dataflow(
        *(x, SVh, A, U, B, bias, alpha, pivots, weights.out_features, weights.rank, False)
    )
    return y, x.new_empty(len(x), 0) if h_a is None else h_a


def backward(dy: Tensor, saved: Saved, weights: Weights, needs: Needs) -> tuple[Tensor | None, ...]:
    """dy [M, N] -> (dx [M, K], dA [ra, K], dB [N, ra], db [N]), None where not needed."""
    if not _can_launch(dy, weights):
        return products.backward(dy, saved, weights, needs)
    (x, h_a), alpha = saved, weights.alpha
    need_dx, need_dA, need_dB, need_db = needs
    dx = dA = dB = db = dh_a = None
    if need_dx:
        dx, dh_a = _backward_x(dy, weights)
    elif need_dA:
        dh_a = alpha * (dy @ weights.B)
    if need_dA or need_dB:
        left = (dh_a, x) if need_dA else (None, None)
        right = (h_a, dy) if need_dB else (None, None)
        dA, dB, db = _adapter(*left, *right, alpha, need_db and need_dB)
    if need_db and db is None:
        db = dy.sum(0)
    return dx, dA, dB, db


def _backward_x(dy: Tensor, weights: Weights) -> tuple[Tensor, Tensor | None]:
    """(dx [M, K], dh_a [M, ra] = alpha dy B)."""
    if not _one_launch(dy, weights, True):
        return products.backward_x(dy, weights)
    SVh, U, A, B, _, alpha, pivots = weights
    return _dataflow(
        *(dy, U, B, SVh, A, None, alpha, pivots, weights.in_features, weights.rank, True)
    )


def _adapter(dh_a, x, h_a, dy, alpha, need_db) -> tuple[Tensor | None, ...]:
    """(dA, dB, db), each None where what it is made of is None or it isn't needed."""
    M, K = (len(dy), 0) if x is None else x.shape
    N = 0 if dy is None else dy.shape[1]
    launches = thin_gains(M, K, N) if _forced is None else _forced == KERNELS
    if not launches:
        dA = None if dh_a is None else dh_a.T @ x
        return dA, None if h_a is None else alpha * (dy.T @ h_a), None
    return _thin(dh_a, x, h_a, dy, alpha, need_db, M, K, N)


# ----------------------------------------------------------------------------------------- launches


def _dataflow(x, W1, W1a, W2, W2a, bias, alpha, pivots, N, rank, transposed):
    """One launch: x [M, K] -> (x [W1; W1a]^T [W2, W2a]^T + bias [M, N], x W1a^T or None), weights
    as csrc/cuda/call.h takes them."""
    (M, K), others = x.shape, None
    lora_rank = 0 if W1a is None else W1a.shape[transposed]
    if pivots is not None:
        outputs = K if transposed else N
        others = products.part_order(pivots, outputs - rank)[rank:]
        pivots = pivots.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    x, W1, W1a, W2, W2a = map(_in_rows, (x, W1, W1a, W2, W2a))
    target = _target(x.device)
    h_columns, cells, count, *_ = _dataflow_sizes(
        *(transposed, pivots is not None, M, K, N, rank, lora_rank, *target)
    )
    y, h = x.new_empty(M, N), x.new_empty(M, h_columns)
    h_a = x.new_empty(M, lora_rank) if lora_rank else None
    partial = x.new_empty(cells, dtype=torch.float32) if cells else None
    with _on(x.device):
        zeros = counters.zeros(x.device, count)
        _ops.cuda_dataflow.default(
            *(x, W1, W1a, W2, W2a, bias, pivots, others, alpha, transposed, *target),
            *(y, h, h_a, partial, zeros),
        )
    return y, h_a


def _thin(dh_a, x, h_a, dy, alpha, need_db, M, K, N):
    """One launch: (dA [ra, K] = dh_a^T x, dB [N, ra] = alpha dy^T h_a, db [N] = sum of dy)."""
    one = h_a if dh_a is None else dh_a
    lora_rank, target = one.shape[1], _target(one.device)
    _, cells, count, *_ = _thin_sizes(M, K, N, lora_rank, *target)
    dA = one.new_empty(lora_rank, K) if K else None
    dB = one.new_empty(N, lora_rank) if N else None
    db = one.new_empty(N) if need_db else None
    partial = one.new_empty(cells, dtype=torch.float32) if cells else None
    dh_a, h_a = (t if t is None else t.contiguous() for t in (dh_a, h_a))
    with _on(one.device):
        zeros = counters.zeros(one.device, count)
        _ops.cuda_thin.default(
            *(dh_a, _in_rows(x), h_a, _in_rows(dy), alpha, *target, dA, dB, db, partial, zeros)
        )
    return dA, dB, db


def _in_rows(matrix: Tensor | None) -> Tensor | None:
    """The same with each row in one piece, as the kernels read it."""
    fits = matrix is None or matrix.stride(1) == 1 or matrix.shape[1] == 1
    return matrix if fits else matrix.contiguous()


@functools.cache
def _target(device: torch.device) -> tuple[int, int]:
    """(multiprocessors, architecture as in sm_90)."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, 10 * properties.major + properties.minor


@functools.lru_cache(maxsize=4096)
def _dataflow_sizes(*problem) -> tuple[int, ...]:
    """What a launch needs: columns of h, float32 numbers of split sums, counters; threads of a
    block, bytes of its shared memory."""
    return _ops.cuda_dataflow_sizes.default(*problem)


@functools.lru_cache(maxsize=4096)
def _thin_sizes(*problem) -> tuple[int, ...]:
    return _ops.cuda_thin_sizes.default(*problem)


def _on(device: torch.device):
    """The current device, whose stream counts, need not be the tensors'."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else contextlib.nullcontext()


# ----------------------------------------------------------------------------------------- the rest


def forget(SVh) -> None:
    """Drop what is kept for a layer with this SVh: nothing is."""


def pack(weights: Weights) -> None:
    """What forward_packed wants, or None where this room gains nothing by packing: the kernels read
    the factors where they lie."""


def forward_packed(x, packed) -> Tensor:
    raise AssertionError("the cuda room packs nothing")


def rows_packed(ids, packed) -> Tensor:
    raise AssertionError("the cuda room packs nothing")


def unpack(packed) -> Weights:
    raise AssertionError("the cuda room packs nothing")
