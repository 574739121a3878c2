"""The command `hylora evaluate`: a model on texts, or several models on tasks."""

# No `from __future__ import annotations`: typer reads the annotations themselves.

import inspect
from pathlib import Path
from typing import Annotated, Any

from hylora_kernels.cli.model_commands import load
from hylora_kernels.cli.options import (
    Argument,
    Device,
    Dtype,
    Json,
    Optimize,
    Option,
    Revision,
    Text,
    Tokenizer,
    TrustRemoteCode,
    read_texts,
)
from hylora_kernels.cli.output import trainable_line, write_report
from hylora_kernels.support.console import show


def evaluate(
    model: Annotated[
        list[str],
        Argument(
            metavar="MODEL...",
            help="Hub id, folder, .gguf file, or smollm2-135m (the model of the demo); several "
            "with --tasks.",
        ),
    ],
    data: Text = "brown",
    test: Annotated[
        str | None, Option(help="Another text, measured whole in place of a part of --data.")
    ] = None,
    split: Annotated[
        str,
        Option(
            help="Part of the text: test (of a file its last tenth), train, all, or a split of a "
            "hub data set."
        ),
    ] = "test",
    texts: Annotated[
        list[str] | None,
        Option(
            help="Several texts in place of --data, with commas between or repeated; self is text "
            "that the dense model writes."
        ),
    ] = None,
    dense: Annotated[
        str | None,
        Option(help="The model that was compressed, given as MODEL: ratios to its perplexities."),
    ] = None,
    png: Annotated[Path | None, Option(help="Draw the ratios to this file.")] = None,
    tasks: Annotated[
        list[str] | None,
        Option(
            help="In place of texts: tasks of lm-evaluation-harness, patterns or .yaml files, with "
            "commas between or repeated; small is three small ones that need no download."
        ),
    ] = None,
    shots: Annotated[
        int | None,
        Option(min=0, help="With --tasks: examples in a prompt. By default what the task says."),
    ] = None,
    markdown: Annotated[
        Path | None, Option(help="With --tasks: also write the table to this file, as Markdown.")
    ] = None,
    column: Annotated[str | None, Option(help="Column of a table to read.")] = None,
    length: Annotated[
        int | None,
        Option(
            min=2,
            help="Tokens in a block. By default 2048, or what model and text allow; with --texts "
            "or --dense 512.",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        Option(
            min=1,
            help="Most blocks of a text, or examples of a task, to measure on. By default all, "
            "with --texts or --dense 8.",
        ),
    ] = None,
    batch: Annotated[int, Option(min=1, help="Blocks, or requests, in one forward.")] = 4,
    speed: Annotated[
        bool, Option("--speed/--no-speed", help="Also measure tokens per second.")
    ] = True,
    optimize: Optimize = True,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    tokenizer: Tokenizer = None,
    trust_remote_code: TrustRemoteCode = False,
    json_path: Json = None,
) -> None:
    """Perplexity on a text or several, size and speed of a model; or scores of models on tasks."""
    if tasks:
        of_texts = {"data": data, "test": test, "split": split, "texts": texts, "dense": dense}
        of_texts |= {"png": png, "column": column, "length": length, "speed": speed}
        _refuse_given(of_texts, "is not read with --tasks")
        on_tasks(
            model,
            read_texts(tasks) or [],
            markdown,
            json_path,
            tokenizer,
            limit=limit,
            num_fewshot=shots,
            batch=batch,
            optimize=optimize,
            device=device,
            dtype=dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        return
    from hylora_kernels.evaluation.evaluate import evaluate as measure

    _refuse_given({"shots": shots, "markdown": markdown}, "is read with --tasks alone")
    if len(model) > 1:
        raise ValueError(f"model must be one, or several with --tasks, got {', '.join(model)}")
    if png is not None and dense is None:
        raise ValueError("--png draws ratios to a dense model: give --dense")
    (name,) = model
    loaded, read = load(name, device, dtype, trust_remote_code, revision, tokenizer)
    report = measure(
        loaded,
        data,
        read,
        length=length,
        limit=limit,
        split=split,
        batch=batch,
        speed=speed,
        path=name if Path(name).is_dir() else None,
        optimize=optimize and loaded.device.type == "cpu",
        column=column,
        test=test,
        texts=read_texts(texts or []),
        dense=dense,
    )
    show(report.render())
    show(trainable_line(loaded))
    if png is not None and report.breadth is not None:
        report.breadth.plot(png)
        show(f"picture in {png}")
    write_report(report, json_path)


def on_tasks(
    models: list[str],
    tasks: list[str],
    markdown: Path | None,
    json_path: Path | None,
    tokenizer: str | None,
    **options: Any,
) -> None:
    """Print and write the models' scores; options: evaluate_tasks()'s."""
    from hylora_kernels.integrations.lm_eval import evaluate_tasks
    from hylora_kernels.model.load import load_tokenizer

    read = load_tokenizer(tokenizer) if tokenizer else None
    report = evaluate_tasks(models, tasks, tokenizer=read, **options)
    show(report.render())
    if markdown is not None:
        report.save_markdown(markdown)
        show(f"table in {markdown}")
    write_report(report, json_path)


def _refuse_given(options: dict[str, Any], why: str) -> None:
    """Raise ValueError naming the first of evaluate's options that isn't its default."""
    parameters = inspect.signature(evaluate).parameters
    for name, value in options.items():
        if value != parameters[name].default:
            raise ValueError(f"{name} {why}")
