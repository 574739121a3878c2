"""Groups of packed linears that read one input, found by watching a forward, verified by numbers.

No architecture is listed. A block is a module whose forward gives one of its arguments to two or
more of its packed linears, whatever their names. Then eight tokens run through the model, in
several shapes, and each call of a block is repeated on a copy of its arguments with its groups
computed as one. A block that fails or gives other numbers stays as it is.
"""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hylora_kernels import backends
from hylora_kernels.layers.experts import all_experts_called
from hylora_kernels.layers.grouped import Argument, Group, GroupedBlock, group, is_intact, ungroup
from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.layers.packed import PackedModule
from hylora_kernels.model.context import probe_ids
from hylora_kernels.support.devices import input_device

Groups = tuple[Group, ...]


def group_linears(model: nn.Module) -> tuple[list[GroupedBlock], list[tuple[str, str]]]:
    """Group the linears of a packed model, in eval(), wherever that leaves its numbers as they are.

    Returns (the blocks that it grouped, (path, reason) of each block that has linears on one input
    but stays as it is). Blocks that are grouped already stay so. The hooks of the model's modules
    are not called. Raises whatever interrupts it; nothing is grouped then.
    """
    for module in model.modules():
        if isinstance(module, GroupedBlock) and not is_intact(module):
            ungroup(module)
    blocks = _blocks_with_linears(model)
    if not blocks:
        return [], []
    if not hasattr(model, "get_input_embeddings"):
        return [], [(path, "no forward to watch: the model takes no token ids") for path in blocks]
    try:
        groups, left = _find_groups(model, blocks)
        found = {path: (blocks[path], groups[path]) for path in groups}
        wrong = _verify(model, found) if found else {}
    except Exception as error:  # A model may want other arguments, or fail in any way.
        return [], [(path, f"a forward to watch fails: {_in_short(error)}") for path in blocks]
    grouped = []
    for path in groups.keys() - wrong.keys():
        group(blocks[path], groups[path])
        grouped.append(blocks[path])
    return grouped, left + list(wrong.items())


def _blocks_with_linears(model: nn.Module) -> dict[str, nn.Module]:
    """path -> module with two or more packed linears among its children."""
    return {
        path: module
        for path, module in model.named_modules()
        if not isinstance(module, GroupedBlock)
        and "forward" not in vars(module)
        and sum(map(_is_packed_linear, module._modules.values())) > 1
    }


def _is_packed_linear(module: nn.Module | None) -> bool:
    return isinstance(module, PackedModule) and issubclass(
        module.plain_class, nn.Linear | SVDLoRALinear
    )


# ---------------------------------------------------------------------------------- running a model


def _run(model: nn.Module, several: bool) -> None:
    """Run eight tokens through the model: as two rows of four; if `several`, also as seven and one
    more from the cache, which is by itself where the model keeps none."""
    ids = probe_ids(model)
    model(input_ids=ids.view(2, 4), use_cache=False)
    if several:
        cache = getattr(model(input_ids=ids[:, :7], use_cache=True), "past_key_values", None)
        model(input_ids=ids[:, 7:], **({} if cache is None else {"past_key_values": cache}))


@contextmanager
def _watching(model: nn.Module) -> Iterator[list]:
    """For forwards to watch: without the hooks of the model's modules, which are no business of
    theirs. The handles of hooks that are put into the list are removed at the end."""
    dicts = [d for m in model.modules() for d in (m._forward_hooks, m._forward_pre_hooks) if d]
    taken = [dict(hooks) for hooks in dicts]
    for hooks in dicts:
        hooks.clear()
    handles: list = []
    # What a model keeps from a forward in inference mode could not be used outside of it.
    with torch.inference_mode(False), torch.no_grad(), input_device(model):
        try:
            with all_experts_called(model):
                yield handles
        finally:
            for handle in handles:
                handle.remove()
            for hooks, inside in zip(dicts, taken, strict=True):
                hooks.update(inside)


# ------------------------------------------------------------------------------------------ finding


