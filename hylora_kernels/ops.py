"""The public op svd_lora_linear: schema, argument checks, fake kernel, autograd and autocast.

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
import numbers
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hylora_kernels import backends, flops, ops_export
from hylora_kernels.weights import Needs, Saved, Weights

_LIBRARY = torch.library.Library("hylora", "DEF")
_FORWARD = (
    "(Tensor x, Tensor SVh, Tensor U, Tensor? A, Tensor? B, Tensor? bias, float alpha,"
    " Tensor? pivots) -> (Tensor y, Tensor h_a)"
)
_BACKWARD = (
    "(Tensor dy, Tensor? x, Tensor? h_a, Tensor SVh, Tensor U, Tensor? A, Tensor? B, float alpha,"
    " Tensor? pivots, bool[4] needs) -> (Tensor dx, Tensor dA, Tensor dB, Tensor db)"
)
# Asked once here, since torch.compile (2.11) can't trace the question.
_AUTOCASTING = [d for d in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(d)]
CASTABLE = (torch.float32, torch.bfloat16, torch.float16)  # by autocast
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LARGEST_ALPHA = torch.finfo(torch.float32).max


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


# ---------------------------------------------------------------------------------- argument checks


def check(x: Tensor, weights: Weights) -> None:
    SVh, U, A, B, bias, alpha, pivots = weights
    tensors = {"x": x, "SVh": SVh, "U": U, "A": A, "B": B, "bias": bias, "pivots": pivots}
    for name, tensor in tensors.items():
        if tensor is None and name in ("A", "B", "bias", "pivots"):
            continue
        if not isinstance(tensor, Tensor):
            allowed = "a Tensor" if name in ("x", "SVh", "U") else "a Tensor or None"
            raise TypeError(f"{name} must be {allowed}, got {type(tensor).__name__}")
        # Before the shapes, since a nested tensor has none.
        if tensor.layout is not torch.strided or tensor.is_nested:
            kind = "a nested one" if tensor.is_nested else f"layout {tensor.layout}"
            raise TypeError(f"{name} must be a strided tensor, got {kind}")
    check_alpha(alpha)
    _refuse_func_transforms(tensors)
    if x.dim() < 1:
        raise ValueError("x must be [..., K] with at least one dim, got a scalar")
    check_shapes(x.shape[-1], "K from x", weights)
    _check_kinds(tensors)
    refuse_forward_mode(tensors)


def check_alpha(alpha: object) -> None:
    """Raise TypeError or ValueError unless alpha is a real number that float32 holds, the type that
    every kernel takes it in."""
    # float first: asking numbers.Real takes 1 us.
    is_real = isinstance(alpha, (float, numbers.Real, torch.SymFloat))
    if not is_real or isinstance(alpha, bool):
        raise TypeError(f"alpha must be a real number, got {type(alpha).__name__}")
    # NumPy would cast the limits to its own type, float16 for one. A float is not asked, since
    # torch.compile can't trace the question where it makes it symbolic.
    if not isinstance(alpha, int | float) and hasattr(alpha, "item"):
        alpha = alpha.item()
    # math.isfinite can't be traced with a symbolic float, and overflows on a large int.
    if not -LARGEST_ALPHA <= alpha <= LARGEST_ALPHA:
        raise ValueError(f"alpha must be finite in float32, got {alpha}")


def check_shapes(K: int, source: str, weights: Weights) -> None:
    """Raise ValueError unless the weights fit one another and K; `source` names K's origin."""
    SVh, U, A, B, bias, _, pivots = weights
    if (A is None) != (B is None):
        given, missing = ("A", "B") if B is None else ("B", "A")
        raise ValueError(
            f"A and B must be given together or not at all, got {given} but {missing} is None"
        )
    _want("SVh", SVh, "[r, K]", (None, K), source)
    rank = weights.rank
    _want("U", U, "[N, r]" if pivots is None else "[N - r, r]", (None, rank), "r from SVh")
    if pivots is not None:
        _want("pivots", pivots, "[r]", (rank,), "r from SVh")
    out_features = weights.out_features
    if A is not None and B is not None:
        _want("A", A, "[ra, K]", (None, K), source)
        _want("B", B, "[N, ra]", (out_features, A.shape[0]), "N from U, ra from A")
    if bias is not None:
        _want("bias", bias, "[N]", (out_features,), "N from U")


