"""The interface of every backend, and the dispatcher: auto, forced, by environment, unknown,
refusing."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers.numerics import Case, every_backend, every_form, make_inputs

from hylora_kernels import available_backends, backends, svd_lora_linear, use_backend
from hylora_kernels.ops import linear

INTERFACE = {
    "is_available": "",
    "unsupported": "x, weights",
    "forward": "x, weights",
    "backward": "dy, saved, weights, needs",
    "why_not": "",
    "is_faster_than_next": "x, weights",
    "forget": "SVh",
    "pack": "weights, dtype, for_group",
    "forward_packed": "x, packed, bias",
    "why_no_group": "members",
    "group": "members",
    "forward_group": "x, group, biases",
    "rows_packed": "ids, packed",
    "unpack": "packed",
    "decoder_plan": "form, dtype",
}


@every_backend
def test_every_backend_has_the_same_interface(backend):
    for name, parameters in INTERFACE.items():
        function = getattr(backends.BACKENDS[backend], name)
        assert ", ".join(inspect.signature(function).parameters) == parameters


@every_backend
def test_backends_do_not_import_one_another(backend):
    home = backends.BACKENDS[backend].__name__
    modules = [m for n, m in sys.modules.items() if n == home or n.startswith(home + ".")]
    imports = re.compile(r"^\s*(?:from|import) +(hylora_kernels\S*)", re.MULTILINE)
    for module in modules:
        named = imports.findall(inspect.getsource(module))
        found = {n for n in named if n.startswith("hylora_kernels.backends")}
        own = (home, f"{home}.", "hylora_kernels.backends.shared")
        assert all(n.startswith(own) for n in found), module.__name__


def test_every_backend_has_both_ops():
    assert list(backends.BACKENDS)[-1] == "eager", "it serves everything, so it is asked last"
    for backend in backends.BACKENDS:
        assert (
            linear._FORWARD_OPS[backend] is getattr(torch.ops.hylora, f"{backend}_forward").default
        )
        assert getattr(torch.ops.hylora, f"{backend}_backward").default


@every_form
def test_eager_serves_everything(form):
    backend = backends.BACKENDS["eager"]
    assert backend.is_available()
    for dtype in (torch.float64, torch.float16):
        inputs = make_inputs(Case(M=0, form=form), dtype)
        x, weights = inputs.x, inputs.weights
        assert backend.unsupported(x, weights) is None
        assert backend.is_faster_than_next(x, weights)
        assert backend.pack(weights) is None


def test_available_backends():
    found = available_backends()
    assert list(found) == list(backends.BACKENDS)
    assert found["eager"] == ""
    for name, backend in backends.BACKENDS.items():
        assert backend.is_available() == (found[name] == "")


def test_cpu_levels():
    used, reasons = backends.cpu_levels()
    assert list(reasons) == ["scalar", "avx2", "avx512", "avx512_bf16", "amx_bf16"]
    if available_backends()["cpu"]:
        assert used == ""
    else:
        assert reasons["scalar"] == "" and reasons[used] == ""


@every_backend
def test_a_backend_that_cannot_be_used_serves_nothing(backend):
    reason, inputs = backends.BACKENDS[backend].why_not(), make_inputs(Case(), torch.float32)
    if reason:
        assert backends.BACKENDS[backend].unsupported(inputs.x, inputs.weights) == reason
        with use_backend(backend), pytest.raises(ValueError, match=re.escape(reason)):
            svd_lora_linear(*inputs)


# ---------------------------------------------------------------------------------- the dispatcher


def choose(inputs=None) -> str:
    inputs = inputs or make_inputs(Case())
    return backends.choose(inputs.x, inputs.weights)


@pytest.fixture
def picky(monkeypatch):
    """A backend asked first that serves float64 alone, and is the faster unless a test says no."""

    def unsupported(x, *others):
        return None if x.dtype == torch.float64 else f"wants float64, got {x.dtype}"

    backend = SimpleNamespace(
        why_not=lambda: "no such machine",
        unsupported=unsupported,
        is_faster_than_next=lambda *call: True,
    )
    monkeypatch.setattr(backends, "BACKENDS", {"picky": backend, **backends.BACKENDS})
    monkeypatch.delenv("HYLORA_BACKEND", raising=False)
    return backend


def test_auto_takes_the_first_backend_that_serves(picky):
    assert choose(make_inputs(Case())) == "picky"
    assert choose(make_inputs(Case(), torch.float32)) != "picky"
    assert available_backends()["picky"] == "no such machine"


def test_auto_passes_over_a_slower_backend(picky):
    picky.is_faster_than_next = lambda *call: False
    assert choose(make_inputs(Case())) == "eager"
    with use_backend("picky"):
        assert choose(make_inputs(Case())) == "picky", "forced, it serves what it can"


def test_forced_backend_that_cannot_serve_says_why(picky):
    inputs = make_inputs(Case(), torch.float32)
    message = r"backend 'picky' can't serve this call: wants float64, got torch\.float32"
    with use_backend("picky"):
        assert choose(make_inputs(Case())) == "picky"
        with pytest.raises(ValueError, match=message):
            choose(inputs)
        with pytest.raises(ValueError, match=message):
            svd_lora_linear(*inputs)
    assert choose(inputs) != "picky"


def test_use_backend_nests_and_ends_with_an_error(picky):
    assert choose() == "picky"
    with use_backend("eager"):
        assert choose() == "eager"
        with use_backend("auto"):
            assert choose() == "picky"
        assert choose() == "eager"
    with pytest.raises(KeyError), use_backend("eager"):
        raise KeyError
    assert choose() == "picky"


def test_use_backend_overrides_the_environment(picky, monkeypatch):
    monkeypatch.setenv("HYLORA_BACKEND", "eager")
    assert choose() == "eager"
    with use_backend("picky"):
        assert choose() == "picky"
    with use_backend("auto"):
        assert choose() == "picky"


def test_unknown_names(monkeypatch):
    message = r"use_backend must be one of \('auto', .*'eager'\), got 'gpu'"
    with pytest.raises(ValueError, match=message), use_backend("gpu"):
        pass
    monkeypatch.setenv("HYLORA_BACKEND", "gpu")
    with pytest.raises(ValueError, match=r"HYLORA_BACKEND must be one of .*'eager'\), got 'gpu'"):
        svd_lora_linear(*make_inputs(Case()))
    with use_backend("eager"):
        svd_lora_linear(*make_inputs(Case()))


ISA_SCRIPT = """
from hylora_kernels import available_backends
print(available_backends()["cpu"])
"""


@pytest.mark.skipif(bool(available_backends()["cpu"]), reason="it has its reason already")
def test_an_unknown_level_is_the_cpu_backends_reason():
    run = subprocess.run(
        [sys.executable, "-c", ISA_SCRIPT],
        env=os.environ | {"HYLORA_ISA": "mmx"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.startswith("HYLORA_ISA must be one of scalar, avx2,"), run.stdout


SCRIPT = """
import torch
from hylora_kernels import svd_lora_linear, use_backend
arguments = torch.ones(1, 2), torch.ones(1, 2), torch.ones(3, 1)
try:
    svd_lora_linear(*arguments)
except ValueError as error:
    print(error)
with use_backend("auto"):
    print(svd_lora_linear(*arguments).tolist())
"""


def test_environment_in_a_fresh_process():
    """A wrong name is an error of the first call, not of the import, and is named."""
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {"HYLORA_BACKEND": "gpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    names = ("auto", *backends.BACKENDS)
    error = f"HYLORA_BACKEND must be one of {names}, got 'gpu'"
    assert run.stdout == f"{error}\n[[2.0, 2.0, 2.0]]\n", run.stderr
