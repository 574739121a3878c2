"""Perplexity, sizes and speed, against counting by hand."""

from __future__ import annotations

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny
from safetensors.torch import save_file
from transformers import GPT2Config, OPTConfig

from hylora_kernels.evaluation.evaluate import evaluate
from hylora_kernels.evaluation.perplexity import perplexity
from hylora_kernels.evaluation.size import model_size
from hylora_kernels.evaluation.speed import throughput
from hylora_kernels.model.adapters import merge_adapters

QUIET = {"progress": False}


def nll_by_hand(model, block) -> float:
    """The summed loss of one block, prediction by prediction, in float64."""
    logits = model(input_ids=block[None]).logits[0].double().log_softmax(-1)
    return -sum(float(logits[t, block[t + 1]]) for t in range(len(block) - 1))


# ------------------------------------------------------------------------------------ perplexity


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3, 5, 8])
def test_perplexity_counts_every_token(batch):
    model, blocks = tiny.llama(), tiny.tokens(5, 13)
    found = perplexity(model, blocks, batch, **QUIET)
    total = sum(nll_by_hand(model, block) for block in blocks)
    assert (found.tokens, found.blocks, found.length) == (5 * 12, 5, 13)
    assert found.nll == pytest.approx(total / 60, rel=1e-6)
    assert found.ppl == math.exp(found.nll)


def test_perplexity_of_a_uniform_model_is_its_number_of_words():
    model = tiny.llama(torch.bfloat16)
    model.lm_head.weight.data.zero_()
    assert perplexity(model, tiny.tokens(3, 16), **QUIET).ppl == pytest.approx(tiny.WORDS, rel=1e-6)


def test_perplexity_leaves_modes_and_gradients_alone():
    model = tiny.adapted(tiny.llama(), dropout=0.5).train()
    model.lm_head.eval()
    blocks = tiny.tokens(4, 9)
    first = perplexity(model, blocks, **QUIET)
    assert model.training and not model.lm_head.training
    assert all(p.grad is None for p in model.parameters())
    assert perplexity(model.eval(), blocks, **QUIET) == first  # no dropout acted


@pytest.mark.parametrize(("poisoned", "batch"), [(0, 4), (2, 4), (5, 4), (5, 1)])
def test_not_finite_names_the_block(poisoned, batch):
    model, blocks = tiny.llama(), tiny.tokens(6, 9)
    blocks[blocks == 95] = 0
    blocks[poisoned, 3] = 95
    model.model.embed_tokens.weight.data[95] = math.nan
    with pytest.raises(FloatingPointError, match=f"loss of block {poisoned} is nan"):
        perplexity(model, blocks, batch, **QUIET)


def test_perplexity_beyond_float64():
    model = tiny.llama()
    model.lm_head.weight.data *= 1e4
    with pytest.raises(FloatingPointError, match="beyond float64"):
        perplexity(model, tiny.tokens(2, 9), **QUIET)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([[1, 2]], "blocks must be token ids .*got list"),
        (torch.zeros(3, dtype=torch.long), r"got \[3\]"),
        (torch.zeros(0, 8, dtype=torch.long), r"got \[0, 8\]"),
        (torch.zeros(2, 1, dtype=torch.long), r"at least 2 tokens long, got \[2, 1\]"),
        (torch.zeros(2, 65, dtype=torch.long), "at most 64, the model's context, got 65"),
        (torch.full((2, 8), 96), r"ids in \[0, 96\), got 96 to 96"),
        (torch.full((2, 8), -1), r"ids in \[0, 96\), got -1 to -1"),
    ],
)
def test_perplexity_refuses_blocks(blocks, message):
    with pytest.raises(ValueError, match=message):
        perplexity(tiny.llama(), blocks, **QUIET)


def test_perplexity_refuses_a_batch_of_none():
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        perplexity(tiny.llama(), tiny.tokens(2, 8), batch=0)


# ------------------------------------------------------------------------------------------ size


