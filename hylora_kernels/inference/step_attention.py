"""Attention of one query over a static cache, for the steps that a CUDA graph replays.

transformers' "sdpa" repeats keys and values for each query head and has them read once more, since
torch's fast kernels take no mask with grouped heads. Here the query heads of a group are the rows
of one product, so that keys and values are read once, as they lie in the cache.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "hylora_step"
ALTERING = (
    "position_bias",
    "softcap",
    "s_aux",
    "sinks",
    "indices",
    "cache",
)  # what attend() doesn't know
_lock = threading.RLock()  # one thread at a time changes the attention that a model asks for


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query [n, heads, 1, D], key [n, groups, L, D], value [n, groups, L, Dv], attention_mask bool
    [n, 1, 1, L], at least one of a row true, or None -> ([n, 1, heads, Dv], None), as transformers
    has it. The softmax is float32, as in torch's kernels, and on a GPU the scores are.

    Several queries, a mask of numbers and what alters the scores go to "sdpa".
    """
    n, heads, queries, size = query.shape
    is_boolean = attention_mask is None or attention_mask.dtype == torch.bool
    if queries > 1 or not is_boolean or any(others.get(name) is not None for name in ALTERING):
        given = (module, query, key, value, attention_mask)
        return sdpa_attention_forward(*given, scaling=scaling, **others)
    groups, length = key.shape[1:3]
    rows = query.reshape(n * groups, heads // groups, size)
    scores = _scores(rows, key.reshape(n * groups, length, size).transpose(1, 2))
    scores, scaling = scores.view(n, groups, -1, length), size**-0.5 if scaling is None else scaling
    if attention_mask is None:
        scores = scores * scaling
    else:
        scores = torch.add(torch.where(attention_mask, 0.0, -torch.inf), scores, alpha=scaling)
    shares = scores.softmax(-1).to(value.dtype).view(n * groups, -1, length)
    y = shares @ value.reshape(n * groups, length, -1)
    return y.view(n, 1, heads, -1), None


def _scores(rows: Tensor, keys: Tensor) -> Tensor:
    """The products in float32; a GPU doesn't round them in between."""
    if rows.is_cuda and rows.dtype in (torch.float16, torch.bfloat16):
        return torch.bmm(rows, keys, out_dtype=torch.float32)
    return torch.bmm(rows, keys).float()


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextlib.contextmanager
def attending(model: nn.Module) -> Iterator[None]:
    """Inside it the model's attention is attend(), if its class looks attention up by name."""
    if not model._can_set_attn_implementation():
        yield
        return
    config = model.config.get_text_config()
    with _lock:
        before = config._attn_implementation
        config._attn_implementation = NAME
        try:
            yield
        finally:
            config._attn_implementation = before
