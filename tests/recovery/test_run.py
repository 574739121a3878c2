"""A training run that is killed and resumed, and one that goes wrong."""

from __future__ import annotations

import functools
import json
import math

import pytest
import torch
from helpers import tiny
from helpers.finetuning import (
    BLOCKS,
    assert_same,
    log_of,
    model_of,
    state,
    train,
    watched_updates,
)

from hylora_kernels.evaluation.perplexity import perplexity
from hylora_kernels.recovery import run as training
from hylora_kernels.recovery.recipe import frozen_hash
from hylora_kernels.recovery.run import Run

pytestmark = pytest.mark.usefixtures("plain_plot")


# ------------------------------------------------------------------------------ killed and resumed


class Killed(Exception):
    pass


def killed_at(monkeypatch, step):
    """Make the next run die in its `step`-th step, after the gradients."""
    gradients = Run._gradients

    def dying(run, at):
        found = gradients(run, at)
        if at == step:
            raise Killed
        return found

    monkeypatch.setattr(Run, "_gradients", dying)
    return lambda: monkeypatch.setattr(Run, "_gradients", gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_run_ends_with_the_same_bits(dtype, tmp_path, monkeypatch):
    make = functools.partial(model_of, dtype, dropout=0.2)
    options = {"steps": 12, "batch": 2, "accumulate": 2, "lr": 1e-2, "merge": False}
    whole = make()
    expected = train(whole, BLOCKS, **options, output_dir=tmp_path / "whole")

    revive = killed_at(monkeypatch, 7)
    options |= {"save_every": 5, "output_dir": tmp_path / "killed"}
    victim = make()
    with pytest.raises(Killed):
        train(victim, BLOCKS, **options)
    assert not victim.training and {p.dtype for p in victim.parameters()} == {dtype}
    revive()

    resumed, calls = make(), []
    with watched_updates(lambda _: calls.append(1)):
        report = train(resumed, BLOCKS, **options)
    assert len(calls) == 12 - 5
    assert_same(state(resumed), state(whole))
    assert report.losses == expected.losses and report.options == expected.options
    assert report.tokens == expected.tokens and report.steps == 12
    logged = [[line["loss"] for line in log_of(tmp_path / name)] for name in ("whole", "killed")]
    assert logged[0] == logged[1] == report.losses


def test_on_step_sees_every_step_and_an_evaluation_in_it_changes_no_bit(tmp_path, monkeypatch):
    make = functools.partial(model_of, torch.bfloat16, dropout=0.2)
    options = {"steps": 6, "lr": 1e-2, "merge": False}
    plain, watched, ppls = make(), make(), {}
    train(plain, BLOCKS, **options)

    def evaluate(step):
        ppls[step] = perplexity(watched, BLOCKS, progress=False).ppl

    untrained = perplexity(watched, BLOCKS, progress=False).ppl
    train(watched, BLOCKS, **options, on_step=evaluate)
    assert list(ppls) == [0, 1, 2, 3, 4, 5, 6]
    assert ppls[0] == pytest.approx(untrained, rel=1e-2) and ppls[6] < ppls[0]
    assert_same(state(watched), state(plain))

    options |= {"save_every": 2, "output_dir": tmp_path}
    revive, seen = killed_at(monkeypatch, 4), []
    with pytest.raises(Killed):
        train(make(), BLOCKS, **options, on_step=seen.append)
    revive()
    train(make(), BLOCKS, **options, on_step=seen.append)
    assert seen == [0, 1, 2, 3, 2, 3, 4, 5, 6]


def test_a_finished_run_is_only_read_again(tmp_path):
    first, again = model_of(), model_of()
    options = {"steps": 3, "output_dir": tmp_path}
    expected = train(first, BLOCKS, **options)
    with watched_updates(lambda _: pytest.fail("no step was left to do")):
        report = train(again, BLOCKS, **options)
    assert_same(state(first), state(again))
    assert report == expected


def test_resume_false_starts_anew(tmp_path):
    train(model_of(), BLOCKS, steps=3, output_dir=tmp_path)
    report = train(model_of(), BLOCKS, steps=2, output_dir=tmp_path, resume=False)
    assert len(report.losses) == 2
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


OTHERS = {
    "steps": {"steps": 5, "warmup": 1},
    "lr": {"lr": 2e-3},
    "warmup": {"warmup": 2},
    "batch": {"batch": 2},
    "accumulate": {"accumulate": 2},
    "clip": {"clip": 2.0},
    "chunk": {"chunk": 8},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "seed": {"seed": 1},
    "length": {"data": BLOCKS[:, :8]},
    "data": {"data": BLOCKS.flip(0)},
    "distill": {"distill": 0.5, "teacher": tiny.llama},
    "base": {"model": {"rank": 11}},
    "trained": {"model": {"lora_rank": 3}},
    "train": {"train": "factors", "lr": 1e-3},
}


@pytest.mark.parametrize("field", OTHERS)
def test_checkpoint_of_another_run_is_refused(field, tmp_path):
    plain = {"data": BLOCKS, "steps": 4, "output_dir": tmp_path}
    train(model_of(), **plain)
    file = tmp_path / "checkpoint" / "training.safetensors"
    before, changes = file.read_bytes(), dict(OTHERS[field])
    model = model_of(**changes.pop("model", {}))
    if "teacher" in changes:
        changes["teacher"] = changes["teacher"](seed=9)
    untouched = state(model)
    with pytest.raises(
        ValueError, match=f"can't be resumed: {field} was .* there and is "
    ) as error:
        train(model, **(plain | changes))
    assert str(file) in str(error.value) and "pass resume=False" in str(error.value)
    assert file.read_bytes() == before
    assert_same(state(model), untouched)
    if field == "steps":
        assert "steps was 4 there and is 5 here" in str(error.value)


def test_alpha_and_dropout_are_part_of_the_base():
    hashes = {
        frozen_hash(model_of(**options)) for options in ({}, {"alpha": 0.5}, {"dropout": 0.1})
    }
    assert len(hashes) == 3
    trained = model_of()
    train(trained, BLOCKS, steps=2, merge=False)
    assert frozen_hash(trained) == frozen_hash(model_of())


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "foreign"])
def test_damaged_checkpoint(damage, tmp_path):
    options = {"steps": 2, "output_dir": tmp_path}
    train(model_of(), BLOCKS, **options)
    file = tmp_path / "checkpoint" / "training.safetensors"
    if damage == "foreign":
        from safetensors.torch import save_file

        save_file({"weight": torch.zeros(2)}, file)
    else:
        content = {"cut": file.read_bytes()[:-9], "garbage": b"x" * 999, "empty": b""}[damage]
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"training\.safetensors can't be resumed: .*resume=False"):
        train(model_of(), BLOCKS, **options)
    assert train(model_of(), BLOCKS, **options, resume=False).steps == 2


