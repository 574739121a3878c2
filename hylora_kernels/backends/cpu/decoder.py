"""A decoder as one call a step: its form written down for csrc/cpu/decoder_plan.cpp."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from hylora_kernels.backends.cpu.library import REFUSAL, op
from hylora_kernels.backends.cpu.packed import PackedLayer, PackedMatrix, in_panels
from hylora_kernels.backends.shared.decoder_form import (
    BlockForm,
    DecoderForm,
    HeadsForm,
    LayerForm,
    NormForm,
)

_DECODE = None if REFUSAL else op("decode")
_NORMS = ("rms", "layer")  # Norm, Pairs and Activation of csrc/cpu/row_calls.h
_PAIRS = ("halves", "interleaved")
_WORKS = ("linears", "attention", "norms", "others")  # Work of csrc/cpu/decoder.h
_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


def seconds_by_work() -> dict[str, float]:
    """kind of work -> seconds that all steps of this process so far spent in it."""
    spent = op("decoder_nanoseconds")(torch.empty(0, dtype=torch.int64, device="cpu"))
    return dict(zip(_WORKS, (spent * 1e-9).tolist(), strict=True))


class DecoderPlan:
    """A step of all blocks, the final norm and the head, on weights that live elsewhere.

    It holds the tensors that it points to, so they stay while it lives.
    cached: numbers that all blocks cache for a token.
    """

    def __init__(self, form: DecoderForm, dtype: torch.dtype) -> None:
        self.form = form
        self.cached = sum(b.k.count * (b.k.size + b.v.size) for b in form.blocks)
        writer = _Writer()
        writer.decoder(form)
        self.tensors = writer.tensors
        numbers = torch.tensor(writer.numbers, dtype=torch.int64, device="cpu")
        like = torch.empty(0, dtype=dtype, device="cpu")
        self.plan = op("decoder_plan")(like, self.tensors, numbers)

    def run(
        self,
        x: Tensor,
        cache: Tensor,
        sequences: int,
        slot: int,
        positions: Tensor | None,
        first_keys: Tensor,
        parts: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x [rows, width], embedded tokens, or int64 [rows], tokens if the form has an embedding
        -> (logits [rows, words], int64 [rows], the likeliest).

        cache:      [blocks][keys, values][sequences][heads][capacity][size], in one dim.
        slot:       of the cache, where the tokens' keys and values go.
        positions:  int64 [rows], of the tokens; None: slot - first_keys.
        first_keys: int64 [rows], slots of padding before.
        parts:      (first, last + 1) of those to run: the blocks, and behind them the final norm
                    with the head. Without the head the result is (hidden [rows, width], nothing).
        """
        first, end = parts or (0, len(self.form.blocks) + 1)
        return _DECODE(self.plan, x, cache, sequences, slot, positions, first_keys, first, end)


class _Writer:
    """Numbers in the order in which decoder_plan.cpp reads them, and the tensors they name."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.tensors: list[Tensor] = []
        self.in_panels: dict[int, PackedLayer | PackedMatrix] = {}  # a tied head is the embedding

    def decoder(self, form: DecoderForm) -> None:
        self.integers(form.width, form.positions, len(form.blocks))
        for block in form.blocks:
            self.block(block)
        self.norm(form.final_norm)
        self.layer(form.head)
        self.floats(form.logit_scale, form.logit_softcap)
        self.embedding(form.embedding)
        self.floats(form.embedding_scale)

    def embedding(self, embedding: LayerForm | Tensor | None) -> None:
        kinds = type(None), Tensor, LayerForm
        self.integers(next(i for i, kind in enumerate(kinds) if isinstance(embedding, kind)))
        if isinstance(embedding, Tensor):
            self.tensor(embedding)
        elif embedding is not None:
            self.layer(embedding)

    def block(self, block: BlockForm) -> None:
        self.norm(block.attention_norm)
        self.layers(block.projections)
        for heads in (block.q, block.k, block.v):
            self.heads(heads)
        rotary = block.rotary
        self.integers(_PAIRS.index(rotary.pairs) if rotary else 0, rotary.size if rotary else 0)
        self.tensor(rotary and rotary.cos)
        self.tensor(rotary and rotary.sin)
        self.integers(block.window)
        self.floats(block.scale, block.softcap)
        self.layer(block.output)
        self.norm(block.attention_post_norm)
        self.floats(block.attention_scale)
        self.integers(block.parallel)
        self.norm(block.mlp_norm)
        self.layers(block.up)
        self.integers(_ACTIVATIONS.index(block.activation), block.inner, block.gate_column)
        self.integers(-1 if block.up_column is None else block.up_column)
        self.layer(block.down)
        self.norm(block.mlp_post_norm)
        self.floats(block.mlp_scale)

    def norm(self, norm: NormForm | None) -> None:
        self.integers(norm is not None)
        if norm is not None:
            self.integers(_NORMS.index(norm.kind), norm.rounds_first, norm.width)
            self.floats(norm.eps)
            self.tensor(norm.weight)
            self.tensor(norm.bias)

    def heads(self, heads: HeadsForm) -> None:
        self.integers(heads.count, heads.size, heads.column, heads.stride)
        self.norm(heads.norm)

    def layers(self, layers: tuple[LayerForm, ...]) -> None:
        self.integers(len(layers))
        for layer in layers:
            self.layer(layer)

    def layer(self, layer: LayerForm) -> None:
        known = self.in_panels
        packed = known[id(layer.packed)] = known.get(id(layer.packed)) or in_panels(layer.packed)
        is_matrix = isinstance(packed, PackedMatrix)
        self.integers(is_matrix, packed.out_features, packed.products_now())
        self.tensor(packed.tensors[0])
        self.tensor(None if layer.bias is None else layer.bias.detach().contiguous())

    def tensor(self, tensor: Tensor | None) -> None:
        self.integers(-1 if tensor is None else len(self.tensors))
        if tensor is not None:
            self.tensors.append(tensor)

    def integers(self, *values: int) -> None:
        self.numbers += map(int, values)

    def floats(self, *values: float) -> None:
        self.numbers += (struct.unpack("q", struct.pack("d", value))[0] for value in values)
