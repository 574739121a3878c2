"""Training of adapters: only they move; the recipe step by step; refused arguments."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny
from helpers.finetuning import (
    BLOCKS,
    HOW,
    assert_differ,
    assert_same,
    log_of,
    model_of,
    state,
    train,
    watched_updates,
    weights_of,
)
from transformers import GPT2Config, OPTConfig

from hylora_kernels.evaluation.perplexity import perplexity
from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.recovery.finetune import adapter_parameters
from hylora_kernels.recovery.recipe import Recipe, frozen_hash
from hylora_kernels.recovery.run import Run
from hylora_kernels.support.plots import loss_plot

pytestmark = pytest.mark.usefixtures("plain_plot")


# ------------------------------------------------------------------------------- what is trained


@pytest.mark.parametrize("form", ["pair", "pivoted"])
def test_adapters_learn_and_nothing_else_moves(form, device):
    model = model_of(form=form).to(device)
    before, ppl = state(model), perplexity(model, BLOCKS, progress=False).ppl
    report = train(model, BLOCKS, steps=40, lr=1e-2, merge=False)
    assert perplexity(model, BLOCKS, progress=False).ppl < 0.8 * ppl
    for name, tensor in state(model).items():
        assert name.endswith((".A", ".B")) != torch.equal(tensor, before[name]), name
    assert report.losses[-1] < report.losses[0] and report.stopped == ""
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(
        adapter_parameters(model)
    )


def test_a_bias_and_the_norms_stay_frozen():
    config = GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    model = tiny.causal_lm(config)
    layer = torch.nn.Linear(32, 96)
    model.transformer.h[0].attn.c_attn = SVDLoRALinear.from_linear(layer, 8, 4)
    model.requires_grad_(True)
    before = state(model)
    train(model, BLOCKS, steps=3, merge=False)
    moved = {name for name, tensor in state(model).items() if not torch.equal(tensor, before[name])}
    assert moved == {f"transformer.h.0.attn.c_attn.{name}" for name in "AB"}


def test_an_adapter_that_no_token_reaches_stays_as_it_is(tmp_path):
    """Like an expert that no token chooses: no gradient counts as a gradient of zero."""
    whole, part = model_of(), model_of()
    part.model.layers[1].unused = SVDLoRALinear(8, 8, 4, 2)
    before = state(part.model.layers[1].unused)
    for model in (whole, part):
        train(model, BLOCKS, steps=3, merge=False, clip=1e9, output_dir=tmp_path, resume=False)
    assert_same(state(part.model.layers[1].unused), before)
    assert_same(*({n: t for n, t in state(m).items() if "unused" not in n} for m in (whole, part)))
    train(part, BLOCKS, steps=3, output_dir=tmp_path / "other")


def test_report(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["hylora_kernels.recovery.finetune"], "loss_plot", loss_plot)
    model = model_of()
    trainable = sum(p.numel() for p in adapter_parameters(model).values())
    total, base = sum(p.numel() for p in model.parameters()), frozen_hash(model)
    report = train(model, BLOCKS, steps=4, batch=2, accumulate=3, output_dir=tmp_path)
    assert (report.steps, len(report.losses)) == (4, 4)
    assert report.tokens == 4 * 2 * 3 * 16
    assert report.tokens_per_second == pytest.approx(report.tokens / report.seconds)
    assert (report.first_loss, report.last_loss) == (report.losses[0], report.losses[-1])
    assert (report.trainable, report.total) == (trainable, total)
    assert report.base_hash == base and report.lr == 1e-3 and report.text == "Tensor"
    assert (report.teacher, report.teacher_bytes) == ("", 0)
    assert json.loads(report.to_json())["options"]["warmup"] == 1
    lines = log_of(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["loss"] for line in lines] == report.losses
    assert lines[-1]["lr"] == pytest.approx(1e-4) and lines[0]["grad_norm"] > 0
    assert (tmp_path / "loss.png").stat().st_size > 1000
    assert [f.name for f in (tmp_path / "checkpoint").iterdir()] == ["training.safetensors"]


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(model_of(), BLOCKS, steps=2)
    assert list(tmp_path.iterdir()) == []


def test_text_and_tokenizer():
    text = "a rose is a rose is a rose and so is a nose. " * 60
    tokenizer = tiny.tokenizer(text)
    model = tiny.adapted(tiny.llama(vocab_size=len(tokenizer)))
    report = train(model, [text], tokenizer, steps=12, length=32, lr=1e-2)
    assert report.options["length"] == 32 and report.text == "list"
    assert report.last_loss < report.first_loss


# ------------------------------------------------------------------------- the recipe, step by step


def recipe_of(**changes):
    fields = {
        "steps": 60, "lr": 1e-3, "warmup": 10, "length": 16, "batch": 1, "accumulate": 1,
        "clip": 1.0, "chunk": 64, "objective": "adapt", "distill": 0.0, "seed": 0,
        "gradient_checkpointing": False, "processes": 1,
        "data": "", "teacher": "", "train": "adapters", "scope": "model", "trained": "", "base": "",
    }  # fmt: skip
    return Recipe(**(fields | changes))


def test_learning_rate():
    rates = [recipe_of().learning_rate(step) for step in range(1, 61)]
    assert rates[:10] == pytest.approx([1e-4 * step for step in range(1, 11)])
    assert rates[9] == max(rates) and rates[-1] == pytest.approx(1e-4)
    assert rates[34] == pytest.approx(0.55e-3)  # half way down
    assert all(a > b for a, b in itertools.pairwise(rates[9:]))
    assert recipe_of(warmup=0, steps=1).learning_rate(1) == pytest.approx(1e-4)
    assert recipe_of(warmup=1, steps=1).learning_rate(1) == 1e-3


@pytest.mark.parametrize(
    ("steps", "lr", "warmup"), [(1, 1e-3, 0), (7, 1e-3, 1), (60, 1e-3, 10), (61, 3e-4, 10)]
)
def test_defaults_by_steps(steps, lr, warmup, monkeypatch):
    monkeypatch.setattr(Run, "train", lambda *_: setattr(_[0], "seconds", 1.0) or "")
    options = train(model_of(), BLOCKS, steps=steps).options
    assert (options["lr"], options["warmup"]) == (lr, warmup)


def test_the_same_as_a_plain_loop():
    """AdamW on the mean of all predictions of a step, clipped, by the plain formula of the loss."""
    model, steps, batch = model_of(), 6, 3
    plain = copy.deepcopy(model).requires_grad_(False)
    parameters = list(adapter_parameters(plain).values())
    for parameter in parameters:
        parameter.requires_grad_()
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.0)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(5))
    losses = []
    for step in range(1, steps + 1):
        places = [order[i % 8] for i in range((step - 1) * batch, step * batch)]
        ids = torch.stack([BLOCKS[place] for place in places])
        logits = plain(input_ids=ids).logits[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits, ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        rate = step / 2 if step <= 2 else 0.55 + 0.45 * math.cos(math.pi * (step - 2) / 4)
        optimizer.param_groups[0]["lr"] = 1e-2 * rate
        optimizer.step()
        losses.append(float(loss.detach()))
    report = train(
        model, BLOCKS, steps=steps, batch=batch, lr=1e-2, warmup=2, clip=0.5, seed=5, merge=False
    )
    assert report.losses == pytest.approx(losses, rel=1e-5)
    for got, want in zip(adapter_parameters(model).values(), parameters, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("batch", "accumulate"), [(1, 6), (2, 3), (3, 2)])
def test_accumulation_is_a_larger_batch(batch, accumulate):
    whole = train(model_of(), BLOCKS, steps=5, batch=6, lr=1e-2)
    parts = train(model_of(), BLOCKS, steps=5, batch=batch, accumulate=accumulate, lr=1e-2)
    assert parts.losses == pytest.approx(whole.losses, rel=1e-4)


def test_data_is_walked_in_a_seeded_permutation():
    seen = []

    def watch(model, args, kwargs):
        seen.append(kwargs["input_ids"].clone())

    def walk(seed):
        seen.clear()
        model = model_of()
        model.model.register_forward_pre_hook(watch, with_kwargs=True)
        train(model, BLOCKS, steps=6, batch=4, seed=seed)
        rows = torch.cat([ids for ids in seen if ids.shape == (4, 16)])  # without the head's probe
        return [next(i for i in range(8) if torch.equal(BLOCKS[i], row)) for row in rows]

    first = walk(0)
    assert sorted(first[:8]) == list(range(8)) and first[:8] == first[8:16] == first[16:]
    assert walk(0) == first != walk(1)


@pytest.mark.parametrize("clip", [0.01, math.inf])
def test_clipping(clip, tmp_path):
    norms = []

    def watch(parameters):
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in parameters])))

    with watched_updates(watch):
        train(model_of(), BLOCKS, steps=3, clip=clip, output_dir=tmp_path)
    logged = [line["grad_norm"] for line in log_of(tmp_path)]
    assert norms == pytest.approx([min(norm, clip) for norm in logged], rel=1e-4)
    assert min(logged) > 0.01


def test_the_callers_random_state_is_left_alone():
    model, before = model_of(dropout=0.3), torch.get_rng_state()
    train(model, BLOCKS, steps=2)
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------ dtypes and merging


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_masters_are_wide_and_adapters_come_back_in_their_dtype(dtype):
    model, seen = model_of(dtype), set()
    with watched_updates(lambda parameters: seen.update(p.dtype for p in parameters)):
        report = train(model, BLOCKS, steps=16, lr=1e-2, merge=False)
    assert seen == {torch.promote_types(dtype, torch.float32)}
    assert {p.dtype for p in adapter_parameters(model).values()} == {dtype}
    assert report.last_loss < report.first_loss and not model.training


def test_small_steps_are_not_lost_in_bfloat16():
    """Steps of 1e-5 are below bfloat16's resolution: only masters can add them up."""
    model = model_of(torch.bfloat16)
    before = state(model)
    train(model, BLOCKS, steps=30, lr=1e-5, warmup=0, merge=False)
    assert_differ(before, state(model))


