"""gpu_layers.py and `hylora tune` from one end to the other without a GPU: Triton's interpreter and
the emulated CUDA kernels compute on the CPU, clocks and graphs are stand-ins. Times mean nothing
here; that every rival runs, is checked and comes into the tables does.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cuda_emulator import on_cpu

from hylora_kernels import use_backend
from hylora_kernels.backends.triton import config as configs
from hylora_kernels.backends.triton import dispatch
from hylora_kernels.backends.triton.config import BACKWARD, TORCH_PRODUCTS, Config, Problem, Target
from hylora_kernels.machine import tune

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu_groups
import gpu_layers
import gpu_prediction
import gpu_results
import gpu_rivals

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: benchmarks/gpu.sh"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton isn't installed"),
]
CPU = torch.device("cpu")
SHAPE = (40, 56, 8, 16)  # K, N, r, ra
LARGE = 65  # rows: weights aren't timed warm


class Event:
    """A CPU's clock as torch.cuda.Event."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        """Nothing is under way."""

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


@pytest.fixture
def clocks(monkeypatch):
    properties = SimpleNamespace(L2_cache_size=1)
    for name, stand_in in {
        "Event": Event,
        "synchronize": lambda: None,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: "Dry Run",
        "get_device_properties": lambda device: properties,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(dispatch, "target_of", lambda device: Target("interpreter", 0, 3))


def in_one(calls):
    """As graphs are replayed: all the calls as one."""

    def replay():
        for call in calls:
            call()

    return replay


@pytest.fixture
def bench(clocks, monkeypatch):
    """benchmarks/gpu_layers.py on one small layer; a function of the folder for its results."""
    if on_cpu.COMPILER is None or not hasattr(torch.ops.hylora, "cuda_layer"):
        pytest.skip("the emulated kernels need g++ and hylora_kernels/_csrc.so")
    torch.ops.load_library(on_cpu.build())
    for module in (gpu_layers, gpu_rivals):
        monkeypatch.setattr(module, "DEVICE", CPU)
    in_turns = gpu_layers.in_turns
    monkeypatch.setattr(gpu_layers, "in_turns", lambda contest, rounds: in_turns(contest, 1))
    monkeypatch.setattr(gpu_layers, "limits", lambda: {"hbm": 1e12, "product": 1e14})
    monkeypatch.setattr(gpu_layers, "graph_of", in_one)
    monkeypatch.setattr(gpu_layers, "ROWS", (3, LARGE))
    monkeypatch.setattr(gpu_layers, "WARM_CALLS", 2)
    monkeypatch.setattr(gpu_layers, "TRAINING_ROWS", (17,))
    monkeypatch.setattr(tune, "SHAPES", (SHAPE,))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))

    def run(out, compiled=False):
        with on_cpu.emulated(), use_backend("triton"):
            gpu_layers.run(False, compiled, out)

    return run


def test_the_benchmark_runs_every_rival(bench, tmp_path, capsys):
    bench(tmp_path, compiled=True)
    report = json.loads((tmp_path / "layers.json").read_text())
    rows = report["forward"]
    compiled = ("auto compiled", "four_products compiled", "two_products compiled")
    seen = {(r["form"], r["M"], r["regime"], r["candidate"]) for r in rows}
    wanted = set()
    for form in gpu_layers.FORMS:
        for M in gpu_layers.ROWS:
            regimes = ["graph cold", "eager cold", *(["graph warm"] if M < LARGE else [])]
            wanted |= {(form, M, regime, r) for regime in regimes for r in gpu_rivals.FORWARD}
            wanted |= {(form, M, "eager warm", r) for r in compiled}
    assert seen == wanted
    assert report["failures"] == []
    trained = {(r["form"], r["regime"], r["candidate"]) for r in report["training"]}
    assert trained == {
        (f, regime, r)
        for f in gpu_layers.FORMS
        for regime in ("graph", "eager")
        for r in gpu_rivals.TRAINING
    }
    assert set(report["geometric_means"]) == {
        *(f"forward, {f}, {r}" for f in gpu_layers.FORMS for r in ("graph cold", "eager cold")),
        *(f"forward, {f}, {r} warm" for f in gpu_layers.FORMS for r in ("graph", "eager")),
        *(f"training step, {f}, {r}" for f in gpu_layers.FORMS for r in ("graph", "eager")),
    }
    shown = capsys.readouterr().out
    assert "training step, pivoted, graph: microseconds" in shown and "peft / auto" in shown
    gpu_prediction.main(["--gpu", "H100", "--compare", str(tmp_path / "layers.json")])
    assert "two_products" in capsys.readouterr().out


