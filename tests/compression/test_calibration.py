"""The statistics against autograd in float64; passes; what is not finite is named."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers.zoo import NAMES, tokens, zoo_model

from hylora_kernels.compression import calibration
from hylora_kernels.compression.calibration import gather, gram, matmul_precision, passes
from hylora_kernels.compression.compress import Compression
from hylora_kernels.compression.options import CompressOptions
from hylora_kernels.model.structure import discover

IDS = tokens(4, 12)


def statistics_of(model, ids=IDS, with_gradients=True, **choice):
    return gather(model, ids, discover(model, **choice).groups, with_gradients, progress=False)


def by_autograd(model, ids, paths):
    """path -> (its inputs [T, K], the gradients at its outputs [T, N]), all at once, in float64."""
    seen, hooks = {}, []
    for path in paths:

        def hook(_module, args, output, path=path):
            output.retain_grad()
            seen[path] = args[0].detach(), output

        hooks.append(model.get_submodule(path).register_forward_hook(hook))
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    return {path: (x.flatten(0, -2), y.grad.flatten(0, -2)) for path, (x, y) in seen.items()}


def assert_close(got, want, tolerance=2e-6):
    assert got.dtype == torch.float32
    error = (got.double() - want).norm() / want.norm()
    assert error < tolerance, f"error {error:.2g}"


@pytest.mark.parametrize("name", NAMES)
def test_sums_over_inputs_and_output_gradients(name):
    model = zoo_model(name, torch.float64)
    groups = discover(model).groups
    statistics = statistics_of(model)
    truth = by_autograd(model, IDS, [path for group in groups for path in group.paths])
    assert list(statistics.inputs) == [group.paths[0] for group in groups]
    assert set(statistics.gradients) == set(truth)
    for path, (x, gradient) in truth.items():
        assert_close(statistics.gradients[path], gradient.T @ gradient)
        if path in statistics.inputs:
            assert_close(statistics.inputs[path], x.T @ x)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_inputs_alone(name):
    model = zoo_model(name)
    both, alone = statistics_of(model), statistics_of(model, with_gradients=False)
    assert alone.gradients == {} and alone.inputs.keys() == both.inputs.keys()
    for path, matrix in alone.inputs.items():
        assert torch.equal(matrix, both.inputs[path])


@pytest.mark.parametrize("with_gradients", [True, False])
def test_of_an_output_head(with_gradients):
    model = zoo_model("qwen2", torch.float64)
    statistics = statistics_of(model, with_gradients=with_gradients, include=["lm_head"])
    x, gradient = by_autograd(model, IDS, ["lm_head"])["lm_head"]
    if not with_gradients:
        return assert_close(statistics.inputs["lm_head"], x.T @ x)
    # The loss leaves out the prediction from the last token.
    x = x.view(4, 12, -1)[:, :-1].flatten(0, 1)
    assert_close(statistics.inputs["lm_head"], x.T @ x)
    assert_close(statistics.gradients["lm_head"], gradient.T @ gradient)


def test_the_model_is_left_as_it_was():
    model = zoo_model("llama").train()
    model.model.norm.eval().weight.requires_grad_(False)
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    statistics_of(model)
    assert [m for m in model.modules() if not m.training] == [model.model.norm]
    assert all(p.grad is None for p in model.parameters())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == wanted
    for module in model.modules():
        assert not (module._forward_hooks or module._forward_pre_hooks)


# ------------------------------------------------------------------------------------ Gram matrices


def test_gram_of_bfloat16_is_exact():
    a, b = torch.randn(3, 100, 70).bfloat16(), torch.randn(3, 100, 50).bfloat16()
    exact = torch.einsum("nti,ntj->ij", a.double(), b.double())
    size = torch.einsum("nti,ntj->ij", a.double().abs(), b.double().abs())
    error = (gram(a, b).double() - exact).abs() / size
    assert error.max() < 1e-6  # A product rounded to bfloat16 would be off by 4e-3.


def test_gram_of_float32_is_not_rounded_to_bfloat16():
    a = torch.randn(256, 64)
    with matmul_precision("medium"):
        error = (gram(a, a).double() - a.double().T @ a.double()).norm()
    assert error < 1e-5 * (a.double().T @ a.double()).norm()


def test_the_matmul_precision_is_put_back():
    before = torch.get_float32_matmul_precision()
    with pytest.raises(RuntimeError), matmul_precision("medium"):
        assert torch.get_float32_matmul_precision() == "medium"
        raise RuntimeError
    assert torch.get_float32_matmul_precision() == before


# ------------------------------------------------------------------------------------------- passes


def sizes(model, run):
    """Bytes of a run's statistics, counted by hand."""
    shapes = [[model.get_submodule(path).weight.shape for path in group.paths] for group in run]
    return sum(4 * (group[0][1] ** 2 + sum(n * n for n, _ in group)) for group in shapes)


def factorized(model, method, folder, max_memory=None):
    """The workspace of a model, after all passes."""
    options = CompressOptions(
        1.0, IDS, method, refit=False, max_memory=max_memory, cache=folder, progress=False
    )
    with Compression(model, options) as run:
        for statistics in run.calibrate():
            run.factorize(statistics)
    return run.workspace