def test_when_checkpoints_are_written(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(Run, "save", lambda run: saved.append(len(run.losses)))
    train(model_of(), BLOCKS, steps=8, save_every=3, output_dir=tmp_path)
    assert saved == [3, 6, 8]
    saved.clear()
    train(model_of(), BLOCKS, steps=4, output_dir=tmp_path)
    assert saved == [4]
    saved.clear()
    monkeypatch.setattr(training, "SAVE_SECONDS", -1.0)
    train(model_of(), BLOCKS, steps=3, output_dir=tmp_path)
    assert saved == [1, 2, 3]


# ------------------------------------------------------------------------------ when it goes wrong


def poisoned_from(monkeypatch, step, loss=1.0, gradient=1.0):
    """From `step` on, multiply the loss's value and the gradients by these."""
    found = training.token_loss
    calls = []

    def poisoned(*arguments):
        total, count = found(*arguments)
        calls.append(1)
        if len(calls) < step:
            return total, count
        return _Poison.apply(total, loss, gradient), count

    monkeypatch.setattr(training, "token_loss", poisoned)


class _Poison(torch.autograd.Function):
    @staticmethod
    def forward(ctx, total, loss, gradient):
        ctx.gradient = gradient
        return total * loss

    @staticmethod
    def backward(ctx, upstream):
        return upstream * ctx.gradient, None, None


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("what", "steps_kept"), [("loss", 3), ("gradient", 4)])
def test_not_finite_stops_with_the_last_good_adapters(
    what, steps_kept, value, tmp_path, monkeypatch
):
    """At step 5 the loss is bad: what step 4's update made is not to be trusted. Is the gradient
    bad, the loss of that update was still finite."""
    good = model_of()
    with monkeypatch.context() as limited:
        revive = killed_at(limited, steps_kept + 1)
        with pytest.raises(Killed):
            train(good, BLOCKS, steps=8, lr=1e-2, merge=False)
        revive()
    poisoned_from(monkeypatch, 5, **{what: value})
    model = model_of()
    report = train(model, BLOCKS, steps=8, lr=1e-2, merge=False, output_dir=tmp_path)
    assert_same(state(model), state(good))
    assert (report.steps, len(report.losses)) == (steps_kept, 4)
    assert report.stopped.startswith("step 5: loss ")
    assert f"the adapters after {steps_kept} steps" in report.stopped
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 4
    assert (tmp_path / "loss.png").exists()
    assert math.isfinite(perplexity(model, BLOCKS, progress=False).ppl)


def test_not_finite_at_the_first_step(monkeypatch, tmp_path):
    poisoned_from(monkeypatch, 1, loss=math.nan)
    model = model_of()
    before = state(model)
    report = train(model, BLOCKS, steps=3, merge=False, output_dir=tmp_path)
    assert_same(state(model), before)
    assert report.steps == 0 and report.losses == [] and math.isnan(report.first_loss)
    assert json.loads(report.to_json())["first_loss"] == "NaN"


def test_a_changed_base_is_an_error():
    model = model_of()

    def tamper(module, args):
        if torch.is_grad_enabled():
            with torch.no_grad():
                module.weight[0] += 1

    model.model.norm.register_forward_pre_hook(tamper)
    with pytest.raises(RuntimeError, match="the frozen base changed in training"):
        train(model, BLOCKS, steps=2)
    assert not model.training


def test_frozen_hash_sees_every_frozen_bit():
    model = model_of(torch.bfloat16)
    known = {frozen_hash(model)}
    for name, tensor in model.state_dict().items():
        if name.endswith((".A", ".B")):
            continue
        old = tensor.flatten()[-1].clone()
        tensor.view(-1)[-1] = old + 1 if old.dtype == torch.int32 else old * 1.01 + 0.01
        found = frozen_hash(model)
        assert found not in known, name
        known.add(found)
        tensor.view(-1)[-1] = old
    assert frozen_hash(model) in known
