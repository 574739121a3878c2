"""tie_embeddings(): one matrix, saved as one, and models that have no such thing."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import tiny
from helpers.zoo import NAMES, ZOO, zoo_model
from torch import nn
from transformers import AutoModelForCausalLM, GPTJConfig

from hylora_kernels import compress, load_pretrained, save_pretrained, tie_embeddings
from hylora_kernels.compression import tie
from hylora_kernels.evaluation.perplexity import perplexity
from hylora_kernels.evaluation.size import model_size

IDS = tiny.tokens(4, 12)
QUIET = {"progress": False, "test": tiny.tokens(2, 12, seed=1)}


def is_tied(model):
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.fixture
def untied():
    return tiny.llama(seed=2)


def test_one_matrix_is_left_and_counted_once(untied):
    E, H = untied.model.embed_tokens.weight, untied.lm_head.weight
    before = perplexity(untied, QUIET["test"], progress=False).ppl
    report = tie_embeddings(untied, IDS, **QUIET)
    assert is_tied(untied) and untied.config.tie_word_embeddings is True
    assert report.untied_parameters - report.tied_parameters == E.numel()
    assert report.untied_bytes - report.tied_bytes == 4 * E.numel()
    assert report.tied_parameters == model_size(untied).parameters
    assert (report.vocabulary, report.width) == E.shape and report.tokens == 22
    assert report.untied_ppl == pytest.approx(before)
    assert report.tied_ppl == pytest.approx(perplexity(untied, QUIET["test"], progress=False).ppl)
    assert report.predicted_loss > 0 and set(report.seconds) == {"perplexity", "statistics"}
    assert (
        "perplexity" in str(report) and json.loads(report.to_json())["sources"][0]["tokens"] == 48
    )
    T = untied.lm_head.weight
    assert not torch.equal(T, E) and not torch.equal(T, H)


def test_a_model_that_was_tied_in_fact_is_unchanged(untied):
    with torch.no_grad():
        untied.lm_head.weight.copy_(untied.model.embed_tokens.weight)
    before = untied.lm_head.weight.clone()
    report = tie_embeddings(untied, IDS, **QUIET)
    torch.testing.assert_close(untied.lm_head.weight, before)
    assert report.predicted_loss < 1e-6
    assert report.tied_ppl == pytest.approx(report.untied_ppl, rel=1e-3)


def test_a_small_difference_costs_what_is_predicted():
    """The divergence from the untied model, on text of its own, where the loss has no slope."""
    model = tiny.llama(seed=4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        E = model.model.embed_tokens.weight
        model.lm_head.weight.copy_(E + 0.05 * torch.randn(E.shape, generator=generator))
        torch.manual_seed(0)
        start = torch.arange(96)[:, None]
        mask = torch.ones_like(start)
        ids = model.generate(start, attention_mask=mask, do_sample=True, max_new_tokens=31, top_k=0)
        before = model(ids).logits[:, :-1].log_softmax(-1)
        report = tie_embeddings(model, ids, progress=False)
        after = model(ids).logits[:, :-1].log_softmax(-1)
    divergence = float((before.exp() * (before - after)).sum(-1).mean())
    assert 0.5 < divergence / report.predicted_loss < 2


@pytest.mark.parametrize("save", ["ours", "transformers"])
def test_saved_and_loaded_it_is_tied(untied, save, tmp_path):
    tie_embeddings(untied, IDS, **QUIET)
    if save == "ours":
        save_pretrained(untied, tmp_path)
        loaded = load_pretrained(tmp_path)
    else:
        untied.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert is_tied(loaded)
    assert torch.equal(loaded.lm_head.weight, untied.lm_head.weight)
    ids = QUIET["test"]
    assert torch.equal(loaded(ids).logits, untied(ids).logits)


def test_compressed_before_or_after(untied, tmp_path):
    compress(untied, 0.7, IDS, cache=False, lora_rank=2, rank_multiple=4, progress=False)
    flags = {name: p.requires_grad for name, p in untied.named_parameters()}
    tie_embeddings(untied, IDS, **QUIET)
    assert {name: p.requires_grad for name, p in untied.named_parameters()}.items() <= flags.items()
    untied.save_pretrained(tmp_path / "tied")
    loaded = load_pretrained(tmp_path / "tied")
    assert is_tied(loaded)
    other = tiny.llama(seed=5)
    tie_embeddings(other, IDS, **QUIET)
    compress(other, 0.7, IDS, cache=False, lora_rank=2, rank_multiple=4, progress=False)
    assert is_tied(other) and other(IDS).logits.isfinite().all()


@pytest.mark.parametrize("name", [n for n in NAMES if not ZOO[n].tied and n != "phi"])
def test_architectures(name, tmp_path):
    model = zoo_model(name)
    words = model.config.vocab_size
    tie_embeddings(model, IDS % words, progress=False)
    assert is_tied(model)
    save_pretrained(model, tmp_path)
    assert is_tied(load_pretrained(tmp_path))


def gptj():
    config = GPTJConfig(vocab_size=96, n_embd=32, n_layer=1, n_head=4, rotary_dim=4, n_positions=64)
    return tiny.causal_lm(config)


def narrow_head(model):
    model.lm_head.weight = nn.Parameter(torch.randn(95, 32))


def half_head(model):
    model.lm_head.to(torch.float16)


class Scaled(nn.Embedding):
    def forward(self, ids):
        return 2 * super().forward(ids)


def scaled_embedding(model):
    model.model.embed_tokens = Scaled(96, 32)


@pytest.mark.parametrize(
    ("make", "spoil", "message"),
    [
        (lambda: tiny.llama(tie_word_embeddings=True), None, "model must be untied, but its"),
        (gptj, None, "output head without bias, got one with a bias"),
        (tiny.llama, scaled_embedding, "rows of its matrix, but a Scaled changes them"),
    ],
)
def test_models_that_are_refused(make, spoil, message):
    model = make()
    if spoil:
        spoil(model)
    flag = model.config.tie_word_embeddings
    head = model.get_output_embeddings().weight
    with pytest.raises(ValueError, match=message):
        tie_embeddings(model, IDS, **QUIET)
    assert model.get_output_embeddings().weight is head
    assert model.config.tie_word_embeddings == flag


def test_heads_that_do_not_fit():
    for spoil, message in (
        (narrow_head, r"of one shape, got \[96, 32\] and \[95, 32\]"),
        (half_head, "in one dtype on one device, got torch.float32 on cpu and torch.float16"),
        (lambda m: setattr(m, "lm_head", nn.Identity()), "nn.Linear as output head, got a Ident"),
    ):
        model = tiny.llama()
        spoil(model)
        with pytest.raises(ValueError, match=message):
            tie._check_untied(model)


def test_a_class_that_can_not_tie(untied, monkeypatch):
    monkeypatch.setattr(type(untied), "_tied_weights_keys", None)
    with pytest.raises(ValueError, match="class that can tie its embeddings, but a LlamaFor"):
        tie_embeddings(untied, IDS, **QUIET)


@pytest.mark.parametrize("call", [1, 2])
def test_an_interruption_leaves_the_model_as_it_was(untied, call, monkeypatch):
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return perplexity(*args, **kwargs)

    monkeypatch.setattr(tie, "perplexity", interrupted)
    E, H = untied.model.embed_tokens.weight, untied.lm_head.weight
    before = [E.clone(), H.clone()]
    with pytest.raises(KeyboardInterrupt):
        tie_embeddings(untied, IDS, **QUIET)
    assert untied.model.embed_tokens.weight is E and untied.lm_head.weight is H
    assert torch.equal(E, before[0]) and torch.equal(H, before[1])
    assert untied.config.tie_word_embeddings is False


def test_the_held_out_part_of_the_text_is_measured(untied, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word {i}" for i in range(400)))
    tokenizer = tiny.tokenizer(text.read_text())
    model = tiny.llama(vocab_size=len(tokenizer))
    mix = [(str(text), 2), (IDS[:, :8].repeat(1, 2), 1)]
    report = tie_embeddings(model, mix, tokenizer, length=16, progress=False)
    assert [(part.name, part.tokens) for part in report.sources] == [
        (f"{text}, first 90%", 32),
        ("Tensor", 16),
    ]
    assert report.test == f"{text}, last 10%"


def test_ids_beyond_the_vocabulary(untied):
    with pytest.raises(ValueError, match=r"token ids in \[0, 96\)"):
        tie_embeddings(untied, IDS + 90, **QUIET)
