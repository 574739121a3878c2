"""A decoder step as one call of C++: all blocks, the head and the likeliest token.

Prompts run through the model's own modules, which write keys and values to the memory that the
steps read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hylora_kernels import backends
from hylora_kernels.inference.key_values import KeyValues
from hylora_kernels.inference.modules import FIRST_BUCKET, Modules
from hylora_kernels.inference.recognise import recognise
from hylora_kernels.inference.verify import verify
from hylora_kernels.inference.watch import NotRecognised
from hylora_kernels.layers.packed import conversions
from hylora_kernels.support.devices import floating_dtype

_LONGEST = 1 << 17  # tokens of a model without a context, for which its windows are looked at


class Changed(Exception):
    """The reason why a plan does not fit its model any more, in words."""


class Native(Modules):
    """Modules whose steps are computed by a plan of the whole decoder.

    The plan is made anew when the cache grows. prefill raises Changed when a parameter or a buffer
    of the model is another one than when it was recognised; step, once any layer was packed or
    restored.
    """

    name = "cpu"

    def __init__(self, model: Any, batch: int, length: int | None) -> None:
        if reason := _why_not(model):
            raise NotRecognised(reason)
        self.sequences, self.limit = batch, length
        self.dtype = floating_dtype(model)
        try:
            self.found = recognise(model, length or _LONGEST)
            verify(self.found, self.dtype, length)
        except NotRecognised:
            raise
        except Exception as error:  # A model may want other arguments, or fail in any way.
            line = (str(error).splitlines() or [""])[0]
            raise NotRecognised(f"to watch it fails: {type(error).__name__}: {line}") from error
        self.embedding = model.get_input_embeddings()
        self.memory: KeyValues | None = None
        self.parameters = list(_parameters(model))
        self.conversions = conversions()
        super().__init__(model)

    def reset(self) -> None:
        super().reset()
        self.slot = 0
        self.first_keys = torch.zeros(0, dtype=torch.int64, device="cpu")
        self.likeliest: Tensor | None = None

    def prefill(self, ids: Tensor, mask: Tensor) -> Tensor:
        self._check()
        self.reset()
        self._reserve(ids.shape[1])
        logits = super().prefill(ids, mask)
        self.slot, self.first_keys = ids.shape[1], ids.shape[1] - mask.sum(1)
        return logits

    def _first_state(self, rows: int) -> dict[str, Any]:
        assert self.memory is not None
        return {"past_key_values": self.memory.cache(rows, 0)}

    def step(self, tokens: Tensor) -> Tensor:
        if conversions() != self.conversions:
            self._check()
        self._reserve(self.slot + 1)
        assert self.memory is not None
        form, x = self.found.form, tokens
        if form.embedding is None:
            x = self.embedding(tokens)
            x = x if form.embedding_scale == 1 else x * form.embedding_scale
        logits, self.likeliest = self.plan.run(
            x, self.memory.numbers, self.sequences, self.slot, None, self.first_keys
        )
        self.slot += 1
        return logits

    def as_modules(self) -> Modules:
        """The model's own modules, to go on from here."""
        modules = Modules(self.model)
        if self.slot and self.memory is not None:
            slots = torch.arange(self.slot, device="cpu")
            modules.mask = (slots >= self.first_keys[:, None]).long()
            modules.positions = (self.slot - 1 - self.first_keys)[:, None]
            cache = self.memory.cache(len(self.first_keys), self.slot)
            modules.state = {"past_key_values": cache}
        return modules

    def _reserve(self, tokens: int) -> None:
        """Have room for so many tokens: twice the room until they fit, but not beyond the limit."""
        capacity = self.memory.capacity if self.memory else FIRST_BUCKET
        while capacity < tokens:
            capacity *= 2
        if self.limit is not None:
            capacity = min(capacity, self.limit)
        if self.memory is None:
            self.memory = KeyValues(self.found.form, self.sequences, capacity, self.dtype)
        elif capacity > self.memory.capacity:
            self.memory = self.memory.grown(capacity, self.slot)
        else:
            return
        self.plan = backends.decoder_plan(self.found.with_positions(capacity), self.dtype)

    def _check(self) -> None:
        self.conversions = conversions()
        for owner, name, tensor, version in self.parameters:
            if owner.get(name) is not tensor or (
                version is not None and tensor._version != version
            ):
                raise Changed(f"the model's {name} has changed")


def _parameters(model: nn.Module) -> Iterator[tuple[dict, str, Tensor, int | None]]:
    """(dict that holds it, its name in there, the tensor, its version) of all that a plan may have
    read: packed weights are buffers."""
    for module in model.modules():
        for owner in (module._parameters, module._buffers):
            for name, tensor in owner.items():
                if tensor is not None:
                    version = None if tensor.is_inference() else tensor._version
                    yield owner, name, tensor, version


def _why_not(model: nn.Module) -> str:
    """The reason why no model like this one is computed whole, "" if there is none."""
    if hasattr(model, "_orig_mod"):
        return "torch.compile has compiled it"
    for path, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{path or 'it'} has forward hooks"
    devices = {p.device.type for p in model.parameters()}
    if devices - {"cpu"}:
        return (
            f"it is on {', '.join(sorted(devices))}, and steps are computed whole on the CPU only"
        )
    return ""
