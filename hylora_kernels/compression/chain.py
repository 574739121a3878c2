"""The blocks of a model as a chain: hidden states run through one block at a time.

A model calls its blocks with more than hidden states: masks and position embeddings, which are the
same for every sample, but also per-layer inputs (Gemma 4) or the embeddings once more (Zamba),
which are not, and dicts in which blocks leave keys and values for later ones (Gemma 3n). Each batch
therefore keeps the arguments of its own calls. What of them equals the first batch's is held once.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, MutableMapping, MutableSequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hylora_kernels.model.by_block import is_by_block, unread
from hylora_kernels.model.structure import Block
from hylora_kernels.support.devices import input_device

BATCH = 4  # Sequences in one forward.
HINT = "set refit=False"
TOLERANCE = 1e-2  # Of the difference between two runs of one block: rounding, in any order of sums.


class Stop(Exception):
    """Ends a forward early; not an error."""


@dataclass
class Call:
    """One call of a block. place: the argument, by index or name, for the hidden states. None is in
    it, so that a call doesn't keep the states that it was recorded with."""

    args: tuple
    kwargs: dict[str, Any]
    place: int | str

    def run(self, module: nn.Module, hidden: Tensor) -> Tensor:
        """hidden [..., d] through the block, in the place of the recorded hidden states."""
        args, kwargs = _put(self.args, self.kwargs, self.place, hidden.clone())
        return first(module(*args, **kwargs))


@dataclass
class Chain:
    """What the model's forwards over all batches showed of its blocks.

    tokens: by batch, how many.
    hidden: by batch, the states in front of the first block.
    calls:  by batch, path of a block -> its call.
    prints: by batch, path of a block -> `fingerprint` of its output; empty where it was not run.
    """

    tokens: list[int]
    hidden: list[Tensor]
    calls: list[dict[str, Call]]
    prints: list[dict[str, Tensor]]

    def run(self, block: Block, stream: list[Tensor]) -> list[Tensor]:
        """The hidden states of all batches through the block."""
        return [
            calls[block.path].run(block.module, hidden)
            for calls, hidden in zip(self.calls, stream, strict=True)
        ]

    def check(self, block: Block, outputs: list[Tensor]) -> None:
        """Raise ValueError unless the outputs of a block, by batch, are the model's own."""
        for index, (output, prints) in enumerate(zip(outputs, self.prints, strict=True)):
            if prints:
                _compare(block.path, output, prints[block.path], f"batch {index}")

    def apart(self) -> Chain:
        """The same calls with dicts and lists of their own, for another stream: what its blocks
        leave there for later ones must not reach the first stream's."""
        return Chain(self.tokens, self.hidden, [_apart(calls) for calls in self.calls], self.prints)


@torch.no_grad()
def record(model: nn.Module, blocks: list[Block], ids: Tensor, size: int = BATCH) -> Chain:
    """Run the model up to the last of `blocks` on ids [n, L], in batches of `size` sequences.

    Raises ValueError, naming the block, unless the hidden states are all that each block hands to
    the next: one replay, of the first sequence with noise on its hidden states, must give what the
    model itself makes of them. Where the blocks are in files, that one replay is all that is run.
    """
    chain, device = Chain([], [], [], []), input_device(model)
    outline = Outline(model, blocks, ids) if is_by_block(model) else None
    for batch in ids.split(size):
        if outline is not None:
            hidden, calls = outline.forward(batch.to(device))
            prints: dict[str, Tensor] = {}
        else:
            seen = _Recorder(blocks)
            seen.forward(model, batch.to(device))
            hidden, calls, prints = seen.hidden, seen.calls, seen.prints
        chain.tokens.append(batch.numel())
        chain.hidden.append(hidden)
        if chain.calls and len(batch) == size:
            hold_once(calls, chain.calls[0])
        chain.calls.append(calls)
        chain.prints.append(prints)
    if outline is None:
        _check_with_noise(model, blocks, ids[:1].to(device))
    return chain


