"""The demonstration's result to look at: its notes in words, its pictures, and report.html."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hylora_kernels.experiments.demo.stages import HEADINGS, DemoReport, Stage
from hylora_kernels.support.console import format_bytes, format_ppl, format_seconds
from hylora_kernels.support.plots import embedded_svg, loss_plot, stages_plot
from hylora_kernels.support.storage import write_text

TEMPLATES = Path(__file__).parent


def write(report: DemoReport, folder: Path) -> None:
    """stages.png, and report.html with everything in it: it names no other file and no address."""
    import jinja2

    title = f"{report.model['name']}: perplexity on {report.data['test']['name']}"
    rows = [stage.to_dict() for stage in report.stages]
    stages_plot(rows, folder / "stages.png", title)
    curves = {stage.label: stage.losses for stage in report.stages if stage.losses}
    with tempfile.TemporaryDirectory() as temporary:
        stages_plot(rows, Path(temporary) / "stages.svg")
        loss_plot(curves, Path(temporary) / "losses.svg")
        pictures = {
            name: embedded_svg(Path(temporary) / f"{name}.svg") for name in ("stages", "losses")
        }
    loader = jinja2.FileSystemLoader(TEMPLATES)
    page = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = page.get_template("report.html.j2").render(
        report=report,
        headings=HEADINGS,
        rows=[stage.cells() for stage in report.stages],
        pictures=pictures,
        notes=notes(report),
        seconds=format_seconds(report.seconds),
        samples=[stage for stage in report.stages if stage.sample is not None],
        ppl=format_ppl,
    )
    write_text(folder / "report.html", text)


def notes(report: DemoReport) -> list[str]:
    """What a reader must know to take the table for what it is, each in a sentence or two."""
    stages = {stage.label: stage for stage in report.stages}
    test, other = report.data["test"], report.data["out_of_domain"]
    steps = report.data["steps"]
    found = [
        f"Perplexity is over {test['tokens']:,} tokens of {test['name']}: {test['blocks']} blocks "
        f"of {test['length']}, every token but each block's first predicted and counted; out of "
        f"domain over {other['tokens']:,} of {other['name']}. Other blocks give other levels.",
        "keep and removed are of the parameters of all linears but the output head, biases "
        "excluded, adapters merged; 'all' and 'memory' count everything, embeddings included. "
        "'trained' are the adapters' parameters, before they were merged.",
    ]
    if report.model["package"]:
        size = format_bytes(report.model["package_file_bytes"])
        found.append(
            f"The dense baseline is not the original model but the 4-bit one (Q4_1, {size}) of the "
            f"package {report.model['package']}, dequantised and stored as bfloat16."
        )
    int8, low = stages["dense int8"], stages["two-sided SVD, pivoted 0.8"]
    found.append(
        "dense int8 is rounded to nearest, weights only, in groups of 64 along the input, and only "
        "simulated: its bytes are what it would take, and its speed is not measured. "
        + _compare(int8, low)
    )
    control, best = stages["dense + LoRA (control)"], stages["HyLoRA 0.8"]
    found.append(
        f"Part of every recovery is adaptation to the text: the untouched model with adapters "
        f"trained as long ({steps['control']} steps) gets from {_both(stages['dense'])} to "
        f"{_both(control)}, out of domain in brackets; HyLoRA 0.8 to {_both(best)}."
    )
    env = report.environment
    found.append(
        f"Tokens a second: batch 1, a prompt of 128, 32 new tokens, on {env.devices[-1].model}, "
        f"{env.threads} threads; "
        + (
            "compressed models optimised (optimize_for_inference), dense ones as transformers runs "
            "them."
            if best.optimized
            else "the layers run in plain torch products here."
        )
    )
    return found


def _compare(int8: Stage, low: Stage) -> str:
    """int8 against the compressed, untrained model at 0.8, whichever of them wins."""
    figures = (
        f"{format_bytes(int8.bytes_total)} at {format_ppl(int8.ppl)}, against "
        f"{format_bytes(low.bytes_total)} at {format_ppl(low.ppl)} for {low.label} in bfloat16"
    )
    if int8.bytes_total < low.bytes_total and int8.ppl < low.ppl:
        return (
            f"It beats untrained low rank in size and quality ({figures}): here low rank saves "
            "products and bandwidth at a given dtype, and adds to int8, rather than replacing it."
        )
    return f"It takes {figures}."


def _both(stage: Stage) -> str:
    return f"{format_ppl(stage.ppl)} ({format_ppl(stage.ppl_out_of_domain)})"