@pytest.mark.parametrize("max_memory", [1, 15_000, 40_000, 10**9])
def test_a_pass_holds_no_more_than_it_may(max_memory):
    model = zoo_model("qwen2")
    groups = discover(model).groups
    runs = passes(groups, True, max_memory)
    assert [group for run in runs for group in run] == groups
    for run, following in zip(runs, [*runs[1:], None], strict=True):
        assert len(run) == 1 or sizes(model, run) <= max_memory
        # No pass is smaller than it has to be.
        assert following is None or sizes(model, run) + sizes(model, following[:1]) > max_memory
    assert (len(runs) == 1) == (max_memory == 10**9)


@pytest.mark.parametrize("method", ["two_sided", "whitened"])
def test_passes_change_nothing(method, tmp_path, monkeypatch):
    model = zoo_model("llama", torch.bfloat16)
    structure, seen = discover(model), []
    whole = gather(model, IDS, structure.groups, method == "two_sided", progress=False)
    original = calibration.gather

    def spying(*args):
        found = original(*args)
        seen.append(copy.copy(found))
        seen[-1].inputs, seen[-1].gradients = dict(found.inputs), dict(found.gradients)
        return found

    monkeypatch.setattr(calibration, "gather", spying)
    memories = (1, 20_000, None)
    stores = [factorized(model, method, tmp_path / str(memory), memory) for memory in memories]
    assert 8 < len(seen) < 16  # One pass for each group, some passes, one pass.
    for part in seen:
        for path, matrix in part.inputs.items():
            assert torch.equal(matrix, whole.inputs[path])
        for path, matrix in part.gradients.items():
            assert torch.equal(matrix, whole.gradients[path])
    for path in structure.paths:
        first, *others = (vars(store.load(path)) for store in stores)
        for other in others:
            assert all(torch.equal(first[key], other[key]) for key in ("U", "S", "SVh"))
            assert first["damping"] == other["damping"]


def test_the_statistics_of_a_pass_are_freed_before_the_next(tmp_path, monkeypatch):
    matrices, original = [], calibration.gather

    def spying(*args):
        assert not [matrix for matrix in matrices if matrix() is not None]
        found = original(*args)
        matrices.extend(map(weakref.ref, (*found.inputs.values(), *found.gradients.values())))
        return found

    monkeypatch.setattr(calibration, "gather", spying)
    factorized(zoo_model("llama"), "two_sided", tmp_path, max_memory=1)
    assert len(matrices) == 8 + 14 and not [matrix for matrix in matrices if matrix() is not None]


# -------------------------------------------------------------------------------- what isn't finite


@pytest.mark.parametrize("method", ["two_sided", "whitened", "svd"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("model.layers.1.self_attn.k_proj", "weight"),
        ("model.layers.0.self_attn.q_proj", "bias"),
        ("model.layers.1.post_attention_layernorm", "weight"),
        ("model.layers.0.mlp.down_proj", "weight"),
    ],
)
def test_the_layer_with_the_bad_weight_is_named(method, bad, path, kind, tmp_path):
    model = zoo_model("qwen2")
    with torch.no_grad():
        getattr(model.get_submodule(path), kind).view(-1)[3] = bad
    with pytest.raises(FloatingPointError, match=f"layer {path}: its {kind} is not finite"):
        factorized(model, method, tmp_path)


@pytest.mark.parametrize("method", ["two_sided", "whitened"])
def test_the_first_layer_that_reads_what_isn_t_finite_is_named(method, tmp_path):
    model = zoo_model("llama")
    with torch.no_grad():  # All weights are finite, gate * up is not.
        model.model.layers[0].mlp.gate_proj.weight.mul_(1e25)
        model.model.layers[0].mlp.up_proj.weight.mul_(1e25)
    with pytest.raises(
        FloatingPointError, match=r"layer model\.layers\.0\.mlp\.down_proj: its inp"
    ):
        factorized(model, method, tmp_path)


class Spoiled(torch.autograd.Function):
    """The identity, with a gradient of NaN."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.full_like(gradient, float("nan"))


def test_the_first_layer_that_gets_a_bad_gradient_is_named(tmp_path):
    model = zoo_model("llama")
    activation = model.model.layers[1].mlp.act_fn
    activation.register_forward_hook(lambda _module, _args, output: Spoiled.apply(output))
    # The backward reaches the gate first; all layers before it get NaN from it.
    with pytest.raises(
        FloatingPointError, match=r"layer model\.layers\.1\.mlp\.gate_proj: its out"
    ):
        factorized(model, "two_sided", tmp_path)
    factorized(model, "whitened", tmp_path)


def test_linears_without_a_gradient_are_named(caplog):
    model = zoo_model("llama")
    attention = model.model.layers[1].self_attn
    forward = attention.q_proj.forward
    attention.q_proj.forward = torch.no_grad()(forward)
    found = statistics_of(model)
    path = "model.layers.1.self_attn.q_proj"
    assert not found.gradients[path].any() and found.gradients[path.replace("q", "v", 1)].any()
    assert "no gradient of the loss reaches 1 linears" in caplog.text and path in caplog.text
