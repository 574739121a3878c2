"""finetune(scope="block"): each block is trained to do what the dense one does."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from helpers import architectures, tiny
from helpers.finetuning import BLOCKS, assert_same, model_of, state, train

from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.recovery import blockwise
from hylora_kernels.recovery.blockwise import BlockRun

pytestmark = pytest.mark.usefixtures("own_cache")
HOW = {"objective": "keep", "scope": "block", "steps": 20}
RATES = {"factors": {"lr": 1e-3}, "adapters": {"train": "adapters", "lr": 1e-2}}


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HYLORA_CACHE", str(tmp_path / "cache"))


@torch.no_grad()
def divergence(model, teacher):
    """KL(teacher || model) in nats a token."""
    ours, theirs = (m(input_ids=BLOCKS).logits.log_softmax(-1) for m in (model, teacher))
    return float(F.kl_div(ours, theirs, log_target=True, reduction="sum")) / BLOCKS.numel()


@torch.no_grad()
def block_errors(model, teacher):
    """By block: |y - t|^2 / |t|^2 of the states behind it in the two models' own forwards."""
    ours, theirs = (
        m.model(BLOCKS, output_hidden_states=True, use_cache=False).hidden_states
        for m in (model, teacher)
    )
    # The last ones are normed.
    return [float((y - t).norm() / t.norm()) ** 2 for y, t in zip(ours, theirs, strict=True)][1:-1]


@pytest.mark.parametrize("how", RATES)
@pytest.mark.parametrize("form", ["pair", "pivoted"])
def test_the_blocks_and_the_model_come_nearer_to_the_dense_ones(how, form):
    teacher, model = tiny.llama(num_hidden_layers=3), model_of(layers=3, rank=6, form=form)
    before, weights = divergence(model, teacher), state(teacher)
    first = block_errors(model, teacher)[0]
    report = train(model, BLOCKS, teacher=teacher, batch=2, **HOW | RATES[how])
    assert divergence(model, teacher) < 0.8 * before
    assert [fit.path for fit in report.fits] == [f"model.layers.{i}" for i in range(3)]
    assert all(fit.after < 0.95 * fit.before for fit in report.fits)
    assert report.fits[0].before == pytest.approx(first, rel=1e-3)
    # What is reported of a block is what the whole model has there.
    after = block_errors(model, teacher)
    assert [fit.after for fit in report.fits][:2] == pytest.approx(after, rel=1e-3)
    assert len(report.losses) == 3 * 20 and report.steps == 20
    assert report.tokens == 20 * 2 * 16
    assert "model.layers.1" in str(report)
    assert_same(state(teacher), weights)
    layers = [m for m in model.modules() if isinstance(m, SVDLoRALinear)]
    assert len(layers) == 3 * 7 and not any(m.lora_rank for m in layers)
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


def test_what_is_outside_the_blocks_and_the_frozen_base_stay():
    model = model_of()
    before = state(model)
    train(model, BLOCKS, teacher=tiny.llama(), merge=False, **HOW | RATES["adapters"])
    after = state(model)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {name for name in after if name.endswith((".A", ".B"))}
    model = model_of()
    train(model, BLOCKS, teacher=tiny.llama(), **HOW | RATES["factors"])
    after = state(model)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(after[name], before[name])
    assert not torch.equal(
        after["model.layers.0.input_layernorm.weight"],
        before["model.layers.0.input_layernorm.weight"],
    )


def test_gradients_are_those_of_one_block(monkeypatch):
    """Memory: while a block is trained no parameter outside it has a gradient or a moment."""
    model, seen = model_of(), []
    trained = blockwise.adamw

    def watched(parameters, device):
        optimizer = trained(parameters, device)
        step = optimizer.step

        def counted():
            step()
            with_gradient = {id(p) for p in model.parameters() if p.grad is not None}
            assert with_gradient == {id(p) for p in parameters}
            seen.append(sum(p.numel() for p in parameters))

        optimizer.step = counted
        return optimizer

    monkeypatch.setattr(blockwise, "adamw", watched)
    report = train(model, BLOCKS, teacher=tiny.llama(), **HOW | {"steps": 1})
    assert len(seen) == 2 and sum(seen) == report.trainable


