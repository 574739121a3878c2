"""Bits: one allocator over rank and bits, in bytes or bits; what it makes and reports."""

from __future__ import annotations

import functools
import itertools
import json

import numpy as np
import pytest
import torch
from helpers import tiny
from helpers.compressing import (
    compressed,
    logits,
    parts,
)

from hylora_kernels.compression.bits import BitBudget
from hylora_kernels.compression.budget import MB
from hylora_kernels.compression.options import BITS, CompressOptions, QuantizeOptions
from hylora_kernels.compression.quantize_model import quantize_model
from hylora_kernels.compression.ranks import Choice, Curve, choose
from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.layers.quantized import QuantizedEmbedding, QuantizedLinear
from hylora_kernels.model.modules import parameter_count
from hylora_kernels.model.structure import discover

IDS = tiny.tokens(4, 16)
WIDE = {"hidden_size": 128, "intermediate_size": 192}
QUICK = {"calibration": IDS, "samples": 4, "measure": 0, "progress": False, "cache": False}


def wide(dtype=torch.float32, tied=True):
    return tiny.llama(dtype, **WIDE, tie_word_embeddings=tied)


def quantised(model=None, **options):
    return quantize_model(wide() if model is None else model, **QUICK | options)


@functools.cache
def at_160_kB():
    """Model and report; the dense model takes 1 MB."""
    return quantised(target_mb=0.16, measure=4)


# ------------------------------------------------------------------------------------- the budget


def random_curves(generator, count=4):
    curves = []
    for index in range(count):
        size = int(generator.integers(50, 200))
        costs = size * np.array([2, 3, 4, 6, 8, 16])
        errors = generator.uniform(1, 50) * 4.0 ** -np.array([2, 3, 4, 6, 8, 20])
        bits = np.array([2, 3, 4, 6, 8, 16])
        ranks = np.zeros(6, dtype=int)
        curves.append(Curve(f"{index}", 16 * size, ranks, costs, errors, 1.0, int, bits))
    return curves


@pytest.mark.parametrize("seed", range(20))
def test_no_choice_of_the_same_cost_has_a_smaller_error(seed):
    """The optimum by brute force, at the cost that was spent; within the budget nothing is far
    better, since what is left is less than any step."""
    generator = np.random.default_rng(seed)
    curves = random_curves(generator)
    share = generator.uniform(0.2, 0.9)
    chosen = choose(curves, share, "global")
    budget = share * sum(c.dense_cost for c in curves)
    cost = sum(c.costs[i] for c, i in zip(curves, chosen, strict=True))
    error = sum(c.errors[i] for c, i in zip(curves, chosen, strict=True))
    assert cost <= budget
    best = {}
    for some in itertools.product(*(range(6) for _ in curves)):
        spent = sum(c.costs[i] for c, i in zip(curves, some, strict=True))
        lost = sum(c.errors[i] for c, i in zip(curves, some, strict=True))
        for name, limit in (("same", cost), ("budget", budget)):
            if spent <= limit:
                best[name] = min(best.get(name, np.inf), lost)
    gap = max(c.errors[max(i - 1, 0)] - c.errors[i] for c, i in zip(curves, chosen, strict=True))
    assert error <= best["budget"] + gap  # The gap of a Lagrangian: one layer's step.
    assert error <= 1.5 * best["same"]


@pytest.mark.parametrize(("dtype", "low_rank"), [(torch.float32, True), (torch.bfloat16, False)])
def test_a_target_is_the_size_of_the_file(dtype, low_rank, tmp_path):
    from hylora_kernels.model.saving import save_pretrained

    target = 0.25
    options = {"target_mb": target, "bits": "auto", "low_rank": low_rank, "lora_rank": 0}
    model, report = compressed(wide(dtype), None, IDS, **options)
    save_pretrained(model, tmp_path / "small")
    written = (tmp_path / "small" / "model.safetensors").stat().st_size / MB
    assert 0.985 * target < written <= target
    assert written <= report.model_bytes / MB <= target
    assert len({layer.bits for layer in report.layers}) > 1


