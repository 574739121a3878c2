"""The cuda backend and its binding, with the kernels emulated on the CPU: results, the choice of
launch or torch, refusals. test_emulator.py tests the kernels themselves."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from cuda_emulator import on_cpu
from helpers.numerics import (
    CASES,
    Case,
    assert_as_exact_as_formula,
    by_op,
    by_reference,
    every_form,
    make_dy,
    make_inputs,
)

from hylora_kernels import backends, svd_lora_linear, use_backend
from hylora_kernels.backends import cuda as backend
from hylora_kernels.backends.cuda import launch
from hylora_kernels.backends.shared import counters, gpu
from hylora_kernels.machine import info, tune
from hylora_kernels.machine.selftest import run as selftest
from hylora_kernels.machine.selftest.grid import Case as Trial
from hylora_kernels.machine.selftest.grid import Entry

HALVES = (torch.bfloat16, torch.float16)
needs_library = pytest.mark.skipif(
    not hasattr(torch.ops.hylora, "cuda_layer"), reason="hylora_kernels/_csrc.so isn't built"
)


@pytest.fixture(scope="session")
def ops():
    if on_cpu.COMPILER is None:
        pytest.skip("the emulated kernels are compiled with g++, none found")
    if not hasattr(torch.ops.hylora, "cuda_layer"):
        pytest.skip("hylora_kernels/_csrc.so isn't built")
    torch.ops.load_library(on_cpu.build())


@pytest.fixture
def emulated(ops):
    """The backend serves the CPU, always by its kernels."""
    with on_cpu.emulated(), backend.forcing(backend.KERNELS), use_backend("cuda"):
        yield


def run(inputs, dy=None):
    dy = make_dy(inputs) if dy is None else dy
    return by_op(svd_lora_linear, inputs, dy), dy


@pytest.fixture
def launches(monkeypatch):
    """The names of the launches, in their order."""
    names = []
    for name in ("layer", "adapter_gradients"):
        function = getattr(launch, name)

        def counted(*given, name=name, function=function, **named):
            names.append(name)
            return function(*given, **named)

        monkeypatch.setattr(launch, name, counted)
    return names


# ---------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward(case, dtype, emulated):
    inputs = make_inputs(case, dtype)
    got, dy = run(inputs)
    assert_as_exact_as_formula(got, inputs, dy)
    for kept in counters._kept.values():
        assert not kept.any(), "a launch leaves its counters zero"


@every_form
@pytest.mark.parametrize("needs", [n for n in itertools.product((True, False), repeat=4) if any(n)])
def test_any_choice_of_gradients(needs, form, emulated):
    inputs = make_inputs(Case(M=3, form=form), torch.float16)
    dy = make_dy(inputs)
    names = [n for n, need in zip(("x", "A", "B", "bias"), needs, strict=True) if need]
    leaves = inputs._replace(**{n: getattr(inputs, n).detach().requires_grad_() for n in names})
    svd_lora_linear(*leaves).backward(dy)
    everything = by_reference(inputs, dy)
    for name, grad in zip(("x", "A", "B", "bias"), ("dx", "dA", "dB", "db"), strict=True):
        got = getattr(leaves, name).grad
        assert (got is not None) == (name in names)
        if got is not None:
            torch.testing.assert_close(got, everything[grad], rtol=2e-2, atol=2e-2)


@every_form
def test_factors_in_any_strides(form, emulated):
    inputs = make_inputs(Case(form=form), torch.bfloat16)
    expected, dy = run(inputs)
    for change in (
        lambda t: t.T.contiguous().T if t.dim() == 2 else t,
        lambda t: torch.stack((t, t), -1)[..., 0],
    ):
        got, _ = run(inputs.map(change), dy)
        assert all(torch.equal(got[name], expected[name]) for name in got)


def test_alpha_zero_and_no_adapter_are_the_base(emulated):
    inputs = make_inputs(Case(alpha=0.0), torch.float16)
    base = inputs._replace(A=None, B=None)
    empty = inputs._replace(A=inputs.A[:0], B=inputs.B[:, :0])
    assert torch.equal(svd_lora_linear(*inputs), svd_lora_linear(*base))
    torch.testing.assert_close(svd_lora_linear(*empty), svd_lora_linear(*base))


def test_selftest_covers_it(ops, monkeypatch):
    """Both the backend's own choice and its kernels, forward, backward and repeated."""

    def few(name, device, full):
        cases = [Trial(17, (37, 53, 7, 8), form) for form in ("pair", "pivoted")]
        return [Entry(case, 1, HALVES) for case in cases]

    monkeypatch.setattr(selftest, "plan", few)
    monkeypatch.setattr(backends, "BACKENDS", {"cuda": backend})
    with on_cpu.emulated():
        report = selftest.selftest("cpu", repeats=1)
    found = [(line.dtype, line.form, line.cases) for line in report.lines]
    assert [line for line in found if line[1] != "group"] == [
        (dtype, form, 2) for dtype in ("bfloat16", "float16") for form in ("pair", "pivoted")
    ]
    assert {("bfloat16", "group", 4), ("float16", "group", 4)} <= set(found)
    assert not report.failures


