"""A forward as it is seen from outside: what each block, layer, norm and attention reads and makes.

Attention is seen by transformers' own interface for it: while a model is watched, an attention
function of ours computes it and notes queries, keys, values, scale and mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from hylora_kernels.layers.packed import PackedModule

_NAME = "hylora_watched"


class NotRecognised(Exception):
    """The reason why a model has no form that a decoder knows, in words."""


@dataclass
class Blocks:
    """A model and its decoder blocks. in_tuples: they return hidden states in a tuple, as many of
    transformers 4 do; watch() finds out."""

    model: Any
    modules: list[nn.Module]
    in_tuples: bool = False


@dataclass
class Call:
    """One call of a leaf module: x and y of one sequence, [tokens, ...]."""

    module: nn.Module
    x: Tensor
    y: Tensor


@dataclass
class Attention:
    """q, k and v as [heads, tokens, size], rotated; out [tokens, heads * size]."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    scale: float
    softcap: float


@dataclass
class Seen:
    """What one block did: its input and output [tokens, width], its calls in order, and all tensors
    among its arguments."""

    x: Tensor
    y: Tensor
    calls: list[Call | Attention] = field(default_factory=list)
    arguments: list[Any] = field(default_factory=list)


@dataclass
class Watched:
    """A forward: the embedding's output, the blocks, the calls behind them, the logits."""

    embedded: Tensor
    blocks: list[Seen]
    behind: list[Call]
    logits: Tensor


@torch.no_grad()
def watch(blocks: Blocks, ids: Tensor) -> Watched:
    """Watch a forward on ids [1, tokens], without a cache."""
    model = blocks.model
    seen: list[Seen] = []
    behind: list[Call] = []
    embedded: list[Tensor] = []
    calls: list[Any] = behind
    hooks = []

    def before_block(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal calls
        x = hidden_of(args, kwargs)
        seen.append(Seen(x[0].clone(), x, arguments=[*args, *kwargs.values()]))
        calls = seen[-1].calls

    def behind_block(_module: nn.Module, _args: tuple, output: Any) -> None:
        nonlocal calls
        blocks.in_tuples = isinstance(output, tuple)
        seen[-1].y = first_of(output)[0].clone()
        calls = behind

    def behind_leaf(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        given = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        if len(given) != 1 or not isinstance(output, Tensor) or not given[0].is_floating_point():
            return
        if output.shape != given[0].shape or not torch.equal(output, given[0]):  # no dropout
            calls.append(Call(module, given[0][0].clone(), output[0].clone()))

    def note(attention: Attention) -> None:
        calls.append(attention)

    # A packed layer is a leaf, though its codes stand in modules of their own.
    leaves = {
        id(m): m for m in model.modules() if isinstance(m, PackedModule) or not list(m.children())
    }
    embedding = model.get_input_embeddings()
    try:
        for leaf in leaves.values():
            hooks.append(leaf.register_forward_hook(behind_leaf, with_kwargs=True))
        for block in blocks.modules:
            hooks.append(block.register_forward_pre_hook(before_block, with_kwargs=True))
            hooks.append(block.register_forward_hook(behind_block))
        hooks.append(
            embedding.register_forward_hook(lambda _m, _a, output: embedded.append(output[0]))
        )
        with _attention_noted(model, note):
            logits = model(input_ids=ids, use_cache=False).logits[0]
    finally:
        for hook in hooks:
            hook.remove()
    if len(embedded) != 1 or len(seen) != len(blocks.modules):
        raise NotRecognised("its embedding and each of its blocks are not called once a forward")
    return Watched(embedded[0], seen, behind, logits)


@torch.no_grad()
def arguments_of_blocks(
    blocks: Blocks, count: int, first: int = 0, cache: Any = None
) -> list[list[Any]]:
    """All arguments of each block for `count` tokens at the positions from `first` on, without
    computing any block, nor the output head: its logits of 8192 positions would take 8 seconds."""
    found: list[list[Any]] = []
    ids = torch.zeros(1, count, dtype=torch.int64, device="cpu")
    positions = torch.arange(first, first + count, device="cpu")[None]

    def skip(*args: Any, **kwargs: Any) -> Any:
        found.append([*args, *kwargs.values()])
        hidden = hidden_of(args, kwargs)
        return (hidden,) if blocks.in_tuples else hidden

    try:
        for block in blocks.modules:
            block.forward = skip  # type: ignore[assignment]
        with _attention_noted(blocks.model, lambda attention: None):
            blocks.model.base_model(
                input_ids=ids,
                position_ids=positions,
                past_key_values=cache,
                use_cache=cache is not None,
            )
    finally:
        for block in blocks.modules:
            vars(block).pop("forward", None)
    return found


def hidden_of(args: tuple, kwargs: dict) -> Tensor:
    """A block's hidden states among its arguments."""
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        raise NotRecognised("its blocks do not get hidden states [n, tokens, width] first")
    return hidden


def first_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def _attention_noted(model: Any, note: Callable[[Attention], None]) -> Iterator[None]:
    """All attention of the model is computed by attend(), and noted."""

    def attended(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        dropout: float = 0.0,
        **others: Any,
    ) -> tuple[Tensor, None]:
        for name in ("s_aux", "sinks", "position_bias"):
            if others.get(name) is not None:
                raise NotRecognised(f"its attention has {name}")
        if attention_mask is None:
            raise NotRecognised("its attention gets no mask")
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        out = attend(query, key, value, attention_mask, scale, softcap)
        note(
            Attention(
                *(t[0].clone() for t in (query, key, value)),
                out[0].flatten(1),
                scale,
                float(softcap or 0),
            )
        )
        return out, None

    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    AttentionInterface.register(_NAME, attended)
    AttentionMaskInterface.register(_NAME, _whole_mask)
    try:
        for config in configs.values():
            config._attn_implementation = _NAME
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
        AttentionInterface._global_mapping.pop(_NAME, None)
        AttentionMaskInterface._global_mapping.pop(_NAME, None)


def _whole_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """True where a query sees a key; never left out because attention is causal anyway."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """q [n, heads, tokens, size], k and v [n, kv heads, ...] -> [n, tokens, heads, size]."""
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    scores = (q @ k.transpose(2, 3)).float() * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~mask[..., : k.shape[2]], -torch.inf).softmax(-1)
    return (F.dropout(weights, 0.0).to(v.dtype) @ v).transpose(1, 2).contiguous()
