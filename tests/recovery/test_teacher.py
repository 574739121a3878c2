"""The teacher: its stored states, its end before training, and runs that are killed on the way."""

from __future__ import annotations

import itertools
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from helpers import architectures, tiny
from helpers.finetuning import BLOCKS, assert_same, model_of, state, train

from hylora_kernels.model.loss import head_inputs
from hylora_kernels.recovery import finetune as finetuning
from hylora_kernels.recovery import teacher as teachers
from hylora_kernels.recovery.blocks import training_blocks, training_mix
from hylora_kernels.recovery.options import FinetuneOptions
from hylora_kernels.recovery.run import Run, taken_rows
from hylora_kernels.recovery.teacher import run_teacher
from hylora_kernels.text.mix import mixed_blocks

pytestmark = pytest.mark.usefixtures("plain_plot", "own_cache")
CPU = torch.device("cpu")


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HYLORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def forwards(monkeypatch):
    """The blocks that a teacher has run on."""
    ran = []

    def counted(model, ids):
        if ids.shape[1] == BLOCKS.shape[1]:
            ran.append(ids)
        return head_inputs(model, ids)

    monkeypatch.setattr(teachers, "head_inputs", counted)
    return ran


def granite(dtype=torch.float32):
    """Divides its logits, so that they are stored."""
    model = architectures.tiny("granite").to(dtype)
    model.logits_scaling = model.config.logits_scaling = 3.0
    return model


@torch.no_grad()
def divergence(model, teacher, ids=BLOCKS):
    """KL(teacher || model) in nats a token."""
    ours, theirs = (m(input_ids=ids).logits.float().log_softmax(-1) for m in (model, teacher))
    return float(F.kl_div(ours, theirs, log_target=True, reduction="sum")) / ids.numel()


def state_files(tmp_path):
    return sorted((tmp_path / "cache" / "teacher").glob("*/*.safetensors"))


# ------------------------------------------------------------------------------ what is stored


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [tiny.llama, granite])
def test_stored_states_give_the_bits_of_a_live_teacher(make, dtype, tmp_path):
    dense, student = make(dtype), model_of()
    stored = run_teacher(dense, student, BLOCKS, CPU, progress=False)
    for block in BLOCKS:
        with torch.no_grad():
            live = dense(input_ids=block[None], use_cache=False).logits[0, :-1]
        assert torch.equal(stored.logits(block[None])(slice(None)), live)
    width = 32 if make is tiny.llama else live.shape[1]
    assert stored.nbytes == 8 * 15 * width * dtype.itemsize
    files = sum(file.stat().st_size for file in state_files(tmp_path))
    assert stored.nbytes < files < stored.nbytes + 8 * 500


def test_rows_of_several_blocks(forwards):
    dense = tiny.llama()
    stored = run_teacher(dense, model_of(), BLOCKS, CPU, progress=False)
    with torch.no_grad():
        live = dense(input_ids=BLOCKS[2:5]).logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(stored.logits(BLOCKS[2:5])(slice(7, 40)), live[7:40])
    run_teacher(dense, model_of(), BLOCKS.flip(0), CPU, progress=False)
    assert len(forwards) == 8, "the states of a block are made once, in any order of blocks"


def test_the_head_is_the_students_own_if_it_is_the_same():
    student, dense = model_of(), tiny.llama()
    assert run_teacher(dense, student, BLOCKS[:1], CPU, False).head is student.lm_head
    dense.lm_head.weight.data[3, 4] += 1e-3
    assert run_teacher(dense, student, BLOCKS[:1], CPU, False).head is dense.lm_head


def test_a_head_on_another_device_is_copied():
    """The teacher stays where it is, since it may be the caller's; meta stands for a GPU."""
    dense, meta = tiny.llama(seed=1), torch.device("meta")
    stored = run_teacher(dense, model_of(), BLOCKS[:1], meta, progress=False)
    assert stored.head.weight.device == meta and dense.lm_head.weight.device == CPU


