"""Numbers in words, tables and lines on the screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn


def format_bytes(count: float) -> str:
    """1234567 -> "1.2 MB"; units of 1000, as disks and model pages count."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.95:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def format_count(count: float) -> str:
    """1234567 -> "1.23 M" (parameters, tokens)."""
    for unit in ("", " k", " M"):
        if abs(count) < 999.995:
            return f"{count:.0f}" if not unit else f"{count:.2f}{unit}"
        count /= 1000
    return f"{count:.2f} B"


def format_ppl(ppl: float | None) -> str:
    """A perplexity in four figures: 45.28, 128.4, 1.4e+07; "-" where there is none."""
    if ppl is None:
        return "-"
    return f"{ppl:.2f}" if ppl < 100 else f"{ppl:.1f}" if ppl < 10_000 else f"{ppl:.1e}"


def format_seconds(seconds: float) -> str:
    """75.2 -> "1 min 15 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def kept_removed(keep: float) -> str:
    return f"keep {keep:.3f} (removed {1 - keep:.3f})"


def report_lines(model: nn.Module) -> str:
    """The line every command prints; a parameter used in two places (tied) is counted once."""
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = 100 * trainable / max(total, 1)
    return f"trainable {trainable:,} / total {total:,} parameters ({share:.2f} %)"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence]):
    """A rich Table: the first column to the left, the others to the right.

    Cells: str as they are, int with thousands separated, float in four figures, None as "-".
    """
    from rich.table import Table
    from rich.text import Text

    made = Table(title=Text(title), title_justify="left", header_style="bold")
    for place, heading in enumerate(columns):
        made.add_column(Text(heading), justify="right" if place else "left")
    for row in rows:
        made.add_row(*(Text(_cell(value)) for value in row))
    return made


def kept_table(counts: Mapping[str, tuple[int, int, int]]):
    """counts: what -> (dense, merged, as is) parameters; a rich Table with kept and removed."""
    headings = ("parameters", "dense", "merged", "kept", "removed", "as is", "kept", "removed")
    rows = []
    for name, (dense, *held) in counts.items():
        shares = [(n, f"{n / dense:.4f}", f"{1 - n / dense:.4f}") for n in held]
        rows.append((name, dense, *shares[0], *shares[1]))
    return table("merged: adapters folded in; as is: separate", headings, rows)


def show(renderable: object) -> None:
    """Print a table or a line to stdout; no line is cut at 80 columns where that is no terminal."""
    from rich.console import Console

    if isinstance(renderable, str):
        print(renderable, flush=True)
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(renderable)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool | str):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
