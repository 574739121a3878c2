"""Limits of what a stranger's config.json may ask for, before a model is built from it.

A config of 1 KB can describe a model of any size. The headers of the weights are the measure: they
are on the disk, and a model can't have many more tensors than its files.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.nn.modules.module import register_module_parameter_registration_hook

from hylora_kernels.model.files import CheckpointError, shown

# What the values of such fields count, at most: transformers makes lists of that length from them
# before it makes a module. Llama 3.1 405B has 126 layers, Kimi K2 384 experts.
COUNTS = {
    re.compile(r"layers?$"): 1_000,
    re.compile(r"(blocks|experts|groups|heads|labels|stages)$"): 2**16,
}
# Bytes of the tables that a model makes for itself. A mask of 32,768 x 32,768 takes as much.
MAX_BUFFERS = 2**30
# Parameters for one tensor of the weights: layers that share their weights (Zamba's 13) are saved
# once. The 64 are for models of a few tensors.
SHARED, FEW = 16, 64


def check_config(config: dict[str, Any], source: str | Path) -> None:
    """Raise CheckpointError for a field that asks for too many layers or for code from the hub, and
    for one that is NaN, which makes every output NaN."""
    pending: list[Any] = [config]
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending += value
        if not isinstance(value, dict):
            continue
        pending += value.values()
        for key, given in value.items():
            name = str(key)  # id2label has numbers
            limit = next((most for field, most in COUNTS.items() if field.search(name)), None)
            if limit and isinstance(given, int | float) and given > limit:
                raise CheckpointError(
                    f"{source}: {shown(name)} is {shown(given)}, more than the limit of {limit}"
                )
            if given != given:
                raise CheckpointError(f"{source}: {shown(name)} is NaN")
            # transformers fetches "some-org/some-kernel" from the hub and runs it.
            if name.endswith("_implementation") and "/" in str(given):
                raise CheckpointError(
                    f"{source}: {name} names code on the hub, {shown(given)}, which is not run"
                )


@contextmanager
def few_parameters(tensors: int, source: str | Path) -> Iterator[None]:
    """Stop a construction of a model that has many more parameters than the weights have tensors.

    Without it 4,000 layers of a config took 46 s before they were compared with the files.
    """
    limit, made, thread = SHARED * tensors + FEW, 0, threading.get_ident()

    def count(module: object, name: str, parameter: object) -> None:
        nonlocal made
        made += parameter is not None and threading.get_ident() == thread
        if made > limit:
            raise CheckpointError(
                f"{source}: describes a model of more than {limit} parameters, but the weights are "
                f"{tensors} tensors"
            )

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def unusual_fields(config: dict[str, Any], config_class: Any) -> str:
    """For the end of an error: the fields that are no positive number, unlike the class's default.

    A library's own error ("integer division or modulo by zero") often names no field.
    """
    found = []
    with contextlib.suppress(Exception):  # a class may have no defaults
        usual = config_class().to_dict()
        for name, value in config.items():
            positive = [type(v) in (int, float) and v > 0 for v in (usual.get(name), value)]
            if positive == [True, False]:
                found.append(f"{name} is {shown(value)}")
    return f" ({', '.join(found)})" if found else ""
