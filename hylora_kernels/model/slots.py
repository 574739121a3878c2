"""The places in a model for the tensors of its state_dict."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass
class Slot:
    """A place for a tensor: the attribute `name` of a module.

    kind: "parameter", "buffer", or "made" for a buffer that the model makes for itself.
    """

    module: nn.Module
    name: str
    kind: str
    tensor: Tensor

    def set(self, tensor: Tensor) -> Tensor:
        """Put `tensor` there; returns the attribute, which is a new Parameter for a parameter."""
        if self.kind == "parameter":
            tensor = nn.Parameter(tensor, requires_grad=self.tensor.requires_grad)
        setattr(self.module, self.name, tensor)
        return tensor


def slots_of(model: nn.Module) -> dict[str, Slot]:
    """name in a state dict -> place; tied places have the same tensor."""
    slots = {}
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for name, tensor in module._parameters.items():
            if tensor is not None:
                slots[prefix + name] = Slot(module, name, "parameter", tensor)
        for name, tensor in module._buffers.items():
            if tensor is not None:
                kind = "made" if name in module._non_persistent_buffers_set else "buffer"
                slots[prefix + name] = Slot(module, name, kind, tensor)
    return slots


def missing_from(slots: dict[str, Slot], names: Iterable[str]) -> list[str]:
    """The slots without a tensor among `names`, of their own or of a slot they are tied to."""
    filled = {id(slots[name].tensor) for name in names}
    return [n for n, slot in slots.items() if slot.kind != "made" and id(slot.tensor) not in filled]
