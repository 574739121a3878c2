"""The GPU's room: Triton kernels, one launch for both products of a layer, or torch's own products
where those are faster.

Which it is for a call is read off a table: the user's (`hylora tune`), one that comes with the
package, or the defaults of config.py. The choice is made below the op, so that code compiled for
many M chooses for each; in a CUDA graph, where a launch costs the host nothing, it may be another.

With TRITON_INTERPRET=1 in the environment the room serves tensors on the CPU, where Triton's
interpreter plays GPU: slow, and right in float32 and float16.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os

import torch
from torch import Tensor

from hylora_kernels.backends.shared import torch_products as products
from hylora_kernels.backends.shared.tracing import assume_constant_result
from hylora_kernels.backends.triton import dispatch
from hylora_kernels.backends.triton import torch_products as vendor
from hylora_kernels.backends.triton.config import (
    BACKWARD,
    FORWARD,
    TORCH_PRODUCTS,
    Problem,
    adapter_gradients_config,
)
from hylora_kernels.backends.triton.dispatch import forcing  # noqa: F401 - for tune and selftest
from hylora_kernels.weights import Needs, Saved, Weights

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Triton's interpreter multiplies the bits of bfloat16 as if they were integers (3.6 to 3.9).
INTERPRETED_DTYPES = (torch.float32, torch.float16)
INSTALLED = importlib.util.find_spec("triton") is not None
LEAST_ARCH = 80  # bf16 tensor cores and asynchronous copies
MOST = 2**31  # numbers in a weight: what 32-bit indices reach


def is_available() -> bool:
    return not why_not()


def why_not() -> str:
    """Why this room can't be used here; "" where it can."""
    if not INSTALLED:
        return "triton is not installed: pip install triton (it comes with torch's CUDA builds)"
    if _interpreted() or torch.cuda.is_available():
        return ""
    return "no CUDA device; TRITON_INTERPRET=1 in the environment lets a CPU play one"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def unsupported(x: Tensor, weights: Weights) -> str | None:
    """The reason why this room can't serve these tensors, in words; None where it can."""
    wanted = "cpu" if _interpreted() else "cuda"
    if reason := why_not():
        return reason
    if x.device.type != wanted:
        interpreter = ", TRITON_INTERPRET=1 being set" if wanted == "cpu" else ""
        return f"serves tensors on {wanted}{interpreter}, got {x.device}"
    if x.dtype not in DTYPES:
        return f"serves float32, bfloat16 and float16, got {x.dtype}"
    if wanted == "cpu" and x.dtype not in INTERPRETED_DTYPES:
        return f"serves float32 and float16 in Triton's interpreter, got {x.dtype}"
    if wanted == "cuda" and (reason := _device_lacks(x.device)):
        return reason
    if weights.is_empty:
        SVh, U = weights.SVh, weights.U
        return f"serves no empty factors, got SVh {list(SVh.shape)} and U {list(U.shape)}"
    if max(weights.SVh.numel(), weights.U.numel()) >= MOST:
        got = list(weights.U.shape)
        return f"serves factors of less than {MOST} numbers, got U {got}"
    return None


@assume_constant_result  # the device compiled for is the device
def _device_lacks(device: torch.device) -> str:
    target = dispatch.target_of(device)
    if target.kind == "cuda" and target.arch < LEAST_ARCH:
        return f"serves GPUs from sm_{LEAST_ARCH} on, got sm_{target.arch}"
    return ""


def is_faster_than_next(x: Tensor, weights: Weights) -> bool:
    """Whether a call that this room can serve is faster here than in the next room: the interpreter
    never is, and on a GPU the call itself takes the fastest there is."""
    return x.device.type == "cuda"


# ----------------------------------------------------------------------------- forward and backward


