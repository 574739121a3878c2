"""What model/modules.py does to a model's modules."""

from __future__ import annotations

import threading

from torch import nn

from hylora_kernels.model.modules import empty_weights


def test_two_threads_that_build_at_once_leave_new_modules_as_they_were():
    begun, left = threading.Event(), threading.Event()

    def build_and_stay():
        begun.wait()
        with empty_weights():
            assert nn.Linear(2, 2).weight.is_meta
            left.wait(1)

    other = threading.Thread(target=build_and_stay)
    other.start()
    with empty_weights():
        begun.set()
        other.join(0.1)  # without a lock it is inside by now
        assert nn.Linear(2, 2).weight.is_meta
    left.set()
    other.join()
    assert not nn.Linear(2, 2).weight.is_meta
