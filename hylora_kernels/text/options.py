"""The options of a text, for every command that reads one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hylora_kernels.support.options import option
from hylora_kernels.text.sources import KINDS

Data = Tensor | list[str] | str | Path


@dataclass(frozen=True)
class TextOptions:
    """As token_blocks takes them."""

    data: Data = option("brown", f"Text to train on: {KINDS}.", reported=False)
    calibration: Data = option("brown", f"Text to calibrate on: {KINDS}.", reported=False)
    test: Data | None = option(
        None, "Another text to test on, in place of the held-out part of data.", reported=False
    )
    split: str = option(
        "train",
        "Part of the text: train (of a file all but its last tenth), test (that tenth), all, or a "
        "split of a hub data set.",
        reported=False,
    )
    column: str | None = option(None, "Column of a table to read.", reported=False)
