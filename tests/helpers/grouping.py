"""Models of one odd block, grouped for inference."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.numerics import make_layer
from helpers.optimising import FLOAT32
from torch import nn

from hylora_kernels import optimize_for_inference
from hylora_kernels.backends.cpu import packed
from hylora_kernels.layers import grouped
from hylora_kernels.layers.grouped import GroupedBlock
from hylora_kernels.layers.packed import packed_states


@pytest.fixture
def in_panels(monkeypatch):
    """Layers as small as these go through torch's products, and are no members then, but for this:
    those of 15 ranks alone. Compiled code is forgotten afterwards."""
    monkeypatch.setattr(packed, "torch_products_are_faster", lambda weights: weights.rank == 15)
    yield
    torch.compiler.reset()


def optimise(model: nn.Module) -> nn.Module:
    return optimize_for_inference(model, group=True)


def blocks_of(model) -> dict[str, GroupedBlock]:
    return {path: m for path, m in model.named_modules() if isinstance(m, GroupedBlock)}


def ungrouped(model) -> nn.Module:
    """A copy whose layers are packed but computed one by one."""
    twin = copy.deepcopy(model)
    for block in blocks_of(twin).values():
        grouped.ungroup(block)
    assert packed_states(twin)
    return twin


class Toy(nn.Module):
    """A language model of one block, to show `block` a hidden state [..., 32]."""

    def __init__(self, block: nn.Module, width: int = 32):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.block = nn.Embedding(9, width), block
        self.head = nn.Linear(width, 9)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, use_cache=False):
        return self.head(self.block(self.embedding(input_ids)))


class Gated(nn.Module):
    """down(silu(a x) * b x), of names that no list would hold."""

    def __init__(self, K: int = 32, N: int = 48):
        super().__init__()
        self.first = make_layer("pair", N, K, min(32, N), 4, **FLOAT32)
        self.second = make_layer("pivoted", N, K, min(30, N), 0, **FLOAT32)
        self.down = nn.Linear(N, K)

    def forward(self, x):
        return self.down(F.silu(self.first(x)) * self.second(x))


def optimised(block: nn.Module, width: int = 32) -> Toy:
    return optimise(Toy(block, width).eval())


class Attention(nn.Module):
    """Reads key and value from another input where there is one."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (make_layer("pair", 32, 32, 32, 4, **FLOAT32) for _ in range(3))

    def forward(self, query, key=None, value=None, scale=1.0):
        key = query if key is None else key
        value = key if value is None else value
        q, k, v = self.q(query), self.k(key), self.v(value)
        return F.scaled_dot_product_attention(q, k, v, scale=scale)


class Calls(nn.Module):
    def __init__(self, attention, *names):
        super().__init__()
        self.attention, self.names = attention, names

    def forward(self, x):
        return self.attention(x, **dict.fromkeys(self.names, x))
