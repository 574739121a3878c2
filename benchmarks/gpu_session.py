"""Everything that needs a GPU, most valuable first, within a number of minutes: behind gpu.sh.

    benchmarks/gpu.sh --minutes 11                 for a card that is there for twelve
    benchmarks/gpu.sh --only build --only 7b       these steps alone

Every step is a program of its own with its own time limit. A step that no longer fits is skipped
with a line; one that outlasts its limit is cut; one that fails doesn't keep the others from
running. After each step session.json and results.md are rewritten, and steps write their own files
as they go: a run that is cut off loses nothing but the measurement it was in. Limits are for 11
minutes and grow with --minutes. The exit code is that of the first step that failed, 124 if it was
cut.

Nothing is downloaded. Needed: torch, triton, ninja, nvcc, transformers, accelerate, safetensors,
tqdm, rich, typer, psutil; for the tests pytest and hypothesis. peft is a rival where it is there.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import gpu_results

ROOT = Path(__file__).resolve().parents[1]
MINUTES = 11.0  # that the limits below are for
AT_THE_END = 5.0  # seconds kept for stopping a step and writing

# Prints what a run depends on, as JSON; fails where torch sees no GPU.
PROBE = """
import importlib.metadata, json, platform
import torch
if not torch.cuda.is_available():
    raise SystemExit("torch sees no CUDA device")
from hylora_kernels.backends.triton import config
versions = {"python": platform.python_version(), "torch": torch.__version__,
            "cuda": torch.version.cuda}
for name in ("triton", "transformers", "peft"):
    try:
        versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        versions[name] = "missing"
card = torch.cuda.get_device_name()
print(json.dumps({
    "card": card,
    "arch": "%d%d" % torch.cuda.get_device_capability(),
    "memory": torch.cuda.get_device_properties(0).total_memory,
    "versions": versions,
    "has_table": bool(config.table(card)),
    "table": str(config.table_path(card)),
}))
"""
KNOWN_TO_THE_PREDICTION = ("H100", "H200", "A100", "L4", "RTX 4090", "MI300X")


@dataclass(frozen=True)
class Step:
    """One program. seconds: its limit. least: it isn't begun with fewer left. why_not: why it is
    left out on this machine, "" where it runs. stops_by_itself: it takes --seconds."""

    name: str
    words: list[str]
    seconds: float
    least: float
    why_not: str = ""
    stops_by_itself: bool = False


@dataclass
class Outcome:
    """How a step went. status: "ok", "failed (CODE)", "cut at N s" or "skipped: WHY"."""

    name: str
    status: str
    code: int = 0
    seconds: float = 0.0
    last_line: str = ""


def steps(machine: dict, out: Path, scale: float) -> list[Step]:
    """All steps in order of value. scale: what the limits are multiplied by."""
    card = next((known for known in KNOWN_TO_THE_PREDICTION if known in machine["card"]), "")
    files, left_out = gpu_tests()
    for path, missing in left_out.items():
        print(f"left out: {path}, without {missing}", flush=True)
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    hylora, models, at = ["-m", "hylora_kernels"], "benchmarks/gpu_models.py", ["--out", str(out)]
    selftest = [*hylora, "selftest", "--device", "cuda", "--json"]
    full = [*selftest, f"{out}/selftest-full.json", "--full"]
    layers = ["benchmarks/gpu_layers.py", "--quick", "--compile", *at]
    compare = ["benchmarks/gpu_prediction.py", "--gpu", card, "--compare", f"{out}/layers.json"]
    has_table = f"there is a table for {machine['card']}" if machine["has_table"] else ""
    too_small = "" if machine["memory"] > 60e9 else "needs 60 GB on the GPU"
    unknown = "" if card else f"gpu_roofline.py doesn't know {machine['card']}"
    on_time = {"stops_by_itself": True}
    decode = "benchmarks/gpu_decode.py"
    found = [
        Step("build", ["setup.py", "--quiet", "build_csrc"], 150, 20),
        Step("decode", [decode, "llama-3.2-1b", *at], 150, 40, **on_time),
        Step("host-cost", ["benchmarks/gpu_host_cost.py", *at], 30, 15, **on_time),
        Step("groups", ["benchmarks/gpu_groups.py", *at], 30, 20, **on_time),
        Step("one-row", ["benchmarks/gpu_one_row.py", *at], 30, 20),
        Step("selftest", [*selftest, f"{out}/selftest.json"], 45, 30, **on_time),
        Step("quantized", ["benchmarks/gpu_quantized.py", "llama-3.2-1b", *at], 125, 50, **on_time),
        Step("layers", layers, 90, 40),
        Step("tinyllama", [models, "tinyllama", *at], 90, 40, **on_time),
        Step("decode-7b", [decode, "7b", *at], 100, 50, too_small, **on_time),
        Step("7b", [models, "7b", *at], 100, 50, too_small, **on_time),
        Step("llama-3.2-1b", [models, "llama-3.2-1b", *at], 75, 40, **on_time),
        Step("compiled", [models, "tinyllama", "--compiled", *at], 125, 60, **on_time),
        Step("predicted", compare, 20, 2, unknown),
        Step("tune", [*hylora, "tune", "--device", "cuda", "--quick"], 150, 60, has_table),
        Step("tests", ["-m", "pytest", "-m", "gpu", "-q", *workers, *files], 240, 45),
        Step("selftest-full", full, 600, 90, **on_time),
    ]
    return [replace(step, seconds=scale * step.seconds) for step in found]


def gpu_tests(folder: Path = ROOT / "tests") -> tuple[list[str], dict[str, str]]:
    """(test files with tests for a GPU, those left out -> imports of theirs that are missing)."""
    found, left_out = [], {}
    for path in sorted(folder.rglob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        functions = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef))
        takes_device = any(a.arg == "device" for f in functions for a in f.args.args)
        if not takes_device and "mark.gpu" not in text:
            continue
        names = {a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module for n in tree.body if isinstance(n, ast.ImportFrom) and n.module}
        tops = sorted({name.partition(".")[0] for name in names})
        missing = [name for name in tops if not _is_there(name, folder)]
        if missing:
            left_out[str(path)] = ", ".join(missing)
        else:
            found.append(str(path))
    return found, left_out


def _is_there(module: str, tests: Path) -> bool:
    """Whether a top-level module is installed, the package's or a helper of the tests."""
    places = [folder / name for folder in (ROOT, tests) for name in (module, f"{module}.py")]
    return any(map(Path.exists, places)) or importlib.util.find_spec(module) is not None


