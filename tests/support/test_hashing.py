"""Hashes change with every part and with nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hylora_kernels.support.hashing import fingerprint, tensor_bytes, tensor_hash

PARTS = {"tensor": torch.arange(6.0).view(2, 3), "options": {"rank": 8, "form": None}}


@pytest.mark.parametrize(
    "change",
    [
        {"tensor": torch.arange(6.0)},
        {"tensor": torch.arange(6.0).view(2, 3).half()},
        {"tensor": torch.arange(6.0).view(2, 3) + 1},
        {"options": {"rank": 9, "form": None}},
        {"module": nn.Linear(2, 2)},
    ],
)
def test_a_fingerprint_changes_with_every_part(change):
    assert fingerprint(**PARTS) != fingerprint(**PARTS | change)


def test_a_fingerprint_ignores_order_and_memory_layout():
    transposed = torch.arange(6.0).view(2, 3).t().contiguous().t()
    assert fingerprint(options={"form": None, "rank": 8}, tensor=transposed) == fingerprint(**PARTS)


def test_a_modules_fingerprint_is_that_of_its_state():
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    assert fingerprint(model=first) != fingerprint(model=second)
    second.load_state_dict(first.state_dict())
    assert fingerprint(model=first) == fingerprint(model=second)


def test_tensor_hash_counts_names_values_and_text():
    x = torch.tensor([1.0])
    hashes = {
        tensor_hash([("x", x)]),
        tensor_hash([("y", x)]),
        tensor_hash([("x", -x)]),
        tensor_hash([("x", x)], "alpha 2"),
    }
    assert len(hashes) == 4


def test_tensor_bytes_are_the_tensors_own_memory_where_they_can_be():
    x = torch.zeros(3, dtype=torch.bfloat16)
    tensor_bytes(x)[:2] = b"\x80\x3f"
    assert x[0] == 1
    assert bytes(tensor_bytes(torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8).t())) == bytes(
        [1, 3, 2, 4]
    )


def test_a_buffer_that_is_not_saved_counts():
    module = nn.Linear(3, 2)
    module.register_buffer("frequencies", torch.ones(2), persistent=False)
    before = fingerprint(model=module)
    module.frequencies.mul_(2)
    assert fingerprint(model=module) != before
