"""The modules whose weights are packed for inference, and the way there and back.

A packed layer keeps its place, its name and its hooks; its class changes and its parameters give
way to the packed weights.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from hylora_kernels import backends
from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.ops import packed_embedding, packed_linear

RESTORE_HINT = "restore_from_inference(model) first"


class PackedState:
    """The packed weights of one layer, or of several that share them.

    wider: parameters of a wider dtype than the packed one (float32 masters of an adapter). They
           stay, since panels would not hold them exactly.
    """

    def __init__(self, packed, parameters: dict[str, nn.Parameter | None]):
        self.packed = packed
        there = {name: p for name, p in parameters.items() if p is not None}
        self.needed_grad = {name: p.requires_grad for name, p in there.items()}
        self.wider = {name: p for name, p in there.items() if p.dtype != packed.dtype}
        self.count = sum(p.numel() for p in there.values())
        self.plain_bytes = sum(p.nbytes for p in there.values())
        self.tensors = [*packed.tensors, *(p.detach() for p in self.wider.values())]
        self.restored: dict[str, nn.Parameter | None] | None = None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    def plain(self) -> dict[str, Tensor | None]:
        """SVh, U, A, B of an SVDLoRALinear or weight of a dense layer, as they were."""
        if self.restored is not None:
            return self.restored
        if "weight" in self.needed_grad:
            return {"weight": backends.unpack(self.packed).SVh}
        weights = backends.unpack(self.packed)
        return {name: getattr(weights, name) for name in ("SVh", "U", "A", "B")} | self.wider

    def parameters(self) -> dict[str, nn.Parameter | None]:
        """plain() as parameters, made once, so that tied layers get the same one back."""
        if self.restored is None:
            with torch.inference_mode(False), torch.no_grad():
                self.restored = {
                    name: None if t is None else nn.Parameter(t, self.needed_grad[name])
                    for name, t in self.plain().items()
                }
        return self.restored


# state of layers that share a weight -> the copy that the last state_dict() call got of it, so that
# tied layers put one tensor into a checkpoint
_last_export: WeakKeyDictionary[PackedState, ref] = WeakKeyDictionary()


class PackedModule(nn.Module):
    """A layer whose parameters `names` are packed in `packed_state`."""

    names: tuple[str, ...]
    plain_class: type[nn.Module]
    packed_state: PackedState

    def restore(self) -> None:
        """Turn the layer back into its plain class, with parameters of the same bits."""
        state = self.packed_state
        own, buffers = self._parameters.copy(), len(state.tensors)
        self.__class__ = self.plain_class
        self._parameters.clear()
        self._parameters.update({**state.parameters(), **own})
        del self.packed_state
        for index in range(buffers):
            delattr(self, f"packed_{index}")

    def train(self, mode: bool = True):
        if mode:
            raise RuntimeError(f"a layer packed for inference can't be trained: {RESTORE_HINT}")
        return nn.Module.train(self, False)

    def __setattr__(self, name, value):
        if name in self.names:
            raise RuntimeError(f"{name} is packed for inference and can't be set: {RESTORE_HINT}")
        super().__setattr__(name, value)

    def _apply(self, fn, recurse=True):
        """No-op if dtype and device stay the same; otherwise restore the plain layer, and with it
        everything tied to it, and move that."""
        probe = torch.empty(0, dtype=self.packed_state.packed.dtype)
        moved = fn(probe)
        if (moved.dtype, moved.device) == (probe.dtype, probe.device):
            return self
        self.restore()
        return self._apply(fn, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        last_export = _last_export.get(self.packed_state, lambda: None)()
        if last_export is not None and any(value is last_export for value in destination.values()):
            plain = {"weight": last_export.detach()}  # tied, and already there
        else:
            plain = self.packed_state.plain()
            if "weight" in plain:
                _last_export[self.packed_state] = ref(plain["weight"])
        for name, tensor in plain.items():
            if tensor is not None:
                is_parameter = isinstance(tensor, nn.Parameter)
                destination[prefix + name] = (
                    tensor.detach() if is_parameter and not keep_vars else tensor
                )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        error_msgs.append(f"{prefix[:-1] or 'the layer'} is packed for inference: {RESTORE_HINT}")


def _copy_of(name: str) -> property:
    """A plain copy on every access, as an inference tensor: a write to it raises instead of being
    lost."""

    def read(self: PackedModule) -> Tensor | None:
        with torch.inference_mode():
            return self.packed_state.plain()[name]

    return property(read, doc=f"A copy of the packed {name}, to read.")


class PackedSVDLoRALinear(PackedModule, SVDLoRALinear):
    """An SVDLoRALinear that optimize_for_inference has packed."""

    names, plain_class = ("SVh", "U", "A", "B"), SVDLoRALinear
    SVh, U, A, B = (_copy_of(name) for name in names)

    def forward(self, x: Tensor) -> Tensor:
        return packed_linear(x, self.packed_state.packed)

    @property
    def rank(self) -> int:
        return self.packed_state.packed.rank

    @property
    def lora_rank(self) -> int:
        return self.packed_state.packed.lora_rank

    def parameter_count(self, merged: bool = True) -> int:
        return super().parameter_count(True) if merged else self.packed_state.count

    def merge(self) -> SVDLoRALinear:
        if self.lora_rank:
            raise RuntimeError(f"a layer packed for inference can't be merged: {RESTORE_HINT}")
        return self

    def to_linear(self) -> nn.Linear:
        plain = SVDLoRALinear.from_factors(
            **self.packed_state.plain(), bias=self.bias, alpha=self.alpha, pivots=self.pivots
        )
        return plain.eval().to_linear()


class PackedLinear(PackedModule, nn.Linear):
    """An nn.Linear that optimize_for_inference has packed."""

    names, plain_class = ("weight",), nn.Linear
    weight = _copy_of("weight")

    def forward(self, x: Tensor) -> Tensor:
        return packed_linear(x, self.packed_state.packed)


class PackedEmbedding(PackedModule, nn.Embedding):
    """An nn.Embedding that reads the panels of the linear it is tied to."""

    names, plain_class = ("weight",), nn.Embedding
    weight = _copy_of("weight")

    def forward(self, ids: Tensor) -> Tensor:
        return packed_embedding(ids, self.packed_state.packed)


def convert_layer(layer: nn.Module, state: PackedState) -> None:
    """Make the layer one that reads the packed weights, and drop its own."""
    new_class = packed_class(layer)
    if isinstance(layer, SVDLoRALinear):
        backends.forget(layer.SVh)
    for name in new_class.names:
        layer._parameters.pop(name, None)
    layer.packed_state = state
    for index, tensor in enumerate(state.tensors):  # buffers, so that sums of memory count them
        layer.register_buffer(f"packed_{index}", tensor, persistent=False)
    layer.__class__ = new_class


def packed_class(module: nn.Module) -> type[PackedModule]:
    classes = (PackedSVDLoRALinear, PackedLinear, PackedEmbedding)
    return next(c for c in classes if c.plain_class is type(module))


def refuse_packed(model: nn.Module) -> None:
    """Raise ValueError if a layer is packed for inference: it can't be trained or replaced."""
    if packed_states(model):
        raise ValueError(f"model must not be packed for inference: {RESTORE_HINT}")


def packed_states(model: nn.Module) -> list[PackedState]:
    """The states of the model's packed layers, each once."""
    found = {
        id(m.packed_state): m.packed_state for m in model.modules() if isinstance(m, PackedModule)
    }
    return list(found.values())
