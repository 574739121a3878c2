"""The turns of a conversation as a chat template writes them, between their contents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jinja2

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Contents that no template holds itself, of letters alone: no tokenizer merges them with the
# special tokens and line ends around them.
CONTENTS = ("Firstquestion", "Firstanswer", "Secondquestion", "Secondanswer")


@dataclass(frozen=True)
class Turns:
    """Token ids around the contents of a conversation.

    opening: all in front of the user's first content: the template's own system turn, and the
             header of the user.
    after:   all between a user's content and the assistant's, and between the assistant's and the
             user's next: the end of a turn and the header of the next.
    """

    opening: list[int]
    after: tuple[list[int], list[int]]

    def fit(self, words: int, length: int) -> bool:
        """True if all tokens are below `words` and half of `length` tokens is left for contents."""
        ids = [*self.opening, *self.after[0], *self.after[1]]
        return max(ids) < words and len(self.opening) + len(self.after[0]) <= length // 2


def turns_of(tokenizer: PreTrainedTokenizerBase) -> Turns | None:
    """The turns of the tokenizer's chat template; None without a template, or with one that does
    not render a plain conversation of two questions and answers."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    talk = [
        {"role": role, "content": content}
        for role, content in zip(("user", "assistant") * 2, CONTENTS, strict=True)
    ]
    try:
        text = str(tokenizer.apply_chat_template(talk, tokenize=False))
    except (jinja2.TemplateError, ValueError, TypeError):
        return None
    starts = [text.find(content) for content in CONTENTS]
    if -1 in starts or starts != sorted(starts):
        return None
    ends = [0, *(start + len(content) for start, content in zip(starts, CONTENTS, strict=True))]
    opening, *after = (
        _added(text[:end], text[:start], tokenizer)
        for end, start in zip(ends[:3], starts[:3], strict=True)
    )
    return Turns(opening, (after[0], after[1])) if opening and all(after) else None


def _added(before: str, text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens by which `text` is longer than `before`, its beginning.

    Not those of the rest by itself: in front of a text some tokenizers put a space.
    """
    ids, known = (
        tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"] if part else []
        for part in (text, before)
    )
    return ids[len(known) :]
