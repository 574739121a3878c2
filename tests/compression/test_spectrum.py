"""analyze_spectrum(): weights of known spectra give known figures; table, JSON, picture."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.zoo import tokens, zoo_model
from rich.console import Console

from hylora_kernels.compression.compress import compress
from hylora_kernels.compression.spectrum import analyze_spectrum
from hylora_kernels.model.structure import as_matrix, linears

IDS = tokens(4, 12)


def with_spectra(model, by_name):
    """`model` with the singular values by_name[layer type] in each of its linears."""
    with torch.no_grad():
        for path, linear in linears(model).items():
            values = torch.as_tensor(by_name[path.rpartition(".")[2]], dtype=torch.float32)
            U, _, Vh = torch.linalg.svd(as_matrix(linear), full_matrices=False)
            as_matrix(linear).copy_(U * values @ Vh)
    return model


# Squares of 9, 4, 2, 1, 0, ...; all equal; 0.99 in one. k and v of the Llama have 16 values.
STEPS = [3.0, 2.0, 2**0.5, 1.0] + [0.0] * 28
FLAT = [0.5] * 32
SPECTRA = dict.fromkeys(("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), STEPS)
SPECTRA |= {"k_proj": FLAT[:16], "v_proj": [99**0.5, 1.0] + [0.0] * 14}


@pytest.fixture(scope="module")
def report():
    return analyze_spectrum(with_spectra(zoo_model("llama"), SPECTRA), cache=False, progress=False)


def test_known_spectra(report):
    types = {t.name: t for t in report.types}
    assert list(types) == [f"self_attn.{name}_proj" for name in "qkvo"] + [
        f"mlp.{name}_proj" for name in ("gate", "up", "down")
    ]
    steps, flat, one = (types[f"self_attn.{name}_proj"] for name in "qkv")
    assert (steps.out_features, steps.in_features, steps.layers) == (32, 32, 2)
    assert (flat.out_features, flat.in_features) == (16, 32)
    assert steps.singular_values == pytest.approx(STEPS, abs=1e-5)
    assert one.singular_values == pytest.approx(SPECTRA["v_proj"], abs=1e-4)
    # Cumulated shares of 16: 9, 13, 15, 16.
    assert steps.rank_for == {"0.9": 3, "0.95": 4, "0.99": 4, "0.999": 4}
    assert flat.rank_for == {"0.9": 15, "0.95": 16, "0.99": 16, "0.999": 16}
    assert one.rank_for["0.95"] == 1 and one.rank_for["0.999"] == 2
    assert steps.energy_at == {16: pytest.approx(1)} and flat.energy_at == {}
    assert (steps.break_even, flat.break_even) == (16, 16 * 32 / 48)
    assert types["mlp.up_proj"].break_even == 56 * 32 / 88
    assert steps.lora_parameters[16] == 16 * 64 and flat.lora_parameters[8] == 8 * 48
    assert report.method == "svd" and report.skipped == {"lm_head": "output head"}


def test_layers_of_one_type_are_averaged():
    model = with_spectra(zoo_model("llama"), SPECTRA)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.copy_(0.5 * torch.eye(32))
    report = analyze_spectrum(model, cache=False, progress=False, include=["q_proj"])
    (steps,) = report.types
    assert steps.rank_for["0.9"] == (3 + 29) / 2
    assert steps.energy_at[16] == pytest.approx((1 + 0.5) / 2)
    assert steps.singular_values[0] == pytest.approx(((9 + 0.25) / 2) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("method", ["whitened", "two_sided"])
def test_the_spectra_are_those_compression_truncates(method, tmp_path):
    model = zoo_model("llama")
    report = analyze_spectrum(
        model, method, IDS, samples=4, cache=tmp_path, progress=False, include=["mlp"]
    )
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    assert len(before) == 6
    up = next(t for t in report.types if t.name == "mlp.up_proj")
    squares = torch.tensor(up.singular_values, dtype=torch.float64) ** 2
    options = {"ranks": {".": 8}, "lora_rank": 0, "include": ["mlp"], "cache": tmp_path}
    _, compressed = compress(model, 0.8, IDS, method, **options, samples=4, progress=False)
    assert (
        before.items()
        <= {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}.items()
    )
    lost = [layer.lost_energy for layer in compressed.layers if "up_proj" in layer.path]
    assert min(lost) <= squares[8:].sum() / squares.sum() <= max(lost)


def test_a_weight_of_zeros_is_no_nan():
    model = zoo_model("llama")
    torch.nn.init.zeros_(model.model.layers[0].mlp.up_proj.weight)
    report = analyze_spectrum(model, cache=False, progress=False)
    assert "NaN" not in report.to_json()


def test_table_json_and_picture(report, tmp_path):
    console = Console(record=True, width=200)
    console.print(report.render())
    text = console.export_text()
    for word in ("self_attn.v_proj", "16 x 32", "rank for 99.9%", "energy at 16", "break-even"):
        assert word in text
    written = json.loads(report.save(tmp_path / "spectrum.json").read_text())
    assert written["types"][0]["rank_for"]["0.9"] == 3
    report.plot(tmp_path / "spectrum.png")
    assert (tmp_path / "spectrum.png").read_bytes().startswith(b"\x89PNG")


def test_refusals():
    model = zoo_model("llama")
    with pytest.raises(ValueError, match=r"method must be one of .*got 'asvd'"):
        analyze_spectrum(model, "asvd")
    compress(model, 0.7, method="svd", rank_multiple=4, cache=False, progress=False)
    with pytest.raises(ValueError, match=r"model must be dense, but its layer model.* already"):
        analyze_spectrum(model)
