"""A quantised model whose codes are divided among processes, and one that each holds whole."""

from __future__ import annotations

from helpers.processes import run_together

TRAINED = """
import copy, sys
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from helpers.checkpoints import IDS
from helpers.quantizing import quantized_model
from hylora_kernels.model.adapters import add_adapters
from hylora_kernels.model.saving import save_pretrained

folder = Path(sys.argv[1])
distributed.init_process_group("gloo")
plain = add_adapters(quantized_model("llama, tied"), 2, include=["k_proj", "up_proj"])
codes = plain.model.layers[0].self_attn.k_proj.SVh.codes
sharded, replicated = copy.deepcopy(plain), copy.deepcopy(plain)
for block in sharded.model.layers:
    fully_shard(block)
fully_shard(sharded)
local = sharded.model.layers[0].self_attn.k_proj.SVh.codes.to_local()
assert local.dtype == torch.uint8 and local.numel() == codes.numel() // 2
for model in (plain, sharded, DistributedDataParallel(replicated)):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
for name, model in (("sharded", sharded), ("replicated", replicated), ("plain", plain)):
    if name == "sharded" or distributed.get_rank() == 0:
        save_pretrained(model, folder / name)
half = copy.deepcopy(plain)
fully_shard(half, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
assert half(IDS).logits.dtype == torch.bfloat16
distributed.destroy_process_group()
"""


def test_codes_are_sharded_and_trained_on_as_whole_ones(tmp_path):
    run_together(TRAINED, tmp_path)
    file = "model.safetensors"
    plain = (tmp_path / "plain" / file).read_bytes()
    assert (tmp_path / "sharded" / file).read_bytes() == plain
    assert (tmp_path / "replicated" / file).read_bytes() == plain
