"""The panels kept from step to step: gone with any write, with eval() and with the layer."""

from __future__ import annotations

import ctypes
import gc
import os
import threading

import pytest
import torch
from helpers.numerics import (
    Case,
    assert_as_exact_as_formula,
    by_op,
    every_form,
    make_dy,
    make_inputs,
    make_layer,
)
from torch import Tensor

from hylora_kernels import SVDLoRALinear, backends, svd_lora_linear, use_backend
from hylora_kernels.backends import cpu
from hylora_kernels.backends.cpu import panels

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason=f"cpu: {cpu.why_not()}")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def kept(layer: SVDLoRALinear) -> panels.KeptPanels | None:
    return panels.kept_panels.get_unchecked(layer.SVh)


def step(layer: SVDLoRALinear, M: int = 70) -> dict[str, Tensor]:
    """One step's output and gradients, checked against the formula."""
    x = torch.randn(M, layer.in_features, dtype=layer.SVh.dtype)
    inputs = make_inputs(Case(), layer.SVh.dtype)._replace(
        **{n: getattr(layer, n).detach() for n in ("SVh", "U", "A", "B", "bias")},
        **{"x": x, "alpha": layer.alpha, "pivots": layer.pivots},
    )
    dy = make_dy(inputs)
    # The layer's own SVh and U, since what is kept hangs on these very tensors.
    with use_backend("cpu"):
        got = by_op(
            lambda x, SVh, U, *rest: svd_lora_linear(x, layer.SVh, layer.U, *rest), inputs, dy
        )
    assert_as_exact_as_formula(got, inputs, dy)
    return got


@every_form
@every_dtype
def test_only_a_backward_makes_it_keep_panels(dtype, form):
    layer = make_layer(form, 60, 50, 20, 8, dtype=dtype)
    x = torch.randn(300, 50, dtype=dtype)
    with use_backend("cpu"):
        for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            with mode():
                layer(x)
        assert kept(layer) is None
        y = layer(x.requires_grad_())
        assert kept(layer) is None
        y.sum().backward()
    assert kept(layer).forward is None, "what no forward has asked for isn't there"
    step(layer)
    both_ways = kept(layer)
    assert both_ways.forward is not None
    step(layer)
    assert kept(layer) is both_ways, "nothing was packed anew"


def test_no_gradient_towards_x_keeps_nothing():
    layer = make_layer(dtype=torch.float32)
    with use_backend("cpu"):
        layer(torch.randn(70, 14)).sum().backward()
    assert kept(layer) is None


@every_form
def test_eval_drops_what_is_kept(form):
    layer = make_layer(form, dtype=torch.bfloat16)
    for _ in range(2):
        step(layer)
        assert kept(layer) is not None
        torch.nn.Sequential(layer).eval()
        assert kept(layer) is None
        layer.train()


def test_it_lives_no_longer_than_the_layer():
    layer = make_layer(dtype=torch.float32)
    step(layer)
    assert len(panels.kept_panels) == 1
    del layer
    gc.collect()
    assert len(panels.kept_panels) == 0


def write_in_place(layer):
    with torch.no_grad():
        layer.SVh.mul_(3)


def write_in_inference_mode(layer):
    with torch.inference_mode():
        layer.U.mul_(3)


def write_through_data(layer):
    layer.U.data.mul_(3)


def write_one_number(layer):
    layer.U.data[5, 3] += 1


def write_a_narrow_part(layer):
    layer.SVh.data.narrow(0, 3, 2).copy_(torch.ones(2, 50))


def write_through_numpy(layer):
    layer.U.detach().numpy()[7] = 3


def write_through_an_alias(layer):
    memory = (ctypes.c_char * layer.SVh.nbytes).from_address(layer.SVh.data_ptr())
    torch.frombuffer(memory, dtype=torch.float32)[-1] = 9


def write_in_another_process(layer):
    layer.U.share_memory_()
    step(layer)
    step(layer)
    pid = os.fork()
    if not pid:
        layer.U.detach().numpy()[4] = 5
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0


def exchange_rows(layer):
    layer.U.data[[1, 2]] = layer.U.data[[2, 1]]


def flip_signs(layer):
    layer.U.data[:, 1::2] *= -1


def write_pivots(layer):
    if layer.pivots is not None:
        layer.pivots.data.copy_(torch.arange(20))


def exchange_data(layer):
    layer.SVh.data = layer.SVh.data * 3


def exchange_U(layer):
    layer.U = torch.nn.Parameter(layer.U.detach() * 3, requires_grad=False)


