"""A dense model as one .gguf file, for llama.cpp: Llama, Mistral, Qwen2 and Qwen3 blocks.

Names, metadata and types are those of the `gguf` package. Matrices are stored in one type; vectors,
and matrices whose rows are no multiple of its block of 32, in float32 and float16.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
BLOCK = 32
SPACE = "\u2581"  # which SentencePiece writes for a space
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# model_type -> (llama.cpp's architecture, whether it rotates neighbouring pairs of a head).
ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
}
ROTATIONS = ("default", "linear", "llama3")
# The name in llama.cpp of what cuts a text before byte-level BPE -> words that the cut is known by.
CUTS = {
    "smollm": ('"individual_digits": true', '"use_regex": true'),
    "llama-bpe": (r"[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|",),
    "qwen2": (r"[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?",),
    "gpt-2": ('"type": "ByteLevel"', '"use_regex": true'),
}


def check_type(kind: str) -> None:
    """Raise ValueError for a type that matrices can't be stored in."""
    if kind not in TYPES:
        raise ValueError(f"gguf_type must be one of {TYPES}, got {kind!r}")


def write_gguf(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, path: Path, kind: str
) -> float:
    """Write a dense model and its tokenizer; returns |W stored - W| / |W| over all matrices, in
    Frobenius norms.

    Raises ValueError naming the model's or the tokenizer's part that llama.cpp's blocks don't have,
    or that this function doesn't know how to write.
    """
    import gguf

    config: Any = model.config
    architecture, in_pairs = _architecture(config)
    if tokenizer is None:
        raise ValueError("tokenizer must be given: a .gguf file has it inside")
    writer = gguf.GGUFWriter(path, architecture)
    _add_metadata(writer, model, kind, gguf)
    _add_tokenizer(writer, tokenizer, config.vocab_size, gguf)
    squared_error = squared_size = 0.0
    for name, tensor in _tensors(model, architecture, in_pairs, gguf):
        values = tensor.float().numpy()
        stored = gguf.GGMLQuantizationType[_type_of(tensor, kind)]
        data = gguf.quantize(values, stored)
        writer.add_tensor(name, data, raw_dtype=stored)
        if values.ndim > 1:
            squared_error += float(((gguf.dequantize(data, stored) - values) ** 2).sum())
            squared_size += float((values**2).sum())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (squared_error / squared_size) ** 0.5


def _architecture(config: Any) -> tuple[str, bool]:
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"model must be one of {known} for GGUF, got {config.model_type!r}")
    if config.hidden_act != "silu":
        raise ValueError(f"model: hidden_act must be silu for GGUF, got {config.hidden_act!r}")
    name, in_pairs = ARCHITECTURES[config.model_type]
    rotation = _rotary(config).get("rope_type", "default")
    allowed = ROTATIONS if name == "llama" else ("default",)
    if rotation not in allowed:
        raise ValueError(f"model: rope_type must be one of {allowed} for GGUF, got {rotation!r}")
    return name, in_pairs


