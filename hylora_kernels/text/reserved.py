"""A key-value cache whose memory is reserved for a whole text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from hylora_kernels.model.cache import reserve


@contextmanager
def reserved_cache(model: nn.Module, length: int) -> Iterator[None]:
    """Caches that the model is called with inside reserve memory for `length` tokens at once."""

    def reserve_all(_module: nn.Module, _args: tuple, kwargs: dict) -> None:
        for value in kwargs.values():
            reserve(value, length)

    handle = model.register_forward_pre_hook(reserve_all, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
