"""optimize_for_inference and its undo: the same model, smaller steps, and everything put back."""

from __future__ import annotations

import copy
import io
import logging
import threading

import pytest
import torch
from helpers import tiny
from helpers.numerics import Inputs, by_reference, distance, every_form, make_layer
from helpers.optimising import HINT, every_dtype, llama, logits, packs, same_state, state_of
from helpers.zoo import ZOO, tokens, zoo_model
from torch import nn

from hylora_kernels import (
    SVDLoRALinear,
    optimize_for_inference,
    restore_from_inference,
    use_backend,
)
from hylora_kernels.cli import model_commands as commands
from hylora_kernels.evaluation.evaluate import evaluate
from hylora_kernels.evaluation.perplexity import perplexity
from hylora_kernels.evaluation.speed import throughput
from hylora_kernels.layers.packed import (
    PackedEmbedding,
    PackedLinear,
    PackedSVDLoRALinear,
    packed_states,
)


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    yield
    torch.compiler.reset()


# -------------------------------------------------------------------------------- what it computes


@packs
@every_dtype
@every_form
@pytest.mark.parametrize("lora_rank", [0, 3])
def test_layers_compute_the_formula(lora_rank, form, dtype):
    layer = make_layer(form, 60, 50, 20, lora_rank, dtype=dtype, alpha=0.37).eval()
    factors = [getattr(layer, n) for n in ("SVh", "U", "A", "B", "bias")]
    plain = [None if t is None else t.detach().clone() for t in factors]
    optimize_for_inference(layer)
    assert type(layer) is PackedSVDLoRALinear
    for M in (0, 1, 3, 16, 17, 70, 300):
        x = torch.randn(M, 50, dtype=dtype)
        inputs = Inputs(x, *plain, layer.alpha, layer.pivots)
        dy = torch.zeros(M, 60, dtype=dtype)
        exact = by_reference(inputs.map(torch.Tensor.double), dy.double())["y"]
        own = distance(by_reference(inputs, dy)["y"], exact)
        size = max(1.0, distance(exact, torch.zeros_like(exact)))
        for rows in (x, x.reshape(1, M, 1, 50)):
            y = layer(rows)
            assert y.shape == (*rows.shape[:-1], 60) and y.dtype == dtype
            error = distance(y.reshape(M, 60), exact)
            assert error <= 2 * own + 2 * torch.finfo(dtype).eps * size
    assert layer(x[0]).shape == (60,)


