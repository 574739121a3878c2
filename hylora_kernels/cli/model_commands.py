"""The commands behind `hylora` that work on a model: one typed function a verb, which loads, calls
the library, prints and writes. Everything heavy is imported by the verb that needs it, so that
--help is quick."""

# No `from __future__ import annotations`: typer reads the annotations themselves.

from pathlib import Path
from typing import Annotated

import typer

from hylora_kernels.cli.options import (
    Argument,
    Batch,
    Calibration,
    Compressed,
    Device,
    Dtype,
    Exclude,
    Factorizer,
    Form,
    Include,
    Json,
    Length,
    LoraRank,
    Memory,
    Method,
    Model,
    Multiple,
    Optimize,
    Option,
    Out,
    Ranks,
    Refit,
    Samples,
    Seed,
    Text,
    claim,
    numbers_option,
    ranks_option,
    size_option,
    write_report,
)
from hylora_kernels.support.console import (
    format_bytes,
    format_seconds,
    kept_table,
    report_lines,
    show,
)
from hylora_kernels.support.storage import require_disk


def compress(
    model: Model,
    out: Out,
    keep: Annotated[float, Option(help="Fraction of the linears' parameters that stays.")] = 0.8,
    method: Method = "two_sided",
    ranks: Ranks = "global",
    lora_rank: LoraRank = 64,
    init: Annotated[
        str, Option(help="Adapters start from: next (components) or classic.")
    ] = "next",
    form: Form = "pivoted",
    factorizer: Factorizer = "gram",
    rank_multiple: Multiple = 16,
    include: Include = None,
    exclude: Exclude = None,
    count: Annotated[
        str, Option(help="Budget for adapters merged or as_is (separate).")
    ] = "merged",
    calibration: Calibration = "brown",
    samples: Samples = 128,
    length: Length = 512,
    max_memory: Memory = None,
    refit: Refit = None,
    cache: Annotated[
        bool, Option("--cache/--no-cache", help="Keep and reuse finished work.")
    ] = True,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    json_path: Json = None,
) -> None:
    """Replace a model's linears by low-rank ones and write the smaller model to a folder."""
    from hylora_kernels.compression.compress import compress as compress_model
    from hylora_kernels.model import checkpoint

    claim(out, model)
    policy, memory = ranks_option(ranks), size_option(max_memory, "max-memory")
    loaded, tokenizer = _load(model, device, dtype)
    require_disk(out, _bytes(loaded), f"the compressed model in {out}")
    loaded, report = compress_model(
        loaded,
        keep=keep,
        calibration=calibration,
        method=method,
        ranks=policy,
        lora_rank=lora_rank,
        init=init,
        form=form,
        factorizer=factorizer,
        refit=refit,
        rank_multiple=rank_multiple,
        include=include or None,
        exclude=exclude or None,
        count=count,
        samples=samples,
        length=length,
        max_memory=memory,
        tokenizer=tokenizer,
        cache=cache,
        seed=seed,
    )
    checkpoint.save_pretrained(loaded, out, tokenizer)
    whole = report.model_parameters, report.model_parameters_as_is
    counts = {
        "linears": (report.dense_parameters, report.parameters, report.parameters_as_is),
        "whole model": (report.model_dense_parameters, *whole),
    }
    show(kept_table(counts))
    show(report_lines(loaded))
    seconds = ", ".join(f"{stage} {format_seconds(s)}" for stage, s in report.seconds.items())
    show(f"time: {seconds}; peak memory {format_bytes(report.peak_rss)}")
    write_report(report, out / "compress.json", json_path)
    show(f"written to {out}. Next: hylora finetune {out} --out {out}-recovered")