def test_size_of_a_dense_model():
    model = tiny.llama(torch.bfloat16)
    size = model_size(model)
    linears = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 32 * 48 * 3)
    total = linears + 2 * 96 * 32 + 5 * 32
    assert (size.parameters, size.trainable) == (total, total)
    assert size.parameter_bytes == 2 * total and size.trainable_bytes == 2 * total
    assert size.linears.dense == size.linears.as_is == size.linears.merged == linears
    assert size.model.dense == size.model.as_is == size.model.merged == total
    assert size.linears.keep_merged == 1 and size.linears.removed_merged == 0
    assert size.resident_bytes == size.parameter_bytes + size.buffer_bytes
    assert size.file_bytes is None


def test_tied_weights_count_once():
    size, untied = model_size(tiny.llama(tie_word_embeddings=True)), model_size(tiny.llama())
    assert untied.parameters - size.parameters == 96 * 32
    assert untied.resident_bytes - size.resident_bytes == 4 * 96 * 32
    assert untied.linears == size.linears


@pytest.mark.parametrize("form", ["pair", "pivoted"])
def test_size_of_a_compressed_model(form):
    rank, lora_rank = 8, 4
    dense = model_size(tiny.llama())
    model = tiny.adapted(
        tiny.llama(), rank, lora_rank, form, names=("mlp.up_proj", "mlp.gate_proj")
    )
    model.requires_grad_(False)
    N, K, replaced = 48, 32, 4
    base = rank * (K + N - (rank if form == "pivoted" else 0))
    total = rank + lora_rank
    merged = total * (K + N - (total if form == "pivoted" else 0))
    others = dense.linears.dense - replaced * N * K  # left dense, and counted

    size = model_size(model)
    assert size.linears.dense == dense.linears.dense
    assert size.linears.as_is == others + replaced * (base + lora_rank * (K + N))
    assert size.linears.merged == others + replaced * merged
    assert size.linears.keep_merged == pytest.approx(size.linears.merged / dense.linears.dense)
    assert size.linears.removed_as_is == pytest.approx(1 - size.linears.keep_as_is)
    assert size.model.dense == dense.parameters
    assert size.model.as_is == size.parameters == sum(p.numel() for p in model.parameters())
    assert size.trainable == 0
    pivots = replaced * rank if form == "pivoted" else 0
    assert size.buffers == dense.buffers + pivots
    assert size.buffer_bytes == dense.buffer_bytes + 4 * pivots

    after = model_size(merge_adapters(model))
    assert after.linears.as_is == after.linears.merged == size.linears.merged
    assert after.model.as_is == after.model.merged == size.model.merged == after.parameters


def test_resident_bytes_are_whole_storages():
    """A slice of a larger tensor keeps all of it in memory."""
    model = tiny.llama()
    before = model_size(model)
    wide = torch.zeros(96, 64)
    model.lm_head.weight.data = wide[:, :32]
    after = model_size(model)
    assert after.resident_bytes == before.resident_bytes + 4 * 96 * 32
    assert after.parameter_bytes == before.parameter_bytes


def test_file_bytes(tmp_path):
    with pytest.raises(ValueError, match=r"path must be a folder with \.safetensors files, got"):
        model_size(tiny.llama(), tmp_path)
    for name in ("model-1.safetensors", "model-2.safetensors"):
        save_file({"weight": torch.zeros(100)}, tmp_path / name)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "training").mkdir()
    save_file({"weight": torch.zeros(100)}, tmp_path / "training" / "other.safetensors")
    files = sum(file.stat().st_size for file in tmp_path.glob("model-*"))
    assert model_size(tiny.llama(), tmp_path).file_bytes == files > 800


# ----------------------------------------------------------------------------------------- speed


