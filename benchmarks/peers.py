"""SmolLM2-135M through this project, llama.cpp and onnxruntime-genai: tokens a second, batch 1.

    python benchmarks/peers.py                          about eight minutes, the first time twelve
    python benchmarks/peers.py --quick --threads 1      one minute
    python benchmarks/peers.py --model mine=runs/mine --model other=runs/other
    python benchmarks/peers.py --table runs/peers.json  the table of an earlier run

Each engine is a process that stays warm. The models take turns, a piece of 16 tokens each, and the
first place rotates; a speed is the median over all pieces, a ratio the median over the rounds of
that round's ratio. All run on the same cores, one process at a time. A token reads every weight,
and the other models' weights pass through the caches between two pieces: weights come from DRAM
where a model is larger than the L3. Greedy, after a prompt of English text.

The other engines come from npm and PyPI on first use, into the cache folder, and what can't be had
is said and left out. Compressed models are made on four short blocks of text unless --model gives
some: times don't depend on quality. For speeds that hold beside other processes, run it as
`chrt -r 1 python benchmarks/peers.py`; a second process of that kind on the same core spoils it,
most of all for an engine that hands each token from one thread to another.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

import peers_setup
from limits import cache_bytes
from peers_setup import Missing
from report import markdown
from timing import Times
from tqdm import tqdm

from hylora_kernels.model.load import DEMO_MODEL
from hylora_kernels.support.storage import write_json

HERE = Path(__file__).parent
REFERENCE = "llama.cpp BF16"  # what ratios are over
LENGTH = 1536  # most tokens of a sequence
PARTS = 16  # tokens that the parts of a token are the mean of
AGREE = 8  # greedy tokens that exact engines must share
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
EXACT = (*DTYPES, "BF16", "F16")  # ways to store weights that keep those of load_model


@dataclass(frozen=True)
class Plan:
    """What is measured. decode: (tokens of the prompt, pieces, tokens of a piece)."""

    decode: tuple[tuple[int, int, int], ...] = ((128, 8, 16), (1024, 4, 8))
    prefill: int = 512
    prefills: int = 2


QUICK = Plan(decode=((128, 2, 8),), prefill=128, prefills=1)


@dataclass(frozen=True)
class Peer:
    """One row. weights: how the matrices are stored. given: what its engine needs to load it."""

    name: str
    engine: str
    weights: str
    given: object


@dataclass
class Result:
    """weights and bytes by name. missing: name -> why. tokens: name -> the first greedy ones.
    phases: "decode at 128, 1T" -> name -> tokens a second and times faster than the reference.
    parts: "name, 1T" -> kind of work -> seconds of a token, of engines that tell."""

    machine: dict[str, object]
    versions: dict[str, str] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    phases: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    parts: dict[str, dict[str, float]] = field(default_factory=dict)


# ------------------------------------------------------------------------------- what is measured


Wanted = tuple[str, str, str, Callable[[], object]]


def wanted(models: dict[str, str]) -> Iterator[Wanted]:
    """(name, engine, weights, what gives its engine what it needs to load it) of every row."""
    ours = [("dense", DEMO_MODEL), *models.items()]
    rows = [(f"ours, {label}", path, "ours") for label, path in ours]
    for name, path, runtime in [*rows, ("transformers, dense", DEMO_MODEL, "transformers")]:
        for dtype in DTYPES if runtime == "ours" else ("bf16",):
            weights = dtype if path == DEMO_MODEL else "factors"
            given = {"path": path, "dtype": DTYPES[dtype], "runtime": runtime}
            yield f"{name} {dtype}", "ours", weights, functools.partial(dict, given)
    for kind in ("BF16", "F16", "Q8_0", "Q4_1"):
        make = functools.partial(peers_setup.gguf_file, kind)
        yield f"llama.cpp {kind}", "llama.cpp", kind, make
    for precision in ("fp32", "int4"):
        make = functools.partial(peers_setup.onnx_model, precision)
        yield f"onnxruntime-genai {precision}", "onnxruntime-genai", precision, make


def peers(rows: Iterable[Wanted], missing: dict[str, str]) -> list[Peer]:
    """The rows that can be had; `missing` gets name -> reason for the others."""
    found: list[Peer] = []
    for name, engine, weights, make in rows:
        try:
            given = make()
            command(engine)  # fetches it
        except (Missing, OSError) as error:
            missing[name] = str(error)
        else:
            found.append(Peer(name, engine, weights, given))
    return found


# ----------------------------------------------------------------------------------------- engines


class Engine:
    """A process that holds models and does what it is asked: see peers_child.py."""

    def __init__(self, engine: str, given: dict[str, object], log: IO):
        words, environment = command(engine)
        self.log = log
        self.process = subprocess.Popen(
            [*map(str, words), json.dumps(given, default=str)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | environment | {"OMP_NUM_THREADS": str(given["threads"])},
        )

    def ask(self, **request: object) -> dict:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise Missing(f"its process ended with {self.process.wait()}: see {self.log.name}")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()


def command(engine: str) -> tuple[list[object], dict[str, str]]:
    """(words, environment) that start an engine."""
    if engine == "ours":
        return [sys.executable, HERE / "peers_ours.py"], {}
    if engine == "llama.cpp":
        return ["node", HERE / "peers_llama.mjs", peers_setup.node_packages()], {}
    packages = {"PYTHONPATH": str(peers_setup.onnx_packages())}
    return [sys.executable, HERE / "peers_onnx.py"], packages


@contextlib.contextmanager
def engines(
    rows: list[Peer], cores: list[int], result: Result, log: IO
) -> Iterator[dict[str, Engine]]:
    """name of a row -> the process that holds its model, all of them ready and on `cores`."""
    started: dict[str, Engine] = {}
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)  # Every thread of a child inherits it.
    try:
        for engine in dict.fromkeys(row.engine for row in rows):
            models = {row.name: row.given for row in rows if row.engine == engine}
            given = {"threads": len(cores), "length": LENGTH, "models": models}
            started[engine] = Engine(engine, given, log)
            try:  # One after another: all at once would need the memory of every conversion.
                ready = started[engine].answer()
                result.versions |= ready["versions"]
                result.bytes |= ready["bytes"]
            except Missing as error:
                started.pop(engine).close()
                result.missing[engine] = str(error)
        yield {row.name: started[row.engine] for row in rows if row.engine in started}
    finally:
        os.sched_setaffinity(0, allowed)
        for engine in started.values():
            engine.close()


# ----------------------------------------------------------------------------------------- measure


def in_turns(names: list[str], rounds: int, sample: Callable[[str], float], what: str) -> Times:
    """Samples of all, `rounds` of each; the first place rotates."""
    samples: dict[str, list[float]] = {name: [] for name in names}
    for round_ in tqdm(range(rounds), desc=what, leave=False):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(sample(name))
    return Times(samples)


def measure(holders: dict[str, Engine], ids: list[int], plan: Plan) -> Iterator[tuple[str, Times]]:
    """(phase, times of one token) of each phase."""
    names = list(holders)

    def prefill(name: str, count: int) -> float:
        return holders[name].ask(do="prefill", model=name, ids=ids[:count])["seconds"] / count

    def decode(name: str, count: int) -> float:
        times = holders[name].ask(do="decode", model=name, count=count)["seconds"]
        return statistics.median(times)

    for length, pieces, tokens in plan.decode:
        what = f"decode at {length}"
        for name in names:
            prefill(name, length)
        yield what, in_turns(names, pieces, functools.partial(decode, count=tokens), what)
    what = f"prefill {plan.prefill}"
    yield what, in_turns(names, plan.prefills, functools.partial(prefill, count=plan.prefill), what)


def first_tokens(holders: dict[str, Engine], ids: list[int]) -> dict[str, list[int]]:
    """name -> the greedy tokens after the prompt. It warms up all engines as well."""
    found = {}
    for name, engine in holders.items():
        first = engine.ask(do="prefill", model=name, ids=ids)["token"]
        more = engine.ask(do="decode", model=name, count=AGREE - 1)["tokens"]
        found[name] = [first, *more]
    return found


def speeds(times: Times) -> dict[str, dict[str, float]]:
    """name -> its tokens a second, and how many times as fast as the reference it is."""
    found = {name: {"tokens_per_second": 1 / times.median(name)} for name in times.samples}
    if REFERENCE in times.samples:
        for name, entry in found.items():
            entry["over_reference"] = times.ratio(REFERENCE, name)
    return found


def run(rows: list[Peer], threads: list[int], plan: Plan, result: Result, out: Path) -> None:
    """Fill and write `result` after each phase, so that a run that is cut off loses one."""
    ids = peers_setup.prompt(max(plan.prefill, *(length for length, _, _ in plan.decode)))
    allowed = sorted(os.sched_getaffinity(0))
    result.weights = {row.name: row.weights for row in rows}
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_suffix(".log").open("w", encoding="utf-8") as log:
        for count in threads:
            if count > len(allowed):
                result.missing[f"{count} threads"] = f"{len(allowed)} cores may be used"
                continue
            with engines(rows, allowed[-count:], result, log) as holders:
                result.tokens = first_tokens(holders, ids[:128])
                for phase, times in measure(holders, ids, plan):
                    result.phases[f"{phase}, {count}T"] = speeds(times)
                    write_json(out, asdict(result))
                for name, engine in holders.items():
                    engine.ask(do="prefill", model=name, ids=ids[:128])
                    parts = engine.ask(do="parts", model=name, count=PARTS)["seconds"]
                    if parts:
                        result.parts[f"{name}, {count}T"] = parts
                write_json(out, asdict(result))


# ------------------------------------------------------------------------------------------ tables


def disagreements(result: Result) -> dict[str, list[int]]:
    """name -> greedy tokens, of the engines with unrounded weights whose tokens are not the
    reference's."""
    exact = [name for name in result.tokens if result.weights[name] in EXACT]
    expected = result.tokens.get(REFERENCE) or (result.tokens[exact[0]] if exact else [])
    return {name: result.tokens[name] for name in exact if result.tokens[name] != expected}


