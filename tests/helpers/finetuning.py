"""Helpers of the tests of finetune(): a tiny model, its tokens, and comparing states."""

from __future__ import annotations

import contextlib
import functools
import json

import torch
from helpers import tiny
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.recovery.finetune import finetune

BLOCKS = tiny.tokens(8, 16)
HOW = {  # options of finetune() by what is trained
    "adapters": {"train": "adapters", "lr": 1e-2, "merge": False},
    "factors": {"train": "factors", "lr": 1e-3},
}
train = functools.partial(finetune, progress=False)


def model_of(dtype=torch.float32, layers=2, **options):
    return tiny.adapted(tiny.llama(dtype, num_hidden_layers=layers), **options)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def weights_of(model):
    """path -> W [N, K] of every compressed layer, which other signs and pivots don't change."""
    layers = ((n, m) for n, m in model.named_modules() if isinstance(m, SVDLoRALinear))
    return {path: layer.to_linear().weight.detach() for path, layer in layers}


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def assert_differ(a: dict, b: dict) -> None:
    assert any(not torch.equal(a[name], b[name]) for name in a)


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@contextlib.contextmanager
def watched_updates(watch):
    """In the block, call `watch` with the trained parameters before every update."""

    def hook(optimizer, _args, _kwargs):
        watch(optimizer.param_groups[0]["params"])

    handle = register_optimizer_step_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
