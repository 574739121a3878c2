"""A checkpoint of a model's shapes with random weights, made shard by shard: for runs whose memory
and time are wanted, not their text.

    python benchmarks/synthetic.py 1b runs/1b     # TinyLlama-1.1B's shapes, 2.2 GB
    python benchmarks/synthetic.py 7b runs/7b     # Llama-2-7B's, 13.5 GB
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from hylora_kernels.text.stdlib import stdlib_text

WORDS = 32000
SHAPES = {
    "tiny": (4, 256, 704, 4, 2),
    "1b": (22, 2048, 5632, 32, 4),
    "7b": (32, 4096, 11008, 32, 32),
}  # blocks, width, inner width, heads, heads of keys


def write_checkpoint(name: str, folder: Path, seed: int = 0) -> None:
    """Write config, tokenizer and weights of SHAPES[name] to a new folder; memory: one block."""
    blocks, width, inner, heads, kv_heads = SHAPES[name]
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    folder.mkdir(parents=True)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config).state_dict()
    files: dict[str, list[str]] = {}
    for tensor in shapes:
        part = tensor.split(".")
        files.setdefault(part[2] if part[1] == "layers" else "rest", []).append(tensor)
    weight_map, size, random = {}, 0, np.random.default_rng(seed)
    for part, names in tqdm(files.items(), desc=f"writing {folder}", unit="file"):
        file = f"model-{part}.safetensors"
        tensors = {}
        for tensor in names:
            tensors[tensor] = _weights(shapes[tensor].shape, random)
            size += tensors[tensor].nbytes
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)


def _weights(shape: torch.Size, random: np.random.Generator) -> torch.Tensor:
    """bfloat16 of either sign, evenly in 2^-6 to 2^-5: random bits, 20 times as fast as a normal
    distribution. Ones for a norm."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    bits = np.frombuffer(random.bytes(2 * shape.numel()), dtype=np.uint16)
    sign_and_fraction, exponent = bits & 0x807F, np.uint16(121 << 7)
    return torch.from_numpy(sign_and_fraction | exponent).view(torch.bfloat16).view(shape)


def _tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most WORDS tokens, learned from Python's standard library."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet
    )
    made.train_from_iterator([stdlib_text("train")], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("shapes", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    write_checkpoint(given.shapes, given.folder)
