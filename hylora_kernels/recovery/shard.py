"""A frozen base divided among processes (torch's FSDP2) while its adapters are trained.

accelerate's own plugin would do for GPUs. On a CPU it falls back to whole copies without a word, so
torch's fully_shard is called here.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.model.structure import block_list, is_linear


@contextmanager
def sharded(
    model: nn.Module, device: torch.device, trained: Iterable[Tensor] = (), back: bool = True
) -> Iterator[None]:
    """In the block each process holds its part of the frozen weights of the model's blocks.

    model:   whole in each process. Its blocks go to `device` one after the other, so that a GPU
             holds its part of them and one whole block at most.
    trained: parameters that stay whole. They are adapters, a few percent of the base: their
             gradients, checkpoints and learning rates are those of a run without shards.
    back:    False for a model that is not needed afterwards: it stays without its weights.

    A block is gathered when it runs, forward and backward. All else stays whole: embedding, last
    norm and output head, 3 % of Llama 3.1 70B. The head is applied to a chunk of rows at a time
    (model.loss), and would be gathered for each chunk.

    Afterwards the model is whole in each process, where it was. An exception leaves it without
    its weights, as a process that fails alone can't gather them.

    Raises ValueError if the model has no list of blocks inside.

        with sharded(model, torch.device("cpu"), adapters):
            loss.backward()
    """
    paths = block_list(model, {p: m for p, m in model.named_modules() if is_linear(m)})
    owner_path = paths[0].rsplit(".", 2)[0] if paths and paths[0].count(".") > 1 else ""
    if not owner_path:
        raise ValueError("shard=True found no list of blocks inside this model")
    own = model.get_submodule(owner_path)
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    homes = {key: tensor.device for key, tensor in tensors.items()}
    divided = _in_one_block_alone(model, paths) - set(trained)
    # fully_shard changes modules for good. It gets copies, around the same tensors, and the model's
    # own modules are put back.
    twin = copy.deepcopy(own, dict(tensors))
    model.set_submodule(owner_path, twin)
    try:
        blocks = [model.get_submodule(path) for path in paths]
        _drop_panels_in_backward(blocks)
        mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
        for block in blocks:
            inside = set(block.parameters())
            fully_shard(block, mesh=mesh, ignored_params=inside - divided)
            for parameter in inside & divided:
                parameter.data = parameter.new_empty(0)
        for tensor in tensors.values():
            tensor.data = tensor.data.to(device)
        fully_shard(twin, mesh=mesh, ignored_params=set(twin.parameters()))  # prefetches blocks
        yield
        if back:
            _gather(twin, own, homes)
    finally:
        model.set_submodule(owner_path, own)
        for key, tensor in tensors.items():
            tensor.data = tensor.data.to(homes[key])


def require_processes(count: int) -> None:
    """Raise ValueError unless there are several processes to divide a model among."""
    if count == 1:
        raise ValueError(
            "shard=True divides the base among processes, and there is one: torchrun "
            "--nproc-per-node 2 -m hylora_kernels finetune ... --shard starts two"
        )


def _in_one_block_alone(model: nn.Module, paths: list[str]) -> set[Tensor]:
    """The parameters of the blocks at `paths` that nothing outside their block holds, too."""
    blocks = [model.get_submodule(path) for path in paths]
    own = {module for block in blocks for module in block.modules()}
    outside = {p for m in model.modules() if m not in own for p in m.parameters(recurse=False)}
    counts = Counter(p for block in blocks for p in set(block.parameters()))
    return {p for p, count in counts.items() if count == 1} - outside


def _drop_panels_in_backward(blocks: list[nn.Module]) -> None:
    """Have layers forget behind their backward what eval() makes them forget. The panels of a
    backward, which a CPU keeps for the next step, would be a copy of the whole base."""

    def forget(layer: SVDLoRALinear, _gradient: Tensor) -> None:
        layer.eval().train()

    def hook(layer: nn.Module, args: tuple) -> None:
        if args[0].requires_grad:
            args[0].register_hook(functools.partial(forget, layer))

    for block in blocks:
        for layer in block.modules():
            if isinstance(layer, SVDLoRALinear):
                layer.register_forward_pre_hook(hook)


def _gather(twin: nn.Module, own: nn.Module, homes: dict[int, torch.device]) -> None:
    """Give the parameters of `own` what those of its sharded copy hold; all processes call it."""
    for module in twin.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    parameters = dict(own.named_parameters(remove_duplicate=False))
    for name, part in twin.named_parameters(remove_duplicate=False):
        if isinstance(part, DTensor):
            whole = parameters[name]
            whole.data = part.detach().full_tensor().to(homes[id(whole)])
