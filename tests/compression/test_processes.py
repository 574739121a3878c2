"""A compression that several processes share: the same result as one's, and what a loss leaves."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from helpers.compressing import IDS, assert_same, close, compressed
from helpers.processes import end_together, run_together
from helpers.sharing import CASES, compressed_case
from helpers.zoo import zoo_model
from safetensors.torch import load_file
from torch import nn

from hylora_kernels.model.checkpoint import load_pretrained

SHARE = """
import os, sys
os.fsync = lambda file: None  # A busy disk takes a minute for what the cases write.
from pathlib import Path
import torch
from torch import distributed
from helpers.sharing import CASES, compressed_case

folder = Path(sys.argv[1])
for name in CASES:
    model, report = compressed_case(name, folder / "cache")
    made = folder / f"{name}-{distributed.get_rank()}.pt"
    torch.save((model, report), made)
"""

# One that leaves the processes out of calibration, so that all have one process's statistics.
EQUAL = """
import importlib, os, sys
os.fsync = lambda file: None
from pathlib import Path
from helpers.sharing import CASES, compressed_case

calibration = importlib.import_module("hylora_kernels.compression.calibration")
gather = calibration.gather
calibration.gather = lambda *given: gather(*given[:-1])
compressed_case("ranks and bits", Path(sys.argv[1]))
"""

# The process of rank 1, or the first, kills itself at its second step of a stage.
KILL = """
import importlib, os, signal, sys
os.fsync = lambda file: None
from pathlib import Path
from helpers.sharing import compressed_case
from hylora_kernels.compression.workspace import Refits, Workspace
from hylora_kernels.support.processes import LostProcess

calibration = importlib.import_module("hylora_kernels.compression.calibration")
places = {
    "calibrating": (calibration, "token_loss", 1),
    "factorizing": (Workspace, "save", 1),
    "refitting": (Refits, "save", 0),
}
owner, name, rank = places[sys.argv[1]]
original, calls = getattr(owner, name), []

def counted(*given):
    calls.append(name)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*given)

if os.environ["RANK"] == str(rank):
    setattr(owner, name, counted)
try:
    compressed_case("plain", Path(sys.argv[2]))
except LostProcess as error:
    print(error)
    sys.exit(3)
"""


@pytest.fixture(autouse=True)
def without_fsync(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda file: None)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The folder of what two processes made."""
    folder = tmp_path_factory.mktemp("shared")
    run_together(SHARE, folder)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_compress_as_one(name, shared, tmp_path):
    alone, report = compressed_case(name, tmp_path)
    found = [torch.load(shared / f"{name}-{r}.pt", weights_only=False) for r in range(2)]
    for model, other in found:
        assert_same(model, found[0][0])  # the same bits in all processes
        assert_equal_reports(other, report)
    assert same_linears(found[0][0], alone)


