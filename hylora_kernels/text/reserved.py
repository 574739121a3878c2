"""A key-value cache whose memory is reserved for a whole text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class ReservedLayer(DynamicLayer):
    """Keys and values [rows, heads, tokens, width] in memory reserved for `length` tokens.

    transformers' dynamic layer copies all tokens for each new one: 90 of 400 ms a step for 32 rows
    of SmolLM2-135M behind 256 tokens. Its static layer has attention run over what is not filled.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.reserved: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add the keys and values of new tokens; returns those of all tokens."""
        new = key_states, value_states
        start = self.get_seq_length()
        if self.reserved is None:
            keys, values = (t.new_empty(*t.shape[:-2], self.length, t.shape[-1]) for t in new)
            self.reserved = keys, values
            self.dtype, self.device = keys.dtype, keys.device
            self.is_initialized = True
        end = start + key_states.shape[-2]
        for tensor, states in zip(self.reserved, new, strict=True):
            tensor[..., start:end, :] = states
        self.keys, self.values = (tensor[..., :end, :] for tensor in self.reserved)
        return self.keys, self.values


@contextmanager
def reserved_cache(model: nn.Module, length: int) -> Iterator[None]:
    """Caches that the model is called with inside reserve memory for `length` tokens at once.

    Layers of another kind, such as a sliding window or the state of a Mamba, stay as they are, and
    so does a model without a cache.
    """

    def reserve(_module: nn.Module, _args: tuple, kwargs: dict) -> None:
        for cache in kwargs.values():
            if isinstance(cache, DynamicCache):
                cache.layers = [_reserved(layer, length) for layer in cache.layers]

    handle = model.register_forward_pre_hook(reserve, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _reserved(layer: Any, length: int) -> Any:
    """A dynamic layer with all that it holds as a reserved one; any other layer as it is."""
    if type(layer) is not DynamicLayer:
        return layer
    reserved = ReservedLayer(length)
    # A cache that was made without a config gets its layers, and what they hold, in a call.
    if layer.keys is not None and layer.values is not None:
        reserved.update(layer.keys, layer.values)
    return reserved
