"""What a causal language model is made of, found by looking at it run: target linears, shared
inputs, blocks.

No list of architectures: a linear is whatever computes x W^T + b, two linears share an input when
one forward hands them the same tensor, and the blocks are the module list that holds most of the
linears' parameters.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hylora_kernels.layers.linear import SVDLoRALinear


@dataclass(frozen=True)
class Group:
    """Linears that read one tensor, in call order; `block` is the path of the decoder block they
    stand in, or None."""

    paths: tuple[str, ...]
    block: str | None


@dataclass(frozen=True)
class Structure:
    """groups in call order; blocks: paths of the decoder blocks in order; skipped: path -> why it
    is left alone."""

    groups: list[Group]
    blocks: list[str]
    skipped: dict[str, str]

    @property
    def paths(self) -> list[str]:
        return [path for group in self.groups for path in group.paths]


def linears(
    model: nn.Module, include: list[str] | None = None, exclude: list[str] | None = None
) -> dict[str, nn.Module]:
    """path -> module of every linear that compression may replace or has replaced: see `select` for
    the rules."""
    return select(model, include, exclude)[0]


def select(
    model: nn.Module, include: list[str] | None = None, exclude: list[str] | None = None
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """(path -> target linear, path -> why a linear is skipped).

    Targets: nn.Linear and subclasses that compute the same, GPT-2's Conv1D, SVDLoRALinear.
    include, exclude: regular expressions searched in the path; include=None means all but the
             output head.
    A weight that another module holds too (tied embeddings), or of a module used in two places, is
    never touched. A compressed model remembers its own selection, used where include and exclude
    are both None. Raises ValueError for a pattern that is no regular expression or matches nothing,
    TypeError for patterns that are no list.
    """
    for name, patterns in (("include", include), ("exclude", exclude)):
        _check_patterns(name, patterns)
    remembered = getattr(model, "hylora_linears", None)
    if remembered is not None and include is None and exclude is None:
        return {path: model.get_submodule(path) for path in remembered}, {}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    holders = Counter(
        id(p)
        for module in model.modules()
        for p in module.parameters(recurse=False)
        if p is not None
    )
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    targets: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D | SVDLoRALinear):
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


def computes_linear(module: nn.Module) -> bool:
    """Whether module(x) is x W^T + b: by its forward where that is inherited, else by trying it on
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
    except Exception:  # a quantised or sharded subclass may fail in any way: it is no plain linear
        return False


def as_matrix(module: nn.Module) -> Tensor:
    """The weight as [N, K], out by in; Conv1D stores it the other way round."""
    weight = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight


def block_list(model: nn.Module, paths: list[str]) -> list[str]:
    """Paths of the decoder blocks: the children of the outermost module list that holds most of
    `paths`' parameters."""
    sizes = {path: sum(p.numel() for p in model.get_submodule(path).parameters()) for path in paths}
    best, best_size = [], 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            size = sum(count for path, count in sizes.items() if path.startswith(name + "."))
            # named_modules goes from the outside in: an inner list must hold more to take its place
            if size > best_size:
                best, best_size = [f"{name}.{i}" for i in range(len(module))], size
    return best


@torch.no_grad()
def discover(
    model: nn.Module, include: list[str] | None = None, exclude: list[str] | None = None
) -> Structure:
    """Run eight tokens through the model and watch which linears read which tensor, in which
    order."""
    targets, skipped = select(model, include, exclude)
    blocks = block_list(model, list(targets))
    seen: dict[tuple[int, int], list[str]] = {}
    alive, hooks = [], []

    def watch(path):
        def hook(_module, args):
            x = args[0]
            if path not in (known for paths in seen.values() for known in paths):
                alive.append(x)  # keeps the id from being given to another tensor
                # changed in place between two calls, it is another input
                seen.setdefault((id(x), x._version), []).append(path)

        return hook

    for path, module in targets.items():
        hooks.append(module.register_forward_pre_hook(watch(path)))
    device = next(model.parameters()).device
    try:
        model(
            input_ids=torch.arange(8, device=device)[None] % model.config.vocab_size,
            use_cache=False,
        )
    finally:
        for hook in hooks:
            hook.remove()
    called = {path for paths in seen.values() for path in paths}
    skipped |= {path: "never called in a forward" for path in targets if path not in called}
    groups = [Group(tuple(paths), _block_of(paths[0], blocks)) for paths in seen.values()]
    return Structure(groups, blocks, skipped)


def _block_of(path: str, blocks: list[str]) -> str | None:
    return next((block for block in blocks if path.startswith(block + ".")), None)


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
