"""Text that a model writes itself: its parts, its conversations, its cache, any model."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from accelerate import cpu_offload
from helpers import architectures, tiny, zoo
from helpers.words import word_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer, GenerationConfig

from hylora_kernels.inference.optimize import optimize_for_inference
from hylora_kernels.layers.packed import packed_states
from hylora_kernels.model.context import end_tokens
from hylora_kernels.support.cache import cache_root
from hylora_kernels.text import self_text, writer
from hylora_kernels.text.self_text import self_blocks
from hylora_kernels.text.turns import turns_of

CHATML = "{% for m in messages %}<|{{m.role}}|>{{m.content}}<end>\n{% endfor %}"
TEXT = "hello world, this is a text"
ROWS = self_text.ROWS_ON_CPU
WORDS = 352  # More than the tokenizer's 262.


def own_text(model, tokenizer, count=ROWS, length=24, **options):
    return self_blocks(model, tokenizer, count, length, progress=False, **options)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HYLORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model():
    return tiny.llama(vocab_size=WORDS)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer(TEXT, CHATML)


# ----------------------------------------------------------------------------- seeds, parts, counts


def test_block_i_is_the_same_for_every_count(model, tokenizer):
    few = own_text(model, tokenizer, 3)
    assert few.dtype == torch.int64 and few.shape == (3, 24) and few.device.type == "cpu"
    many = own_text(model, tokenizer, ROWS + 3)
    assert torch.equal(many[:3], few)
    assert len({tuple(row) for row in many.tolist()}) == ROWS + 3


def test_batches_have_the_rows_of_the_device(model, tokenizer, monkeypatch):
    """Blocks that another number of rows has written are others."""
    numbers = count_batches(monkeypatch)
    first = own_text(model, tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(self_text, "ROWS_ON_CPU", 2 * ROWS)
        assert own_text(model, tokenizer).shape == (ROWS, 24) and numbers == [0, 0]
    assert torch.equal(own_text(model, tokenizer), first) and numbers == [0, 0]


def test_parts_and_seeds_are_texts_of_their_own(model, tokenizer):
    texts = [own_text(model, tokenizer, part=part) for part in self_text.PARTS]
    texts += [own_text(model, tokenizer, seed=seed) for seed in (1, -(2**80))]
    rows = {tuple(row) for text in texts for row in text.tolist()}
    assert len(rows) == 5 * ROWS


def test_the_callers_random_state_neither_matters_nor_changes(model, tokenizer, monkeypatch):
    first = own_text(model, tokenizer)
    monkeypatch.setattr(self_text.Stream, "_find", lambda *_: None)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert torch.equal(own_text(model, tokenizer), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_words_come_as_often_as_their_probability():
    """Chi-squared of 20000 draws of 600 words in three chunks, with 599 degrees of freedom: 5
    standard deviations."""
    probabilities = torch.rand(600, generator=torch.Generator().manual_seed(0)) ** 4 + 0.01
    probabilities[[0, 255, 256, 599]] = 0
    probabilities /= probabilities.sum()
    generator = torch.Generator().manual_seed(1)
    drawn = writer.draw(probabilities.expand(20_000, -1), generator)
    counts = torch.bincount(drawn, minlength=600)
    assert counts.shape == (600,) and not counts[probabilities == 0].any()
    expected = 20_000 * probabilities[probabilities > 0]
    chi2 = float(((counts[probabilities > 0] - expected) ** 2 / expected).sum())
    assert abs(chi2 - 595) < 5 * (2 * 595) ** 0.5


def test_the_text_is_the_models(tokenizer):
    """A model that knows one word for each writes that one: its head turns the embedding by one."""
    model = tiny.llama(vocab_size=WORDS, tie_word_embeddings=False)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.randn(WORDS, 32).sign())
        model.lm_head.weight.copy_(model.model.embed_tokens.weight.roll(1, 0) * 20)
    ids = own_text(model, tokenizer, length=12)[::2]
    going_on = (ids[:, 1:] == ids[:, :-1] + 1).float().mean()
    assert going_on > 0.9  # not behind the last word or the end of a text


# ---------------------------------------------------------------------------- raw, conversations


@pytest.fixture
def brief(model, tokenizer):
    """A model with many words that end a text, none of which stands in a header."""
    brief, (question, answer) = copy.deepcopy(model), turns_of(tokenizer).after
    headers = {*question, *answer}
    brief.generation_config.eos_token_id = [i for i in range(20, 60) if i not in headers]
    return brief


def test_raw_text_goes_on_with_any_word_behind_its_end(brief):
    tokenizer = tiny.tokenizer(TEXT)
    ids = own_text(brief, tokenizer, 2 * ROWS, length=64)
    ends = torch.tensor([*end_tokens(brief, tokenizer), tokenizer.eos_token_id])
    behind = ids[:, 1:][torch.isin(ids, ends)[:, :-1]]
    assert len(behind) > 100 and not torch.isin(behind, ends).any()
    assert not torch.isin(ids[:, 0], ends).any() and len(ids[:, 0].unique()) > 20


def test_odd_blocks_are_conversations(brief, tokenizer):
    ids = own_text(brief, tokenizer, length=64)
    for raw, chat in zip(ids[::2], ids[1::2], strict=True):
        assert not tokenizer.decode(raw).startswith("<|user|>")
        text = tokenizer.decode(chat)
        for number, turn in enumerate(text.split("<end>\n")[:-1]):
            assert turn.startswith(("<|user|>", "<|assistant|>")[number % 2]), text
    assert (ids[1::2] == 0).sum(1).max() > 1


TEMPLATES = {
    "special tokens": (CHATML, "<|user|>", "<end>\n<|assistant|>", "<end>\n<|user|>"),
    "a system turn": ("[be good]\n" + CHATML, "[be good]\n<|user|>", "<end>\n<|assistant|>", None),
    "plain words": (
        "{% for m in messages %}{{m.role}}: {{m.content}}\n{% endfor %}",
        "user: ",
        "\nassistant: ",
        "\nuser: ",
    ),
    "an end of answers alone": (
        "{% for m in messages %}{% if m.role == 'user' %}[I]{{m.content}}[/I]{% else %}"
        "{{m.content}}<end>{% endif %}{% endfor %}",
        "[I]",
        "[/I]",
        "<end>[I]",
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_turns_of_a_template(name):
    template, opening, answer, question = TEMPLATES[name]
    tokenizer = tiny.tokenizer(TEXT, template)
    turns = turns_of(tokenizer)
    assert tokenizer.decode(turns.opening) == opening
    assert tokenizer.decode(turns.after[0]) == answer
    assert tokenizer.decode(turns.after[1]) == (question or "<end>\n<|user|>")


@pytest.mark.parametrize(
    "template",
    [
        None,
        "",
        "{{ raise_exception('no chat') }}",
        "{{ messages[0].content }}",
        "{% for m in messages %}{{m.content}}{% endfor %}",
        "{% for m in messages %}{{m.role | upper",
    ],
)
def test_templates_without_a_conversation(model, template):
    tokenizer = tiny.tokenizer(TEXT, template)
    assert turns_of(tokenizer) is None
    assert own_text(model, tokenizer).shape == (ROWS, 24)


def conversation(template: str, drawn: str) -> str:
    """What is written where the model draws `drawn`, a character each time."""
    tokenizer = tiny.tokenizer("", template)
    chat = writer.Conversation(turns_of(tokenizer), {0})
    ids = iter(tokenizer(drawn)["input_ids"])
    written = []
    while chat.forced or (token := next(ids, None)) is not None:
        written.append(chat.next(None if chat.forced else token))
    return tokenizer.decode(written)


def test_the_model_ends_a_turn_and_the_next_header_is_forced():
    talk = "<|user|>hi<end>\n<|assistant|>ho<end>\n<|user|>so"
    assert conversation(CHATML, "hi<end>ho<end>so") == talk
    plain = TEMPLATES["plain words"][0]
    assert conversation(plain, "hi\nassistant: ho\nuser: so") == (
        "user: hi\nassistant: ho\nuser: so"
    )
    # The end of a text ends a turn, which the template ends in another way.
    assert conversation(plain, "hi<end>ho<end>so") == "user: hi\nassistant: ho\nuser: so"
    mixed = TEMPLATES["an end of answers alone"][0]
    assert conversation(mixed, "hi[/I]ho<end>so<end>") == "[I]hi[/I]ho<end>[I]so[/I]"


def test_a_template_that_fills_the_block_is_left_out(model, capsys):
    tokenizer = tiny.tokenizer(TEXT, "a long system turn, token by token\n" + CHATML)
    ids = own_text(model, tokenizer)
    assert "<|user|>" not in "".join(tokenizer.batch_decode(ids))
    assert "self: all raw, since 24 tokens hold no conversation" in capsys.readouterr().err


def test_a_start_of_text_stands_where_the_tokenizer_puts_it(model):
    tokenizer = tiny.tokenizer(TEXT)
    tokenizer.bos_token = "!"
    assert not (own_text(model, tokenizer)[:, 0] == tokenizer.bos_token_id).any()
    start = ("!", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("! $A", special_tokens=[start])
    ids = own_text(model, tokenizer, 2 * ROWS)
    assert (ids[:, 0] == tokenizer.bos_token_id).all() and len(ids[:, 1].unique()) > 16


# ------------------------------------------------------------------------------------------- cache


def count_batches(monkeypatch) -> list[int]:
    """The numbers of the batches that are written from now on."""
    numbers, write = [], self_text.Stream._write

    def counted(stream, number, *rest):
        numbers.append(number)
        return write(stream, number, *rest)

    monkeypatch.setattr(self_text.Stream, "_write", counted)
    return numbers


def test_a_copy_of_the_tokenizer_in_another_folder_writes_nothing_again(
    model, tokenizer, monkeypatch
):
    numbers = count_batches(monkeypatch)
    first = self_blocks(model, tokenizer, 1, 24, progress=False)
    monkeypatch.setitem(tokenizer.init_kwargs, "name_or_path", "elsewhere")
    assert self_blocks(model, tokenizer, 1, 24, progress=False).equal(first)
    assert numbers == [0]


def test_a_batch_is_written_once(model, tokenizer, monkeypatch):
    numbers = count_batches(monkeypatch)
    first = own_text(model, tokenizer, 2 * ROWS)
    assert torch.equal(own_text(model, tokenizer, 2 * ROWS), first) and numbers == [0, 1]
    file = next((cache_root() / "tokens").rglob("0.safetensors"))
    file.write_bytes(file.read_bytes()[:-3])
    assert torch.equal(own_text(model, tokenizer, 2 * ROWS), first) and numbers == [0, 1, 0]


def test_an_interrupted_call_goes_on_behind_its_last_batch(model, tokenizer, monkeypatch):
    whole = own_text(model, tokenizer, 2 * ROWS)
    next((cache_root() / "tokens").rglob("1.safetensors")).unlink()
    call, steps = writer.Writer.next, []

    def interrupted(*args):
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return call(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(writer.Writer, "next", interrupted)
        own_text(model, tokenizer, 2 * ROWS)
    assert not packed_states(model)
    numbers = count_batches(monkeypatch)
    assert torch.equal(own_text(model, tokenizer, 2 * ROWS), whole) and numbers == [1]


def test_another_model_tokenizer_or_template_writes_another_text(model, tokenizer, monkeypatch):
    numbers = count_batches(monkeypatch)
    own_text(model, tokenizer)
    own_text(tiny.llama(vocab_size=WORDS, seed=1), tokenizer)
    own_text(model, tiny.tokenizer("other words", CHATML))
    own_text(model, tiny.tokenizer(TEXT))
    own_text(model, tokenizer, length=25)
    assert numbers == [0] * 5


def test_a_cache_that_cannot_be_written_is_said(model, tokenizer, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HYLORA_CACHE", str(tmp_path / "file"))
    assert own_text(model, tokenizer).shape == (ROWS, 24)
    assert "the model's own text not kept" in capsys.readouterr().err


def test_progress_counts_tokens_a_second(model, tokenizer, capsys):
    self_blocks(model, tokenizer, 2, 24)
    bar = capsys.readouterr().err
    assert "the model's own text" in bar and " tokens/s" in bar
    self_blocks(model, tokenizer, 2, 24)
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------- any model


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3", "gpt2", "opt", "qwen3"])
def test_a_decoder_changes_no_token(name, tokenizer, monkeypatch, capsys):
    """mistral and the gemmas have windows of 8 tokens."""
    model = zoo.zoo_model(name)
    ids = own_text(model, tokenizer)
    assert "without a key-value cache" not in capsys.readouterr().err

    def none(*_args):
        raise ValueError("no decoder here")

    monkeypatch.setattr(self_text.Stream, "_find", lambda *_: None)
    monkeypatch.setattr(self_text, "Decoder", none)
    assert torch.equal(own_text(model, tokenizer), ids)
    assert "without a key-value cache" in capsys.readouterr().err


def test_a_packed_model_writes_and_stays_packed(tokenizer, monkeypatch):
    runtimes, decoder = [], self_text.Decoder

    def seen(*args):
        made = decoder(*args)
        runtimes.append(made.runtime)
        return made

    monkeypatch.setattr(self_text, "Decoder", seen)
    model = tiny.llama(vocab_size=WORDS, hidden_size=64, intermediate_size=96)
    ids = own_text(model, tokenizer)
    assert not packed_states(model)
    monkeypatch.setattr(self_text.Stream, "_find", lambda *_: None)
    optimize_for_inference(model)
    packed = len(packed_states(model))
    assert torch.equal(own_text(model, tokenizer), ids) and len(packed_states(model)) == packed
    assert runtimes == ["cpu" if packed else "transformers"] * 2


@pytest.mark.parametrize(
    "kind", ["mamba", "mamba2", "rwkv", "jamba", "openai-gpt", "recurrent_gemma"]
)
def test_models_with_other_states_or_none(kind, tokenizer, monkeypatch):
    monkeypatch.setattr(self_text, "ROWS_ON_CPU", 4)
    model = architectures.tiny(kind)
    ids = own_text(model, tokenizer, 4, length=10)
    assert ids.shape == (4, 10) and ids.min() >= 0 and ids.max() < architectures.WORDS


def test_a_model_that_takes_no_cache_writes_without(model, tokenizer, capsys, monkeypatch):
    ids = own_text(model, tokenizer)
    model = copy.deepcopy(model)
    forward = model.forward

    def without(*args, past_key_values=None, **kwargs):
        if past_key_values is not None:
            raise ValueError("no cache here")
        return forward(*args, **kwargs)

    model.forward = without
    monkeypatch.setattr(self_text.Stream, "_find", lambda *_: None)
    assert torch.equal(own_text(model, tokenizer), ids)
    assert "without a key-value cache" in capsys.readouterr().err


def test_a_compressed_model_writes(tokenizer):
    model = tiny.adapted(tiny.llama(vocab_size=WORDS))
    assert own_text(model, tokenizer).shape == (ROWS, 24)


def test_compiled_and_offloaded_models_write_the_same(model, tokenizer):
    ids = own_text(model, tokenizer)
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    assert torch.equal(own_text(compiled, tokenizer), ids)
    offloaded = cpu_offload(copy.deepcopy(model), execution_device="cpu")
    assert torch.equal(own_text(offloaded, tokenizer), ids)


def test_runs_on_the_models_device(device, tokenizer):
    model = tiny.llama(vocab_size=WORDS).to(device)
    ids = own_text(model, tokenizer)
    assert ids.device.type == "cpu" and ids.shape == (ROWS, 24)


@pytest.mark.parametrize("words", [40, 262, 1000])
def test_the_vocabulary_and_the_embedding_may_differ(words):
    tokenizer = tiny.tokenizer(TEXT, CHATML)
    ids = own_text(tiny.llama(vocab_size=words), tokenizer)
    assert ids.min() >= 0 and ids.max() < min(words, len(tokenizer))


def test_any_tokenizer(model):
    assert own_text(model, word_tokenizer()).max() < len(word_tokenizer())
    slow = ByT5Tokenizer()
    assert not slow.is_fast and own_text(model, slow).max() < len(slow)
    only_special = tiny.tokenizer(TEXT)
    only_special.add_special_tokens(
        {"additional_special_tokens": [t for t in only_special.get_vocab() if t != "<end>"]}
    )
    assert own_text(model, only_special).shape == (ROWS, 24)


def test_the_model_is_left_as_it_was(tokenizer):
    model = tiny.llama(vocab_size=WORDS, attention_dropout=0.5).train()
    model.model.layers[0].eval()
    model.generation_config = settings = GenerationConfig(
        eos_token_id=list(range(1, 100)), suppress_tokens=[5], repetition_penalty=3.0, max_length=3
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = own_text(model, tokenizer)
    assert model.training and not model.model.layers[0].training
    assert model.generation_config is settings and settings.max_length == 3
    assert not model._forward_pre_hooks
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    model.eval()
    assert torch.equal(own_text(model, tokenizer), ids)


# ------------------------------------------------------------------------------------------ errors


def test_blocks_are_no_longer_than_the_context(model, tokenizer, capsys):
    assert own_text(model, tokenizer, length=100).shape == (ROWS, 64)
    assert (
        "blocks of 64 tokens, the model's context, where 100 were asked for"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite(value, tokenizer):
    model = tiny.llama(vocab_size=WORDS, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[9] = value
    with pytest.raises(FloatingPointError, match="logits are not finite behind 1 tokens"):
        own_text(model, tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count must be an int of at least 1, got 0"),
        ({"length": 1}, "length must be an int of at least 2, got 1"),
        ({"part": "train"}, "part must be one of calibration, recovery, test, got 'train'"),
        ({"seed": None}, "seed must be an int, got None"),
        ({"tokenizer": None}, "tokenizer must be given, got None"),
    ],
)
def test_bad_arguments(model, tokenizer, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        self_blocks(**{"model": model, "tokenizer": tokenizer, "count": 2} | options)