def _want(name: str, tensor: Tensor, letters: str, shape: tuple, source: str) -> None:
    if not _has_shape(tensor, shape):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(
            f"{name} must be {letters} = [{wanted}] ({source}), got {list(tensor.shape)}"
        )


def _has_shape(tensor: Tensor, shape: tuple) -> bool:
    if len(tensor.shape) != len(shape):
        return False
    for size, want in zip(tensor.shape, shape, strict=True):  # `all` would take 0.4 us more
        if want is not None and size != want:
            return False
    return True


def _check_kinds(tensors: dict[str, Tensor | None]) -> None:
    x, pivots, device_type = tensors["x"], tensors["pivots"], tensors["x"].device.type
    autocast = device_type in _AUTOCASTING and torch.is_autocast_enabled(device_type)
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")
        if tensor is pivots:
            if tensor.dtype != torch.int32:
                raise TypeError(f"pivots must be int32, got {tensor.dtype}")
        elif tensor.dtype not in FLOATS:
            raise TypeError(
                f"{name} must be one of float64, float32, bfloat16, float16, got {tensor.dtype}"
            )
        elif tensor.dtype != x.dtype and (not autocast or torch.float64 in (tensor.dtype, x.dtype)):
            raise TypeError(f"{name} must have x's dtype {x.dtype}, got {tensor.dtype}")
    if torch.is_grad_enabled():
        for name in ("SVh", "U"):
            if tensors[name].requires_grad:
                raise ValueError(
                    f"{name} must not require grad: it is frozen and has no gradient here"
                )


def refuse_forward_mode(tensors: dict[str, Tensor | None]) -> None:
    """Raise NotImplementedError for a tangent: a custom op would drop it silently, and a derivative
    of zero is a wrong answer."""
    if forward_ad._current_level < 0:
        return
    for name, tensor in tensors.items():
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"svd_lora_linear has no forward-mode derivative, got a tangent on {name}"
            )


def _refuse_func_transforms(tensors: dict[str, Tensor | None]) -> None:
    """Raise NotImplementedError inside torch.func.grad, vjp and jacrev, where torch would speak of
    an autograd.Function without setup_context. vmap has its own refusal below."""
    if torch.compiler.is_compiling():
        return
    interpreter = torch._C._functorch.peek_interpreter_stack()
    if interpreter is None or interpreter.key() != torch._C._functorch.TransformType.Grad:
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(
                f"svd_lora_linear has no rule for torch.func.grad, vjp or jacrev, got {name} to"
                " differentiate: use torch.autograd.grad or .backward()"
            )


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
        _save(ctx, tuple(inputs), output)
        return output[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or _torch_is_watching():  # create_graph=True, or a mode
            backward_op = getattr(torch.ops.hylora, f"{ctx.name}_backward").default
        else:
            backward_op = functools.partial(_gradients, backends.BACKENDS[ctx.name])
        return (*_differentiate(backward_op, ctx, dy, None), None)


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


def _save(
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


def _differentiate(
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
        ops_export.register(op_name, formula, _LIBRARY)
    forward, backward = names
    forward_op, backward_op = (getattr(torch.ops.hylora, op).default for op in names)
    torch.library.register_autograd(
        f"hylora::{forward}",
        functools.partial(_differentiate, backward_op),
        setup_context=functools.partial(_save, frozen=frozen),
        lib=_LIBRARY,
    )
    torch.library.register_autograd(f"hylora::{backward}", _refuse_double_backward, lib=_LIBRARY)
    for device_type in ("cpu", "cuda", "mps", "xpu"):
        key = "Autocast" + (device_type.upper() if device_type != "cuda" else "CUDA")
        _LIBRARY.impl(forward, functools.partial(_autocast, forward_op, device_type), key)
    return forward_op


def _define(name: str, backend: ModuleType) -> Callable[..., Any]:
    """The two ops of one backend."""
    forward = functools.partial(kernel_forward, backend)
    backward = functools.partial(kernel_backward, backend)
    fakes = (fake_forward, fake_backward)
    formulas = (ops_export.forward, ops_export.backward)
    return define(name, (_FORWARD, _BACKWARD), (forward, backward), fakes, formulas, frozen=2)


_FORWARD_OPS = {name: _define(name, backend) for name, backend in backends.BACKENDS.items()}
flops.register(_FORWARD_OPS)