def test_float16_gradients_do_not_underflow():
    """A mean over many tokens, far below the head, would leave float16's range."""
    blocks = tiny.tokens(8, 64)
    norms = {torch.float16: [], torch.float32: []}
    for dtype, found in norms.items():
        model = tiny.adapted(tiny.llama(dtype), names=("layers.0.self_attn.q_proj",))
        model.lm_head.weight.data *= 1e-3

        def watch(parameters, found=found):
            found.extend(float(p.grad.norm()) for p in parameters)

        with watched_updates(watch):
            train(model, blocks, steps=1, batch=8, clip=math.inf)
    assert norms[torch.float16] == pytest.approx(norms[torch.float32], rel=0.05)


def test_merged_at_the_end():
    kept, merged = model_of(), model_of()
    dense = [m for m in merged.modules() if isinstance(m, SVDLoRALinear)]
    ranks = [layer.rank for layer in dense]
    for model, merge in ((kept, False), (merged, True)):
        train(model, BLOCKS, steps=10, lr=1e-2, merge=merge)
    assert all(layer.A is None for layer in dense)
    assert [layer.rank for layer in dense] == [rank + 4 for rank in ranks]
    assert not any(p.requires_grad for p in merged.parameters()) and not merged.training
    with torch.no_grad():
        a, b = (model(input_ids=BLOCKS).logits for model in (kept, merged))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


