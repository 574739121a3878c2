"""lm-evaluation-harness: how well models do tasks, as one table.

`evaluate_tasks` runs the harness; `HyloraLM` is a model as the harness knows it, under the name
"hylora". The harness has no entry point for models of other packages, so that its command knows the
name if this module is imported first: `python -m hylora_kernels.integrations.lm_eval` is the
harness's own command, with it.
"""

from __future__ import annotations

import difflib
import gc
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hylora_kernels.inference.optimize import optimize_for_inference
from hylora_kernels.model.check import check_model
from hylora_kernels.model.load import load_model, load_tokenizer, tokenizer_of
from hylora_kernels.support.console import table
from hylora_kernels.support.report import Report
from hylora_kernels.support.storage import write_text

try:
    from lm_eval.api import task as harness_task
    from lm_eval.api.registry import register_model
    from lm_eval.evaluator import evaluate as run_harness
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"tasks are measured by lm-evaluation-harness, of which {error.name} is not installed: "
        "pip install 'hylora-kernels[lm-eval]'"
    ) from error

if TYPE_CHECKING:
    from lm_eval.tasks.manager import TaskDict
    from rich.table import Table

Models = nn.Module | str | Path
# Three small tasks of our own, with the tag "small".
SMALL_TASKS = Path(__file__).with_name("tasks")
SEED = 1234  # The harness's own, which draws the examples of a few-shot prompt.
# Draws for a standard error that has no formula. A spread of n draws is known to 1 / sqrt(2 n) of
# itself, here to 2.2 %; the harness makes 100,000.
DRAWS = 1000


@dataclass(frozen=True)
class Score:
    """One metric of one task, of one model.

    task:             or a group of tasks.
    metric:           with the filter of the answers in brackets, unless there is none.
    stderr:           standard error of `value`; None if the harness has none for the metric.
    higher_is_better: None if the task doesn't say.
    examples:         how many were measured.
    """

    model: str
    task: str
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    examples: int

    def __str__(self) -> str:
        error = "" if self.stderr is None else f" ± {_number(self.stderr)}"
        return f"{_number(self.value)}{error}"


@dataclass(frozen=True)
class TasksReport(Report):
    """The result of evaluate_tasks().

    scores:   in the order of models, tasks, metrics.
    versions: task -> its version. shots: task -> examples in its prompt.
    limit:    most examples of a task; None: all. seconds: model -> time, without loading.
    harness:  the version of lm-evaluation-harness.
    """

    models: list[str]
    scores: list[Score]
    versions: dict[str, str]
    shots: dict[str, int]
    limit: int | None
    harness: str
    seconds: dict[str, float] = field(default_factory=dict)

    def cells(self) -> list[tuple[str, ...]]:
        """The rows of the table: task, metric with an arrow to its better side, number of
        examples, and for each model the value with its standard error."""
        found: dict[tuple[str, ...], dict[str, str]] = {}
        for score in self.scores:
            arrow = {True: " ↑", False: " ↓", None: ""}[score.higher_is_better]
            row = score.task, f"{score.metric}{arrow}", str(score.examples)
            found.setdefault(row, {})[score.model] = str(score)
        return [(*row, *(by.get(m, "-") for m in self.models)) for row, by in found.items()]

    def render(self) -> Table:
        """A rich table: a row for each metric of a task, a column for each model."""
        return table(self._title(), self._headings(), self.cells())

    def to_markdown(self) -> str:
        """The same table in Markdown."""
        lines = [self._headings(), ("---",) * 2 + ("---:",) * (1 + len(self.models)), *self.cells()]
        return "".join(f"| {' | '.join(_escaped(cell) for cell in line)} |\n" for line in lines)

    def save_markdown(self, path: str | Path) -> Path:
        """Write to_markdown() to `path`, atomically; returns the path."""
        write_text(path, self.to_markdown())
        return Path(path)

    def _headings(self) -> tuple[str, ...]:
        return "task", "metric", "examples", *self.models

    def _title(self) -> str:
        part = "" if self.limit is None else f", at most {self.limit} examples of a task"
        return f"lm-evaluation-harness {self.harness}{part}; ± is the standard error"


