"""Numbers as text, rich tables, and printing them."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from torch import nn
from tqdm import tqdm

if TYPE_CHECKING:
    from rich.table import Table


WIDTH = 160  # Columns of a table that goes to no terminal.


def format_bytes(count: float) -> str:
    """1234567 -> "1.2 MB"; units of 1000, as on disks and model pages."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.95:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def format_ppl(ppl: float | None) -> str:
    """A perplexity in four digits: 45.28, 128.4, 1.4e+07; None as "-"."""
    if ppl is None:
        return "-"
    return f"{ppl:.2f}" if ppl < 100 else f"{ppl:.1f}" if ppl < 10_000 else f"{ppl:.1e}"


def format_seconds(seconds: float) -> str:
    """75.2 -> "1 min 15 s"; 2.04 -> "2.0 s"; 3725 -> "1 h 02 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def format_short(seconds: float) -> str:
    """0.0123 -> "12.3 ms"; 4.2e-6 -> "4.2 us"."""
    for unit, factor in (("s", 1), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 0.9995:
            return f"{seconds * factor:.1f} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def kept_removed(keep: float) -> str:
    """0.8 -> "keep 0.800 (removed 0.200)"."""
    return f"keep {keep:.3f} (removed {1 - keep:.3f})"


def report_lines(model: nn.Module, total: int | None = None) -> str:
    """The line that every model command prints: trainable and all parameters, a tied one once. A
    model that has nothing to train, a merged one, says so without a share.

    total: all parameters; by default the numbers in model.parameters(), which of codes are bytes.
    """
    total = sum(p.numel() for p in model.parameters()) if total is None else total
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not trainable:
        return f"trainable none / total {total:,} parameters"
    share = 100 * trainable / max(total, 1)
    return f"trainable {trainable:,} / total {total:,} parameters ({share:.2f} %)"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A rich Table; the first column is left-aligned, the others are right-aligned.

    Cells: str as they are, int with thousands separators, float in four digits, None as "-".
    """
    from rich.table import Table
    from rich.text import Text

    result = Table(title=Text(title), title_justify="left", header_style="bold")
    for index, heading in enumerate(columns):
        # On a narrow terminal a number goes on in the next line; none of its digits is dropped.
        justify: Literal["left", "right"] = "right" if index else "left"
        result.add_column(Text(heading, overflow="fold"), justify=justify, overflow="fold")
    for row in rows:
        result.add_row(*(Text(_cell(value), overflow="fold") for value in row))
    return result


def kept_table(counts: Mapping[str, tuple[int, int, int]]) -> Table:
    """counts: row name -> parameters (dense, adapters merged, adapters separate); a rich Table with
    the kept and removed shares of both."""
    headings = ("parameters", "dense", "merged", "kept", "removed", "as is", "kept", "removed")
    rows = []
    for name, (dense, *compressed) in counts.items():
        row: list[object] = [name, dense]
        for count in compressed:
            row += [count, f"{count / dense:.4f}", f"{1 - count / dense:.4f}"]
        rows.append(row)
    return table("merged: adapters folded in; as is: separate", headings, rows)


def as_text(renderable: object) -> str:
    """A table as plain text, 160 columns wide."""
    from rich.console import Console

    console = Console(width=WIDTH, file=io.StringIO(), color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def show(renderable: object) -> None:
    """Print a table or a line to stdout; a table is 160 columns wide if stdout is no terminal."""
    from rich.console import Console

    if isinstance(renderable, str):
        print(renderable, flush=True)
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(renderable)


def note(text: str) -> None:
    """Print a line to stderr, above any progress bar."""
    tqdm.write(text, file=sys.stderr)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool | str):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
