"""A decoder step as the model's own modules compute it: any model, any device."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from hylora_kernels.model.cache import reserve

FIRST_BUCKET = 256  # tokens that a cache holds at first; it doubles when it is full


class Modules:
    """Runs a model on the tokens of several sequences, and keeps its state between calls.

    The state is what a forward returns under the name of an argument, to be given to the next one:
    past_key_values of a transformer, cache_params of Mamba, state of RWKV.
    """

    name = "transformers"
    likeliest: Tensor | None = None  # int64 [n], where a step has found them itself

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.arguments = frozenset(inspect.signature(model.forward).parameters)
        self.reset()

    def reset(self) -> None:
        """Forget all sequences."""
        self.state: dict[str, Any] = {}
        self.mask: Tensor | None = None  # [n, tokens so far]
        self.positions: Tensor | None = None  # [n, 1], of the last tokens

    def prefill(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids and mask int64 [n, L], zeros of the mask on the left -> logits [n, words] of each
        sequence's last token."""
        self.reset()
        self.state = self._first_state(len(ids))
        self.mask = mask
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        self.positions = positions[:, -1:]
        is_padded = not bool(mask.all())
        return self._forward(ids, positions if is_padded else None)

    def step(self, tokens: Tensor) -> Tensor:
        """tokens int64 [n] -> logits [n, words] of the tokens after them."""
        if not self.state:
            raise ValueError(
                f"model must keep a state between tokens to decode, a {type(self.model).__name__} "
                "returns none"
            )
        assert self.mask is not None and self.positions is not None
        self.mask = torch.cat((self.mask, self.mask.new_ones(len(self.mask), 1)), 1)
        self.positions = self.positions + 1
        is_padded = not bool(self.mask[:, 0].all())
        return self._forward(tokens[:, None], self.positions if is_padded else None)

    def _first_state(self, rows: int) -> dict[str, Any]:
        """What a model is called with besides the prompts; it makes its own cache."""
        return {}

    def _forward(self, ids: Tensor, positions: Tensor | None) -> Tensor:
        """positions: of the tokens, where they differ from the number of tokens before them."""
        mask = self.mask if positions is not None else None
        if mask is not None and self.state and "past_key_values" not in self.state:
            mask = mask[:, -ids.shape[1] :]  # a recurrent state reads new tokens alone
        given = {"attention_mask": mask, "position_ids": positions, "logits_to_keep": 1}
        options = {n: v for n, v in given.items() if n in self.arguments and v is not None}
        output = self.model(input_ids=ids, use_cache=True, **options, **self.state)
        self.state = {
            name: reserve(value, FIRST_BUCKET)
            for name, value in output.items()
            if name in self.arguments
        }
        return output.logits[:, -1]
