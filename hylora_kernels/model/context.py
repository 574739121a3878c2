"""What a model can take: its context length, and blocks of token ids that fit it."""

from __future__ import annotations

from torch import Tensor, nn


def context_length(model: nn.Module) -> int | None:
    """The most tokens that the model was made for, None where its config doesn't say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_context(model: nn.Module, length: int) -> None:
    """ValueError if `length` tokens are more than the model was made for."""
    most = context_length(model)
    if most is not None and length > most:
        raise ValueError(f"length must be at most {most}, the model's context, got {length}")


def check_blocks(model: nn.Module, blocks: Tensor) -> None:
    """ValueError if `blocks` aren't token ids [n >= 1, L >= 2] that the model can take."""
    if not isinstance(blocks, Tensor) or blocks.dim() != 2 or 0 in blocks.shape:
        got = list(blocks.shape) if isinstance(blocks, Tensor) else type(blocks).__name__
        raise ValueError(f"blocks must be token ids [n >= 1, L >= 2], got {got}")
    if blocks.shape[1] < 2:
        raise ValueError(f"blocks must be at least 2 tokens long, got {list(blocks.shape)}")
    check_context(model, blocks.shape[1])
    words, low, high = (
        model.get_input_embeddings().num_embeddings,
        int(blocks.min()),
        int(blocks.max()),
    )
    if low < 0 or high >= words:
        raise ValueError(f"blocks must hold token ids in [0, {words}), got {low} to {high}")
