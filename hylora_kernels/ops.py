"""Every op of the package: schema, argument checks, fake kernel, autograd, autocast, and the functional door.

Each room of `backends` gets one forward and one backward op, `hylora::<room>_forward` and `hylora::<room>_backward`,
so a forward's graph node names the room of its own backward. Shapes as in reference.py, with any leading batch
dims on x. Gradients exist for x, A, B and bias; SVh and U are frozen. Saved for backward: x and h_a, no more.
"""

from __future__ import annotations

import functools
import math
import numbers

import torch
from torch import Tensor

from hylora_kernels import backends

_LIBRARY = torch.library.Library("hylora", "DEF")
_FORWARD = (
    "(Tensor x, Tensor SVh, Tensor U, Tensor? A, Tensor? B, Tensor? bias, float alpha, Tensor? pivots)"
    " -> (Tensor y, Tensor h_a)"
)
_BACKWARD = (
    "(Tensor dy, Tensor? x, Tensor? h_a, Tensor SVh, Tensor U, Tensor? A, Tensor? B, float alpha, Tensor? pivots,"
    " bool[4] needs) -> (Tensor dx, Tensor dA, Tensor dB, Tensor db)"
)
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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
    alpha:  a finite real number, the LoRA scale.
    pivots: None, or int32 [r], strictly ascending within [0, N): the outputs that SVh itself computes
            (y[..., pivots] = x SVh^T), the others being U's combinations of them (PIFA, arXiv:2501.19090).

    One dtype (float64, float32, bfloat16 or float16) and one device for all but pivots' dtype, any strides. Under
    torch.autocast the floating tensors are cast first. Gradients for x, A, B and bias. No double backward, no vmap.
    Raises TypeError or ValueError that names the argument, what came and what is allowed.
    """
    _check(x, SVh, U, A, B, bias, alpha, pivots)
    room = backends.choose(x, SVh, U, A, B, bias, pivots)
    return _FORWARD_OPS[room](x, SVh, U, A, B, bias, float(alpha), pivots)[0]


# ---------------------------------------------------------------------------------------------- argument checks


def _check(x, SVh, U, A, B, bias, alpha, pivots) -> None:
    tensors = {"x": x, "SVh": SVh, "U": U, "A": A, "B": B, "bias": bias, "pivots": pivots}
    for name, tensor in tensors.items():
        optional = name in ("A", "B", "bias", "pivots")
        if not (isinstance(tensor, Tensor) or (optional and tensor is None)):
            allowed = "a Tensor or None" if optional else "a Tensor"
            raise TypeError(f"{name} must be {allowed}, got {type(tensor).__name__}")
    if not isinstance(alpha, numbers.Real | torch.SymFloat) or isinstance(alpha, bool):
        raise TypeError(f"alpha must be a real number, got {type(alpha).__name__}")
    if not -math.inf < alpha < math.inf:  # math.isfinite can't be traced with a symbolic float
        raise ValueError(f"alpha must be finite, got {alpha}")
    if (A is None) != (B is None):
        given, missing = ("A", "B") if B is None else ("B", "A")
        raise ValueError(f"A and B must be given together or not at all, got {given} but {missing} is None")
    _check_shapes(x, SVh, U, A, B, bias, pivots)
    _check_kinds(tensors)


def _check_shapes(x, SVh, U, A, B, bias, pivots) -> None:
    if x.dim() < 1:
        raise ValueError("x must be [..., K] with at least one dim, got a scalar")
    K = x.shape[-1]
    _want("SVh", SVh, "[r, K]", (None, K), "K from x")
    rank = SVh.shape[0]
    _want("U", U, "[N, r]" if pivots is None else "[N - r, r]", (None, rank), "r from SVh")
    out_features = U.shape[0]
    if pivots is not None:
        _want("pivots", pivots, "[r]", (rank,), "r from SVh")
        out_features += rank
    if A is not None:
        _want("A", A, "[ra, K]", (None, K), "K from x")
        _want("B", B, "[N, ra]", (out_features, A.shape[0]), "N from U, ra from A")
    if bias is not None:
        _want("bias", bias, "[N]", (out_features,), "N from U")


def _want(name: str, tensor: Tensor, letters: str, shape: tuple, source: str) -> None:
    fits = tensor.dim() == len(shape) and all(
        want is None or size == want for size, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} must be {letters} = [{wanted}] ({source}), got {list(tensor.shape)}")


def _check_kinds(tensors: dict[str, Tensor | None]) -> None:
    x, pivots = tensors["x"], tensors["pivots"]
    autocast = torch.is_autocast_enabled(x.device.type)
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.layout is not torch.strided:
            raise TypeError(f"{name} must be a strided tensor, got layout {tensor.layout}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")
        if tensor is pivots:
            if tensor.dtype != torch.int32:
                raise TypeError(f"pivots must be int32, got {tensor.dtype}")
        elif tensor.dtype not in _FLOATS:
            raise TypeError(f"{name} must be one of float64, float32, bfloat16, float16, got {tensor.dtype}")
        elif tensor.dtype != x.dtype and not autocast:
            raise TypeError(f"{name} must have x's dtype {x.dtype}, got {tensor.dtype}")
    if torch.is_grad_enabled():
        for name in ("SVh", "U"):
            if tensors[name].requires_grad:
                raise ValueError(f"{name} must not require grad: it is frozen and has no gradient here")


# ------------------------------------------------------------------------------------------------- registration


def _kernel_forward(room, x, SVh, U, A, B, bias, alpha, pivots):
    y, h_a = room.forward(x.reshape(-1, x.shape[-1]), SVh, U, A, B, bias, alpha, pivots)
    return y.view(*x.shape[:-1], y.shape[-1]), h_a


def _kernel_backward(room, dy, x, h_a, SVh, U, A, B, alpha, pivots, needs):
    lead, (dy, x) = dy.shape[:-1], (t if t is None else t.reshape(-1, t.shape[-1]) for t in (dy, x))
    dx, *others = room.backward(dy, x, h_a, SVh, U, A, B, alpha, pivots, needs)
    grads = (dx if dx is None else dx.view(*lead, dx.shape[-1]), *others)
    return tuple(dy.new_empty(0) if grad is None else grad for grad in grads)


def _fake_forward(x, SVh, U, A, B, bias, alpha, pivots):
    out_features = U.shape[0] + (0 if pivots is None else SVh.shape[0])
    lead = x.shape[:-1]
    y, h_a = (*lead, out_features), (math.prod(lead), 0 if A is None else A.shape[0])
    return x.new_empty(y), x.new_empty(h_a)


def _fake_backward(dy, x, h_a, SVh, U, A, B, alpha, pivots, needs):
    shapes = (*dy.shape[:-1], SVh.shape[1]), A is not None and A.shape, B is not None and B.shape, dy.shape[-1:]
    return tuple(dy.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True))


def _save(ctx, inputs, output):
    x, SVh, U, A, B, _bias, alpha, pivots = inputs
    need_x, _, _, need_A, need_B, need_bias, *_ = ctx.needs_input_grad
    ctx.needs, ctx.alpha = [need_x, need_A, need_B, need_bias], alpha
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if need_A else None, output[1] if need_B else None, SVh, U, A, B, pivots)


def _differentiate(backward_op, ctx, dy, _dh_a):
    if dy is None:
        return (None,) * 8
    x, h_a, SVh, U, A, B, pivots = ctx.saved_tensors
    grads = backward_op(dy, x, h_a, SVh, U, A, B, ctx.alpha, pivots, ctx.needs)
    dx, dA, dB, db = (grad if need else None for grad, need in zip(grads, ctx.needs, strict=True))
    return dx, None, None, dA, dB, db, None, None


def _refuse_double_backward(ctx, *_grads):
    raise NotImplementedError("svd_lora_linear has no double backward: its gradients can't be differentiated again")


def _refuse_vmap(info, in_dims, *args):
    raise NotImplementedError("svd_lora_linear has no vmap rule: give the batch as leading dims of x instead")


def _autocast(op, device_type, *args):
    dtype = torch.get_autocast_dtype(device_type)
    castable = (torch.float32, torch.bfloat16, torch.float16)
    args = [a.to(dtype) if isinstance(a, Tensor) and a.dtype in castable else a for a in args]
    with torch.autocast(device_type, enabled=False):
        return op(*args)


def _define(name: str, room):
    """Define and register the two ops of one room; returns its forward op."""
    forward, backward = f"{name}_forward", f"{name}_backward"
    for op_name, schema, kernel, fake in (
        (forward, _FORWARD, _kernel_forward, _fake_forward),
        (backward, _BACKWARD, _kernel_backward, _fake_backward),
    ):
        _LIBRARY.define(op_name + schema, tags=torch.Tag.pt2_compliant_tag)
        _LIBRARY.impl(op_name, functools.partial(kernel, room), "CompositeExplicitAutograd")
        torch.library.register_fake(f"hylora::{op_name}", fake, lib=_LIBRARY)
        torch.library.register_vmap(f"hylora::{op_name}", _refuse_vmap, lib=_LIBRARY)
    forward_op, backward_op = (getattr(torch.ops.hylora, op).default for op in (forward, backward))
    torch.library.register_autograd(
        f"hylora::{forward}", functools.partial(_differentiate, backward_op), setup_context=_save, lib=_LIBRARY
    )
    torch.library.register_autograd(f"hylora::{backward}", _refuse_double_backward, lib=_LIBRARY)
    for device_type in ("cpu", "cuda", "mps", "xpu"):
        key = "Autocast" + (device_type.upper() if device_type != "cuda" else "CUDA")
        _LIBRARY.impl(forward, functools.partial(_autocast, forward_op, device_type), key)
    return forward_op


_FORWARD_OPS = {name: _define(name, room) for name, room in backends.ROOMS.items()}
