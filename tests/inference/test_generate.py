"""Generated text against a loop by hand; streaming, sampling, chat, and what is refused."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny

from hylora_kernels.inference.generate import _Pieces, end_tokens, generate

TEXT = "the quick brown fox jumps over the lazy dog and naïve 🦊 café owners say “hello”. " * 3
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer(TEXT, TEMPLATE)


@pytest.fixture(scope="module")
def model(tokenizer):
    # A seed whose greedy text holds whole words, lone bytes and no end of text.
    return tiny.llama(vocab_size=len(tokenizer), seed=3)


@torch.no_grad()
def greedy_by_hand(model, ids, count):
    for _ in range(count):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    return ids


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_greedy_is_the_likeliest_token_each_time(model, tokenizer):
    prompt = "the quick brown"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    want = greedy_by_hand(model, ids, 20)[0, ids.shape[1] :]
    assert generate(model, tokenizer, prompt, 20) == decoded(tokenizer, want)


def test_an_adapted_model_generates(model, tokenizer):
    small = tiny.adapted(
        tiny.llama(vocab_size=len(tokenizer), seed=3), rank=16, dropout=0.5
    ).train()
    first = generate(small, tokenizer, "the lazy dog", 10)
    assert small.training and first == generate(small.eval(), tokenizer, "the lazy dog", 10)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_pieces_add_up_to_the_text(model, tokenizer, temperature):
    for seed in range(2):
        pieces = []
        text = generate(
            model, tokenizer, "fox", 40, temperature=temperature, seed=seed, stream=pieces.append
        )
        assert text == "".join(pieces) and len(pieces) > 5
        assert text == generate(model, tokenizer, "fox", 40, temperature=temperature, seed=seed)


@pytest.mark.parametrize("text", ["🦊", "naïve café 🦊🦊 x", "日本語 words", "a\nb\n\n c", " lead"])
def test_pieces_of_characters_that_take_several_tokens(tokenizer, text):
    """Nothing is sent that a later token changes: every piece is a prefix of what is left."""
    sent = []
    pieces = _Pieces(tokenizer, sent.append)
    ids = tokenizer(text)["input_ids"]
    pieces.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token in ids:
        pieces.put(torch.tensor([token]))
        assert text.startswith("".join(sent))
    pieces.end()
    assert "".join(sent) == "".join(pieces.texts) == text


def test_pieces_that_end_within_a_character(tokenizer):
    pieces = _Pieces(tokenizer, None)
    ids = tokenizer("ok 日", add_special_tokens=False)["input_ids"]
    pieces.put(torch.tensor([[0]]))
    for token in ids[:-1]:
        pieces.put(torch.tensor([token]))
    pieces.end()
    assert "".join(pieces.texts) == decoded(tokenizer, ids[:-1])


def test_pieces_keep_the_space_before_a_word():
    """Tokenizers in SentencePiece's manner drop a leading space when a word is decoded alone."""

    class Words:
        def decode(self, ids, **_):
            return " ".join("abc"[i] for i in ids)

    pieces = _Pieces(Words(), None)
    pieces.put(torch.tensor([[0]]))
    for token in (0, 1, 2, 0):
        pieces.put(torch.tensor([token]))
    pieces.end()
    assert pieces.texts == ["a", " b", " c", " a"]


def test_sampling_follows_the_seed_and_leaves_the_random_state(model, tokenizer):
    options = {"max_new_tokens": 20, "temperature": 1.0}
    state = torch.get_rng_state()
    texts = [generate(model, tokenizer, "fox", seed=seed, **options) for seed in (1, 2, 1)]
    assert texts[0] == texts[2] != texts[1]
    assert torch.equal(torch.get_rng_state(), state)


def test_sampling_at_the_limits_is_greedy(model, tokenizer):
    greedy = generate(model, tokenizer, "fox", 20)
    assert generate(model, tokenizer, "fox", 20, temperature=1e-4) == greedy
    assert generate(model, tokenizer, "fox", 20, temperature=1.0, top_p=1e-6) == greedy


def test_top_p_and_temperature_shape_the_draw(tokenizer):
    """Draws from a known distribution over three letters: top_p = 0.6 leaves the first two."""
    odds = torch.zeros(len(tokenizer))
    odds[5:8] = torch.tensor([0.5, 0.3, 0.2])
    model = _with_logits(tiny.llama(vocab_size=len(tokenizer), num_hidden_layers=1), odds.log())
    first, second, third = decoded(tokenizer, [5, 6, 7])

    def draws(**options):
        text = "".join(generate(model, tokenizer, "fox", 60, seed=s, **options) for s in range(5))
        return {letter: text.count(letter) / len(text) for letter in set(text)}

    free = draws(temperature=1.0)
    assert set(free) == {first, second, third} and free[first] == pytest.approx(0.5, abs=0.1)
    cut = draws(temperature=1.0, top_p=0.6)
    assert set(cut) == {first, second} and cut[first] == pytest.approx(5 / 8, abs=0.1)
    assert draws(temperature=0.5)[first] == pytest.approx(0.25 / 0.38, abs=0.1)


