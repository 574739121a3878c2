"""The structure of a causal language model, found by watching a forward: target linears, groups
that share an input, blocks.

No architecture is listed. A linear is any module that computes x W^T + b; two linears share an
input if one forward gives both the same tensor; the blocks are the module list that holds most of
the linears' parameters.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hylora_kernels.layers.experts import ExpertLinears, all_experts_called
from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.model.context import probe_ids
from hylora_kernels.model.modules import holder_counts


@dataclass(frozen=True)
class Target:
    """A linear that compression may replace: nn.Linear, a subclass that computes the same, Conv1D.

    path: its name in the model. shape: (N, K), outputs by inputs.
    routed: True for an expert's, which reads only the tokens that are routed to the expert.
    """

    path: str
    module: nn.Module
    shape: tuple[int, int]
    routed: bool = False

    @property
    def matrix(self) -> Tensor:
        """The weight itself as [N, K], without gradient: writing to it changes the model."""
        return as_matrix(self.module)


@dataclass(frozen=True)
class Group:
    """Linears that read one tensor, in call order; the first one is the leader, whose input is
    watched for all."""

    targets: tuple[Target, ...]

    @property
    def leader(self) -> Target:
        return self.targets[0]

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(target.path for target in self.targets)


@dataclass(frozen=True)
class Block:
    """A decoder block: its path, its module, and the groups of linears in it, in call order.

    A deep copy is a block of its own: its targets are the linears of the copied module.
    """

    path: str
    module: nn.Module
    groups: tuple[Group, ...]

    @property
    def targets(self) -> list[Target]:
        return [target for group in self.groups for target in group.targets]


@dataclass(frozen=True)
class Structure:
    """groups: all, in call order. blocks: in order; a group may stand in none (an output head).
    skipped: path of a linear that is left alone -> the reason."""

    groups: list[Group]
    blocks: list[Block]
    skipped: dict[str, str]

    @property
    def targets(self) -> list[Target]:
        return [target for group in self.groups for target in group.targets]

    @property
    def paths(self) -> list[str]:
        return [target.path for target in self.targets]


def linears(
    model: nn.Module, include: list[str] | None = None, exclude: list[str] | None = None
) -> dict[str, nn.Module]:
    """path -> module of every linear that compression may replace or has replaced, by the rules of
    `select`."""
    return select(model, include, exclude)[0]


def select(
    model: nn.Module, include: list[str] | None = None, exclude: list[str] | None = None
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """(path -> linear, path -> the reason why a linear is skipped).

    Linears are nn.Linear and subclasses that compute the same, GPT-2's Conv1D, SVDLoRALinear.
    include, exclude: regular expressions searched in the path. include=None selects all but the
                      output head.

    A weight that another module holds too (tied embeddings) and a module used in two places are
    skipped. A compressed model remembers its selection, which is taken if include and exclude are
    None. Raises ValueError for a pattern that is no regular expression or matches nothing,
    TypeError for patterns that are no list.
    """
    for name, patterns in (("include", include), ("exclude", exclude)):
        _check_patterns(name, patterns)
    remembered = getattr(model, "hylora_linears", None)
    if remembered is not None and include is None and exclude is None:
        return {path: model.get_submodule(path) for path in remembered}, {}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    holders = holder_counts(model)
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    targets: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    for path, module in model.named_modules():
        if not is_linear(module):
            continue
        if include is not None and not _matches(include, path):
            continue
        if exclude is not None and _matches(exclude, path):
            skipped[path] = "excluded"
        elif module is head and include is None:
            skipped[path] = "output head"
        elif isinstance(module, SVDLoRALinear):
            targets[path] = module
        elif holders[id(module.weight)] > 1:
            skipped[path] = "weight tied to another module's"
        elif uses[id(module)] > 1:
            skipped[path] = "used in several places"
        elif not computes_linear(module):
            skipped[path] = f"{type(module).__name__} doesn't compute x W^T + b"
        else:
            targets[path] = module
    for name, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns or ():
            if not any(re.search(pattern, path) for path in (*targets, *skipped)):
                raise ValueError(f"{name}: pattern {pattern!r} matches no linear of the model")
    return targets, skipped


def is_linear(module: nn.Module) -> bool:
    """True for the modules that `select` looks at."""
    return isinstance(module, nn.Linear | Conv1D | SVDLoRALinear)


def computes_linear(module: nn.Module) -> bool:
    """True if module(x) is x W^T + b: an inherited forward is known to be, another one is tried on
    random rows."""
    inherited = type(module).forward in (nn.Linear.forward, Conv1D.forward)
    if inherited and "forward" not in vars(module):
        return module.weight.is_floating_point()
    try:
        weight = as_matrix(module)
        x = torch.randn(3, weight.shape[1], device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            y = F.linear(x, weight, module.bias)
            return bool((module(x) - y).norm() <= 0.01 * y.norm())
    except Exception:  # A quantised or sharded subclass may fail in any way.
        return False


def as_matrix(module: nn.Module) -> Tensor:
    """The weight of nn.Linear or Conv1D, which stores [K, N], as a view [N, K] without gradient."""
    weight = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight


def block_list(model: nn.Module, linears: dict[str, nn.Module]) -> list[str]:
    """linears: path -> module. The paths of the decoder blocks, which are the children of the
    outermost module list that holds most of the linears' parameters."""
    sizes = {path: sum(p.numel() for p in linear.parameters()) for path, linear in linears.items()}
    best, best_size = [], 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            size = sum(count for path, count in sizes.items() if path.startswith(name + "."))
            # named_modules goes from the outside in: an inner list must hold more to replace it.
            if size > best_size:
                best, best_size = [f"{name}.{i}" for i in range(len(module))], size
    return best


