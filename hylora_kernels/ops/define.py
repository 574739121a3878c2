"""define(): an op's forward and backward with all that torch asks of them: fake kernels, autograd,
autocast, vmap's refusal, and the formula that exporters get."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor

from hylora_kernels.ops import export
from hylora_kernels.ops.checks import CASTABLE

_LIBRARY = torch.library.Library("hylora", "DEF")


def define(
    name: str,
    schemas: tuple[str, str],
    kernels: tuple[Callable[..., Any], Callable[..., Any]],
    fakes: tuple[Callable[..., Any], Callable[..., Any]],
    formulas: tuple[Callable[..., Any], Callable[..., Any]],
    frozen: int,
) -> Callable[..., Any]:
    """Define and register hylora::<name>_forward and its backward, each argument for the two of
    them; return the forward op. formulas: for exporters. frozen: the number of tensors that SVh and
    U are."""
    names = (f"{name}_forward", f"{name}_backward")
    for op_name, schema, kernel, fake, formula in zip(
        names, schemas, kernels, fakes, formulas, strict=True
    ):
        _LIBRARY.define(op_name + schema, tags=torch.Tag.pt2_compliant_tag)
        _LIBRARY.impl(op_name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"hylora::{op_name}", fake, lib=_LIBRARY)
        torch.library.register_vmap(f"hylora::{op_name}", _refuse_vmap, lib=_LIBRARY)
        export.register(op_name, formula, _LIBRARY)
    forward, backward = names
    forward_op, backward_op = (getattr(torch.ops.hylora, op).default for op in names)
    torch.library.register_autograd(
        f"hylora::{forward}",
        functools.partial(differentiate, backward_op),
        setup_context=functools.partial(save_for_backward, frozen=frozen),
        lib=_LIBRARY,
    )
    torch.library.register_autograd(f"hylora::{backward}", _refuse_double_backward, lib=_LIBRARY)
    for device_type in ("cpu", "cuda", "mps", "xpu"):
        key = "Autocast" + (device_type.upper() if device_type != "cuda" else "CUDA")
        _LIBRARY.impl(forward, functools.partial(_autocast, forward_op, device_type), key)
    return forward_op


def save_for_backward(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor], frozen: int = 2
) -> None:
    """inputs: x, `frozen` tensors, A, B, bias, alpha, pivots, and what else the op takes."""
    (A, B, _bias, alpha, pivots), others = inputs[1 + frozen : 6 + frozen], inputs[6 + frozen :]
    need_x, (need_A, need_B, need_bias) = (
        ctx.needs_input_grad[0],
        ctx.needs_input_grad[1 + frozen : 4 + frozen],
    )
    ctx.needs, ctx.alpha, ctx.others = [need_x, need_A, need_B, need_bias], alpha, others
    ctx.set_materialize_grads(False)
    x, h_a = inputs[0] if need_A else None, output[1] if need_B else None
    ctx.save_for_backward(x, h_a, *inputs[1 : 1 + frozen], A, B, pivots)


def differentiate(
    backward_op: Callable[..., Any], ctx: Any, dy: Tensor | None, _dh_a: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, h_a, *frozen, A, B, pivots = ctx.saved_tensors
    grads: Iterable[Tensor | None] = (None,) * 4
    if dy is not None:
        factors = (*frozen, A, B, ctx.alpha, pivots)
        grads = backward_op(dy, x, h_a, *factors, ctx.needs, *ctx.others)
    dx, dA, dB, db = (grad if need else None for grad, need in zip(grads, ctx.needs, strict=True))
    return dx, *(None for _ in frozen), dA, dB, db, None, None, *(None for _ in ctx.others)


def _refuse_double_backward(ctx: Any, *_grads: Any) -> NoReturn:
    raise NotImplementedError(
        "svd_lora_linear has no double backward: its gradients can't be differentiated again"
    )


def _refuse_vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
    raise NotImplementedError(
        "svd_lora_linear has no vmap rule: give the batch as leading dims of x instead"
    )


def _autocast(op: Callable[..., Any], device_type: str, *args: Any) -> Any:
    dtype = torch.get_autocast_dtype(device_type)
    cast = [a.to(dtype) if isinstance(a, Tensor) and a.dtype in CASTABLE else a for a in args]
    with torch.autocast(device_type, enabled=False):
        return op(*cast)
