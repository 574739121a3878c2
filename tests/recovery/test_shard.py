"""finetune(shard=True): the frozen base divided among processes."""

from __future__ import annotations

import json

import pytest
from helpers.finetuning import BLOCKS, model_of, train
from helpers.processes import run_together
from safetensors.torch import load_file

START = """
import copy, functools, json, os, sys
from pathlib import Path
import torch
from accelerate import PartialState
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from helpers.checkpoints import build
from helpers import tiny
from helpers.finetuning import BLOCKS, assert_same, model_of, state
from helpers.quantizing import quantized_model
from hylora_kernels import use_backend
from hylora_kernels.backends.cpu.panels import kept_panels
from hylora_kernels.model.adapters import add_adapters
from hylora_kernels.recovery.finetune import finetune
from hylora_kernels.recovery.run import Run

folder = Path(sys.argv[1])
torch.set_num_threads(1)
process = PartialState(cpu=True)
train = functools.partial(finetune, progress=False)
local = lambda p: p.to_local() if isinstance(p, DTensor) else p
"""

BYTES = """
whole, parts, running, given = model_of(layers=4), [], [], {}
shapes = {name: p.shape for name, p in whole.named_parameters()}

def held():
    return sum(local(p).nbytes for p in whole.parameters())

def gathered(module, _args):
    running.append(held())

for layer in whole.model.layers:
    layer.mlp.down_proj.register_forward_pre_hook(gathered)
before = held()
kept = before - sum(
    p.nbytes for n, p in whole.named_parameters() if ".layers." in n and n[-2:] not in (".A", ".B")
)
given = [p for n, p in whole.named_parameters() if n.endswith((".SVh", ".U", "layernorm.weight"))]
train(whole, BLOCKS, steps=2, shard=True, merge=False,
      on_step=lambda _: parts.append((held(), sum(p.untyped_storage().nbytes() for p in given))))
block = (before - kept) / 4
assert kept < before / 2 and given
assert parts == [(kept + 2 * block, 0)] * 3, (parts, before, kept)
# One block is whole while it runs: its other half came.
assert set(running[4:]) == {kept + 2.5 * block}, running
assert held() == before and {n: p.shape for n, p in whole.named_parameters()} == shapes
assert not any(isinstance(p, DTensor) for p in whole.parameters())
assert type(whole.model).__name__ == "LlamaModel" and not kept_panels
# The CPU's kernels keep the panels of all layers whose input has a gradient: all but q, k and v of
# the first block.
counts = []
with use_backend("cpu"):
    for shard in (True, False):
        train(whole, tiny.tokens(8, 64), steps=2, batch=4, shard=shard, merge=False,
              on_step=lambda _: counts.append(len(kept_panels)))
assert counts == [0, 0, 0, 0, 25, 25], counts
"""

SAME = """
how = {"steps": 5, "batch": 2, "lr": 1e-2}
models = {
    "plain": model_of,
    "dropout, checkpointing": functools.partial(model_of, dropout=0.2),
    "bfloat16, merged": functools.partial(model_of, torch.bfloat16),
    "codes": lambda: add_adapters(quantized_model("llama, tied"), 2, include=["k_proj", "up_proj"]),
    "gpt2": lambda: build("gpt2", rank=4),
}
options = {
    "dropout, checkpointing": {"gradient_checkpointing": True},
    "bfloat16, merged": {"merge": True},
}
for name, make in models.items():
    given = {"merge": False} | how | options.get(name, {})
    blocks = BLOCKS if name in ("plain", "bfloat16, merged") else BLOCKS[:, :12] % 60
    replicated = make()
    sharded = copy.deepcopy(replicated)
    expected = train(replicated, blocks, **given)
    report = train(sharded, blocks, shard=True, **given)
    assert report.losses == expected.losses, name
    assert (report.base_hash, report.total) == (expected.base_hash, expected.total)
    assert_same(state(sharded), state(replicated))
    if name == "plain" and process.is_main_process:
        save_file(state(sharded), folder / "sharded.safetensors")
        (folder / "losses.json").write_text(json.dumps(report.losses))
"""

RESUMED = """
how = {"steps": 6, "batch": 2, "lr": 1e-2, "merge": False, "save_every": 2}
whole = model_of()
expected = train(whole, BLOCKS, output_dir=folder / "expected", **how)
gradients = Run._gradients

def killed(run, step):
    if step == 4:
        raise KeyboardInterrupt
    return gradients(run, step)

for name, shard in (("sharded", True), ("whole", False)):
    Run._gradients, victim = killed, model_of()
    try:
        train(victim, BLOCKS, shard=True, output_dir=folder / name, **how)
    except KeyboardInterrupt:
        assert not any(isinstance(p, DTensor) for p in victim.parameters())
    Run._gradients, model = gradients, model_of()
    report = train(model, BLOCKS, shard=shard, output_dir=folder / name, **how)
    assert report.losses == expected.losses
    assert_same(state(model), state(whole))
"""

TEACHER = """
os.environ["HYLORA_CACHE"] = str(folder / "cache" / str(process.process_index))
how = {"steps": 3, "batch": 1, "lr": 1e-2, "objective": "keep", "progress": False}
blocks, seen = tiny.tokens(5, 16), []

def teacher():
    model = tiny.llama(seed=3)
    model.model.norm.register_forward_pre_hook(
        lambda _, args: seen.append(
            isinstance(model.model.layers[0].mlp.up_proj.weight, DTensor) and len(args[0][0])))
    return model

expected = finetune(model_of(), blocks, train="adapters", teacher=tiny.llama(seed=3), **how)
os.environ["HYLORA_CACHE"] = str(folder / "other" / str(process.process_index))
report = finetune(model_of(), blocks, shard=True, teacher=teacher, **how)
assert report.losses == expected.losses and report.options["train"] == "adapters"
assert seen.count(16) == 3, seen
files = sorted((folder / "other" / str(process.process_index)).rglob("*.safetensors"))
assert len(files) == 3
if process.is_main_process:
    files[0].unlink()
seen.clear()
again = finetune(model_of(), blocks, shard=True, teacher=teacher, **how)
assert again.losses == expected.losses
assert seen.count(16) == 1, seen  # in both processes
"""


@pytest.mark.slow
@pytest.mark.parametrize("code", [BYTES, RESUMED, TEACHER], ids=["bytes", "resumed", "teacher"])
def test_two_processes(code, tmp_path):
    run_together(START + code, tmp_path)


@pytest.mark.slow
def test_losses_and_adapters_are_those_of_one_process(tmp_path):
    run_together(START + SAME, tmp_path)
    model = model_of()
    report = train(model, BLOCKS, steps=5, batch=4, lr=1e-2, merge=False)
    assert json.loads((tmp_path / "losses.json").read_text()) == pytest.approx(report.losses, 1e-4)
    found = load_file(tmp_path / "sharded.safetensors")
    for name, tensor in model.state_dict().items():
        apart = (found[name] - tensor).double().norm()
        assert apart <= 1e-3 * tensor.double().norm(), name


def test_refusals():
    with pytest.raises(ValueError, match="among processes, and there is one: torchrun"):
        train(model_of(), BLOCKS, steps=1, shard=True)
    with pytest.raises(ValueError, match="shard=True divides what is frozen, but train=factors"):
        train(model_of(), BLOCKS, steps=1, shard=True, train="factors")
