"""Several keeps of one calibration: each is put into the model on trial, and taken out again."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny
from helpers.compressing import SMALL, assert_same, logits
from helpers.mixtures import mixture

from hylora_kernels.compression.compress import Compression, compress
from hylora_kernels.compression.options import CompressOptions
from hylora_kernels.compression.ranks import DENSE

IDS = tiny.tokens(6, 12)


def run_of(model, folder) -> Compression:
    run = Compression(model, CompressOptions(1.0, IDS % 31, cache=folder, **SMALL))
    for statistics in run.calibrate():
        run.factorize(statistics)
    return run


@pytest.mark.parametrize("make", [tiny.llama, lambda: mixture("mixtral")])
def test_a_trial_is_what_compress_makes_and_leaves_the_model_as_it_was(make, tmp_path):
    model, dense = make(), make()
    ids = IDS % 31
    with run_of(model, tmp_path) as run:
        before = logits(model, ids)
        for keep in (0.9, 0.6, 0.9):
            ranks = run.allocate(keep)
            with run.trial(ranks, run.refit(ranks)) as tried:
                assert tried is model
                found = logits(model, ids)
            want, _ = compress(make(), keep, ids, cache=tmp_path, **SMALL)
            assert torch.equal(found, logits(want, ids))
            assert torch.equal(logits(model, ids), before)
        run.replace(ranks, run.refit(ranks))
    assert_same(model, want)
    assert not torch.equal(logits(model, ids), logits(dense, ids))


def test_a_trial_that_fails_leaves_the_model_as_it_was(tmp_path):
    model = tiny.llama()
    with run_of(model, tmp_path) as run:
        ranks = run.allocate(0.95)
        assert {choice.rank == DENSE for choice in ranks.values()} == {True, False}
        refitted = run.refit(ranks)
        with pytest.raises(KeyboardInterrupt), run.trial(ranks, refitted):
            raise KeyboardInterrupt
    assert_same(model, tiny.llama())
