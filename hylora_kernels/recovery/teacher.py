"""The teacher of finetune(): a dense model that runs before training and is not needed in it.

It runs over every block that the steps will take. Kept is what its output head reads: d numbers for
each prediction (SmolLM2-135M: 576, 1.2 MB for a block of 512 tokens in float32), not its logits
(49,152). In training the head alone makes the logits again, chunk by chunk, with the same bits.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import gather
from torch import Tensor, nn
from tqdm import tqdm

from hylora_kernels.model.check import check_model
from hylora_kernels.model.context import check_blocks
from hylora_kernels.model.load import load_model
from hylora_kernels.model.loss import RowsOfLogits, head_inputs, head_of
from hylora_kernels.model.modules import model_fingerprint
from hylora_kernels.recovery.options import GivenTeacher
from hylora_kernels.recovery.shard import sharded
from hylora_kernels.support.cache import Files, cache_dir
from hylora_kernels.support.devices import input_device
from hylora_kernels.support.hashing import fingerprint
from hylora_kernels.support.storage import require_disk


@dataclass(frozen=True)
class Teacher:
    """The stored states of a teacher and its output head.

    name:    where its model comes from.
    key:     fingerprint of its weights and config.
    head:    makes logits of the states; None where the states are the logits (model.loss.head_of).
    files:   one for each block of tokens, in the cache: {"states": [L - 1, d]}, in the teacher's
             dtype. The name of a file is the fingerprint of its block.
    nbytes:  of all states that this process reads. seconds: that making them took in this session.
    """

    name: str
    key: str
    head: nn.Module | None
    files: Files
    nbytes: int
    seconds: float

    def logits(self, ids: Tensor) -> RowsOfLogits:
        """ids int64 [n, L] -> a function from rows of the n (L - 1) predictions to their logits.

        Raises OSError naming the file of a block whose states are not there, or damaged.
        """
        files = [self.files.load(_name(block))["states"] for block in ids]
        states = torch.cat(files).to(ids.device)

        @torch.no_grad()
        def rows_of(rows: slice) -> Tensor:
            return states[rows] if self.head is None else self.head(states[rows])

        return rows_of


@contextmanager
def set_aside(model: nn.Module) -> Iterator[None]:
    """In the block, a model on a GPU waits in the CPU's memory: the GPU may not hold two."""
    device = input_device(model)
    moves = device.type != "cpu"
    if moves:
        model.to("cpu")
    try:
        yield
    finally:
        gc.collect()  # A model of transformers may be in a cycle of references.
        if moves:
            model.to(device)


def load_teacher(teacher: GivenTeacher, model: nn.Module, device: torch.device) -> nn.Module:
    """The teacher itself, or what its name or function loads, in eval(): a name to `device`, in the
    dtype of `model`.

    Raises TypeError or ValueError unless it is a causal language model, another one than `model`,
    with its vocabulary.
    """
    if isinstance(teacher, str | Path):
        teacher = load_model(teacher, device, model.get_input_embeddings().weight.dtype)[0]
    elif not isinstance(teacher, nn.Module) and callable(teacher):
        teacher = teacher()
    if teacher is model:
        raise ValueError("teacher must be another model than the one that is trained")
    check_model(teacher, "evaluate", "teacher")
    ours, theirs = (m.get_output_embeddings().weight for m in (model, teacher))
    if theirs.shape[0] != ours.shape[0]:
        raise ValueError(f"teacher must know the model's {ours.shape[0]} tokens, not {len(theirs)}")
    return teacher.eval()


def run_teacher(
    dense: nn.Module,
    model: nn.Module,
    blocks: Tensor,
    device: torch.device,
    progress: bool,
    shard: bool = False,
) -> Teacher:
    """Store the states of `blocks`, int64 [n, L], that are not in the cache already.

    dense:  the teacher. One block at a time runs through it, so that the states of a block depend
            on nothing else. A stopped pass goes on, and another run on the same text finds them.
    device: of the training, where the head will be.
    shard:  the processes divide the teacher's blocks (recovery.shard), which leaves it without
            them. All of them make this call, with blocks of their own.

    Raises FloatingPointError if the teacher's states are not finite, OSError if the disk has no
    space for them.
    """
    check_blocks(dense, blocks)
    start, name = time.perf_counter(), getattr(dense, "name_or_path", "") or type(dense).__name__
    key = model_fingerprint(dense)
    files = Files(cache_dir("teacher", key), key)
    with torch.no_grad(), sharded(dense, device, back=False) if shard else nullcontext():
        own = blocks.to(input_device(dense))
        of_one = head_inputs(dense, own[:1, :2]).nbytes  # for one prediction
        nbytes = of_one * (blocks.shape[1] - 1)  # of a block
        missing = {_name(b) for b in blocks if not files.path(_name(b)).exists()}
        require_disk(files.folder, nbytes * len(missing), f"the states of teacher {name}")
        rounds = _most(len(own), device) if shard else len(own)
        for index in tqdm(range(rounds), "teacher", unit="block", disable=not progress):
            ids = own[index % len(own)]
            is_missing = files.find(_name(ids)) is None
            # Shards are gathered by all processes or none.
            if _most(is_missing, device) if shard else is_missing:
                states = head_inputs(dense, ids[None])
                if not states.isfinite().all():
                    raise FloatingPointError(f"teacher {name}: its hidden states are not finite")
                if is_missing:
                    files.save(_name(ids), {"states": states})
        head = head_of(dense, own)
    return Teacher(
        name=name,
        key=key,
        head=None if head is None else _head_for(model, head, device),
        files=files,
        nbytes=nbytes * len(blocks),
        seconds=time.perf_counter() - start,
    )


def _most(count: int, device: torch.device) -> int:
    """The largest of the processes' counts."""
    return int(gather(torch.tensor([count], device=device)).max())


def _name(block: Tensor) -> str:
    return fingerprint(ids=block)


def _head_for(model: nn.Module, head: nn.Module, device: torch.device) -> nn.Module:
    """The teacher's head on `device`: the model's own where that is the same, bit for bit."""
    own = model.get_output_embeddings()
    ours, theirs = own.state_dict(), head.state_dict()
    is_same = type(own) is type(head) and ours.keys() == theirs.keys()
    for name, tensor in theirs.items() if is_same else ():
        other = ours[name]
        is_same &= tensor.dtype == other.dtype and torch.equal(tensor.cpu(), other.cpu())
    if is_same:
        return own
    on_device = all(tensor.device == device for tensor in theirs.values())
    return head if on_device else copy.deepcopy(head).to(device)