def same_linears(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models compute the same by each module but for rounding."""
    ids = torch.arange(48).view(3, 16) % 128
    with torch.no_grad():
        first, second = (m(input_ids=ids, use_cache=False).logits for m in (a, b))
    return close(first, second, 1e-3)


def assert_equal_reports(a, b):
    """Numbers of sums over the text differ by rounding, all others not at all."""
    a, b = a.to_dict(), b.to_dict()
    for name in ("seconds", "peak_rss"):
        del a[name], b[name]
    assert rounded(a) == b
    assert a["calibration_tokens"] == b["calibration_tokens"] and a["sources"] == b["sources"]


def rounded(value):
    """With approx() of each float, which doesn't take nested values itself."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return pytest.approx(value, rel=2e-3, abs=1e-6) if isinstance(value, float) else value


def test_nothing_of_a_temporary_workspace_is_left(shared):
    assert not (shared / "cache" / "passes").exists()


def test_equal_statistics_give_equal_bits(tmp_path):
    run_together(EQUAL, tmp_path / "two")
    compressed_case("ranks and bits", tmp_path / "one")
    one = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.safetensors"))
    two = sorted(p.relative_to(tmp_path / "two") for p in (tmp_path / "two").rglob("*.safetensors"))
    assert one == two and len([p for p in one if "codes" in str(p)]) > 20
    for path in one:
        a, b = load_file(tmp_path / "one" / path), load_file(tmp_path / "two" / path)
        assert a.keys() == b.keys()
        for tensor in a:
            assert torch.equal(a[tensor], b[tensor]), (path, tensor)


@pytest.fixture
def factorized(monkeypatch):
    """The paths of what is factorized in this process."""
    candidates, paths = import_module("hylora_kernels.compression.rank_candidates"), []
    original = candidates.factorize_whitened

    def factorizing(path, *given):
        paths.append(path)
        return original(path, *given)

    monkeypatch.setattr(candidates, "factorize_whitened", factorizing)
    return paths


@pytest.mark.parametrize("stage", ["calibrating", "factorizing", "refitting"])
def test_a_killed_process_ends_the_run_and_a_second_one_continues(stage, tmp_path, factorized):
    ended = end_together(KILL, stage, tmp_path)
    lost = 0 if stage == "refitting" else 1
    assert ended[lost][0] == -9
    status, said, noise = ended[1 - lost]
    assert status == 3, noise
    # The first process holds the store, too, without which the other can't look for it.
    assert f"rank {lost}" in said and f"({stage})" in said, said
    assert "the same command continues" in said
    done = {path.stem for path in (tmp_path / "plain").rglob("*_proj.safetensors")}
    assert len(done) == {"calibrating": 0, "refitting": 21}.get(stage, len(done))
    assert stage != "factorizing" or 2 <= len(done) < 21
    model, _ = compressed_case("plain", tmp_path)
    assert len(factorized) == 21 - len(done) and not done & set(factorized)
    assert same_linears(model, compressed_case("plain", tmp_path / "alone")[0])


BY_BLOCK = """
import os, sys
os.fsync = lambda file: None
from pathlib import Path
import torch
from helpers.compressing import IDS, SMALL
from hylora_kernels import compress_to_folder, load_model

folder = Path(sys.argv[1])
model, _ = load_model(folder / "dense", "cpu", by_block=True)
options = SMALL | {"calibration": IDS, "keep": 0.7, "cache": folder / "cache", "embedding_rank": 8}
if sys.argv[2:]:
    from hylora_kernels.compression.workspace import Workspace
    save, calls = Workspace.save, []

    def saving(*given):
        calls.append(None)
        if len(calls) == 3 and os.environ["RANK"] == "1":
            os._exit(1)
        return save(*given)

    Workspace.save = saving
report = compress_to_folder(model, folder / "small", **options)
with torch.no_grad():
    torch.save((model(IDS).logits, report.loss), folder / f"logits-{os.environ['RANK']}.pt")
"""


@pytest.mark.parametrize("processes", [2, 7])
def test_a_model_in_its_files(processes, tmp_path):
    """Block by block, by two processes, of which one is lost and the command is given again, and by
    more processes than there are sequences."""
    dense = zoo_model("qwen2")
    dense.save_pretrained(tmp_path / "dense")
    if processes == 2:
        ended = end_together(BY_BLOCK, tmp_path, "lost")
        assert all(status for status, *_ in ended) and "rank 1" in ended[0][2]
        assert not (tmp_path / "small" / "config.json").exists()
    run_together(BY_BLOCK, tmp_path, processes=processes)
    alone, report = compressed(dense, embedding_rank=8)
    found = load_pretrained(tmp_path / "small")
    assert same_linears(found, alone)
    for rank in range(processes):
        logits, loss = torch.load(tmp_path / f"logits-{rank}.pt", weights_only=False)
        with torch.no_grad():
            assert torch.equal(logits, found(IDS).logits)
        assert loss == pytest.approx(report.loss, rel=1e-3)
    assert not list((tmp_path / "cache").rglob("hidden-*"))
