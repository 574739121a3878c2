"""A budget of time, as it is written: decode:0.5, prefill:512:0.6."""

from __future__ import annotations

import re
from typing import NamedTuple

WRITTEN = re.compile(r"(?:decode|prefill:([1-9][0-9]*)):([0-9]*\.?[0-9]+)")


class Workload(NamedTuple):
    """A budget of time: at most `share` of the time that the dense model's matrices take for `rows`
    rows of x, 1 for a decoded token, more for a prompt."""

    rows: int
    share: float

    @classmethod
    def parse(cls, text: object) -> Workload:
        """ "decode:0.5" or "prefill:512:0.6". Raises ValueError naming target_time."""
        found = WRITTEN.fullmatch(str(text))
        if found and 0 < (share := float(found[2])) < 1:
            return cls(int(found[1] or 1), share)
        raise ValueError(
            "target_time must be 'decode:SHARE' or 'prefill:ROWS:SHARE', SHARE of the dense model's"
            f" time between 0 and 1, such as 'decode:0.5' or 'prefill:512:0.6', got {text!r}"
        )

    def __str__(self) -> str:
        return f"{'decode' if self.rows == 1 else f'prefill:{self.rows}'}:{self.share:g}"
