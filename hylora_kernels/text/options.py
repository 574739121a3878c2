"""The options of a text, for every command that reads one."""

from __future__ import annotations

from dataclasses import dataclass

from hylora_kernels.support.options import option
from hylora_kernels.text.sources import KINDS, SELF, Mix, Source


@dataclass(frozen=True)
class TextOptions:
    """As token_blocks takes them."""

    data: Source = option("brown", f"Text to train on: {KINDS}.", reported=False)
    calibration: Source | Mix | None = option(
        None,
        f"Text to calibrate on: {KINDS}, or {SELF}: text that the model writes. One text is read "
        "with self and stdlib beside it, which are also the default.",
        reported=False,
    )
    test: Source | None = option(
        None, "Another text to test on, in place of the held-out part of data.", reported=False
    )
    split: str = option(
        "train",
        "Part of the text: train (of a file all but its last tenth), test (that tenth), all, or a "
        "split of a hub data set.",
        reported=False,
    )
    column: str | None = option(None, "Column of a table to read.", reported=False)
