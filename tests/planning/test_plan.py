"""plan(): counts are the compression's own, sizes what budgets promise, stages what a run has."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import pytest
import torch
from helpers import tiny
from helpers.compressing import IDS, SMALL
from helpers.mixtures import CONFIGS, mixture
from helpers.zoo import LIKE_LLAMA, ZOO, zoo_model
from transformers import LlamaConfig
from typer.testing import CliRunner

from hylora_kernels.cli import main as cli
from hylora_kernels.compression.calibration import gather, passes
from hylora_kernels.compression.compress import compress
from hylora_kernels.compression.factors import factor_bytes
from hylora_kernels.model.hollow import hollow_model_of
from hylora_kernels.model.saving import save_pretrained
from hylora_kernels.model.structure import discover
from hylora_kernels.planning.devices import DEVICES, machine_of
from hylora_kernels.planning.machine import rate_at, read
from hylora_kernels.planning.options import PlanOptions
from hylora_kernels.planning.plan import plan
from hylora_kernels.planning.stages import factorize_seconds
from hylora_kernels.planning.work import Work

OPTIONS = {"calibration": IDS, "cache": False, **SMALL}
PLAIN = {"probe": False, **OPTIONS}


def folder_of(config, path):
    """A folder that holds a config and nothing else."""
    config = copy.deepcopy(config)
    config.dtype = torch.float32
    config.save_pretrained(path)
    return path


# llama's embeddings are tied, qwen2's are not; both have fewer heads of keys; GPT-2 has Conv1D.
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_counts_are_the_compressions(name, tmp_path):
    found = plan(folder_of(ZOO[name].config, tmp_path), keep=0.7, ranks="uniform", **PLAIN)
    _, report = compress(zoo_model(name), keep=0.7, ranks="uniform", **OPTIONS)
    assert found.parameters == report.model_dense_parameters
    assert found.linears == report.dense_parameters
    assert found.body_parameters == report.body_parameters
    assert found.bytes == report.model_dense_bytes
    assert found.result.parameters == report.model_parameters
    assert found.result.parameters_as_is == report.model_parameters_as_is
    assert found.result.bytes == report.model_bytes
    assert found.calibration_tokens == report.calibration_tokens


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_experts_count(name, tmp_path):
    found = plan(folder_of(CONFIGS[name], tmp_path), keep=0.8, **PLAIN)
    _, report = compress(mixture(name), keep=0.8, **OPTIONS)
    assert found.parameters == report.model_dense_parameters
    assert found.linears == report.dense_parameters
    assert found.body_parameters == report.body_parameters
    assert abs(found.result.keep - report.keep) < 0.01
    by_block = plan(tmp_path, keep=0.8, route="by_block", **PLAIN)
    assert "refuses stacks of experts" in by_block.advice[0]


def test_a_budget_is_met_from_below_and_its_bytes_are_the_files(tmp_path):
    config = folder_of(ZOO["llama"].config, tmp_path / "config")
    for given in ({"keep": 0.7}, {"target_params": 15_000}, {"target_mb": 0.075, "bits": "auto"}):
        budget = PLAIN | given | {"lora_rank": 0}
        found = plan(config, **budget)
        model, report = compress(zoo_model("llama"), **OPTIONS | given | {"lora_rank": 0})
        out = tmp_path / "-".join(given)
        save_pretrained(model, out)
        size = (out / "model.safetensors").stat().st_size
        assert abs(found.result.bytes / size - 1) < 0.1, given
        if "keep" in given:
            assert found.result.keep <= 0.7 and abs(found.result.keep - report.keep) < 0.02
        if "target_params" in given:
            assert found.result.parameters <= 15_000
        if "target_mb" in given:
            assert found.result.bytes <= 75_000


def test_disk_and_passes_are_those_of_the_run(tmp_path):
    model = tiny.llama()
    structure = discover(model)
    memory = 40_000
    config = folder_of(model.config, tmp_path)
    found = plan(config, keep=0.8, max_memory=memory, route="in_memory", **PLAIN)
    assert found.passes == len(passes(structure.groups, True, memory)) > 1
    disk = {stage.name: stage.disk for stage in found.stages}
    assert disk["factorize"] == sum(factor_bytes(t.shape) for t in structure.targets)
    whitened = plan(config, keep=0.8, method="whitened", max_memory=memory, **PLAIN)
    assert whitened.passes == len(passes(structure.groups, False, memory)) < found.passes
    plain = plan(config, keep=0.8, method="svd", **PLAIN)
    assert plain.passes == 0 and plain.calibration_tokens == 0
    assert {"calibrate", "refit", "measure"}.isdisjoint(s.name for s in plain.stages)


def test_one_block_at_a_time_needs_less(tmp_path):
    sizes = {"num_hidden_layers": 24, "hidden_size": 128, "intermediate_size": 512}
    folder = folder_of(LlamaConfig(**LIKE_LLAMA | sizes), tmp_path)
    in_memory = plan(folder, keep=0.8, route="in_memory", **PLAIN)
    by_block = plan(folder, keep=0.8, route="by_block", **PLAIN)
    at = [{s.name: s.memory for s in p.stages} for p in (in_memory, by_block)]
    assert all(at[1][name] < at[0][name] for name in at[0])
    # Between the two peaks the route is chosen, and said why.
    memory = (in_memory.peak + by_block.peak) // 2
    chosen = plan(folder, keep=0.8, memory=memory, **PLAIN)
    assert chosen.route == "by_block" and "whole in memory would need" in chosen.advice[0]
    assert plan(folder, keep=0.8, memory=2 * in_memory.peak, **PLAIN).route == "in_memory"
    short = plan(folder, keep=0.8, memory=10**6, **PLAIN)
    assert any("does not fit: calibrate" in line for line in short.advice)
    assert "does not fit: calibrate" in str(short)


def test_own_text_is_written_by_a_model_in_memory_alone(tmp_path):
    folder = folder_of(ZOO["llama"].config, tmp_path)
    given = {"probe": False, **SMALL, "length": 16, "samples": 8}
    found = plan(folder, keep=0.8, route="in_memory", **given)
    assert found.calibration_tokens == 16 * (4 + 2)
    assert "own text" in [s.name for s in found.stages]
    found = plan(folder, keep=0.8, route="by_block", **given)
    assert found.calibration_tokens == 16 * 2
    assert "own text" not in [s.name for s in found.stages]


def test_more_processes_take_less_time_on_gpus_of_their_own(tmp_path):
    folder = folder_of(ZOO["llama"].config, tmp_path)
    one, eight = (plan(folder, keep=0.8, machine="h100", processes=n, **OPTIONS) for n in (1, 8))
    seconds = [{s.name: s.seconds for s in p.stages} for p in (one, eight)]
    assert seconds[1]["calibrate"] == pytest.approx(seconds[0]["calibrate"] / 8)
    assert eight.memory == one.memory
    one, two = (plan(folder, keep=0.8, machine="laptop", processes=n, **OPTIONS) for n in (1, 2))
    assert two.memory == one.memory // 2 and two.seconds == pytest.approx(one.seconds)


def test_the_probe_and_its_json(tmp_path):
    folder = folder_of(ZOO["llama"].config, tmp_path / "config")
    found = plan(folder, keep=0.8, device="cpu", **OPTIONS)
    m = found.machine
    rates = [v for v in dataclasses.asdict(m).values() if isinstance(v, float)]
    rates += [rate for name in ("gram", "matmul", "eigh", "cut") for _, rate in getattr(m, name)]
    assert all(0 < rate < math.inf for rate in rates if rate != m.latency)
    assert found.seconds == sum(s.seconds for s in found.stages) > 0
    path = found.save(tmp_path / "plan.json")
    again = plan(folder, keep=0.8, machine=path, **OPTIONS)
    assert [s.seconds for s in again.stages] == [s.seconds for s in found.stages]
    assert read(m.save(tmp_path / "machine.json")) == read(path)
    assert json.loads(path.read_text())["stages"][0]["name"] == "load"


def test_rates_between_sizes():
    points = [(100, 1e9), (400, 4e9)]
    assert rate_at(points, 50) == 1e9 and rate_at(points, 1000) == 4e9
    assert rate_at(points, 200) == pytest.approx(2e9)


@pytest.mark.parametrize("name", DEVICES)
def test_devices_are_machines(name):
    assert machine_of(name).to_dict()["memory"] > 2e10


def test_factorizing_takes_the_larger_side_in_and_the_smaller_one_apart():
    m = machine_of("laptop")
    wide, tall = (factorize_seconds(m, s, True, True) for s in ((64, 256), (256, 64)))
    assert wide == pytest.approx(tall)
    assert factorize_seconds(m, (64, 256), False, False) < wide


def test_errors_name_the_argument(tmp_path):
    folder = folder_of(ZOO["llama"].config, tmp_path)
    for given, words in (
        ({"keep": 0.01}, "smallest feasible keep"),
        ({"keep": 0.8, "processes": 0}, "processes must be"),
        ({"keep": 0.8, "memory": -5}, "memory must be"),
        ({"keep": 0.8, "route": "by_air"}, "route must be one of"),
        ({"keep": 0.8, "machine": tmp_path / "none.json"}, r"machine: .*none\.json"),
        ({"keep": 0.8, "target_mb": 1}, "only one budget"),
    ):
        with pytest.raises(ValueError, match=words):
            plan(folder, **PLAIN | given)


def test_gathering_takes_what_the_plan_says_of_statistics():
    model = zoo_model("llama")
    structure = discover(model)
    statistics = gather(model, IDS, structure.groups, True, progress=False)
    held = [*statistics.inputs.values(), *statistics.gradients.values()]
    work = Work(hollow_model_of(model.config, torch.float32), PlanOptions(keep=0.8, **PLAIN))
    assert work.statistics(work.structure.groups) == sum(t.nbytes for t in held)


def test_the_command(tmp_path):
    folder = folder_of(ZOO["llama"].config, tmp_path / "config")
    words = ["plan", str(folder), "--no-probe", "--keep", "0.7", "--memory", "24GB"]
    words += ["--rank-multiple", "4", "--json", str(tmp_path / "plan.json")]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, result.output
    assert "predicted" in result.output and "NVIDIA H100" in result.output
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["memory"] == 24 * 10**9 and written["machine"] is None
    assert written["seconds"] == 0.0
    bad = CliRunner().invoke(cli.app, [*words, "--memory", "lots"])
    assert bad.exit_code == 2
