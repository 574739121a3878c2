"""What was recognised, held against the model's own modules: block by block, by numbers.

Each block computes random hidden states over a cache of random keys and values, twice: as the
module it is, and as a part of the plan. The error of both against float64 is compared for one block
of each kind; the others must agree with their modules as closely as two such results can.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from hylora_kernels import backends
from hylora_kernels.backends.shared.decoder_form import BlockForm
from hylora_kernels.inference.key_values import KeyValues
from hylora_kernels.inference.optimize import restore_from_inference
from hylora_kernels.inference.recognise import Recognised
from hylora_kernels.inference.watch import NotRecognised, first_of, hidden_of

_TOKENS = 40  # of the cache; a window longer than that is only read off the model's mask
_ROWS = 2


class _Step:
    """One token of two sequences through the model's own modules, with random hidden states in
    front of each block."""

    def __init__(self, found: Recognised, memory: KeyValues, slot: int, padding: int) -> None:
        self.memory, self.slot = memory, slot
        self.first_keys = torch.tensor([0, padding], device="cpu")
        self.positions = slot - self.first_keys
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.arguments: list[tuple[tuple, dict]] = []
        generator = torch.Generator().manual_seed(slot)
        slots = torch.arange(slot + 1, device="cpu")

        def before(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            x = hidden_of(args, kwargs)
            noise = torch.randn(x.shape, generator=generator, device="cpu")
            x = (noise * x.float().square().mean().sqrt()).to(x.dtype)
            args, kwargs = (x, *args[1:]) if args else args, dict(kwargs)
            if not args:
                kwargs["hidden_states"] = x
            self.inputs.append(x)
            self.arguments.append((args, kwargs))
            return args, kwargs

        def behind(_module: nn.Module, _args: tuple, output: Any) -> None:
            self.outputs.append(first_of(output))

        hooks = [
            b.register_forward_pre_hook(before, with_kwargs=True) for b in found.blocks.modules
        ]
        hooks += [b.register_forward_hook(behind) for b in found.blocks.modules]
        try:
            self.logits = found.blocks.model(
                input_ids=torch.zeros(_ROWS, 1, dtype=torch.int64, device="cpu"),
                attention_mask=(slots >= self.first_keys[:, None]).long(),
                position_ids=self.positions[:, None],
                past_key_values=memory.cache(_ROWS, slot),
                use_cache=True,
            ).logits[:, -1]
        finally:
            for hook in hooks:
                hook.remove()

    def exactly(self, index: int, exact: nn.Module) -> Tensor:
        """The block's output in float64, by a copy of its module in float64."""
        cache = self.memory.to(torch.float64).cache(_ROWS, self.slot)
        args, kwargs = (_doubled(v, cache) for v in self.arguments[index])
        return first_of(exact(*args, **kwargs))


def _doubled(value: Any, cache: Any) -> Any:
    """Arguments of a block with float64 in the place of other floats, and `cache` as the cache."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: _doubled(v, cache) for name, v in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_doubled(v, cache) for v in value)
    return cache if type(value) is type(cache) else value


@torch.no_grad()
def verify(found: Recognised, dtype: torch.dtype, length: int | None) -> None:
    """Raises NotRecognised where a block, the head or what is cached differs from the model's own
    by more than their rounding explains."""
    capacity = min(_TOKENS, length or _TOKENS)
    form = found.with_positions(capacity)
    plan = backends.decoder_plan(form, dtype)
    doubled: dict[int, nn.Module] = {}  # a block of each kind in float64
    for slot in dict.fromkeys((capacity - 1, min(3, capacity - 1))):
        memory = KeyValues(form, _ROWS, capacity, dtype)
        generator = torch.Generator().manual_seed(slot)
        memory.numbers.copy_(torch.randn(memory.numbers.shape, generator=generator, device="cpu"))
        own = memory.to(dtype)
        step = _Step(found, own, slot, slot // 3)
        place = (memory.numbers, _ROWS, slot, step.positions, step.first_keys)
        if form.embedding is not None:
            tokens = torch.arange(_ROWS, device="cpu")
            x = found.blocks.model.get_input_embeddings()(tokens) * form.embedding_scale
            (ours, _), (wanted, _) = (plan.run(given, *place, (0, 1)) for given in (tokens, x))
            _check(ours, wanted, 0.0, "block 0 of embedded tokens")
        rounding: dict[tuple, float] = {}  # kind of a block -> its module's error, relative
        for index, block in enumerate(form.blocks):
            x, y = step.inputs[index][:, 0], step.outputs[index][:, 0]
            ours, _ = plan.run(x, *place, (index, index + 1))
            kind = _kind(block)
            if kind not in rounding:
                if index not in doubled:
                    block = copy.deepcopy(found.blocks.modules[index])
                    doubled[index] = restore_from_inference(block).double()
                exact = step.exactly(index, doubled[index])[:, 0]
                rounding[kind] = _distance(y, exact)
                _check(ours, exact, 2 * rounding[kind], f"block {index}")
            _check(ours, y, 3 * rounding[kind], f"block {index}")
        last = step.outputs[-1][:, 0]
        logits, _ = plan.run(last, *place, (len(form.blocks), len(form.blocks) + 1))
        _check(logits, step.logits, 0.0, "the head")
        for index, pairs in enumerate(zip(memory.blocks(), own.blocks(), strict=True)):
            for ours, theirs in zip(*pairs, strict=True):
                _check(ours, theirs, 0.0, f"what block {index} caches")


def _check(ours: Tensor, wanted: Tensor, allowed: float, what: str) -> None:
    error = _distance(ours, wanted)
    if not error <= allowed + 4 * torch.finfo(ours.dtype).eps:
        raise NotRecognised(
            f"{what} differs from the model's own by {error:.1e}, more than rounding does"
        )


def _distance(a: Tensor, b: Tensor) -> float:
    """Relative to b."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


def _kind(block: BlockForm) -> tuple:
    """Equal for blocks that differ in their weights alone."""
    norms = (block.attention_norm, block.attention_post_norm, block.mlp_norm, block.mlp_post_norm)
    heads = ((h.count, h.size, h.column, h.stride, h.norm is None) for h in (block.q, block.k))
    rotary = block.rotary and block.rotary.pairs
    flat = (block.window, block.scale, block.softcap, block.parallel, block.activation, rotary)
    return (*(norm is None for norm in norms), *heads, *flat, block.inner)
