"""Shared by the tests of compress(): small settings, measures and comparisons of models."""

from __future__ import annotations

import torch
from helpers.zoo import tokens

from hylora_kernels.compression.compress import compress
from hylora_kernels.compression.tokens import Term, TokenStatistics
from hylora_kernels.model.loss import token_loss
from hylora_kernels.model.structure import linears

IDS = tokens(6, 12)
SMALL = {"rank_multiple": 4, "lora_rank": 4, "samples": 6, "refit_samples": 5, "progress": False}


def compressed(model, keep=0.7, ids=IDS, **options):
    return compress(model, keep, ids, **{"cache": False} | SMALL | options)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def loss(model, ids):
    with torch.no_grad():
        total, count = token_loss(model, ids)
    return float(total) / count


def close(a, b, tolerance):
    return float((a - b).double().norm()) <= tolerance * float(b.double().norm())


def parts(model):
    """path -> module of all linears in the budget, in the order of the model."""
    return {path: model.get_submodule(path) for path in linears(model)}


def counted(module):
    """Parameters without the bias, from the tensors themselves."""
    return sum(p.numel() for name, p in module.named_parameters() if name != "bias")


def assert_same(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


class Interrupted(Exception):
    pass


def interrupt_after(monkeypatch, kind, count):
    """The next-but-`count` call of kind.save raises, before anything is written."""
    original, left = kind.save, [count]

    def saving(self, *args):
        if not left[0]:
            raise Interrupted
        left[0] -= 1
        return original(self, *args)

    monkeypatch.setattr(kind, "save", saving)


def random_terms(words=30, d=6, seed=0) -> TokenStatistics:
    """Terms of an embedding and a head whose tokens and directions differ in weight."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def term():
        rows = draw(4 * d, d)
        return Term(draw(words).square(), rows.T @ rows)

    return TokenStatistics(term(), term(), tokens=50, predictions=40)