def text(result: Result) -> str:
    """The table in Markdown, under it what it was measured on and what is missing."""
    heads = ["", "MB", *result.phases]
    rows = []
    for name, size in result.bytes.items():
        found = [phase.get(name) for phase in result.phases.values()]
        rows.append([name, f"{size / 1e6:.0f}", *map(cell, found)])
    facts = {**result.machine, **result.versions}
    lines = [markdown(heads, rows), "", f"Tokens a second (times as fast as {REFERENCE})."]
    if result.parts:
        lines += ["", parts_table(result.parts), "", "Shares of a token at 128."]
    lines.append("; ".join(f"{name} {value}" for name, value in facts.items()))
    lines += [f"not had: {name}: {reason}" for name, reason in result.missing.items()]
    lines += [f"other greedy tokens: {n}: {tokens}" for n, tokens in disagreements(result).items()]
    return "\n".join(lines)


def parts_table(parts: dict[str, dict[str, float]]) -> str:
    kinds = list(dict.fromkeys(kind for seconds in parts.values() for kind in seconds))
    rows = []
    for name, seconds in parts.items():
        total = sum(seconds.values())
        shares = [f"{100 * seconds.get(kind, 0) / total:.0f} %" for kind in kinds]
        rows.append([name, f"{1e3 * total:.2f}", *shares])
    return markdown(["", "ms a token", *kinds], rows)