CONFIGS = {
    "llama": None,
    "gpt2": GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "opt": OPTConfig(
        vocab_size=96, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_throughput_times_what_it_says(name, device, monkeypatch):
    """With a clock that counts forwards: 3 prefills of one tick each, then single tokens of one."""
    model = tiny.llama() if name == "llama" else tiny.causal_lm(CONFIGS[name])
    model, forwards = model.to(device), []

    def watch(_module, args, kwargs):
        forwards.append(kwargs["input_ids"].shape[1])

    model.register_forward_pre_hook(watch, with_kwargs=True)
    clock = SimpleNamespace(perf_counter=lambda: float(sum(forwards)))
    monkeypatch.setattr(sys.modules["hylora_kernels.evaluation.speed"], "time", clock)
    found = throughput(model, prompt_tokens=20, new_tokens=7)
    assert forwards == [20] * 5 + [1] * 8  # a warm-up of each, and the prompt that is gone on from
    assert (found.prefill_tok_s, found.decode_tok_s) == (1.0, 1.0)
    assert (found.prompt_tokens, found.new_tokens) == (20, 7)
    assert found.device.startswith(device) and found.dtype == "float32"


@torch.no_grad()
def test_throughput_decodes_as_without_a_cache(monkeypatch):
    """The tokens fed one by one are those that the whole sequence would give."""
    model, fed = tiny.llama(), []
    hook = model.register_forward_pre_hook(
        lambda m, args, kwargs: fed.append(kwargs["input_ids"]), with_kwargs=True
    )
    throughput(model, prompt_tokens=10, new_tokens=5)
    hook.remove()
    sequence = torch.cat(fed[4:], 1)
    want = model(input_ids=sequence).logits.argmax(-1)[:, 9:-1]
    assert torch.equal(sequence[:, 10:], want)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"prompt_tokens": 0}, "prompt_tokens must be at least 1, got 0"),
        ({"new_tokens": 0}, "new_tokens must be at least 1, got 0"),
        ({"prompt_tokens": 60, "new_tokens": 10}, "at most 64, the model's context, got 71"),
    ],
)
def test_throughput_refuses(sizes, message):
    with pytest.raises(ValueError, match=message):
        throughput(tiny.llama(), **sizes)


# ------------------------------------------------------------------------------------ all at once


def test_evaluate(tmp_path):
    model, blocks = tiny.adapted(tiny.llama()), tiny.tokens(6, 16)
    save_file({"weight": torch.zeros(100)}, tmp_path / "model.safetensors")
    report = evaluate(model, blocks, limit=4, path=tmp_path, **QUIET)
    assert report.perplexity == perplexity(model, blocks[:4], **QUIET)
    assert report.size == model_size(model, tmp_path)
    assert report.speed.prefill_tok_s > 0 and report.speed.decode_tok_s > 0
    assert report.speed.prompt_tokens == 31  # what a context of 64 leaves
    found = json.loads(report.to_json())
    assert found["perplexity"]["tokens"] == 4 * 15 and found["data"] == "Tensor"
    assert found["size"]["linears"]["keep_merged"] == report.size.linears.keep_merged

    from rich.console import Console

    console = Console(width=120, record=True, file=(tmp_path / "out").open("w"))
    console.print(report.render())
    text = console.export_text()
    assert f"keep {report.size.linears.keep_merged:.3f} (removed" in text
    assert "60 in 4 blocks of 16" in text and "adapters separate" in text
    assert evaluate(model, blocks, speed=False, **QUIET).speed is None


def test_evaluate_text():
    text = "a rose is a rose is a rose and so is a nose. " * 40
    tokenizer = tiny.tokenizer(text)
    model = tiny.llama(vocab_size=len(tokenizer))
    report = evaluate(model, [text, text], tokenizer, length=32, speed=False, **QUIET)
    ids = tokenizer(text + "\n\n" + text)["input_ids"]
    assert report.perplexity.blocks == len(ids) // 32
    assert report.data == "list" and report.size.file_bytes is None


@torch.no_grad()
def test_perplexity_is_the_cross_entropy_of_transformers():
    """The same figure as the model's own loss, block by block."""
    model, blocks = tiny.llama(), tiny.tokens(4, 32)
    own = [float(model(input_ids=b[None], labels=b[None]).loss) for b in blocks]
    assert perplexity(model, blocks, **QUIET).nll == pytest.approx(sum(own) / 4, rel=1e-6)
    logits = model(input_ids=blocks).logits[:, :-1].flatten(0, 1)
    whole = F.cross_entropy(logits, blocks[:, 1:].flatten())
    assert perplexity(model, blocks, **QUIET).nll == pytest.approx(float(whole), rel=1e-6)
