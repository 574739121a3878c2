"""Blocks whose linears on one input are computed as one: q, k and v of an attention, gate and up of
an MLP.

Nothing of the model's code is written anew. The block becomes a subclass of its class, whose
forward computes the group's output and passes it *through* the class's own forward, in the place of
the input; each linear of the group finds its columns in it:

    stock forward                          the same forward in a grouped block
    attention(x)                           y = [q | k | v] of x, in one call; attention(y)
      q = q_proj(x)                          q = q_proj(y) = y[..., :Nq], nothing computed
      k = k_proj(x)                          k = k_proj(y) = y[..., Nq : Nq + Nk]

A group keeps nothing from call to call: the output is an argument, so that threads, re-entrant
calls and compiled code each have their own. Weights and parameters stay where they are, in the
linears. A linear tells its group's output from an x by its width, which is never K, and computes
what it always does from any other x.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hylora_kernels import backends
from hylora_kernels.layers.packed import Columns, PackedModule
from hylora_kernels.ops.packed import packed_group


@dataclass(frozen=True)
class Argument:
    """A parameter of a block's forward: its position and its name, either of which may be None."""

    position: int | None
    name: str | None

    @staticmethod
    def all_that_are(
        x: Tensor, block: nn.Module, args: tuple, kwargs: dict
    ) -> tuple[Argument, ...]:
        """The parameters that are the tensor x in a call of the block."""
        parameters = list(inspect.signature(type(block).forward).parameters.values())[1:]
        names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        by_position = [
            Argument(i, names[i] if i < len(names) else None)
            for i, value in enumerate(args)
            if value is x
        ]
        by_name = [
            Argument(names.index(name) if name in names else None, name)
            for name, value in kwargs.items()
            if value is x
        ]
        return (*by_position, *by_name)

    def of(self, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """Its value in a call; None if it isn't given."""
        if self.name in kwargs:
            return kwargs[self.name]
        given = self.position is not None and self.position < len(args)
        return args[self.position] if given else None

    def replaced(self, value: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The call with another value."""
        if self.name in kwargs:
            return args, {**kwargs, self.name: value}
        return (*args[: self.position], value, *args[self.position + 1 :]), kwargs


@dataclass(frozen=True, eq=False)
class Group:
    """Linears of a block on one input.

    names:     of the linears among the block's children, in the order of their columns.
    columns:   of each.
    arguments: the parameters of the block's forward that are the input. An attention may take it
               as query, key and value.
    packed:    backends.group of the linears.
    """

    names: tuple[str, ...]
    columns: tuple[Columns, ...]
    arguments: tuple[Argument, ...]
    packed: Any

    @classmethod
    def of(cls, block: nn.Module, names: tuple[str, ...], arguments: tuple[Argument, ...]) -> Group:
        """The group of the block's packed linears `names`."""
        packed = backends.group([block._modules[name].packed_state.packed for name in names])
        columns, begin = [], 0
        for member in packed.members:
            columns.append(Columns(begin, begin + member.out_features, packed.width))
            begin += member.out_features
        return cls(names, tuple(columns), arguments, packed)

    def members(self, block: nn.Module) -> list[PackedModule] | None:
        """The linears, None unless each is what it was when the block was grouped."""
        modules = block._modules
        members = [modules.get(name) for name in self.names]
        for member, columns in zip(members, self.columns, strict=True):
            if getattr(member, "columns", None) is not columns:  # gone, restored or exchanged
                return None
        return members

    def through(self, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The call with the group's output in the place of the input. The same call where the
        linears compute for themselves: on different inputs, with hooks, or no longer packed."""
        x = self.arguments[0].of(args, kwargs)
        for argument in self.arguments[1:]:
            if argument.of(args, kwargs) is not x:
                return args, kwargs
        members = self.members(block)
        if members is None or not isinstance(x, Tensor):
            return args, kwargs
        biases = []
        for member in members:
            # A hook would see the group's output as the linear's input.
            if member._forward_hooks or member._forward_pre_hooks:
                return args, kwargs
            biases.append(member._bias_now())
        y = packed_group(x, self.packed, biases if any(b is not None for b in biases) else ())
        for argument in self.arguments:
            args, kwargs = argument.replaced(y, args, kwargs)
        return args, kwargs


class GroupedBlock(nn.Module):
    """A block whose `packed_groups` are computed as one each; `plain_class` is the class that it
    had."""

    plain_class: type[nn.Module]
    packed_groups: tuple[Group, ...]

    def _apply(self, fn, recurse=True):
        """To another dtype or device packed layers are restored, and then so is the block."""
        super()._apply(fn, recurse)
        if not is_intact(self):
            ungroup(self)
        return self

    def __reduce_ex__(self, protocol):
        """Copies and pickles: the class is made by grouped_class, not found by its name."""
        make, (_, *rest), *state = super().__reduce_ex__(max(protocol, 2))
        assert make is copyreg.__newobj__, "nn.Module has no other way"
        return _new, (self.plain_class, *rest), *state


@functools.cache
def grouped_class(plain_class: type[nn.Module]) -> type[GroupedBlock]:
    """GroupedX for the class X of a block, with the signature of X's forward."""

    @functools.wraps(plain_class.forward)
    def forward(self, *args, **kwargs):
        for group in self.packed_groups:
            args, kwargs = group.through(self, args, kwargs)
        return plain_class.forward(self, *args, **kwargs)

    attributes = {"plain_class": plain_class, "forward": forward, "__doc__": plain_class.__doc__}
    return type(f"Grouped{plain_class.__name__}", (GroupedBlock, plain_class), attributes)


def _new(plain_class: type[nn.Module], *rest: Any) -> nn.Module:
    new_class = grouped_class(plain_class)
    return new_class.__new__(new_class, *rest)


def group(block: nn.Module, groups: tuple[Group, ...]) -> None:
    """Make the block one that computes these groups of its packed linears as one each."""
    for one in groups:
        for name, columns in zip(one.names, one.columns, strict=True):
            vars(block._modules[name])["columns"] = columns
    vars(block)["packed_groups"] = groups
    block.__class__ = grouped_class(type(block))


def ungroup(block: GroupedBlock) -> None:
    """Make it the block that it was; its linears stay as they are, packed or not."""
    for one in block.packed_groups:
        for member in map(block._modules.get, one.names):
            if member is not None:  # else it has been taken out
                vars(member).pop("columns", None)
    del block.packed_groups
    block.__class__ = block.plain_class  # type: ignore[assignment]


def is_intact(block: GroupedBlock) -> bool:
    """True if all linears of its groups are what they were when it was grouped."""
    return all(group.members(block) is not None for group in block.packed_groups)
