"""layer.weight, the dense matrix that a layer stands for: read by others, never written to."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers.numerics import dense_weight, every_form, make_layer
from torch import Tensor, nn
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5LayerFF

from hylora_kernels import SVDLoRALinear, optimize_for_inference
from hylora_kernels.layers.dense_weight import DenseWeight

READ_ONLY = "^weight of an SVDLoRALinear is computed"


@every_form
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_it_is_the_matrix_of_the_layer(dtype, form):
    layer = make_layer(form, dtype=dtype, alpha=-0.7)
    W, exact = layer.weight, dense_weight(layer).to(dtype)
    assert isinstance(W, Tensor) and (W.dtype, W.device.type, W.shape) == (dtype, "cpu", (9, 14))
    assert torch.equal(W, exact) and torch.equal(W + 0, exact) and torch.equal(W.T, exact.T)
    assert torch.equal(torch.cat([W, W])[9:], exact) and torch.equal(W[2:4], exact[2:4])
    assert len(W) == 9 and W.numel() == 126 and W.float().dtype == torch.float32
    assert torch.equal(pickle.loads(pickle.dumps(W)), exact)
    x = torch.randn(3, 14, dtype=dtype)
    assert torch.equal(F.linear(x, W, layer.bias), layer.to_linear()(x))
    with torch.inference_mode():
        assert torch.equal(layer.weight, exact)


@every_form
def test_it_is_no_state(form):
    layer = make_layer(form)
    for names in (dict(layer.named_parameters()), dict(layer.named_buffers()), layer.state_dict()):
        assert "weight" not in names
    assert copy.deepcopy(layer).load_state_dict(layer.state_dict()) == ([], [])
    assert "weight" not in vars(copy.deepcopy(layer))


@every_form
def test_gradients_reach_the_adapter(form):
    layer, x = make_layer(form, alpha=0.7), torch.randn(3, 14, dtype=torch.float64)
    got = torch.autograd.grad(F.linear(x, layer.weight).square().sum(), [layer.A, layer.B])
    expected = torch.autograd.grad((layer(x) - layer.bias).square().sum(), [layer.A, layer.B])
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two)
    assert layer.weight.requires_grad and not layer.requires_grad_(False).weight.requires_grad
    with torch.no_grad():
        assert not make_layer(form).weight.requires_grad


def test_dtype_and_shape_compute_nothing():
    def compute():
        raise AssertionError("computed")

    W = DenseWeight(compute, (9, 14), dtype=torch.bfloat16)
    assert W.dtype == torch.bfloat16 and W.device == torch.device("cpu") and W.shape == (9, 14)
    assert W.size(0) == 9 and W.dim() == W.ndim == 2 and W.nbytes == 252 and W.is_floating_point()
    assert not (W.requires_grad or W.is_cuda or W.is_meta) and isinstance(W, Tensor)
    assert not hasattr(W, "SCB") and W.grad is None
    assert W.data.dtype == torch.bfloat16
    with pytest.raises(AssertionError, match="computed"):
        W.sum()


WRITES = {
    "mul_": lambda W, other: W.mul_(2),
    "*=": lambda W, other: W.__imul__(2),
    "data.div_": lambda W, other: W.data.div_(2),
    "detach().copy_": lambda W, other: W.detach().copy_(other),
    "[0] =": lambda W, other: W.__setitem__(0, 1),
    "data[0] =": lambda W, other: W.data.__setitem__(0, 1),
    "data =": lambda W, other: setattr(W, "data", other),
    "grad =": lambda W, other: setattr(W, "grad", other),
    "requires_grad_": lambda W, other: W.requires_grad_(),
    "out=": lambda W, other: torch.mul(other, 2, out=W),
    "init": lambda W, other: nn.init.normal_(W),
    "init.data": lambda W, other: nn.init.zeros_(W.data),
    "inplace=True": lambda W, other: F.relu(W, inplace=True),
    "foreach": lambda W, other: torch._foreach_mul_([W], 2),
    "set_": lambda W, other: W.data.set_(other),
    "from C++": lambda W, other: torch.ops.aten.mul_.Scalar(W.data, 2),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("write", WRITES)
def test_a_write_raises(write, mode):
    layer = make_layer()
    before = dense_weight(layer)
    with mode(), pytest.raises(RuntimeError, match=READ_ONLY):
        WRITES[write](layer.weight, torch.ones(9, 14, dtype=torch.float64))
    assert torch.equal(dense_weight(layer), before)
    other = torch.zeros(9, 14, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(other.copy_(layer.weight), before)


def test_it_cant_be_set():
    layer = make_layer()
    for value in (nn.Parameter(torch.ones(9, 14)), torch.ones(9, 14), None):
        with pytest.raises(AttributeError, match=r"^weight .* put an nn.Linear in its place"):
            layer.weight = value
    with pytest.raises(KeyError, match="already exists"):
        layer.register_parameter("weight", nn.Parameter(torch.ones(9, 14)))
    with pytest.raises(ValueError, match="non-leaf"):
        torch.optim.SGD([layer.weight], 0.1)


@every_form
def test_a_packed_layer_has_it(form):
    layer = make_layer(form, 64, 96, 40, 8, dtype=torch.bfloat16).eval()
    expected = dense_weight(layer).bfloat16()
    model = optimize_for_inference(nn.Sequential(layer).eval())
    assert torch.equal(model[0].weight, expected)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=READ_ONLY):
        model[0].weight.div_(2)


# ------------------------------------------------------------------------- modules that read weight


def replaced(module: nn.Module, *paths: str) -> nn.Module:
    """A copy whose linears at `paths` are layers of two thirds of their rank, with an adapter."""
    module = copy.deepcopy(module)
    for path in paths:
        linear = module.get_submodule(path)
        rank = min(linear.weight.shape) * 2 // 3
        layer = SVDLoRALinear.from_linear(linear, rank, 4)
        nn.init.normal_(layer.B, std=0.1)
        module.set_submodule(path, layer)
    return module


def made_dense(module: nn.Module) -> nn.Module:
    """A copy with an nn.Linear in the place of each layer."""
    module = copy.deepcopy(module)
    for path, layer in list(module.named_modules()):
        if isinstance(layer, SVDLoRALinear):
            module.set_submodule(path, layer.to_linear())
    return module


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_torchs_transformer_layer(gradients, training):
    """Its fast path in eval() reads linear1.weight; it must not go past the layer's adapter."""
    block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    block = nn.TransformerEncoder(block, 2)
    names = [f"layers.{i}.{name}" for i in range(2) for name in ("linear1", "linear2")]
    ours = replaced(block, *names).train(training)
    dense, x = made_dense(ours), torch.randn(2, 5, 16)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.set_grad_enabled(gradients):
        y = ours(x, src_key_padding_mask=mask)
        expected = dense(x, src_key_padding_mask=mask)
    torch.testing.assert_close(y[~mask], expected[~mask])
    if gradients:
        y[~mask].square().sum().backward()
        assert all(ours.get_submodule(name).A.grad.any() for name in names)


@pytest.mark.parametrize("gradients", [False, True])
def test_torchs_attention_multiplies_by_weight(gradients):
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    ours = replaced(attention, "out_proj").eval()
    x = torch.randn(2, 5, 16)
    with torch.set_grad_enabled(gradients):
        y, expected = ours(x, x, x)[0], made_dense(ours)(x, x, x)[0]
    torch.testing.assert_close(y, expected)
    if gradients:
        y.square().sum().backward()
        assert ours.out_proj.A.grad.any() and ours.out_proj.B.grad.any()


@pytest.mark.parametrize("gated", [False, True])
def test_t5_asks_for_its_dtype(gated):
    kind = "gated-gelu" if gated else "relu"
    block = T5LayerFF(T5Config(d_model=16, d_ff=32, feed_forward_proj=kind)).eval().bfloat16()
    ours = replaced(block, "DenseReluDense.wo")
    x = torch.randn(2, 3, 16, dtype=torch.bfloat16)
    torch.testing.assert_close(ours(x), made_dense(ours)(x), rtol=0.05, atol=0.05)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), ours(x))
    torch.compiler.reset()
