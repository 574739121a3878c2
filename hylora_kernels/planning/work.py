"""The work of a compression, counted from a hollow model: products, bytes, and the result.

A linear of N outputs and K inputs costs a token 2 N K FLOP forward and as many for the gradient of
its inputs; its weights have none. An expert's counts as its share of the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hylora_kernels.compression.bits import BitBudget
from hylora_kernels.compression.budget import Budget
from hylora_kernels.compression.calibration import passes, statistics_bytes
from hylora_kernels.compression.embedding import embedding_target
from hylora_kernels.compression.factors import factor_bytes
from hylora_kernels.compression.options import CompressOptions
from hylora_kernels.compression.rank_candidates import rank_curves
from hylora_kernels.compression.ranks import DENSE, Choice, allocate, rank_cost
from hylora_kernels.compression.times import expert_shares
from hylora_kernels.model.hollow import Activations, activations_of, structure_of
from hylora_kernels.model.structure import Group, Structure, Target, is_linear
from hylora_kernels.text.mix import default_mix
from hylora_kernels.text.sources import SELF, Source


@dataclass(frozen=True)
class Result:
    """A compressed model: its linears' share, parameters and bytes of the whole, at most.

    as_is counts adapters beside their layer, the others folded in.
    """

    keep: float
    parameters: int
    parameters_as_is: int
    bytes: int
    bytes_as_is: int


class Work:
    """What a compression of the model `model`, a hollow one, has to do by its options.

    structure, targets, embedding: as compress() finds them. choices: path -> rank and bits, as a
    budget that all spend alike gives them; the true ones depend on the text.

    Raises what compress() raises for a budget that can't be met.
    """

    def __init__(self, model: PreTrainedModel, options: CompressOptions):
        o = self.options = options
        self.model = model
        self.structure: Structure = structure_of(model, o.include, o.exclude)
        if not self.structure.groups:
            raise ValueError(
                f"model has no linear that can be compressed; left alone: {self.structure.skipped}"
            )
        wanted = o.embedding_rank is not None
        self.embedding = embedding_target(model) if wanted else None
        self.targets = [*self.structure.targets, *([self.embedding] if self.embedding else [])]
        self.shares = expert_shares(model)
        self.budget = Budget(model, self.targets, o.form)
        self.activations: Activations = activations_of(model, self.structure, self.length)
        self.choices, self.keep = self._choose()

    def _choose(self) -> tuple[Mapping[str, Choice], float]:
        o = self.options
        # One spectrum for all: 1 / k falls about as those of language models do.
        spectra = {
            t: 1 / torch.arange(1, min(t.shape) + 1, dtype=torch.float64, device="cpu")
            for t in self.targets
        }
        ranks = rank_curves(spectra, self.embedding, o) if o.low_rank else []
        self._bits = BitBudget(self.model, self.structure, o, ranks)
        self._ranks = ranks
        if o.is_priced:
            errors = {
                t.path: {bits: 4.0**-bits for bits in self._bits.widths(t)}
                for t in self._bits.targets
            }
            curves = self._bits.curves(errors, {c.path: c for c in ranks})
            return self._bits.allocate(curves), 1.0
        keep = self.budget.keep(o, lambda k: allocate(ranks, k, o.ranks))
        found = allocate(ranks, keep, o.ranks)
        bits = 16 if o.bits is None else 8
        return {path: Choice(R, bits) for path, R in found.items()} | self._bits.fixed(), keep

    # ------------------------------------------------------------------------------- the result

    @cached_property
    def result(self) -> Result:
        """The compressed model with these choices."""
        o, dense = self.options, self.budget.dense
        merged, as_is = (self._parameters(count) for count in ("merged", "as_is"))
        rest = dense.parameters - self.budget.linears
        if o.bits is None and o.target_time is None:
            size = self.budget.size(self._ranks, self.choices).bytes
        else:
            size = self._bits.total(self.choices)
        more = (as_is - merged) * self.element
        sizes = (size, size + more) if o.count == "merged" else (size - more, size)
        return Result(merged / self.budget.linears, rest + merged, rest + as_is, *sizes)

    def _parameters(self, count: str) -> int:
        """Of the targets, adapters counted so."""
        total = 0
        for target in self.targets:
            if (R := self.rank(target)) == DENSE:
                total += target.matrix.numel()
            elif target is self.embedding:
                total += R * sum(target.shape)
            else:
                o = self.options
                total += rank_cost(R, *target.shape, o.form, o.lora_rank, count)
        return total

    @property
    def kept_products(self) -> float:
        """The share of a token's products in the blocks that the result has, adapters folded in."""
        before = sum(self.share(t) * t.matrix.numel() for t in self.structure.targets)
        after = sum(
            self.share(t)
            * (
                rank_cost(R, *t.shape, self.options.form, self.options.lora_rank, "merged")
                if (R := self.rank(t)) != DENSE
                else t.matrix.numel()
            )
            for t in self.structure.targets
        )
        others = sum(self.block_macs) - before
        return (others + after) / (others + before)

    @property
    def element(self) -> int:
        """Bytes of a number of the weights."""
        return self.structure.targets[0].matrix.element_size()

    # -------------------------------------------------------------------------------- the text

    @cached_property
    def blocks(self) -> int:
        """Blocks of text that are read."""
        return sum(count for _, count in self._mix)

    @cached_property
    def own_blocks(self) -> int:
        """Of these the ones that the model writes itself."""
        return sum(n for source, n in self._mix if isinstance(source, str) and source == SELF)

    @property
    def length(self) -> int:
        """Tokens of a block; those of token ids have a length of their own."""
        given = self.options.calibration
        return given.shape[-1] if isinstance(given, Tensor) else self.options.length

    @property
    def _mix(self) -> list[tuple[Source, int]]:
        o, given = self.options, self.options.calibration
        if o.method == "svd":
            return []
        if isinstance(given, Tensor):
            return [(given, min(len(given), o.samples))]
        return default_mix(given, o.samples)

    # --------------------------------------------------------------------------- FLOP of a token

    @cached_property
    def block_macs(self) -> list[float]:
        """Products of a token in each block, selected or not."""
        return [
            sum(
                module.weight.numel() * self.shares.get(f"{block.path}.{name}", 1.0)
                for name, module in block.module.named_modules()
                if is_linear(module)
            )
            for block in self.structure.blocks
        ]

    @property
    def attention(self) -> float:
        """FLOP of a token in the attention of one block, forward: half of all pairs are read."""
        blocks = max(len(self.structure.blocks), 1)
        return 2.0 * self.length * self.activations.attention / blocks

    def forward_flops(self, block: int | None = None) -> float:
        """Of a token in one block, or in all."""
        if block is None:
            return sum(map(self.forward_flops, range(len(self.structure.blocks))))
        return 2 * self.block_macs[block] + self.attention

    def training_flops(self, block: int | None = None) -> float:
        """The same with the gradients of the inputs, which cost attention 2.5 times its forward."""
        if block is None:
            return sum(map(self.training_flops, range(len(self.structure.blocks))))
        return 4 * self.block_macs[block] + 3.5 * self.attention

    @property
    def head_shape(self) -> tuple[int, int]:
        """(words, width)."""
        head: Any = self.model.get_output_embeddings() or self.model.get_input_embeddings()
        words, width = head.weight.shape
        return words, width

    @property
    def head_flops(self) -> float:
        """Of a token in the output head, with its gradient."""
        words, width = self.head_shape
        return 4.0 * words * width

    def share(self, target: Target) -> float:
        """The share of the tokens that a linear reads."""
        return self.shares.get(target.path, 1.0)

    # ------------------------------------------------------------------------------------ bytes

    @cached_property
    def block_bytes(self) -> list[int]:
        """Weights of each block."""
        return [sum(p.nbytes for p in block.module.parameters()) for block in self.structure.blocks]

    @property
    def resident_bytes(self) -> int:
        """Weights outside of the blocks: embedding, head, norms."""
        return self.budget.dense.bytes - sum(self.block_bytes)

    @property
    def bytes_of_token(self) -> float:
        """Weights that a decoded token reads."""
        model: Any = self.model
        unread = sum(
            (1 - share) * model.get_submodule(path).weight.nbytes
            for path, share in self.shares.items()
        )
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        if head is not None and embedding.weight is not head.weight:
            unread += embedding.weight.nbytes
        return self.budget.dense.bytes - unread

    @property
    def factor_bytes(self) -> int:
        """Of the workspace's factors of full rank."""
        return sum(factor_bytes(t.shape) for t in self.targets) if self.options.low_rank else 0

    @property
    def refit_bytes(self) -> int:
        """Of all refitted matrices, float32."""
        if not self.options.refit:
            return 0
        return sum(4 * t.shape[0] * (self.rank(t) or t.shape[1]) for t in self.refitted)

    @property
    def refitted(self) -> list[Target]:
        return [t for block in self.structure.blocks for t in block.targets if not t.routed]

    def rank(self, target: Target) -> int:
        return self.choices.get(target.path, Choice()).rank

    def runs(self, memory: int) -> list[list[Group]]:
        """The passes over the text, each with the groups whose statistics fit into `memory`."""
        if self.options.method == "svd":
            return []
        return passes(self.structure.groups, self.has_gradients, memory)

    @property
    def has_gradients(self) -> bool:
        return self.options.method == "two_sided"

    def statistics(self, groups: Sequence[Group]) -> int:
        """Bytes of the Gram matrices of some groups."""
        return sum(statistics_bytes(group, self.has_gradients) for group in groups)

    @property
    def module(self) -> nn.Module:
        return self.structure.blocks[0].module
