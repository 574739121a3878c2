"""The options of finetune(): its signature, and what is filled in."""

from __future__ import annotations

import inspect

import pytest

from hylora_kernels import finetune
from hylora_kernels.recovery.options import FinetuneOptions


def test_finetune_takes_a_model_and_its_options():
    model, *arguments = inspect.signature(finetune).parameters.values()
    assert model.name == "model" and model.default is inspect.Parameter.empty
    assert arguments == list(inspect.signature(FinetuneOptions).parameters.values())
    assert [a.name for a in arguments[:4]] == ["data", "tokenizer", "steps", "lr"]


@pytest.mark.parametrize(
    ("steps", "lr", "warmup"),
    [(1, 1e-3, 0), (7, 1e-3, 1), (40, 1e-3, 10), (60, 1e-3, 10), (61, 3e-4, 10)],
)
def test_lr_and_warmup_by_steps(steps, lr, warmup):
    options = FinetuneOptions(steps=steps)
    assert (options.lr, options.warmup) == (lr, warmup)
    options = FinetuneOptions(steps=steps, lr=0.5, warmup=0)
    assert (options.lr, options.warmup) == (0.5, 0)
