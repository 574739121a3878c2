"""Mixtures of experts: each one calibrated by its tokens, one budget, saved, trained, refused."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from helpers.compressing import IDS, SMALL, close, compressed, counted, logits, parts
from helpers.mixtures import NAMES, E, mixture, stacks
from torch import nn
from transformers import AutoModelForCausalLM

from hylora_kernels import (
    analyze_spectrum,
    evaluate,
    finetune,
    load_pretrained,
    optimize_for_inference,
    restore_from_inference,
    save_pretrained,
)
from hylora_kernels.compression.calibration import gather, gram
from hylora_kernels.compression.compress import compress
from hylora_kernels.layers.experts import ExpertLinears, unstack
from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.model.structure import discover

EXPERTS = "model.layers.{}.mlp.experts.{}_proj.{}"


@pytest.mark.parametrize("name", NAMES)
def test_compressed_saved_and_loaded(name, tmp_path, caplog):
    model = mixture(name)
    total, in_stacks = sum(p.numel() for p in model.parameters()), len(stacks(model)) * 2 * E
    model, report = compressed(model, 0.8)
    found = parts(model)
    assert sum(".experts." in path for path in found) == in_stacks
    assert not stacks(model) and 0.77 < report.keep <= 0.8
    assert report.removed == 1 - report.keep and report.model_removed == 1 - report.model_keep
    assert report.parameters_as_is == sum(map(counted, found.values()))
    assert report.model_dense_parameters == total
    assert report.model_parameters_as_is == sum(p.numel() for p in model.parameters())
    assert report.model_keep < 0.87 and report.dense_parameters > 0.95 * report.body_parameters
    assert not any(".experts." in name for name in report.skipped) and not mine(caplog)
    want = logits(model)
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path)
    assert torch.equal(logits(loaded), want) and parts(loaded).keys() == found.keys()
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in parts_of_experts(model))


def mine(caplog):
    return [r for r in caplog.records if r.name.startswith("hylora_kernels")]


def parts_of_experts(model):
    return [p for m in model.modules() if isinstance(m, ExpertLinears) for p in m.parameters()]


@pytest.mark.parametrize("name", NAMES)
def test_full_rank_computes_the_dense_model(name):
    model = mixture(name)
    want, _ = logits(model), unstack(model)
    experts = {path: linear for path, linear in parts(model).items() if ".experts." in path}
    for path, linear in experts.items():
        layer = SVDLoRALinear.from_linear(linear, min(linear.weight.shape), 0)
        model.set_submodule(path, layer)
    assert close(logits(model), want, 1e-4)


# ------------------------------------------------------------------------- the tokens of an expert


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen2_moe"])
def test_each_expert_is_calibrated_by_the_tokens_routed_to_it(name):
    model, seen = mixture(name), []
    (path, stock), *_ = stacks(model).items()
    hook = stock.register_forward_pre_hook(lambda _m, args: seen.append(args[:2]))
    logits(model)
    hook.remove()
    unstack(model)
    found = gather(model, IDS, discover(model).groups, True, progress=False)
    for e in range(E):
        rows = torch.cat([x[(index == e).any(-1)] for x, index in seen])
        up = f"{path}.gate_up_proj.{e}"
        torch.testing.assert_close(found.inputs[up], gram(rows, rows), rtol=1e-4, atol=1e-4)
        assert found.gradients[up].shape == model.get_submodule(up).weight.shape[:1] * 2


def without(expert):
    """A hook for a router: it sends the tokens of one expert to the next one."""

    def hook(_module, _args, output):
        *scores, index = output
        return (*scores, torch.where(index == expert, (index + 1) % E, index))

    return hook


@pytest.mark.parametrize("method", ["two_sided", "whitened"])
def test_an_expert_that_no_token_reaches(method):
    model = mixture("mixtral")
    model.model.layers[0].mlp.gate.register_forward_hook(without(3))
    weight = model.model.layers[0].mlp.experts.gate_up_proj[3].detach().clone()
    _, report = compressed(model, 0.7, method=method, lora_rank=0)
    assert report.unreached == [EXPERTS.format(0, kind, 3) for kind in ("gate_up", "down")]
    assert f"reached 2 linears: {report.unreached[0]}" in str(report)
    layers = {layer.path: layer for layer in report.layers}
    for kind in ("gate_up", "down"):
        one = layers[EXPERTS.format(0, kind, 3)]
        assert one.damping == (0, 0)
        siblings = [layers[EXPERTS.format(0, kind, e)] for e in range(E) if e != 3]
        assert all(min(other.damping[:1]) > 0 for other in siblings)
        # It counts as the least of its siblings, so it isn't cut to the cheapest rank.
        wanted = min(other.rank or 32 for other in siblings)
        assert wanted > 4 and wanted - 4 <= (one.rank or 32) <= wanted + 4
    kept = model.get_submodule(EXPERTS.format(0, "gate_up", 3))
    dense = kept.to_linear().weight if isinstance(kept, SVDLoRALinear) else kept.weight
    assert close(dense, weight, 0.6) and logits(model).isfinite().all()


def test_passes_over_the_text_change_nothing():
    once, report = compressed(mixture("mixtral"))
    often, other = compressed(mixture("mixtral"), max_memory=300_000)
    assert [layer.rank for layer in report.layers] == [layer.rank for layer in other.layers]
    assert torch.equal(logits(once), logits(often))


# ------------------------------------------------------------------------ what becomes of the model


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_the_whole_pipeline_runs_on_a_mixture(name, tmp_path):
    model, _ = compressed(mixture(name))
    want = logits(model)
    assert close(logits(optimize_for_inference(model)), want, 1e-5)
    assert torch.equal(logits(restore_from_inference(model)), want)
    assert model.generate(IDS[:1], max_new_tokens=3, do_sample=False).shape == (1, 15)
    assert evaluate(model, IDS, length=12, speed=False).perplexity.tokens == 66
    trained = finetune(model, IDS, steps=2, length=12, progress=False, merge=False)
    assert trained.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert not torch.equal(logits(model), want)
    expert = model.model.layers[0].mlp.experts.down_proj[0]
    assert isinstance(expert, nn.Linear) or expert.A.requires_grad


def test_a_refused_compression_leaves_the_stacks():
    model = mixture("mixtral")
    before, want = stacks(model), logits(model)
    with pytest.raises(ValueError, match="smallest feasible keep"):
        compressed(model, 0.01)
    assert stacks(model) == before and torch.equal(logits(model), want)
    with pytest.raises(ValueError, match="token ids"):
        compressed(model, ids=IDS + 1000)
    assert stacks(model) == before
    analyze_spectrum(model, progress=False, cache=False)
    assert stacks(model) == before and torch.equal(logits(model), want)


@pytest.mark.parametrize("choice", [{"include": ["self_attn"]}, {"exclude": ["experts"]}])
def test_stacks_of_which_nothing_is_selected_stay(choice, tmp_path, caplog):
    model = mixture("mixtral")
    before = stacks(model)
    model, report = compressed(model, **choice)
    assert stacks(model) == before and not mine(caplog)
    excluded = sum(s.parameters for n, s in report.skipped.items() if ".experts." in n)
    assert excluded == sum(p.numel() for stack in before.values() for p in stack.parameters())
    save_pretrained(model, tmp_path)
    assert torch.equal(logits(load_pretrained(tmp_path)), logits(model))


def test_a_part_of_the_experts(tmp_path):
    model, report = compressed(mixture("mixtral"), include=[r"0\.mlp\.experts\.down_proj\.[12]$"])
    assert len(report.layers) == 2 and list(stacks(model)) == ["model.layers.1.mlp.experts"]
    save_pretrained(model, tmp_path)
    assert torch.equal(logits(load_pretrained(tmp_path)), logits(model))


def test_a_stack_left_alone_is_listed_and_warned_of(caplog):
    model = mixture("mixtral")
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_hook(lambda *_: None)
    with caplog.at_level(logging.WARNING, "hylora_kernels"):
        _, report = compressed(model)
    listed = report.skipped["model.layers.0.mlp.experts.gate_up_proj"]
    assert listed.reason == "its forward is hooked or replaced"
    assert listed.shape == (E, 112, 32) and listed.parameters == E * 112 * 32
    assert len(mine(caplog)) == 1 and "experts.gate_up_proj (43,008: its" in caplog.text
    assert report.model_keep > 0.9


def test_finished_factors_are_read_again(tmp_path):
    first, _ = compress(mixture("mixtral"), 0.8, IDS, cache=tmp_path, **SMALL)
    again, report = compress(mixture("mixtral"), 0.8, IDS, cache=tmp_path, **SMALL)
    assert "calibrate" not in report.seconds and torch.equal(logits(first), logits(again))


@pytest.mark.parametrize("choice", [{}, {"include": ["experts"]}, {"keep": 1.0}])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_loader_that_does_not_know_the_format_stops(name, choice, tmp_path):
    model, _ = compressed(mixture(name), **{"refit": False} | choice)
    save_pretrained(model, tmp_path)
    assert torch.equal(logits(load_pretrained(tmp_path)), logits(model))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