class Outline:
    """A model without its blocks, each of which hands its hidden states on as they are.

    Its forwards show how the blocks are called (with which masks and positions) and what stands in
    front of the first and behind the last one, and take the time of embedding and head alone.

    The constructor runs the blocks on the first sequence of ids [n, L], and raises ValueError as
    record() does.
    """

    def __init__(self, model: nn.Module, blocks: list[Block], ids: Tensor):
        self._model, self._blocks = model, blocks
        with torch.no_grad():
            seen = _check_with_noise(model, blocks, ids[:1].to(input_device(model)))
        self._places = {path: call.place for path, call in seen.calls.items()}
        self._others = seen.others

    def forward(self, ids: Tensor) -> tuple[Tensor, dict[str, Call]]:
        """ids [n, L] -> (the states in front of the first block, path of a block -> its call)."""
        calls: dict[str, Call] = {}
        states: list[Tensor] = []

        def at_block(path: str, args: tuple, kwargs: dict, hidden: Tensor) -> Tensor:
            calls[path] = Call(*_put(args, kwargs, self._places[path], None), self._places[path])
            states.append(hidden)
            if len(calls) == len(self._blocks):
                raise Stop
            return hidden

        with self._calling(at_block), contextlib.suppress(Stop):
            self._model(input_ids=ids, use_cache=False)
        return states[0].clone(), calls

    @contextmanager
    def behind(self, hidden: Tensor) -> Iterator[None]:
        """Inside, the model's outputs are those of the states `hidden` behind its last block."""
        last = self._blocks[-1].path
        with self._calling(lambda path, _args, _kwargs, own: hidden if path == last else own):
            yield

    @contextmanager
    def _calling(self, at_block: Callable[[str, tuple, dict, Tensor], Tensor]) -> Iterator[None]:
        def through(path, *args, **kwargs):
            hidden = at_block(path, args, kwargs, _get(args, kwargs, self._places[path]))
            others = self._others[path]
            return hidden if others is None else (hidden, *others)

        modules = {block.path: block.module for block in self._blocks}
        before = {path: vars(module).get("forward") for path, module in modules.items()}
        with unread(self._model):
            for path, module in modules.items():
                vars(module)["forward"] = functools.partial(through, path)
            try:
                yield
            finally:
                for path, module in modules.items():
                    del vars(module)["forward"]
                    if before[path] is not None:
                        vars(module)["forward"] = before[path]


def first(output: Any) -> Any:
    """The hidden states among a block's outputs."""
    return output[0] if isinstance(output, tuple | list) else output


def fingerprint(output: Tensor) -> Tensor:
    """[..., d] -> float32 [...], flat: each row's product with one random direction."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(output.shape[-1], generator=generator, device="cpu").to(output.device)
    return output.float().flatten(0, -2) @ direction


class _Recorder:
    """The hooks of one forward over all blocks. change: applied to the first block's states."""

    def __init__(self, blocks: list[Block], change: Callable[[Tensor], Tensor] | None = None):
        self.blocks, self.change = blocks, change
        self.calls: dict[str, Call] = {}
        self.prints: dict[str, Tensor] = {}
        self.others: dict[str, tuple | None] = {}  # What a block returns besides hidden states.
        self.output: Tensor | None = None
        self.hidden = torch.empty(0, device="cpu")

    def forward(self, model: nn.Module, ids: Tensor) -> None:
        with self._hooks():
            try:
                model(input_ids=ids, use_cache=False)
            except Stop:
                return
        raise ValueError(f"refit needs every block called, {self._next()} wasn't: {HINT}")

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        hooks = []
        for block in self.blocks:
            before, after = self._before(block.path), self._after(block.path)
            hooks.append(block.module.register_forward_pre_hook(before, with_kwargs=True))
            hooks.append(block.module.register_forward_hook(after))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _next(self) -> str:
        return self.blocks[len(self.calls)].path

    def _before(self, path: str):
        def hook(_module, args, kwargs):
            if path in self.calls or path != self._next():
                raise ValueError(f"refit needs blocks called once, in order, {path} isn't: {HINT}")
            place = self._place(path, args, kwargs)
            self.calls[path] = Call(*_put(args, kwargs, place, None), place)
            if self.output is not None:
                return None
            hidden = _get(args, kwargs, place)
            self.hidden = hidden.clone()  # A block may change its input in place.
            return self.change and _put(args, kwargs, place, self.change(hidden))

        return hook

    def _place(self, path: str, args: tuple, kwargs: dict) -> int | str:
        """The argument that is the block before's output; of the first block, its first states."""
        for place, value in (*enumerate(args), *kwargs.items()):
            is_hidden = isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 2
            if is_hidden and (self.output is None or _equal(value, self.output)):
                return place
        before = self.blocks[len(self.calls) - 1].path if self.calls else "the embedding"
        raise ValueError(
            f"refit needs blocks that feed each other, but {path} doesn't read {before}: {HINT}"
        )

    def _after(self, path: str):
        def hook(_module, _args, output):
            self.output = first(output)
            self.others[path] = None if output is self.output else tuple(output[1:])
            self.prints[path] = fingerprint(self.output)
            if len(self.calls) == len(self.blocks):
                raise Stop

        return hook