@register_model("hylora")
class HyloraLM(HFLM):
    """A model of `load_model` for lm-evaluation-harness, on a CPU packed for its instruction set.

    pretrained: what load_model takes, or a transformers causal LM, which then needs a tokenizer if
                there is none where it was loaded from.
    optimize:   on a CPU, pack the weights first (optimize_for_inference). A model that is given
                stays packed.
    progress:   show bars.

    device, dtype, revision, trust_remote_code are load_model's; the rest is HFLM's.

    Example:
        results = lm_eval.simple_evaluate(HyloraLM("my-folder"), tasks=["arc_easy"])
    """

    def __init__(
        self,
        pretrained: str | Path | PreTrainedModel,
        optimize: bool = True,
        device: str | None = None,
        dtype: str = "auto",
        revision: str | None = None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        trust_remote_code: bool = False,
        progress: bool = True,
        **others: Any,
    ) -> None:
        self.progress = progress
        model: Any = pretrained
        if isinstance(pretrained, str | Path):
            model, own = load_model(
                pretrained,
                device or "auto",
                dtype,
                trust_remote_code=trust_remote_code,
                revision=revision,
            )
            tokenizer = tokenizer or own
        check_model(model, "evaluate")
        if isinstance(tokenizer, str):
            tokenizer = load_tokenizer(tokenizer)
        if tokenizer is None:
            tokenizer = tokenizer_of(model)
        if optimize and model.device.type == "cpu":
            optimize_for_inference(model.eval())
        with _no_warnings():  # that a model is given, as we mean it to be
            super().__init__(
                model, tokenizer=tokenizer, trust_remote_code=trust_remote_code, **others
            )

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return super().loglikelihood(requests, disable_tqdm or not self.progress)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return super().loglikelihood_rolling(requests, disable_tqdm or not self.progress)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return super().generate_until(requests, disable_tqdm or not self.progress)

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> Any:
        # The harness shows a bar for each batch of rolling windows, beside that of all of them.
        hidden = disable_tqdm or not self.progress or override_bs is not None
        return super()._loglikelihood_tokens(requests, hidden, override_bs)