@pytest.mark.gpu
@pytest.mark.skipif(not backend.is_available(), reason=f"cuda: {backend.why_not()}")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_on_a_gpu(dtype):
    with backend.forcing(backend.KERNELS), use_backend("cuda"):
        for case in CASES:
            inputs = make_inputs(case, dtype, "cuda")
            got, dy = run(inputs)
            assert_as_exact_as_formula(got, inputs, dy)


# ----------------------------------------------------------------- the choice of launch or torch


def test_what_is_launched(emulated, launches):
    def launched(change=lambda inputs: inputs, dtype=torch.bfloat16, **case):
        launches.clear()
        inputs = change(make_inputs(Case(**case), dtype))
        got, dy = run(inputs)
        assert_as_exact_as_formula(got, inputs, dy)
        return launches.copy()

    assert launched() == ["layer", "layer", "adapter_gradients"]
    assert launched(lora_rank=0) == ["layer", "layer"]
    assert launched(dtype=torch.float32) == launched(dtype=torch.float64) == []
    assert launched(M=0) == launched(form="dense") == []
    assert launched(lambda i: i._replace(A=i.A[:0], B=i.B[:, :0])) == []
    with backend.forcing(backend.TORCH_PRODUCTS):
        assert launched() == []
    with pytest.raises(KeyError), backend.forcing(backend.TORCH_PRODUCTS):
        raise KeyError
    assert launched() == ["layer", "layer", "adapter_gradients"]


def test_unforced_the_sizes_decide(ops, launches):
    with on_cpu.emulated(), use_backend("cuda"):
        run(make_inputs(Case(M=3), torch.bfloat16))
        assert launches == ["layer", "adapter_gradients"], "dx is torch's"
        launches.clear()
        run(make_inputs(Case(M=70, lora_rank=0), torch.bfloat16))
        assert launches == []


@pytest.mark.parametrize(
    ("M", "megabytes", "lora_rank", "is_faster"),
    [
        (1, 4, 0, True),  # two products against one launch
        (16, 4, 0, True),
        (17, 4, 0, False),
        (1, 47, 0, False),
        (64, 47, 32, True),  # four products against one launch
        (65, 4, 32, False),
    ],
)
def test_when_one_launch_is_faster(M, megabytes, lora_rank, is_faster):
    assert gpu.one_launch_is_faster(M, megabytes * 10**6, lora_rank) is is_faster


def test_when_the_launch_for_the_adapter_is_faster():
    assert gpu.adapter_gradients_launch_is_faster(2048, 4096, 11008)
    assert not gpu.adapter_gradients_launch_is_faster(8192, 4096, 11008)


def test_auto_takes_it_before_the_cpu_where_triton_cannot_serve(ops, monkeypatch):
    names = list(backends.BACKENDS)
    assert names.index("triton") < names.index("cuda") < names.index("cpu")
    monkeypatch.delenv("HYLORA_BACKEND", raising=False)
    monkeypatch.setattr(backends.BACKENDS["triton"], "why_not", lambda: "not installed")
    with on_cpu.emulated():
        for dtype, name in ((torch.float16, "cuda"), (torch.float64, "eager")):
            inputs = make_inputs(Case(), dtype)
            assert backends.choose(inputs.x, inputs.weights) == name


# ------------------------------------------------------------------------------------- under tools


