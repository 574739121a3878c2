"""A budget of time: prices by the machine's rates, what they choose, and what the report says."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny
from helpers.compressing import compressed, parts
from helpers.mixtures import mixture

from hylora_kernels.compression import times as timing
from hylora_kernels.compression.options import CompressOptions, QuantizeOptions
from hylora_kernels.compression.quantize_model import quantize_model
from hylora_kernels.compression.ranks import Choice
from hylora_kernels.compression.times import Times
from hylora_kernels.compression.workload import Workload
from hylora_kernels.evaluation.rates import KINDS, Rate, Rates
from hylora_kernels.layers.experts import unstack
from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.layers.quantized import QuantizedLinear
from hylora_kernels.model.structure import discover

IDS = tiny.tokens(4, 16)
WIDE = {"hidden_size": 128, "intermediate_size": 192}
QUICK = {"calibration": IDS, "samples": 4, "measure": 0, "progress": False, "cache": False}
LATENCY = 1e-7


def seconds(form, bits, weights, rows):
    """A machine that reads a bit in 10 ps and multiplies in 100 ps, by codes in 110 ps."""
    slow = (1.0 if bits == 16 else 1.1) * (1.0 if form == "dense" else 1.2)
    return LATENCY + weights * (bits * 1e-11 + (rows - 1) * 1e-10 * slow)


@pytest.fixture(autouse=True)
def known_rates(monkeypatch):
    """Rates by the formula above; returns the arguments that they were asked by."""
    asked = []

    def fake(device, dtypes, rows, progress):
        asked.append((str(device), dtypes, sorted(rows)))
        rates = [
            Rate("float32", *kind, M, LATENCY, seconds(*kind, 1, M) - LATENCY, 0.0)
            for kind in KINDS
            for M in sorted({max(round(M), 1) for M in rows})
        ]
        return Rates("toy", rates, "1")

    monkeypatch.setattr(timing, "rates_of", fake)
    return asked


def wide(tied=True):
    return tiny.llama(**WIDE, tie_word_embeddings=tied)


def quantised(time, model=None, **options):
    return quantize_model(model or wide(), target_time=time, **QUICK | options)


def test_half_the_time_of_a_token(known_rates):
    model, report = quantised("decode:0.5", measure=4)
    found = report.timing
    assert known_rates == [("cpu", [torch.float32], [1])]
    assert 0.48 < found.share <= 0.5 and (found.rows, found.not_measured) == (1, "")
    dense = sum(seconds("dense", 16, m.weight.numel(), 1) for m in linears(wide()))
    assert found.dense_seconds == pytest.approx(dense, rel=1e-3)
    taken = sum(
        seconds("dense", r.bits, r.out_features * r.in_features, 1)
        for r in (*report.layers, *report.tables)
    )
    assert found.seconds == pytest.approx(taken, rel=1e-3)
    assert len({layer.bits for layer in report.layers}) > 1
    assert any(isinstance(layer, QuantizedLinear) for layer in parts(model).values())
    assert found.tok_s > 0 < found.dense_tok_s
    shown = str(report)
    assert f"time of a token in the matrices: {found.share:.2f} of the dense model's" in shown
    assert "tokens/s of the whole model" in shown and "would save the most for its time" in shown
    assert json.loads(report.to_json())["timing"]["tok_s"] == found.tok_s


def linears(model):
    return [m for m in model.modules() if isinstance(m, torch.nn.Linear)]


def test_a_larger_share_predicts_less_loss_and_the_picture_names_it(tmp_path):
    losses = []
    for share in (0.3, 0.6):
        _, report = quantised(f"decode:{share}")
        assert 0.9 * share < report.timing.share <= share and report.timing.tok_s is None
        losses.append(report.predicted_loss)
    assert losses[0] > 2 * losses[1] > 0
    report.plot(tmp_path / "one.svg")
    assert f"{report.timing.share:.2f} of the time" in (tmp_path / "one.svg").read_text("utf-8")


@pytest.mark.parametrize("bits", [None, "auto"])
def test_a_prompt_is_made_faster_by_rank_alone(bits, known_rates):
    """Codes cost more there, so that they are no candidates that win."""
    options = {"lora_rank": 0, "target_time": "prefill:40:0.7", "bits": bits}
    model, report = compressed(wide(), None, IDS, **options)
    assert known_rates[0][2] == [1, 40]
    assert 0.62 < report.timing.share <= 0.7 and "a prompt of 40" in report.timing.line()
    assert any(type(layer) is SVDLoRALinear for layer in parts(model).values())
    assert {layer.bits for layer in report.layers} == {16}
    assert report.options["refit"] is (bits is None) and report.options["keep"] is None
    assert all(layer.candidates for layer in report.layers)
    assert "would save the most for its time" in str(report)


def test_what_has_no_candidates_is_counted():
    def dense_seconds(tied=True, **options):
        return quantised("decode:0.7", wide(tied), **options)[1].timing.dense_seconds

    whole = dense_seconds()
    assert dense_seconds(exclude=["down_proj"]) == pytest.approx(whole, rel=1e-3)
    assert dense_seconds(tied=False) == pytest.approx(whole, rel=1e-3)  # Rows that are looked up.


def test_a_head_reads_one_row_and_an_expert_its_share(known_rates):
    model = mixture("mixtral")
    options = CompressOptions(target_time="prefill:24:0.5", progress=False)
    unstack(model)
    structure = discover(model)
    found = Times(model, structure.targets, options)
    config = model.config
    share = config.num_experts_per_tok / config.num_local_experts
    expert = next(t for t in structure.targets if t.routed)
    assert found.nanoseconds(expert, Choice()) == pytest.approx(
        1e9 * seconds("dense", 16, expert.matrix.numel(), 24 * share), abs=1
    )
    assert known_rates[0][2] == sorted({1, 24, 24 * share})
    head = model.get_output_embeddings()
    assert found.rest >= int(1e9 * seconds("dense", 16, head.weight.numel(), 1))
    vars(config)["num_experts_per_tok"] = None  # Its own setter takes a number alone.
    with pytest.raises(ValueError, match=r"experts can't be predicted: config\.num_experts"):
        Times(model, structure.targets, options)


def test_adapters_count_as_they_are_or_merged():
    model = wide()
    target = discover(model).targets[0]
    (N, K), prices = target.shape, {}
    for count in ("merged", "as_is"):
        options = CompressOptions(target_time="decode:0.5", form="pair", lora_rank=8, count=count)
        prices[count] = Times(model, [target], options).nanoseconds(target, Choice(24))
        assert prices[count] == pytest.approx(1e9 * seconds("pair", 16, 24 * (N + K), 1), abs=1)
    pivoted = CompressOptions(target_time="decode:0.5", lora_rank=8, count="as_is")
    price = Times(model, [target], pivoted).nanoseconds(target, Choice(24))
    numbers = 16 * (N + K - 16) + 8 * (N + K)
    assert price == pytest.approx(1e9 * seconds("pivoted", 16, numbers, 1), abs=1)


def test_a_speed_that_cannot_be_measured_is_said(monkeypatch):
    def fails(*given, **options):
        raise RuntimeError("no cache")

    monkeypatch.setattr(timing, "throughput", fails)
    _, report = quantised("decode:0.7", measure=1)
    assert "not measured: RuntimeError: no cache" in report.timing.line()


def test_what_is_measured_is_what_the_budget_is_about(monkeypatch):
    asked = []

    def throughput(model, prompt, new, optimize):
        asked.append((prompt, new, optimize))
        return SimpleNamespace(decode_tok_s=10.0 * len(asked), prefill_tok_s=7.0 * len(asked))

    monkeypatch.setattr(timing, "throughput", throughput)
    _, report = quantised("decode:0.7", measure=1)
    assert (report.timing.dense_tok_s, report.timing.tok_s) == (10.0, 20.0)
    assert "0.50 measured (10 to 20 tokens/s of the whole model)" in report.timing.line()
    _, report = compressed(wide(), None, IDS, target_time="prefill:40:0.7", lora_rank=0)
    assert report.timing.tok_s == 28.0
    assert asked == [(31, 32, True)] * 2 + [(40, 1, True)] * 2


# --------------------------------------------------------------------------------------- the words


@pytest.mark.parametrize(
    ("text", "rows", "share"), [("decode:0.5", 1, 0.5), ("prefill:512:.25", 512, 0.25)]
)
def test_a_workload_is_read(text, rows, share):
    assert Workload.parse(text) == (rows, share)
    assert CompressOptions(target_time=text).workload == (rows, share)


@pytest.mark.parametrize(
    "text",
    [
        "decode",
        "decode:1",
        "decode:0",
        "prefill:0.5",
        "prefill:0:0.5",
        "512:0.5",
        "decode:nan",
        0.5,
    ],
)
def test_other_words_are_refused(text):
    with pytest.raises(ValueError, match="target_time must be 'decode:SHARE' or 'prefill:ROWS:"):
        CompressOptions(target_time=text)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"keep": 0.8}, "only one budget may be given, got keep=0.8 and target_time=decode:0.5"),
        ({"bits": 8}, "bits=8 and target_time=decode:0.5: 'auto' goes with target_mb or"),
        ({"embedding_rank": 8}, "embedding_rank goes without target_time"),
        ({"ranks": {"mlp": 0.5}}, "target_time needs a policy for all linears"),
        ({"ranks": "energy"}, "ranks must be 'global' or 'uniform' with target_time"),
    ],
)
def test_options_are_checked(given, message):
    with pytest.raises(ValueError, match=message):
        CompressOptions(target_time="decode:0.5", **given)


def test_quantize_takes_one_budget():
    assert QuantizeOptions(target_time="decode:0.5").for_compress()["bits"] == "auto"
    with pytest.raises(ValueError, match="only one budget"):
        QuantizeOptions(target_time="decode:0.5", bits=4)


def test_a_budget_out_of_reach_names_what_is_possible():
    message = r"target_time=decode:0\.01 can't be met: the least possible is decode:0\.\d+, of"
    with pytest.raises(ValueError, match=message):
        quantised("decode:0.01")
    with pytest.raises(ValueError, match="can't be met"):  # Bits alone don't help a prompt.
        quantised("prefill:40:0.7")
    with pytest.raises(ValueError, match=r"target_time='prefill:4096:0\.7': .*4096"):
        quantised("prefill:4096:0.7")
