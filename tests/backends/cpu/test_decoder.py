"""The plan of a decoder and its steps: what the ops refuse, and parts against the whole."""

from __future__ import annotations

import pytest
import torch
from helpers import zoo
from helpers.optimising import packs

from hylora_kernels import optimize_for_inference
from hylora_kernels.backends.cpu.decoder import DecoderPlan, _Writer
from hylora_kernels.backends.cpu.library import op
from hylora_kernels.inference.recognise import recognise

pytestmark = packs
CAPACITY = 8


@pytest.fixture(scope="module")
def plan():
    model = optimize_for_inference(zoo.zoo_model("qwen3"))
    return DecoderPlan(recognise(model, CAPACITY).form, torch.float32)


def arguments(plan, **changes):
    """Of a step of two sequences, the second with one slot of padding."""
    generator = torch.Generator().manual_seed(0)
    given = {
        "x": torch.randn(2, plan.form.width, generator=generator),
        "cache": torch.randn(plan.cached * 3 * CAPACITY, generator=generator),
        "sequences": 3,
        "slot": 4,
        "positions": torch.tensor([4, 3]),
        "first_keys": torch.tensor([0, 1]),
    }
    return {**given, **changes}


def test_parts_one_after_another_are_the_whole(plan):
    whole = arguments(plan)
    logits, likeliest = plan.run(**whole)
    parts = arguments(plan)
    blocks = len(plan.form.blocks)
    for index in range(blocks):
        parts["x"], nothing = plan.run(**parts, parts=(index, index + 1))
        assert nothing.numel() == 0
    again, _ = plan.run(**parts, parts=(blocks, blocks + 1))
    assert torch.equal(logits, again) and torch.equal(likeliest, logits.argmax(-1))
    assert torch.equal(whole["cache"], parts["cache"])


def test_a_step_of_tokens_is_one_of_their_rows(plan):
    """Positions follow from the slots of padding."""
    words, tokens = plan.form.embedding, torch.tensor([5, 2])
    rows = words[tokens] if isinstance(words, torch.Tensor) else words.packed.rows(tokens)
    given, wanted = arguments(plan, x=tokens, positions=None), arguments(plan, x=rows)
    for ours, theirs in zip(plan.run(**given), plan.run(**wanted), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(given["cache"], wanted["cache"])


def test_a_step_writes_its_slot_of_its_sequences_alone(plan):
    given = arguments(plan)
    before = given["cache"].clone()
    plan.run(**given)
    changed, at = before != given["cache"], 0
    for block in plan.form.blocks:
        for heads in (block.k, block.v):
            shape = (3, block.k.count, CAPACITY, heads.size)
            size = torch.Size(shape).numel()
            here = changed[at : at + size].view(shape)
            assert here[:2, :, 4].all()
            here[:2, :, 4] = False
            at += size
    assert not changed.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 31)}, r"x must be \[rows, 32\] of the plan's dtype"),
        ({"x": torch.zeros(2, 32).double()}, "x must be bfloat16, float16 or float32|dtype"),
        ({"x": torch.tensor([1, 128])}, r"tokens must be in \[0, 128\), got 128"),
        ({"x": torch.tensor([1.0, 2.0])}, "tokens must be 2 contiguous numbers of int64"),
        ({"x": torch.zeros(4, 32)}, "x must have 1 to 3 rows, the cache's sequences, got 4"),
        ({"cache": torch.zeros(7)}, "cache must be contiguous, with"),
        ({"slot": CAPACITY}, r"slot must be in \[0, 8\), got 8"),
        ({"positions": torch.tensor([4, 99])}, r"positions must be in \[0, 8\), got 99"),
        ({"positions": torch.tensor([4])}, "positions must be 2 contiguous numbers of int64"),
        ({"first_keys": torch.tensor([0, 5])}, r"first_keys must be in \[0, 5\), got 5"),
        ({"parts": (2, 2)}, r"part0 and part1 must be a range in 0\.\.3, got 2, 2"),
        ({"parts": (0, 4)}, r"part0 and part1 must be a range in 0\.\.3, got 0, 4"),
    ],
)
def test_steps_that_are_refused(plan, changes, message):
    with pytest.raises(RuntimeError, match=message):
        plan.run(**arguments(plan, **changes))


def test_plans_that_are_refused(plan):
    writer = _Writer()
    writer.decoder(plan.form)
    like, numbers = torch.zeros(0), torch.tensor(writer.numbers)
    for wrong, message in (
        (numbers[:-1], "numbers must describe the whole plan"),
        (torch.cat((numbers, numbers[:1])), "numbers must describe the plan and nothing else"),
        (numbers.int(), "numbers must be contiguous int64"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op("decoder_plan")(like, writer.tensors, wrong)
    with pytest.raises(RuntimeError, match="a layer must be of the plan's dtype"):
        op("decoder_plan")(like.bfloat16(), writer.tensors, numbers)
    with pytest.raises(RuntimeError, match="plan must be cpu_decoder_plan's result"):
        op("decode")(numbers, *arguments(plan).values(), 0, 3)