def test_a_larger_budget_predicts_and_loses_less():
    reports = [at_160_kB()[1], quantised(target_mb=0.25, measure=4)[1]]
    predicted = [report.predicted_loss for report in reports]
    measured = [abs(report.loss - report.dense_loss) for report in reports]
    assert predicted == sorted(predicted, reverse=True) and predicted[0] > 2 * predicted[-1] > 0
    assert measured[0] > measured[-1]
    layers = (*reports[0].layers, *reports[0].tables)
    assert predicted[0] == pytest.approx(sum(layer.predicted_loss for layer in layers))


def test_bits_are_a_mean_over_the_linears():
    _, report = quantised(bits=4.2)
    weights = sum(layer.parameters for layer in report.layers)
    mean = sum(layer.bits * layer.parameters for layer in report.layers) / weights
    assert 4.0 < mean <= 4.2
    assert [table.bits for table in report.tables] == [8]


@pytest.mark.parametrize("rounding", ["gptq", "rtn"])
def test_uniform_bits(rounding):
    model, report = quantised(bits=4, uniform=True, rounding=rounding, embedding_bits=16)
    assert {layer.bits for layer in report.layers} == {4}
    assert not any(isinstance(m, QuantizedEmbedding) for m in model.modules())
    if rounding == "gptq":
        _, plain = quantised(bits=4, uniform=True, rounding="rtn", embedding_bits=16)
        assert report.predicted_loss < plain.predicted_loss


def test_each_layer_says_its_neighbours():
    _, report = at_160_kB()
    for layer in (*report.layers, *report.tables):
        choices = [(c.rank, c.bits) for c in layer.candidates]
        assert (layer.rank, layer.bits) in choices
        costs = [c.cost for c in layer.candidates]
        losses = [c.predicted_loss for c in layer.candidates]
        assert costs == sorted(costs) and losses == sorted(losses, reverse=True)
    assert "why not more: " in str(report) and "4 bits" in str(report)
    assert json.loads(report.to_json())["layers"][0]["bits"] in BITS


def test_the_picture_has_bits(tmp_path):
    _, report = at_160_kB()
    report.plot(tmp_path / "one.svg")
    drawn = (tmp_path / "one.svg").read_text("utf-8")
    assert ">bits<" in drawn and "rank / full rank" not in drawn and "kB of 1.0 MB" in drawn


# -------------------------------------------------------------------------------- what is replaced


@pytest.mark.parametrize("tied", [False, True])
def test_the_matrices_become_codes(tied):
    dense = wide(tied=tied)
    model, report = quantised(wide(tied=tied), target_mb=0.24)
    layers = parts(model)
    assert len(layers) == 14 and len(report.tables) == (1 if tied else 2)
    assert all(isinstance(layer, QuantizedLinear) for layer in layers.values())
    assert isinstance(model.get_input_embeddings(), QuantizedEmbedding)
    head = model.get_output_embeddings()
    assert isinstance(head, QuantizedLinear)
    assert (head.SVh is model.get_input_embeddings().matrix) == tied
    assert report.model_parameters == parameter_count(model) == parameter_count(dense)
    assert report.keep == 1.0 and report.body_parameters == report.dense_parameters + 5 * 128
    assert (logits(model, IDS) - logits(dense, IDS)).norm() < 0.1 * logits(dense, IDS).norm()


def test_factors_in_int8_behind_the_refit():
    plain, other = compressed(wide(), 0.7, IDS)
    model, report = compressed(wide(), 0.7, IDS, bits=8)
    assert [layer.rank for layer in report.layers] == [layer.rank for layer in other.layers]
    assert report.keep == other.keep and report.model_bytes < 0.4 * other.model_bytes
    assert {layer.bits for layer in (*report.layers, *report.tables)} == {8}
    assert all(isinstance(layer, QuantizedLinear) for layer in parts(model).values())
    assert (logits(model, IDS) - logits(plain, IDS)).norm() < 0.2 * logits(plain, IDS).norm()


def test_a_compressed_model_keeps_its_ranks():
    small, before = compressed(wide(), 0.7, IDS)
    ranks = {p: m.rank + m.lora_rank for p, m in parts(small).items() if type(m) is SVDLoRALinear}
    outputs = logits(small, IDS)
    model, report = quantised(small, bits=8, uniform=True)
    assert {r.path: r.rank for r in report.layers if r.rank} == ranks
    assert {r.bits for r in report.layers} == {8} and report.keep == pytest.approx(before.keep)
    assert (logits(model, IDS) - outputs).norm() < 0.2 * outputs.norm()
    with pytest.raises(ValueError, match=r"quantised already, .*: take the model that"):
        quantised(model, bits=8)
    with pytest.raises(ValueError, match="can't be met: the least possible is"):
        quantised(compressed(wide(), 0.7, IDS)[0], bits=4)


