"""A plan beside the run that it is about: seconds by stage, and the most memory.

    python benchmarks/planning.py smollm2-135m --samples 16 --length 256
    python benchmarks/planning.py 300m --samples 8 --length 256
    python benchmarks/planning.py --table                   # the predictions of docs/scale.md

The model is compressed in a process of its own, on random tokens. `300m` is a Llama of other
proportions with random weights, made on first use. --cpu counts CPU seconds of one thread in the
probe and in the run, where other work shares the cores: neither wall clock means anything then.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from hylora_kernels.planning.options import PlanOptions
from hylora_kernels.planning.plan import Plan, make_plan
from hylora_kernels.support.console import format_bytes, format_seconds, show, table

SMALL = {"300m": (18, 1024, 4096, 16, 4)}  # Blocks, width, inner width, heads, heads of keys.
LLAMAS = {
    "1B (Llama 3.2)": (16, 2048, 8192, 32, 8, 128256, True),
    "7B (Llama 2)": (32, 4096, 11008, 32, 32, 32000, False),
    "13B (Llama 2)": (40, 5120, 13824, 40, 40, 32000, False),
    "70B (Llama 2)": (80, 8192, 28672, 64, 8, 32000, False),
}
PLACES = (("laptop", 1), ("h100", 1), ("h100", 8))


def llama_config(blocks, width, inner, heads, kv_heads, words=32000, tied=True) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        num_hidden_layers=blocks,
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=words,
        tie_word_embeddings=tied,
        max_position_embeddings=4096,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )


def random_model(name: str, folder: Path) -> None:
    """A folder of SMALL[name] with random bfloat16 weights."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = llama_config(*SMALL[name])
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)


# ------------------------------------------------------------------------------------ comparison


def compare(
    model: str, samples: int, length: int, keep: float, cpu: bool, by_block: bool, run: Path | None
) -> dict[str, Any]:
    """The plan and the run; a line for each stage, and for memory.

    run: the JSON of an earlier comparison, whose run is taken.
    """
    if cpu:
        torch.set_num_threads(1)
    ids = torch.zeros(samples, length, dtype=torch.int64)
    options = PlanOptions(
        calibration=ids,
        length=length,
        samples=samples,
        keep=keep,
        device="cpu",
        route="by_block" if by_block else "in_memory",
    )
    plan = make_plan(model, options, time.process_time if cpu else time.perf_counter)
    measured = json.loads(run.read_text())["run"] if run else None
    if measured is None:
        words = [sys.executable, __file__, model, "--child", "--samples", samples]
        words += ["--length", length, "--keep", keep]
        words += [flag for flag, on in (("--cpu", cpu), ("--by-block", by_block)) if on]
        done = subprocess.run(
            [str(w) for w in words], check=True, stdout=subprocess.PIPE, text=True
        )
        measured = json.loads(done.stdout.splitlines()[-1])
    rows = []
    for stage in plan.stages:
        if stage.name in measured["seconds"]:
            seconds = measured["seconds"][stage.name]
            ratio = f"{stage.seconds / seconds:.2f}"
            rows.append((stage.name, f"{stage.seconds:.1f} s", f"{seconds:.1f} s", ratio))
    peak = max(s.memory for s in plan.stages if s.name != "save")
    ratio = f"{peak / measured['peak_rss']:.2f}"
    rows.append(("memory", format_bytes(peak), format_bytes(measured["peak_rss"]), ratio))
    counts = f"{plan.linears:,}", f"{measured['dense_parameters']:,}"
    rows.append(("linears", *counts, "must be the same"))
    clock = "CPU seconds of one thread" if cpu else "wall seconds"
    show(plan.machine.render())
    title = f"{model}, {samples} blocks of {length}, keep {keep}, {clock}"
    show(table(title, ("stage", "predicted", "measured", "ratio"), rows))
    return {"plan": plan.to_dict(), "run": measured}


def child(model: str, samples: int, length: int, keep: float, cpu: bool, by_block: bool) -> None:
    """The run; the last line of stdout is its report."""
    from hylora_kernels.compression import compress as module

    if cpu:
        torch.set_num_threads(1)
        module.timed = timed_by_cpu
    ids = torch.randint(1000, (samples, length), generator=torch.Generator().manual_seed(0))
    given = {"keep": keep, "calibration": ids, "samples": samples, "length": length}
    if by_block:
        report = compress_by_block(model, given)
    else:
        _, report = module.compress(model, **given, cache=False, device="cpu")
    print(json.dumps({n: report.to_dict()[n] for n in ("seconds", "peak_rss", "dense_parameters")}))


def compress_by_block(model: str, given: dict[str, Any]) -> Any:
    """The report of a compression that holds one block at a time."""
    from hylora_kernels.compression.to_folder import compress_to_folder
    from hylora_kernels.model.load import load_model

    loaded, _ = load_model(model, "cpu", by_block=True)
    with tempfile.TemporaryDirectory() as folder:
        return compress_to_folder(loaded, Path(folder) / "out", **given, cache=False)


@contextlib.contextmanager
def timed_by_cpu(seconds: dict[str, float], stage: str):
    """support.timing.timed() by the process's CPU seconds."""
    start = time.process_time()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.process_time() - start


# ----------------------------------------------------------------------------------------- table


def predictions() -> list[Plan]:
    """Models by device tables: the plans of docs/scale.md."""
    from transformers import MixtralConfig

    from hylora_kernels.model.hollow import hollow_model_of

    mixtral = MixtralConfig(dtype="bfloat16", architectures=["MixtralForCausalLM"])
    configs = {name: llama_config(*sizes) for name, sizes in LLAMAS.items()}
    found = []
    for name, config in (configs | {"8x7B (Mixtral)": mixtral}).items():
        model = hollow_model_of(config)
        for machine, processes in PLACES:
            plan = make_plan(
                model,
                PlanOptions(calibration="stdlib", keep=0.6, machine=machine, processes=processes),
            )
            plan.model = name
            found.append(plan)
    return found


def show_predictions() -> None:
    """The table as Markdown."""
    print(
        "| model | device | route | memory | disk | time | calibrate | factorize | refit | result |"
        " decode, dense to result |\n" + "|---" * 11 + "|"
    )
    for p in predictions():
        at = {stage.name: stage.seconds for stage in p.stages}
        speed = next(s for s in p.speeds if s.device == p.device)
        fits = "" if p.peak <= p.memory else " (does not fit)"
        cells = (
            p.model,
            f"{p.processes} x {p.device}" if p.processes > 1 else p.device,
            p.route.replace("_", " "),
            format_bytes(p.peak) + fits,
            format_bytes(p.disk),
            *map(format_seconds, (p.seconds, at["calibrate"], at["factorize"], at["refit"])),
            format_bytes(p.result.bytes),
            f"{speed.dense_decode:.3g} to {speed.decode:.3g} tok/s"
            + ("" if speed.fits else " (does not fit)"),
        )
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--by-block", action="store_true", help="one block in memory at a time")
    parser.add_argument("--run", type=Path, help="JSON of an earlier comparison: its run is taken")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.table:
        show_predictions()
        return
    sizes = (given.samples, given.length, given.keep, given.cpu, given.by_block)
    if given.child:
        child(given.model, *sizes)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = given.model
        if model in SMALL:
            random_model(model, Path(folder) / model)
            model = str(Path(folder) / model)
        found = compare(model, *sizes, given.run)
    if given.json:
        given.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
