"""calibration.gather() one block at a time, for a model that is not in memory as a whole.

The hidden states in front of every block are made by one forward, block after block, and stored.
The loss is taken from the last ones, and its gradient goes back the same way: each block runs once
more from its stored states, with gradients, and hands the gradient on to the block before. All
sequences run through a block before the next one is read. The sums are those of gather(), bit for
bit, since each sequence meets the same calls in the same order; the products are 4/3 as many.

Each state is a file, so that a run that was killed goes on. The system's page cache keeps them in
memory where there is some.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hylora_kernels.compression.calibration import (
    STAGE,
    Observer,
    Statistics,
    finished,
    frozen,
    gradients_from,
    passes,
    removed,
    watching,
)
from hylora_kernels.compression.chain import Call, Outline, hold_once
from hylora_kernels.model.by_block import hold
from hylora_kernels.model.loss import body_of, token_loss
from hylora_kernels.model.structure import Block, Group, Structure
from hylora_kernels.support.cache import Files
from hylora_kernels.support.devices import input_device
from hylora_kernels.support.processes import ALONE, Processes
from hylora_kernels.support.storage import require_disk

HIDDEN, GRADIENT = "hidden", "gradient"


def gather_by_block(
    model: nn.Module,
    structure: Structure,
    ids: Tensor,
    files: Files,
    groups: Sequence[Group],
    with_gradients: bool,
    max_memory: int,
    progress: bool = True,
    observers: Sequence[Observer] = (),
    processes: Processes = ALONE,
) -> Iterator[Statistics]:
    """Yield the statistics of `groups` over ids int64 [n, L], those of one block at a time, while
    the block is in memory: from the last to the first, or without gradients from the first on.

    files:      the states, of this model and text alone. A run that was cut off between two blocks
                goes on there.
    max_memory: bytes of statistics at a time; a block whose own take more is run several times.
    observers:  see each sequence in front of the blocks and behind them.
    processes:  read sequences of their own; `files` is one folder for all.

    Raises ValueError unless the blocks form a chain (chain.record()) that has all groups in it,
    OSError if the disk has no place for the states, FloatingPointError as gather().
    """
    given = (model, structure, ids, files, with_gradients, max_memory, progress, processes)
    run = _BlockByBlock(*given)
    yield from run.statistics(groups, observers)


def without_text(structure: Structure, groups: Sequence[Group]) -> Iterator[Statistics]:
    """Yield `groups`, of which nothing is known, while their block is in memory."""
    blocks = {group: block for block in structure.blocks for group in block.groups}
    for block, part in groupby(groups, blocks.get):
        with hold(nn.Module() if block is None else block.module):
            yield Statistics(list(part))


class _BlockByBlock:
    """The states of one run through the blocks and back."""

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        ids: Tensor,
        files: Files,
        with_gradients: bool,
        memory: int,
        progress: bool = True,
        processes: Processes = ALONE,
    ):
        self._model, self._blocks, self._device = model, structure.blocks, input_device(model)
        inside = {path for block in self._blocks for group in block.groups for path in group.paths}
        outside = [path for path in structure.paths if path not in inside]
        if outside:
            raise ValueError(
                f"{outside[0]} is in none of the blocks, and block by block only they are"
                " compressed: leave it out with exclude"
            )
        self._ids, self._files, self._memory = ids, files, memory
        self._with_gradients, self._progress = with_gradients, progress
        self._processes, self._own = processes, range(len(ids))[processes.part(len(ids))]
        self._known: set[str] = set()  # States that are there and whole.
        self._outline = Outline(model, self._blocks, ids)
        if with_gradients:
            body_of(model, ids[:1].to(self._device))  # Its probe needs the blocks' own forwards.
        self._calls = self._called()

    def statistics(
        self, groups: Sequence[Group], observers: Sequence[Observer] = ()
    ) -> Iterator[Statistics]:
        wanted = set(groups)
        todo = [[g for g in block.groups if g in wanted] for block in self._blocks]
        if self._with_gradients:
            yield from self._backward(todo, observers)
        elif wanted:
            yield from self._forward(todo)
        for observer in observers:
            observer.add_others(self._processes)
        self._processes.wait(STAGE)  # Others may still read their states.
        if self._processes.is_first:
            self._files.clear()

    # ------------------------------------------------------------------------------ forward

    def _forward(self, todo: list[list[Group]]) -> Iterator[Statistics]:
        for k, block in enumerate(self._blocks):
            if not todo[k]:
                continue
            self._run_to(k, all_before=False)
            with hold(block.module):
                for groups in passes(todo[k], False, self._memory):
                    statistics = self._statistics(groups)
                    with watching(statistics, False), frozen(self._model), torch.no_grad():
                        for i in self._sequences(f"calibrating {block.path}"):
                            self._run(block, k, i)
                    statistics.add_others(self._processes)
                    yield finished(statistics, False, self._device)
            for done in range(k + 1):
                self._remove(HIDDEN, done)

    def _run_to(self, end: int, all_before: bool = True) -> None:
        """Make the states in front of block `end`, and with all_before of those in front of it, but
        for what is there."""
        there = [k for k in range(end + 1) if self._has(HIDDEN, k)]
        gap = next((k for k in range(end + 1) if k not in there), end + 1)
        done = gap - 1 if all_before else max(there)
        bar = tqdm(
            self._blocks[done:end],
            desc="hidden states",
            unit="block",
            disable=not self._progress,
            leave=False,
        )
        for k, block in enumerate(bar, done):
            with hold(block.module), frozen(self._model), torch.no_grad():
                for i in self._own:
                    self._run(block, k, i)

    def _run(self, block: Block, k: int, i: int) -> None:
        output = self._call(block, i).run(block.module, self._load(HIDDEN, k, i))
        self._save(HIDDEN, k + 1, i, output)

    # ----------------------------------------------------------------------------- backward

    def _backward(
        self, todo: list[list[Group]], observers: Sequence[Observer]
    ) -> Iterator[Statistics]:
        n = len(self._blocks)
        first = 0 if observers else min((k for k, groups in enumerate(todo) if groups), default=n)
        # Where an earlier run has stopped: nothing is left to do behind these gradients.
        stops = (k for k in range(first, n + 1) if not any(todo[k:]) and self._has(GRADIENT, k))
        # Of several processes the one that has come least far says where.
        start = -self._processes.least(-next(stops, n + 1))
        if start > n or observers:
            self._run_to(n, all_before=start > n)
            self._tail(observers, store=start > n)
        start = min(start, n)
        self._run_to(start - 1)
        for k in reversed(range(first, start)):
            block = self._blocks[k]
            runs = passes(todo[k], True, self._memory) or [[]]
            with hold(block.module):
                for groups in runs:
                    statistics = self._statistics(groups)
                    with watching(statistics, True), frozen(self._model), torch.enable_grad():
                        for i in self._sequences(f"calibrating {block.path}"):
                            self._back_through(k, block, i, store=groups is runs[-1])
                    if groups:
                        statistics.add_others(self._processes)
                        yield finished(statistics, True, self._device)
            self._remove(GRADIENT, k + 1)
            if k + 1 < n or not observers:
                self._remove(HIDDEN, k + 1)
        self._front_pass(observers)

    def _back_through(self, k: int, block: Block, i: int, store: bool) -> None:
        hidden = self._load(HIDDEN, k, i).requires_grad_()
        output = self._call(block, i).run(block.module, hidden)
        output.backward(self._load(GRADIENT, k + 1, i))
        if store:
            self._save(GRADIENT, k, i, hidden.grad)

    def _tail(self, observers: Sequence[Observer], store: bool) -> None:
        """The gradients of each sequence's loss behind the last block."""
        n, hooks = len(self._blocks), [h for o in observers for h in o.tail_hooks()]
        with removed(hooks), frozen(self._model), torch.enable_grad():
            for i in self._sequences("loss"):
                row = self._row(i, observers)
                hidden = self._load(HIDDEN, n, i).requires_grad_()
                with self._outline.behind(hidden):
                    token_loss(self._model, row)[0].backward()
                if store:
                    self._save(GRADIENT, n, i, hidden.grad)

    def _front_pass(self, observers: Sequence[Observer]) -> None:
        """Hand the gradients in front of the first block to what the observers see of it."""
        if not observers:
            return
        model = self._model
        with (
            gradients_from(model),
            removed([h for o in observers for h in o.front_hooks()]),
            frozen(model),
            torch.enable_grad(),
        ):
            for i in self._sequences("embedding"):
                hidden, _ = self._outline.forward(self._row(i, observers))
                hidden.backward(self._load(GRADIENT, 0, i))

    # ------------------------------------------------------------------------------- states

    def _called(self) -> dict[int, dict[str, Call]]:
        """By sequence, the blocks' calls; the states in front of the first block are stored."""
        calls: dict[int, dict[str, Call]] = {}
        with torch.no_grad(), frozen(self._model):
            for i in self._own:
                hidden, found = self._outline.forward(self._ids[i : i + 1].to(self._device))
                if calls:
                    hold_once(found, calls[self._own[0]])
                else:
                    self._require_disk(len(self._ids) * hidden.nbytes)
                if self._files.find(f"{HIDDEN}-0-{i}") is None:
                    self._save(HIDDEN, 0, i, hidden)
                calls[i] = found
        return calls

    def _call(self, block: Block, i: int) -> Call:
        return self._calls[i][block.path]

    def _statistics(self, groups: list[Group]) -> Statistics:
        predictions = len(self._own) * (self._ids.shape[1] - 1) * self._with_gradients
        return Statistics(groups, predictions=predictions)

    def _row(self, i: int, observers: Sequence[Observer]) -> Tensor:
        row = self._ids[i : i + 1]
        for observer in observers:
            observer.begin(i, row)
        return row.to(self._device)

    def _sequences(self, label: str) -> tqdm:
        return tqdm(self._own, label, unit="seq", disable=not self._progress, leave=False)

    def _load(self, kind: str, k: int, i: int) -> Tensor:
        return self._files.load(f"{kind}-{k}-{i}")["states"].to(self._device)

    def _save(self, kind: str, k: int, i: int, states: Tensor | None) -> None:
        assert states is not None, "a block's output depends on its input"
        self._files.save(f"{kind}-{k}-{i}", {"states": states})
        self._known.add(f"{kind}-{k}-{i}")

    def _has(self, kind: str, k: int) -> bool:
        names = [f"{kind}-{k}-{i}" for i in self._own]
        # Each file that an earlier run has left is read once, to be sure of it.
        if not all(name in self._known or self._files.find(name) for name in names):
            return False
        self._known.update(names)
        return True

    def _remove(self, kind: str, k: int) -> None:
        for i in self._own:
            self._known.discard(f"{kind}-{k}-{i}")
            self._files.path(f"{kind}-{k}-{i}").unlink(missing_ok=True)

    def _require_disk(self, one: int) -> None:
        boundaries = len(self._blocks) + 3 if self._with_gradients else 2
        require_disk(self._files.folder, one * boundaries, "hidden states of the calibration text")
