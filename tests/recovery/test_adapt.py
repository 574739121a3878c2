"""A dense model adapted to a text before it is made smaller."""

from __future__ import annotations

import pytest
from helpers import tiny
from helpers.compressing import compressed, loss
from torch import nn

from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.recovery.adapt import adapt_dense

IDS = tiny.tokens(6, 16)


def test_the_model_learns_the_text_and_has_its_own_linears(tmp_path):
    model, before = tiny.llama(), loss(tiny.llama(), IDS)
    names = [path for path, _ in model.named_parameters()]
    report = adapt_dense(
        model, IDS, steps=12, lora_rank=4, output_dir=tmp_path, progress=False, length=16
    )
    assert loss(model, IDS) < before - 0.03 and report.steps == 12
    assert not any(isinstance(m, SVDLoRALinear) for m in model.modules())
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert [path for path, _ in model.named_parameters()] == names
    assert (tmp_path / "log.jsonl").is_file()


def test_a_compressed_model_is_refused():
    with pytest.raises(ValueError, match="must be dense to take adapters"):
        adapt_dense(compressed(tiny.llama(), 0.7, IDS)[0], IDS, progress=False)