@pytest.mark.parametrize("how", RATES)
def test_a_stopped_run_goes_on_behind_its_last_block(how, monkeypatch):
    options = HOW | RATES[how] | {"steps": 5, "accumulate": 2}
    whole = model_of(dropout=0.1)
    expected = train(whole, BLOCKS, teacher=tiny.llama(), **options, resume=False)
    updates, ran = BlockRun._updates, []

    def dying(run, block, *given):
        ran.append(block.path)
        if len(ran) == 2:
            raise KeyboardInterrupt
        return updates(run, block, *given)

    monkeypatch.setattr(BlockRun, "_updates", dying)
    # resume=False forgets the first run's blocks.
    with pytest.raises(KeyboardInterrupt):
        train(model_of(dropout=0.1), BLOCKS, teacher=tiny.llama(), **options, resume=False)
    resumed = model_of(dropout=0.1)
    report = train(resumed, BLOCKS, teacher=tiny.llama(), **options)
    assert ran[-1:] == ["model.layers.1"] and len(ran) == 3
    assert_same(state(resumed), state(whole))
    assert report.losses == expected.losses and report.fits == expected.fits
    other = train(model_of(), BLOCKS, teacher=tiny.llama(seed=5), **options)
    assert len(ran) == 5 and other.losses != report.losses


def test_not_finite_leaves_the_block_as_it_was(monkeypatch, tmp_path):
    model, clip, calls = model_of(), torch.nn.utils.clip_grad_norm_, []

    def bad(parameters, limit):
        calls.append(1)
        return clip(parameters, limit) * (float("nan") if len(calls) == 8 else 1.0)

    monkeypatch.setattr(blockwise.nn.utils, "clip_grad_norm_", bad)
    second = {n: t for n, t in state(model).items() if ".layers.1." in n}
    report = train(
        model, BLOCKS, teacher=tiny.llama(), **HOW | {"steps": 5}, output_dir=tmp_path / "out"
    )
    assert report.stopped.startswith("model.layers.1: step 3: loss ")
    assert len(report.fits) == 1 and len(report.losses) == 5
    assert_same({n: t for n, t in state(model).items() if ".layers.1." in n}, second)
    lines = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["path"] for line in lines] == ["model.layers.0"]


@pytest.mark.slow
def test_inputs_of_the_trained_prefix_are_better_than_the_dense_models(monkeypatch):
    teacher = tiny.llama(num_hidden_layers=6, initializer_range=0.1)
    updates, behind, ends = BlockRun._updates, [], []

    def on_dense_states(run, block, chain, inputs, targets, *given):
        inputs = behind[-1] if behind else inputs
        behind.append(targets)
        return updates(run, block, chain, inputs, targets, *given)

    for own in (updates, on_dense_states):
        monkeypatch.setattr(BlockRun, "_updates", own)
        model = tiny.adapted(copy.deepcopy(teacher), rank=8)
        options = HOW | {"steps": 20, "batch": 8, "lr": 2e-3, "resume": False}
        train(model, tiny.tokens(64, 16), teacher=teacher, **options)
        ends.append(divergence(model, teacher))
    assert ends[0] < 0.95 * ends[1]


def test_another_architecture():
    """OPT: biases, LayerNorms, blocks that give a tuple."""
    teacher, model = (architectures.tiny("opt") for _ in range(2))
    tiny.adapted(model, rank=6, names=("fc1", "fc2", "q_proj"))
    report = train(model, BLOCKS % 60, teacher=teacher, **HOW | RATES["factors"])
    assert report.fits and all(fit.after < fit.before for fit in report.fits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "adapt"}, "goes with objective='keep' and distill=1, got 'adapt'"),
        ({"distill": 0.5}, "goes with objective='keep' and distill=1"),
        ({"shard": True, "train": "adapters"}, "shard=True is for scope='model'"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing=True is for scope='model'"),
        ({"teacher": tiny.llama(num_hidden_layers=1)}, "teacher must have the model's blocks"),
    ],
)
def test_refusals(options, message):
    given = HOW | {"teacher": tiny.llama()} | options
    if given["objective"] == "adapt":
        del given["teacher"]
    with pytest.raises(ValueError, match=message):
        train(model_of(), BLOCKS, **given)