@pytest.mark.parametrize("change", ["weight", "config", "dtype"])
def test_another_teacher_has_other_states(change):
    keys = set()
    for dense in (tiny.llama(), tiny.llama()):
        if keys and change == "weight":
            dense.model.norm.weight.data[5] += 1e-3
        elif keys and change == "config":
            dense.config.rms_norm_eps *= 2
        elif keys:
            dense = dense.bfloat16()
        keys.add(run_teacher(dense, model_of(), BLOCKS[:1], CPU, False).key)
    assert len(keys) == 2


def test_a_flipped_bit_is_noticed_and_made_again(tmp_path, forwards, capsys):
    dense = tiny.llama()
    stored = run_teacher(dense, model_of(), BLOCKS, CPU, progress=False)
    before = stored.logits(BLOCKS)(slice(None))
    file = state_files(tmp_path)[3]
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    with pytest.raises(OSError, match=r"safetensors was deleted or damaged while it was needed"):
        stored.logits(BLOCKS)
    again = run_teacher(dense, model_of(), BLOCKS, CPU, progress=False)
    assert len(forwards) == 9 and str(file) in capsys.readouterr().err
    assert torch.equal(again.logits(BLOCKS)(slice(None)), before)


def test_a_full_disk_is_said_before_the_teacher_runs(monkeypatch, forwards):
    def full(folder, needed, what):
        assert needed == 8 * 15 * 32 * 4 and what == "the states of teacher LlamaForCausalLM"
        raise OSError(28, what)

    monkeypatch.setattr(teachers, "require_disk", full)
    with pytest.raises(OSError, match="the states of teacher"):
        train(model_of(), BLOCKS, steps=8, objective="keep", teacher=tiny.llama())
    assert not forwards


def test_a_teacher_that_is_not_finite(tmp_path):
    dense = tiny.llama()
    dense.model.norm.weight.data[0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"teacher .*hidden states are not finite"):
        train(model_of(), BLOCKS, steps=2, objective="keep", teacher=dense)
    assert not state_files(tmp_path)


# ------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("make", [tiny.llama, granite])
def test_keep_lowers_the_divergence_from_the_dense_model(make):
    dense = make()
    names = ("q_proj", "up_proj", "down_proj")
    student = tiny.adapted(make(), rank=6, names=names)
    before = divergence(student, dense)
    report = train(student, BLOCKS, steps=30, lr=1e-2, objective="keep", teacher=dense)
    assert divergence(student, dense) < 0.7 * before
    assert report.options["distill"] == 1.0 and report.options["objective"] == "keep"
    first = report.first_loss * 15 / 16  # of the first block; a block has 15 predictions
    assert 0.3 * before < first < 3 * before and report.last_loss < report.first_loss
    assert report.teacher == type(dense).__name__ and report.teacher_bytes > 0


def test_an_adapter_in_the_head_learns_from_the_dense_head():
    dense = tiny.llama()
    student = tiny.adapted(tiny.llama(), rank=6, names=(*tiny.LAYERS, "lm_head"))
    before = divergence(student, dense)
    train(student, BLOCKS, steps=20, lr=1e-2, objective="keep", teacher=dense)
    assert divergence(student, dense) < 0.7 * before


def saved_teacher(tmp_path, seed=0):
    folder = tmp_path / f"dense-{seed}"
    tiny.llama(seed=seed).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("by", ["name", "function"])
