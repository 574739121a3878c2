"""compress(): every architecture, form and method; budgets counted from the modules."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from helpers import tiny
from helpers.compressing import (
    IDS,
    SMALL,
    assert_same,
    close,
    compressed,
    counted,
    logits,
    loss,
    parts,
)
from helpers.numerics import pairwise
from helpers.zoo import NAMES, ZOO, tokens, trained, zoo_model
from torch import nn

from hylora_kernels.compression.compress import Compression, compress
from hylora_kernels.evaluation.size import model_size
from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.model.adapters import merge_adapters
from hylora_kernels.model.structure import as_matrix, linears

# -------------------------------------------------------------------- every architecture and option

AXES = {
    "name": NAMES,
    "method": ("two_sided", "whitened", "svd"),
    "form": ("pivoted", "pair"),
    "ranks": ("global", "uniform", "energy"),
    "lora_rank": (4, 0, 64),
    "init": ("next", "classic"),
    "count": ("merged", "as_is"),
    "keep": (0.75, 0.5),
}
POINTS = pairwise(AXES)


@pytest.mark.parametrize("point", POINTS, ids=lambda point: "-".join(map(str, point.values())))
def test_compress(point):
    options = dict(point)
    model = zoo_model(options.pop("name"))
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shapes = {path: tuple(as_matrix(m).shape) for path, m in linears(model).items()}
    keep = options.pop("keep")
    returned, report = compressed(model, keep, **options)
    assert returned is model and not model.training

    assert [layer.path for layer in report.layers] == list(parts(model))
    assert set(parts(model)) == set(shapes)
    for layer, (path, module) in zip(report.layers, parts(model).items(), strict=True):
        N, K = shapes[path]
        assert (layer.out_features, layer.in_features) == (N, K)
        if layer.rank == 0:
            assert not isinstance(module, SVDLoRALinear)
            assert layer.parameters == layer.parameters_as_is == N * K
            continue
        assert isinstance(module, SVDLoRALinear) and module.form == options["form"]
        assert module.rank + module.lora_rank == layer.rank and layer.rank % 4 == 0
        assert module.lora_rank == layer.lora_rank == min(options["lora_rank"], layer.rank - 1)
        assert counted(module) == layer.parameters_as_is
        assert (layer.parameters if options["count"] == "merged" else counted(module)) < N * K
        assert 0 <= layer.lost_energy < 1
    check_totals(model, report, sum(N * K for N, K in shapes.values()))
    assert any(layer.rank for layer in report.layers)
    budgeted = report.parameters if options["count"] == "merged" else report.parameters_as_is
    assert budgeted <= keep * report.dense_parameters

    # Nothing else has changed: biases, norms, embeddings, tied or not.
    for name, tensor in model.state_dict().items():
        if name in dense and name.removesuffix(".weight") not in shapes:
            assert torch.equal(tensor, dense[name]), name
    assert {n for n in dense if n.endswith(".bias")} <= set(model.state_dict())
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert (embeddings.weight is head.weight) == ZOO[point["name"]].tied

    before = logits(model)
    assert before.isfinite().all()
    merge_adapters(model)
    assert close(logits(model), before, 1e-4)
    assert sum(counted(module) for module in parts(model).values()) == report.parameters


def check_totals(model, report, dense):
    assert report.dense_parameters == dense
    assert report.parameters == sum(layer.parameters for layer in report.layers)
    assert report.parameters_as_is == sum(counted(module) for module in parts(model).values())
    assert report.keep == report.parameters / dense and report.removed == 1 - report.keep
    assert report.keep_as_is == report.parameters_as_is / dense
    total = sum(p.numel() for p in model.parameters())
    assert report.model_parameters_as_is == total
    assert report.model_dense_parameters == total + dense - report.parameters_as_is
    assert report.model_parameters == total + report.parameters - report.parameters_as_is
    assert report.model_keep == report.model_parameters / report.model_dense_parameters


@pytest.mark.parametrize("form", ["pivoted", "pair"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_keeping_everything_changes_nothing(name, form):
    model = zoo_model(name)
    before = logits(model)
    _, report = compressed(model, 1.0, form=form)
    assert report.keep == 1 and report.removed == 0
    assert not any(isinstance(module, SVDLoRALinear) for module in model.modules())
    assert close(logits(model), before, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_of_the_model_stays(dtype):
    model, _ = compressed(zoo_model("qwen2", dtype))
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == (torch.int32 if name.endswith("pivots") else dtype), name
    assert logits(model).isfinite().all()


def test_dtype_casts_the_model_first():
    model, _ = compressed(zoo_model("llama"), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


# ---------------------------------------------------------------------------------- what it's worth


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_each_step_lowers_the_held_out_loss(name):
    """Plain, whitened, two-sided, pivoted, refitted: in this order, on a trained model."""
    dense, text, held_out = trained(name), tokens(64, 16, seed=77), tokens(64, 16, seed=5)
    steps = [
        {"method": "svd", "form": "pair"},
        {"method": "whitened", "form": "pair", "ranks": "uniform", "refit": False},
        {"method": "two_sided", "form": "pair", "refit": False},
        {"method": "two_sided", "refit": False},
        {"method": "two_sided", "refit": True},
    ]
    losses = []
    for options in steps:
        options |= {"rank_multiple": 2, "lora_rank": 0, "samples": 64, "refit_samples": 64}
        losses.append(loss(compressed(copy.deepcopy(dense), 0.5, text, **options)[0], held_out))
    losses.append(loss(dense, held_out))
    assert losses == sorted(losses, reverse=True), losses
    assert losses[0] - losses[-1] > 4 * (losses[-2] - losses[-1])


@pytest.mark.parametrize("form", ["pivoted", "pair"])
@pytest.mark.parametrize("refit", [True, False])
def test_an_adapter_of_the_next_components_changes_nothing(form, refit):
    dense = zoo_model("llama", torch.float64)
    plain, report = compressed(copy.deepcopy(dense), lora_rank=0, form=form, refit=refit)
    adapted, other = compressed(dense, lora_rank=8, form=form, refit=refit)
    assert close(logits(adapted), logits(plain), 1e-5)
    assert other.parameters == report.parameters and other.keep == report.keep
    layers = [m for m in adapted.modules() if isinstance(m, SVDLoRALinear)]
    assert all(m.A.any(1).all() and m.B.any(0).all() for m in layers)
    assert {m.lora_rank for m in layers} <= {3, 7, 8} and all(m.A.requires_grad for m in layers)


@pytest.mark.parametrize("refit", [True, False])
def test_a_classic_adapter_starts_as_nothing(refit):
    dense = zoo_model("llama", torch.float64)
    model, report = compressed(copy.deepcopy(dense), lora_rank=8, init="classic", refit=refit)
    layers = {path: m for path, m in parts(model).items() if isinstance(m, SVDLoRALinear)}
    assert layers and not any(m.B.any() for m in layers.values())
    assert len({m.A[0, 0].item() for m in layers.values()}) == len(layers)  # Each has its own draw.
    # The base is the layer that compression to that rank alone makes.
    ranks = {f"{re.escape(path)}$": m.rank for path, m in layers.items()}
    ranks |= {re.escape(path): 1.0 for path in parts(model) if path not in layers}
    plain, alone = compressed(dense, lora_rank=0, ranks=ranks, refit=refit)
    assert close(logits(plain), logits(model), 1e-5)
    assert [layer.lost_energy for layer in report.layers] == pytest.approx(
        [layer.lost_energy for layer in alone.layers]
    )


def test_counting_adapters_as_they_are():
    dense = zoo_model("llama")
    merged, separate = (
        compressed(copy.deepcopy(dense), 0.6, lora_rank=8, count=count)[1]
        for count in ("merged", "as_is")
    )
    assert merged.parameters <= 0.6 * merged.dense_parameters < merged.parameters_as_is
    assert separate.parameters < separate.parameters_as_is <= 0.6 * merged.dense_parameters


def test_lost_energy_damping_and_coefficients_are_reported():
    _, report = compressed(zoo_model("llama"), form="pivoted", lora_rank=0)
    squeezed = [layer for layer in report.layers if layer.rank]
    assert all(0 < layer.lost_energy < 1 for layer in squeezed)
    assert all(0.1 < layer.largest_coefficient < 20 for layer in squeezed)
    assert all(layer.damping == pytest.approx((1e-2, 1e-1)) for layer in report.layers)
    _, pair = compressed(zoo_model("llama"), form="pair", method="svd")
    assert {(layer.damping, layer.largest_coefficient) for layer in pair.layers} == {((0, 0), 0)}


def test_report():
    _, report = compressed(zoo_model("llama"), ranks={"mlp": 0.5, "q_proj": 8}, max_memory=50_000)
    written = json.loads(report.to_json())
    assert written["options"]["ranks"] == {"mlp": 0.5, "q_proj": 8}
    assert written["calibration_tokens"] == 72
    head = {"shape": [128, 32], "parameters": 0}
    assert written["skipped"]["lm_head"] == head | {
        "reason": "output head, the same tensor as model.embed_tokens"
    }
    stages = {"load", "calibrate", "factorize", "refit", "replace", "measure"}
    assert set(report.seconds) == stages
    assert all(value > 0 for value in report.seconds.values())
    assert report.peak_rss > 10**8
    ranks = {layer.path: layer.rank for layer in report.layers}
    assert {rank for path, rank in ranks.items() if "q_proj" in path} == {8}


# --------------------------------------------------------------------------------- what is selected


def test_include_and_exclude():
    model = zoo_model("llama")
    _, report = compressed(model, 0.6, include=["mlp"], exclude=[r"\.0\.mlp\.up"])
    names = {layer.path.removeprefix("model.layers.") for layer in report.layers}
    assert names == {
        f"{i}.mlp.{kind}_proj" for i in range(2) for kind in ("gate", "up", "down")
    } - {"0.mlp.up_proj"}
    reasons = {name: one.reason for name, one in report.skipped.items()}
    assert reasons.pop("model.layers.0.mlp.up_proj") == "excluded"
    attention = {f"model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in "qkvo"}
    assert {reasons[name] for name in attention} == {"not included"}
    assert reasons.keys() - attention == {"lm_head", "model.embed_tokens"}
    assert list(linears(model)) == [layer.path for layer in report.layers]
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert report.dense_parameters == 5 * 32 * 56


@pytest.mark.parametrize("method", ["two_sided", "whitened", "svd"])
def test_an_untied_head_can_be_included(method):
    model = zoo_model("qwen2")
    _, report = compressed(model, include=["lm_head", "down_proj"], method=method)
    assert isinstance(model.lm_head, SVDLoRALinear) and model.get_output_embeddings().rank
    assert report.layers[-1].path == "lm_head" and logits(model).isfinite().all()


def test_a_linear_subclass_and_a_linear_never_called():
    class Same(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight, self.bias)

    model = zoo_model("llama")
    model.model.layers[0].mlp.up_proj = Same(32, 56)
    model.model.layers[0].spare = nn.Linear(32, 32)
    bias = model.model.layers[0].mlp.up_proj.bias
    _, report = compressed(model, ranks={"up_proj": 8})
    assert isinstance(model.model.layers[0].mlp.up_proj, SVDLoRALinear)
    assert model.model.layers[0].mlp.up_proj.bias is bias
    assert report.skipped["model.layers.0.spare"].reason == "never called in a forward"
    assert type(model.model.layers[0].spare) is nn.Linear


def test_a_dead_layer_costs_least():
    model = zoo_model("llama")
    nn.init.zeros_(model.model.layers[0].post_attention_layernorm.weight)
    _, report = compressed(model, 0.7, lora_rank=0)
    ranks = {layer.path: layer.rank for layer in report.layers if "layers.0.mlp" in layer.path}
    assert set(ranks.values()) == {4} and logits(model).isfinite().all()


def test_a_weight_of_zeros():
    model = zoo_model("llama")
    nn.init.zeros_(model.model.layers[1].self_attn.o_proj.weight)
    _, report = compressed(model, ranks={"o_proj": 8})
    (layer,) = (layer for layer in report.layers if layer.path.endswith("1.self_attn.o_proj"))
    assert layer.lost_energy == 0 and logits(model).isfinite().all()


# ----------------------------------------------------------------------------- where from, where to


def test_a_model_from_a_folder_and_texts(tmp_path):
    text = " ".join(f"a{i} walked b{i * i} home" for i in range(300))
    tokenizer = tiny.tokenizer(text)
    model = tiny.llama(vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    options = SMALL | {"length": 10, "device": "cpu", "dtype": torch.float32}
    alone = [([text], 3)]
    found, report = compress(tmp_path, 0.7, alone, cache=False, **options)
    assert report.calibration_tokens == 30
    direct, _ = compress(model, 0.7, alone, tokenizer=tokenizer, cache=False, **options)
    assert_same(found, direct)


def test_samples_are_drawn_by_the_seed():
    def state(seed):
        model, report = compressed(zoo_model("llama"), ids=tokens(40, 12), samples=3, seed=seed)
        assert report.calibration_tokens == 36
        return model

    assert_same(state(1), state(1))
    with pytest.raises(AssertionError):
        assert_same(state(1), state(2))


# ----------------------------------------------------------------------------------------- refusals

BAD = [
    ({"keep": 0.0}, ValueError, r"keep must be in \(0, 1\], got 0.0"),
    ({"keep": 1.2}, ValueError, r"keep must be in \(0, 1\], got 1.2"),
    ({"keep": "0.8"}, TypeError, "keep must be a number, got str"),
    ({"keep": 0.01}, ValueError, r"keep=0.01 can't be met: the smallest feasible keep"),
    ({"method": "asvd"}, ValueError, r"method must be one of \('two_sided', .*got 'asvd'"),
    ({"form": "pairs"}, ValueError, r"form must be one of \('pair', 'pivoted'\), got 'pairs'"),
    ({"factorizer": "nystrom"}, ValueError, "factorizer must be one of .*got 'nystrom'"),
    ({"init": "zero"}, ValueError, "init must be one of .*got 'zero'"),
    ({"count": "all"}, ValueError, "count must be one of .*got 'all'"),
    ({"ranks": "best"}, ValueError, "ranks must be one of .*got 'best'"),
    ({"ranks": {"mpl": 4}}, ValueError, "ranks: pattern 'mpl' matches none"),
    ({"ranks": {"mlp": "4"}}, TypeError, r"ranks\['mlp'\] must be an int"),
    ({"lora_rank": -1}, ValueError, "lora_rank must be an int of at least 0, got -1"),
    ({"lora_rank": 1.5}, ValueError, "lora_rank must be an int of at least 0, got 1.5"),
    ({"rank_multiple": 0}, ValueError, "rank_multiple must be an int of at least 1, got 0"),
    ({"samples": True}, ValueError, "samples must be an int of at least 1, got True"),
    ({"length": 1}, ValueError, "length must be an int of at least 2, got 1"),
    ({"method": "svd", "refit": True}, ValueError, "refit needs method .*set refit=False"),
    ({"include": "mlp"}, TypeError, "include must be a list of patterns or None, got str"),
    ({"include": ["mpl"]}, ValueError, "include: pattern 'mpl' matches no linear"),
    ({"exclude": ["proj", "lm_head"]}, ValueError, "model has no linear that can be compressed"),
    ({"calibration": IDS.float()}, TypeError, "int64 token ids"),
    ({"calibration": IDS + 100}, ValueError, r"token ids in \[0, 128\), got \d+ to \d+"),
    ({"calibration": IDS[0]}, ValueError, r"token ids \[n >= 1, L >= 2\]"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_what_cannot_be_is_refused_before_the_work(change, error, message, monkeypatch):
    def long_work(*_args, **_options):
        raise AssertionError("the long work has begun")

    monkeypatch.setattr(Compression, "calibrate", long_work)
    model = zoo_model("llama")
    before = copy.deepcopy(model)
    options = {"keep": 0.7, "calibration": IDS, "cache": False} | SMALL | change
    with pytest.raises(error, match=message):
        compress(model, **options)
    assert_same(model, before)


def test_a_compressed_model_is_refused():
    model, _ = compressed(zoo_model("llama"))
    with pytest.raises(ValueError, match=r"model must be dense, but its layer model.* already"):
        compressed(model)


def test_a_model_without_linears():
    model = zoo_model("llama")
    with pytest.raises(ValueError, match=r"left alone: .*'lm_head': 'output head'"):
        compressed(model, exclude=["proj"])


def test_the_layer_that_is_not_finite_is_named():
    model = zoo_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    for method in ("two_sided", "whitened", "svd"):
        with pytest.raises(
            FloatingPointError, match=r"layer model\.layers\.1\.mlp\.up_proj: its w"
        ):
            compressed(copy.deepcopy(model), method=method)


def test_device_and_dtype_of_a_model_may_be_given_by_name():
    model = zoo_model(NAMES[0])
    compressed(model, method="svd", device="cpu", dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_part_compressed_after_another_counts_with_it():
    model = zoo_model("llama")
    dense = {path: target.weight.numel() for path, target in linears(model).items()}
    for part in ("self_attn", "mlp"):
        compressed(model, 0.8, include=[part])
    assert set(linears(model)) == set(dense)
    assert model_size(model).linears.dense == sum(dense.values())