@pytest.mark.parametrize("form", ["pair", "pivoted"])
@pytest.mark.parametrize("lora_rank", [0, 8])
def test_opcheck(lora_rank, form, emulated):
    inputs = make_inputs(Case(lora_rank=lora_rank, lead_dims=2, form=form), torch.bfloat16)
    leaves, adapter = inputs.with_grad(), bool(lora_rank)
    torch.library.opcheck(torch.ops.hylora.cuda_forward.default, tuple(leaves))
    _, h_a = torch.ops.hylora.cuda_forward.default(*inputs)
    x, SVh, U, A, B, _, alpha, pivots = inputs
    given = (make_dy(inputs), x, h_a, SVh, U, A, B, alpha, pivots, [True, adapter, adapter, True])
    torch.library.opcheck(torch.ops.hylora.cuda_backward.default, given)


@pytest.mark.parametrize("form", ["pair", "pivoted"])
def test_compile_whole_graph(form, emulated):
    compiled = torch.compile(svd_lora_linear, backend="aot_eager", fullgraph=True, dynamic=True)
    for M in (17, 3):
        inputs = make_inputs(Case(M=M, form=form), torch.bfloat16)
        dy = make_dy(inputs)
        got, expected = (by_op(op, inputs, dy) for op in (compiled, svd_lora_linear))
        assert all(torch.equal(got[name], expected[name]) for name in expected)
    torch.compiler.reset()


@needs_library
def test_the_questions_for_the_device_are_constants_of_compiled_code(monkeypatch):
    monkeypatch.setattr(launch, "target_of", lambda device: (1, 75))

    def choice(x):
        return x + 1 if backend._driver_lacks() + backend._device_lacks(x.device) else x - 1

    x = torch.ones(3)
    compiled = torch.compile(choice, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), choice(x))
    torch.compiler.reset()


# --------------------------------------------------------------------------------------- refusals


def test_reasons(monkeypatch):
    inputs = make_inputs(Case(), torch.float16)
    x, weights = inputs.x, inputs.weights
    monkeypatch.setattr(backend, "NO_KERNELS", "the library has no CUDA kernels: no nvcc was found")
    assert backend.why_not() == backend.unsupported(x, weights) == backend.NO_KERNELS
    monkeypatch.setattr(backend, "NO_KERNELS", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.why_not() == "no CUDA device" and not backend.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backend, "_driver_lacks", lambda: "")
    assert backend.is_available()
    assert backend.unsupported(x, weights) == "serves tensors on cuda, got cpu"
    monkeypatch.setattr(backend, "DEVICE", "cpu")
    monkeypatch.setattr(
        backend, "_device_lacks", lambda device: "serves GPUs from sm_80 on, got sm_75"
    )
    assert backend.unsupported(x, weights) == "serves GPUs from sm_80 on, got sm_75"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert backend.why_not() == "the kernels are for CUDA, torch is built for ROCm"


def test_a_library_older_than_the_package_is_named(monkeypatch):
    monkeypatch.setattr(backend, "MISSING", "")
    monkeypatch.setattr(backend, "_ops", SimpleNamespace(cuda_archs=None))  # but no cuda_layer
    assert (
        backend._no_kernels() == f"{backend.LIBRARY.name} is older than the package: build it again"
    )


@needs_library
def test_the_library_says_which_gpus_it_serves(monkeypatch):
    monkeypatch.setattr(launch, "target_of", lambda device: (1, 75))
    reason = backend._device_lacks(torch.device("cuda", 7))
    assert reason == (backend.NO_KERNELS or "serves GPUs from sm_80 on, got sm_75")
    if not backend.NO_KERNELS:
        assert torch.ops.hylora.cuda_lacks(80) == torch.ops.hylora.cuda_lacks(130) == ""


@needs_library
def test_info_says_what_the_library_was_compiled_for(monkeypatch):
    rows = dict(info.info().rows())
    names = ", ".join(f"sm_{arch}" for arch in torch.ops.hylora.cuda_archs().split())
    assert rows["cuda code"] == (backend.NO_KERNELS or f"{names}; PTX for others")
    monkeypatch.setattr(backend, "NO_KERNELS", "the library has no CUDA kernels: no nvcc was found")
    assert dict(info.info().rows())["cuda code"] == backend.NO_KERNELS


