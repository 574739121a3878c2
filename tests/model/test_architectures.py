"""Tiny models of many architectures through compress, save, load, evaluate and generate.

A few stand for the others; HYLORA_TEST_ALL=1 tries all of transformers'.
"""

from __future__ import annotations

import copy
import os
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers.architectures import KINDS, tiny

from hylora_kernels import compress, evaluate, load_model, load_pretrained, save_pretrained
from hylora_kernels.model.check import check_model
from hylora_kernels.model.context import vocabulary_size
from hylora_kernels.model.saving import refuse_unsavable

IDS = torch.randint(2, 100, (6, 16), generator=torch.Generator().manual_seed(1))
QUIET = {"cache": False, "progress": False}
SMALL = QUIET | {"samples": 6, "refit_samples": 6, "rank_multiple": 2, "lora_rank": 2}
# A dense one, experts, one with two kinds of layers, a state space, and two text towers of
# vision-language models: one whose config has no vocab_size, one whose base model is itself.
FEW = ("qwen3_next", "jamba", "mamba2", "gemma3", "llama4", "llava")
everything = pytest.mark.skipif(
    os.environ.get("HYLORA_TEST_ALL") != "1", reason="HYLORA_TEST_ALL=1 tries every architecture"
)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def by_greedy_search(model, ids, new):
    """`new` tokens more, each from a forward over all that there is; no end of text."""
    end = torch.tensor(model.generation_config.eos_token_id or []).flatten()
    end = end[end < vocabulary_size(model)].long()  # A tiny model has the ends of the large one.
    for _ in range(new):
        last = logits(model, ids)[:, -1:]
        last[..., end] = -torch.inf
        ids = torch.cat([ids, last.argmax(-1)], 1)
    return ids


def by_generate(model, new):
    model.generation_config.forced_eos_token_id = None  # BART's last token
    return model.generate(
        input_ids=IDS[:1],
        attention_mask=torch.ones_like(IDS[:1]),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
    )


def whole_way(kind, folder, **options):
    """Compress with a refit, save, load, evaluate, generate; each result held to its definition.

    options: other ones of compress.
    """
    dense = tiny(kind)
    same = copy.deepcopy(dense)
    compress(same, 1.0, IDS, **SMALL | {"rank_multiple": 1, "lora_rank": 0} | options)
    want = logits(dense)
    assert (logits(same) - want).norm() < 1e-3 * want.norm(), "another model at full rank"
    model, report = compress(dense, 0.8, IDS, **SMALL | options)
    assert report.layers and all("vision" not in layer.path for layer in report.layers)
    save_pretrained(model, folder)
    got = logits(model)
    assert torch.equal(logits(load_pretrained(folder)), got), "another model after loading"
    found = evaluate(model, IDS, progress=False)
    nll = F.cross_entropy(got[:, :-1].flatten(0, 1).float(), IDS[:, 1:].flatten())
    assert found.perplexity.ppl == pytest.approx(float(nll.exp()), rel=1e-4)
    # Some have no cache (OpenAI GPT), or one of another kind (HRM).
    assert found.speed is not None or found.not_measured["speed"]
    generated, wanted = by_generate(model, 3), by_greedy_search(model, IDS[:1], 3)
    assert torch.equal(generated, wanted), "other tokens with a cache"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FEW)
def test_the_whole_way_of(kind, tmp_path):
    whole_way(kind, tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_load_model_reads_a_vision_language_model(tmp_path):
    model = tiny("llava")
    model.save_pretrained(tmp_path)
    loaded, _ = load_model(tmp_path, device="cpu")
    assert type(loaded) is type(model) and torch.equal(logits(loaded), logits(model))


@everything
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in FEW])
def test_the_whole_way_of_every(kind, tmp_path):
    """Skipped: a model that the rules of helpers/architectures.py don't make tiny, or that the
    check of models refuses in words."""
    with warnings.catch_warnings(action="ignore"):
        try:
            model = tiny(kind)
            type(model.config).from_dict(model.config.to_dict())  # Its sizes must fit one another.
            check_model(model, "replace")
            refuse_unsavable(model)
            if not torch.equal(by_generate(model, 3), by_greedy_search(model, IDS[:1], 3)):
                raise ValueError("the dense model gives other tokens with a cache")
        except Exception as error:
            pytest.skip(f"{type(error).__name__}: {error}")
    # XLM keeps its feed-forward layers in a list of their own, so its blocks can't be run.
    whole_way(kind, tmp_path, **{"refit": False} if kind == "xlm" else {})