# ------------------------------------------------------------------------------------------ running


class Session:
    """One run: its log, its outcomes so far, its deadline."""

    def __init__(self, out: Path, minutes: float):
        self.out, self.minutes = out, minutes
        self.deadline = time.monotonic() + 60 * minutes
        self.started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes")
        self.machine: dict = {}
        self.outcomes: list[Outcome] = []
        out.mkdir(parents=True, exist_ok=True)
        self.log = (out / "log.txt").open("w", encoding="utf-8", buffering=1)

    def say(self, text: str) -> None:
        print(text, flush=True)
        self.log.write(text + "\n")

    def left(self) -> float:
        return self.deadline - time.monotonic() - AT_THE_END

    def do(self, step: Step) -> None:
        """Run the step if it fits; write the results either way."""
        left = self.left()
        reason = step.why_not
        if not reason and left < step.least:
            reason = f"{max(0, left):.0f} s are left, it needs {step.least:.0f}"
        if reason:
            self.say(f"==== {step.name}: skipped: {reason}")
            self.outcomes.append(Outcome(step.name, f"skipped: {reason}"))
        else:
            self.say(f"\n==== {step.name}, at most {min(step.seconds, left):.0f} s")
            self.outcomes.append(Outcome(step.name, "running"))
            self.write()
            self.outcomes[-1] = self.run(step, min(step.seconds, left))
            self.say(f"==== {step.name}: {self.outcomes[-1].status}")
        self.write()

    def run(self, step: Step, limit: float) -> Outcome:
        begin = time.monotonic()
        program = subprocess.Popen(
            [sys.executable, *step.words, *seconds_of(step, limit)],
            cwd=ROOT,
            env=environment(self.machine),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # so that what it started is stopped with it
        )
        last = [""]

        def follow():
            for line in program.stdout:
                self.say(line.rstrip("\n"))
                last[0] = line.strip() or last[0]

        reader = threading.Thread(target=follow, daemon=True)
        reader.start()
        try:
            code = program.wait(limit)
            status = "ok" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            code, status = 124, f"cut at {limit:.0f} s"
        finally:
            stop(program)
            reader.join(2)
        seconds = time.monotonic() - begin
        return Outcome(step.name, status, code, seconds, gpu_results.one_cell(last[0]))

    def write(self) -> None:
        """session.json and results.md, each whole or not at all; tune.json, the user's table for
        this card, which tuning writes to the cache after every problem."""
        report = {
            "started": self.started,
            "minutes": self.minutes,
            "machine": self.machine,
            "steps": [asdict(outcome) for outcome in self.outcomes],
        }
        table = Path(self.machine["table"])
        if table.is_file():
            write_whole(self.out / "tune.json", table.read_text(encoding="utf-8"))
        write_whole(self.out / "session.json", json.dumps(report, indent=1) + "\n")
        write_whole(self.out / "results.md", gpu_results.render(self.out))


