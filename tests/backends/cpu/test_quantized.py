"""The cpu backend's layers with quantised matrices: codes and errors."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from helpers import zoo
from helpers.checkpoints import logits
from helpers.numerics import Case
from helpers.optimising import every_dtype
from helpers.quantized_layers import BITS, quantised
from helpers.quantizing import quantized_model, rounded

from hylora_kernels import Decoder, optimize_for_inference, reference, restore_from_inference
from hylora_kernels.backends import cpu
from hylora_kernels.backends.cpu import packed as packed_module
from hylora_kernels.backends.cpu.packed import in_panels
from hylora_kernels.backends.shared.decoder_form import BlockForm, DecoderForm, LayerForm
from hylora_kernels.inference.recognise import recognise
from hylora_kernels.weights import QuantizedMatrix, Weights

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason=f"cpu: {cpu.why_not()}")
every_width = pytest.mark.parametrize("bits", BITS)
# K, N, r. Up to 64 rows are fixed point; from 193 on there are several blocks of rows.
SIZES = [(37, 53, 7), (64, 96, 32), (129, 257, 48), (1, 3, 1), (801, 70, 65)]
ROWS = (0, 1, 2, 7, 16, 17, 40, 64, 65, 128, 300)


def forward(layer, dtype):
    packed = cpu.pack(layer.weights, dtype)
    return packed, cpu.forward_packed(layer.x, packed, layer.weights.bias)


@every_dtype
@every_width
def test_a_dense_matrix(bits, dtype):
    for i, M in enumerate(ROWS):
        sizes = SIZES[(i + bits + dtype.itemsize) % len(SIZES)]
        case = Case(M=M, sizes=sizes, lora_rank=0, form="dense", bias=M % 2 == 0)
        layer = quantised(case, dtype, bits)
        layer.check(forward(layer, dtype)[1])


# Bits of SVh and of U, and the form; 0: not quantised.
FORMS = [("pair", 8, 8), ("pair", 4, 6), ("pair", 5, 0), ("pair", 0, 3), ("pivoted", 8, 0)]
FORMS += [("pivoted", 8, 8), ("pivoted", 0, 6), ("dense", 4, 0), ("dense", 2, 0)]


# M, K, N and r, the adapter's rank.
LAYERS = [(1, (129, 257, 48), 33), (5, (37, 53, 7), 8), (17, (64, 96, 32), 0)]
LAYERS += [(300, (200, 97, 65), 8)]


@every_dtype
@pytest.mark.parametrize("form, SVh_bits, U_bits", FORMS)
def test_factors_with_and_without_an_adapter(form, SVh_bits, U_bits, dtype):
    for M, sizes, lora_rank in LAYERS:
        case = Case(M=M, sizes=sizes, lora_rank=lora_rank, form=form, lead_dims=2)
        layer = quantised(case, dtype, SVh_bits, U_bits)
        packed, y = forward(layer, dtype)
        layer.check(y)
        plain = cpu.unpack(packed)
        for name in ("SVh", "U", "A", "B", "pivots"):
            assert_same(getattr(plain, name), getattr(layer.weights, name))


@pytest.mark.parametrize("form, bits", [("dense", 3), ("pair", 8)])
def test_many_rows_of_float32_go_through_torch(form, bits, monkeypatch):
    """As those of plain layers do, and as exact; more than 8 MB of weights are two parts."""
    monkeypatch.setattr(packed_module, "six_products_stay_faster", lambda: False)
    N = 21000 if form == "dense" else 97
    case = Case(M=1024, sizes=(101, N, 67), lora_rank=0, form=form)
    layer = quantised(case, torch.float32, bits, bits)
    given = cpu.pack(layer.weights, torch.float32)
    y = cpu.forward_packed(layer.x, given, layer.weights.bias)
    layer.check(y)
    fewer = cpu.forward_packed(layer.x[:1023], given, layer.weights.bias)
    torch.testing.assert_close(fewer, y[:1023], rtol=1e-5, atol=1e-5)


def assert_same(got, given):
    assert type(got) is type(given)
    if isinstance(given, QuantizedMatrix):
        assert (got.bits, got.k) == (given.bits, given.k)
        for name in ("codes", "scales", "zeros"):
            assert_same(getattr(got, name), getattr(given, name))
    elif given is not None:
        assert got.dtype == given.dtype and torch.equal(got, given)


@every_width
def test_codes_are_unpacked_bit_for_bit_and_read_as_rows(bits):
    """Codes of padding, too: behind k they are whatever was given."""
    codes = torch.randint(0, 256, (53, 3, 8 * bits), dtype=torch.uint8)
    scales = torch.rand(53, 3).half()
    zeros = (
        None if bits == 8 else reference.pack_zero_points(torch.randint(0, 2**bits, (53, 3)), bits)
    )
    matrix = QuantizedMatrix(codes, scales, zeros, bits, 130)
    layer = quantised(Case(sizes=(130, 53, 53), lora_rank=0, form="dense"), torch.bfloat16, bits)
    weights = layer.weights
    weights.SVh = matrix
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        packed = cpu.pack(weights, dtype)
        assert_same(cpu.unpack(packed).SVh, matrix)
        W = reference.dequantize(matrix, dtype)
        for ids in (torch.tensor(3), torch.tensor([[0, 52, 3], [7, 7, 1]]).T):
            assert torch.equal(cpu.rows_packed(ids, packed), F.embedding(ids, W))
        with pytest.raises(IndexError, match=r"ids must be in \[0, 53\), got 53 to 53"):
            cpu.rows_packed(torch.tensor([53]), packed)


@every_dtype
@every_width
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_of_the_largest_codes_stay_integers(sign, bits, dtype):
    """Of a group of equal numbers just below a power of two, and of equal codes, all sums are as
    far from zero as they get; of random ones they never come near 2^31."""
    codes, scales = torch.full((40, 128), 2**bits - 1, dtype=torch.uint8), torch.ones(40, 2)
    zeros = None if bits == 8 else torch.zeros(40, 2, dtype=torch.uint8)
    W = reference.quantized(codes, scales, zeros, bits)
    weights = Weights(W, torch.empty(0, 40), pivots=torch.arange(40, dtype=torch.int32))
    packed = cpu.pack(weights, dtype)
    for M in (1, 2, 4):
        x = torch.full((M, 128), sign * (2 - torch.finfo(dtype).eps), dtype=dtype)
        truth = x.double() @ reference.dequantize(W, torch.float64).T
        torch.testing.assert_close(cpu.forward_packed(x, packed, None), truth.to(dtype))


@every_dtype
@pytest.mark.parametrize("size", ["zero", "denormal", "huge"])
def test_small_and_large_numbers(size, dtype):
    """Each group has a scale of its own: rows of denormals and of huge numbers are as exact."""
    numbers = torch.finfo(dtype)
    scale = {"zero": 0, "denormal": numbers.smallest_normal / 100, "huge": numbers.max / 16}[size]
    layer = quantised(Case(M=3, sizes=(200, 70, 70), lora_rank=0, form="dense"), dtype, 4)
    packed = cpu.pack(layer.weights, dtype)
    x = layer.x.clone()
    x[1] = (x[1].double() * scale).to(dtype)
    y = cpu.forward_packed(x, packed, None)
    truth = x.double() @ layer.exact.SVh.T
    eager = (x @ layer.exact.SVh.to(dtype).T).double()
    own, error = (eager - truth).abs(), (y.double() - truth).abs()
    slack = 2 * numbers.eps * (truth.abs().amax(1) + numbers.smallest_normal)
    assert (error.amax(1) <= 2 * own.amax(1) + slack).all()


@every_dtype
def test_members_of_a_group_give_the_bits_that_they_give_alone(dtype):
    """Quantised and plain members of every form beside one another."""
    kinds = [("dense", 4, 0, 0), ("pair", 8, 5, 8), ("dense", 0, 0, 0), ("pivoted", 8, 0, 0)]
    kinds += [("pair", 0, 0, 3), ("dense", 6, 0, 4)]
    layers = []
    for i, (form, SVh_bits, U_bits, lora_rank) in enumerate(kinds):
        case = Case(sizes=(70, 90 + i, 40), lora_rank=lora_rank, form=form)
        layers.append(quantised(case, dtype, SVh_bits, U_bits))
    packed = [in_panels(cpu.pack(layer.weights, dtype)) for layer in layers]
    assert not cpu.why_no_group(packed)
    group, biases = cpu.group(packed), [layer.weights.bias for layer in layers]
    for M in (0, 1, 7, 16, 40, 65):
        x = torch.randn(M, 70).to(dtype)
        y = cpu.forward_group(x, group, biases)[:, : sum(p.out_features for p in packed)]
        alone = [cpu.forward_packed(x, p, bias) for p, bias in zip(packed, biases, strict=True)]
        assert torch.equal(y, torch.cat(alone, 1))


def with_layers(part, change):
    """A decoder's form, or a part of it, with change(layer) for each LayerForm in it."""
    if isinstance(part, LayerForm):
        return change(part)
    if isinstance(part, tuple):
        return tuple(with_layers(one, change) for one in part)
    if isinstance(part, BlockForm | DecoderForm):
        values = {f.name: with_layers(getattr(part, f.name), change) for f in fields(part)}
        return type(part)(**values)
    return part