def finetune(
    model: Compressed,
    out: Out,
    data: Text = "brown",
    steps: Annotated[int, Option(help="Updates; a step takes batch * accumulate blocks.")] = 60,
    lr: Annotated[float | None, Option(help="Peak learning rate; by default by steps.")] = None,
    warmup: Annotated[int | None, Option(help="Steps of warm-up; by default by steps.")] = None,
    length: Length = 512,
    batch: Batch = 1,
    accumulate: Annotated[int, Option(help="Batches a step.")] = 1,
    clip: Annotated[float, Option(help="Largest norm of the gradient.")] = 1.0,
    chunk: Annotated[int, Option(help="Tokens at once through the output head.")] = 64,
    distill: Annotated[float, Option(help="Share of the loss against --teacher.")] = 0.0,
    teacher: Annotated[str | None, Option(help="The dense model to distil from.")] = None,
    merge: Annotated[bool, Option("--merge/--no-merge", help="Fold the adapters in.")] = True,
    gradient_checkpointing: Annotated[
        bool, Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    save_every: Annotated[int | None, Option(help="Steps between checkpoints.")] = None,
    resume: Annotated[bool, Option("--resume/--restart", help="Go on from a checkpoint.")] = True,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    json_path: Json = None,
) -> None:
    """Train the adapters of a compressed model and write the recovered model to a folder."""
    from hylora_kernels.model import checkpoint
    from hylora_kernels.recovery.finetune import finetune as train

    claim(out, model, mark="training")
    loaded, tokenizer = _load(model, device, dtype)
    require_disk(out, _bytes(loaded), f"the recovered model in {out}")
    report = train(
        loaded,
        data,
        tokenizer,
        steps=steps,
        lr=lr,
        warmup=warmup,
        length=length,
        batch=batch,
        accumulate=accumulate,
        clip=clip,
        chunk=chunk,
        distill=distill,
        teacher=_load(teacher, device, dtype)[0] if teacher else None,
        merge=merge,
        gradient_checkpointing=gradient_checkpointing,
        output_dir=out / "training",
        save_every=save_every,
        resume=resume,
        seed=seed,
    )
    checkpoint.save_pretrained(loaded, out, tokenizer)
    show(f"trained {report.trainable:,} / total {report.total:,} parameters")
    show(report_lines(loaded))
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


def evaluate(
    model: Model,
    data: Text = "brown",
    split: Annotated[str, Option(help="test or train.")] = "test",
    length: Length = 2048,
    limit: Annotated[int | None, Option(help="At most so many blocks; by default all.")] = None,
    batch: Batch = 4,
    speed: Annotated[bool, Option("--speed/--no-speed", help="Measure tokens a second.")] = True,
    optimize: Optimize = True,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json_path: Json = None,
) -> None:
    """Perplexity on a text, true size, and speed of a model, dense or compressed."""
    from hylora_kernels.evaluation.evaluate import evaluate as measure

    loaded, tokenizer = _load(model, device, dtype)
    path = model if Path(model).is_dir() else None
    on_cpu = loaded.device.type == "cpu"
    report = measure(
        *(loaded, data, tokenizer, length, limit, split, batch, speed, path),
        optimize=optimize and on_cpu,
    )
    show(report.render())
    show(report_lines(loaded))
    write_report(report, json_path)


def generate(
    model: Model,
    prompt: Annotated[str, Argument(metavar="PROMPT", help="What to go on from.")],
    chat: Annotated[bool, Option("--chat", help="Put the prompt into the chat template.")] = False,
    max_new_tokens: Annotated[int, Option(help="At most so many tokens.")] = 64,
    temperature: Annotated[float, Option(help="0: always the likeliest token.")] = 0.0,
    top_p: Annotated[float, Option(help="Of the likeliest tokens with this share.")] = 1.0,
    optimize: Optimize = True,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    json_path: Json = None,
) -> None:
    """Continue a prompt; the text is printed as it comes."""
    from hylora_kernels.inference.generate import generate as write
    from hylora_kernels.inference.optimize import optimize_for_inference

    loaded, tokenizer = _load(model, device, dtype)
    typer.echo(report_lines(loaded), err=True)
    if optimize and loaded.device.type == "cpu":
        optimize_for_inference(loaded)
    text = write(
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


def analyze(
    model: Model,
    method: Annotated[str, Option(help="svd: the weights alone; or whitened, two_sided.")] = "svd",
    include: Include = None,
    exclude: Exclude = None,
    calibration: Calibration = "brown",
    samples: Samples = 128,
    length: Length = 512,
    png: Annotated[Path | None, Option(help="Draw the spectra there.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    json_path: Json = None,
) -> None:
    """Singular spectra of a model's linears: how much energy which rank keeps, what it costs."""
    from hylora_kernels.compression.spectrum import analyze_spectrum

    loaded, tokenizer = _load(model, device, dtype)
    report = analyze_spectrum(
        loaded,
        method,
        calibration,
        include or None,
        exclude or None,
        samples,
        length,
        tokenizer,
        seed=seed,
    )
    show(report.render())
    show(report_lines(loaded))
    if png is not None:
        report.plot(png)
        show(f"picture in {png}")
    write_report(report, json_path)


def sweep(
    model: Model,
    out: Annotated[Path, Option(help="Folder of the cells, the table and the picture.")],
    keep: Annotated[str, Option(help="Keeps, with commas between.")] = "0.9,0.8,0.6",
    lora_rank: Annotated[str, Option(help="Adapter ranks, with commas between.")] = "0,16,64",
    rank: Annotated[str | None, Option(help="Plain ranks of all linears instead of keeps.")] = None,
    method: Method = "two_sided",
    ranks: Annotated[str, Option(help="global, uniform or energy.")] = "global",
    form: Form = "pivoted",
    factorizer: Factorizer = "gram",
    rank_multiple: Multiple = 16,
    include: Include = None,
    exclude: Exclude = None,
    calibration: Calibration = "brown",
    samples: Samples = 128,
    length: Length = 512,
    max_memory: Memory = None,
    refit: Refit = None,
    steps: Annotated[int, Option(help="Recovery steps a cell with adapters; 0: none.")] = 0,
    data: Text = "brown",
    limit: Annotated[int | None, Option(help="Evaluate on at most so many blocks.")] = 16,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    json_path: Json = None,
) -> None:
    """A table of perplexity and size over keeps (or ranks) and adapter ranks; resumable."""
    from hylora_kernels.experiments.sweep import sweep as run

    report = run(
        model,
        output_dir=out,
        keep=numbers_option(keep, float, "keep"),
        lora_rank=numbers_option(lora_rank, int, "lora-rank"),
        rank=None if rank is None else numbers_option(rank, int, "rank"),
        data=data,
        length=length,
        limit=limit,
        steps=steps,
        device=device,
        dtype=dtype,
        seed=seed,
        method=method,
        ranks=ranks,
        form=form,
        factorizer=factorizer,
        rank_multiple=rank_multiple,
        include=include or None,
        exclude=exclude or None,
        calibration=calibration,
        samples=samples,
        max_memory=size_option(max_memory, "max-memory"),
        refit=refit,
    )
    show(report.render())
    write_report(report, json_path)
    show(f"written to {out}: sweep.json, sweep.png")


def demo(
    out: Annotated[Path, Option(help="Folder of the report and the recovered models.")] = Path(
        "runs/demo"
    ),
    samples: Samples = 48,
    steps: Annotated[int, Option(help="Recovery steps at keep 0.8, and of the control.")] = 30,
    deep_steps: Annotated[int, Option(help="Recovery steps at keep 0.6.")] = 50,
    fresh: Annotated[bool, Option("--fresh", help="Measure again what is there.")] = False,
    device: Device = "auto",
    seed: Seed = 0,
    json_path: Json = None,
) -> None:
    """The whole method on a real 135M model: compress, recover, measure; ten to twenty minutes."""
    from hylora_kernels.experiments.demo import page as demo_page
    from hylora_kernels.experiments.demo.run import STAGES
    from hylora_kernels.experiments.demo.run import demo as run

    claim(out, "", mark=STAGES)
    report = run(
        out,
        seed=seed,
        samples=samples,
        steps=steps,
        deep_steps=deep_steps,
        fresh=fresh,
        device=device,
    )
    show(report.render())
    show(demo_page.summary(report))
    for term, note in demo_page.notes(report).items():
        show(f"- {term}: {note}")
    show(f"written to {out}: report.html, report.json, stages.png, hylora-0.8, hylora-0.6")
    show(f"Next: hylora generate {out / 'hylora-0.8'} 'Once upon a time'")
    write_report(report, json_path)


# ---------------------------------------------------------------------------------- what they share


def _load(model: str, device: str, dtype: str):
    from hylora_kernels.model.load import load_model

    return load_model(model, device, dtype)


def _bytes(model) -> int:
    return sum(p.nbytes for p in model.parameters())