@pytest.mark.parametrize("seed", [0, 1], ids=["same head", "other head"])
def test_a_teacher_by_name_is_gone_when_training_begins(by, seed, tmp_path, monkeypatch):
    folder, loaded, alive = saved_teacher(tmp_path, seed), [], []
    load = teachers.load_model

    def watched(*arguments):
        found = load(*arguments)
        loaded.append(weakref.ref(found[0]))
        return found

    monkeypatch.setattr(teachers, "load_model", watched)
    model = model_of(torch.bfloat16)
    given = folder if by == "name" else lambda: watched(folder, "cpu", torch.bfloat16)[0]
    report = train(
        model, BLOCKS, steps=2, objective="keep", teacher=given,
        on_step=lambda step: alive.append(loaded[0]()),
    )  # fmt: skip
    assert len(loaded) == 1 and alive == [None, None, None]
    assert report.teacher == str(folder) and report.teacher_bytes == 2 * 15 * 32 * 2


@pytest.mark.parametrize("by", ["module", "function"])
def test_on_a_gpu_the_student_waits_while_the_teacher_is_loaded(by, monkeypatch):
    """The moves alone are seen here: the device is named, and nothing is on it."""
    student, dense, moves = model_of(), tiny.llama(), []

    def load():
        moves.append("load")
        return dense

    def device(model):
        return torch.device("cuda") if model is student else CPU

    monkeypatch.setattr(teachers, "input_device", device)
    monkeypatch.setattr(finetuning, "input_device", device)
    monkeypatch.setattr(student, "to", lambda device: moves.append(str(device)))
    given = {"module": dense, "function": load}[by]
    options = FinetuneOptions(BLOCKS, objective="keep", distill=0.0, teacher=given, progress=False)
    _, _, stored = finetuning._prepare(student, options, Accelerator(cpu=True))
    assert stored is None, "without a share of KL the teacher only writes text"
    assert moves == (["cpu", "load", "cuda"] if by == "function" else [])


# ------------------------------------------------------------------------------ killed and resumed


class Killed(Exception):
    pass


@pytest.mark.parametrize("phase", ["teacher", "training"])
def test_a_killed_run_ends_with_the_same_bits(phase, tmp_path, monkeypatch, forwards):
    folder = saved_teacher(tmp_path)
    options = {"steps": 10, "lr": 1e-2, "merge": False, "objective": "keep", "teacher": folder}
    whole, resumed = model_of(dropout=0.2), model_of(dropout=0.2)
    monkeypatch.setenv("HYLORA_CACHE", str(tmp_path / "other"))
    expected = train(whole, BLOCKS, **options, output_dir=tmp_path / "whole")
    monkeypatch.setenv("HYLORA_CACHE", str(tmp_path / "cache"))
    assert len(forwards) == 8

    options |= {"save_every": 3, "output_dir": tmp_path / "killed"}
    owner, name = {"teacher": (teachers, "head_inputs"), "training": (Run, "_gradients")}[phase]
    kept, calls = getattr(owner, name), itertools.count()

    def dying(*arguments):
        if next(calls) == 5:
            raise Killed
        return kept(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dying)
        with pytest.raises(Killed):
            train(model_of(dropout=0.2), BLOCKS, **options)
    done = len(state_files(tmp_path))
    assert done == {"teacher": 4, "training": 8}[phase]  # The first call is on two tokens.
    forwards.clear()
    report = train(resumed, BLOCKS, **options)
    assert len(forwards) == 8 - done
    assert_same(state(resumed), state(whole))
    assert report.losses == expected.losses and report.options == expected.options


def test_a_checkpoint_of_another_teacher_is_refused(tmp_path):
    options = {"steps": 3, "objective": "keep", "output_dir": tmp_path / "out"}
    train(model_of(), BLOCKS, **options, teacher=tiny.llama())
    with pytest.raises(ValueError, match=r"can't be resumed: teacher was .* there and is "):
        train(model_of(), BLOCKS, **options, teacher=tiny.llama(seed=1))


# --------------------------------------------------------------------------------- which blocks


def test_processes_share_the_blocks_and_run_the_teacher_on_their_own():
    options = FinetuneOptions(steps=3, batch=2, accumulate=2)
    both = [
        taken_rows(options, 24, SimpleNamespace(num_processes=2, process_index=i)) for i in (0, 1)
    ]
    assert both[0].tolist() == list(range(0, 24, 2)) and both[1].tolist() == list(range(1, 24, 2))
    alone = taken_rows(options, 5, SimpleNamespace(num_processes=1, process_index=0))
    assert alone.tolist() == [place % 5 for place in range(12)]


