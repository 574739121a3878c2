"""The demo's report in words, and report.html: one file that names no other file and no address."""

from __future__ import annotations

import shlex
from pathlib import Path

from hylora_kernels.evaluation.breadth import format_ratio
from hylora_kernels.experiments.demo import pictures
from hylora_kernels.experiments.demo.stages import (
    MAIN_COLUMNS,
    OTHER_COLUMNS,
    DemoReport,
    Stage,
)
from hylora_kernels.support.console import format_bytes, format_ppl, format_seconds
from hylora_kernels.support.storage import write_text
from hylora_kernels.text.mix import Part

TEMPLATES = Path(__file__).parent
NARROW = "\u202f"  # a narrow space that no line breaks at


def write(report: DemoReport, folder: Path) -> None:
    """Write stages.png and report.html to the folder."""
    pictures.png(report, folder / "stages.png")
    write_text(folder / "report.html", render(report, folder))


def render(report: DemoReport, folder: Path) -> str:
    """The page; folder: of the recovered models, for the commands on it."""
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template("report.html.j2").render(
        report=report,
        summary=summary(report),
        cautions=[one_text(report), control(report)],
        notes=notes(report),
        tables={
            "main": (MAIN_COLUMNS, report.cells(MAIN_COLUMNS)),
            "sizes": (OTHER_COLUMNS, report.cells(OTHER_COLUMNS)),
            "texts": report.breadth_table(),
            "seconds": report.seconds_table(),
            "ranks": pictures.rank_table(report),
        },
        recovered=[stage.label for stage in report.stages if stage.name == "HyLoRA"],
        pictures=pictures.pictures(report),
        samples=[stage for stage in report.stages if stage.sample is not None],
        commands=commands(folder),
        seconds=format_seconds(report.seconds),
        ppl=format_ppl,
    )


def summary(report: DemoReport) -> str:
    """The result in a sentence: what HyLoRA at keep 0.8 gains and loses against the dense model."""
    dense, best = report.stage("dense"), report.stage("HyLoRA 0.8")
    speed = f"{_times(best, dense)} as fast as the dense model"
    if best.optimized:
        speed += f" in transformers and {_times(best, report.stage('dense, optimised'))} as fast as"
        speed += " the dense model laid out the same way"
    return (
        f"At keep 0.8 the model has {_less(best.params_linear, dense.params_linear, 'fewer')} "
        f"parameters in its linears and takes {_less(best.bytes_total, dense.bytes_total, 'less')} "
        f"memory; perplexity {_change(dense.ppl, best.ppl)}, decoding is {speed}, and over "
        f"{len(best.breadth.texts)} texts perplexity is {_ratios(best)}."
    )


def one_text(report: DemoReport) -> str:
    """The reason for a mix of calibration texts, in figures."""
    alone, best = report.stage("HyLoRA, one text 0.8"), report.stage("HyLoRA 0.8")
    sources = ", ".join(part.name for part in report.data["calibration"])
    return (
        f"The calibration text decides what is kept: on {report.data['train']} alone, in as many "
        f"blocks, perplexity would be {_ratios(alone)}; on the mix ({sources}) it is "
        f"{_ratios(best)}."
    )


def bits(report: DemoReport) -> str:
    """What fewer bits cost, beside fewer parameters, in figures."""
    rows = ("4 bits, to nearest", "4 bits, GPTQ", "HyLoRA bits", "dense + LoRA, then bits")
    mixed, low = report.stage("HyLoRA bits"), report.stage("two-sided SVD, pivoted 0.8")
    found = "; ".join(f"{name}: {_point(report.stage(name))}" for name in rows)
    return (
        "weights as integers in groups of 64 along the input, a scale and a zero point a group. "
        "HyLoRA bits gives every matrix, embedding included, the bits that cost least by the "
        f"metric of the ranks; to nearest and GPTQ give all linears the same. {found}. Bits save "
        f"bytes, and so time a decoded token ({_point(mixed)}, against {_point(low)} untrained at "
        f"keep 0.8 in {_dtype(report)}); ranks save arithmetic: prefill, batches, training."
    )


def control(report: DemoReport) -> str:
    """The sentence that the summary must not be read without."""
    dense, trained = report.stage("dense"), report.stage("dense + LoRA (control)")
    return (
        "The recovery learns the dense model's predictions, not the text. To learn the text is "
        "adaptation: the control, the uncompressed model trained on its next tokens for as "
        f"many steps ({report.data['steps']['control']}), goes from {format_ppl(dense.ppl)} to "
        f"{format_ppl(trained.ppl)}, and over all texts to {_ratios(trained)}."
    )


