"""Helpers of the tests of optimize_for_inference: a small model, its state, where it is packed."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny
from helpers.numerics import make_layer
from torch import nn

from hylora_kernels import available_backends, optimize_for_inference, restore_from_inference
from hylora_kernels.model.modules import freeze_all_but_adapters

WHY = available_backends()["cpu"]
packs = pytest.mark.skipif(bool(WHY), reason=f"cpu: {WHY}")
FLOAT32 = {"dtype": torch.float32}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
HINT = r"restore_from_inference\(model\) first"


def llama(dtype=torch.bfloat16, tied=True, form="pivoted", **changes):
    """A compressed model whose sizes are multiples of 32, so that panels need no filling."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 4}
    model = tiny.llama(dtype, tie_word_embeddings=tied, **(sizes | changes))
    return freeze_all_but_adapters(tiny.adapted(model, rank=32, lora_rank=32, form=form).eval())


def state_of(model) -> dict:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(a: dict, b: dict) -> bool:
    return list(a) == list(b) and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a
    )


def logits(model, seed=0):
    with torch.no_grad():
        return model(input_ids=tiny.tokens(2, 12, seed=seed), use_cache=False).logits


def assert_same_but_rounding(found, wanted, roundings=4):
    """As a whole, since a small logit has the rounding errors of large ones: number by number,
    torch.testing.assert_close passes or fails with the width of torch's own vectors. A packed model
    adds up in another order than a plain one: 32 roundings of a tiny one."""
    error = (found - wanted).norm() / wanted.norm()
    assert error <= roundings * torch.finfo(wanted.dtype).eps


def net() -> nn.Sequential:
    layers = nn.LayerNorm(14), make_layer("pair", 14, 14, **FLOAT32), nn.Linear(14, 14)
    return nn.Sequential(*layers, make_layer("pivoted", 14, 14, **FLOAT32)).eval()


def there_and_back(model: nn.Module) -> nn.Module:
    return restore_from_inference(optimize_for_inference(model.eval())).train()