def seconds_of(step: Step, limit: float) -> list[str]:
    """The words that tell a step to begin nothing in its last tenth, where it can be told."""
    return ["--seconds", f"{0.9 * limit:.0f}"] if step.stops_by_itself else []


def environment(machine: dict) -> dict[str, str]:
    """The steps' environment: the package from here, and code for the present GPU alone."""
    found = dict(os.environ)
    found["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), found.get("PYTHONPATH")]))
    found["PYTHONUNBUFFERED"] = "1"
    found.setdefault("HYLORA_CUDA_ARCHS", machine.get("arch", ""))
    if not found["HYLORA_CUDA_ARCHS"]:
        del found["HYLORA_CUDA_ARCHS"]
    if importlib.util.find_spec("platformdirs") is None:  # it would name the cache folder
        home = found.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        found.setdefault("HYLORA_CACHE", str(Path(home) / "hylora_kernels"))
    return found


def stop(program: subprocess.Popen) -> None:
    """End the program and all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(program.pid, number)
        except ProcessLookupError:
            break
        try:
            program.wait(2)
        except subprocess.TimeoutExpired:
            continue
        time.sleep(0.1)
    program.wait()


def write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def look_at_machine() -> dict:
    """What PROBE prints, the driver and the commit; SystemExit where there is no GPU."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=ROOT, env=environment({}), text=True, capture_output=True
    )
    if done.returncode:
        sys.exit(f"benchmarks/gpu.sh needs a GPU: {done.stderr.strip().splitlines()[-1]}")
    machine = json.loads(done.stdout.splitlines()[-1])
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    machine["driver"] = first_line(query)
    machine["commit"] = first_line(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"])
    return machine


def first_line(words: list[str]) -> str:
    """The first line that a program prints, "unknown" where it is missing or fails."""
    if shutil.which(words[0]) is None:
        return "unknown"
    done = subprocess.run(words, text=True, capture_output=True)
    return done.stdout.partition("\n")[0].strip() or "unknown"


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for everything")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="results")
    parser.add_argument("--only", action="append", metavar="STEP", help="may be repeated")
    given = parser.parse_args(words)
    session = Session(given.out.resolve(), given.minutes)
    session.machine = look_at_machine()
    session.say(json.dumps(session.machine))
    found = steps(session.machine, session.out, max(1.0, given.minutes / MINUTES))
    names = [step.name for step in found]
    for name in given.only or ():
        if name not in names:
            parser.error(f"--only must be one of {', '.join(names)}, got {name!r}")
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the step is stopped too
    try:
        for step in found:
            if given.only is None or step.name in given.only:
                session.do(step)
    finally:
        signal.signal(signal.SIGTERM, before)
    session.say("\n" + (session.out / "results.md").read_text(encoding="utf-8"))
    session.say(f"results in {session.out}: results.md, session.json, log.txt and the steps' own")
    return next((outcome.code for outcome in session.outcomes if outcome.code), 0)


if __name__ == "__main__":
    sys.exit(main())
