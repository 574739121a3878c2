"""The GPU backends on fake CUDA tensors, without a GPU: shapes, devices, compile, export.

Autograd can't run here: torch's CPU build asks a CUDA device guard for every gradient that it
records. The backward op is called instead.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from hylora_kernels import backends, svd_lora_linear, use_backend

FORMS = ("pair", "pivoted")


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    return request.param


@pytest.fixture
def fake(backend, monkeypatch):
    """A function that makes fake CUDA inputs, (x, SVh, U, A, B, bias, alpha, pivots).

    The backend is forced and refuses nothing, since there is no device to ask.
    """
    monkeypatch.setattr(backends.BACKENDS[backend], "unsupported", lambda *call: None)

    def make(form, lora_rank=2, dtype=torch.bfloat16):
        def empty(*shape, dtype=dtype):
            return torch.empty(*shape, device="cuda", dtype=dtype)

        A, B = (empty(lora_rank, 16), empty(9, lora_rank)) if lora_rank else (None, None)
        pivots = empty(4, dtype=torch.int32) if form == "pivoted" else None
        U = empty(9 if pivots is None else 5, 4)
        return empty(2, 3, 16), empty(4, 16), U, A, B, empty(9), 0.5, pivots

    with FakeTensorMode(), use_backend(backend):
        yield make


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("form", FORMS)
def test_shapes_and_devices(form, lora_rank, backend, fake):
    x, SVh, U, A, B, bias, alpha, pivots = fake(form, lora_rank)
    y = svd_lora_linear(x, SVh, U, A, B, bias, alpha, pivots)
    assert (y.shape, y.device.type, y.dtype) == ((2, 3, 9), "cuda", torch.bfloat16)
    h_a, adapter = y.new_empty(6, lora_rank), bool(lora_rank)
    gradients = getattr(torch.ops.hylora, f"{backend}_backward")(
        *(y, x, h_a, SVh, U, A, B, alpha, pivots, [True, adapter, adapter, True])
    )
    shapes = [(2, 3, 16), (2, 16), (9, 2), (9,)] if adapter else [(2, 3, 16), (0,), (0,), (9,)]
    assert [tuple(g.shape) for g in gradients] == shapes
    assert all(g.device.type == "cuda" for g in gradients)


@pytest.mark.parametrize("form", FORMS)
def test_compile_whole_graph(form, fake):
    inputs = fake(form)
    torch.compiler.reset()
    y = torch.compile(svd_lora_linear, backend="aot_eager", fullgraph=True)(*inputs)
    assert (y.shape, y.device.type) == ((2, 3, 9), "cuda")


class Call(torch.nn.Module):
    def __init__(self, SVh, U, bias, pivots):
        super().__init__()
        for name, value in {"SVh": SVh, "U": U, "bias": bias, "pivots": pivots}.items():
            self.register_buffer(name, value)

    def forward(self, x):
        return svd_lora_linear(x, self.SVh, self.U, bias=self.bias, pivots=self.pivots)


@pytest.mark.parametrize("form", FORMS)
def test_export(form, backend, fake):
    x, SVh, U, _, _, bias, _, pivots = fake(form)
    length = {1: torch.export.Dim("length")}
    module = Call(SVh, U, bias, pivots)
    program = torch.export.export(module, (x,), dynamic_shapes=(length,))
    assert f"hylora.{backend}_forward" in str(program.graph)
