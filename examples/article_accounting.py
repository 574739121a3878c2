"""The count behind a "TinyLlama squeezed by 51 %", and the true size of those models.

The article ("How HyLoRA Squeezed TinyLlama by 51% Without Killing Performance") replaces six of
the seven linears of every block by a frozen SVD pair plus a trainable LoRA pair, keeps the SVD pair
in buffers and adds up `.parameters()`: the compressed base is never counted. This script builds the
same models on the meta device (shapes only, no memory) from this package's layer, whose tensors are
all parameters, and counts them both ways.

    python examples/article_accounting.py
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hylora_kernels import SVDLoRALinear

TINYLLAMA = LlamaConfig(
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    vocab_size=32000,
    tie_word_embeddings=False,
)
REPLACED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")  # not down_proj
BYTES, MIB = 2, 2**20  # bfloat16; the article's "MB" are MiB

# (a, LoRA rank, size in the article's tables in MiB); the rank of a layer is int(a * min(K, N)).
CONFIGURATIONS = (
    (0.5, 16, 753),
    (0.5, 32, 772),
    (0.7, 0, 1009),
    (0.7, 16, 1009),
    (0.7, 32, 1028),
)


@dataclass(frozen=True)
class Row:
    """One configuration; sizes in parameters. counted: by the article's code; true: all of them."""

    a: float
    lora_rank: int
    article_mib: int
    counted: int
    true: int
    dense: int

    @property
    def counted_mib(self) -> float:
        return self.counted * BYTES / MIB

    @property
    def true_mib(self) -> float:
        return self.true * BYTES / MIB

    @property
    def counted_change(self) -> float:
        return self.counted / self.dense - 1

    @property
    def true_change(self) -> float:
        return self.true / self.dense - 1


def tinyllama() -> LlamaForCausalLM:
    """The dense model, without memory."""
    with torch.device("meta"):
        return LlamaForCausalLM(TINYLLAMA)


def squeeze(model: nn.Module, a: float, lora_rank: int) -> nn.Module:
    """Replace the article's six linears of every block, in place; the same model."""
    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if name in REPLACED:
                K, N = linear.in_features, linear.out_features
                rank = int(a * min(K, N))
                layer = SVDLoRALinear(K, N, rank, lora_rank, bias=False, device="meta")
                setattr(parent, name, layer)
    return model


def count(model: nn.Module) -> tuple[int, int]:
    """(parameters without the frozen SVD factors, which are buffers in the article; all)."""
    layers = [m for m in model.modules() if isinstance(m, SVDLoRALinear)]
    frozen = sum(layer.SVh.numel() + layer.U.numel() for layer in layers)
    total = sum(p.numel() for p in model.parameters())
    return total - frozen, total


def measure(a: float, lora_rank: int, article_mib: int, dense: int) -> Row:
    counted, true = count(squeeze(tinyllama(), a, lora_rank))
    return Row(a, lora_rank, article_mib, counted, true, dense)


def size_table(rows: list[Row]) -> Table:
    dense = rows[0].dense
    table = Table(title=f"TinyLlama-1.1B: {dense / 1e6:.2f} M, {dense * BYTES / MIB:.2f} MiB dense")
    for heading in ("a", "LoRA rank", "article's table", "its method counts", "really"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            f"{row.a}",
            f"{row.lora_rank}",
            f"{row.article_mib} MiB",
            f"{row.counted_mib:.1f} MiB ({row.counted_change:+.1%})",
            f"{row.true_mib:.1f} MiB ({row.true_change:+.1%})",
        )
    return table


def main() -> list[Row]:
    dense = sum(p.numel() for p in tinyllama().parameters())
    rows = [measure(*configuration, dense) for configuration in CONFIGURATIONS]
    console = Console()
    console.print(size_table(rows))
    if unlike := sorted({row.a for row in rows if abs(row.counted_mib - row.article_mib) > 1}):
        values = " and ".join(map(str, unlike))
        console.print(
            "The frozen base is not counted, so by this method the size is the same at every a. "
            f"The article's own figures at a = {values} do not follow from it."
        )
    return rows


if __name__ == "__main__":
    main()