@packs
@every_dtype
@pytest.mark.parametrize("form", ["pair", "pivoted"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_model_says_the_same(tied, form, dtype):
    model = llama(dtype, tied, form)
    exact, before = logits(copy.deepcopy(model).double()), logits(model)
    ids = tiny.tokens(1, 5)
    text = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert optimize_for_inference(model) is model
    kinds = [type(m) for m in model.modules()]
    assert kinds.count(PackedSVDLoRALinear) == 14 and kinds.count(PackedLinear) == 1
    assert kinds.count(PackedEmbedding) == int(tied)
    error, own = (distance(t, exact) for t in (logits(model), before))
    assert error <= 2 * own + 1e-5
    assert model.dtype == dtype and model.device.type == "cpu"
    if dtype == torch.float32:
        again = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert torch.equal(text, again)


@packs
@pytest.mark.parametrize("name", ZOO)
def test_every_architecture(name):
    model = zoo_model(name)
    before, state = model(input_ids=tokens()).logits, state_of(model)
    optimize_for_inference(model)
    torch.testing.assert_close(model(input_ids=tokens()).logits, before, atol=1e-4, rtol=1e-4)
    assert same_state(model.state_dict(), state)
    restore_from_inference(model)
    assert same_state(model.state_dict(), state)
    assert torch.equal(model(input_ids=tokens()).logits, before)


@packs
def test_in_every_mode(monkeypatch):
    model = llama(torch.float32)
    optimize_for_inference(model)
    want = logits(model)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            y = model(input_ids=tiny.tokens(2, 12), use_cache=False).logits
            assert torch.equal(y, want) and not y.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        layer = model.model.layers[0].mlp.up_proj
        assert layer(torch.randn(2, 64).bfloat16()).dtype == torch.bfloat16


@packs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dynamic", [True, False])
def test_compile_whole_graph(dynamic, dtype):
    layers = (make_layer("pivoted", 60, 50, 20, 8), make_layer("pair", 40, 60, 16, 0))
    model = nn.Sequential(nn.Embedding(9, 50), *layers, nn.Linear(40, 7)).to(dtype).eval()
    optimize_for_inference(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for M in (3, 17, 2):
        ids = torch.randint(9, (M, 2))
        assert torch.equal(compiled(ids), model(ids))
    restore_from_inference(model)
    torch.testing.assert_close(compiled(ids), model(ids), atol=0.1, rtol=0.1)


@packs
def test_compiled_code_follows_the_float32_precision():
    layer = make_layer("pair", 256, 256, 128, 0, dtype=torch.float32).eval()
    optimize_for_inference(layer)
    compiled, x = torch.compile(layer, backend="aot_eager", fullgraph=True), torch.randn(300, 256)
    try:
        for precision in ("highest", "high", "highest"):
            torch.set_float32_matmul_precision(precision)
            assert torch.equal(compiled(x), layer(x))
    finally:
        torch.set_float32_matmul_precision("highest")


@packs
def test_export():
    model = nn.Sequential(make_layer("pivoted", 60, 50, 20, 8), nn.Linear(60, 7).double())
    model = model.float().eval()
    optimize_for_inference(model)
    x = torch.randn(3, 50)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    for M in (3, 70):
        x = torch.randn(M, 50)
        assert torch.equal(program.module()(x), model(x))


@packs
def test_threads_share_a_model():
    model = optimize_for_inference(llama())
    want = [logits(model, seed) for seed in range(4)]
    failures = []

    def work(seed):
        try:
            for _ in range(10):
                assert torch.equal(logits(model, seed), want[seed])
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# ----------------------------------------------------------------------------- life as an nn.Module


def addresses(model) -> set[int]:
    return {tensor.data_ptr() for state in packed_states(model) for tensor in state.tensors}


@packs
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_copies(tied):
    model = optimize_for_inference(llama(torch.bfloat16, tied))
    want, state = logits(model), state_of(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(logits(twin), want) and same_state(twin.state_dict(), state)
        assert not addresses(twin) & addresses(model)
        restore_from_inference(twin)
        assert same_state(twin.state_dict(), state)
        assert (twin.lm_head.weight is twin.model.embed_tokens.weight) == tied
    assert torch.equal(logits(model), want)


@packs
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("cast", [lambda m: m.double(), lambda m: m.to(torch.bfloat16)])
def test_to_another_dtype_restores(cast, tied):
    model, plain = llama(torch.float32, tied), llama(torch.float32, tied)
    plain.load_state_dict(model.state_dict())
    optimize_for_inference(model)
    assert cast(model) is model and packed_states(model) == []
    assert same_state(model.state_dict(), cast(plain).state_dict())
    assert torch.equal(logits(model), logits(plain))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    restore_from_inference(model)
    assert model.model.layers[0].self_attn.q_proj.A.requires_grad


@packs
def test_to_another_device_restores(device):
    model = optimize_for_inference(llama(torch.bfloat16))
    for same in (lambda: model.to("cpu"), lambda: model.bfloat16(), lambda: model.cpu()):
        same()
        assert packed_states(model), "there is nothing to be done"
    target = "meta" if device == "cpu" else device
    model.to(target)
    assert not packed_states(model) and {p.device.type for p in model.parameters()} == {target}


@packs
def test_again_and_again():
    model = llama(torch.bfloat16)
    state, packed = state_of(model), None
    for _ in range(2):
        optimize_for_inference(model)
        packed = set(map(id, packed_states(model)))
        optimize_for_inference(model)
        assert set(map(id, packed_states(model))) == packed
        restore_from_inference(model)
        restore_from_inference(model)
        assert same_state(model.state_dict(), state)


@packs
def test_hooks_and_references_stay():
    model, calls = llama(), []
    layer = model.model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda m, args, out: calls.append(m))
    optimize_for_inference(model)
    logits(model)
    restore_from_inference(model)
    logits(model)
    assert calls == [layer, layer] and model.model.layers[0].mlp.up_proj is layer


@packs
def test_one_layer_in_two_places():
    layer = make_layer("pair", 14, 14, dtype=torch.float32)
    model = nn.Sequential(layer, nn.ReLU(), layer).eval()
    x = torch.randn(3, 14)
    y = model(x)
    optimize_for_inference(model)
    assert model[0] is model[2] and len(packed_states(model)) == 1
    torch.testing.assert_close(model(x), y)
    assert model[0] is restore_from_inference(model)[2] and torch.equal(model(x), y)


# ------------------------------------------------------------------------------------ what is left


class Scaled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 2


@packs
def test_layers_that_cannot_be_packed_stay_plain():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    shared = nn.Linear(14, 14)
    tied_to_scaled = nn.Linear(14, 9, bias=False)
    scaled = Scaled(9, 14)
    scaled.weight = tied_to_scaled.weight
    twins = nn.Linear(14, 14), nn.Linear(14, 14)
    twins[1].weight = twins[0].weight
    patched = nn.Linear(14, 14)
    patched.forward = lambda x: x
    model = nn.ModuleList(
        [Own(14, 14), shared, tied_to_scaled, scaled, *twins, patched, nn.Linear(14, 14).double()]
    )
    model += [nn.Linear(14, 14, device="meta"), nn.Embedding(9, 14), nn.Conv1d(1, 1, 1)]
    kinds = [type(m) for m in model]
    kinds[1] = PackedLinear
    optimize_for_inference(model.eval())
    assert [type(m) for m in model] == kinds


def test_where_packing_is_no_faster_the_model_stays_and_the_log_says_why(caplog):
    model = llama(torch.float32)
    kinds, needs = [type(m) for m in model.modules()], [p.requires_grad for p in model.parameters()]
    with use_backend("eager"), caplog.at_level(logging.INFO, "hylora_kernels"):
        assert optimize_for_inference(model) is model
    assert [type(m) for m in model.modules()] == kinds
    assert [p.requires_grad for p in model.parameters()] == needs
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "left 15 as they are (eager: gains nothing by packing)" in record.getMessage()
    assert restore_from_inference(model) is model


def test_float64_stays_plain(caplog):
    model = nn.Sequential(make_layer()).eval()
    optimize_for_inference(model)
    assert type(model[0]) is SVDLoRALinear
    assert "packed 0 layers" in caplog.text and "eager: gains nothing by packing" in caplog.text


@packs
def test_another_backend_refuses_a_packed_layer():
    layer = optimize_for_inference(make_layer(dtype=torch.float32).eval())
    for name in ("auto", "cpu"):
        with use_backend(name):
            layer(torch.ones(1, 14))
    with use_backend("eager"), pytest.raises(ValueError, match=f"packed for backend 'cpu': {HINT}"):
        layer(torch.ones(1, 14))


def test_refusals():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got list"):
        optimize_for_inference([])
    model = llama()
    model.model.layers[1].mlp.train()
    with pytest.raises(ValueError, match=r"must be in eval mode: .*; model\.layers\.1\.mlp is in"):
        optimize_for_inference(model)
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model.eval()
    add_hook_to_module(model.lm_head, AlignDevicesHook("cpu"))
    with pytest.raises(ValueError, match="accelerate has put hooks on lm_head"):
        optimize_for_inference(model)


@packs
@pytest.mark.parametrize("optimize", [True, False])
def test_the_command_generate_optimises_on_a_cpu(optimize, monkeypatch, capsys):
    tokenizer = tiny.tokenizer("the quick brown fox")
    model = llama(torch.float32, vocab_size=len(tokenizer))
    monkeypatch.setattr(commands, "load", lambda *args: (model, tokenizer))
    commands.generate("tiny", "the fox", max_new_tokens=3, optimize=optimize)
    assert bool(packed_states(model)) == optimize
    assert "parameters" in capsys.readouterr().err


@packs
@pytest.mark.parametrize("optimize", [True, False])
def test_evaluate_times_the_model_optimised_and_restores_it(optimize):
    model, blocks = llama(torch.float32), tiny.tokens(4, 16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = evaluate(model, blocks, progress=False, optimize=optimize)
    assert report.speed.optimized == optimize and not packed_states(model)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    texts = [str(cell) for column in report.render().columns for cell in column.cells]
    assert ("decode tokens/s, optimized" in texts) == optimize
    optimize_for_inference(model)
    assert throughput(model, 4, 2, optimize=optimize).optimized and packed_states(model)


@packs
def test_a_model_is_restored_when_timing_it_fails(monkeypatch):
    model = llama(torch.float32)
    hook = model.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        throughput(model, 4, 2, optimize=True)
    hook.remove()
    assert not packed_states(model) and throughput(model, 4, 2).optimized is False


@packs
def test_evaluation_of_an_optimised_model():
    blocks = tiny.tokens(4, 16)
    model = llama(torch.float32)
    before = perplexity(model, blocks, progress=False).ppl
    optimize_for_inference(model)
    assert perplexity(model, blocks, progress=False).ppl == pytest.approx(before, rel=1e-4)
    speed = throughput(model, 4, 2)
    assert (speed.device, speed.dtype) == ("cpu", "float32")
