"""llama.cpp itself reads what export writes. It comes from npm, 85 MB, on first use."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
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


@contextmanager
def llama_cpp(folder: Path, files: dict[str, Path]):
    """llama.cpp with the models of some files; the test is skipped where it can't be had."""
    try:
        peers.command("llama.cpp")
    except peers_setup.Missing as error:
        pytest.skip(str(error))
    with (folder / "log").open("w+") as log:
        engine = peers.Engine("llama.cpp", {"threads": 1, "length": 128, "models": files}, log)
        try:
            engine.answer()
            yield engine
        finally:
            engine.close()


@pytest.mark.parametrize("space_in_front", [True, False])
def test_pieces_are_cut_as_transformers_does(space_in_front, tmp_path):
    tokenizer = tiny.piece_tokenizer((WORDS * 2 + "\n") * 9, space_in_front)
    model = tiny.llama(vocab_size=len(tokenizer), **SIZES)
    export(model, tmp_path, "gguf", tokenizer, gguf_type="F32", check=False)
    with llama_cpp(tmp_path, {"pieces": tmp_path / "model-F32.gguf"}) as engine:
        for text in ("the quick dog jumps", "a lazy  thebrown", "caf\u00e9 \u732b"):
            cut = engine.ask(do="tokenize", model="pieces", text=text)["ids"]
            assert cut == tokenizer(text).input_ids, text


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
    with llama_cpp(tmp_path, files) as engine:
        for name, tokens in expected.items():
            first = engine.ask(do="prefill", model=name, ids=ids[0].tolist())["token"]
            more = engine.ask(do="decode", model=name, count=31)["tokens"]
            assert [first, *more] == tokens, name
