"""Layers whose weights are packed for inference: the same place and name, another class."""

from __future__ import annotations

from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from hylora_kernels import backends
from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.ops import packed_embedding, packed_linear

RESTORE_HINT = "restore_from_inference(model) first"


class PackedState:
    """What the layers that share a weight hold together once it is packed.

    wider: parameters of a wider dtype than the packed one (float32 masters of an adapter), which
           panels don't hold exactly: they stay.
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
        """The same as parameters, made once: tied layers get the same one back."""
        if self.restored is None:
            with torch.inference_mode(False), torch.no_grad():
                self.restored = {
                    name: None if t is None else nn.Parameter(t, self.needed_grad[name])
                    for name, t in self.plain().items()
                }
        return self.restored


# state of layers that share a weight -> what the last state_dict() call got of it
_lent: WeakKeyDictionary[PackedState, ref] = WeakKeyDictionary()


class PackedModule(nn.Module):
    """A layer whose parameters `names` lie in `held`."""

    names: tuple[str, ...]
    plain_class: type[nn.Module]
    held: PackedState

    def restore(self) -> None:
        """Make the layer what it was, with parameters of the same bits."""
        held = self.held
        own, buffers = self._parameters.copy(), len(held.tensors)
        self.__class__ = self.plain_class
        self._parameters.clear()
        self._parameters.update({**held.parameters(), **own})
        del self.held
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
        """To the dtype and device that it has already, nothing is to be done; to others it goes as
        what it was, with everything tied to it (the next layer finds its parameter restored)."""
        probe = torch.empty(0, dtype=self.held.packed.dtype)
        moved = fn(probe)
        if (moved.dtype, moved.device) == (probe.dtype, probe.device):
            return self
        self.restore()
        return self._apply(fn, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        lent = _lent.get(self.held, lambda: None)()
        if lent is not None and any(value is lent for value in destination.values()):
            plain = {"weight": lent.detach()}  # tied, and already there
        else:
            plain = self.held.plain()
            if "weight" in plain:
                _lent[self.held] = ref(plain["weight"])
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
    """A plain copy on every access. An inference tensor, so that a write to it is an error instead
    of being lost."""

    def read(self: PackedModule) -> Tensor | None:
        with torch.inference_mode():
            return self.held.plain()[name]

    return property(read, doc=f"A copy of the packed {name}, to read.")


class PackedSVDLoRALinear(PackedModule, SVDLoRALinear):
    """An SVDLoRALinear that optimize_for_inference has packed."""

    names, plain_class = ("SVh", "U", "A", "B"), SVDLoRALinear
    SVh, U, A, B = (_copy_of(name) for name in names)

    def forward(self, x: Tensor) -> Tensor:
        return packed_linear(x, self.held.packed)

    @property
    def rank(self) -> int:
        return self.held.packed.rank

    @property
    def lora_rank(self) -> int:
        return self.held.packed.lora_rank

    def parameter_count(self, merged: bool = True) -> int:
        return super().parameter_count(True) if merged else self.held.count

    def merge(self) -> SVDLoRALinear:
        if self.lora_rank:
            raise RuntimeError(f"a layer packed for inference can't be merged: {RESTORE_HINT}")
        return self

    def to_linear(self) -> nn.Linear:
        plain = SVDLoRALinear.from_factors(
            **self.held.plain(), bias=self.bias, alpha=self.alpha, pivots=self.pivots
        )
        return plain.eval().to_linear()


class PackedLinear(PackedModule, nn.Linear):
    """An nn.Linear that optimize_for_inference has packed."""

    names, plain_class = ("weight",), nn.Linear
    weight = _copy_of("weight")

    def forward(self, x: Tensor) -> Tensor:
        return packed_linear(x, self.held.packed)


class PackedEmbedding(PackedModule, nn.Embedding):
    """An nn.Embedding that reads the panels of the linear it is tied to."""

    names, plain_class = ("weight",), nn.Embedding
    weight = _copy_of("weight")

    def forward(self, ids: Tensor) -> Tensor:
        return packed_embedding(ids, self.held.packed)


def packed_class(module: nn.Module) -> type[PackedModule]:
    classes = (PackedSVDLoRALinear, PackedLinear, PackedEmbedding)
    return next(c for c in classes if c.plain_class is type(module))


def refuse_packed(model: nn.Module) -> None:
    """Raise ValueError where layers are packed for inference, and can't be trained or replaced."""
    if held_by(model):
        raise ValueError(f"model must not be packed for inference: {RESTORE_HINT}")


def held_by(model: nn.Module) -> list[PackedState]:
    """What the model's optimised layers hold in the place of parameters, each once."""
    found = {id(m.held): m.held for m in model.modules() if isinstance(m, PackedModule)}
    return list(found.values())
