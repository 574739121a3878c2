"""The public op svd_lora_linear.

Each backend gets two ops, `hylora::<backend>_forward` and `hylora::<backend>_backward`, so that the
graph node of a forward names the backend of its backward. Their schema is flat; below it the
weights are one value, Weights. Shapes are reference.py's, with any leading batch dims on x.
Gradients exist for x, A, B and bias; SVh and U are frozen. Backward saves x and h_a, no more.

The ops are for everything that looks at a call or transforms it: torch.compile, export, dispatch
modes, autocast. A plain call goes past them to the same functions, since torch's Python around an
op takes longer than two small products: at K = N = 32 and M = 1, of 48 us 20 with no gradients,
and forward and backward take 364 us through the ops.

The C++ and CUDA kernels are ops of their own, defined beside their checks in csrc/*/bindings.cpp.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hylora_kernels import backends, flops
from hylora_kernels.ops import export
from hylora_kernels.ops.checks import check
from hylora_kernels.ops.define import define, differentiate, save_for_backward
from hylora_kernels.weights import Needs, Saved, Weights

_FORWARD = (
    "(Tensor x, Tensor SVh, Tensor U, Tensor? A, Tensor? B, Tensor? bias, float alpha,"
    " Tensor? pivots) -> (Tensor y, Tensor h_a)"
)
_BACKWARD = (
    "(Tensor dy, Tensor? x, Tensor? h_a, Tensor SVh, Tensor U, Tensor? A, Tensor? B, float alpha,"
    " Tensor? pivots, bool[4] needs) -> (Tensor dx, Tensor dA, Tensor dB, Tensor db)"
)


def svd_lora_linear(
    x: Tensor,
    SVh: Tensor,
    U: Tensor,
    A: Tensor | None = None,
    B: Tensor | None = None,
    bias: Tensor | None = None,
    alpha: float = 1.0,
    pivots: Tensor | None = None,
) -> Tensor:
    """x [..., K] -> y [..., N] = x SVh^T U^T + bias + alpha x A^T B^T.

    SVh:    [r, K], frozen.
    U:      [N, r], frozen; in the pivoted form [N - r, r].
    A, B:   [ra, K] and [N, ra], or both None.
    bias:   [N] or None.
    alpha:  a real number that float32 holds, the LoRA scale. At 0 the adapter is still computed, so
            that NaN or Inf in A or B reaches y.
    pivots: None, or int32 [r], strictly ascending within [0, N): the outputs that SVh itself
            computes (y[..., pivots] = x SVh^T), the others being U's combinations of them (PIFA,
            arXiv:2501.19090).

    All tensors share one device and, pivots apart, one dtype: float64, float32, bfloat16 or
    float16. Any strides. Under torch.autocast the floating tensors are cast first. Gradients for x,
    A, B and bias by torch.autograd; no double backward, no forward mode, no torch.func transforms.
    Under torch.compile alpha is a constant of the graph; that of SVDLoRALinear is an input.
    Raises TypeError or ValueError that names the argument, what was given and what is allowed.

    Example:
        SVh, U = torch.randn(16, 64), torch.randn(48, 16)
        y = svd_lora_linear(torch.randn(2, 10, 64), SVh, U)  # [2, 10, 48]
    """
    weights = Weights(SVh, U, A, B, bias, alpha, pivots)
    check(x, weights)
    name, inputs = backends.choose(x, weights), (x, SVh, U, A, B, bias, float(alpha), pivots)
    if not _is_plain_call(inputs):
        return _FORWARD_OPS[name](*inputs)[0]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, A, B, bias)):
        return _PlainCall.apply(*inputs, name)
    return kernel_forward(backends.BACKENDS[name], *inputs)[0]


# ------------------------------------------------------------------------------------- plain calls


def _is_plain_call(inputs: tuple[Any, ...]) -> bool:
    """True where nothing looks at the call or transforms it: the op would only add time."""
    if torch.compiler.is_compiling() or _torch_is_watching():
        return False
    x = inputs[0]
    if not (x.is_cpu or x.is_cuda) or torch.is_autocast_enabled(x.device.type):
        return False
    return all(type(t) in _PLAIN for t in inputs)


def _torch_is_watching() -> bool:
    """True inside a dispatch mode, a function transform or a trace."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), float))


