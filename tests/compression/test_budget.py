"""Budgets given as the whole model's parameters or megabytes in the place of keep."""

from __future__ import annotations

import re

import pytest
import torch
from helpers import tiny
from helpers.compressing import compressed

from hylora_kernels.compression.budget import MB
from hylora_kernels.compression.options import CompressOptions
from hylora_kernels.model.adapters import merge_adapters
from hylora_kernels.model.saving import save_pretrained

IDS = tiny.tokens(6, 12)


def small(model, **options):
    return compressed(model, None, IDS, **options)


def file_bytes(model, folder) -> int:
    save_pretrained(model, folder)
    return (folder / "model.safetensors").stat().st_size


def parameters(model) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("count", ["merged", "as_is"])
def test_target_params_counts_the_whole_model(count, tied):
    dense = tiny.llama(tie_word_embeddings=tied)
    target = round(0.8 * parameters(dense))
    model, report = small(dense, target_params=target, count=count, rank_multiple=1)
    if count == "merged":
        merge_adapters(model)
    assert 0.97 * target < parameters(model) <= target
    assert report.keep <= report.options["keep"] < 0.8  # The embeddings stay.
    assert report.options["target_params"] == target


@pytest.mark.parametrize("form", ["pivoted", "pair"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_target_mb_is_the_size_of_the_file(form, dtype, tmp_path):
    wide = {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": True}
    dense = file_bytes(tiny.llama(dtype, **wide), tmp_path / "dense")
    target = 0.8 * dense / MB
    options = {"target_mb": target, "form": form, "rank_multiple": 1, "refit": False}
    model, report = small(tiny.llama(dtype, **wide), **options)
    written = file_bytes(merge_adapters(model), tmp_path / "small") / MB
    assert 0.9 * target < written <= target
    tied = {id(p): p for p in model.state_dict(keep_vars=True).values()}
    assert report.model_bytes == sum(p.nbytes for p in tied.values())
    assert report.model_bytes < written * MB < report.model_dense_bytes < dense
    assert "file of weights: " in str(report) and "with adapters merged" in str(report)


@pytest.mark.parametrize("name", ["target_params", "target_mb"])
def test_a_target_too_small_names_the_smallest_which_is_met(name):
    options = {"refit": False, "method": "svd", "lora_rank": 0}
    with pytest.raises(ValueError, match=rf"{name}=0.01 can't be met: the smallest feas") as caught:
        small(tiny.llama(), **options, **{name: 0.01})
    least = float(re.search(r"is ([\d,.]+\d), of the", str(caught.value)).group(1).replace(",", ""))
    small(tiny.llama(), **options, **{name: least})
    with pytest.raises(ValueError, match="can't be met"):
        small(tiny.llama(), **options, **{name: least - (1 if name == "target_params" else 0.01)})


@pytest.mark.parametrize(("name", "target"), [("target_params", 21_664), ("target_mb", 0.1)])
def test_a_target_that_the_dense_model_meets_is_refused(name, target):
    assert parameters(tiny.llama()) == 21_664
    with pytest.raises(ValueError, match=rf"{name}=.* is at or above the dense model, which has"):
        small(tiny.llama(), **{name: target})


def test_keep_is_the_budget_where_nothing_else_is_given():
    assert CompressOptions().keep == 0.8
    assert CompressOptions(target_mb=80).keep is None


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"keep": 0.8, "target_mb": 80}, ValueError, "only one budget may be given, got keep=0.8 "
         "and target_mb=80"),
        ({"target_params": 1e8, "target_mb": 80}, ValueError, "got target_params=.* and target_mb"),
        ({"target_mb": 0}, ValueError, "target_mb must be a finite number above 0, got 0"),
        ({"target_params": float("nan")}, ValueError, "target_params must be a finite .*got nan"),
        ({"target_mb": "80MB"}, TypeError, "target_mb must be a number, got str"),
        ({"target_mb": True}, TypeError, "target_mb must be a number, got bool"),
        ({"target_mb": 80, "ranks": {"mlp": 0.5}}, ValueError, "target_mb needs a policy .*give k"),
    ],
)  # fmt: skip
def test_budgets_are_checked(given, error, message):
    with pytest.raises(error, match=message):
        CompressOptions(**given)