def test_a_decoder_of_quantised_layers():
    """All of its layers and the head, over the same decoder on the dequantised weights."""
    form = recognise(optimize_for_inference(zoo.zoo_model("qwen3")), 8).form

    def pack(layer, change):
        weights = cpu.unpack(layer.packed)
        weights.SVh, weights.U = (change(W) if W.shape[0] else W for W in (weights.SVh, weights.U))
        return LayerForm(cpu.pack(weights, torch.float32), layer.bias)

    def codes(W):
        return rounded(W, 8 if W.shape[0] % 2 else 6)

    def dequantised(W):
        return reference.dequantize(codes(W))

    def logits_of(change):
        plan = cpu.decoder_plan(with_layers(form, lambda layer: pack(layer, change)), torch.float32)
        g = torch.Generator().manual_seed(0)
        x, cache = torch.randn(2, form.width, generator=g), torch.zeros(plan.cached * 2 * 8)
        zeros = torch.zeros(2, dtype=torch.int64)
        return plan.run(x, cache, 2, 0, zeros, zeros)[0]

    torch.testing.assert_close(logits_of(codes), logits_of(dequantised), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits_of(codes), logits_of(lambda W: W), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama, tied", "llama"])
def test_a_quantised_model_is_packed_grouped_decoded_and_restored(name):
    """Decoder holds its plan against the model's own modules before it takes it."""
    model = quantized_model(name)
    before, wanted = {n: t.clone() for n, t in model.state_dict().items()}, logits(model)
    optimize_for_inference(model, group=True)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)
    decoder = Decoder(model, 2, 16)
    assert (decoder.runtime, decoder.reason) == ("cpu", "")
    restore_from_inference(model)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[n], before[n]) for n in before)


