"""The commands of `hylora` that work on a model. Each one loads, calls the library, prints, writes.

A command imports what it needs in its body, so that --help stays quick.
"""

# No `from __future__ import annotations`: typer reads the annotations themselves.

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hylora_kernels.cli.options import (
    Argument,
    CompressedModel,
    Device,
    Dtype,
    Json,
    Model,
    Optimize,
    Option,
    Out,
    Overwrite,
    Revision,
    Seed,
    Tokenizer,
    TrustRemoteCode,
    library_options,
    refuse_foreign_folder,
)
from hylora_kernels.cli.output import trainable_line, write_report
from hylora_kernels.compression.options import CompressOptions
from hylora_kernels.experiments.options import SweepOptions
from hylora_kernels.recovery.options import FinetuneOptions
from hylora_kernels.support.console import (
    format_bytes,
    format_seconds,
    show,
)
from hylora_kernels.support.storage import require_disk

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@library_options(FinetuneOptions, without=("tokenizer", "output_dir", "progress", "on_step"))
def finetune(
    model: CompressedModel,
    out: Out,
    *,
    options: dict[str, Any],
    overwrite: Overwrite = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    tokenizer: Tokenizer = None,
    trust_remote_code: TrustRemoteCode = False,
    json_path: Json = None,
) -> None:
    """Train a compressed model's adapters or factors and write the recovered model to a folder."""
    from accelerate import PartialState

    from hylora_kernels.model.saving import save_pretrained
    from hylora_kernels.recovery.finetune import finetune as train

    process = PartialState(cpu=device == "cpu")  # Each process of torchrun gets a GPU of its own.
    if process.is_main_process:
        refuse_foreign_folder(out, model, mark="training", overwrite=overwrite)
    home = "cpu" if options["shard"] else device  # Shards go to the GPUs in training.
    loaded, tokenizer = load(model, home, dtype, trust_remote_code, revision, tokenizer)
    require_disk(out, parameter_bytes(loaded), f"the recovered model in {out}")
    if teacher := options.pop("teacher"):
        kind = str(loaded.device), str(loaded.dtype).removeprefix("torch.")
        options["teacher"] = lambda: load(teacher, *kind, trust_remote_code)[0]
    report = train(
        loaded,
        tokenizer=tokenizer,
        output_dir=out / "training",
        **options,
    )
    if not process.is_main_process:
        return
    save_pretrained(loaded, out, tokenizer, overwrite=overwrite)
    show(f"trained {report.trainable:,} / total {report.total:,} parameters on {report.text}")
    if report.fits:
        means = (statistics.fmean(getattr(f, n) for f in report.fits) for n in ("before", "after"))
        show("mean error of the blocks: {:.4f} before, {:.4f} after".format(*means))
    elif report.teacher:
        show(
            f"teacher {report.teacher}: {format_seconds(report.teacher_seconds)}, its states take "
            f"{format_bytes(report.teacher_bytes)} in the cache"
        )
    if report.losses:
        show(
            f"{report.steps} steps, {report.tokens:,} tokens in {format_seconds(report.seconds)} "
            f"({report.tokens_per_second:.0f} tokens/s): loss {report.first_loss:.3f} to "
            f"{report.last_loss:.3f}"
        )
    write_report(report, out / "finetune.json", json_path)
    if report.stopped:
        raise FloatingPointError(f"{report.stopped}; the last good state is written to {out}")
    show(f"written to {out}. Next: hylora evaluate {out}")


def generate(
    model: Model,
    prompt: Annotated[str, Argument(metavar="PROMPT", help="Text to continue.")],
    chat: Annotated[
        bool, Option("--chat", help="Put the prompt into the model's chat template.")
    ] = False,
    max_new_tokens: Annotated[int, Option(min=1, help="Most tokens to generate.")] = 64,
    temperature: Annotated[
        float, Option(help="Temperature of sampling; 0: always the likeliest token.")
    ] = 0.0,
    top_p: Annotated[
        float, Option(help="Sample from the likeliest tokens with this share of probability.")
    ] = 1.0,
    optimize: Optimize = True,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    tokenizer: Tokenizer = None,
    seed: Seed = 0,
    trust_remote_code: TrustRemoteCode = False,
    json_path: Json = None,
) -> None:
    """Continue a prompt; the text is printed as it is generated."""
    from hylora_kernels.inference.generate import generate as continue_text
    from hylora_kernels.inference.optimize import optimize_for_inference

    loaded, tokenizer = load(model, device, dtype, trust_remote_code, revision, tokenizer)
    typer.echo(trainable_line(loaded), err=True)
    if optimize and loaded.device.type == "cpu":
        optimize_for_inference(loaded)
    text = continue_text(
        loaded,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        chat=chat,
        seed=seed,
        stream=lambda piece: typer.echo(piece, nl=False),
    )
    typer.echo()
    write_report({"prompt": prompt, "text": text, "model": model}, json_path)