def _find_groups(
    model: nn.Module, blocks: dict[str, nn.Module]
) -> tuple[dict[str, Groups], list[tuple[str, str]]]:
    """(path of a block -> its groups, as its first call shows them; (path, reason) of blocks whose
    linears read one input but are no group)."""
    holders = Counter(id(child) for m in model.modules() for child in m._modules.values())
    running: dict[str, dict[tuple[int, int], tuple[Tensor, list[str]]]] = {}
    found: dict[str, Groups] = {}
    left: list[tuple[str, str]] = []

    def enters(path: str) -> Callable:
        def hook(_block, _args, _kwargs):
            running[path] = {}

        return hook

    def reads(path: str, name: str) -> Callable:
        def hook(_linear, args):
            if path in running and args:
                # The tensor stays alive, or another one could get its id. Changed in place, it is
                # another input.
                x = args[0]
                running[path].setdefault((id(x), x._version), (x, []))[1].append(name)

        return hook

    def leaves(path: str) -> Callable:
        def hook(block, args, kwargs, _output):
            inputs = running.pop(path, {}).values()
            if path in found:
                return
            groups = []
            for x, names in inputs:
                members = tuple(dict.fromkeys(names))
                if len(members) > 1:
                    arguments = Argument.all_that_are(x, block, args, kwargs)
                    reason = _why_no_group(block, members, arguments)
                    if reason:
                        left.append((path, reason))
                    else:
                        groups.append(Group.of(block, members, arguments))
            if groups:
                found[path] = tuple(groups)

        return hook

    with _watching(model) as handles:
        for path, block in blocks.items():
            handles.append(block.register_forward_pre_hook(enters(path), with_kwargs=True))
            handles.append(block.register_forward_hook(leaves(path), with_kwargs=True))
            for name, child in block._modules.items():
                if _is_packed_linear(child) and holders[id(child)] == 1:
                    handles.append(child.register_forward_pre_hook(reads(path, name)))
        _run(model, several=False)
    return found, left


def _why_no_group(block: nn.Module, names: tuple[str, ...], arguments: tuple[Argument, ...]) -> str:
    if not arguments:
        return f"what {', '.join(names)} read is no argument of its forward"
    return backends.why_no_group([block._modules[name].packed_state.packed for name in names])


# ---------------------------------------------------------------------------------------- verifying


def _verify(model: nn.Module, blocks: dict[str, tuple[nn.Module, Groups]]) -> dict[str, str]:
    """path -> why a block can't be grouped, for those that can't."""
    reasons: dict[str, str] = {}
    running: dict[str, list] = defaultdict(list)

    def enters(path: str) -> Callable:
        def hook(_block, args, kwargs):
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            versions = [(t, t._version) for t in tensors]
            try:  # of a cache, too: the repeated call writes to its own
                copied = copy.deepcopy((args, kwargs))
            except Exception as error:
                reasons[path] = f"its arguments can't be copied: {_in_short(error)}"
                copied = None
            running[path].append((copied, versions))

        return hook

    def leaves(path: str, groups: Groups) -> Callable:
        def hook(block, _args, _kwargs, output):
            copied, versions = running[path].pop()
            if path in reasons:
                return
            if any(tensor._version != version for tensor, version in versions):
                reasons[path] = "it writes to its arguments"
            elif reason := _why_different(block, groups, *copied, output):
                reasons[path] = reason

        return hook

    with _watching(model) as handles:
        for path, (block, groups) in blocks.items():
            handles.append(block.register_forward_pre_hook(enters(path), with_kwargs=True))
            handles.append(block.register_forward_hook(leaves(path, groups), with_kwargs=True))
        _run(model, several=True)
    return reasons


def _why_different(block: nn.Module, groups: Groups, args: tuple, kwargs: dict, output: Any) -> str:
    """The reason why the block, grouped, does not give this output for these arguments, or ""."""
    group(block, groups)
    try:
        given = block.forward(*args, **kwargs)
    except Exception as error:
        return f"it needs its input for more than {_names(groups)}: {_in_short(error)}"
    finally:
        ungroup(block)
    pairs = zip(tree_leaves(output), tree_leaves(given), strict=False)
    same_count = len(tree_leaves(output)) == len(tree_leaves(given))
    if same_count and all(_is_close(*pair) for pair in pairs):
        return ""
    return f"it gives other numbers with {_names(groups)} computed as one"


def _is_close(wanted: Any, given: Any) -> bool:
    """The linears' outputs are the same to the bit, but not their strides, so that a product of
    torch's may round otherwise."""
    if not isinstance(wanted, Tensor):
        return True
    if wanted.shape != given.shape or wanted.dtype != given.dtype:
        return False
    if not wanted.is_floating_point():
        return torch.equal(wanted, given)
    tolerance = torch.finfo(wanted.dtype).eps + 1e-5
    wanted, given = wanted.double(), given.double()
    return bool((wanted - given).norm() <= tolerance * wanted.norm())


def _names(groups: Groups) -> str:
    return " and ".join(", ".join(one.names) for one in groups)


def _in_short(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
