"""KeptWhileUnwritten: found again for the same tensors, gone with a write or with the tensors."""

from __future__ import annotations

import contextlib
import gc
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hylora_kernels.backends.shared import torch_products
from hylora_kernels.backends.shared.kept import KeptWhileUnwritten, outside_graph_pools


def corner(tensor):
    return tensor[:2]


def test_a_value_is_found_for_the_same_tensors_only():
    kept, a, b = KeptWhileUnwritten(), torch.ones(3), torch.ones(3)
    assert kept.get(a, b) is None
    kept.keep("value", a, b)
    assert kept.get(a, b) == kept.get_unchecked(a) == "value"
    assert kept.get(a, b.clone()) is None and kept.get(b, a) is None
    kept.forget(a)
    assert kept.get(a, b) is None and kept.get_unchecked(a) is None


@pytest.mark.parametrize("written", [0, 1])
def test_a_write_to_either_tensor_ends_it(written):
    kept, tensors = KeptWhileUnwritten(), (torch.ones(3), torch.ones(3))
    kept.keep("value", *tensors)
    tensors[written].add_(1)
    assert kept.get(*tensors) is None
    assert kept.get_unchecked(tensors[0]) == "value"


def test_other_memory_under_the_same_tensor_ends_it():
    kept, a = KeptWhileUnwritten(), torch.ones(3)
    kept.keep("value", a)
    a.data = torch.ones(3)
    assert kept.get(a) is None


def test_a_write_through_data_is_seen_in_the_fingerprint():
    for kept, expected in (
        (KeptWhileUnwritten(), "value"),
        (KeptWhileUnwritten(fingerprint=corner), None),
        (KeptWhileUnwritten(compares_copies=True), None),
    ):
        a = torch.ones(3)
        kept.keep("value", a)
        a.data[0] = 2
        assert kept.get(a) == expected


def test_inference_tensors_are_compared_with_a_copy_or_not_kept():
    with torch.inference_mode():
        a = torch.ones(3)
    for kept in (KeptWhileUnwritten(), KeptWhileUnwritten(fingerprint=corner)):
        kept.keep("value", a)
        assert kept.get(a) is None
    kept = KeptWhileUnwritten(compares_copies=True)
    kept.keep("value", a)
    assert kept.get(a) == "value"
    with torch.inference_mode():
        a[1] = 5
    assert kept.get(a) is None


def test_a_value_goes_with_its_key():
    kept, a = KeptWhileUnwritten(), torch.ones(3)
    kept.keep("value", a)
    assert len(kept) == 1
    del a
    gc.collect()
    assert len(kept) == 0


def test_lasting_tensors_are_made_in_another_thread_for_a_gpu_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the caller's stream")
    entered = []

    @contextlib.contextmanager
    def stream(which):
        entered.append((which, threading.get_ident()))
        yield

    monkeypatch.setattr(torch.cuda, "stream", stream)
    assert outside_graph_pools(threading.get_ident, torch.device("cpu")) == threading.get_ident()
    other = outside_graph_pools(threading.get_ident, torch.device("cuda"))
    assert other != threading.get_ident() and entered == [("the caller's stream", other)]
    assert not outside_graph_pools(torch.is_grad_enabled, torch.device("cuda"))


class OneDevice(TorchDispatchMode):
    """Fails an op that takes a number as a CPU tensor: no graph can capture its copy to a GPU."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        flat = torch.utils._pytree.tree_leaves((arguments, keywords))
        assert all(t.dim() or t.device.type == "meta" for t in flat if isinstance(t, torch.Tensor))
        return function(*arguments, **(keywords or {}))


def test_the_orders_of_pivots_can_be_made_while_a_graph_is_captured():
    with OneDevice():
        orders = torch_products._make_orders(torch.tensor([1, 2], dtype=torch.int32), 4)
    assert [order.tolist() for order in orders] == [[1, 2, 0, 3], [2, 0, 1, 3], [2, 5]]
