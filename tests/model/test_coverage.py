"""Parameters that compression leaves alone: listed with size and reason, and warned of."""

from __future__ import annotations

import logging

import pytest
import torch
from helpers.compressing import compressed
from helpers.mixtures import mixture
from helpers.zoo import zoo_model
from torch import nn

from hylora_kernels.model.adapters import add_adapters
from hylora_kernels.model.coverage import summary


class Stack(nn.Module):
    """A module with a parameter of three dimensions, which is no linear."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(8, 64, 64))


def with_stacks(name="qwen2"):
    """A model most of whose body is in Stacks."""
    model = zoo_model(name)
    for layer in model.model.layers:
        layer.stack = Stack()
    return model


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "hylora_kernels.model.coverage"]


def test_every_parameter_is_selected_or_listed_or_a_vector():
    model = with_stacks()
    before = {name: p.numel() for name, p in model.named_parameters()}
    matrices = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    _, report = compressed(model)
    kernels = [f"model.layers.{i}.stack.kernel" for i in range(3)]
    listed = sum(one.parameters for one in report.skipped.values())
    assert report.dense_parameters + listed == matrices
    assert {name: one.reason for name, one in report.skipped.items()} == {
        "model.embed_tokens": "embedding",
        "lm_head": "output head",
        **dict.fromkeys(kernels, "Stack.kernel is no linear's weight"),
    }
    assert report.skipped["lm_head"].shape == (128, 32)
    assert report.skipped["model.layers.0.stack.kernel"].parameters == 8 * 64 * 64
    assert report.body_parameters == sum(before.values()) - 2 * 128 * 32


def test_a_tied_head_counts_once():
    model = zoo_model("llama")
    total = sum(p.numel() for p in model.parameters())
    _, report = compressed(model)
    assert report.skipped["lm_head"].parameters == 0
    assert report.skipped["lm_head"].reason == "output head, the same tensor as model.embed_tokens"
    assert report.skipped["model.embed_tokens"].parameters == 128 * 32
    assert report.body_parameters == total - 128 * 32


@pytest.mark.parametrize("choice", [{}, {"include": ["mlp"]}, {"exclude": ["attn"]}])
def test_a_selection_under_half_of_the_body_is_warned_of(choice, caplog):
    with caplog.at_level(logging.WARNING, "hylora_kernels"):
        _, report = compressed(with_stacks(), **choice)
    (message,) = warnings(caplog)
    assert f"hold {report.dense_parameters:,} of the " in message
    assert "model.layers.*.stack.kernel (98,304: Stack.kernel is no linear's weight)" in message


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "phi"])
@pytest.mark.parametrize("choice", [{}, {"include": ["0"]}, {"exclude": [r"[12]\."]}])
def test_dense_models_and_a_choice_of_the_caller_are_not_warned_of(name, choice, caplog):
    compressed(zoo_model(name), **choice)
    assert not warnings(caplog)


def test_summary_joins_the_layers():
    _, report = compressed(zoo_model("qwen2"), include=["mlp"], exclude=["down"])
    rows = {name: tuple(rest) for name, *rest in summary(report.skipped)}
    assert rows["model.layers.*.mlp.down_proj"] == (3, 3 * 32 * 56, "excluded")
    assert rows["model.layers.*.self_attn.q_proj"] == (3, 3 * 32 * 32, "not included")
    assert "model.layers.*.mlp.down_proj" in str(report) and "excluded" in str(report)
    sizes = [parameters for _, _, parameters, _ in summary(report.skipped)]
    assert sizes == sorted(sizes, reverse=True)


def test_plain_adapters_on_a_mixture_are_warned_of(caplog):
    with caplog.at_level(logging.WARNING, "hylora_kernels"):
        add_adapters(mixture("mixtral"), lora_rank=2)
        add_adapters(zoo_model("qwen2"), lora_rank=2)
    (message,) = warnings(caplog)
    assert "model.layers.*.mlp.experts.gate_up_proj (43,008: " in message
