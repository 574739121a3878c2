"""The commands of `hylora` that make a model smaller: compress, quantize."""

# No `from __future__ import annotations`: typer reads the annotations themselves.

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from hylora_kernels.cli.model_commands import load, parameter_bytes
from hylora_kernels.cli.options import (
    Device,
    Dtype,
    Json,
    Model,
    Option,
    Out,
    Overwrite,
    Revision,
    Tokenizer,
    library_options,
    refuse_foreign_folder,
)
from hylora_kernels.cli.output import (
    are_several,
    is_first_process,
    trainable_line,
    write_report,
)
from hylora_kernels.compression.options import QuantizeOptions
from hylora_kernels.experiments.options import TargetOptions
from hylora_kernels.support.console import format_bytes, format_seconds, show
from hylora_kernels.support.storage import require_disk

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hylora_kernels.compression.report import CompressReport

Png = Annotated[
    Path | None,
    Option(help="Draw the predicted loss, the ranks and the bits by depth to this file."),
]

ByBlock = Annotated[
    bool,
    Option(
        "--by-block",
        help="For a model larger than memory: read one decoder block at a time from its files.",
    ),
]

# The options of compress that --target-ratio alone reads.
SEARCH = ("texts", "limit", "evaluations")


@library_options(
    TargetOptions,
    without=(
        *("tokenizer", "device", "dtype", "refit_samples", "progress"),
        *("target_ratio", "output_dir"),
    ),
)
def compress(
    model: Model,
    out: Out,
    *,
    target_ratio: Annotated[
        float | None,
        Option(
            help="In place of keep: find the smallest one whose perplexity, as the geometric mean "
            "over --texts, is at most this multiple of the dense model's; for example 1.1."
        ),
    ] = None,
    options: dict[str, Any],
    by_block: ByBlock = False,
    overwrite: Overwrite = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    tokenizer: Tokenizer = None,
    json_path: Json = None,
    png: Png = None,
) -> None:
    """Replace a model's linears by low-rank ones and write the smaller model to a folder.

    Processes of torchrun share the work.
    """
    from hylora_kernels.compression.compress import compress as compress_model
    from hylora_kernels.compression.to_folder import compress_to_folder
    from hylora_kernels.experiments.target import compress_to_ratio
    from hylora_kernels.model.saving import save_pretrained

    search = {name: options.pop(name) for name in SEARCH}
    given = [name for name in SEARCH if search[name] != getattr(TargetOptions, name)]
    if target_ratio is None and given:
        raise ValueError(f"{given[0]} is read for target_ratio, which is not given")
    if target_ratio is not None and are_several():
        raise ValueError("target_ratio is searched by one process: run it without torchrun")
    if by_block and target_ratio is not None:
        raise ValueError("target_ratio goes without by_block: it tries models that are in memory")
    refuse_foreign_folder(out, model, mark="frontier", overwrite=overwrite)
    trusted = options["trust_remote_code"]
    loaded, tokenizer = _savable(out, model, device, dtype, trusted, revision, tokenizer, by_block)
    found: dict[str, Any] = {}
    if by_block:
        report = compress_to_folder(
            loaded, out, overwrite=overwrite, tokenizer=tokenizer, **options
        )
        if is_first_process():
            _finish(loaded, report, out, json_path, png, found)
            show(f"written to {out}. Next: hylora evaluate {out}")
        return
    if target_ratio is None:
        loaded, report = compress_model(loaded, tokenizer=tokenizer, **options)
    else:
        loaded, report, frontier = compress_to_ratio(
            loaded,
            target_ratio=target_ratio,
            output_dir=out,
            tokenizer=tokenizer,
            **options,
            **search,
        )
        show(frontier.render())
        if frontier.note:
            show(frontier.note)
        found = {"frontier": frontier.to_dict()}
    if not is_first_process():
        return
    save_pretrained(loaded, out, tokenizer, overwrite=overwrite)
    _finish(loaded, report, out, json_path, png, found)
    show(f"written to {out}. Next: hylora finetune {out} --out {out}-recovered")


@library_options(QuantizeOptions, without=("tokenizer", "device", "dtype", "progress"))
def quantize(
    model: Model,
    out: Out,
    *,
    options: dict[str, Any],
    adapt: Annotated[
        str | None,
        Option(
            help="First train adapters of the dense model on this text and fold them in; it is "
            "the calibration text, too, unless another is given."
        ),
    ] = None,
    adapt_steps: Annotated[int, Option(min=1, help="Updates on the text of --adapt.")] = 60,
    adapt_rank: Annotated[int, Option(min=1, help="Rank of the adapters of --adapt.")] = 32,
    by_block: ByBlock = False,
    overwrite: Overwrite = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    tokenizer: Tokenizer = None,
    json_path: Json = None,
    png: Png = None,
) -> None:
    """Put a model's matrices into few bits, every rank as it is, and write the smaller model."""
    from hylora_kernels.compression.quantize_model import quantize_model
    from hylora_kernels.compression.to_folder import compress_to_folder
    from hylora_kernels.model.saving import save_pretrained
    from hylora_kernels.recovery.adapt import adapt_dense

    checked = QuantizeOptions(**options)  # Before the long work.
    if by_block and adapt is not None:
        raise ValueError("adapt goes without by_block: it trains a model that is in memory")
    refuse_foreign_folder(out, model, mark="training", overwrite=overwrite)
    trusted = options["trust_remote_code"]
    loaded, tokenizer = _savable(out, model, device, dtype, trusted, revision, tokenizer, by_block)
    found: dict[str, Any] = {}
    if by_block:
        given = checked.for_compress() | {"tokenizer": tokenizer}
        report = compress_to_folder(loaded, out, overwrite=overwrite, **given)
        if is_first_process():
            _finish(loaded, report, out, json_path, png, found)
            show(f"written to {out}. Next: hylora evaluate {out}")
        return
    if adapt is not None:
        text = {name: options[name] for name in ("split", "column", "length", "seed")}
        trained = adapt_dense(
            loaded,
            adapt,
            tokenizer,
            lora_rank=adapt_rank,
            steps=adapt_steps,
            output_dir=out / "training",
            **text,
        )
        show(trained.render())
        found = {"adapt": trained.to_dict()}
        options["calibration"] = options["calibration"] or adapt
    loaded, report = quantize_model(loaded, tokenizer=tokenizer, **options)
    if not is_first_process():
        return
    save_pretrained(loaded, out, tokenizer, overwrite=overwrite)
    _finish(loaded, report, out, json_path, png, found)
    show(f"written to {out}. Next: hylora evaluate {out}")


def _savable(out: Path, *given: Any) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase | None]":
    """What load(*given) gives, once it is known that it can be saved to `out`."""
    from hylora_kernels.model.saving import refuse_unsavable

    model, tokenizer = load(*given)
    refuse_unsavable(model, tokenizer)
    require_disk(out, parameter_bytes(model), f"the smaller model in {out}")
    return model, tokenizer


def _finish(
    model: "PreTrainedModel",
    report: "CompressReport",
    out: Path,
    json_path: Path | None,
    png: Path | None,
    found: dict[str, Any],
) -> None:
    """Print what was made and write the report; found: more for it in JSON."""
    show(report.render())
    show(trainable_line(model))
    if report.sources:
        show(report.text_line())
    seconds = ", ".join(f"{stage} {format_seconds(s)}" for stage, s in report.seconds.items())
    show(f"time: {seconds}; peak memory {format_bytes(report.peak_rss)}")
    write_report(report.to_dict() | found, out / "compress.json", json_path)
    if png is not None:
        report.plot(png)
        show(f"picture in {png}")
