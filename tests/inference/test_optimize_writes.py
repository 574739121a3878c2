"""A packed layer holds no state twice: writes that would change nothing are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.numerics import make_layer
from helpers.optimising import FLOAT32, HINT, net, packs, same_state, state_of, there_and_back
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from hylora_kernels import SVDLoRALinear, optimize_for_inference, restore_from_inference
from hylora_kernels.layers.packed import packed_states

pytestmark = packs


# ------------------------------------------------------------------------------- state held once


def written(layer, write) -> tuple[bool, bool]:
    """(the write raised, it changed the output), each on a packed layer."""
    optimize_for_inference(layer.eval())
    x = torch.randn(3, 14)
    y = layer(x)
    with torch.no_grad():
        try:
            write(layer)
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError):
            assert torch.equal(layer(x), y)
            return True, False
        return False, not torch.equal(layer(x), y)


REFUSED = {
    "alpha": lambda layer: setattr(layer, "alpha", 0.0),
    "pivots": lambda layer: setattr(layer, "pivots", layer.pivots.clone()),
    "pivots in place": lambda layer: layer.pivots.zero_(),
    "U": lambda layer: setattr(layer, "U", nn.Parameter(torch.zeros(5, 4))),
    "U.data in place": lambda layer: layer.U.data.mul_(3),
    "U in place": lambda layer: layer.U.mul_(3),
    "U[0]": lambda layer: layer.U.__setitem__(0, 1.0),
    "U.data[0]": lambda layer: layer.U.data.__setitem__(0, 1.0),
    "a row of U": lambda layer: layer.U[0].fill_(1.0),
    "U.T": lambda layer: layer.U.T.zero_(),
    "U.detach()": lambda layer: layer.U.detach().zero_(),
    "U.view(-1)": lambda layer: layer.U.view(-1).zero_(),
    "U.copy_": lambda layer: layer.U.copy_(torch.zeros(5, 4)),
    "init": lambda layer: nn.init.zeros_(layer.U),
    "out=": lambda layer: torch.add(torch.ones(5, 4), 1, out=layer.U),
    "foreach": lambda layer: torch._foreach_mul_([layer.A, layer.B], 2.0),
    "A": lambda layer: setattr(layer, "A", None),
    "del A": lambda layer: delattr(layer, "A"),
    "A.requires_grad": lambda layer: layer.A.requires_grad_(True),
    "requires_grad_": lambda layer: layer.requires_grad_(True),
    "A.grad": lambda layer: setattr(layer.A, "grad", torch.ones(3, 14)),
    "register A": lambda layer: layer.register_parameter("A", nn.Parameter(torch.ones(3, 14))),
    "prune": lambda layer: prune.l1_unstructured(layer, "A", 0.5),
    "prune.identity": lambda layer: prune.identity(layer, "U"),
    "parametrize": lambda layer: parametrize.register_parametrization(layer, "A", nn.ReLU()),
    "weight_norm": lambda layer: parametrizations.weight_norm(layer, "A"),
    "functional_call": lambda layer: torch.func.functional_call(
        layer, {"A": torch.zeros(3, 14)}, torch.ones(1, 14)
    ),
    "load_state_dict": lambda layer: layer.load_state_dict(layer.state_dict()),
    "assign": lambda layer: layer.load_state_dict(layer.state_dict(), assign=True),
}
FOLLOWED = {
    "bias": lambda layer: setattr(layer, "bias", nn.Parameter(torch.ones(9))),
    "no bias": lambda layer: setattr(layer, "bias", None),
    "bias in place": lambda layer: layer.bias.add_(9),
    "bias.data": lambda layer: layer.bias.data.add_(9),
    "bias from NumPy": lambda layer: layer.bias.detach().numpy().__iadd__(9),
    "pruned bias": lambda layer: prune.l1_unstructured(layer, "bias", 1.0),
    "U.data": lambda layer: setattr(layer.U, "data", torch.ones(5, 4)),
    "zeros": lambda layer: layer._apply(lambda t: t.zero_() if t.is_floating_point() else t),
}


# In inference mode torch allows writes to inference tensors, so these are lost there.
OF_COPIES = {"pivots in place", "a row of U", "U.T", "U.detach()", "U.view(-1)"}
EVERYWHERE = [(name, torch.inference_mode) for name in REFUSED if name not in OF_COPIES]


@pytest.mark.parametrize(("name", "mode"), [(name, torch.no_grad) for name in REFUSED] + EVERYWHERE)
def test_what_would_change_nothing_is_refused(name, mode):
    with mode():
        layer = make_layer("pivoted", **FLOAT32)
        state = state_of(layer)
        assert written(layer, REFUSED[name]) == (True, False)
        restore_from_inference(layer)
        assert same_state(layer.state_dict(), state)


@pytest.mark.parametrize("copied", [False, True], ids=["itself", "deepcopy"])
@pytest.mark.parametrize("name", FOLLOWED)
def test_the_rest_is_followed(name, copied):
    layer = optimize_for_inference(make_layer("pivoted", **FLOAT32).eval())
    raised, changed = written(copy.deepcopy(layer) if copied else layer, FOLLOWED[name])
    assert changed and not raised


def test_a_bias_that_does_not_fit_is_named():
    layer = optimize_for_inference(make_layer("pivoted", **FLOAT32).eval())
    layer.bias = nn.Parameter(torch.ones(5), False)
    with pytest.raises(ValueError, match=r"bias must be \[N\] = \[9\].*, got \[5\]"):
        layer(torch.ones(1, 14))
    layer.bias = nn.Parameter(torch.ones(9).double(), False)
    with pytest.raises(TypeError, match=r"bias must have the packed layer's dtype torch\.float32"):
        layer(torch.ones(1, 14))


def test_a_gradient_that_would_be_missing_is_refused():
    model = optimize_for_inference(net())
    model.requires_grad_(True)
    with pytest.raises(RuntimeError, match=f"requires grad, but a layer packed.*{HINT}"):
        model[2](torch.ones(1, 14))
    with pytest.raises(RuntimeError, match=f"requires grad, but a layer packed.*{HINT}"):
        model(torch.ones(1, 14))
    with torch.no_grad():
        model(torch.ones(1, 14))
    optimizer = torch.optim.SGD([model[1].A], lr=1.0)
    optimizer.step()
    there_and_back(model)(torch.ones(1, 14)).sum().backward()
    optimize_for_inference(model.eval())
    optimizer.param_groups[0]["params"] = [model[1].B]
    with pytest.raises(RuntimeError, match=HINT):
        optimizer.step()


def test_share_memory_shares():
    layer = optimize_for_inference(make_layer("pivoted", **FLOAT32).eval())
    assert layer.share_memory() is layer and len(packed_states(layer)) == 1
    (state,) = packed_states(layer)
    assert all(tensor.is_shared() for tensor in state.tensors) and layer.bias.is_shared()
    assert state.packed.tensors[0].is_shared()


def test_masters_are_cast_with_the_layer():
    layer = make_layer("pair", dtype=torch.bfloat16).eval()
    layer.A, layer.B = nn.Parameter(layer.A.float()), nn.Parameter(layer.B.float())
    for _ in range(2):
        assert optimize_for_inference(layer) is layer and layer.A.dtype == torch.float32
        layer.float()
        assert layer.A.dtype == layer.U.dtype == torch.float32
        layer.bfloat16()
        layer.A, layer.B = nn.Parameter(layer.A.float()), nn.Parameter(layer.B.float())
    optimize_for_inference(layer).bfloat16()
    assert layer.A.dtype == torch.bfloat16
    layer = optimize_for_inference(make_layer("pair", **FLOAT32).eval())
    layer.to_empty(device="cpu")
    assert type(layer) is SVDLoRALinear


# -------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_dtype_under_autocast_is_that_of_any_linear(dtype, autocast):
    shapes = ((256, 64), (256, 33), (33, 33), (14, 9), (64, 64))
    plain = nn.ModuleList(
        layer
        for K, N in shapes
        for layer in (
            nn.Linear(K, N),
            make_layer("pair", N, K, **FLOAT32),
            make_layer("pivoted", N, K, **FLOAT32),
            make_layer("pair", N, K, rank=9, lora_rank=0, **FLOAT32),
        )
    )
    plain = plain.to(dtype).eval()
    packed = optimize_for_inference(copy.deepcopy(plain))
    assert len(packed_states(packed)) == len(plain)
    with torch.no_grad(), torch.autocast("cpu", dtype=autocast):
        for before, after in zip(plain, packed, strict=True):
            for x_dtype in (torch.float32, torch.bfloat16, torch.float16):
                x = torch.randn(2, before.in_features).to(x_dtype)
                y = after(x)
                assert y.dtype == before(x).dtype == autocast
                torch.testing.assert_close(y, before(x), atol=0.1, rtol=0.1)
            with pytest.raises(TypeError):
                after(torch.ones(2, before.in_features, dtype=torch.float64))
        with torch.autocast("cpu", enabled=False):
            assert packed[0](torch.ones(1, 256, dtype=dtype)).dtype == dtype


def test_compiled_code_follows_autocast():
    layer = optimize_for_inference(make_layer("pair", **FLOAT32).eval())
    compiled, x = torch.compile(layer, backend="aot_eager", fullgraph=True), torch.randn(2, 14)
    for autocast in (torch.bfloat16, torch.float16):
        with torch.no_grad(), torch.autocast("cpu", dtype=autocast):
            assert torch.equal(compiled(x), layer(x)) and compiled(x).dtype == autocast
    torch.compiler.reset()
