"""What the commands have in common: the types and help of their options, and how they are read."""

# No `from __future__ import annotations`: typer reads the annotations themselves.

import json
from pathlib import Path
from typing import Annotated

import typer

Argument, Option = typer.Argument, typer.Option

Model = Annotated[
    str, Argument(metavar="MODEL", help="Hub id, folder, .gguf file, or smollm2-135m (the demo's).")
]
Compressed = Annotated[str, Argument(metavar="DIR", help="Folder of a compressed model.")]
Out = Annotated[Path, Option(help="Folder to write to; one that isn't a model's is refused.")]
Device = Annotated[str, Option(help="auto, cpu, cuda or mps.")]
Dtype = Annotated[str, Option(help="auto (the checkpoint's own), bfloat16, float16 or float32.")]
Seed = Annotated[int, Option(help="Every random choice hangs on it.")]
Json = Annotated[Path | None, Option("--json", help="Write the report there too, as JSON.")]
Include = Annotated[
    list[str] | None,
    Option(help="Only linears whose path has this regular expression; repeatable."),
]
Exclude = Annotated[
    list[str] | None, Option(help="No linears whose path has this regular expression; repeatable.")
]
Text = Annotated[
    str, Option(help="brown, python-docs, a .txt, .jsonl or .parquet file, or a hub data set.")
]
Length = Annotated[int, Option(help="Tokens a block.")]
Batch = Annotated[int, Option(help="Blocks at once.")]
LoraRank = Annotated[int, Option(help="Rank of the adapters, inside the budget; 0: none.")]
Method = Annotated[str, Option(help="two_sided, whitened or svd.")]
Ranks = Annotated[
    str,
    Option(help='global, uniform, energy, or JSON: {"mlp": 0.5, "q_proj": 64} (keep or rank).'),
]
Form = Annotated[str, Option(help="pivoted (smaller) or pair.")]
Factorizer = Annotated[str, Option(help="gram, exact or randomized.")]
Multiple = Annotated[int, Option("--rank-multiple", help="Ranks are multiples of this.")]
Calibration = Annotated[str, Option(help="Text to calibrate on; as --data of evaluate.")]
Samples = Annotated[int, Option(help="Blocks of calibration text.")]
Memory = Annotated[str | None, Option(help="For calibration statistics, e.g. 4GB; rest: disk.")]
Optimize = Annotated[
    bool, Option("--optimize/--no-optimize", help="Lay out the weights for this CPU first.")
]
Refit = Annotated[bool | None, Option("--refit/--no-refit", help="Refit U; not with svd.")]


def claim(out: Path, source: str, mark: str = "config.json") -> None:
    """Refuse to write to `out` where it has files that are no model's (no config.json) and not ours
    (no `mark`), or where it is the folder of the model that is read.

    Raises ValueError.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder")
    if source and Path(source).exists() and out.samefile(source):
        raise ValueError(f"--out {out} is the folder of the model that is read; give another")
    ours = any((out / name).exists() for name in ("config.json", mark))
    if not ours and any(out.iterdir()):
        raise ValueError(f"--out {out} has files in it that are no model's; give another folder")


def ranks_option(text: str) -> str | dict:
    """A policy's name as it is; JSON as the dict it says."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--ranks is no valid JSON: {error}") from error


def numbers_option(text: str, kind: type, option: str) -> list:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        words = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"--{option} must be {words} with commas between, got {text!r}") from None


def shapes_option(text: str, option: str) -> list[tuple[int, int, int, int]]:
    """ "2048x5632x768x32,..." -> [(K, N, r, ra), ...]."""
    shapes = [tuple(numbers_option(p.replace("x", ","), int, option)) for p in text.split(",")]
    for K, N, r, ra in (shape if len(shape) == 4 else (0, 0, 0, 0) for shape in shapes):
        if not (1 <= r < min(K, N) and 0 <= ra < min(K, N)):
            raise ValueError(
                f"--{option} must be KxNxrxra with commas between, the ranks below K and N, e.g. "
                f"2048x5632x768x32, got {text!r}"
            )
    return shapes


def size_option(text: str | None, option: str) -> int | None:
    """ "4GB" -> 4_000_000_000; "4GiB" -> 2**32."""
    if text is None:
        return None
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
    units |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
    number = text.strip().lower().rstrip("bikmgt ")
    unit = text.strip().lower()[len(number) :].strip()
    try:
        return int(float(number) * units[unit])
    except (ValueError, KeyError):
        raise ValueError(f"--{option} must be a size such as 4GB or 512MB, got {text!r}") from None


def write_report(report, *paths: Path | None) -> None:
    """Write a report (a dataclass or a dict) as JSON to each path that is one."""
    from hylora_kernels.support.report import plain
    from hylora_kernels.support.storage import write_json

    for path in paths:
        if path is not None:
            write_json(path, plain(report))
