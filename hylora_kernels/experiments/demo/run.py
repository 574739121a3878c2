"""The demonstration: what each part of the method does to a real model, every number measured here.

A stage loads the dense model anew, makes a model of it, measures that, and is then a line of
stages.jsonl: an interrupted demo goes on after the last finished stage, and a finished one is only
printed again. Lines of another version of the package, or of other settings, are not used.
"""

from __future__ import annotations

import json
import shutil
from importlib.metadata import distribution
from pathlib import Path

from torch import Tensor

from hylora_kernels.experiments.demo import page as demo_page
from hylora_kernels.experiments.demo.stages import (
    RECIPES,
    Bench,
    DemoReport,
    Settings,
    Stage,
    measure,
)
from hylora_kernels.machine.info import environment
from hylora_kernels.model import load as models
from hylora_kernels.support import storage
from hylora_kernels.support.console import format_bytes, format_ppl, format_seconds

STAGES = "stages.jsonl"
# With the demo's own model: three sets of factors and two of refits; two models and checkpoints.
CACHE_BYTES, FOLDER_BYTES = 2_600_000_000, 1_200_000_000


def demo(
    output_dir: str | Path = "runs/demo", progress: bool = True, fresh: bool = False, **settings
) -> DemoReport:
    """Run all stages, or those that are missing (with `fresh`, all), and write report.json,
    report.html, stages.png and the recovered models hylora-0.8 and hylora-0.6 to output_dir.

    settings: the fields of Settings, e.g. seed, samples, steps, deep_steps, model.
    """
    folder, file = Path(output_dir), Path(output_dir) / STAGES
    bench = Bench(Settings(**settings), folder, progress)
    key = bench.key()
    done = {} if fresh else _finished(file, key, bench)
    if not done:
        _say_disk(bench)
        shutil.rmtree(folder / "training", ignore_errors=True)  # checkpoints of other settings
    _rewrite(file, key, done)
    for place, recipe in enumerate(RECIPES, 1):
        words = f"[{place}/{len(RECIPES)}] {recipe.label}"
        if recipe.label in done:
            bench.say(f"{words}: measured in an earlier run, in {file}")
            continue
        bench.say(words)
        stage = done[recipe.label] = measure(bench, recipe)
        _rewrite(file, key, done)
        shutil.rmtree(folder / "training" / recipe.label / "checkpoint", ignore_errors=True)
        memory, seconds = format_bytes(stage.bytes_total), format_seconds(stage.seconds)
        bench.say(f"{words}: perplexity {format_ppl(stage.ppl)}, {memory}, {seconds}")
    stages = [done[recipe.label] for recipe in RECIPES]
    report = DemoReport(
        stages=stages,
        model=_about_model(bench, stages[0]),
        data=_about_data(bench),
        environment=environment(),
        seconds=sum(stage.seconds for stage in stages),
    )
    report.save(folder / "report.json")
    demo_page.write(report, folder)
    return report


def _finished(file: Path, key: str, bench: Bench) -> dict[str, Stage]:
    """label -> the stage, for the lines of `file` with this key whose model is still there."""
    found = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record["key"] == key:
            stage = Stage(**record["stage"])
            model = bench.saved(stage.target)
            if stage.name != "HyLoRA" or (model / "config.json").is_file():
                found[stage.label] = stage
    return found


def _rewrite(file: Path, key: str, done: dict[str, Stage]) -> None:
    lines = [json.dumps({"key": key, "stage": stage.to_dict()}) for stage in done.values()]
    storage.write_text(file, "".join(line + "\n" for line in lines))


def _say_disk(bench: Bench) -> None:
    if bench.settings.model == models.DEMO_MODEL:
        storage.require_disk(storage.cache_root(), CACHE_BYTES, "the demo's cache")
        storage.require_disk(bench.folder, FOLDER_BYTES, "the demo's models and checkpoints")


def _about_model(bench: Bench, dense: Stage) -> dict:
    model, name = bench.dense(), bench.settings.model
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


def _about_data(bench: Bench) -> dict:
    s = bench.settings

    def about(text, blocks: Tensor) -> dict:
        n, length = blocks.shape
        name = text if isinstance(text, str) else f"{len(text)} texts"
        return {"name": name, "blocks": n, "length": length, "tokens": n * (length - 1)}

    return {
        "train": s.train if isinstance(s.train, str) else f"{len(s.train)} texts",
        "test": about(s.test, bench.test),
        "out_of_domain": about(s.out_of_domain, bench.other),
        "calibration_blocks": s.samples,
        "steps": {"0.8": s.steps, "0.6": s.deep_steps, "control": s.steps},
        "prompt": s.prompt,
        "seed": s.seed,
    }
