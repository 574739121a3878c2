"""Decoder: its tokens against transformers', its logits against float64, padding, growth, use."""

from __future__ import annotations

import copy
import logging
import time

import pytest
import torch
from helpers import architectures, tiny, zoo
from helpers.optimising import packs
from torch.utils._python_dispatch import TorchDispatchMode

from hylora_kernels import (
    Decoder,
    generate,
    optimize_for_inference,
    restore_from_inference,
)
from hylora_kernels.backends.cpu import decoder as cpu_decoder
from hylora_kernels.inference import modules, native

LONG = {"max_position_embeddings": 320}
WHOLE = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "phi", "gpt_neox")
FIVE = ("llama", "qwen3", "gemma3", "phi", "gpt_neox")


def model_of(name, dtype=torch.float32, **changes):
    config = copy.deepcopy(zoo.ZOO[name].config)
    config.update(LONG | changes)
    return zoo.random_model(config, dtype)


def compressed(model, form, lora_rank=4):
    names = {path.rpartition(".")[2] for path, m in model.named_modules() if _is_inner(path, m)}
    return tiny.adapted(model, rank=12, lora_rank=lora_rank, form=form, names=tuple(names)).eval()


def _is_inner(path, module):
    return isinstance(module, torch.nn.Linear) and "layers." in path


def by_transformers(model, ids, count, mask=None):
    mask = torch.ones_like(ids) if mask is None else mask
    tokens = model.generate(
        *(ids,), attention_mask=mask, max_new_tokens=count, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    return tokens[:, ids.shape[1] :]


def stream(decoder, *args, **kwargs):
    return torch.stack(list(decoder.stream(*args, **kwargs)), 1)


# -------------------------------------------------------------------------------- the same numbers


@packs
@pytest.mark.parametrize("form", ["dense", "pair", "pivoted"])
@pytest.mark.parametrize("name", FIVE)
def test_greedy_tokens_are_those_of_transformers(name, form):
    """256 of them, in float32; the cache grows once."""
    model = model_of(name)
    if form != "dense":
        compressed(model, form)
    ids = zoo.tokens(1, 6)
    want = by_transformers(model, ids, 256)
    optimize_for_inference(model)
    decoder = Decoder(model)
    assert decoder.runtime == "cpu", decoder.reason
    assert torch.equal(stream(decoder, ids, max_new_tokens=256), want)
    assert decoder.tokens == 6 + 255


@packs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", WHOLE)
def test_logits_are_as_exact_as_eagers(name, dtype):
    model = model_of(name, dtype)
    ids = zoo.tokens(2, 30)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(input_ids=ids).logits[:, 10:]
        eager = steps(modules.Modules(model), ids)
    optimize_for_inference(model)
    decoder = Decoder(model, batch=2)
    assert decoder.runtime == "cpu", decoder.reason
    ours = [decoder.prefill(ids[:, :11]), *(decoder.step(t) for t in ids[:, 11:].unbind(1))]
    error, own = ((y.double() - exact).norm() for y in (torch.stack(ours, 1), eager))
    assert error <= 2 * own


def steps(runtime, ids):
    """Logits [n, tokens, words] from the eleventh token on."""
    logits = [runtime.prefill(ids[:, :11], torch.ones_like(ids[:, :11]))]
    logits += [runtime.step(tokens) for tokens in ids[:, 11:].unbind(1)]
    return torch.stack(logits, 1)


@pytest.mark.parametrize("optimized", [pytest.param(True, marks=packs), False])
@pytest.mark.parametrize("name", [*WHOLE, "gpt2", "opt"])
def test_sequences_padded_on_the_left(name, optimized):
    model = zoo.zoo_model(name)
    ids, mask = zoo.tokens(3, 7), torch.ones(3, 7, dtype=torch.int64)
    mask[0, :6] = mask[1, :2] = 0
    want = by_transformers(model, ids, 30, mask)
    if optimized:
        optimize_for_inference(model)
    decoder = Decoder(model, batch=4)
    assert decoder.runtime == ("cpu" if optimized and name in WHOLE else "transformers")
    assert bool(decoder.reason) == (decoder.runtime == "transformers")
    assert torch.equal(stream(decoder, ids, mask, 30), want)
    alone = ids[1:2, 2:]
    assert torch.equal(stream(decoder, alone, max_new_tokens=30), want[1:2])


@packs
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_no_token(threads):
    model = optimize_for_inference(model_of("llama", hidden_size=64, intermediate_size=160))
    ids = zoo.tokens(5, 9)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = stream(Decoder(model, 5), ids, max_new_tokens=40)
        torch.set_num_threads(threads)
        assert torch.equal(stream(Decoder(model, 5), ids, max_new_tokens=40), want)
    finally:
        torch.set_num_threads(before)


@packs
def test_inference_mode_around_some_calls_only():
    model = optimize_for_inference(zoo.zoo_model("llama"))
    ids = zoo.tokens(1, 5)
    decoder = Decoder(model)
    want = stream(decoder, ids, max_new_tokens=9)
    with torch.inference_mode():
        decoder = Decoder(model)
        assert torch.equal(stream(decoder, ids, max_new_tokens=9), want)
    assert torch.equal(stream(decoder, ids, max_new_tokens=9), want)


@packs
def test_the_time_of_steps_by_kind_of_work():
    decoder = Decoder(optimize_for_inference(model_of("llama")))
    before = cpu_decoder.seconds_by_work()
    start = time.perf_counter()
    stream(decoder, torch.randint(90, (1, 5)), max_new_tokens=9)
    seconds, after = time.perf_counter() - start, cpu_decoder.seconds_by_work()
    spent = {work: after[work] - before[work] for work in after}
    assert list(spent) == ["linears", "attention", "norms", "others"]
    assert all(value > 0 for value in spent.values()) and sum(spent.values()) < seconds


@packs
@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "granite"])
def test_a_greedy_step_is_one_op(kind):
    """Any other takes 50 us and more: the step's weights have driven its code out of the caches."""
    model = architectures.tiny("granite") if kind == "granite" else model_of(kind)
    if kind == "granite":
        model.model.embedding_multiplier = 6.5
    ids, seen = torch.randint(2, 90, (1, 5)), []
    want = by_transformers(model, ids, 4)

    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    stream = Decoder(optimize_for_inference(model)).stream(ids, None, 4)
    found = [next(stream)]
    with Ops():
        found += stream
    assert seen == ["hylora.cpu_decode.default"] * 3
    assert torch.equal(torch.stack(found, 1), want)


