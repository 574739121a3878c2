"""benchmarks/gpu_models.py on a CPU with a tiny model: every part runs, checks and writes. Times
mean nothing here. The whole run is a process in which datasets, platformdirs and gguf can't be
imported: a bare machine with a GPU has none of them.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.capturing import NoNumberAsked
from transformers import StaticCache

from hylora_kernels import SVDLoRALinear
from hylora_kernels.backends.triton.config import (
    BACKWARD,
    FORWARD,
    TORCH_PRODUCTS,
    Target,
    default_config,
)

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu_compressed
import gpu_models
import gpu_results
import gpu_session

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a GPU: benchmarks/gpu.sh"
)
BENCHMARKS = Path(gpu_models.__file__).parent
CPU = torch.device("cpu")
CANDIDATES = ["dense", *(f"keep {k} {f}" for k in (0.5, 0.6) for f in ("pivoted", "pair"))]
BARE = """
import importlib.abc, sys
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("datasets", "platformdirs", "gguf"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
import gpu_layers, gpu_models, gpu_prediction, gpu_session
from hylora_kernels.backends.triton import config
from hylora_kernels.cli import main
from hylora_kernels.machine import tune
from hylora_kernels.machine.selftest import grid, run
assert config.table("no such card") == () and gpu_session.gpu_tests()[0]
cases = [grid.Entry(grid.Case(3, (37, 53, 7, 8), "pivoted"), 0, grid.DTYPES[2:])]
run.plan = lambda *given: cases
assert run.selftest("cpu").failures == []
gpu_models.main(["tiny", "--out", sys.argv[1]])
gpu_models.main(["tiny", "--compiled", "--out", sys.argv[1]])
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(its rows, the folder)."""
    out = tmp_path_factory.mktemp("out")
    places = os.pathsep.join([str(BENCHMARKS), gpu_session.environment({})["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-c", BARE, out],
        env=os.environ | {"PYTHONPATH": places, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "FAILED" not in done.stdout and "skipped" not in done.stdout
    return json.loads((out / "models.json").read_text()), out


def test_every_part_is_measured(ran):
    sizes, found = gpu_models.TINY, {}
    for row in ran[0]:
        key = row["adapters"], row["what"], row["mode"], row["batch"]
        found.setdefault(key, []).append(row["candidate"])
    wanted = {("apart", "training step", "eager", 1): CANDIDATES}
    for adapters in ("merged", "apart"):
        wanted[adapters, "prefill", "eager", 1] = CANDIDATES
        wanted[adapters, "host cost of a layer's call", "eager", 1] = CANDIDATES
        for mode, batch in itertools.product(("graph", "eager"), sizes.batches):
            wanted[adapters, "decode", mode, batch] = CANDIDATES
    for batch in sizes.batches:
        wanted["merged", "decode", "compiled", batch] = CANDIDATES[:3]
    assert found == wanted
    assert all(row["seconds"] > 0 and row["times_faster_than_dense"] > 0 for row in ran[0])
    ratios = {r["times_faster_than_dense"] for r in ran[0] if r["candidate"] == "dense"}
    assert ratios == {1.0}


def test_the_results_are_tables_of_the_measured(ran):
    rendered = gpu_results.render(ran[1])
    merged, apart = rendered.split("tiny, adapters apart:")
    head = "|  | prefill | host cost of a layer's call, µs | decode graph, batch 2 |"
    assert head in merged and "| decode compiled, batch 2 |" in merged
    assert "| training step, ms |" in apart and "host cost of a layer's call, µs" in apart
    assert [line.split(" | ")[0] for line in apart.splitlines()[4:9]] == [
        f"| {name}" for name in CANDIDATES
    ]


def test_compressed_models_keep_what_they_say():
    dense = gpu_compressed.build("tiny", CPU)
    linears = gpu_compressed.linears(dense)
    whole = sum(linear.weight.numel() for linear in linears.values())
    for form, lora_rank in itertools.product(gpu_compressed.FORMS, (0, 8)):
        model = gpu_compressed.compressed(dense, 0.6, form, lora_rank)
        layers = gpu_compressed.linears(model)
        assert list(layers) == list(linears)
        kept = sum(layer.parameter_count(merged=True) for layer in layers.values())
        assert 0.4 * whole < kept <= 0.6 * whole
        assert all(layer.lora_rank == lora_rank for layer in layers.values())
        # all else is the dense model's very memory
        assert model.lm_head.weight is dense.lm_head.weight
        assert model.model.embed_tokens.weight is dense.model.embed_tokens.weight
    assert not any(isinstance(module, SVDLoRALinear) for module in dense.modules())


def test_all_launches_are_compiled_ahead(monkeypatch):
    dense, given = gpu_compressed.build("tiny", CPU), {}
    models = [dense, gpu_compressed.compressed(dense, 0.5, "pivoted", 8)]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "no such card")
    target = Target("cuda", 90, 132)
    monkeypatch.setattr(gpu_compressed.dispatch, "target_of", lambda device: target)

    def keep(problems, device, target, candidates):
        given.update({problem: candidates(problem, target) for problem in problems})

    monkeypatch.setattr(gpu_compressed.tune, "compile_all", keep)
    gpu_compressed.compile_ahead(models, [1, 2048], [2048], CPU)
    layers = gpu_compressed.linears(models[1]).values()
    sizes = {(layer.in_features, layer.out_features, layer.rank, 8) for layer in layers}
    assert {(p.K, p.N, p.rank, p.lora_rank) for p in given} == sizes
    assert {(p.M, p.direction) for p in given} == {
        (1, FORWARD),
        (2048, FORWARD),
        (2048, BACKWARD),
    }
    for problem, configs in given.items():
        assert configs == [default_config(problem, target, c) for c in (True, False)]
        launches = [config is not TORCH_PRODUCTS for config in configs]
        assert launches == [problem.M == 1, False], "in a graph alone"


@torch.no_grad()
def test_a_decode_step_can_be_captured_and_replayed():
    dense = gpu_compressed.build("tiny", CPU)
    for model in (dense, gpu_compressed.compressed(dense, 0.5, "pivoted", 8)):
        cache = StaticCache(config=dense.config, max_cache_len=8)
        ids = gpu_models.random_ids(dense, 2, 6)
        dense(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        run = gpu_models.static_decode(model, cache, ids[:, :1], 2)
        first = run()
        with NoNumberAsked():
            again = run()
        assert torch.equal(first, again), "the cache's length is put back"
        growing = gpu_models.DynamicCache()
        dense(input_ids=ids, past_key_values=growing, logits_to_keep=1)
        by_growing = gpu_models.growing_decode(model, growing, ids[:, :1], 2)
        assert torch.equal(by_growing(), by_growing())
        assert torch.allclose(by_growing().float(), first.float(), atol=0.02)


def bench(tmp_path, seconds: float):
    deadline = time.monotonic() + seconds
    return gpu_models.Bench("tiny", gpu_models.TINY, CPU, deadline, tmp_path)


def test_a_gpu_is_waited_for_its_memory_read_and_its_graphs_replayed(tmp_path, monkeypatch):
    asked, allocated = [], iter(itertools.count(0, 100))
    for name, function in {
        "synchronize": lambda: asked.append("synchronize"),
        "empty_cache": lambda: asked.append("empty_cache"),
        "reset_peak_memory_stats": lambda: asked.append("reset"),
        "memory_allocated": lambda: next(allocated),
        "max_memory_allocated": lambda: next(allocated) + 7,
    }.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(gpu_models, "compile_ahead", lambda *given: asked.append("compile"))
    monkeypatch.setattr(gpu_models.triton, "is_available", lambda: True)
    captured = []

    def graph_of(calls):
        captured.extend(calls)

        def replay():
            calls[0]()

        return replay

    monkeypatch.setattr(gpu_models, "graph_of", graph_of)
    made = bench(tmp_path, 100)
    made.on_gpu = True
    made.compare(8, (0.5,), ("graph", "eager"), 0)
    assert made.failures == [] and len(captured) == 3
    assert {"synchronize", "empty_cache", "reset"} <= set(asked) and asked[0] == "compile"
    rows = json.loads((tmp_path / "models.json").read_text())
    peaks = {(row["what"], row["mode"]): row["peak_bytes"] for row in rows}
    assert [kind for kind, peak in peaks.items() if peak is None] == [
        ("host cost of a layer's call", "eager"),
        ("decode", "graph"),
    ]
    assert all(r["peak_bytes"] in (None, r["weight_bytes"] + 107) for r in rows)
    assert "peak GB, training step" in gpu_results.render(tmp_path)


def test_no_part_is_begun_after_the_deadline(tmp_path, capsys):
    assert gpu_models.run(bench(tmp_path, -1), only_compiled=False) == []
    assert capsys.readouterr().out.count("skipped: building") == 2
    assert not (tmp_path / "models.json").exists()


def test_a_wrong_layer_and_a_number_that_is_not_finite_are_failures(tmp_path, monkeypatch):
    made = bench(tmp_path, 100)
    models = {"dense": made.dense, "broken": gpu_compressed.sharing_copy(made.dense)}
    broken = models["broken"].model.layers[0].mlp.down_proj
    broken.weight = torch.nn.Parameter(broken.weight * torch.inf, requires_grad=False)
    made.attempt("prefill", 0, made.prefill, models)
    assert "FloatingPointError: broken gives numbers that are not finite" in made.failures[0]
    forward = SVDLoRALinear.forward
    monkeypatch.setattr(SVDLoRALinear, "forward", lambda layer, x: 1.1 * forward(layer, x))
    made.attempt("building", 0, made.contest, 0)
    assert "a layer of keep 0.5 pivoted is wrong: relative error 1." in made.failures[1]
    assert not (tmp_path / "models.json").exists()