def load_state(layer):
    layer.load_state_dict({n: t * 3 if n == "U" else t for n, t in layer.state_dict().items()})


def to_another_dtype(layer):
    layer.bfloat16()


@pytest.mark.parametrize("form", ["pair", "pivoted"])
@pytest.mark.parametrize(
    "change",
    [
        write_in_place,
        write_in_inference_mode,
        write_through_data,
        write_one_number,
        write_a_narrow_part,
        write_through_numpy,
        write_through_an_alias,
        write_in_another_process,
        exchange_rows,
        flip_signs,
        write_pivots,
        exchange_data,
        exchange_U,
        load_state,
        to_another_dtype,
    ],
    ids=lambda change: change.__name__,
)
def test_a_change_of_the_factors_is_seen(change, form):
    layer = make_layer(form, 60, 50, 20, 8, dtype=torch.float32)
    step(layer)
    step(layer)
    change(layer)
    step(layer)
    step(layer)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(3, 5), (64, 100), (64, 128), (300, 256)])
def test_a_fingerprint_differs_after_any_write(sizes, dtype):
    def exchange(matrix, dim):
        matrix.copy_(matrix.index_select(dim, torch.tensor([2, 1, 0, *range(3, sizes[dim])])))

    writes = (
        *(torch.Tensor.zero_, torch.Tensor.neg_, lambda m: m.copy_(m.roll(1, 0))),
        *(lambda m: m[:, 1::2].neg_(), lambda m: m[:, 3::4].neg_(), lambda m: m[:, 3].neg_()),
        *(lambda m: m[:, 1::2].mul_(2), lambda m: m[:, 3::4].mul_(2), lambda m: m[:, 3].mul_(2)),
        *(lambda m: exchange(m, 0), lambda m: exchange(m, 1)),
        *(lambda m: m[0, 0].add_(1), lambda m: m[-1, -1].add_(1), lambda m: m[2, 3].neg_()),
    )
    plain = torch.randn(sizes).to(dtype)
    layouts = (
        plain,
        plain.T.contiguous().T,
        torch.cat((plain, plain), 1)[:, : sizes[1]],
        torch.cat((plain.new_zeros(1), plain.view(-1)))[1:].view(sizes),
    )
    for matrix in layouts:
        before, numbers = panels.fingerprint(matrix), matrix.clone()
        for write in writes:
            write(matrix)
            assert panels.fingerprint(matrix) != before
            matrix.copy_(numbers)
            assert panels.fingerprint(matrix) == before


def test_one_SVh_with_two_U():
    first, second = (make_layer("pair", dtype=torch.float32) for _ in range(2))
    second.SVh = first.SVh
    for layer in (first, second, first, second):
        step(layer)


def test_inference_tensors_are_not_kept():
    inputs = make_inputs(Case(), torch.float32)
    with torch.inference_mode():
        SVh = inputs.SVh.clone()
        y, h_a = torch.ops.hylora.cpu_forward(inputs.x, SVh, *inputs[2:])
        rest = (inputs.x, h_a, SVh, *inputs[2:5], inputs.alpha, None, [True] * 4)
        torch.ops.hylora.cpu_backward(torch.ones_like(y), *rest)
    assert len(panels.kept_panels) == 0


def test_compiled_code_keeps_panels_too():
    layer = make_layer("pivoted", 60, 50, 20, 8, dtype=torch.float32)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(70, 50, requires_grad=True)
    with use_backend("cpu"):
        compiled(x)
        assert len(panels.kept_panels) == 0, "tracing keeps nothing"
        for _ in range(2):
            compiled(x).sum().backward()
        assert len(panels.kept_panels) == 1
        got, want = x.grad.clone() / 2, torch.autograd.grad(layer(x).sum(), x)[0]
    assert torch.equal(got, want)


def test_threads_share_a_layer():
    layer = make_layer("pivoted", 60, 50, 20, 8, dtype=torch.bfloat16)
    x = torch.randn(70, 50, dtype=torch.bfloat16)
    with use_backend("cpu"):
        expected = [torch.autograd.grad(layer(x).sum(), p)[0] for p in (layer.A, layer.B)]
        failures = []

        def work(index):
            try:
                for turn in range(20):
                    leaf = x.clone().requires_grad_()
                    y = layer(leaf)
                    got = torch.autograd.grad(y.sum(), (leaf, layer.A, layer.B))[1:]
                    assert all(map(torch.equal, got, expected))
                    if (turn + index) % 5 == 0:
                        backends.forget(layer.SVh)
            except BaseException as failure:
                failures.append(failure)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