@packs
def test_tokens_of_any_integer_type():
    decoder = Decoder(optimize_for_inference(zoo.zoo_model("llama")), 2)
    decoder.prefill(IDS)
    tokens = decoder.likeliest
    want = decoder.step(tokens)
    decoder.prefill(IDS)
    assert torch.equal(decoder.step(tokens.int()), want)


@packs
def test_several_decoders_of_one_model():
    model = optimize_for_inference(zoo.zoo_model("llama"))
    ids = zoo.tokens(2, 5)
    one, two = Decoder(model), Decoder(model)
    want = [stream(Decoder(model), row[None], max_new_tokens=9) for row in ids]
    together = zip(one.stream(ids[:1], None, 9), two.stream(ids[1:], None, 9), strict=True)
    found = [torch.stack(tokens, 1) for tokens in zip(*together, strict=True)]
    assert all(map(torch.equal, found, want))


@packs
def test_copies_of_a_decoder_and_of_its_model():
    model = optimize_for_inference(zoo.zoo_model("llama"))
    ids = zoo.tokens(1, 5)
    decoder = Decoder(model)
    want = stream(decoder, ids, max_new_tokens=9)
    for copied in (copy.deepcopy(decoder), copy.copy(decoder), Decoder(copy.deepcopy(model))):
        assert copied.runtime == "cpu" and copied.tokens == 0
        assert torch.equal(stream(copied, ids, max_new_tokens=9), want)
    assert decoder.tokens == 5 + 8


# ------------------------------------------------------------------------------ how it is used


@pytest.mark.parametrize("optimized", [pytest.param(True, marks=packs), False])
def test_growth_reset_and_the_end_of_the_context(optimized, monkeypatch):
    monkeypatch.setattr(native, "FIRST_BUCKET", 8)
    monkeypatch.setattr(modules, "FIRST_BUCKET", 8)
    model = zoo.zoo_model("qwen2")
    ids = zoo.tokens(1, 1)
    want = by_transformers(model, ids, 63)
    if optimized:
        optimize_for_inference(model)
    decoder = Decoder(model)
    for _ in range(2):
        assert torch.equal(stream(decoder, ids, max_new_tokens=63), want)
    assert decoder.tokens == 63
    decoder.step(want[:, -1])
    with pytest.raises(ValueError, match=r"a step leads to 65 tokens, but length, .* is 64"):
        decoder.step(want[:, -1])
    decoder.reset()
    assert decoder.tokens == 0
    with pytest.raises(RuntimeError, match=r"prefill\(ids\) must come before a step"):
        decoder.step(want[:, -1])
    with pytest.raises(RuntimeError, match=r"prefill\(ids\) must come before a step"):
        decoder.likeliest  # noqa: B018
    assert torch.equal(decoder.prefill(ids).argmax(-1), want[:, 0])