def test_ranks_and_bits_in_one_budget():
    """A layer whose spectrum ends in the middle is best cut there, in 8 bits."""
    model = wide()
    with torch.no_grad():
        weight = model.model.layers[0].mlp.up_proj.weight
        weight.copy_(0.1 * weight[:, :64] @ weight[:64])
    options = {"target_mb": 0.24, "bits": "auto", "rank_multiple": 64, "lora_rank": 0}
    small, report = compressed(model, None, IDS, **options)
    ranks = {layer.path: (layer.rank, layer.bits) for layer in report.layers}
    assert ranks.pop("model.layers.0.mlp.up_proj") == (64, 8)
    layer = small.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(layer, QuantizedLinear) and layer.rank == 64
    assert report.options["refit"] is False


# --------------------------------------------------------------------------------------- the words


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"bits": 1}, ValueError, r"bits must be in 2\.\.16, got 1"),
        ({"bits": "all"}, TypeError, "bits must be a number, 'auto' or None, got 'all'"),
        ({"bits": "auto"}, ValueError, "'auto' goes with target_mb"),
        ({"bits": 4, "target_mb": 80}, ValueError, "bits=4 and target_mb=80: 'auto' goes with"),
        ({"bits": 4, "keep": 0.8}, ValueError, "bits=4 and keep=0.8: low-rank layers have 8 bits"),
        ({"bits": 8}, ValueError, "bits=8 says too little: give keep=0.8 .* low_rank=False"),
        ({"bits": 4, "refit": True}, ValueError, "refit=True goes without a choice of bits"),
        ({"bits": 4, "ranks": {"mlp": 0.5}}, ValueError, "bits needs a policy for all linears"),
        ({"bits": 4, "ranks": "energy"}, ValueError, "ranks must be 'global' or 'uniform' with"),
        ({"bits": 8, "keep": 0.8, "embedding_rank": 4}, ValueError, "embedding_rank goes without"),
        ({"embedding_bits": 7, "bits": 8}, ValueError, r"embedding_bits must be one of \(2, 3, 4"),
        ({"embedding_bits": 8}, ValueError, "embedding_bits needs bits, got None"),
        ({"low_rank": False}, ValueError, "low_rank=False needs bits, got None"),
        ({"rounding": "up"}, ValueError, "rounding must be one of"),
    ],
)  # fmt: skip
def test_options_are_checked(given, error, message):
    with pytest.raises(error, match=message):
        CompressOptions(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bits": 7, "uniform": True}, r"bits must be one of \(2, 3, 4, 5, 6, 8, 16\) where all"),
        ({"bits": 4, "target_mb": 80}, "only one budget may be given"),
        ({"bits": "auto"}, "'auto' goes with target_mb"),
    ],
)
def test_options_of_quantize_model_are_checked(given, message):
    with pytest.raises(ValueError, match=message):
        QuantizeOptions(**given)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (0.001, "target_mb=0.00 can't be met: the least possible is 0.09, of the model's 1.0. MB"),
        (2, "target_mb=2 is at or above the dense model, which has 1.0.: nothing would be"),
    ],
)
def test_a_budget_out_of_reach_names_what_is_possible(target, message):
    with pytest.raises(ValueError, match=message):
        quantised(target_mb=target)


def test_an_embedding_that_codes_cannot_replace_stays():
    class Scaled(torch.nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * 2

    def scaled():
        model = wide(tied=False)
        model.set_input_embeddings(Scaled(*model.get_input_embeddings().weight.shape))
        return model

    options = CompressOptions(bits=4, low_rank=False)
    model = scaled()
    assert [t.path for t in BitBudget(model, discover(model), options).tables] == ["lm_head"]
    with pytest.raises(ValueError, match=r"embedding_bits needs an nn\.Embedding"):
        quantised(scaled(), bits=4, embedding_bits=4)


def test_choices_read_as_what_they_are():
    assert Choice() == (0, 16) and Choice(64, 8).rank == 64