def layer_arguments(transposed=False, pivoted=False, M=5, K=24, N=40, r=8, ra=4) -> dict:
    """The op's arguments as the backend gives them, by name; N and K are the layer's."""

    def half(*shape):
        return torch.randn(shape).half()

    SVh, U, A, B = half(r, K), half(N - r if pivoted else N, r), half(ra, K), half(N, ra)
    weights = (U, B, SVh, A) if transposed else (SVh, A, U, B)
    depth, width = (N, K) if transposed else (K, N)
    names = ("W1", "W1a", "W2", "W2a")
    sizes = (transposed, pivoted, M, depth, width, r, ra, *on_cpu.TARGET)
    h_columns, cells, count, *_ = torch.ops.hylora.cuda_layer_sizes(*sizes)
    return {
        "x": half(M, depth),
        **dict(zip(names, weights, strict=True)),
        "bias": None if transposed else half(N),
        "pivots": torch.arange(r, dtype=torch.int32) if pivoted else None,
        "others": torch.arange(r, N) if pivoted else None,
        "alpha": 0.5,
        "transposed": transposed,
        "multiprocessors": on_cpu.TARGET[0],
        "arch": on_cpu.TARGET[1],
        "y": half(M, width),
        "h": half(M, h_columns),
        "h_a": half(M, ra),
        "partial": torch.empty(cells),
        "counters": torch.zeros(count, dtype=torch.int32),
    }


def adapter_gradients_arguments(M=6, K=24, N=40, ra=4) -> dict:
    def half(*shape):
        return torch.randn(shape).half()

    _, cells, count, *_ = torch.ops.hylora.cuda_adapter_gradients_sizes(M, K, N, ra, *on_cpu.TARGET)
    given = {"dh_a": half(M, ra), "x": half(M, K), "h_a": half(M, ra), "dy": half(M, N)}
    given |= {"alpha": 0.5, "multiprocessors": on_cpu.TARGET[0], "arch": on_cpu.TARGET[1]}
    given |= {"dA": half(ra, K), "dB": half(N, ra), "db": half(N)}
    return given | {"partial": torch.empty(cells), "counters": torch.zeros(count).int()}


@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck_of_the_launches(transposed, pivoted, ops):
    given = layer_arguments(transposed, pivoted)
    torch.library.opcheck(
        torch.ops.hylora.cuda_layer.default, tuple(given.values()), test_utils="test_schema"
    )
    given = adapter_gradients_arguments()
    torch.library.opcheck(
        torch.ops.hylora.cuda_adapter_gradients.default,
        tuple(given.values()),
        test_utils="test_schema",
    )


WRONG_LAYER = {
    "x must be bfloat16 or float16": {"x": torch.randn(5, 24)},
    "x, y, W1 and W1a must be matrices": {"x": torch.randn(5).half()},
    r"x must be contiguous in its last dimension, got stride 5": {"x": torch.ones(24, 5).half().T},
    r"W1 must be \[8, 24\], got \[8, 23\]": {"W1": torch.ones(8, 23).half()},
    "W1 has the wrong dtype": {"W1": torch.ones(8, 24).bfloat16()},
    r"W1a must be \[4, 24\], got \[4, 2\]": {"W1a": torch.ones(4, 2).half()},
    r"W2 must be \[40, 8\], got \[40, 9\]": {"W2": torch.ones(40, 9).half()},
    r"W2a must be \[40, 4\], got \[40, 3\]": {"W2a": torch.ones(40, 3).half()},
    "W1a and W2a must come together": {"W2a": None},
    r"bias must have 40 numbers, got \[39\]": {"bias": torch.ones(39).half()},
    "bias must lie in one piece": {"bias": torch.ones(80).half()[::2]},
    "pivots and others must come together": {"pivots": torch.arange(8).int()},
    "no dimension may be empty": {"x": torch.ones(0, 24).half()},
    "y must lie in one piece": {"y": torch.ones(5, 50).half()[:, :40]},
    r"h_a must have 20 numbers, got \[5, 5\]": {"h_a": torch.ones(5, 5).half()},
    r"h must have at least \d+ numbers, got \[5, 1\]": {"h": torch.ones(5, 1).half()},
    r"counters must have at least \d+ numbers, got \[1\]": {"counters": torch.zeros(1).int()},
    "counters has the wrong dtype": {"counters": torch.zeros(99)},
}
WRONG_PIVOTS = {
    r"pivots must have 8 numbers, got \[7\]": {"pivots": torch.arange(7).int()},
    "pivots has the wrong dtype": {"pivots": torch.arange(8)},
    r"others must have 32 numbers, got \[8\]": {"others": torch.arange(8)},
    r"W2 must be \[32, 8\], got \[40, 8\]": {"W2": torch.ones(40, 8).half()},
    "pivots must be fewer than the outputs, got 8": {"y": torch.ones(5, 8).half()},
}
WRONG_ADAPTER_GRADIENTS = {
    "dh_a, x and dA, or h_a, dy and dB, or all must be given": {"x": None},
    "db with dB alone": {"h_a": None, "dy": None, "dB": None},
    r"x must be \[6, 24\], got \[5, 24\]": {"x": torch.ones(5, 24).half()},
    r"dy must be contiguous in its last dimension": {"dy": torch.ones(40, 6).half().T},
    "dy has the wrong dtype": {"dy": torch.ones(6, 40).bfloat16()},
    r"h_a must have 24 numbers, got \[6, 5\]": {"h_a": torch.ones(6, 5).half()},
    "dh_a must be bfloat16 or float16": {"dh_a": torch.ones(6, 4)},
    r"dA must have 96 numbers": {"dA": torch.ones(4, 23).half()},
    "no dimension may be empty": {"dh_a": torch.ones(0, 4).half()},
}


