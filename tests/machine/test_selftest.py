"""hylora selftest and hylora tune: a backend that is wrong, or not always the same, is caught."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from helpers.numerics import distance
from typer.testing import CliRunner

from hylora_kernels import backends
from hylora_kernels.backends import cpu, eager
from hylora_kernels.backends.cpu import packed
from hylora_kernels.cli import main as cli
from hylora_kernels.cli import options
from hylora_kernels.evaluation import rates
from hylora_kernels.machine import tune
from hylora_kernels.machine.selftest import run as selftest
from hylora_kernels.machine.selftest.grid import (
    DTYPES,
    FORMS,
    LAYERS,
    LAYOUTS,
    LONG_SUMS,
    RAGGED,
    Case,
    Entry,
    plan,
)
from hylora_kernels.machine.selftest.races import Race, races, run
from hylora_kernels.model import checkpoint
from hylora_kernels.weights import Needs

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    """The eager backend alone, on one ragged case of each form."""

    def few(name, device, full):
        return [Entry(Case(17, (37, 53, 7, 8), form), 0, (torch.float32,)) for form in FORMS]

    monkeypatch.setattr(selftest, "plan", few)
    monkeypatch.setattr(backends, "BACKENDS", {"eager": eager})


def altered(monkeypatch, name, change):
    """Apply `change` to the results of the eager backend's function."""
    function = getattr(eager, name)
    monkeypatch.setattr(eager, name, lambda *arguments: change(*function(*arguments)))


def test_all_is_well(small):
    report = selftest.selftest("cpu")
    assert [line.form for line in report.lines] == list(FORMS)
    for line in report.lines:
        assert (line.backend, line.device, line.dtype) == ("eager", "cpu", "float32")
        assert 0 < line.worst <= 1 and line.bit_equal and not line.failures and line.where
    assert not report.failures
    assert json.loads(report.to_json())["lines"][0]["cases"] == 1


@pytest.mark.skipif(not cpu.is_available(), reason=f"cpu: {cpu.why_not()}")
def test_layers_on_one_x_are_tested_as_a_group(monkeypatch):
    one = [Entry(Case(3, (37, 53, 7, 8), "pair"), 0, (torch.float32,))]
    monkeypatch.setattr(selftest, "plan", lambda *given: one)
    monkeypatch.setattr(backends, "BACKENDS", {"cpu": cpu})
    monkeypatch.setattr(packed, "torch_products_are_faster", lambda weights: False)
    monkeypatch.setattr(selftest.codes, "ROWS", ())
    report = selftest.selftest("cpu")
    found = [line for line in report.lines if line.form == "group"]
    assert [line.dtype for line in found] == ["bfloat16", "float16", "float32"]
    assert all(line.cases == 4 and line.bit_equal and not line.failures for line in found)
    forward = cpu.forward_group
    monkeypatch.setattr(cpu, "forward_group", lambda *given: poke(forward(*given), 1.0))
    failures = selftest.selftest("cpu").failures
    assert "cpu bfloat16 on cpu: group M=1: y: error" in failures[0] and len(failures) >= 12
    monkeypatch.setattr(packed, "torch_products_are_faster", lambda w: w.pivots is None)
    reasons = selftest.selftest("cpu").skipped
    assert "torch's products are faster" in reasons["cpu bfloat16 group on cpu"]


@pytest.mark.skipif(not cpu.is_available(), reason=f"cpu: {cpu.why_not()}")
def test_layers_of_codes_are_tested_in_every_form_and_width(monkeypatch):
    monkeypatch.setattr(selftest, "DTYPES", (torch.bfloat16,))
    monkeypatch.setattr(selftest.codes, "ROWS", (3,))

    def failures():
        skipped = {}
        given = ("cpu", CPU, 1, 0, skipped, math.inf)
        (line,) = selftest._test_packed(selftest.codes, *given)
        assert not skipped and (line.form, line.cases) == ("codes", 18)
        return line.failures

    assert failures() == []
    forward = cpu.forward_packed
    monkeypatch.setattr(cpu, "forward_packed", lambda *given: poke(forward(*given), 1.0))
    found = failures()
    for form, bits in itertools.product(FORMS, (2, 3, 4, 5, 6, 8)):
        assert any(f" {form} " in text and f" in {bits} bits: y" in text for text in found)
    monkeypatch.setattr(cpu, "pack", lambda *given: None)
    skipped = {}
    assert selftest._test_packed(selftest.codes, "cpu", CPU, 1, 0, skipped, math.inf) == []
    assert skipped == {"cpu bfloat16 codes on cpu": "has no kernels for codes"}


