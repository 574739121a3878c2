"""Recovery without a backward through the model: each block learns to do what the dense one does.

In order, each block reads what the blocks before it, trained already, make of the text, and learns
to give the states that the dense model has behind it. So it also makes up for what those before it
lost: a block that reads the dense model's states instead ends farther away, in the tests' Llamas of
six blocks. Trained at a time, with gradients and moments, is one block. Two streams of hidden
states go from block to block: n L d numbers each, of n L tokens.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hylora_kernels.compression.chain import Chain, record
from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.model.adapters import merge_adapters
from hylora_kernels.model.by_block import hold
from hylora_kernels.model.structure import Block, block_list
from hylora_kernels.recovery.factors import balanced_factors
from hylora_kernels.recovery.options import FinetuneOptions
from hylora_kernels.recovery.recipe import Recipe, frozen_hash
from hylora_kernels.recovery.run import adamw, training_mode
from hylora_kernels.support.cache import Files, cache_dir
from hylora_kernels.support.hashing import fingerprint
from hylora_kernels.support.seeding import forked_rng, seed_rng
from hylora_kernels.support.storage import write_text


@dataclass(frozen=True)
class BlockFit:
    """What training gave one block.

    before, after: sum |y - t|^2 / sum |t|^2 over the text. t are the dense model's states behind
    the block, y what the block makes of the trained prefix's, both times of the same.
    """

    path: str
    before: float
    after: float


class NotFinite(Exception):
    """A loss or gradient that is not finite; its text says which."""


@dataclass
class BlockRun:
    """A run over the blocks of `model`, in place.

    dense:  the model that it came from, with the same blocks.
    ids:    int64 [n, L]. A block's updates take them batch by batch, over and over.
    fits:   of the blocks done. losses: of all their updates, in the unit of BlockFit.
    seconds: of training and the compressed stream; dense_seconds: of the dense model's.
    """

    model: nn.Module
    dense: nn.Module
    ids: Tensor
    recipe: Recipe
    options: FinetuneOptions
    fits: list[BlockFit] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    trainable: int = 0
    seconds: float = 0.0
    dense_seconds: float = 0.0

    def train(self) -> str:
        """Train block after block; returns "", or why a block stopped it, which stays as it came.

        A block that is done is in the cache, where another run of the same recipe finds it.

        Raises ValueError if the blocks form no chain (compression.chain), or the dense model has
        others.
        """
        own, dense = self._blocks()
        key = fingerprint(recipe=asdict(self.recipe))
        files = Files(cache_dir("recovery", key), key)
        if not self.options.resume:
            files.clear()
            cache_dir("recovery", key)
        with self._time("dense_seconds"):
            chain = record(self.dense, dense, self.ids, self.recipe.batch)
        own_chain, targets = chain.apart(), chain.hidden
        inputs = record(self.model, own[:1], self.ids, self.recipe.batch).hidden
        on_step = self.options.on_step or (lambda step: None)
        shown, updates = self.options.progress, len(own) * self.recipe.steps
        with (
            tqdm(total=updates, desc="blocks", unit="step", disable=not shown) as bar,
            forked_rng(self.ids.device),
        ):
            for block, theirs in zip(own, dense, strict=True):
                with self._time("dense_seconds"), hold(theirs.module), torch.no_grad():
                    targets = chain.run(theirs, targets)
                    chain.check(theirs, targets)
                try:
                    with self._time("seconds"):
                        inputs = self._block(block, own_chain, inputs, targets, files, bar)
                except NotFinite as error:
                    return f"{block.path}: {error}; it stays as it was, as do all after it"
                self._log()
                on_step(len(self.losses))
        return ""

    def _blocks(self) -> tuple[list[Block], list[Block]]:
        """The blocks with compressed layers, and those of the dense model."""
        layers = {p: m for p, m in self.model.named_modules() if isinstance(m, SVDLoRALinear)}
        paths = block_list(self.model, layers)
        if not paths:
            raise ValueError("scope='block' found no list of blocks in this model")
        theirs = dict(self.dense.named_modules())
        if not all(path in theirs for path in paths):
            raise ValueError(f"teacher must have the model's blocks, such as {paths[-1]}")
        own = [Block(path, self.model.get_submodule(path), ()) for path in paths]
        return own, [Block(path, theirs[path], ()) for path in paths]

    def _block(
        self,
        block: Block,
        chain: Chain,
        inputs: list[Tensor],
        targets: list[Tensor],
        files: Files,
        bar: tqdm,
    ) -> list[Tensor]:
        """Train one block, or take it from its file; returns, by batch, its outputs."""
        stored = files.find(block.path)
        with torch.no_grad():
            before = _error(chain.run(block, inputs), targets)
        with self._trainable(block) as trained:
            self.trainable += sum(p.numel() for p in trained.values())
            base = frozen_hash(block.module, trained.values())
            if stored is None:
                losses = self._updates(block, chain, inputs, targets, trained, bar)
                values = {name: p.detach() for name, p in trained.items()}
                history = torch.tensor(losses, dtype=torch.float64, device="cpu")
                files.save(block.path, values | {"losses": history})
            else:
                losses = stored["losses"].tolist()
                for name, parameter in trained.items():
                    parameter.data.copy_(stored[name])
                bar.update(len(losses))
            if frozen_hash(block.module, trained.values()) != base:
                raise RuntimeError(f"{block.path}: what is frozen of it changed in training")
        with torch.no_grad():
            outputs = chain.run(block, inputs)
        self.losses += losses
        self.fits.append(BlockFit(block.path, before, _error(outputs, targets)))
        return outputs

    @contextmanager
    def _trainable(self, block: Block) -> Iterator[dict[str, nn.Parameter]]:
        """name -> what is trained of one block, float32 inside; what `train` says is put back."""
        by_factors = self.recipe.train == "factors"
        if by_factors:
            prepared = balanced_factors(self.model, False, block.path)
        else:
            named = block.module.named_parameters(block.path)
            adapters = {name: p for name, p in named if name.endswith((".A", ".B"))}
            prepared = nullcontext({n: p for n, p in adapters.items() if p.requires_grad})
        with prepared as trained, training_mode(block.module, trained, False):
            yield trained
            if self.options.merge and not by_factors:
                merge_adapters(block.module, requantize=False)

    def _updates(
        self,
        block: Block,
        chain: Chain,
        inputs: list[Tensor],
        targets: list[Tensor],
        trained: dict[str, nn.Parameter],
        bar: tqdm,
    ) -> list[float]:
        """The losses of a block's updates. Raises NotFinite, with the parameters as they were."""
        recipe, device, losses = self.recipe, inputs[0].device, []
        parameters = list(trained.values())
        start = [p.detach().clone() for p in parameters]
        optimizer = adamw(parameters, device)
        power = sum(float(t.float().square().sum()) for t in targets) / self.ids.numel()
        for step in range(1, recipe.steps + 1):
            seed_rng(device, recipe.seed + (step << 16))
            total = torch.zeros((), device=device)
            for index in range((step - 1) * recipe.accumulate, step * recipe.accumulate):
                batch = index % len(inputs)
                y = chain.calls[batch][block.path].run(block.module, inputs[batch])
                error = (y.float() - targets[batch].float()).square().sum()
                loss = error / (power * chain.tokens[batch] * recipe.accumulate)
                loss.backward()
                total += loss.detach()
            norm = nn.utils.clip_grad_norm_(parameters, recipe.clip)
            if not (total.isfinite() and norm.isfinite()):
                torch._foreach_copy_([p.data for p in parameters], start)
                raise NotFinite(f"step {step}: loss {total:g}, gradient norm {norm:g}")
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate(step) * group["scale"]
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(total))
            bar.set_postfix_str(f"{block.path}, loss {losses[-1]:.4f}", refresh=False)
            bar.update()
        return losses

    @contextmanager
    def _time(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + time.perf_counter() - start)

    def _log(self) -> None:
        """Write log.jsonl: a line for each block done."""
        if self.options.output_dir is not None:
            lines = "".join(json.dumps(asdict(fit)) + "\n" for fit in self.fits)
            write_text(Path(self.options.output_dir) / "log.jsonl", lines)


@torch.no_grad()
def _error(outputs: list[Tensor], targets: list[Tensor]) -> float:
    """sum |y - t|^2 / sum |t|^2 over all batches."""
    lost = sum(
        float((y.float() - t.float()).square().sum()) for y, t in zip(outputs, targets, strict=True)
    )
    return lost / sum(float(t.float().square().sum()) for t in targets)
