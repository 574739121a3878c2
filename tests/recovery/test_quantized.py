"""finetune() on codes: adapters are trained and stay, the codes are what they were."""

from __future__ import annotations

import torch
from helpers.checkpoints import IDS
from helpers.quantizing import quantized_model

from hylora_kernels.model.adapters import add_adapters
from hylora_kernels.recovery.finetune import finetune


def test_adapters_are_trained_on_codes_and_stay():
    model = add_adapters(quantized_model("llama"), 2, include=["k_proj", "up_proj"])
    layer = model.model.layers[0].self_attn.k_proj
    before = {n: p.clone() for n, p in model.state_dict().items()}
    report = finetune(model, IDS, objective="adapt", steps=2, progress=False)
    changed = {n for n, p in model.state_dict().items() if not torch.equal(p, before[n])}
    assert layer.lora_rank == 2 and layer.B.any()
    assert changed and all(name.endswith((".A", ".B")) for name in changed)
    adapters = [p for name, p in model.named_parameters() if name.endswith((".A", ".B"))]
    assert report.trainable == sum(p.numel() for p in adapters)