def _with_logits(model, logits):
    def same_everywhere(_module, _args, output):
        return logits.expand_as(output)

    model.lm_head.register_forward_hook(same_everywhere)
    return model


def test_settings_of_the_model_itself_do_not_count(model, tokenizer):
    plain = [generate(model, tokenizer, "fox", 20, temperature=t, seed=4) for t in (0.0, 1.0)]
    changed = tiny.llama(vocab_size=len(tokenizer), seed=3)
    changed.generation_config.update(
        do_sample=True, temperature=9.0, top_k=1, top_p=0.1, repetition_penalty=9.0, num_beams=3
    )
    assert plain == [
        generate(changed, tokenizer, "fox", 20, temperature=t, seed=4) for t in (0.0, 1.0)
    ]


def test_end_of_text_ends_it(tokenizer):
    end = tokenizer.eos_token_id
    model = _with_logits(
        tiny.llama(vocab_size=len(tokenizer), eos_token_id=end),
        torch.nn.functional.one_hot(torch.tensor(end), len(tokenizer)).float(),
    )
    pieces = []
    assert generate(model, tokenizer, "fox", 20, stream=pieces.append) == ""
    assert pieces == []


def test_chat_puts_the_prompt_into_the_template(model, tokenizer):
    seen = []
    hook = model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    generate(model, tokenizer, "hello", 2, chat=True)
    generate(model, tokenizer, "hello", 2)
    hook.remove()
    assert decoded(tokenizer, seen[0][0]) == "[user] hello\n[assistant] "
    assert decoded(tokenizer, seen[2][0]) == "hello"


def test_chat_without_a_template():
    plain = tiny.tokenizer(TEXT)
    with pytest.raises(ValueError, match="chat needs a tokenizer with a chat template"):
        generate(tiny.llama(vocab_size=len(plain)), plain, "hello", chat=True)


def test_nothing_is_warned_about(model, tokenizer, caplog, recwarn):
    with caplog.at_level("WARNING", "transformers"):
        generate(model, tokenizer, "fox", 3)
        generate(model, tokenizer, "fox", 3, temperature=1.0)
    assert caplog.text == "" and not recwarn.list


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ""}, "prompt must be a text that is not empty, got ''"),
        ({"prompt": " \n"}, "prompt must be a text that is not empty"),
        ({"prompt": ["a"]}, "prompt must be a text that is not empty"),
        ({"prompt": "fox " * 70}, r"prompt has \d+ tokens.*max_new_tokens=64.*context of 64"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 64}, r"prompt has \d tokens.*beyond the model's context of 64"),
        ({"temperature": -1.0}, r"temperature must be 0 \(greedy\) or positive and finite"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\], got 1.1"),
        ({"tokenizer": None}, "tokenizer must be given to generate text"),
        (
            {"max_new_tokens": 4, "seed": 2**70},
            "seed must be an int of 64 bits, got 1180591620717411303424",
        ),
    ],
)
def test_refusals(model, tokenizer, options, message):
    arguments = {"tokenizer": tokenizer, "prompt": "fox"} | options
    with pytest.raises(ValueError, match=message):
        generate(model, **arguments)


# ------------------------------------------------------------------------------ the end of a text


def first_greedy(model, tokenizer, prompt, count):
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    return greedy_by_hand(model, ids, count)[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("own", [None, 7, [7, 8]])
def test_the_tokenizers_end_of_text_ends_it(model, own):
    """Also where the model's generation config lacks that token, or has others."""
    tokenizer = tiny.tokenizer(TEXT)
    third = first_greedy(model, tokenizer, "the quick brown", 3)[2]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(third)
    settings = model.generation_config
    before, settings.eos_token_id = settings.eos_token_id, own
    try:
        tokens = []
        generate(model, tokenizer, "the quick brown", 20, stream=tokens.append)
        want = decoded(tokenizer, first_greedy(model, tokenizer, "the quick brown", 3))
        assert "".join(tokens) == want
        assert end_tokens(model, tokenizer) == [
            *([own] if isinstance(own, int) else own or [model.config.eos_token_id]), third
        ]  # fmt: skip
        assert settings.eos_token_id == own
    finally:
        settings.eos_token_id = before


def test_the_models_own_end_of_text_still_ends_it(model):
    tokenizer = tiny.tokenizer(TEXT)
    tokens = first_greedy(model, tokenizer, "the quick brown", 3)
    settings = model.generation_config
    before, settings.eos_token_id = settings.eos_token_id, tokens[1]
    try:
        want = decoded(tokenizer, tokens[:2])
        assert generate(model, tokenizer, "the quick brown", 20) == want
    finally:
        settings.eos_token_id = before


def test_a_prompt_beyond_the_vocabulary_is_refused(tokenizer):
    small = tiny.llama(vocab_size=20)
    with pytest.raises(
        ValueError, match=r"prompt must hold token ids in \[0, 20\), got .*another m"
    ):
        generate(small, tokenizer, "the quick brown")


def test_a_template_that_refuses_the_prompt_is_named(model):
    strict = tiny.tokenizer(TEXT, "{{ raise_exception('no system prompt') }}")
    with pytest.raises(ValueError, match="chat template refuses it: no system prompt"):
        generate(model, strict, "hello", chat=True)
