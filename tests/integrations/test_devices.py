"""Training on several devices (docs/integrations.md), by two processes on the CPU."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers.documents import sections, write_models
from helpers.processes import ROOT, torchrun
from helpers.quantizing import rounded
from torch import nn
from transformers import AutoModelForCausalLM

from hylora_kernels.layers.quantized import QuantizedLinear, dense_weights
from hylora_kernels.model.adapters import add_adapters
from hylora_kernels.model.checkpoint import load_pretrained
from hylora_kernels.model.load import load_model
from hylora_kernels.model.saving import save_pretrained

pytestmark = pytest.mark.skipif(
    os.environ.get("HYLORA_TEST_ALL") != "1",
    reason="HYLORA_TEST_ALL=1 starts processes for minutes",
)
WEIGHTS = "model.safetensors"
KILL_ONE = """
import os, signal
from transformers import TrainerCallback, trainer

class KillOne(TrainerCallback):
    def on_step_end(self, args, state, control, **others):
        if os.environ["RANK"] == "1" and state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

trainer.DEFAULT_CALLBACKS.append(KillOne)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def train(models, tmp_path):
    """train(name, processes) runs the document's script in the folder `name`, given the models."""
    ((_, code),) = sections()["Training on several devices"]

    def run(name, processes, first=""):
        folder = tmp_path / name
        if not folder.exists():
            shutil.copytree(models, folder)
        script = folder / "train.py"
        script.write_text(first + code, encoding="utf-8")
        return folder, torchrun(script, processes=processes)

    return run


def losses_in(done) -> torch.Tensor:
    assert done.returncode == 0, done.stderr
    (line,) = set(re.findall(r"^losses (.*)$", done.stdout, re.M))
    return torch.tensor([float(loss) for loss in line.split()])


def assert_near(one: Path, two: Path) -> None:
    """Two folders hold the same trained weights, up to the order of sums."""
    a, b = (load_pretrained(folder).state_dict() for folder in (one, two))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def assert_adapters_moved(before: Path, after: Path) -> None:
    """Nothing but adapters differs in the two folders."""
    a, b = (load_pretrained(folder).state_dict() for folder in (before, after))
    assert {name.rpartition(".")[2] for name in a if not a[name].equal(b[name])} == {"A", "B"}


def test_two_processes_train_as_one(train):
    (one, alone), (two, together) = train("one", 1), train("two", 2)
    torch.testing.assert_close(losses_in(alone), losses_in(together), rtol=1e-5, atol=0)
    assert_near(one / "trained", two / "trained")
    assert_adapters_moved(one / "small", two / "trained")


def test_a_killed_process_ends_the_run_and_the_next_one_resumes(train):
    whole, done = train("whole", 2)
    assert done.returncode == 0, done.stderr
    killed, done = train("killed", 2, KILL_ONE)
    assert done.returncode != 0 and "Signal 9 (SIGKILL)" in done.stderr
    assert not (killed / "trained").exists()
    assert [path.name for path in (killed / "runs").iterdir()] == ["checkpoint-2"]
    _, done = train("killed", 2)
    assert done.returncode == 0, done.stderr
    wanted = (whole / "trained" / WEIGHTS).read_bytes()
    assert (killed / "trained" / WEIGHTS).read_bytes() == wanted


def write_codes(dense: Path, folder: Path) -> None:
    """The model in `dense`, the linears of its blocks in 4 bits, with adapters."""
    model, tokenizer = load_model(dense)
    for path, linear in list(model.model.layers.named_modules()):
        if isinstance(linear, nn.Linear):
            weights = dense_weights(rounded(linear.weight, 4))
            layer = QuantizedLinear.from_weights(weights, dtype=torch.float32)
            model.model.layers.set_submodule(path, layer)
    save_pretrained(add_adapters(model, 4), folder, tokenizer)


@pytest.mark.parametrize("kind", ["factors", "codes"])
def test_sharded_training_is_that_of_one_process(kind, models, tmp_path):
    folder = models / "small"
    if kind == "codes":
        folder = tmp_path / "codes"
        write_codes(models / "dense", folder)
    found = []
    for processes in (1, 2):
        given = (folder, models / "text.txt", tmp_path / str(processes))
        script = ROOT / "examples/train_sharded.py"
        found.append(losses_in(torchrun(script, *given, processes=processes)))
    torch.testing.assert_close(*found, rtol=1e-5, atol=0)
    assert_near(tmp_path / "1", tmp_path / "2")
    assert_adapters_moved(folder, tmp_path / "2")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "2")
    quantised = [m for m in loaded.modules() if isinstance(m, QuantizedLinear)]
    assert len(quantised) == (14 if kind == "codes" else 0)
