"""The parameters of a packed layer: the layer's own objects, without their memory."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_map

RESTORE_HINT = "restore_from_inference(model) first"

_T: Any = Tensor
# Answered by the emptied parameter itself: its gradient, its hooks, and all that packing leaves.
_OF_THE_OBJECT = {
    *(_T.grad.__get__, _T.grad.__set__, _T.grad.__delete__, _T.requires_grad.__get__),
    *(_T.is_leaf.__get__, _T.grad_fn.__get__, _T.dtype.__get__, _T.device.__get__),
    *(_T.layout.__get__, _T.is_cuda.__get__, _T._version.__get__, _T.is_inference, _T.__hash__),
    *(_T._backward_hooks.__get__, _T._backward_hooks.__set__, _T.register_hook),
    *(_T._post_accumulate_grad_hooks.__get__, _T._post_accumulate_grad_hooks.__set__),
    *(_T.register_post_accumulate_grad_hook, _T.is_floating_point, _T.is_complex),
}
# Answered by a meta tensor of the packed shape.
_OF_THE_SHAPE = {
    *(_T.shape.__get__, _T.size, _T.numel, _T.nelement, _T.dim, _T.ndim.__get__, _T.__len__),
    *(_T.stride, _T.nbytes.__get__, _T.is_contiguous),
}


class PackedParameter(nn.Parameter):
    """A parameter while a layer packed for inference holds its numbers.

    It is the very object that the layer had, so an optimizer, a hook or another module that holds
    it holds it still. It reads as a copy of the packed numbers, made for every read. A write to it
    or to a view of it raises RuntimeError; only `parameter.data = tensor` is followed, by restoring
    the layer first. Until then it requires no gradient.
    """

    packed: _Packed

    @staticmethod
    def of(parameter: nn.Parameter, state: Any, name: str) -> PackedParameter:
        """Empty the parameter and make it one; the same object.

        From now on state.plain()[name] gives its numbers and state.restore() restores it.
        """
        packed = _Packed(
            state,
            name,
            parameter.requires_grad,
            parameter.dtype,
            (parameter.storage_offset(), parameter.shape, parameter.stride()),
            StorageWeakRef(parameter.untyped_storage()),
        )
        parameter.requires_grad_(False)
        parameter.data = parameter.data.new_empty(0)
        parameter.__class__ = PackedParameter
        assert isinstance(parameter, PackedParameter)
        return parameter._with(packed)

    def _with(self, packed: _Packed) -> PackedParameter:
        self.packed = packed
        packed.state.parameters[packed.name] = self
        return self

    def restore(self, values: Tensor) -> None:
        """Make it a plain parameter with these values; the same object."""
        needed_grad = self.packed.needed_grad
        del self.packed
        self.__class__ = nn.Parameter  # type: ignore[assignment]
        self.data = values
        self.requires_grad_(needed_grad)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _OF_THE_OBJECT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func == _T.data.__get__:  # the parameter again, so that a write to it raises
            return args[0]
        if func == _T.data.__set__ and isinstance(args[0], cls):
            args[0].packed.state.restore()
            return func(*args)
        if func == _T.detach:  # of an inference tensor, it would be one that can be written to
            with torch.inference_mode():
                return args[0].packed.values()
        read = _Packed.shape if func in _OF_THE_SHAPE else _Packed.values
        with torch.inference_mode():
            args, kwargs = tree_map(
                lambda value: read(value.packed) if isinstance(value, cls) else value,
                (args, kwargs),
            )
        # The copies are inference tensors: outside of inference mode torch refuses writes to them.
        grad = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(grad):
            try:
                return func(*args, **kwargs)
            except RuntimeError as error:
                if "inference tensor" not in str(error):
                    raise
                raise RuntimeError(
                    f"a parameter packed for inference can't be written to: {RESTORE_HINT}"
                    f" ({str(error).split('. ')[0]})"
                ) from error

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            state = copy.deepcopy(self.packed.state, memo)
            memo[id(self)] = _empty(self.dtype, self.device)._with(self.packed.of_copy(state))
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        return _empty, (self.dtype, self.device), self.packed.of_copy(self.packed.state)

    def __setstate__(self, packed):
        self._with(packed)


def _empty(dtype: torch.dtype, device: torch.device) -> PackedParameter:
    return PackedParameter(torch.empty(0, dtype=dtype, device=device), requires_grad=False)


@dataclass
class _Packed:
    """All that a packed parameter knows.

    place:  its storage offset, size and stride.
    memory: where its numbers were. If that is a part of a flat buffer or shared with another
            parameter, packing has not freed it, and restoring goes back to it. None in a copy.
    """

    state: Any
    name: str
    needed_grad: bool
    dtype: torch.dtype
    place: tuple[int, torch.Size, tuple[int, ...]]
    memory: StorageWeakRef | None

    def of_copy(self, state: Any) -> _Packed:
        return replace(self, state=state, memory=None)

    def values(self) -> Tensor:
        return self.state.plain()[self.name]

    def shape(self) -> Tensor:
        return torch.empty_strided(*self.place[1:], dtype=self.dtype, device="meta")

    def refilled(self, values: Tensor) -> Tensor:
        """The parameter's own memory if it is still there, else the values in their old strides."""
        if self.memory is not None:
            storage = torch.UntypedStorage._new_with_weak_ptr(self.memory.cdata)
            if storage is not None:
                return values.new_empty(0).set_(storage, *self.place)
        if values.stride() == self.place[2]:
            return values
        return values.new_empty_strided(*self.place[1:]).copy_(values)
