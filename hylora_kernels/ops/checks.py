"""Argument checks of the ops: each error names the argument, what was given and what is allowed."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hylora_kernels.weights import Weights

CASTABLE = (torch.float32, torch.bfloat16, torch.float16)  # by autocast
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LARGEST_ALPHA = torch.finfo(torch.float32).max
# Asked once here, since torch.compile (2.11) can't trace the question.
_AUTOCASTING = [d for d in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(d)]


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
