"""benchmarks/gpu_decode.py and gpu_host_cost.py on a CPU: every part runs, checks and writes. Times
mean nothing here."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu_decode
import gpu_models
import gpu_one_row
import gpu_results

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a GPU: benchmarks/gpu.sh"
)
CPU = torch.device("cpu")
OURS = ["dense", "keep 0.5 pivoted", "keep 0.5 pair"]


def test_every_part_is_measured_and_in_the_tables(tmp_path):
    torch.manual_seed(0)
    deadline = time.monotonic() + 1e6
    bench = gpu_decode.DecodeBench("tiny", gpu_models.TINY, CPU, deadline, tmp_path)
    bench.run()
    assert bench.failures == []
    found = {}
    for row in json.loads((tmp_path / "models.json").read_text()):
        found.setdefault((row["what"], row["mode"], row["batch"]), []).append(row["candidate"])
    assert found.pop(("decode", "runtime", 2)) == [*OURS, gpu_decode.PEER]
    others = [("decode", "runtime compiled", 2), ("prefill", "optimised", 1)]
    assert found == dict.fromkeys([*others, ("decode", "optimised", 1)], OURS)
    shown = gpu_results.render(tmp_path)
    assert "| prefill optimised | decode optimised, batch 1 |" in shown
    assert f"| {gpu_decode.PEER} | " in shown


def test_a_step_is_the_same_after_it_was_taken_back(tmp_path):
    bench = gpu_decode.DecodeBench("tiny", gpu_models.TINY, CPU, 1e18, tmp_path)
    with torch.no_grad():
        run = bench.steps_of(bench.dense, 2)
        assert torch.equal(run(), run())


HOST = "import gpu_host_cost; gpu_host_cost.main(['--out', {!r}, '--seconds', '0.1'])"


@pytest.mark.skipif(shutil.which("g++") is None, reason="the ops are compiled with g++")
@pytest.mark.skipif(
    not hasattr(torch.ops.hylora, "cuda_packed_layer"), reason="_csrc.so isn't built"
)
def test_the_host_cost_without_launches(tmp_path):
    code = f"import sys; sys.path.append({str(Path(gpu_decode.__file__).parent)!r}); "
    done = subprocess.run(
        [sys.executable, "-c", code + HOST.format(str(tmp_path))], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "host_cost.json").read_text())
    assert report["on_gpu"] is False and set(report["microseconds"]) == {
        "nn.Linear",
        "three on one x, one by one",
        "three on one x, a group",
        *(
            f"{form}, {kind}"
            for form in ("pair", "pivoted")
            for kind in ("adapter apart", "optimised")
        ),
    }
    assert "all but the driver's launch" in gpu_results.render(tmp_path)


def test_layers_behind_two_products_are_listed():
    where = {"K": 8, "N": 9, "r": 2, "ra": 0, "form": "pivoted", "M": 2048, "regime": "graph cold"}
    times = {"auto": 4e-6, "optimised": 2.05e-6, "two_products": 2e-6}
    rows = [{**where, "candidate": name, "seconds": s} for name, s in times.items()]
    assert gpu_results.behind_two_products(rows) == [
        "8 to 9 (2 + 0) pivoted, M = 2048, graph cold: auto has 0.50 of two products' speed"
    ]
    assert len(gpu_results.behind_two_products(rows, least=0.98)) == 2


def test_one_row_is_a_table_and_says_what_it_needs(monkeypatch):
    row = {"variant": "empty kernel", "blocks": 128, "cold_us": 1.25, "warm_us": 1.2}
    report = {"K": 8, "N": 16, "rank": 8, "rows": [row, {**row, "blocks": 264}]}
    assert "| empty kernel | 1.2 / 1.2 | 1.2 / 1.2 |" in gpu_results.one_row(report)
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    with pytest.raises(SystemExit, match="needs nvcc: none on PATH"):
        gpu_one_row.nvcc_command(Path("program"), "native")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_the_experiment_of_one_row_compiles(arch, tmp_path):
    words = gpu_one_row.nvcc_command(tmp_path / "one_row.cubin", arch)
    done = subprocess.run([*words, "-cubin"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
