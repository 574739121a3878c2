"""The predicted increase of the loss: its size, its unit, how it is reported and drawn."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from helpers.compressing import IDS, compressed, loss
from helpers.mixtures import mixture
from helpers.zoo import zoo_model

from hylora_kernels.compression import whiten
from hylora_kernels.model.structure import depth_of, layer_type

UNREFITTED = {"refit": False, "lora_rank": 0, "measure": 0, "samples": 999}


@torch.no_grad()
def own_text(model, blocks=200, length=12):
    """ids [blocks, length] drawn from the model: its loss has a minimum there, and the Fisher
    information of its gradients is the Hessian in expectation."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (blocks, 1), generator=generator)
    while ids.shape[1] < length:
        p = model(input_ids=ids, use_cache=False).logits[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)], 1)
    return ids


@torch.no_grad()
def divergence(dense, model, ids):
    """The mean KL divergence a prediction: what the loss of own_text() rises by in expectation."""
    p, q = (m(input_ids=ids).logits[:, :-1].double().log_softmax(-1) for m in (dense, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


# An expert sees a part of the tokens; a layer that took them for all would be off by that share.
@pytest.mark.parametrize(
    ("model", "path"),
    [
        (lambda: zoo_model("qwen2"), "lm_head"),
        (lambda: zoo_model("llama"), "layers.1.mlp.down_proj"),
        (lambda: mixture("mixtral"), r"layers.1.mlp.experts.down_proj.\d"),
    ],
    ids=["head", "down_proj", "experts"],
)
def test_of_a_small_cut_it_is_the_divergence(model, path, monkeypatch):
    dense = model()
    ids = own_text(dense)
    monkeypatch.setattr(whiten, "INPUT_DAMPING", 1e-6)
    monkeypatch.setattr(whiten, "GRADIENT_DAMPING", 1e-6)
    predicted, measured = predicted_and_measured(dense, path, ids)
    assert measured == pytest.approx(predicted, rel=0.15)


def test_damping_adds_a_little():
    """A tenth of the mean in each direction of the gradients is more in a weak one."""
    dense = zoo_model("llama")
    damped, measured = predicted_and_measured(dense, "layers.1.mlp.down_proj", own_text(dense))
    assert measured < damped < 1.3 * measured


def predicted_and_measured(dense, path, ids):
    model, report = compressed(copy.deepcopy(dense), 0.7, ids, include=[path], **UNREFITTED)
    return report.predicted_loss, divergence(dense, model, ids)


def test_it_is_a_mean():
    """Twice the text has twice the gradients and inputs, and the same loss a token."""
    once, twice = (
        compressed(zoo_model("llama"), 0.6, ids, **UNREFITTED)[1] for ids in (IDS, IDS.repeat(2, 1))
    )
    assert twice.predicted_loss == pytest.approx(once.predicted_loss, rel=1e-4)
    assert [layer.rank for layer in twice.layers] == [layer.rank for layer in once.layers]


def test_it_is_the_sum_over_layers_and_falls_with_keep():
    reports = [compressed(zoo_model("llama"), keep, **UNREFITTED)[1] for keep in (0.5, 0.7, 1.0)]
    for report in reports:
        assert report.predicted_loss == sum(layer.predicted_loss for layer in report.layers)
        for layer in report.layers:
            assert (layer.predicted_loss > 0) == (layer.lost_energy > 0) == (layer.rank > 0)
    small, middle, dense = (report.predicted_loss for report in reports)
    assert small > middle > dense == 0


@pytest.mark.parametrize("method", ["whitened", "svd"])
def test_other_methods_predict_none(method):
    _, report = compressed(zoo_model("llama"), method=method)
    assert report.predicted_loss is None and "predicted" not in report.loss_line()
    assert all(layer.predicted_loss is None for layer in report.layers)
    assert json.loads(report.to_json())["predicted_loss"] is None


def test_the_loss_is_measured_on_the_last_blocks():
    dense = zoo_model("llama")
    model, report = compressed(copy.deepcopy(dense), measure=2)
    assert report.measured_blocks == 2 and report.seconds["measure"] > 0
    assert report.dense_loss == pytest.approx(loss(dense, IDS[-2:]), rel=1e-5)
    assert report.loss == pytest.approx(loss(model, IDS[-2:]), rel=1e-5)
    line = report.loss_line()
    assert f"{report.predicted_loss:+.4f} predicted without the refit" in line
    assert f"{report.loss - report.dense_loss:+.4f} measured" in line
    assert line in str(report).replace("\n", " ")


def test_without_a_measurement():
    _, report = compressed(zoo_model("llama"), measure=0)
    assert report.loss is report.dense_loss is None and report.measured_blocks == 0
    assert "measure" not in report.seconds and "measured" not in report.loss_line()
    _, unread = compressed(zoo_model("llama"), method="svd")
    assert unread.loss is None and unread.loss_line() == ""


def test_the_report_has_a_line_for_each_layer_type():
    _, report = compressed(zoo_model("llama"))
    text = str(report)
    for kind in {layer_type(layer.path) for layer in report.layers}:
        (line,) = (line for line in text.splitlines() if f" {kind} " in line)
        losses = [x.predicted_loss for x in report.layers if layer_type(x.path) == kind]
        assert f"{sum(losses):.4g}" in line


@pytest.mark.parametrize("method", ["two_sided", "whitened"])
def test_the_picture(method, tmp_path):
    _, report = compressed(zoo_model("llama"), method=method)
    report.plot(tmp_path / "one.svg")
    drawn = (tmp_path / "one.svg").read_text("utf-8")
    assert "mlp.down_proj" in drawn and "rank / full rank" in drawn
    assert ("predicted loss" in drawn) == (method == "two_sided")


def test_a_path_has_a_type_and_a_depth():
    assert layer_type("model.layers.3.mlp.experts.up_proj.7") == "mlp.experts.up_proj"
    assert depth_of("model.layers.3.mlp.experts.up_proj.7") == 3
    assert layer_type("lm_head") == "lm_head" and depth_of("lm_head") is None