@pytest.mark.parametrize("optimized", [pytest.param(True, marks=packs), False])
def test_a_sequence_that_has_ended_repeats_its_end(optimized):
    model = zoo.zoo_model("llama")
    if optimized:
        optimize_for_inference(model)
    ids = zoo.tokens(2, 6)
    free = stream(Decoder(model, 2), ids, max_new_tokens=20)
    end = int(free[0, 3])
    first = [int((row == end).nonzero()[0]) if end in row else 19 for row in free]
    found = stream(Decoder(model, 2), ids, max_new_tokens=20, ends=[end])
    for row, whole, at in zip(found, free, first, strict=True):
        assert torch.equal(row[: at + 1], whole[: at + 1]) and (row[at:] == row[at]).all()
    alone = stream(Decoder(model), ids[:1], max_new_tokens=20, ends=[end])
    assert alone.shape[1] == first[0] + 1


IDS = zoo.tokens(2, 6)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda d: Decoder(d.model, 0), "batch must be an int from 1 to 64, got 0"),
        (lambda d: Decoder(d.model, 65), "batch must be an int from 1 to 64, got 65"),
        (lambda d: Decoder(d.model, compiled="yes"), "compiled must be True or False, got 'yes'"),
        (lambda d: Decoder(d.model, length=0), "length must be a positive int or None, got 0"),
        (lambda d: Decoder(d.model, length=65), "length must be at most 64, the model's context"),
        (lambda d: d.prefill(IDS[0]), r"ids must be token ids \[n >= 1, L >= 1\], got \[6\]"),
        (lambda d: d.prefill(zoo.tokens(3, 6)), "ids must have 1 to 2 rows, the batch, got 3"),
        (lambda d: d.prefill(IDS + 128), r"ids must hold token ids in \[0, 128\), got"),
        (lambda d: d.prefill(zoo.tokens(1, 70)), "ids have 70 tokens, but length, .* is 64"),
        (lambda d: d.prefill(IDS, IDS[:1]), r"attention_mask must be \[2, 6\] as ids, got \[1, 6"),
        (
            lambda d: d.prefill(IDS, torch.tensor([[1] * 6, [1] * 5 + [0]])),
            "attention_mask must be zeros on the left and then ones in each row: pad on the left",
        ),
        (lambda d: list(d.stream(IDS, max_new_tokens=0)), "max_new_tokens must be at least 1"),
        (lambda d: list(d.stream(IDS, max_new_tokens=59)), "ids and max_new_tokens are 65 tokens"),
    ],
)
def test_refusals(use, message):
    with pytest.raises(ValueError, match=message):
        use(Decoder(zoo.zoo_model("llama"), 2))


