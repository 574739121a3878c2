"""Models that several processes hold together, or in wrappers of their own."""

from __future__ import annotations

import pytest
import torch
from helpers.checkpoints import assert_same, build
from helpers.processes import run_together
from torch import nn

from hylora_kernels.model.checkpoint import load_pretrained
from hylora_kernels.model.saving import save_pretrained

SHARDED = """
import copy, sys
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from helpers.checkpoints import IDS, build
from hylora_kernels.model.modules import freeze_all_but_adapters
from hylora_kernels.model.saving import save_in_hylora_format, save_pretrained
from hylora_kernels.recovery.finetune import finetune

folder = Path(sys.argv[1])
distributed.init_process_group("gloo")
torch.manual_seed(0)
plain = freeze_all_but_adapters(build("llama, tied"))
model = copy.deepcopy(plain)
for block in model.model.layers:
    fully_shard(block)
fully_shard(model)
for trained in (plain, model):
    adapters = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(adapters, lr=0.1)
    for _ in range(2):
        trained(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
save_pretrained(model, folder / "sharded")
assert (folder / "sharded" / "config.json").exists()  # in every process
first = distributed.get_rank() == 0
save_in_hylora_format(model).save_pretrained(folder / "own", is_main_process=first)
if first:
    save_pretrained(plain, folder / "plain")
(folder / "file").write_text("")
try:
    save_pretrained(model, folder / "file")
except (ValueError, RuntimeError) as error:
    print(f"{type(error).__name__}: {error}")
try:
    finetune(model, torch.zeros(2, 8, dtype=torch.long), steps=1)
except ValueError as error:
    print(error)
distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """(the folder, what each process printed)"""
    folder = tmp_path_factory.mktemp("sharded")
    return folder, [out.splitlines() for out, _ in run_together(SHARDED, folder)]


def test_a_sharded_model_is_saved_as_the_whole_one(sharded):
    folder, _ = sharded
    for name in ("sharded", "own"):
        files = sorted(path.name for path in (folder / name).iterdir())
        assert files == ["config.json", "generation_config.json", "model.safetensors"]
        for file in files:
            assert (folder / name / file).read_bytes() == (folder / "plain" / file).read_bytes()
    load_pretrained(folder / "sharded")


def test_a_failure_of_the_first_process_is_one_of_all(sharded):
    folder, printed = sharded
    said = f"dir '{folder}/file' is a file, not a folder"
    assert printed[0][0] == f"ValueError: {said}"
    assert printed[1][0] == (
        f"RuntimeError: the first process could not save the model: ValueError: {said}"
    )


def test_finetune_refuses_a_sharded_model(sharded):
    _, printed = sharded
    for lines in printed:
        assert "model must be whole in each process, but model." in lines[-1]


def test_wrappers(tmp_path):
    model = build()
    for i, wrapped in enumerate((nn.DataParallel(model), torch.compile(nn.DataParallel(model)))):
        save_pretrained(wrapped, tmp_path / str(i))
        assert_same(load_pretrained(tmp_path / str(i)), model)

    class PeftModel(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_model = model

    with pytest.raises(TypeError, match="PreTrainedModel, got PeftModel"):
        save_pretrained(PeftModel(), tmp_path / "x")
    assert not (tmp_path / "x").exists()