# ----------------------------------------------------------------------- dropout and checkpointing

GPT2 = GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0.5)
OPT = OPTConfig(
    vocab_size=96, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.5, layerdrop=0.5, init_std=0.3,
)  # fmt: skip


def opt_of(**options):
    torch.manual_seed(0)
    return tiny.adapted(tiny.causal_lm(OPT), names=("q_proj", "fc1"), **options)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_only_the_adapters_dropout_acts(gradient_checkpointing):
    options = {"steps": 3, "gradient_checkpointing": gradient_checkpointing}
    model = opt_of()
    assert model.config.dropout == 0.5
    ppl = perplexity(model, BLOCKS[:1], progress=False)
    still = train(model, BLOCKS[:1], **options)
    assert still.losses[0] == pytest.approx(ppl.nll, rel=1e-5)
    dropped = train(opt_of(dropout=0.5), BLOCKS[:1], **options)
    assert abs(dropped.losses[0] - still.losses[0]) > 1e-4


@pytest.mark.parametrize("make", [model_of, opt_of, functools.partial(model_of, dropout=0.3)])
def test_gradient_checkpointing_changes_no_bit(make):
    models, losses, forwards = [], [], []
    for gradient_checkpointing in (False, True):
        model, calls = make(), []
        layer = next(m for m in model.modules() if isinstance(m, SVDLoRALinear))
        hook = layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        options = {"steps": 4, "merge": False, "gradient_checkpointing": gradient_checkpointing}
        losses.append(train(model, BLOCKS, **options).losses)
        hook.remove()
        models.append(model)
        forwards.append(len(calls))
        assert "forward" not in vars(layer) and not any(
            "forward" in vars(module) for module in model.modules()
        )
    assert losses[0] == losses[1]
    assert_same(*map(state, models))
    assert forwards[1] - forwards[0] == 4  # every step's forward is done once more


# -------------------------------------------------------------------------------------- distilling


def test_distillation_moves_towards_the_teacher():
    teacher = tiny.llama().train()
    model = model_of(rank=6)

    @torch.no_grad()
    def apart(model):
        ours, theirs = (m(input_ids=BLOCKS).logits.log_softmax(-1) for m in (model, teacher))
        return float(F.kl_div(ours, theirs, log_target=True, reduction="sum"))

    before, weights = apart(model), state(teacher)
    train(model, BLOCKS, steps=40, lr=1e-2, distill=1.0, teacher=teacher)
    assert apart(model) < 0.5 * before
    assert not teacher.training and all(p.grad is None for p in teacher.parameters())
    assert_same(state(teacher), weights)


# ------------------------------------------------------------------------------- several processes

