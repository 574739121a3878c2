"""The report of perplexity, size and speed together."""

from __future__ import annotations

import json

import torch
from helpers import tiny
from safetensors.torch import save_file

from hylora_kernels.evaluation.evaluate import evaluate
from hylora_kernels.evaluation.perplexity import perplexity
from hylora_kernels.evaluation.size import model_size

QUIET = {"progress": False}


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
