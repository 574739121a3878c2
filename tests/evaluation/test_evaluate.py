"""The report of perplexity, size and speed together."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from helpers import tiny
from safetensors.torch import save_file
from transformers import FalconMambaConfig, Mamba2Config, MambaConfig, RwkvConfig
from transformers.modeling_outputs import CausalLMOutput

from hylora_kernels.evaluation.evaluate import evaluate
from hylora_kernels.evaluation.perplexity import perplexity
from hylora_kernels.evaluation.size import model_size

QUIET = {"progress": False}
MAMBA = {"vocab_size": tiny.WORDS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
STATES = [
    MambaConfig(**MAMBA, time_step_rank=4),
    FalconMambaConfig(**MAMBA, time_step_rank=4),
    Mamba2Config(**MAMBA, num_heads=8, head_dim=8, n_groups=1, chunk_size=8),
    RwkvConfig(
        vocab_size=tiny.WORDS, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32,
        intermediate_size=48, context_length=64,
    ),
]  # fmt: skip


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


@pytest.mark.parametrize("config", STATES, ids=lambda config: config.model_type)
def test_models_with_a_state_of_another_kind(config):
    """Mamba hands on cache_params, RWKV state, no past_key_values."""
    report = evaluate(tiny.causal_lm(config), tiny.tokens(2, 16), **QUIET)
    assert not report.not_measured
    assert report.perplexity.tokens == 30 and report.speed.decode_tok_s > 0


def test_what_was_measured_is_kept(monkeypatch, tmp_path):
    """A model whose forward fails with a cache, and one that returns none."""
    model, blocks = tiny.llama(), tiny.tokens(2, 16)
    want, forward = perplexity(model, blocks, **QUIET), model.forward

    def no_cache(use_cache, **arguments):
        if use_cache:
            raise AttributeError("no cache here")
        return forward(use_cache=False, **arguments)

    def no_state(use_cache, **arguments):
        return CausalLMOutput(logits=forward(use_cache=False, **arguments).logits)

    for broken, why in ((no_cache, "no cache here"), (no_state, "must keep a state between token")):
        monkeypatch.setattr(model, "forward", broken)
        report = evaluate(model, blocks, **QUIET)
        assert report.perplexity == want and report.speed is None
        assert why in report.not_measured["speed"]
        assert why in json.loads(report.to_json())["not_measured"]["speed"]
        rows = zip(*(column.cells for column in report.render().columns), strict=True)
        assert any(str(name) == "speed" and why in str(value) for name, value in rows)


def test_a_wrong_path_is_refused_before_the_long_work(monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules["hylora_kernels.evaluation.evaluate"], "perplexity", None)
    with pytest.raises(ValueError, match="path must be a folder"):
        evaluate(tiny.llama(), tiny.tokens(2, 16), path=tmp_path, **QUIET)


def test_evaluate_text():
    text = "a rose is a rose is a rose and so is a nose. " * 40
    tokenizer = tiny.tokenizer(text)
    model = tiny.llama(vocab_size=len(tokenizer))
    report = evaluate(model, [text, text], tokenizer, length=32, speed=False, **QUIET)
    ids = tokenizer(text + "\n\n" + text)["input_ids"]
    assert report.perplexity.blocks == len(ids) // 32
    assert report.data == "list" and report.size.file_bytes is None


def test_a_files_last_tenth_is_measured_or_another_file_whole(tmp_path):
    text = "a rose is a rose is a rose and so is a nose. " * 40
    tokenizer = tiny.tokenizer(text)
    model = tiny.llama(vocab_size=len(tokenizer))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text(text)
    count = len(tokenizer(text)["input_ids"])

    def measured(**options):
        report = evaluate(
            model, tmp_path / "a.txt", tokenizer, length=8, speed=False, **options, **QUIET
        )
        return report.perplexity.blocks, report.data.removeprefix(f"{tmp_path}/")

    assert measured() == (pytest.approx(count / 80, abs=1), "a.txt, last 10%")
    assert measured(split="train") == (pytest.approx(0.9 * count / 8, abs=1), "a.txt, first 90%")
    assert measured(split="all") == (count // 8, "a.txt, whole")
    assert measured(test=tmp_path / "b.txt") == (count // 8, "b.txt, whole")
    with pytest.raises(ValueError, match="split must be 'train', 'test', 'all'"):
        measured(split="validation")


def test_the_default_length_fits_the_models_context_and_the_text(tmp_path):
    text = "a rose is a rose is a rose and so is a nose. " * 40
    tokenizer = tiny.tokenizer(text)
    model = tiny.llama(vocab_size=len(tokenizer))
    assert evaluate(model, [text], tokenizer, speed=False, **QUIET).perplexity.length == 64
    short = evaluate(model, ["a rose is a rose"], tokenizer, speed=False, **QUIET)
    assert short.perplexity.length == len(tokenizer("a rose is a rose")["input_ids"])
    with pytest.raises(ValueError, match="length must be at most 64, the model's context, got 65"):
        evaluate(model, [text], tokenizer, length=65, speed=False, **QUIET)


def test_blocks_are_checked_before_they_are_measured():
    with pytest.raises(ValueError, match=r"token ids in \[0, 96\)"):
        evaluate(tiny.llama(), tiny.tokens(2, 8) + 90, **QUIET)