WRONG = {
    "y": ("forward", lambda y, h_a: (y * (1 + 1e-5), h_a)),
    "one number of y": ("forward", lambda y, h_a: (poke(y, 1e-4), h_a)),
    "NaN": ("forward", lambda y, h_a: (poke(y, math.nan), h_a)),
    "dB by h_a": ("forward", lambda y, h_a: (y, h_a * 1.0001)),
    "dx": ("backward", lambda dx, *others: (poke(dx, 1e-4), *others)),
    "dA": ("backward", lambda dx, dA, *others: (dx, poke(dA, 1e-3), *others)),
    "db": ("backward", lambda *grads: (*grads[:3], poke(grads[3], 1e-3))),
}


def poke(tensor, much):
    tensor = tensor.clone()
    tensor[..., -1] += much
    return tensor


@pytest.mark.parametrize("what", WRONG)
def test_a_slightly_wrong_backend_is_caught(small, monkeypatch, what):
    altered(monkeypatch, *WRONG[what])
    report = selftest.selftest("cpu")
    for line in report.lines:
        assert line.failures and line.worst > 1 and line.bit_equal is (what != "NaN")
    assert all("17" in failure and "eager" in failure for failure in report.failures)


def test_an_unwritten_number_is_caught(small, monkeypatch):
    def forward(*call):
        y, h_a = backends.BACKENDS["eager"].products_forward(*call)
        found = torch.empty_like(y)
        found[:, 1:] = y[:, 1:]
        return found, h_a

    monkeypatch.setattr(eager, "products_forward", eager.forward, raising=False)
    monkeypatch.setattr(eager, "forward", forward)
    report = selftest.selftest("cpu")
    assert all(line.worst == math.inf for line in report.lines)


def test_other_bits_are_caught(small, monkeypatch):
    turns = itertools.count()

    def last_bit(y, h_a):
        return (torch.nextafter(y, y + 1) if next(turns) % 5 == 4 else y), h_a

    altered(monkeypatch, "forward", last_bit)
    report = selftest.selftest("cpu")
    for line in report.lines:
        assert not line.bit_equal and line.worst <= 1
        assert "repetitions gave other bits" in line.failures[0]


def test_a_backend_that_raises_does_not_end_the_test(small, monkeypatch):
    def fails(*call):
        raise RuntimeError("no such\nkernel")

    monkeypatch.setattr(eager, "forward", fails)
    report = selftest.selftest("cpu")
    assert len(report.failures) == 3
    assert all("RuntimeError: no such kernel" in failure for failure in report.failures)


def test_what_cannot_be_tested_is_named(small, monkeypatch):
    backend = backends.BACKENDS["eager"]
    for name, change in {
        "why_not": lambda: "no such machine",
        "unsupported": lambda x, *others: "serves nothing",
    }.items():
        with monkeypatch.context() as patch:
            patch.setattr(backend, name, change)
            report = selftest.selftest("cpu")
        assert not report.lines and len(report.skipped) == 1
        assert next(iter(report.skipped.values())) in ("no such machine", "serves nothing")


def test_no_case_is_begun_out_of_time(small, monkeypatch):
    a_case_takes_a_second(monkeypatch)
    report = selftest.selftest("cpu", seconds=1.5)  # the third case would be begun at 2
    assert [line.form for line in report.lines] == list(FORMS[:2])
    assert report.skipped == {f"eager float32 {FORMS[2]} on cpu": "1 of 1 cases: out of time"}


def test_each_dtype_and_form_has_its_share_of_the_time(monkeypatch):
    a_case_takes_a_second(monkeypatch)
    monkeypatch.setattr(selftest.backends, "BACKENDS", {"eager": eager})
    report = selftest.selftest("cpu", seconds=30)
    assert {(line.dtype, line.form) for line in report.lines} == {
        (str(dtype).removeprefix("torch."), form) for dtype in DTYPES for form in FORMS
    }
    assert any("out of time" in why for why in report.skipped.values())