def cell(found: dict[str, float] | None) -> str:
    if not found:
        return ""
    ratio = found.get("over_reference")
    return f"{found['tokens_per_second']:.1f}" + (f" ({ratio:.2f})" if ratio else "")


def machine() -> dict[str, object]:
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "caches": cache_bytes(),
        "system": platform.platform(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load before": os.getloadavg()[0],
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# ---------------------------------------------------------------------------------------- command


def main(words: list[str]) -> None:
    options = _parser().parse_args(words)
    if options.table:
        print(text(Result(**json.loads(options.table.read_text(encoding="utf-8")))))
        return
    result = Result(machine())
    keeps = {} if options.model else {f"keep {keep}": keep for keep in (0.8, 0.6)}
    models = dict(option.split("=", 1) for option in options.model)
    models |= {name: str(peers_setup.compressed_model(keep)) for name, keep in keeps.items()}
    chosen = [row for row in wanted(models) if re.search(options.only, row[0])]
    rows = peers(chosen, result.missing)
    run(rows, options.threads, QUICK if options.quick else Plan(), result, options.out)
    print(text(result))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", action="append", default=[], metavar="NAME=DIR", help="a compressed model")
    add("--threads", type=_counts, default=[1, 2], help="numbers of threads (1,2)")
    add("--only", default="", metavar="REGEX", help="only rows whose name has a match")
    add("--quick", action="store_true", help="short prompts and few rounds")
    add("--out", type=Path, default=Path("runs/peers.json"), help="the results as JSON")
    add("--table", type=Path, metavar="JSON", help="print the table of an earlier run")
    return parser


def _counts(words: str) -> list[int]:
    return [int(word) for word in words.split(",")]


if __name__ == "__main__":
    main(sys.argv[1:])