def test_groups_beside_their_members(bench, tmp_path, monkeypatch, capsys):
    small = {"DEVICE": CPU, "K": 40, "GROUPS": {"q, k, v": ((48, 16), (24, 8), (24, 8))}}
    for name, value in (small | {"ROWS": (1, 17), "ROUNDS": 1}).items():
        monkeypatch.setattr(gpu_groups, name, value)
    with on_cpu.emulated():
        gpu_groups.run(tmp_path, 1e6)
    rows = json.loads((tmp_path / "groups.json").read_text())
    rivals = ["group", "members", "group's products", "dense"]
    for M, names in ((1, [*rivals, "group, C++"]), (17, rivals)):
        for regime in ("graph cold", "eager cold"):
            mine = [r["candidate"] for r in rows if (r["M"], r["regime"]) == (M, regime)]
            assert mine == names
    assert "| q, k, v | 1 | graph cold | " in capsys.readouterr().out
    assert "#### Groups, µs" in gpu_results.render(tmp_path)
    wrong = gpu_groups.group_gpu.torch_products_of
    monkeypatch.setattr(
        gpu_groups.group_gpu, "torch_products_of", lambda *given: 1.1 * wrong(*given)
    )
    message = "group's products of q, k, v, M = 17 is wrong"
    with on_cpu.emulated(), pytest.raises(FloatingPointError, match=message):
        gpu_groups.measure("q, k, v", 17)


def test_a_rival_that_is_wrong_fails_its_layer_alone(bench, tmp_path, monkeypatch, capsys):
    right = gpu_rivals.shrink_and_expand

    def wrong(x, *factors):
        return right(x, *factors) * (1.1 if len(x) == LARGE else 1)

    monkeypatch.setattr(gpu_rivals, "shrink_and_expand", wrong)
    monkeypatch.setattr(gpu_layers, "FORMS", ("pair",))
    with pytest.raises(SystemExit, match=r"failed: 1, the first: .*M=65.* two_products of"):
        bench(tmp_path)
    report = json.loads((tmp_path / "layers.json").read_text())
    assert {r["M"] for r in report["forward"]} == {3}


@pytest.fixture
def tuning(clocks, monkeypatch, tmp_path):
    """tune.tune on the CPU, all of it but the compilation ahead; its table is `path`."""
    calls, measure = tune._calls, tune.measure
    monkeypatch.setattr(tune, "measure", functools.partial(measure, rounds=1))
    monkeypatch.setattr(tune, "BACKWARD_ROWS", (5,))
    monkeypatch.setattr(tune, "WARM_CALLS", 2)
    monkeypatch.setattr(tune, "_calls", lambda problem, device, n: calls(problem, CPU, n))
    monkeypatch.setattr(tune, "_graph", in_one)
    monkeypatch.setattr(tune, "_copies_that_displace", lambda problem, device: 2)
    monkeypatch.setattr(tune, "_copy_bandwidth", lambda device: 1e12)
    monkeypatch.setattr(tune, "compile_all", lambda *given: None)
    path = tmp_path / "table.json"
    options = {"shapes": (SHAPE,), "save": path, "candidates": _few}
    return SimpleNamespace(run=functools.partial(tune.tune, **options), path=path)


def _few(problem, target):
    return [TORCH_PRODUCTS, Config(16, 16, 32, 16, 32, swap=True)]


def test_tuning_measures_every_problem_and_keeps_the_rest(tuning):
    tuning.run(rows=(3,), directions=("forward",))
    report = tuning.run(rows=(5,), forms=("pair",))
    table = json.loads(tuning.path.read_text())
    assert table["device"] == "Dry Run"
    names = ("M", "rank", "lora_rank", "pivoted", "direction")
    found = {tuple(row[name] for name in names) for row in table["rows"]}
    ranks = [(24, 0), (8, 16)]
    assert found == {(3, *rank, form, "forward") for rank in ranks for form in (False, True)} | {
        (5, *rank, False, way) for rank in ranks for way in ("forward", BACKWARD)
    }
    for row in table["rows"]:
        assert [t["config"] == "torch products" for t in row["timings"]] == [True, False]
        by_graph, by_eager = (
            min(row["timings"], key=lambda t, key=key: t[key]) for key in ("graph_cold", "eager")
        )
        assert (row["graph"], row["eager"]) == (by_graph["config"], by_eager["config"])
        for winner in (row["graph"], row["eager"]):
            assert winner == "torch products" or Config(**winner) == _few(None, None)[1]
    assert len(report.render().rows) == 4


def test_the_table_is_what_serves_afterwards(tuning, monkeypatch):
    tuning.run(rows=(3,), forms=("pair",), directions=("forward",))
    whole = json.loads(tuning.path.read_text())
    mine = Config(16, 16, 64, 32, 32, swap=True)
    for row in whole["rows"]:
        row["graph"], row["eager"] = tune._plain(mine), "torch products"
    path = configs.table_path("Dry Run")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole))
    dispatch.read_tables_again()
    try:
        problem = Problem(4, *SHAPE, dtype=torch.bfloat16)
        target = Target("cuda", 90, 132)
        captured, eager = (
            dispatch.tuned_or_default(problem, target, "Dry Run", captured)
            for captured in (True, False)
        )
        assert captured == mine and eager is TORCH_PRODUCTS
    finally:
        path.unlink()
        dispatch.read_tables_again()


def test_a_candidate_that_is_wrong_is_refused(tuning, monkeypatch):
    from hylora_kernels.backends.triton import launch

    layer = launch.layer

    def wrong(*given):
        y, h_a = layer(*given)
        return y * 1.1, h_a

    monkeypatch.setattr(launch, "layer", wrong)
    with pytest.raises(FloatingPointError, match=r"Config\(BM=16.* computes Problem\(M=3"):
        tuning.run(rows=(3,), forms=("pair",), directions=("forward",))
