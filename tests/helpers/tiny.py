"""Models, tokens and a tokenizer small enough to train in a test."""

from __future__ import annotations

import json

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from hylora_kernels.layers.linear import SVDLoRALinear

WORDS = 96
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def llama(dtype=torch.float32, seed: int = 0, **changes):
    """A random Llama of two blocks, in eval(); wide initial weights, so that its logits differ."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": WORDS,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    return causal_lm(LlamaConfig(**(sizes | changes)), dtype)


def causal_lm(config, dtype=torch.float32):
    """The random model of a config, in eval()."""
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def adapted(model, rank=12, lora_rank=4, form="pivoted", alpha=1.0, dropout=0.0, names=LAYERS):
    """`model` with SVDLoRALinear in the place of every linear that ends in one of `names`."""
    for path, module in list(model.named_modules()):
        if path.endswith(tuple(names)):
            layer = SVDLoRALinear.from_linear(
                module, rank, lora_rank, alpha=alpha, form=form, lora_dropout=dropout
            )
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, layer)
    return model


def tokens(n: int, length: int, words: int = WORDS, seed: int = 0) -> torch.Tensor:
    """Random ids [n, length]; every second token is a function of the one before."""
    ids = torch.randint(words, (n, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 1::2] = (ids[:, 0 : length - length % 2 : 2] * 7 + 3) % words
    return ids


def tokenizer(text: str, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE like GPT-2's, of at most WORDS + 256 tokens, learned from `text`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS + 256,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([text], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>")
    fast.chat_template = chat_template
    return fast


def piece_tokenizer(text: str, space_in_front: bool = True) -> PreTrainedTokenizerFast:
    """A BPE of pieces like Llama 2's, learned from `text`: spaces are a part of the pieces, and
    bytes stand for characters that it has not seen."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    spaces = [normalizers.Replace(" ", "\u2581")]
    if space_in_front:
        spaces.insert(0, normalizers.Prepend("\u2581"))
    learned = Tokenizer(models.BPE())
    learned.normalizer = normalizers.Sequence(spaces)
    learned.train_from_iterator(
        text.split("\n"), trainers.BpeTrainer(vocab_size=WORDS + 32, show_progress=False)
    )
    pieces = json.loads(learned.to_str())["model"]
    bytes_first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    known = sorted(pieces["vocab"], key=pieces["vocab"].get)
    vocab = {token: index for index, token in enumerate([*bytes_first, *known])}
    merges = [tuple(merge) for merge in pieces["merges"]]
    made = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    made.normalizer = learned.normalizer
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if space_in_front else []),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
