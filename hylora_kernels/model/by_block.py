"""A dense model whose decoder blocks stay in its files: each is read when it runs, and freed then.

The rest (embedding, head, norms) is in memory. Such a model is called like any other, and has the
memory of that rest and of one block. hold() keeps a block in memory over many calls; it does
nothing where the block is in memory anyway, so that a pipeline needs no second form.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hylora_kernels.model.slots import slots_of
from hylora_kernels.model.tensorfile import TensorFile

BLOCKS = "hylora_blocks"  # an attribute of a model: path of a block -> its StoredBlock
BLOCK = "hylora_block"  # an attribute of a block: its StoredBlock


class StoredBlock:
    """A block whose tensors are in files: on the meta device, unless it runs or is held.

    module: the block. files: name of a tensor, as in the block's state_dict -> (file, its name
    there). device, dtype: of the tensors in memory; integers keep their dtype, and dtype None
    leaves all as they are stored.
    """

    def __init__(
        self,
        module: nn.Module,
        files: Mapping[str, tuple[TensorFile, str]],
        device: torch.device,
        dtype: torch.dtype | None,
    ):
        self.module, self.files, self._device, self._dtype = module, files, device, dtype
        self._users, self.bypassed = 0, False
        vars(module)[BLOCK] = self
        module.register_forward_pre_hook(lambda *_: self._enter())
        # Also after a forward that raises, as one that a caller's hook ends early.
        module.register_forward_hook(lambda *_: self._leave(), always_call=True)

    def __deepcopy__(self, _memo: dict) -> StoredBlock:
        return self  # A copy of a block that is held has tensors of its own.

    def read(self, name: str) -> Tensor:
        """The tensor of this name in the block's state_dict, from its file."""
        file, stored_name = self.files[name]
        tensor = file.read(stored_name)
        dtype = self._dtype if tensor.is_floating_point() else None
        return tensor.to(self._device, dtype)

    def is_stored_in(self, files: Mapping[str, tuple[TensorFile, str]]) -> None:
        """Read the block from these files from now on, and leave their dtypes."""
        self.files, self._dtype = files, None

    @contextmanager
    def held(self) -> Iterator[None]:
        self._enter()
        try:
            yield
        finally:
            self._leave()

    def _enter(self) -> None:
        if self.bypassed:
            return
        self._users += 1
        if self._users == 1:
            for name, slot in slots_of(self.module).items():
                if slot.kind != "made" and slot.tensor.is_meta:
                    slot.set(self.read(name))

    def _leave(self) -> None:
        if self.bypassed:
            return
        self._users -= 1
        if self._users == 0:
            for slot in slots_of(self.module).values():
                if slot.kind != "made":
                    slot.set(slot.tensor.to("meta"))


def is_by_block(model: nn.Module) -> bool:
    """True for a model whose blocks are read from files."""
    return BLOCKS in vars(model)


@contextmanager
def hold(block: nn.Module) -> Iterator[None]:
    """Keep the block of a model in memory until the `with` ends; changes to it are lost then,
    unless they are written (StoredBlock.is_stored_in)."""
    stored: StoredBlock | None = vars(block).get(BLOCK)
    if stored is None:
        yield
        return
    with stored.held():
        yield


@contextmanager
def unread(model: nn.Module) -> Iterator[None]:
    """Inside, calls of blocks read nothing: their forwards are others, which need no weights."""
    blocks = list(stored_blocks(model).values())
    for block in blocks:
        block.bypassed = True
    try:
        yield
    finally:
        for block in blocks:
            block.bypassed = False


def stored_blocks(model: nn.Module) -> dict[str, StoredBlock]:
    """path -> block, of those that are read from files."""
    return vars(model).get(BLOCKS, {})


def in_memory(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A tensor of the model's state_dict, read from its file if it is not in memory."""
    if not tensor.is_meta:
        return tensor
    for path, block in stored_blocks(model).items():
        if name.startswith(path + "."):
            return block.read(name.removeprefix(path + "."))
    return tensor