def _check_with_noise(model: nn.Module, blocks: list[Block], ids: Tensor) -> _Recorder:
    """What the model's forward on ids [1, L] shows, once it is known that blocks form a chain.

    It compares the model on ids, with and without noise on the first block's input, with replays of
    both, block by block.

    The replays' other arguments were recorded without the noise. So a second tensor that blocks
    hand on, an argument computed from the hidden states, or anything that a block keeps for a later
    one, makes a difference.
    """
    plain = _Recorder(blocks)
    plain.forward(model, ids)
    hidden = plain.hidden
    generator = torch.Generator("cpu").manual_seed(1)
    noise = torch.randn(hidden.shape, generator=generator, device="cpu").to(hidden)
    noisy = hidden + 0.3 * hidden.float().std().to(hidden.dtype) * noise
    own = _Recorder(blocks, lambda _: noisy.clone())
    own.forward(model, ids)
    calls_apart = _apart(plain.calls)
    for block in blocks:
        hidden = plain.calls[block.path].run(block.module, hidden)
        noisy = calls_apart[block.path].run(block.module, noisy)
        _compare(block.path, hidden, plain.prints[block.path], "the first sequence")
        _compare(block.path, noisy, own.prints[block.path], "the first sequence with noise")
    return plain


def _compare(path: str, output: Tensor, own: Tensor, what: str) -> None:
    replayed = fingerprint(output)
    error = float((replayed - own).norm() / own.norm()) if replayed.shape == own.shape else 1.0
    if error > TOLERANCE:
        raise ValueError(
            f"refit needs blocks that can be run one by one, but {path}, run by itself on {what}, "
            f"is {error:.2g} off what it gives in the model: {HINT}"
        )


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b.to(a.device)))


def _get(args: tuple, kwargs: dict, place: int | str) -> Tensor:
    return args[place] if isinstance(place, int) else kwargs[place]


def _put(args: tuple, kwargs: dict, place: int | str, value: Tensor | None) -> tuple[tuple, dict]:
    if isinstance(place, int):
        return (*args[:place], value, *args[place + 1 :]), kwargs
    return args, kwargs | {place: value}


def hold_once(calls: dict[str, Call], earlier: dict[str, Call]) -> None:
    """Replace tensors in the calls' arguments by the equal ones of an earlier batch."""
    for path, call in calls.items():
        before = earlier[path]
        call.args = _held(call.args, before.args)
        call.kwargs = {n: _held(v, before.kwargs.get(n)) for n, v in call.kwargs.items()}


def _held(value: Any, earlier: Any) -> Any:
    if isinstance(value, Tensor) and isinstance(earlier, Tensor):
        return earlier if _equal(value, earlier) else value
    if type(value) is tuple and type(earlier) is tuple and len(value) == len(earlier):
        return tuple(map(_held, value, earlier))
    return value


def _apart(calls: dict[str, Call]) -> dict[str, Call]:
    copies: dict[int, Any] = {}

    def own(value):
        if isinstance(value, MutableMapping | MutableSequence):
            return copies.setdefault(id(value), copy.copy(value))
        return tuple(map(own, value)) if type(value) is tuple else value

    return {
        path: Call(own(c.args), {n: own(v) for n, v in c.kwargs.items()}, c.place)
        for path, c in calls.items()
    }