def test_tokens_of_another_number_are_refused():
    decoder = Decoder(zoo.zoo_model("llama"), 2)
    decoder.prefill(IDS)
    with pytest.raises(ValueError, match=r"tokens must be \[2\], one a sequence, got \[1\]"):
        decoder.step(IDS[0, :1])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 2], r"tokens must be \[2\], one a sequence, got list"),
        (torch.tensor([1.0, 2.0]), "tokens must be token ids, int64, got torch.float32"),
        (torch.tensor([1, 10**6]), "tokens must hold token ids in"),
        (torch.tensor([-1, 1]), "tokens must hold token ids in"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_tokens_that_are_none_are_refused_and_nothing_is_lost(tokens, message, packed):
    model = zoo.zoo_model("llama")
    decoder = Decoder(optimize_for_inference(model) if packed else model, 2)
    decoder.prefill(IDS)
    with pytest.raises(ValueError, match=message):
        decoder.step(tokens)
    good, fresh = decoder.likeliest, Decoder(model, 2)
    fresh.prefill(IDS)
    torch.testing.assert_close(decoder.step(good), fresh.step(good))


@pytest.mark.parametrize(("temperature", "top_p"), [(-1.0, 1.0), (float("nan"), 1.0), (1.0, 0.0)])
def test_sampling_out_of_its_range_is_refused(temperature, top_p):
    with pytest.raises(ValueError, match=r"(temperature|top_p) must be"):
        next(Decoder(zoo.zoo_model("llama"), 2).stream(IDS, None, 2, temperature, top_p))


@pytest.mark.parametrize("kind", ["mamba", "rwkv", "jamba", "bloom", "gpt_oss", "qwen3_moe"])
def test_any_model_decodes_by_its_own_modules(kind):
    model = architectures.tiny(kind)
    ids = torch.randint(2, architectures.WORDS, (1, 5))
    if kind != "rwkv":  # its first forward in eval() writes to its weights
        optimize_for_inference(model)
    decoder = Decoder(model)
    assert decoder.runtime == "transformers" and decoder.reason
    with torch.no_grad():
        for tokens in decoder.stream(ids, None, 6):
            assert int(tokens) == int(model(input_ids=ids, use_cache=False).logits[0, -1].argmax())
            ids = torch.cat((ids, tokens[:, None]), 1)


# ------------------------------------------------------------------------- a model that changes


@packs
def test_a_restored_model_goes_on_by_its_modules():
    model = zoo.zoo_model("qwen2")
    ids = zoo.tokens(2, 5)
    want = by_transformers(model, ids, 20)
    decoder = Decoder(optimize_for_inference(model), 2)
    found = []
    for count, tokens in enumerate(decoder.stream(ids, None, 20)):
        found.append(tokens)
        if count == 7:
            restore_from_inference(model)
    assert torch.equal(torch.stack(found, 1), want)
    assert decoder.runtime == "transformers" and "has changed" in decoder.reason
    optimize_for_inference(model)
    assert torch.equal(stream(decoder, ids, max_new_tokens=20), want)
    assert decoder.runtime == "cpu" and decoder.reason == ""


@packs
@pytest.mark.parametrize("change", ["norm", "bias", "new bias"])
def test_changed_parameters_count_at_once(change):
    model = optimize_for_inference(zoo.zoo_model("qwen2"))
    ids = zoo.tokens(1, 5)
    decoder = Decoder(model)
    before = decoder.prefill(ids)
    block = model.model.layers[1]
    with torch.no_grad():
        if change == "norm":
            block.post_attention_layernorm.weight.mul_(3)
        elif change == "bias":
            block.self_attn.q_proj.bias.add_(3)
        else:
            bias = block.self_attn.q_proj.bias
            block.self_attn.q_proj.bias = torch.nn.Parameter(bias + 3, requires_grad=False)
    want = modules.Modules(model)
    with torch.no_grad():
        assert not torch.equal(want.prefill(ids, torch.ones_like(ids)), before)
        token = decoder.prefill(ids).argmax(-1)
        torch.testing.assert_close(decoder.step(token), want.step(token), rtol=1e-4, atol=1e-4)
    assert decoder.runtime == "cpu"


@packs
def test_a_model_with_hooks_runs_as_its_modules(caplog):
    model = optimize_for_inference(zoo.zoo_model("llama"))
    seen = []
    model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    with caplog.at_level(logging.INFO):
        decoder = Decoder(model)
    assert decoder.reason == "model.layers.0 has forward hooks"
    assert f"Decoder: by the model's own modules: {decoder.reason}" in caplog.text
    stream(decoder, zoo.tokens(1, 3), max_new_tokens=5)
    assert len(seen) == 5


def test_a_plain_model_says_why(caplog):
    assert Decoder(zoo.zoo_model("llama")).reason == (
        "none of its layers is packed: optimize_for_inference(model) first"
    )


# ---------------------------------------------------------------------------------------- generate


@packs
@pytest.mark.parametrize("options", [{}, {"temperature": 1.5}, {"temperature": 1, "top_p": 0.8}])
def test_generate_says_the_same(options, monkeypatch):
    tokenizer = tiny.tokenizer("the quick brown fox jumps over the lazy dog. " * 3)
    model = tiny.llama(vocab_size=len(tokenizer), seed=3)
    want = generate(model, tokenizer, "the fox", 30, seed=5, **options)
    optimize_for_inference(model)
    monkeypatch.setattr(model, "generate", None)
    pieces = []
    found = generate(model, tokenizer, "the fox", 30, seed=5, stream=pieces.append, **options)
    assert found == want == "".join(pieces)