def a_case_takes_a_second(monkeypatch) -> None:
    now = [0]

    def judge(tally, case, config) -> None:
        now[0] += 1
        tally.cases += 1

    monkeypatch.setattr(selftest._Tally, "add", judge)
    monkeypatch.setattr(selftest.time, "perf_counter", lambda: now[0])


def test_deterministic_mode_is_as_it_was(small):
    for mode in (True, False):
        torch.use_deterministic_algorithms(mode, warn_only=not mode)
        torch.utils.deterministic.fill_uninitialized_memory = not mode
        selftest.selftest("cpu")
        assert torch.are_deterministic_algorithms_enabled() is mode
        assert torch.is_deterministic_algorithms_warn_only_enabled() is not mode
        assert torch.utils.deterministic.fill_uninitialized_memory is (not mode)


def test_races_alone():
    call = Case(5, RAGGED, "pair").call(torch.float32, CPU, 0)
    races(eager, [call, call], 2, forced=False)
    turns = itertools.count()

    class Backend:
        backward = staticmethod(eager.backward)

        @staticmethod
        def forward(*given):
            y, h_a = eager.forward(*given)
            return y + next(turns), h_a

    with pytest.raises(Race):
        races(Backend, [call, call], 2, forced=False)
    assert len(run(eager, call)) == 5
    assert len(run(eager, call, Needs(True, False, False, False))) == 2


# ----------------------------------------------------------------------------------------- the grid


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_hold_the_sizes_they_say(layout):
    call = Case(5, RAGGED, "pivoted", layout).call(torch.float16, CPU, 0)
    K, N, r, ra = RAGGED
    assert call.x.shape == (5, K) and call.dy.shape == (5, N)
    assert call.SVh.shape == (r, K) and call.U.shape == (N - r, r) and call.A.shape == (ra, K)
    assert call.x.is_contiguous() is (layout == "contiguous")
    again = Case(5, RAGGED, "pivoted", layout).call(torch.float16, CPU, 0)
    assert distance(call.x, again.x) == 0


@pytest.mark.parametrize("full", [False, True])
def test_plans_cover_what_they_should(full):
    on_cuda = [(name, "cuda") for name in ("triton", "cuda", "eager")]
    for name, device in (*on_cuda, ("cpu", "cpu"), ("triton", "cpu")):
        entries = plan(name, torch.device(device), full)
        assert {entry.case.form for entry in entries} == set(FORMS)
        assert len({entry.case.M for entry in entries}) >= 2
    long_sums = [e for e in plan("cpu", CPU, full) if e.case.sizes == LONG_SUMS]
    assert {(e.case.M, e.case.form) for e in long_sums} == {(100, form) for form in FORMS}
    assert all(set(e.dtypes) == set(DTYPES) for e in long_sums)
    on_gpu = plan("triton", torch.device("cuda"), full)
    assert {e.case.M for e in on_gpu} >= {1, 3, 16, 17, 70, 300, 2048}
    assert {e.case.sizes for e in on_gpu} >= set(LAYERS[:2])
    assert {d for e in on_gpu for d in e.dtypes} == set(DTYPES)
    assert any(e.launches > 8 for e in on_gpu)


# --------------------------------------------------------------------------------------- the verbs


def invoke(*words, code=0):
    result = CliRunner().invoke(cli.app, list(map(str, words)))
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


def test_selftest_verb(small, monkeypatch, tmp_path):
    path = tmp_path / "s.json"
    shown = invoke("selftest", "--device", "cpu", "--repeats", 1, "--json", path).output
    assert "3 cases passed" in shown and "pivoted" in shown and "bit-equal" in shown
    assert len(json.loads(path.read_text())["lines"]) == 3
    shown = invoke("selftest", "--device", "cpu", "--seconds", 0).output
    assert "not tested: eager float32 pair on cpu: 1 of 1 cases: out of time" in shown
    altered(monkeypatch, *WRONG["dx"])
    result = invoke("selftest", "--device", "cpu", "--json", path, code=2)
    assert "error: 6 failures in 3 cases" in result.stderr and "FAILED" in result.stdout
    assert json.loads(path.read_text())["lines"][0]["failures"]