def _add_metadata(writer: Any, model: PreTrainedModel, kind: str, gguf: ModuleType) -> None:
    config: Any = model.config
    head = _head_dim(config)
    windows = [w for w in (getattr(config, "sliding_window", None),) if w]  # these blocks have none
    writer.add_name(Path(str(model.name_or_path or config.model_type)).name)
    writer.add_context_length(min(config.max_position_embeddings, *windows, 2**31))
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(_rotary(config)["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    file_type = "ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _tensors(
    model: PreTrainedModel, architecture: str, in_pairs: bool, gguf: ModuleType
) -> Iterator[tuple[str, Tensor]]:
    config: Any = model.config
    archs = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(archs[architecture], config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored is None:
            raise ValueError(f"model: GGUF has no name for {name!r} of a {config.model_type}")
        count = heads.get(name.split(".")[-2])
        yield stored, _pairs_side_by_side(tensor, count) if count and in_pairs else tensor
    frequencies = model.get_decoder().rotary_emb.inv_freq.double()
    steps = torch.arange(len(frequencies), dtype=torch.float64) / len(frequencies)
    plain = _rotary(config)["rope_theta"] ** -steps
    factors = (plain / frequencies).float()
    if not torch.allclose(factors, torch.ones_like(factors), rtol=1e-4):
        yield "rope_freqs.weight", factors


def _pairs_side_by_side(tensor: Tensor, heads: int) -> Tensor:
    """Rows of q or k [heads * d, ...]: transformers rotates row i of a head with row i + d / 2,
    llama.cpp row 2 i with row 2 i + 1."""
    by_half = tensor.unflatten(0, (heads, 2, -1))
    return by_half.transpose(1, 2).reshape(tensor.shape)


def _type_of(tensor: Tensor, kind: str) -> str:
    if tensor.ndim < 2:
        return "F32"
    return "F16" if kind.startswith("Q") and tensor.shape[-1] % BLOCK else kind


def _add_tokenizer(
    writer: Any, tokenizer: PreTrainedTokenizerBase, words: int, gguf: ModuleType
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        file = Path(folder) / "tokenizer.json"
        described = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        model = described.get("model", {})
        # llama.cpp merges pieces by their scores, bytes by the list of merges.
        of_pieces = model.get("type") == "BPE" and bool(model.get("byte_fallback"))
        special = gguf.SpecialVocab(folder, load_merges=not of_pieces, n_vocab=words)
    tokens = {index: token for token, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    kinds = gguf.TokenType
    texts, types = [], []
    for index in range(words):
        token = tokens.get(index)
        texts.append(f"[PAD{index}]" if token is None else token)
        if token is None:
            types.append(kinds.UNUSED)
        elif of_pieces and token == model.get("unk_token"):
            types.append(kinds.UNKNOWN)
        elif index in added:
            types.append(kinds.CONTROL if added[index].special else kinds.USER_DEFINED)
        else:
            types.append(kinds.BYTE if of_pieces and BYTE.fullmatch(token) else kinds.NORMAL)
    if of_pieces:
        writer.add_tokenizer_model("llama")
        writer.add_token_scores(_scores(model, texts))
        writer.add_add_space_prefix(_has_space_in_front(described))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_cut_of(described))
        writer.add_add_space_prefix(False)
    writer.add_token_list(texts)
    writer.add_token_types(types)
    special.add_to_gguf(writer, quiet=True)


def _scores(model: dict[str, Any], pieces: list[str]) -> list[float]:
    """SentencePiece's score of each piece, the highest of which is merged first: its place among
    the merges, negative."""
    places: dict[str, int] = {}
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        places.setdefault(left + right, len(places))
    return [-float(places.get(piece, 0)) for piece in pieces]


def _has_space_in_front(described: dict[str, Any]) -> bool:
    """Whether a tokenizer.json of SentencePiece's kind puts a space in front of a text.

    Raises ValueError if it changes a text in any other way than to write spaces as SPACE.
    """
    steps = []
    for step in (described.get("normalizer"), described.get("pre_tokenizer")):
        parts = (step or {}).get("normalizers", (step or {}).get("pretokenizers", [step]))
        steps.extend(part for part in parts if part is not None)
    in_front = False
    for step in steps:
        kind = step["type"]
        if kind == "Prepend" and step["prepend"] == SPACE:
            in_front = True
        elif kind == "Metaspace" and step["replacement"] == SPACE and not step.get("split"):
            in_front |= step.get("prepend_scheme") != "never"
        elif kind != "Replace" or step["pattern"] != {"String": " "} or step["content"] != SPACE:
            raise ValueError(
                f"tokenizer: of SentencePiece's steps GGUF has those for spaces alone, got {step}"
            )
    return in_front


def _cut_of(described: dict[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer of a tokenizer.json."""
    if described.get("model", {}).get("type") != "BPE":
        raise ValueError(
            "tokenizer must be a BPE for GGUF, of bytes as Llama 3 has or of pieces as Llama 2 has"
        )
    cut = json.dumps(described.get("pre_tokenizer"))
    for name, words in CUTS.items():
        if all(word in cut for word in words):
            return name
    raise ValueError(
        f"tokenizer: its pre_tokenizer must be one of {', '.join(CUTS)} for GGUF, got {cut[:200]}"
    )


def _rotary(config: Any) -> dict[str, Any]:
    """Its rotary parameters, which transformers 4 has in two places."""
    older = {"rope_theta": getattr(config, "rope_theta", None)}
    older |= getattr(config, "rope_scaling", None) or {}
    return getattr(config, "rope_parameters", None) or older


def _head_dim(config: Any) -> int:
    own = getattr(config, "head_dim", None)
    return own or config.hidden_size // config.num_attention_heads
