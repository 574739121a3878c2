"""The demo: what each part of the method does to a real model, every number measured here.

Each stage loads the dense model, makes its own model of it, measures that, and becomes a line of
stages.jsonl: an interrupted demo continues after the last finished stage, and a finished one only
prints its report again. Lines of another version of the package, or of other settings, are ignored.
"""

from __future__ import annotations

import json
import shutil
import time
from importlib.metadata import distribution
from pathlib import Path

from hylora_kernels.evaluation.breadth import compare
from hylora_kernels.evaluation.perplexity import perplexity
from hylora_kernels.evaluation.size import model_size
from hylora_kernels.evaluation.speed import throughput
from hylora_kernels.experiments.demo import page as demo_page
from hylora_kernels.experiments.demo.recipes import RECIPES, Recipe, Setup
from hylora_kernels.experiments.demo.stages import DemoReport, Settings, Stage
from hylora_kernels.inference.generate import generate
from hylora_kernels.inference.optimize import optimize_for_inference
from hylora_kernels.machine.info import environment
from hylora_kernels.model import load as models
from hylora_kernels.model.modules import parameter_count
from hylora_kernels.support import storage
from hylora_kernels.support.cache import cache_root
from hylora_kernels.support.console import (
    format_bytes,
    format_ppl,
    format_seconds,
    report_lines,
)
from hylora_kernels.support.timing import timed

STAGES = "stages.jsonl"
# With the demo's own model: four sets of factors and three of refits; two models and checkpoints
# in float32.
CACHE_BYTES, FOLDER_BYTES = 3_500_000_000, 1_700_000_000


def demo(
    output_dir: str | Path = "runs/demo", progress: bool = True, fresh: bool = False, **settings
) -> DemoReport:
    """Run all stages, or those that are missing (with `fresh`, all), and write report.json,
    report.html, stages.png and the recovered models hylora-0.8 and hylora-0.6 to output_dir.

    settings: the fields of Settings, e.g. seed, samples, steps, deep_steps, model.
    """
    folder, file = Path(output_dir), Path(output_dir) / STAGES
    setup = Setup(Settings(**settings), folder, progress)
    key = setup.key()
    done = {} if fresh else _finished(file, key, setup)
    if not done:
        _check_disk(setup)
        shutil.rmtree(folder / "training", ignore_errors=True)  # checkpoints of other settings
    _rewrite(file, key, done)
    for place, recipe in enumerate(RECIPES, 1):
        title = f"[{place}/{len(RECIPES)}] {recipe.label}"
        if recipe.label in done:
            setup.say(f"{title}: measured in an earlier run, in {file}")
        else:
            setup.say(title)
            stage = done[recipe.label] = measure(setup, recipe)
            _rewrite(file, key, done)
            shutil.rmtree(setup.training(recipe.label) / "checkpoint", ignore_errors=True)
            memory, seconds = format_bytes(stage.bytes_total), format_seconds(stage.seconds)
            setup.say(f"{title}: perplexity {format_ppl(stage.ppl)}, {memory}, {seconds}")
        if place == 1:
            setup.expected = {text.name: text for text in done[recipe.label].breadth.texts}
    stages = [done[recipe.label] for recipe in RECIPES]
    report = DemoReport(
        stages=stages,
        model=_about_model(setup, stages[0]),
        data=_about_data(setup),
        environment=environment(),
        seconds=sum(stage.seconds for stage in stages),
    )
    report.save(folder / "report.json")
    demo_page.write(report, folder)
    return report