@pytest.fixture
def asked(monkeypatch):
    """The options that tune gets; nothing is measured, and any device exists."""
    given = {}

    def fake(device, **options):
        given.update(options, device=device)
        return tune.TuneReport("Toy", "2", "3", 1.0)

    monkeypatch.setattr(tune, "tune", fake)
    monkeypatch.setattr("hylora_kernels.support.devices.resolve_device", torch.device)
    monkeypatch.setattr(rates, "rates_of", lambda *given, again: rates.Rates("Toy", [], "1"))
    monkeypatch.setattr(rates, "rates_path", lambda device: "rates-of-toy.json")
    return given


def test_tune_verb(asked, tmp_path):
    words = ("--shapes", "64x96x32x16,37x53x7x0", "--rows", "1,16", "--dtype", "float16,bfloat16")
    shown = invoke("tune", "--device", "cuda", *words, "--json", tmp_path / "t.json").output
    assert asked == {
        "device": "cuda",
        "shapes": [(64, 96, 32, 16), (37, 53, 7, 0)],
        "rows": [1, 16],
        "dtypes": [torch.float16, torch.bfloat16],
    }
    assert "/toy.json" in shown and "rates-of-toy.json" in shown
    written = json.loads((tmp_path / "t.json").read_text())
    assert written["device"] == written["rates"][0]["device"] == "Toy"


def test_tune_quick_and_by_model(asked, saved):
    invoke("tune", "--device", "cuda", "--quick")
    assert set(asked["shapes"]) < set(tune.SHAPES) and asked["directions"] == ("forward",)
    invoke("tune", "--device", "cuda", "--model", saved)
    shapes, forms = checkpoint.layer_shapes(saved)
    assert asked["shapes"] == shapes and asked["forms"] == forms
    for K, N, r, ra in shapes:
        assert 1 <= r < min(K, N) and ra >= 0
    assert len(set(shapes)) == len(shapes) and set(forms) <= {"pair", "pivoted"}


@pytest.mark.parametrize(
    "words, says",
    [
        (("--shapes", "64x96x32"), "KxNxrxra"),
        (("--shapes", "64x96x64x8"), "below K and N"),
        (("--shapes", "64xax1x1"), "whole numbers"),
        (("--shapes", "64x96x32x8", "--model", "there"), "give one"),
        (("--dtype", "int4"), "dtype"),
        (("--model", "no/such/folder"), "no/such/folder"),
    ],
)
def test_tune_refuses_by_name(asked, words, says):
    assert says in invoke("tune", "--device", "cuda", *words, code=2).stderr


def test_what_is_about_launches_needs_a_gpu():
    result = invoke("tune", "--device", "cpu", "--shapes", "64x96x32x8", code=2)
    assert "--shapes is about a GPU's launches, and the device is cpu" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tune_without_a_gpu_is_one_line():
    lines = invoke("tune", "--device", "cuda", code=2).stderr.splitlines()
    assert len(lines) == 1 and "cuda" in lines[0]


def test_read_shapes():
    assert options.read_shapes("8x9x2x0, 8x9x3x1", "shapes") == [(8, 9, 2, 0), (8, 9, 3, 1)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["triton", "cuda", "eager"])
@pytest.mark.parametrize("form", FORMS)
def test_races_on_a_gpu(form, name):
    backend = backends.BACKENDS[name]
    if reason := backend.why_not():
        pytest.skip(reason)
    device = torch.device("cuda")
    calls = [Case(17, (64, 96, 32, 16), form).call(torch.bfloat16, device, 0)]
    other = Case(17, (64, 96, 32, 16), form).call(torch.bfloat16, device, 1)
    calls.append(calls[0]._replace(x=other.x, A=other.A, B=other.B, dy=other.dy))
    races(backend, calls, 5, forced=False)
    if name == "cuda":
        with backend.forcing(backend.KERNELS):
            races(backend, calls, 5, forced=True)