def forward(x: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    """x [M, K] -> (y [M, N], h_a [M, ra]); h_a before alpha."""
    problem = _problem(x, weights, FORWARD)
    config = dispatch.config_for(problem, x.device)
    with _on(x.device):
        if x.is_cuda:
            captured = dispatch.config_to_warm_up(problem, x.device)
            if captured is not None:
                _one_launch(x, weights, problem, captured)
        if config is TORCH_PRODUCTS:
            return vendor.forward(x, weights, problem)
        return _one_launch(x, weights, problem, config)


def _one_launch(x, weights: Weights, problem, config) -> tuple[Tensor, Tensor]:
    SVh, U, A, B, bias, alpha, pivots = weights
    if problem.lora_rank:
        return _launch(x, SVh, A, U, B, bias, alpha, pivots, problem, config)
    y, _ = _launch(x, SVh, None, U, None, bias, alpha, pivots, problem, config)
    return y, x.new_empty(len(x), 0)


def backward(dy: Tensor, saved: Saved, weights: Weights, needs: Needs) -> tuple[Tensor | None, ...]:
    """dy [M, N] -> (dx [M, K], dA [ra, K], dB [N, ra], db [N]), None where not needed."""
    problem = _problem(dy, weights, BACKWARD)
    if not problem.M or not (problem.lora_rank or needs.dx):
        return products.backward(dy, saved, weights, needs)
    (x, h_a), (_, _, A, B, _, alpha, _) = saved, weights
    need_dx, need_dA, need_dB, need_db = needs
    dx = dA = dB = db = dh_a = None
    with _on(dy.device):
        if need_dx:
            dx, dh_a = _backward_x(dy, weights, problem)
        elif need_dA:
            dh_a = alpha * (dy @ B)
        if not problem.lora_rank:
            dA, dB = (torch.empty_like(t) if t is not None else None for t in (A, B))
        elif need_dA or need_dB:
            left = dh_a.contiguous() if need_dA else None
            right = h_a if need_dB else None
            dA, dB, db = _adapter_gradients(left, x, right, dy, alpha, need_db and need_dB, problem)
        if need_db and db is None:
            db = dy.sum(0)
    return dx, dA if need_dA else None, dB if need_dB else None, db


def _backward_x(dy, weights: Weights, problem) -> tuple[Tensor, Tensor | None]:
    """(dx [M, K], dh_a [M, ra] = alpha dy B)."""
    config = dispatch.config_for(problem, dy.device)
    if config is TORCH_PRODUCTS:
        return vendor.backward_x(dy, weights)
    SVh, U, A, B, _, alpha, pivots = weights
    A, B = (A.T, B.T) if problem.lora_rank else (None, None)
    return _launch(dy, U.T, B, SVh.T, A, None, alpha, pivots, problem, config)


def _problem(rows: Tensor, weights: Weights, direction) -> Problem:
    return Problem(
        len(rows),
        weights.in_features,
        weights.out_features,
        weights.rank,
        weights.lora_rank,
        rows.dtype,
        weights.pivots is not None,
        direction,
    )


def _launch(x, W1, W1a, W2, W2a, bias, alpha, pivots, problem, config):
    from hylora_kernels.backends.triton import launch

    others = None
    if pivots is not None:
        others = products.part_order(pivots, problem.others)[problem.rank :]
    return launch.layer(
        *(
            x,
            W1,
            W1a,
            W2,
            W2a,
            bias,
            alpha,
            pivots,
            others,
            problem,
            config,
            dispatch.target_of(x.device),
        ),
        compile_only=dispatch.is_compile_only(),
    )


def _adapter_gradients(dh_a, x, h_a, dy, alpha, need_db, problem):
    """(dA, dB, db), each None where what it is made of is None or it isn't needed."""
    config = adapter_gradients_config(problem, dispatch.target_of(dy.device))
    if config is TORCH_PRODUCTS:
        dA = None if dh_a is None else dh_a.T @ x
        return dA, None if h_a is None else alpha * (dy.T @ h_a), None
    from hylora_kernels.backends.triton import launch

    return launch.adapter_gradients(dh_a, x, h_a, dy, alpha, need_db, config, problem.lora_rank)


def _on(device: torch.device):
    """Triton launches on the current device, which need not be the tensors'."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else contextlib.nullcontext()


# ----------------------------------------------------------------------------------------- the rest


def forget(SVh) -> None:
    """Drop what is kept for a layer with this SVh."""
    vendor.forget(SVh)


def pack(weights: Weights) -> None:
    """What forward_packed wants, or None where this room gains nothing by packing: the kernel reads
    the factors where they lie."""


def forward_packed(x, packed) -> Tensor:
    raise AssertionError("the triton room packs nothing")


def rows_packed(ids, packed) -> Tensor:
    raise AssertionError("the triton room packs nothing")


def unpack(packed) -> Weights:
    raise AssertionError("the triton room packs nothing")
