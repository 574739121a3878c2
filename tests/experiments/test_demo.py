"""The demo: all its stages on a tiny random model, and its page of a real run's figures."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.demo_report import demo_report
from safetensors import safe_open

from hylora_kernels.evaluation.perplexity import perplexity
from hylora_kernels.experiments.demo import page as demo_page
from hylora_kernels.experiments.demo import pictures
from hylora_kernels.experiments.demo import run as demonstration
from hylora_kernels.experiments.demo.recipes import (
    RECIPES,
    HeldOutCurve,
    Setup,
)
from hylora_kernels.experiments.demo.stages import (
    HEADINGS,
    KINDS,
    MAIN_COLUMNS,
    OTHER_COLUMNS,
    Settings,
)
from hylora_kernels.model import load as models

TEXT = [f"The {a} {b} went to the {c} and came back, number {i}.\n" for i, (a, b, c) in enumerate(
    (a, b, c) for a in ("old", "young", "red") for b in ("man", "dog", "bird", "king")
    for c in ("river", "hill", "town", "sea", "wood")
)] * 12  # fmt: skip
NAMES = [
    "dense",
    "dense, optimised",
    "dense int8",
    "4 bits, to nearest",
    "HyLoRA bits",
    "4 bits, GPTQ",
    "plain SVD",
    "whitened SVD",
    "two-sided SVD",
    "two-sided SVD",
    "two-sided SVD, pivoted",
    "two-sided SVD, pivoted",
    "HyLoRA",
    "HyLoRA",
    "HyLoRA, one text",
    "HyLoRA, then int8",
    "dense + LoRA (control)",
    "dense + LoRA, then bits",
]
KEYS = {
    "name", "keep", "removed", "params_linear", "params_total", "bytes_total", "trainable", "ppl",
    "breadth", "spent", "prefill_tok_s", "decode_tok_s",
}  # fmt: skip


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "tiny"
    sizes = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 192}
    model = tiny.llama(vocab_size=tiny.WORDS + 256, tie_word_embeddings=True, **sizes)
    model.to(torch.bfloat16).save_pretrained(folder)
    tiny.tokenizer("".join(TEXT)).save_pretrained(folder)
    shape = {"samples": 4, "length": 32, "blocks": 3, "new_tokens": 4, "steps": 3, "deep_steps": 2}
    shape |= {"recovery_blocks": 2, "dtype": "bfloat16", "target_mb": 0.05}
    ranks = {"lora_rank": 4, "control_rank": 2, "rank_multiple": 4}
    measured = {"prose": TEXT[300:], "backwards": TEXT[::-1], "self": "self"}
    texts = {"train": TEXT[:300], "texts": measured}
    return {"model": str(folder), "prompt": "The old", "progress": False, **shape, **ranks, **texts}


@pytest.fixture(scope="module")
def made(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return demonstration.demo(folder, **settings), folder


def test_report_has_the_keys_and_stages_that_were_promised(made):
    report, folder = made
    written = json.loads((folder / "report.json").read_text())
    assert written == report.to_dict()
    assert list(written) == ["stages", "model", "data", "environment", "seconds"]
    assert [stage["name"] for stage in written["stages"]] == NAMES
    assert all(set(stage) >= KEYS for stage in written["stages"])
    assert [s["target"] for s in written["stages"]] == [
        *(1, 1, 1, 1, 1, 1, 0.8, 0.8),
        *[0.8, 0.6] * 3,
        *(0.8, 0.8, 1, 1),
    ]
    assert written["seconds"] == sum(stage["seconds"] for stage in written["stages"])


def test_what_is_measured_where(made):
    stages = {stage.label: stage for stage in made[0].stages}
    both = {f"{n} {k}" for n in ("two-sided SVD, pivoted", "HyLoRA") for k in (0.8, 0.6)}
    both |= {"dense", "dense + LoRA (control)", "HyLoRA, one text 0.8"}
    both |= {"HyLoRA bits", "HyLoRA, then int8 0.8", "dense + LoRA, then bits"}
    assert {label for label, s in stages.items() if s.breadth is not None} == both
    untimed = {label for label, s in stages.items() if s.decode_tok_s is None}
    assert untimed == {
        "4 bits, to nearest", "4 bits, GPTQ", "HyLoRA, one text 0.8", "dense + LoRA, then bits"
    }  # fmt: skip
    continued = {label for label, s in stages.items() if s.sample is not None}
    assert continued == {"dense", "HyLoRA bits", "plain SVD 0.8", "HyLoRA 0.8", "HyLoRA 0.6"}
    steps = {label: len(s.losses) for label, s in stages.items() if s.losses}
    assert steps == {
        "HyLoRA 0.8": 3, "HyLoRA 0.6": 2, "HyLoRA, one text 0.8": 3, "dense + LoRA (control)": 3
    }  # fmt: skip
    assert all((s.trainable > 0) == bool(s.losses) for s in stages.values())
    curves = {label: [step for step, _ in s.held_out] for label, s in stages.items() if s.held_out}
    assert curves == {
        "HyLoRA 0.8": [0, 1, 2, 3], "HyLoRA 0.6": [0, 1, 2],
        "HyLoRA, one text 0.8": [0, 1, 2, 3], "dense + LoRA (control)": [0, 1, 2, 3],
    }  # fmt: skip
    compressed = {label for label, s in stages.items() if s.ranks}
    cut = {label for label, s in stages.items() if s.target < 1}
    assert compressed == cut - {"HyLoRA, then int8 0.8"}
    assert all(0 < r["rank"] <= r["full_rank"] for s in stages.values() for r in s.ranks)
    # One pass over the mix serves all stages that read it.
    for label in ("4 bits, GPTQ", "two-sided SVD 0.8", "HyLoRA 0.6"):
        assert not stages[label].spent["calibration"]
    assert stages["HyLoRA bits"].spent["calibration"] > 0
    assert stages["dense, optimised"].ppl == pytest.approx(stages["dense"].ppl, rel=0.02)
    assert not stages["dense"].optimized


def test_the_ratios_are_to_the_dense_stage(made):
    dense, *others = made[0].stages
    names = ["prose", "backwards", "self"]
    assert [text.ratio for text in dense.breadth.texts] == [1, 1, 1]
    for stage in others:
        if stage.breadth is None:
            continue
        assert [text.name for text in stage.breadth.texts] == names
        assert stage.breadth.texts[0].ppl == stage.ppl
        for text, base in zip(stage.breadth.texts, dense.breadth.texts, strict=True):
            assert text.dense_ppl == base.ppl and text.ratio == pytest.approx(text.ppl / base.ppl)
    headings, rows = made[0].breadth_table()
    assert headings == ["stage", *names, "mean ratio", "worst"]
    assert len(rows) == 10 and all(len(row) == len(headings) for row in rows)


def test_the_mix_holds_three_sources_and_one_row_shows_a_single_one(made, settings, tmp_path):
    """Each reads as many blocks."""
    parts = made[0].data["calibration"]
    assert [part.name.split(",")[0] for part in parts] == ["list", "self", "stdlib"]
    assert [part.blocks for part in parts] == [4, 2, 1]
    given = {name: value for name, value in settings.items() if name != "progress"}
    setup = Setup(Settings(**given), tmp_path, False)
    assert len(setup.alone[0]) == len(setup.mix[0]) == 7
    assert [part.name.split(",")[0] for part in setup.alone[1]] == ["list"]


def test_the_seconds_are_told_by_kind_and_add_up(made):
    report = made[0]
    for stage in report.stages:
        assert set(stage.spent) <= set(KINDS) and min(stage.spent.values()) >= 0
        assert sum(stage.spent.values()) == pytest.approx(stage.seconds)
    spent = {stage.label: stage.spent for stage in report.stages}
    assert spent["dense"]["self text"] > 0 and spent["dense"]["evaluation"] > 0
    assert spent["whitened SVD 0.8"]["calibration"] > 0
    assert spent["HyLoRA 0.8"]["recovery"] > 0 and "recovery" not in spent["dense"]
    # Its factors are those of the pair.
    assert spent["two-sided SVD 0.6"].get("calibration", 0) == 0
    headings, rows = report.seconds_table()
    assert headings == ["stage", *KINDS, "all"] and rows[-1][0] == "all"
    assert rows[-1][-1] == f"{report.seconds:.0f}"


def test_keep_is_what_the_counts_say_and_within_its_budget(made):
    dense, *others = made[0].stages
    for stage in (dense, *others):
        assert stage.keep == stage.params_linear / dense.params_linear
        assert stage.keep + stage.removed == pytest.approx(1)
        assert stage.keep <= stage.target
        rest = dense.params_total - dense.params_linear
        assert stage.params_total == stage.params_linear + rest


@pytest.mark.parametrize("keep", ["0.8", "0.6"])
def test_the_saved_models_have_as_many_parameters_as_the_report_says(made, keep):
    report, folder = made
    (stage,) = (s for s in report.stages if s.label == f"HyLoRA {keep}")
    counts, total_bytes = {}, 0
    for file in (folder / f"hylora-{keep}").glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                part = tensors.get_tensor(name)
                total_bytes += part.nbytes
                if part.is_floating_point():
                    counts[name] = part.numel()
    linears = sum(count for name, count in counts.items() if "_proj" in name)
    assert linears == stage.params_linear
    assert sum(counts.values()) == stage.params_total
    # in memory there are the rotary frequencies too, which are in no file
    assert 0 <= stage.bytes_total - total_bytes < 1000
    model, _ = models.load_model(folder / f"hylora-{keep}")
    assert sum(p.numel() for p in model.parameters()) == stage.params_total


def test_the_page_is_whole_and_names_no_address(made):
    report, folder = made
    page = (folder / "report.html").read_text()
    assert not re.search(r"https?:|//\w|<link|<script|src=", page)
    for text in (*HEADINGS, *(s.label for s in report.stages), "<svg", "The old", "removed"):
        assert text in page
    assert page.count("<svg") == page.count('role="img"><title>') == 6
    assert (folder / "stages.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in folder.iterdir()} == {
        "report.json", "report.html", "stages.png", "stages.jsonl", "training",
        "hylora-0.8", "hylora-0.6",
    }  # fmt: skip


def test_the_page_has_few_columns_and_says_first_what_came_of_it():
    assert len(MAIN_COLUMNS) <= 8 and {*MAIN_COLUMNS, *OTHER_COLUMNS} == set(HEADINGS)
    report = demo_report()
    page = demo_page.render(report, Path("runs/demo"))
    order = ["20\u202f% fewer", "How to read this", "<table>", "<svg", "What to try next"]
    places = [page.index(text) for text in order]
    assert places == sorted(places)
    assert "hylora generate runs/demo/hylora-0.8" in page
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    for label in ("HyLoRA 0.8", "dense + LoRA (control)"):
        assert f'<th scope="row">{label}</th>' in page


def test_the_summary_names_gains_losses_and_what_they_are_beside():
    assert demo_page.summary(demo_report()).replace("\u202f", " ") == (
        "At keep 0.8 the model has 20 % fewer parameters in its linears and takes 16 % less "
        "memory; perplexity rises from 44.81 to 46.62, decoding is 2.3 × as fast as the dense "
        "model in transformers and 1.2 × as fast as the dense model laid out the same way, and "
        "over 5 texts perplexity is 1.12 times the dense model's in the mean and 1.15 times on "
        "moby-dick."
    )
    control = demo_page.control(demo_report())
    assert "from 44.81 to 39.82, and over all texts to 0.97 times the dense model's in" in control


def test_the_page_says_why_a_mix_is_read():
    report = demo_report()
    assert demo_page.one_text(report) == (
        "The calibration text decides what is kept: on brown alone, in as many blocks, perplexity "
        "would be 1.64 times the dense model's in the mean and 3.20 times on code; on the mix "
        "(brown, train, self, stdlib, train) it is 1.12 times the dense model's in the mean and "
        "1.15 times on moby-dick."
    )
    page = demo_page.render(report, Path("runs/demo"))
    for text in (demo_page.one_text(report), "21.44 (3.20)", "Where the seconds go", "self text"):
        assert text.replace("'", "&#39;") in page


def test_what_is_predicted_stands_beside_what_is_measured():
    words = demo_page.notes(demo_report())["Prediction"]
    assert "pivoted 0.8: 0.185 predicted, 0.172 measured;" in words
    assert "HyLoRA bits: 0.070 predicted, 0.078 measured;" in words and "HyLoRA 0.8" not in words


def test_the_summary_does_not_call_a_loss_a_gain():
    report = demo_report()
    place = [stage.label for stage in report.stages].index("HyLoRA 0.8")
    worse = dataclasses.replace(
        report.stages[place], bytes_total=280_000_000, decode_tok_s=5.5, ppl=40.0, optimized=False
    )
    report.stages[place] = worse
    words = demo_page.summary(report).replace("\u202f", " ")
    assert "takes 4 % more memory" in words and "falls from 44.81 to 40.00" in words
    assert "0.5 × as fast as the dense model, and" in words


def test_the_notes_and_the_table_say_kept_and_removed(made, capsys):
    from hylora_kernels.support.console import show

    notes = " ".join(demo_page.notes(made[0]).values())
    for text in (
        "93 tokens of prose",
        "3 blocks of 32",
        "keep and removed",
        "as many steps",
        "bfloat16",
    ):
        assert text in notes
    assert "Q4_1" not in notes  # that is the demo's own model
    show(made[0].render())
    shown = capsys.readouterr().out
    assert "keep" in shown and "removed" in shown and "HyLoRA 0.8" in shown


def test_a_method_has_one_colour_and_one_marker():
    assert set(pictures.STYLES) == {recipe.name for recipe in RECIPES}
    styles = [style for name, style in pictures.STYLES.items() if name != "dense, optimised"]
    assert len({colour for colour, _ in styles}) == len({marker for _, marker in styles}) == 8
    assert pictures.STYLES["HyLoRA, one text"] == pictures.STYLES["HyLoRA"]


def test_a_recovery_curve_survives_an_interruption(tmp_path):
    model, blocks = tiny.llama(), tiny.tokens(2, 16)
    first = HeldOutCurve(model, blocks, 8, tmp_path)
    for step in range(5):
        first.on_step(step)
    again = HeldOutCurve(model, blocks, 8, tmp_path)
    for step in range(3, 9):
        again.on_step(step)
    loss = perplexity(model, blocks, progress=False).nll
    assert again.points() == [[step, loss] for step in (0, 2, 4, 6, 8)]


def test_a_second_run_measures_nothing_and_a_cut_off_one_only_what_is_missing(
    made, settings, monkeypatch
):
    report, folder = made
    measured = []
    measure = demonstration.measure

    def watched(setup, recipe):
        measured.append(recipe.label)
        return measure(setup, recipe)

    monkeypatch.setattr(demonstration, "measure", watched)
    monkeypatch.setattr(demo_page, "write", lambda report, folder: None)
    assert demonstration.demo(folder, **settings).stages == report.stages
    assert measured == []
    file = folder / "stages.jsonl"
    lines = file.read_text().splitlines()
    assert len(lines) == len(RECIPES)
    file.write_text("\n".join([*lines[:7], *lines[8:-1], lines[-1][:50]]))
    again = demonstration.demo(folder, **settings).stages
    assert measured == ["whitened SVD 0.8", "dense + LoRA, then bits"]
    for old, new in zip(report.stages, again, strict=True):
        assert (old.ppl, old.losses, old.sample) == (new.ppl, new.losses, new.sample)
        assert (old.held_out, old.ranks) == (new.held_out, new.ranks)


def test_other_settings_use_nothing_of_an_earlier_run(made, settings, monkeypatch):
    _, folder = made
    before = (folder / "stages.jsonl").read_text()

    def stop(setup, recipe):
        raise KeyboardInterrupt(recipe.label)

    monkeypatch.setattr(demonstration, "measure", stop)
    with pytest.raises(KeyboardInterrupt, match=r"^dense$"):
        demonstration.demo(folder, **(settings | {"seed": 1}))
    (folder / "stages.jsonl").write_text(before)