def test_the_teacher_runs_on_the_blocks_that_are_taken_alone(forwards):
    train(model_of(), BLOCKS, steps=3, objective="keep", teacher=tiny.llama())
    assert len(forwards) == 3


@pytest.mark.parametrize(
    ("data", "objective", "needed", "found"),
    [
        ("brown", "adapt", 60, [("brown", 60)]),
        ("brown", "keep", 60, [("brown", 34), ("self", 17), ("stdlib", 9)]),
        ("self", "keep", 60, [("self", 60)]),
        ([("a", 30), ("self", 20)], "keep", 60, [("a", 30), ("self", 20)]),
        ([("a", 128), ("self", 64), ("b", 32)], "keep", 7, [("a", 4), ("self", 2), ("b", 1)]),
        ([("a", None), ("self", None)], "adapt", 60, [("a", 40), ("self", 20)]),
    ],
)  # fmt: skip
def test_the_mix_is_what_the_steps_take(data, objective, needed, found):
    assert training_mix(data, objective, needed) == found


TEXT = " ".join(f"the {word} of number {i}." for i in range(400) for word in ("rose", "nose"))


@pytest.fixture
def spoken():
    """(a dense model, a compressed one, their tokenizer)."""
    tokenizer = tiny.tokenizer(TEXT)
    dense = tiny.llama(vocab_size=len(tokenizer))
    return dense, tiny.adapted(tiny.llama(vocab_size=len(tokenizer)), rank=6), tokenizer


@pytest.mark.parametrize("objective", ["adapt", "keep"])
def test_blocks_are_none_of_calibrations(objective, spoken):
    dense, student, tokenizer = spoken
    calibration, _ = mixed_blocks([([TEXT], 20), ("self", 6)], dense, tokenizer, 16, progress=False)
    options = FinetuneOptions(
        [TEXT], tokenizer, steps=12, length=16, objective=objective,
        teacher=dense if objective == "keep" else None,
    )  # fmt: skip
    blocks, parts = training_blocks(student, dense, options, 1, False)
    assert len(blocks) == 12 and sum(part.blocks for part in parts) == 12
    seen = {tuple(row) for row in calibration.tolist()}
    assert not seen & {tuple(row) for row in blocks.tolist()}


def test_keep_trains_on_the_mix_that_calibration_reads(spoken):
    dense, student, tokenizer = spoken
    before = divergence(student, dense)
    report = train(
        student, [TEXT], tokenizer, steps=12, length=16, lr=1e-2, objective="keep", teacher=dense
    )
    found = [(part.name, part.blocks) for part in report.sources]
    assert found == [("list", 7), ("self", 3), ("stdlib, train", 2)]
    assert report.text == "list; self; stdlib, train" and divergence(student, dense) < before


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "learn"}, r"objective must be one of \('adapt', 'keep'\), got 'learn'"),
        (
            {"objective": "keep"},
            "objective 'keep' needs teacher=MODEL, the dense .*, got none",
        ),
        ({"data": "self"}, "data 'self' is what the teacher writes, got no teacher"),
        ({"objective": "keep", "teacher": "no/such/folder"}, "'no/such/folder' does not exist"),
        ({"objective": "keep", "teacher": lambda: tiny.llama(vocab_size=50)}, "96 tokens, not 50"),
    ],
)
def test_refusals(options, message):
    model = model_of()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        train(model, **({"data": BLOCKS, "steps": 4} | options))
    assert_same(state(model), before)


def test_a_function_that_loads_no_model():
    with pytest.raises(TypeError, match="teacher must be a transformers causal language model"):
        train(model_of(), BLOCKS, steps=1, objective="keep", teacher=lambda: 3)