def test_threads_share_the_panels():
    layer = quantised(Case(sizes=(640, 3000, 3000), lora_rank=0, form="dense"), torch.bfloat16, 4)
    packed = cpu.pack(layer.weights, torch.bfloat16)
    before = torch.get_num_threads()
    try:
        for M in (1, 17, 64):
            x = torch.randn(M, 640).bfloat16()
            torch.set_num_threads(1)
            y = cpu.forward_packed(x, packed, None)
            for threads in (2, 3):
                torch.set_num_threads(threads)
                assert torch.equal(cpu.forward_packed(x, packed, None), y)
    finally:
        torch.set_num_threads(before)


@every_dtype
def test_opcheck(dtype):
    layer = quantised(Case(M=17, sizes=(70, 50, 50), lora_rank=0, form="dense"), dtype, 5)
    packed = cpu.pack(layer.weights, dtype)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    args = (layer.x, packed.layer, layer.weights.bias, 50, 0)
    torch.library.opcheck(torch.ops.hylora.cpu_packed_layer.default, args, test_utils=tests)
    args = (packed.layer, 70, torch.tensor([[0, 49]]))
    torch.library.opcheck(torch.ops.hylora.cpu_packed_rows.default, args, test_utils=tests)


def test_wrong_tensors_are_refused_by_name():
    W = quantised(Case(sizes=(70, 50, 50), form="dense"), torch.float32, 4).weights.SVh
    good = {"codes": W.codes, "scales": W.scales, "zeros": W.zeros, "bits": 4, "k": 70}
    for change, message in (
        ({"bits": 7}, "bits must be 2, 3, 4, 5, 6 or 8, got 7"),
        ({"k": 200}, r"codes must be contiguous uint8 \[n, 4, 32\]"),
        ({"scales": W.scales.float()}, r"scales must be contiguous float16 \[50, 2\]"),
        ({"zeros": None}, "zeros must be given, but not for 8 bits"),
        ({"zeros": W.zeros[:1]}, "zeros must be 64 contiguous numbers of uint8"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.hylora.cpu_pack_quantized(**good | change)