@pytest.mark.parametrize("message", WRONG_LAYER)
def test_a_wrong_tensor_is_named(message, ops):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.hylora.cuda_layer(**layer_arguments() | WRONG_LAYER[message])


@pytest.mark.parametrize("message", WRONG_PIVOTS)
def test_a_wrong_tensor_of_the_pivoted_form_is_named(message, ops):
    given = layer_arguments(pivoted=True) | WRONG_PIVOTS[message]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.hylora.cuda_layer(**given)


def test_transposed_weights_are_checked_as_they_are_stored(ops):
    given = layer_arguments(transposed=True)
    given["W1"] = given["W1"].T.contiguous()
    with pytest.raises(RuntimeError, match=r"W2 must be \[40, 24\], got \[8, 24\]"):
        torch.ops.hylora.cuda_layer(**given | {"W1": torch.ones(40, 40).half()})
    with pytest.raises(RuntimeError, match=r"W1 must be \[40, 40\], got \[8, 40\]"):
        torch.ops.hylora.cuda_layer(**given)


@pytest.mark.parametrize("message", WRONG_ADAPTER_GRADIENTS)
def test_a_wrong_tensor_of_the_adapters_launch_is_named(message, ops):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.hylora.cuda_adapter_gradients(
            **adapter_gradients_arguments() | WRONG_ADAPTER_GRADIENTS[message]
        )


def test_split_sums_need_their_workspace(ops):
    given = layer_arguments(M=1, K=4096, r=16)
    assert given["partial"].numel() > 0, "a long contraction is split"
    with pytest.raises(RuntimeError, match=r"partial must be given: \d+ numbers"):
        torch.ops.hylora.cuda_layer(**given | {"partial": None})
    torch.ops.hylora.cuda_layer(**given)
    assert given["y"].isfinite().all() and not given["counters"].any()


@needs_library
@pytest.mark.parametrize("gpu", [(132, 90), (108, 80), (58, 89), (148, 100)], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "backward"])
def test_plans_for_real_gpus(transposed, gpu):
    """No more parts than there are blocks for, none of a few steps, and a workspace that stays in
    L2: 40 MB on the smallest of datacentres."""
    multiprocessors, _ = gpu
    for (K, N, r, ra), M in itertools.product(tune.SHAPES, (1, 16, 17, 64, 256, 2048)):
        depth, width = (N, K) if transposed else (K, N)
        sizes = torch.ops.hylora.cuda_layer_sizes
        h_columns, cells, count, threads, shared = sizes(
            *(transposed, False, M, depth, width, r, ra, *gpu)
        )
        decodes = M <= 16 and not transposed
        side = 16 if decodes else {128: 64, 256: 128}[threads]
        assert h_columns == side * (-(-r // side) + -(-ra // side))
        row_blocks = -(-M // side)
        tiles = row_blocks * h_columns // side
        assert count == 1 + row_blocks + tiles
        split, rest = divmod(cells, tiles * side * side)
        assert rest == 0 and split != 1
        blocks_per_sm = 2 if side == 128 else 3
        assert split == 0 or tiles * split <= blocks_per_sm * multiprocessors
        assert split == 0 or depth // split >= (256 if decodes else 96)
        assert 2 * M * h_columns + 4 * cells <= 40e6
        assert shared <= 99 * 1024
