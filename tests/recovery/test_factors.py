"""Training of the factors themselves: what moves, the way there and back, resumed, refused."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from helpers import tiny
from helpers.compressing import compressed
from helpers.finetuning import BLOCKS, assert_differ, assert_same, log_of, model_of, state, train
from helpers.mixtures import mixture
from helpers.numerics import dense_weight
from helpers.zoo import ZOO, tokens, zoo_model
from transformers import GPT2Config

from hylora_kernels.evaluation.perplexity import perplexity
from hylora_kernels.layers.embedding import LowRankEmbedding
from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.model.adapters import merge_adapters
from hylora_kernels.model.checkpoint import load_pretrained
from hylora_kernels.model.saving import save_pretrained
from hylora_kernels.recovery import run as training
from hylora_kernels.recovery.factors import BalancedFactors, balanced_factors
from hylora_kernels.recovery.options import FinetuneOptions
from hylora_kernels.recovery.run import Run

pytestmark = pytest.mark.usefixtures("plain_plot")
train = functools.partial(train, train="factors")


def layers_of(model) -> dict[str, SVDLoRALinear]:
    return {p: layer for p, layer in model.named_modules() if isinstance(layer, SVDLoRALinear)}


def shapes_of(model):
    return {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}


def is_trained(name: str) -> bool:
    return "_proj." in name or "norm" in name


# ----------------------------------------------------------------------- what is trained, and where


@pytest.mark.parametrize("form", ["pair", "pivoted"])
@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_and_norms_learn_and_nothing_else_moves(form, lora_rank, dtype, device):
    model = model_of(dtype, form=form, rank=8, lora_rank=lora_rank).to(device)
    merged = merge_adapters(copy.deepcopy(model))
    before, ppl = state(model), perplexity(model, BLOCKS, progress=False).ppl
    report = train(model, BLOCKS, steps=40, lr=3e-3)
    assert perplexity(model, BLOCKS, progress=False).ppl < 0.7 * ppl
    assert report.losses[0] == pytest.approx(math.log(ppl), rel=0.1)
    assert report.losses[-1] < report.losses[0] and report.stopped == ""
    assert shapes_of(model) == shapes_of(merged)  # of the same size and form as when merged
    for name, tensor in state(model).items():
        if not is_trained(name):
            assert torch.equal(tensor, before[name]), name
        elif "norm" in name:
            assert not torch.equal(tensor, before[name]), name
    for path, layer in layers_of(model).items():
        old = merged.get_submodule(path)
        assert (layer.form, layer.rank, layer.lora_rank) == (form, old.rank, 0)
        assert not torch.equal(dense_weight(layer), dense_weight(old))
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


def test_it_recovers_more_than_adapters_do():
    adapters, factors = model_of(rank=6, lora_rank=2), model_of(rank=6, lora_rank=2)
    teacher = {"objective": "keep", "teacher": tiny.llama, "data": BLOCKS, "steps": 40}
    by_adapters = train(adapters, **teacher, train="adapters", lr=1e-2)
    by_factors = train(factors, **teacher, lr=3e-3)
    assert by_factors.last_loss < by_adapters.last_loss < by_adapters.first_loss


def test_norms_learn_at_ten_times_the_rate():
    model, moved = model_of(), {}
    before = state(model)
    with balanced_factors(copy.deepcopy(model), False) as trained:
        start = {name: p.detach().clone() for name, p in trained.items()}

    def first_step(run, step, update=Run._step):
        fields = update(run, step)
        moved.update(
            {n: float((p.detach() - start[n]).abs().max()) for n, p in run.trained.items()}
        )
        return fields

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_step", first_step)
        report = train(model, BLOCKS, steps=1, lr=1e-4, warmup=1)
    for name, distance in moved.items():  # Adam's first step is the rate, whatever the gradient
        assert distance == pytest.approx(1e-3 if "norm" in name else 1e-4, rel=0.05), name
    assert report.trainable == sum(p.numel() for p in start.values())
    norms = [name for name in before if "norm" in name]
    assert len(norms) == 5 and set(norms) < set(moved) and len(moved) == 5 + 2 * 14


def test_biases_dense_linears_and_layernorms_biases_stay_frozen():
    config = GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    model = tiny.causal_lm(config)
    model.transformer.h[0].attn.c_attn = SVDLoRALinear.from_linear(torch.nn.Linear(32, 96), 8, 4)
    layer, before = model.transformer.h[0].attn.c_attn, state(model)
    train(model, BLOCKS, steps=3, lr=1e-3)
    new = model.transformer.h[0].attn.c_attn
    assert torch.equal(new.bias, layer.bias) and new.rank == 12
    for name, tensor in state(model).items():
        if "c_attn" not in name:
            assert torch.equal(tensor, before[name]) != (".ln_" in name and "weight" in name), name


@pytest.mark.parametrize("make", ["gemma3", "gpt2", "opt", "mixtral"])
def test_other_architectures_in_bfloat16(make):
    """Norms that add 1 to their weight or have a bias, Conv1D, experts that few tokens reach."""
    model = zoo_model(make, torch.bfloat16) if make in ZOO else mixture(make, torch.bfloat16)
    data = tokens(8, 16)
    compressed(model, ids=data, refit=False)
    report = train(model, data, steps=12, lr=1e-3)
    assert report.stopped == "" and report.last_loss < report.first_loss
    assert not any("parametrizations" in name or "left" in name for name in state(model))


def test_a_small_step_is_not_lost_in_bfloat16():
    model = model_of(torch.bfloat16)
    before = state(model)
    train(model, BLOCKS, steps=60, lr=5e-5, warmup=0)
    assert_differ(*({n: t for n, t in s.items() if "norm" in n} for s in (before, state(model))))


def test_shared_factors_stay_frozen_and_a_shared_layer_stays_shared():
    model = model_of(rank=6, lora_rank=0)
    first, second = (block.self_attn for block in model.model.layers)
    second.q_proj = first.q_proj
    U, S, Vh = torch.linalg.svd(model.lm_head.weight.detach(), full_matrices=False)
    embedding, head = LowRankEmbedding.tied_pair(U[:, :9] * S[:9], Vh[:9])
    model.set_input_embeddings(embedding)
    model.set_output_embeddings(head)
    before = state(embedding)
    train(model, BLOCKS, steps=3, lr=1e-3)
    assert model.lm_head is head and head.SVh is embedding.SVh
    assert_same(state(embedding), before)
    assert second.q_proj is first.q_proj and isinstance(first.q_proj, SVDLoRALinear)


# ------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("form", ["pair", "pivoted"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(40, 24), (24, 40), (24, 24)])
@pytest.mark.parametrize("ranks", [(8, 0), (8, 4), (20, 4), (22, 8), (24, 0)])
def test_there_and_back_changes_the_product_by_rounding_only(form, dtype, sizes, ranks):
    torch.manual_seed(0)
    layer = SVDLoRALinear.from_linear(torch.nn.Linear(*sizes), *ranks, alpha=0.5, form=form)
    layer = layer.to(dtype)
    factors = BalancedFactors(layer)
    wide = torch.promote_types(dtype, torch.float32)
    left, right = factors.left.detach(), factors.right.detach()
    assert left.dtype == right.dtype == wide
    assert torch.allclose(left.norm(dim=0), right.norm(dim=1), rtol=1e-3)  # balanced
    W = dense_weight(layer)
    of_svd = 1e-14  # relative, in float64
    rounding = of_svd + 2 * torch.finfo(wide).eps
    assert (left.double() @ right.double() - W).norm() <= rounding * W.norm()
    back = factors.fold(layer)
    merged = copy.deepcopy(layer).merge()
    assert {n: (t.shape, t.dtype) for n, t in back.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in merged.state_dict().items()
    }
    assert (back.alpha, back.form, back.bias) == (0.5, form, layer.bias)
    # The rows of the pivoted form are rounded before its coefficients multiply them.
    rounding = of_svd + 8 * torch.finfo(dtype).eps
    assert (dense_weight(back) - W).norm() <= rounding * W.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layers_output_is_the_same_and_in_its_dtype(dtype):
    layer = SVDLoRALinear.from_linear(torch.nn.Linear(40, 24), 8, 4).to(dtype)
    x = torch.randn(2, 5, 40, dtype=dtype)
    y = BalancedFactors(layer)(x)
    assert y.dtype == dtype
    rounding = {torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    torch.testing.assert_close(y, layer(x), rtol=rounding, atol=rounding)


def test_an_exception_puts_the_old_model_back():
    model = model_of(torch.bfloat16)
    before, layers, names = state(model), layers_of(model), [type(m) for m in model.modules()]

    def stop(step):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model, BLOCKS, steps=5, lr=1e-2, on_step=stop)
    assert_same(state(model), before)
    assert layers_of(model) == layers and [type(m) for m in model.modules()] == names


def test_saved_loaded_and_trained_again(tmp_path):
    model = model_of()
    train(model, BLOCKS, steps=3, lr=1e-3)
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path)
    assert_same(state(loaded), state(model))
    losses = [train(m, BLOCKS, steps=3, lr=1e-3).losses for m in (loaded, model)]
    assert losses[0] == losses[1]
    train(loaded, BLOCKS, steps=2, train="adapters", lora_rank=2)


# ------------------------------------------------------------------ resumed, and when it goes wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("objective", ["adapt", "keep"])
def test_resumed_run_ends_with_the_same_bits(dtype, objective, tmp_path):
    options = {"steps": 8, "batch": 2, "lr": 1e-3, "objective": objective}
    if objective == "keep":
        options["teacher"] = functools.partial(tiny.llama, dtype)
    whole = model_of(dtype)
    expected = train(whole, BLOCKS, **options, output_dir=tmp_path / "whole")

    def die(step):
        if step == 5:
            raise KeyboardInterrupt

    options |= {"output_dir": tmp_path / "killed", "save_every": 3}
    with pytest.raises(KeyboardInterrupt):
        train(model_of(dtype), BLOCKS, **options, on_step=die)
    resumed, seen = model_of(dtype), []
    report = train(resumed, BLOCKS, **options, on_step=seen.append)
    assert seen == [3, 4, 5, 6, 7, 8]
    assert_same(state(resumed), state(whole))
    assert report.losses == expected.losses and report.options == expected.options
    logged = [[line["loss"] for line in log_of(tmp_path / name)] for name in ("whole", "killed")]
    assert logged[0] == logged[1] == report.losses


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_restores_the_last_good_factors(value, monkeypatch):
    kept = {}

    def remember(step):
        if step == 2:
            kept.update(state(model))

    model, found, calls = model_of(), training.token_loss, []

    def poisoned(*arguments):
        calls.append(1)
        loss, count = found(*arguments)
        return (loss * value if len(calls) == 4 else loss), count

    monkeypatch.setattr(training, "token_loss", poisoned)
    report = train(model, BLOCKS, steps=6, lr=1e-3, on_step=remember)
    assert report.steps == 2 and "the factors after 2 steps" in report.stopped
    for path, layer in layers_of(model).items():
        good = kept[f"{path}.left"].double() @ kept[f"{path}.right"].double()
        assert (dense_weight(layer) - good).norm() <= 1e-5 * good.norm(), path
    assert torch.equal(model.model.norm.weight, kept["model.norm.parametrizations.weight.original"])


def test_gradient_checkpointing_changes_no_bit():
    models = model_of(), model_of()
    for model, gradient_checkpointing in zip(models, (False, True), strict=True):
        train(model, BLOCKS, steps=3, lr=1e-3, gradient_checkpointing=gradient_checkpointing)
    assert_same(*map(state, models))


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge": False}, "merge=False keeps adapters .*train=factors leaves none"),
        ({"lora_rank": 8}, "lora_rank=8 is for new adapters, but train=factors makes none"),
        ({"train": "norms"}, r"train must be one of \('adapters', 'factors'\), got 'norms'"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(ValueError, match=message):
        FinetuneOptions(**({"train": "factors"} | options))


def test_a_dense_model_is_refused():
    with pytest.raises(ValueError, match="model is dense and has no factors to train"):
        train(tiny.llama(), BLOCKS)


def test_a_checkpoint_of_another_start_is_refused_and_the_model_left_alone(tmp_path):
    train(model_of(), BLOCKS, steps=2, output_dir=tmp_path)
    scaled = model_of()
    layers_of(scaled).popitem()[1].alpha = 0.5  # with the same tensors
    for model in (model_of(lora_rank=3), scaled):
        before = state(model)
        with pytest.raises(ValueError, match=r"can't be resumed: trained was .* there and is "):
            train(model, BLOCKS, steps=2, output_dir=tmp_path)
        assert_same(state(model), before)


@pytest.mark.parametrize("steps", [60, 61])
def test_the_default_rate_is_that_of_factors(steps):
    assert FinetuneOptions(steps=steps, train="factors").lr == 3e-5
    assert FinetuneOptions(steps=steps, train="factors", lr=0.5).lr == 0.5


@pytest.mark.parametrize(
    ("options", "train", "lr"),
    [
        ({}, "factors", 3e-5),
        ({"train": "adapters"}, "adapters", 2e-4),
        ({"lora_rank": 8}, "adapters", 2e-4),
        ({"merge": False}, "adapters", 2e-4),
        ({"objective": "adapt", "teacher": None}, "adapters", 1e-3),
    ],
)
def test_what_keeps_breadth_are_the_factors_unless_adapters_are_asked_for(options, train, lr):
    found = FinetuneOptions(**({"objective": "keep", "teacher": "dense"} | options))
    assert (found.train, found.lr) == (train, lr)