def evaluate_tasks(
    models: Models | Sequence[Models] | Mapping[str, Models],
    tasks: str | Sequence[str] = "small",
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch: int = 8,
    optimize: bool = True,
    device: str = "auto",
    dtype: str = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> TasksReport:
    """Scores of one or several causal language models on tasks of lm-evaluation-harness.

    models:      hub ids, folders or modules; a mapping gives them names. One is loaded at a time.
    tasks:       names of tasks, groups or tags, patterns ("mmlu_*") or .yaml files. "small" are
                 three of this package that need no download: small_classification,
                 small_generation, small_reasoning. They are for trying: about 100 generated
                 examples each.
    limit:       most examples of a task; None: all.
    num_fewshot: examples in a prompt; None: as many as the task says.
    batch:       requests in one forward.
    optimize:    on a CPU, pack the weights first; a module that is given stays packed.
    tokenizer:   of all models; None: each its own.

    device, dtype, revision, trust_remote_code are load_model's, for models given by name.

    Raises ValueError naming the argument, for an unknown task with the nearest names, before any
    model is loaded; ModuleNotFoundError if the harness is not installed.

    Example:
        report = evaluate_tasks(["my-org/my-model", "my-folder"], ["small", "my_task.yaml"])
        print(report.to_markdown())
    """
    for name, value in (("limit", limit), ("batch", batch)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if num_fewshot is not None and num_fewshot < 0:
        raise ValueError(f"num_fewshot must be at least 0, got {num_fewshot}")
    named = _named(models)
    loaded = load_tasks([tasks] if isinstance(tasks, str) else tasks)
    scores: list[Score] = []
    seconds: dict[str, float] = {}
    found: dict[str, Any] = {}
    for name, model in named.items():
        lm = HyloraLM(
            model,
            optimize=optimize,
            device=device,
            dtype=dtype,
            revision=revision,
            tokenizer=tokenizer,
            trust_remote_code=trust_remote_code,
            progress=progress,
            batch_size=batch,
        )
        start = time.perf_counter()
        found = _run(lm, loaded, limit, num_fewshot, progress)
        seconds[name] = time.perf_counter() - start
        scores += _scores(name, found)
        del lm
        if len(seconds) < len(named):
            gc.collect()  # Its weights are gone before the next are loaded.
    return TasksReport(
        models=list(named),
        scores=scores,
        versions={task: str(value) for task, value in found["versions"].items()},
        shots={task: int(value) for task, value in found["n-shot"].items() if value is not None},
        limit=limit,
        harness=version("lm-eval"),
        seconds=seconds,
    )


def load_tasks(names: Sequence[str]) -> TaskDict:
    """The harness's tasks of these names, patterns or .yaml files, and the groups among them.

    Raises ValueError naming `tasks`: for an unknown name with the nearest ones, and for a task
    whose description or data can't be read.
    """
    names = list(dict.fromkeys(names))
    if not names:
        raise ValueError("tasks must be at least one name, got none")
    with _no_warnings():
        # The harness's own descriptions, thousands of files, are read only if one is asked for.
        manager = TaskManager(include_path=str(SMALL_TASKS), include_defaults=False)
        if any(not _is_file(name) and not manager.match_tasks([name]) for name in names):
            manager = TaskManager(include_path=str(SMALL_TASKS))
        wanted: list[str] = []
        for name in names:
            wanted += [name] if _is_file(name) else _matching(name, manager)
        loaded: TaskDict = {"tasks": {}, "groups": {}, "group_map": {}}
        for name in dict.fromkeys(wanted):
            try:
                one: Any = manager.load([name])
            except Exception as error:  # A description may call any code, and fetch any data.
                raise ValueError(
                    f"tasks: {name!r} can't be loaded: {type(error).__name__}: {error}"
                ) from error
            for kind, values in one.items():
                loaded[kind] |= values  # type: ignore[literal-required]
    return loaded


def _is_file(name: str) -> bool:
    """True for the path of a description; raises ValueError if there is no such file."""
    if not name.endswith((".yaml", ".yml")):
        return False
    if not Path(name).is_file():
        raise ValueError(f"tasks: there is no file {name!r}")
    return True


def _matching(name: str, manager: TaskManager) -> list[str]:
    """The tasks, groups and tags that a name or pattern stands for, at least one."""
    found = manager.match_tasks([name])
    if not found:
        near = difflib.get_close_matches(name, manager.all_tasks, 5, 0.5)
        hint = f"; near ones: {', '.join(near)}" if near else ""
        raise ValueError(
            f"tasks: the harness knows no {name!r}{hint} (`lm-eval ls tasks` lists all; a file of "
            "your own must end with .yaml)"
        )
    return found


def _named(models: Models | Sequence[Models] | Mapping[str, Models]) -> dict[str, Any]:
    """name -> model. Raises ValueError for none and for one that is given twice."""
    if isinstance(models, Mapping):
        named = dict(models)
    else:
        given = [models] if isinstance(models, nn.Module | str | Path) else list(models)
        names = [_name_of(model) for model in given]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"models must differ, got {twice!r} twice: a dict gives them names")
        named = dict(zip(names, given, strict=True))
    if not named:
        raise ValueError("models must be at least one, got none")
    return named


def _name_of(model: Models) -> str:
    if isinstance(model, str | Path):
        return str(model)
    return getattr(model, "name_or_path", "") or type(model).__name__


def _run(
    lm: HyloraLM, tasks: TaskDict, limit: int | None, shots: int | None, progress: bool
) -> dict[str, Any]:
    """The harness's results of one model."""
    for task in tasks["tasks"].values():
        said = task.get_config("num_fewshot")
        # A task that says 0 can't have examples in its prompt.
        task.set_config("num_fewshot", (said or 0) if shots is None or said == 0 else shots)
        task.set_fewshot_seed(seed=SEED)  # Each model gets the same examples.
    with _own_process(progress):
        found = run_harness(lm, tasks, limit=limit, bootstrap_iters=DRAWS, log_samples=False)
    assert found is not None, "this process is the only one"
    return dict(found)


def _scores(model: str, found: Mapping[str, Any]) -> Iterator[Score]:
    """The scores in the harness's results, whose keys are "acc,none" and "acc_stderr,none"."""
    for task, results in found["results"].items():
        better = found["higher_is_better"].get(task, {})
        for key, value in results.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = results.get(f"{metric}_stderr,{kind}")
            yield Score(
                model,
                task,
                metric if kind == "none" else f"{metric} ({kind})",
                float(value),
                float(error) if isinstance(error, int | float) else None,
                better.get(metric),
                int(results["sample_len"]),
            )


@contextmanager
def _no_warnings() -> Iterator[None]:
    """The harness's log below an error is hidden in the block."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


@contextmanager
def _own_process(bars: bool) -> Iterator[None]:
    """In the block the harness computes standard errors in this process, whose threads a fork would
    not have, and shows a bar for the prompts that it writes only if `bars`."""
    before, shown = os.environ.get("DISABLE_MULTIPROC"), harness_task.tqdm
    os.environ["DISABLE_MULTIPROC"] = "1"
    harness_task.tqdm = partial(shown, disable=not bars)
    try:
        yield
    finally:
        harness_task.tqdm = shown
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


def _number(value: float) -> str:
    """In four digits, a share in four decimals: 0.5312, 23.41."""
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.4g}"


def _escaped(cell: str) -> str:
    return cell.replace("|", r"\|")


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
