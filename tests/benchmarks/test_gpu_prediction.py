"""The analytic model of a GPU: against the design's first estimate, against the datasheet's bare
rates, and what its command prints."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu_prediction
import gpu_roofline
from gpu_roofline import CANDIDATES, FORMS, GPUS, MODES, Layer, predict

LAYERS = [(2048, 2048, 512, 32), (4096, 11008, 1536, 32), (576, 1536, 208, 0)]
ROWS = [1, 2, 7, 16, 17, 48, 64, 65, 127, 128, 129, 300, 1000, 2048, 2049, 8192, 20000]
FIRST = [
    (layer, M, list(CANDIDATES)[place], estimate)
    for layer, by_rows in gpu_prediction.FIRST_ESTIMATE.items()
    for M, estimates in by_rows.items()
    for place, estimate in enumerate(estimates)
]


@pytest.mark.parametrize(("layer", "M", "candidate", "estimate"), FIRST)
def test_within_five_percent_of_the_first_estimate(layer, M, candidate, estimate, monkeypatch):
    monkeypatch.setitem(gpu_roofline.CALIBRATIONS, "H100", gpu_roofline.Calibration())
    seconds = predict(Layer(M, *layer), "H100")[candidate].seconds()
    assert 1e6 * seconds == pytest.approx(estimate, rel=0.05)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("form", FORMS)
def test_more_rows_never_take_less_time(gpu, form):
    for layer in LAYERS:
        for warm in (False, True):
            before = dict.fromkeys(CANDIDATES, 0.0)
            for M in ROWS:
                predicted = predict(Layer(M, *layer, form), gpu, warm)
                for name, prediction in predicted.items():
                    for mode in MODES:
                        assert prediction.seconds(mode) > 0
                    # up to rounding: waves / ceil(waves) is divided by and was multiplied by
                    assert prediction.seconds() >= before[name] * (1 - 1e-12), (layer, M, name)
                    before[name] = prediction.seconds()


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("form", FORMS)
def test_nothing_beats_the_datasheet(gpu, form):
    machine = GPUS[gpu]
    for K, N, r, ra in LAYERS:
        products = r * K + ra * (K + N) + (N - r if form == "pivoted" else N) * r
        for M in ROWS:
            predicted = predict(Layer(M, K, N, r, ra, form), gpu)
            for name, prediction in predicted.items():
                weights = K * N if name == "dense" else products
                least = max(2 * M * weights / machine.tensor, 2 * weights / machine.hbm)
                assert prediction.seconds("graph") > least, (name, M)
                assert prediction.seconds("eager") >= prediction.seconds("graph")


def test_what_bounds_a_layer():
    few, many = (predict(Layer(M, 4096, 11008, 1536, 32)) for M in (1, 8192))
    assert few["one_launch"].bound() == "HBM"
    assert many["one_launch"].bound() == many["two_products"].bound() == "L2"
    consumer = predict(Layer(8192, 4096, 11008, 1536, 32), "RTX 4090")
    assert consumer["one_launch"].bound() == "tensor cores"
    small = predict(Layer(1, 576, 576, 144, 16))
    assert small["two_products"].bound("graph") == "launches"
    assert small["one_launch"].bound("eager") == "host"
    calibration = gpu_roofline.CALIBRATIONS["H100"]
    assert small["one_launch"].seconds("eager") == calibration.host_triton
    assert small["cuda_launch"].seconds("eager") == calibration.host_cuda


def test_what_the_pivoted_form_and_a_warm_cache_save():
    layer = (2048, 5632, 768, 32)
    pair, pivoted = (predict(Layer(8192, *layer, form))["one_launch"] for form in FORMS)
    assert pivoted.seconds() < 0.95 * pair.seconds()
    cold, warm = (
        predict(Layer(1, *layer), warm=w)["two_products"].seconds() for w in (False, True)
    )
    assert warm < 0.9 * cold
    too_much = Layer(1, 4096, 11008, 1536, 32)  # 47 MB of factors, L2 keeps 30 of its 50 MB
    assert predict(too_much, warm=True) == predict(too_much, warm=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 64, 64, 8, 0, "both"), "form must be one of pair, pivoted, got 'both'"),
        ((0, 64, 64, 8), "M, K, N and r must be at least 1"),
        ((1, 64, 64, 64, 0, "pivoted"), "the pivoted form needs r < N, got r=64, N=64"),
    ],
)
def test_an_impossible_layer_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Layer(*arguments)


def test_an_unknown_gpu_is_refused_by_naming_the_known(capsys):
    with pytest.raises(
        ValueError, match=r"one of H100, H200, A100, L4, RTX 4090, MI300X, got 'V100'"
    ):
        predict(Layer(1, 64, 64, 8), "V100")
    with pytest.raises(SystemExit):
        gpu_prediction.main(["--gpu", "V100"])
    refusal = capsys.readouterr().err
    assert all(name in refusal for name in GPUS)


def measured(candidate: str, slower: float, regime: str = "graph", M: int = 1) -> dict:
    mode, _, cache = regime.partition(" ")
    sizes = {"K": 2048, "N": 2048, "r": 512, "ra": 32, "M": M, "form": "pair"}
    predicted = predict(Layer(M, 2048, 2048, 512, 32), "A100", warm=cache == "warm")
    known = predicted.get(candidate)
    seconds = 1e-5 if known is None else slower * known.seconds(mode)
    return sizes | {"candidate": candidate, "seconds": seconds, "regime": regime}


def test_measured_times_are_compared_row_by_row_and_in_the_mean(tmp_path, capsys):
    path = tmp_path / "measured.json"
    rows = [
        measured("one_launch", 2.0),
        measured("one_launch", 8.0, M=2048),
        measured("two_products", 0.5, "eager"),
        measured("two_products", 3.0, "graph warm"),
        measured("peft", 1.0),
    ]
    path.write_text(json.dumps(rows), encoding="utf-8")
    gpu_prediction.main(["--gpu", "A100", "--compare", str(path)])
    by_row, means = capsys.readouterr().out.split("Geometric means")
    ratios = [line.split(" | ")[-1].strip(" |") for line in by_row.splitlines()[3:8]]
    assert ratios == ["2.00", "8.00", "0.50", "3.00", ""]
    assert "| peft | graph | 10.0 | no prediction |" in by_row
    assert [
        line for line in means.splitlines() if line.startswith(("| one", "| two", "| peft"))
    ] == [
        "| one_launch | graph | 2 | 4.00 |",
        "| two_products | eager | 1 | 0.50 |",
        "| two_products | graph warm | 1 | 3.00 |",
    ]


def test_a_table_of_hylora_tune_is_compared(capsys):
    root = Path(__file__).resolve().parents[2]
    path = root / "hylora_kernels/backends/triton/tuned/nvidia-h100-80gb-hbm3.json"
    rows = gpu_prediction.measured_rows(path)
    assert {row["candidate"] for row in rows} == {"four_products", "two_products", "one_launch"}
    ratios = [ratio for _, ratio in gpu_prediction.compared(rows, "H100")]
    assert 0.8 < gpu_prediction.geometric_mean(ratios) < 1.3, "the model is fitted to this table"
    gpu_prediction.main(["--compare", str(path)])
    assert "| one_launch | graph cold | 168 |" in capsys.readouterr().out


def test_an_unknown_regime_is_refused():
    row = measured("dense", 1.0) | {"regime": "compiled"}
    with pytest.raises(ValueError, match=r"regime must be graph or eager .*, got 'compiled'"):
        gpu_prediction.comparison([row], "H100")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--gpu", "MI300X", "--mode", "eager", "--form", "pivoted", "--warm"],
        ["--M", "1", "--K", "2048", "--N", "2048", "--rank", "512", "--lora-rank", "32"],
    ],
)
def test_every_table_says_that_it_is_a_prediction(words, capsys):
    gpu_prediction.main(words)
    tables = capsys.readouterr().out.strip().split("\n\n")
    assert tables and all(table.startswith("PREDICTION, ") for table in tables)
    names = CANDIDATES if "MI300X" not in words else set(CANDIDATES) - {"cuda_launch"}
    assert all(name in table for name in names for table in tables)
    assert all(("cuda_launch" in table) == ("cuda_launch" in names) for table in tables)


def test_one_layer_needs_all_of_its_sizes(capsys):
    with pytest.raises(SystemExit):
        gpu_prediction.main(["--M", "1", "--K", "64"])
    assert "needs all of --M, --K, --N and --rank" in capsys.readouterr().err


@pytest.mark.parametrize("gpu", GPUS)
def test_codes_are_predicted_within_the_datasheet(gpu):
    machine = gpu_roofline.machine_named(gpu)
    for bits in gpu_roofline.INSTRUCTIONS:
        before = 0.0
        for M in (1, 16, 17, 64, 65, 2048):
            predicted = gpu_roofline.quantized(M, 2048, 8192, bits, machine)
            assert predicted.seconds() >= max(before, 2048 * 8192 * bits / 8 / machine.gpu.hbm)
            before = predicted.seconds()
        assert predicted.launches == 2, "many rows are dequantised, then multiplied"


def test_the_table_of_quantised_matrices(capsys):
    gpu_prediction.main(["--gpu", "A100", "--bits", "4", "8"])
    shown = capsys.readouterr().out
    assert shown.startswith(
        "PREDICTION, A100, microseconds (times as fast as bf16)\n| matrix | M |"
    )
    assert "| all of a token's matrices | 1 | " in shown and "| bf16 | 4 bits | 8 bits |" in shown


def test_a_group_is_one_shrink_and_one_launch(capsys):
    at = gpu_roofline.machine_named("H100")
    alone = [Layer(1, 2048, 2048, 512), Layer(1, 2048, 256, 112), Layer(1, 2048, 256, 112)]
    grouped = gpu_roofline.group(alone, at)
    assert grouped.launches == 1 and len(grouped.stages) == 1 + len(alone)
    one_by_one = sum(predict(layer)["one_launch"].seconds() for layer in alone)
    assert 2 < one_by_one / grouped.seconds() < 3, "two launches and waits saved"
    first = alone[0]
    assert gpu_roofline.group([first], at).seconds() == predict(first)["one_launch"].seconds()
    gpu_prediction.main(["--groups"])
    shown = capsys.readouterr().out
    assert shown.startswith("PREDICTION, H100, graph") and "| q, k, v | 1 | 8.5 | 20.9 (2." in shown
