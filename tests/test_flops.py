"""FlopCounterMode on a layer: as many operations as torch counts for the same products."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers.numerics import Inputs, every_backend, every_form, make_layer, skip_if_refused
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hylora_kernels import SVDLoRALinear, optimize_for_inference, use_backend


def counted(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def numbers(layer, *names) -> int:
    return sum(getattr(layer, n).numel() for n in names if getattr(layer, n) is not None)


@every_backend
@every_form
@pytest.mark.parametrize("lora_rank", [0, 3])
@pytest.mark.parametrize("lead", [(5,), (2, 3), (), (0,)], ids=str)
def test_forward_and_backward_are_counted(lead, lora_rank, form, backend):
    layer = make_layer(form, lora_rank=lora_rank, dtype=torch.float32)
    x = torch.randn(*lead, 14, requires_grad=True)
    skip_if_refused(backend, Inputs(x, *layer._weights()))
    M = x.shape[:-1].numel()
    base, adapter = numbers(layer, "SVh", "U"), numbers(layer, "A", "B")
    with use_backend(backend):
        assert counted(lambda: layer(x)) == 2 * M * (base + adapter)
        both = counted(lambda: layer(x).sum().backward())
        assert both == 2 * M * (base + adapter) * 2 + 2 * M * adapter
        # without dx: dh_a = alpha dy B, then dA and dB
        ends = counted(lambda: layer(x.detach()).sum().backward()) - 2 * M * (base + adapter)
        assert ends == 2 * M * (numbers(layer, "B") + adapter)


def test_the_formula_of_a_pair():
    layer = SVDLoRALinear(64, 32, 16, 8)
    assert counted(lambda: layer(torch.ones(10, 64))) == 2 * 10 * (16 + 8) * (64 + 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lora_rank", [0, 3])
@every_form
def test_packed_layers_are_counted(form, lora_rank, dtype):
    layer = make_layer(form, 64, 96, 40, lora_rank, dtype=dtype).eval()
    x = torch.randn(2, 3, 96, dtype=dtype)
    with torch.no_grad():
        plain = counted(lambda: layer(x))
        packed = optimize_for_inference(nn.Sequential(layer, nn.Linear(64, 8, dtype=dtype)).eval())
        joined = counted(lambda: packed(x)) - 2 * 6 * 64 * 8
    assert plain == 2 * 6 * numbers(make_layer(form, 64, 96, 40, lora_rank), "SVh", "U", "A", "B")
    assert joined == plain


@pytest.mark.parametrize("order", ["counter first", "package first", "between"])
def test_the_counter_may_be_imported_before_or_after(order):
    counter = "from torch.utils.flop_counter import FlopCounterMode"
    package = "import sys, torch, hylora_kernels\nlayer = hylora_kernels.SVDLoRALinear(8, 8, 4)"
    ends = "with FlopCounterMode(display=False) as c: layer(torch.ones(3, 8))\n"
    ends += "print(c.get_total_flops())"
    lines = {
        "counter first": [counter, package],
        "package first": [package, "assert 'triton' not in sys.modules", counter],
        "between": [package, "import importlib.util, torch.utils", counter],
    }[order]
    code = "\n".join([*lines, ends])
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(2 * 3 * (4 * 8 + 8 * 4))
