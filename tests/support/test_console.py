"""Numbers as text, and tables."""

from __future__ import annotations

import io

from torch import nn

from hylora_kernels.support import console


def test_numbers_as_text():
    assert [console.format_bytes(n) for n in (0, 999, 1000, 269_030_000, 2.5e12)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "269.0 MB",
        "2.5 TB",
    ]
    assert [console.format_ppl(p) for p in (None, 45.281, 128.44, 1.4e7)] == [
        "-",
        "45.28",
        "128.4",
        "1.4e+07",
    ]
    assert [console.format_seconds(s) for s in (2.04, 75.2, 3725)] == [
        "2.0 s",
        "1 min 15 s",
        "1 h 02 min",
    ]
    assert console.kept_removed(0.8) == "keep 0.800 (removed 0.200)"


def test_the_parameter_line_counts_a_tied_weight_once():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False), nn.Linear(10, 2))
    model[1].weight = model[0].weight
    model[0].weight.requires_grad_(False)
    line = console.report_lines(model)
    assert line == "trainable 22 / total 62 parameters (35.48 %)"
    model.requires_grad_(False)
    assert console.report_lines(model) == "trainable none / total 62 parameters"


def test_a_narrow_terminal_drops_no_digit():
    from rich.console import Console

    made = console.table("a title", ["parameters", "dense", "merged"], [["linears", 10**9, 10**8]])
    narrow = Console(width=24, record=True, file=io.StringIO())
    narrow.print(made)
    lines = narrow.export_text().splitlines()
    assert "…" not in "".join(lines)
    for column, number in ((2, "1,000,000,000"), (3, "100,000,000")):
        cells = [line.split("│")[column].strip() for line in lines if line.count("│") == 4]
        assert "".join(cells).endswith(number)


def test_a_table_shows_every_cell_and_takes_brackets_literally(capsys):
    rows = [["[bold]x[/nonsense]", 1234567, 0.123456, None], ["y", 2, 1.4e7, True]]
    console.show(console.table("a [title]", ["name", "count", "share", "more"], rows))
    shown = capsys.readouterr().out
    for text in ("[bold]x[/nonsense]", "1,234,567", "0.1235", "-", "1.4e+07", "True", "a [title]"):
        assert text in shown
    console.show("plain [red]line[/red]")
    assert capsys.readouterr().out == "plain [red]line[/red]\n"
