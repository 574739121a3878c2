"""The words and the context of a model, the tokens that end its texts, and checks that token ids
fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hylora_kernels.support.devices import input_device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def vocabulary_size(model: nn.Module) -> int:
    """The number of token ids that the model takes: the rows of its embedding, since not every
    config says it in the same place."""
    return model.get_input_embeddings().num_embeddings


def probe_ids(model: nn.Module) -> Tensor:
    """Eight token ids [1, 8] of the model, on its device, to see what a forward does."""
    return torch.arange(8, device=input_device(model))[None] % vocabulary_size(model)


def context_length(model: nn.Module) -> int | None:
    """The largest number of tokens that the model was made for; None if its config has none."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_context(model: nn.Module, length: int) -> None:
    """Raise ValueError if `length` tokens are more than the model's context."""
    most = context_length(model)
    if most is not None and length > most:
        raise ValueError(f"length must be at most {most}, the model's context, got {length}")


def check_blocks(model: nn.Module, blocks: Tensor) -> None:
    """Raise ValueError unless `blocks` are token ids [n >= 1, L >= 2] of the model's vocabulary and
    fit its context."""
    if not isinstance(blocks, Tensor) or blocks.dim() != 2 or 0 in blocks.shape:
        got = list(blocks.shape) if isinstance(blocks, Tensor) else type(blocks).__name__
        raise ValueError(f"blocks must be token ids [n >= 1, L >= 2], got {got}")
    if blocks.shape[1] < 2:
        raise ValueError(f"blocks must be at least 2 tokens long, got {list(blocks.shape)}")
    check_context(model, blocks.shape[1])
    check_ids(model, blocks, "blocks")


def check_ids(model: nn.Module, ids: Tensor, name: str) -> None:
    """Raise ValueError unless `ids`, at least one, are token ids of the model's vocabulary."""
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"{name} must be token ids, int64, got {ids.dtype}")
    words = vocabulary_size(model)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= words:
        raise ValueError(
            f"{name} must hold token ids in [0, {words}), got {low} to {high}: is the tokenizer "
            "that of another model?"
        )


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text: those of the model's generation config, else of its config, and
    the tokenizer's own."""
    settings: Any = getattr(model, "generation_config", None)
    config: Any = model.config.get_text_config()
    own = _ids(getattr(settings, "eos_token_id", None)) or _ids(
        getattr(config, "eos_token_id", None)
    )
    return list(dict.fromkeys([*own, *_ids(tokenizer.eos_token_id)]))


def _ids(found: Any) -> list[int]:
    """A token, several or None as a list."""
    if found is None:
        return []
    return list(found) if isinstance(found, list | tuple) else [int(found)]
