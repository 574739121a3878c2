"""Names of devices and dtypes, as users give them, turned into torch's."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """A device's name, a device, or "auto" (cuda, else mps, else cpu) -> a device that is there.

    Raises ValueError naming the devices that are there, TypeError for anything else than a name.
    """
    if not isinstance(device, str | torch.device):
        raise TypeError(f"device must be a str or torch.device, got {type(device).__name__}")
    there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    there["cpu"] = 1
    kinds = [kind for kind, count in there.items() if count]
    if device == "auto":
        return torch.device(kinds[0])
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(
            f"device must be one of auto, {', '.join(kinds)}, got {device!r}"
        ) from None
    if (found.index or 0) >= there.get(found.type, 0):
        raise ValueError(f"device {str(found)!r} is not available; there is: {', '.join(kinds)}")
    return found


def input_device(model: nn.Module) -> torch.device:
    """Where a causal language model wants its token ids: its embedding, packed or not, is there."""
    embedding = model.get_input_embeddings()
    return next(chain(embedding.parameters(), embedding.buffers())).device


def resolve_dtype(dtype: str | torch.dtype | None = "auto") -> torch.dtype | None:
    """A name or a floating torch.dtype -> that dtype; "auto" or None -> None, leave it as it is."""
    if dtype is None or dtype == "auto":
        return None
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    raise ValueError(f"dtype must be one of auto, {', '.join(DTYPES)}, got {dtype!r}")
