"""Each test of the cpu backend begins without kept panels and leaves no compiled code."""

from __future__ import annotations

import pytest
import torch

from hylora_kernels.backends.cpu import panels


@pytest.fixture(autouse=True)
def _fresh():
    panels.kept_panels._entries.clear()
    yield
    torch.compiler.reset()