def measure(setup: Setup, recipe: Recipe) -> Stage:
    """Make a stage's model and measure it; `seconds` are of both.

    Speeds are of each model as it would be used: a compressed one laid out by
    optimize_for_inference, a dense one as transformers runs it, unless its recipe says optimize.
    """
    start, s, spent = time.perf_counter(), setup.settings, setup.spent
    spent.clear()
    made = recipe.make(setup, recipe)
    model, recovery = made.model, made.recovery
    setup.say(report_lines(model, parameter_count(model)))
    if recipe.optimize:
        optimize_for_inference(model)
    size, speed, sample = model_size(model), None, None
    if recipe.speed:
        with timed(spent, "speed"):
            speed = throughput(model, optimize=recipe.target < 1)
    if recipe.sample:
        sample = generate(model, setup.tokenizer, s.prompt, max_new_tokens=s.new_tokens)
    texts = setup.texts if recipe.breadth else {setup.first: setup.given[setup.first]}
    with timed(spent, "evaluation"):
        found = {
            name: perplexity(model, ids, progress=setup.progress, text=name)
            for name, ids in texts.items()
        }
    wide = compare(found, setup.expected or found, "test", "dense") if recipe.breadth else None
    seconds = time.perf_counter() - start
    return Stage(
        name=recipe.name,
        target=recipe.target,
        keep=size.linears.keep_merged,
        removed=size.linears.removed_merged,
        params_linear=size.linears.merged,
        params_total=size.parameters,
        bytes_total=size.resident_bytes,
        trainable=recovery.trainable if recovery else 0,
        ppl=found[setup.first].ppl,
        breadth=wide,
        prefill_tok_s=speed.prefill_tok_s if speed else None,
        decode_tok_s=speed.decode_tok_s if speed else None,
        seconds=seconds,
        spent=spent | {"other": max(0.0, seconds - sum(spent.values()))},
        predicted_loss=made.predicted_loss,
        optimized=bool(speed and speed.optimized),
        sample=sample,
        losses=recovery.losses if recovery else [],
        held_out=made.held_out,
        ranks=made.ranks,
    )


def _finished(file: Path, key: str, setup: Setup) -> dict[str, Stage]:
    """label -> stage, of the lines of `file` with this key whose saved model still exists."""
    found = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # a line cut off when the process was killed
            continue
        if record["key"] == key:
            stage = Stage.from_dict(record["stage"])
            model = setup.saved(stage.target)
            if stage.name != "HyLoRA" or (model / "config.json").is_file():
                found[stage.label] = stage
    return found


def _rewrite(file: Path, key: str, done: dict[str, Stage]) -> None:
    lines = [json.dumps({"key": key, "stage": stage.to_dict()}) for stage in done.values()]
    storage.write_text(file, "".join(line + "\n" for line in lines))


def _check_disk(setup: Setup) -> None:
    if setup.settings.model == models.DEMO_MODEL:
        storage.require_disk(cache_root(), CACHE_BYTES, "the demo's cache")
        storage.require_disk(setup.folder, FOLDER_BYTES, "the demo's models and checkpoints")


def _about_model(setup: Setup, dense: Stage) -> dict:
    model, name = setup.dense(), setup.settings.model
    about = {
        "name": str(name),
        "architecture": type(model).__name__,
        "dtype": model.dtype,
        "parameters": dense.params_total,
        "linear_parameters": dense.params_linear,
        "package": None,
        "package_file_bytes": None,
    }
    if name == models.DEMO_MODEL:
        file = Path(distribution(models.DEMO_PACKAGE).locate_file(models.DEMO_FILE))
        about |= {"package": models.DEMO_PACKAGE, "package_file_bytes": file.stat().st_size}
    return about


def _about_data(setup: Setup) -> dict:
    s = setup.settings
    texts = [
        {"name": t.name, "blocks": t.blocks, "length": t.length, "tokens": t.tokens}
        for t in setup.expected.values()
    ]
    return {
        "train": s.train if isinstance(s.train, str) else f"{len(s.train)} texts",
        "texts": texts,
        "calibration": setup.mix[1],
        "recovery_blocks": min(s.recovery_blocks, texts[0]["blocks"]),
        "steps": {"0.8": s.steps, "0.6": s.deep_steps, "control": s.steps},
        "prompt": s.prompt,
        "seed": s.seed,
    }