def notes(report: DemoReport) -> dict[str, str]:
    """How to read the table: term -> a sentence or two."""
    texts, env = report.data["texts"], report.environment
    found = {
        "Perplexity": f"lower is better. It is over {texts[0]['tokens']:,} tokens of "
        f"{texts[0]['name']}: {texts[0]['blocks']} blocks of {texts[0]['length']}, every token but "
        "each block's first predicted and counted. Other blocks give other levels.",
        "Mean ratio": "the geometric mean over several texts of perplexity over the dense model's: "
        f"{'; '.join(_amount(text) for text in texts)}. No calibration text holds these blocks; "
        "self is text that the dense model writes.",
        "Calibration": "; ".join(map(_part, report.data["calibration"])) + ".",
        "Size": "keep and removed are shares of the parameters of all linears but the output head, "
        "biases excluded, adapters merged. memory and all count everything, embeddings included; "
        "trained are the adapters' parameters before they were merged.",
        "Control": control(report),
        "Bits": bits(report),
        "Speed": f"tokens per second at batch 1, a prompt of 128, 32 new tokens, {env.threads} "
        f"threads on {env.devices[-1].model}, one short measurement each. "
        + _layout(report.stage("HyLoRA 0.8")),
    }
    if report.predictions():
        found["Prediction"] = (
            "the metric of ranks and bits says what they cost, in nats a token over the dense "
            "model's and without the refit; what is measured is the mean over all texts: "
            + "; ".join(
                f"{label}: {predicted:.3f} predicted, {measured:.3f} measured"
                for label, predicted, measured in report.predictions()
            )
            + "."
        )
    if report.model["package"]:
        size = format_bytes(report.model["package_file_bytes"])
        found["Baseline"] = (
            f"the dense model is not the original one but the 4-bit one (Q4_1, {size}) of the "
            f"package {report.model['package']}, dequantised and stored as {_dtype(report)}. Its "
            "groups have 32 weights: a format with the same groups finds its grid again and looks "
            "lossless on this model. Groups of 64, as here, do not."
        )
    return found


def commands(folder: Path) -> list[tuple[str, str]]:
    """(purpose, command line) of what to try next."""
    model = shlex.quote(str(folder / "hylora-0.8"))
    return [
        ("Let the recovered model write", f'hylora generate {model} "Once upon a time"'),
        ("Measure it on your text", f"hylora evaluate {model} --data my.txt"),
        ("Compress your own model", "hylora compress MODEL --out small --keep 0.8"),
        ("and recover it", "hylora finetune small --out recovered --data my.txt"),
        ("Compare keeps", "hylora sweep MODEL --out runs/sweep --keep 0.9,0.8,0.6"),
    ]


def _less(after: float, before: float, less: str) -> str:
    """The change in whole percent: "20 % fewer", "3 % more"."""
    percent = round(100 * (1 - after / before))
    return f"{abs(percent)}{NARROW}% {less if percent >= 0 else 'more'}"


def _times(stage: Stage, other: Stage) -> str:
    """How many times as fast `stage` decodes: "2.3 ×"."""
    return f"{stage.decode_tok_s / other.decode_tok_s:.1f}{NARROW}×"


def _change(before: float, after: float) -> str:
    """For instance "rises from 14.72 to 27.47"."""
    before, after = format_ppl(before), format_ppl(after)
    if before == after:
        return f"stays at {after}"
    return f"{'rises' if float(after) > float(before) else 'falls'} from {before} to {after}"


def _point(stage: Stage) -> str:
    """For instance "80.0 MB at 47.73"."""
    return f"{format_bytes(stage.bytes_total)} at {format_ppl(stage.ppl)}"


def _dtype(report: DemoReport) -> str:
    """The dtype of the models, for instance "bfloat16"."""
    return str(report.model["dtype"]).removeprefix("torch.")


def _layout(best: Stage) -> str:
    if not best.optimized:
        return "The layers run in plain torch products here."
    return (
        "Compressed models are laid out for this processor (optimize_for_inference), dense ones "
        "run as in transformers. The row dense, optimised is the dense model laid out the same "
        "way: what a compressed model gains over that is compression's own."
    )


def _ratios(stage: Stage) -> str:
    """For instance "1.12 times the dense model's in the mean and 1.30 times on code"."""
    worst = max(stage.breadth.texts, key=lambda text: text.ratio)
    return (
        f"{format_ratio(stage.breadth.geometric_mean)} times the dense model's in the mean and "
        f"{format_ratio(worst.ratio)} times on {worst.name}"
    )


def _amount(text: dict) -> str:
    return f"{text['tokens']:,} tokens of {text['name']}"


def _part(part: Part) -> str:
    return f"{part.blocks} blocks of {part.name}"