TWO_PROCESSES = """
import sys
import torch
from helpers import tiny
from helpers.finetuning import HOW, weights_of
from accelerate import PartialState
from safetensors.torch import save_file
from hylora_kernels.recovery.finetune import finetune
torch.set_num_threads(1)
model = tiny.adapted(tiny.llama())
state = PartialState(cpu=True)
teacher = {"objective": "keep", "teacher": tiny.llama} if sys.argv[2] == "keep" else {}
how = HOW[sys.argv[3]]
report = finetune(model, tiny.tokens(8, 16), steps=4, batch=2, accumulate=1, **how,
                  output_dir=sys.argv[1], progress=False, **teacher)
if sys.argv[3] == "adapters":
    tensors = {n: p.detach() for n, p in model.named_parameters() if n.endswith((".A", ".B"))}
else:
    tensors = weights_of(model)
tensors["losses"] = torch.tensor(report.losses)
save_file(tensors, f"{sys.argv[1]}/{state.process_index}.safetensors")
assert report.tokens == 4 * 4 * 16
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "what"), [("adapt", "adapters"), ("keep", "adapters"), ("adapt", "factors")]
)
def test_two_processes_are_a_batch_of_twice_the_size(objective, what, tmp_path):
    from safetensors.torch import load_file

    (tmp_path / "run.py").write_text(TWO_PROCESSES)
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node=2", "run.py", str(tmp_path), objective, what]
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-4000:]
    first, second = (load_file(tmp_path / f"{i}.safetensors") for i in (0, 1))
    assert_same(first, second)
    model = model_of()
    teacher = {"objective": "keep", "teacher": tiny.llama} if objective == "keep" else {}
    report = train(model, BLOCKS, steps=4, batch=4, **HOW[what], **teacher)
    assert first.pop("losses").tolist() == pytest.approx(report.losses, rel=1e-4)
    expected = adapter_parameters(model) if what == "adapters" else weights_of(model)
    assert first.keys() == expected.keys()
    for name, parameter in expected.items():
        torch.testing.assert_close(first[name], parameter.detach(), rtol=1e-2, atol=1e-4)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 4


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be an int of at least 1, got 0"),
        ({"steps": 2.5}, "steps must be an int of at least 1, got 2.5"),
        ({"steps": "9"}, "steps must be an int of at least 1, got '9'"),
        ({"batch": 0}, "batch must be an int of at least 1, got 0"),
        ({"accumulate": True}, "accumulate must be an int of at least 1, got True"),
        ({"chunk": 0}, "chunk must be an int of at least 1, got 0"),
        ({"warmup": -1}, "warmup must be an int of at least 0, got -1"),
        ({"warmup": 9}, "warmup must be at most steps=4, got 9"),
        ({"save_every": 0, "output_dir": "x"}, "save_every must be an int of at least 1, got 0"),
        ({"save_every": 2}, "save_every=2 needs an output_dir"),
        ({"lr": 0.0}, "lr must be positive and finite, got 0.0"),
        ({"lr": math.inf}, "lr must be positive and finite, got inf"),
        ({"clip": 0}, r"clip must be positive \(math.inf for no clipping\), got 0"),
        ({"clip": math.nan}, "clip must be positive"),
        ({"distill": 1.5}, r"distill must be in \[0, 1\], got 1.5"),
        ({"distill": 0.5}, "distill > 0 goes with a teacher, got distill=0.5 and no teacher"),
        ({"teacher": {}}, "distill > 0 goes with a teacher, got distill=0.0 and a teacher"),
        ({"teacher": {"vocab_size": 50}, "distill": 0.5}, "know the model's 96 tokens, not 50"),
        ({"data": tiny.tokens(2, 65)}, "at most 64, the model's context, got 65"),
        ({"data": tiny.tokens(2, 8) + 96}, r"token ids in \[0, 96\)"),
        ({"data": ["some text"]}, "tokenizer"),
    ],
)
def test_refusals(options, message):
    options = {"data": BLOCKS, "steps": 4} | options
    if "teacher" in options:
        options["teacher"] = tiny.llama(**options["teacher"])
    with pytest.raises(ValueError, match=message):
        train(model_of(), **options)


def test_a_model_without_adapters_is_told_how_to_get_some():
    message = r"no adapters to train: compress\(\) it first.*add_adapters\(model, lora_rank=64\)"
    with pytest.raises(ValueError, match=message):
        train(tiny.llama(), BLOCKS)


def test_the_model_is_no_teacher_of_its_own():
    model = model_of()
    with pytest.raises(ValueError, match="teacher must be another model"):
        train(model, BLOCKS, distill=0.5, teacher=model)


def test_gradient_checkpointing_needs_blocks():
    model = model_of()
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    with pytest.raises(ValueError, match="gradient_checkpointing found no list of blocks"):
        train(model, BLOCKS, steps=1, gradient_checkpointing=True)