@library_options(
    CompressOptions,
    only=(
        *("include", "exclude", "calibration", "split", "column"),
        *("samples", "length", "seed"),
    ),
)
def analyze(
    model: Model,
    *,
    method: Annotated[
        str,
        Option(
            help="svd: the weights alone; whitened or two_sided: in the norm in which compress "
            "truncates."
        ),
    ] = "svd",
    options: dict[str, Any],
    lora: Annotated[
        bool, Option("--lora", help="Print the size of a LoRA by its rank, in place of spectra.")
    ] = False,
    png: Annotated[Path | None, Option(help="Draw the spectra to this file.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    tokenizer: Tokenizer = None,
    trust_remote_code: TrustRemoteCode = False,
    json_path: Json = None,
) -> None:
    """Singular spectra of a model's linears: which rank keeps how much energy, and its cost."""
    from hylora_kernels.compression.spectrum import analyze_spectrum
    from hylora_kernels.model.adapters import lora_sizes

    if lora and png is not None:
        raise ValueError("--png draws spectra: leave it out with --lora")
    loaded, tokenizer = load(model, device, dtype, trust_remote_code, revision, tokenizer)
    if lora:
        sizes = lora_sizes(loaded, include=options["include"], exclude=options["exclude"])
        show(sizes.render())
        write_report(sizes, json_path)
        return
    report = analyze_spectrum(loaded, method, tokenizer=tokenizer, **options)
    show(report.render())
    show(trainable_line(loaded))
    if png is not None:
        report.plot(png)
        show(f"picture in {png}")
    write_report(report, json_path)


@library_options(
    SweepOptions,
    without=(
        *("output_dir", "tokenizer", "device", "dtype", "revision", "progress"),
        *("init", "count", "refit_samples", "cache"),
    ),
)
def sweep(
    model: Model,
    out: Annotated[Path, Option(help="Folder of the cells, the table and the picture.")],
    *,
    options: dict[str, Any],
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    tokenizer: Tokenizer = None,
    json_path: Json = None,
) -> None:
    """A table of perplexity and size over keeps (or ranks) and adapter ranks; resumable."""
    from hylora_kernels.experiments.sweep import sweep as run
    from hylora_kernels.model.load import load_tokenizer
    from hylora_kernels.text.mix import calibrated_on

    report = run(
        model,
        out,
        tokenizer=load_tokenizer(tokenizer) if tokenizer else None,
        device=device,
        dtype=dtype,
        revision=revision,
        **options,
    )
    show(report.render())
    if report.sources:
        show(calibrated_on(report.sources))
    write_report(report, json_path)
    show(f"written to {out}: sweep.json, sweep.png")


def demo(
    out: Annotated[Path, Option(help="Folder of the report and the recovered models.")] = Path(
        "runs/demo"
    ),
    samples: Annotated[
        int,
        Option(
            min=1,
            help="Calibration blocks of Brown, beside half as many of self, a quarter of stdlib.",
        ),
    ] = 16,
    steps: Annotated[
        int,
        Option(min=1, help="Recovery steps at keep 0.8, and of the control without compression."),
    ] = 20,
    deep_steps: Annotated[int, Option(min=1, help="Recovery steps at keep 0.6.")] = 40,
    fresh: Annotated[
        bool, Option("--fresh", help="Repeat the stages that are already measured.")
    ] = False,
    device: Device = "auto",
    dtype: Annotated[
        str, Option(help="bfloat16, float16, float32, or auto: bfloat16 where it is fast here.")
    ] = "auto",
    seed: Seed = 0,
    json_path: Json = None,
) -> None:
    """The whole method on a real 135M model: compress, recover, measure; tens of minutes."""
    from hylora_kernels.experiments.demo import page as demo_page
    from hylora_kernels.experiments.demo.run import STAGES
    from hylora_kernels.experiments.demo.run import demo as run

    refuse_foreign_folder(out, "", mark=STAGES)
    report = run(
        out,
        seed=seed,
        samples=samples,
        steps=steps,
        deep_steps=deep_steps,
        fresh=fresh,
        device=device,
        dtype=dtype,
    )
    show(report.render())
    for words in (demo_page.summary(report), demo_page.one_text(report)):
        show(words)
    for term, note in demo_page.notes(report).items():
        show(f"- {term}: {note}")
    show(f"written to {out}: report.html, report.json, stages.png, hylora-0.8, hylora-0.6")
    show(f"Next: hylora generate {out / 'hylora-0.8'} 'Once upon a time'")
    write_report(report, json_path)


def load(
    model: str,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    revision: str | None = None,
    tokenizer: str | None = None,
    by_block: bool = False,
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase | None"]:
    from hylora_kernels.model.load import load_model, load_tokenizer

    other = load_tokenizer(tokenizer) if tokenizer else None
    trust = {"trust_remote_code": trust_remote_code, "revision": revision}
    loaded, own = load_model(model, device, dtype, by_block=by_block, **trust)
    return loaded, own if other is None else other


def parameter_bytes(model: "PreTrainedModel") -> int:
    return sum(p.nbytes for p in model.parameters())