class _PlainCall(torch.autograd.Function):
    """The op's forward and backward for a plain call."""

    @staticmethod
    def forward(ctx: Any, *inputs_and_name: Any) -> Tensor:
        *inputs, ctx.name = inputs_and_name
        output = kernel_forward(backends.BACKENDS[ctx.name], *inputs)
        save_for_backward(ctx, tuple(inputs), output)
        return output[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or _torch_is_watching():  # create_graph=True, or a mode
            backward_op = getattr(torch.ops.hylora, f"{ctx.name}_backward").default
        else:
            backward_op = functools.partial(_gradients, backends.BACKENDS[ctx.name])
        return (*differentiate(backward_op, ctx, dy, None), None)


# ------------------------------------------------------------------------------------- registration


def kernel_forward(backend: ModuleType, x: Tensor, *weights: Any) -> tuple[Tensor, Tensor]:
    y, h_a = backend.forward(_matrix(x), Weights(*weights))
    return _with_lead(y, x.shape[:-1]), h_a


def kernel_backward(backend: ModuleType, dy: Tensor, *others: Any) -> tuple[Tensor, ...]:
    """_gradients with an empty tensor for each None, which an op can't return."""
    grads = _gradients(backend, dy, *others)
    return tuple(dy.new_empty(0) if grad is None else grad for grad in grads)


def _gradients(
    backend: ModuleType,
    dy: Tensor,
    x: Tensor | None,
    h_a: Tensor | None,
    SVh: Tensor,
    U: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    alpha: float,
    pivots: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    saved = Saved(x if x is None else _matrix(x), h_a)
    weights = Weights(SVh, U, A, B, None, alpha, pivots)
    dx, *others = backend.backward(_matrix(dy), saved, weights, Needs(*needs))
    return dx if dx is None else _with_lead(dx, dy.shape[:-1]), *others


def _matrix(tensor: Tensor) -> Tensor:
    """[..., n] -> [M, n]; a reshape to (-1, n) would not know M at n = 0."""
    if tensor.dim() == 2:
        return tensor
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def _with_lead(tensor: Tensor, lead: torch.Size) -> Tensor:
    """[M, n] -> [*lead, n], not as a view: the caller may write into an output in place."""
    if len(lead) == 1:
        return tensor
    return torch.ops.aten._unsafe_view.default(tensor, (*lead, tensor.shape[-1]))


def fake_forward(x: Tensor, *factors: Any) -> tuple[Tensor, Tensor]:
    weights, lead = Weights(*factors), x.shape[:-1]
    h_a = x.new_empty(math.prod(lead), weights.lora_rank)
    return x.new_empty(*lead, weights.out_features), h_a


def fake_backward(
    dy: Tensor,
    x: Tensor | None,
    h_a: Tensor | None,
    SVh: Tensor,
    U: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    alpha: float,
    pivots: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    shapes = (
        (*dy.shape[:-1], SVh.shape[1]),
        A is not None and A.shape,
        B is not None and B.shape,
        dy.shape[-1:],
    )
    return tuple(
        dy.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True)
    )


def _define(name: str, backend: ModuleType) -> Callable[..., Any]:
    """The two ops of one backend."""
    forward = functools.partial(kernel_forward, backend)
    backward = functools.partial(kernel_backward, backend)
    fakes = (fake_forward, fake_backward)
    formulas = (export.forward, export.backward)
    return define(name, (_FORWARD, _BACKWARD), (forward, backward), fakes, formulas, frozen=2)


_FORWARD_OPS = {name: _define(name, backend) for name, backend in backends.BACKENDS.items()}
flops.register(_FORWARD_OPS)