@torch.no_grad()
def discover(
    model: nn.Module,
    include: list[str] | None = None,
    exclude: list[str] | None = None,
    low_rank_too: bool = False,
) -> Structure:
    """The structure of a dense model: eight tokens run through it show which linears read which
    tensor, in which order.

    include, exclude: see `select`. Raises ValueError for a layer that is an SVDLoRALinear already,
    unless these are linears, too (low_rank_too).
    """
    linears, skipped = select(model, include, exclude)
    for path, module in linears.items():
        if isinstance(module, SVDLoRALinear) and not low_rank_too:
            raise ValueError(
                f"model must be dense, but its layer {path} has been compressed already"
            )
    readers = _readers(model, linears)
    called = {path for paths in readers for path in paths}
    skipped |= {path: "never called in a forward" for path in linears if path not in called}

    routed = {
        id(linear)
        for module in model.modules()
        if isinstance(module, ExpertLinears)
        for linear in module.modules()
    }

    def target(path: str) -> Target:
        module = linears[path]
        return Target(path, module, tuple(as_matrix(module).shape), id(module) in routed)

    groups = [Group(tuple(map(target, paths))) for paths in readers]
    blocks = []
    for path in block_list(model, {path: linears[path] for path in called}):
        inside = (group for group in groups if group.leader.path.startswith(path + "."))
        blocks.append(Block(path, model.get_submodule(path), tuple(inside)))
    return Structure(groups, blocks, skipped)


def _readers(model: nn.Module, linears: dict[str, nn.Module]) -> list[list[str]]:
    """The paths of the linears that a forward calls, in call order, those that read one tensor
    together."""
    called: set[str] = set()
    readers: dict[tuple[int, int], list[str]] = {}
    alive, hooks = [], []

    def watch(path):
        def hook(_module, args):
            x = args[0]
            if path not in called:
                called.add(path)
                alive.append(x)  # Another tensor could get the id of a freed one.
                # A tensor changed in place between two calls is another input.
                readers.setdefault((id(x), x._version), []).append(path)

        return hook

    for path, module in linears.items():
        hooks.append(module.register_forward_pre_hook(watch(path)))
    try:
        with all_experts_called(model):
            model(input_ids=probe_ids(model), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return list(readers.values())


def layer_type(path: str) -> str:
    """The path behind its last number, that of an expert apart: model.layers.3.mlp.up_proj and
    model.layers.3.mlp.up_proj.0 -> mlp.up_proj."""
    return re.split(r"(?:^|\.)\d+\.", re.sub(r"\.\d+$", "", path))[-1]


def depth_of(path: str) -> int | None:
    """The first number in a path, that of its block; None for a path without, as lm_head."""
    number = re.search(r"(?:^|\.)(\d+)\.", path)
    return int(number[1]) if number else None


def check_pattern(name: str, pattern: str) -> None:
    """Raise TypeError or ValueError naming `name` unless `pattern` is a regular expression."""
    if not isinstance(pattern, str):
        raise TypeError(f"{name} must hold patterns (str), got {type(pattern).__name__}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name}: {pattern!r} is no regular expression: {error}") from None


def _check_patterns(name: str, patterns: list[str] | None) -> None:
    if patterns is not None and not isinstance(patterns, list | tuple):
        kind = type(patterns).__name__
        raise TypeError(f"{name} must be a list of patterns or None, got {kind}")
    for pattern in patterns or ():
        check_pattern(name, pattern)


def _matches(patterns: list[str], path: str) -> bool:
    return any(re.search(pattern, path) for pattern in patterns)
