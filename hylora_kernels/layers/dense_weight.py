"""`layer.weight` of a layer that holds no such matrix: computed when read, never written to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

_READ_ONLY = (
    "weight of an SVDLoRALinear is computed from SVh, U, A and B, so it can't be written to: write "
    "to these, or put layer.to_linear() in the layer's place"
)


class DenseWeight(Tensor):
    """W [N, K] of the layer that `compute` belongs to.

    Its dtype, device and shape cost nothing, since models such as T5 ask for them in every forward.
    Any other operation computes W, with gradients for what `compute` differentiates. Operations
    that would write to W, through .data and .detach() too, raise RuntimeError; views of W and the
    results of other operations are tensors of their own.
    """

    _compute: Callable[[], Tensor]

    @staticmethod
    def __new__(
        cls, compute: Callable[[], Tensor], shape: tuple[int, int], **kind: Any
    ) -> DenseWeight:
        return Tensor._make_wrapper_subclass(cls, shape, **kind)

    def __init__(self, compute: Callable[[], Tensor], shape: tuple[int, int], **kind: Any) -> None:
        self._compute = compute

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _FREE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if _writes(func.__name__, args, kwargs):
            raise RuntimeError(_READ_ONLY)
        if func in _ALIASES:
            W = args[0]
            kind = {"dtype": W.dtype, "device": W.device, "requires_grad": False}
            return cls(lambda: W._compute().detach(), W.shape, **kind)
        return func(*_computed(args), **_computed(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Calls that come from C++, or with __torch_function__ switched off."""
        kwargs = kwargs or {}
        written = [a for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
        named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        if any(isinstance(named.get(a.name), DenseWeight) for a in written):
            raise RuntimeError(_READ_ONLY)
        return func(*_computed(args), **_computed(kwargs))


def _computed(values: Any) -> Any:
    return tree_map_only(DenseWeight, lambda W: W._compute(), values)


def _writes(name: str, args: tuple, kwargs: dict) -> bool:
    """True if the function writes to a DenseWeight: to its first argument, or to out=."""
    name = name.partition(".")[0]  # of an overload such as mul_.Scalar
    in_place = name.endswith("_") and not name.endswith("__")
    assigns = name in ("__setitem__", "__set__", "__delete__")
    operator = name.startswith("__i") and name not in ("__int__", "__invert__", "__index__")
    first = args[0] if args else next(iter(kwargs.values()), None)
    to_first = in_place or assigns or operator or kwargs.get("inplace", False)
    written = tree_leaves((first if to_first else None, kwargs.get("out")))
    return any(isinstance(tensor, DenseWeight) for tensor in written)


_ALIASES = {Tensor.data.__get__, Tensor.detach, torch.detach}
_FREE = {
    *(
        getattr(Tensor, name).__get__
        for name in (
            *("dtype", "device", "shape", "ndim", "layout", "requires_grad", "grad", "nbytes"),
            *("is_cpu", "is_cuda", "is_meta", "is_sparse", "is_quantized", "is_nested"),
        )
    ),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.stride),
    *(Tensor.is_floating_point, torch.is_floating_point, Tensor.is_complex, torch.is_complex),
    *(Tensor.is_contiguous, Tensor.get_device, Tensor.is_inference, Tensor.__len__),
}
