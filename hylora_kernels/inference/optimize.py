"""optimize_for_inference and its undo: a model's weights in the layout that its backend reads best.

A packed layer keeps its place, its name, its hooks and its Parameter objects; its class changes
(SVDLoRALinear to PackedSVDLoRALinear), its weights lie in panels and the plain ones are freed.
Those that read one input can be computed as one (groups.py).
`layer.U`, `layer.weight` and `state_dict()` still read as plain weights, by copies made when asked
for.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hylora_kernels import backends
from hylora_kernels.inference.groups import group_linears
from hylora_kernels.layers.grouped import GroupedBlock, ungroup
from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.layers.packed import (
    PackedModule,
    PackedState,
    convert_layers,
    packed_class,
    packed_states,
    packed_weights,
)
from hylora_kernels.layers.packed_parameter import PackedParameter
from hylora_kernels.layers.quantized import (
    QuantizedEmbedding,
    QuantizedFactor,
    QuantizedLinear,
    own_parameters,
)
from hylora_kernels.weights import Weights

_log = logging.getLogger(__name__)
_FROZEN = "hylora_frozen"  # on a module: names of its parameters that required grad


def optimize_for_inference(model: nn.Module, group: bool | None = None) -> nn.Module:
    """Lay out the weights of a model in eval() for the fastest decoding; in place, the same model.

    SVDLoRALinear and nn.Linear layers, the output head among them, are packed where a backend is
    faster so: by the CPU's backend in bfloat16, float16 and float32, where an embedding that is
    tied to the head reads the head's panels; on a GPU SVDLoRALinear layers, base and adapter side
    by side. Everything else stays as it is, and one line of the log says why. The plain weights are
    freed layer by layer; state_dict() and save_pretrained give them as before.

    group: compute packed linears on one input, such as q, k and v, as one call. Eight tokens run
           through the model, without its hooks, to find them and to verify each block that calls
           them. A dense linear beside compressed ones is packed for its group. None: on a GPU, not
           on a CPU. There it is no faster, called from Python (SmolLM2's q, k, v on one AVX2
           thread, M = 1: 0.85 of the speed); on a GPU one launch takes the place of three
           (predicted for TinyLlama's q, k, v on an H100, M = 1: 2.5 times as fast as one by one).

    There is no backward until restore_from_inference(model): all parameters stop requiring grad.
    The Parameter objects stay, emptied: they read as copies, their gradients and what an optimizer
    knows of them are kept, and a write to one raises RuntimeError. So does setting alpha or pivots;
    the bias can be changed. model.to(...) to another dtype or device restores first.
    Not seen, and without effect on a packed layer: a write to a tensor that shares the memory of a
    weight (a NumPy array, a view taken before packing), which is the parameter's memory again once
    it is restored; and, inside torch.inference_mode, a write to a view of a copy.
    Raises ValueError for a model in training mode or one that accelerate has spread over devices.
    After a failure the model is as it was.

    Example:
        optimize_for_inference(model.eval())
        tokens = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4)
    """
    _check(model)
    group = any(p.is_cuda for p in model.parameters()) if group is None else group
    layers, left = _layers_to_pack(model)
    may_be_members = _beside_compressed_ones(model) if group else set()
    packed: list[PackedState] = []
    for_groups: list[PackedState] = []  # that gain something as members of a group alone
    blocks: list[GroupedBlock] = []
    try:
        for modules in tqdm(layers, desc="packing", unit="layer", delay=2):
            # Made under inference_mode, panels and all restored from them would be inference
            # tensors.
            with torch.inference_mode(False), torch.no_grad():
                state = _pack(modules[0])
                if state is None and len(modules) == 1 and id(modules[0]) in may_be_members:
                    state = _pack(modules[0], for_group=True)
                    for_groups += [state] if state else []
                if state is None:
                    left.append(("", _why_not_faster(modules[0])))
                else:
                    packed.append(state)
                    convert_layers(modules, state)
        blocks, ungrouped = group_linears(model) if group else ([], [])
        for state in for_groups:
            (linear,) = state.modules
            if linear.columns is None:
                state.restore()
                packed.remove(state)
                left.append(("", _why_not_faster(linear)))
    except BaseException:
        for state in packed:
            state.restore()
        raise
    if packed:
        _freeze(model)
    groups = sum(len(block.packed_groups) for block in blocks)
    grouping = f"; {groups} groups computed as one{_reasons(ungrouped)}" if group else ""
    _log_summary(packed, left, grouping)
    return model


def restore_from_inference(model: nn.Module) -> nn.Module:
    """Undo optimize_for_inference: the same Parameter objects with the same bits, gradients and
    requires_grad; in place, the same model.

    The model may be a part of the optimised one, a wrapper around it or a copy: every module under
    it is restored, and every layer that shares a packed weight with one of them. A model that isn't
    optimised stays as it is. A failure leaves each layer either packed or plain.

    Example:
        optimize_for_inference(model.eval())
        restore_from_inference(model)  # which can be trained again
    """
    for module in list(model.modules()):
        if isinstance(module, GroupedBlock):
            ungroup(module)
        if isinstance(module, PackedModule):
            module.restore()
        for parameter in module._parameters.values():
            if isinstance(parameter, PackedParameter):  # the weight of a packed layer elsewhere
                parameter.packed.state.restore()
    for module in model.modules():
        for name in vars(module).pop(_FROZEN, ()):
            parameter = module._parameters.get(name)
            if parameter is not None:
                parameter.requires_grad_(True)
    return model


@contextmanager
def optimized_for_inference(model: nn.Module) -> Iterator[None]:
    """Packed by optimize_for_inference in the block, and afterwards as it was before."""
    already = bool(packed_states(model))
    try:
        if not already:
            optimize_for_inference(model)
        yield
    finally:
        if not already:
            restore_from_inference(model)


def _freeze(model: nn.Module) -> None:
    """Note on each module which of its parameters required grad, so that restoring a part of the
    model, a wrapper or a copy finds the notes."""
    for module in model.modules():
        own = module._parameters.items()
        frozen = [name for name, p in own if p is not None and p.requires_grad]
        if frozen:
            vars(module)[_FROZEN] = (*vars(module).get(_FROZEN, ()), *frozen)
    model.requires_grad_(False)


def _log_summary(packed: list[PackedState], left: list[tuple[str, str]], grouping: str) -> None:
    """One line of the log: what was packed and grouped, and why the others were not."""
    plain, panels = sum(h.plain_bytes for h in packed), sum(h.nbytes for h in packed)
    _log.log(
        logging.WARNING if left and not packed else logging.INFO,
        "optimize_for_inference: packed %d layers, %.1f MB in %.1f MB; left %d as they are%s%s",
        *(len(packed), plain / 1e6, panels / 1e6, len(left), _reasons(left), grouping),
    )


def _reasons(left: list[tuple[str, str]]) -> str:
    """(path, reason) of several -> each reason once, in brackets."""
    paths = defaultdict(list)
    for path, reason in left:
        paths[reason].append(path)
    located = [_located(reason, *where) for reason, where in paths.items()]
    return f" ({'; '.join(located)})" if left else ""


def _located(reason: str, path: str, *others: str) -> str:
    """The reason with the first path that it holds for; "" is a reason of all."""
    if not path:
        return reason
    return f"{path}{f' and {len(others)} others' if others else ''}: {reason}"


# ----------------------------------------------------------------------------------- what is packed


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    for path, module in model.named_modules():
        if module.training:
            raise ValueError(
                f"model must be in eval mode: call model.eval(); {path or 'it'} is in training mode"
            )
        if hasattr(module, "_hf_hook"):
            raise ValueError(
                f"model must be in one place, but accelerate has put hooks on {path or 'it'}: "
                "accelerate.hooks.remove_hook_from_submodules(model) takes them off"
            )


def _layers_to_pack(model: nn.Module) -> tuple[list[list[nn.Module]], list[tuple[str, str]]]:
    """(the layers to pack, each in a group with the embeddings and layers that share its weight;
    path of each other one and why it is left, in words)."""
    holders = defaultdict(list)
    for module in model.modules():
        if not isinstance(module, QuantizedFactor):
            for parameter in own_parameters(module).values():
                holders[id(parameter)].append(module)
    layers, left, seen = [], [], set()
    for path, module in model.named_modules():
        if not isinstance(module, SVDLoRALinear | nn.Linear) or isinstance(module, PackedModule):
            continue
        if id(module) in seen:
            continue
        group, why = [module], _why_not_plain(module)
        if not why:
            weights = packed_weights(module).values()
            sharing = {id(m): m for weight in weights for m in holders[id(weight)]}
            group += [m for key, m in sharing.items() if key != id(module)]
            why = _why_not_shared(group)
        seen.update(map(id, group))
        if why:
            left.append((path or "the layer", why))
        else:
            layers.append(group)
    return layers, left


def _beside_compressed_ones(model: nn.Module) -> set[int]:
    """The ids of the linears that stand in one module with a compressed one."""
    found: set[int] = set()
    for module in model.modules():
        linears = [m for m in module.children() if isinstance(m, SVDLoRALinear | nn.Linear)]
        if any(isinstance(linear, SVDLoRALinear) for linear in linears):
            found.update(map(id, linears))
    return found


def _why_not_plain(layer: nn.Module) -> str:
    """The reason why no packed layer can replace this one, "" if there is none.

    Pruning, parametrizations, weight_norm, sharding and quantisation put other things in the place
    of a parameter, or make the class another.
    """
    if type(layer) not in (SVDLoRALinear, QuantizedLinear, nn.Linear):
        return f"its class is {type(layer).__name__}"
    for name in (*packed_class(layer).names, "bias"):
        found = getattr(layer, name, "nothing")
        if found is not layer._parameters.get(name) and not isinstance(found, QuantizedFactor):
            return f"its {name} is no parameter"
    for name, parameter in own_parameters(layer).items():
        if type(parameter) is not nn.Parameter or not parameter.is_leaf:
            return f"its {name} is no plain parameter but a {type(parameter).__name__}"
        if parameter.layout is not torch.strided or parameter.is_meta:
            return f"its {name} is on {parameter.device} with layout {parameter.layout}"
        if parameter.device.type == "cpu" and parameter.is_shared():  # all of a GPU's are
            return f"its {name} is shared with other processes"
    return ""


def _why_not_shared(group: list[nn.Module]) -> str:
    """The reason why no one set of panels serves the group; they serve a layer alone, or a linear
    and embeddings."""
    if any("forward" in vars(module) for module in group):  # another library has replaced it
        return "its forward has been replaced"
    first, *others = group
    if type(first) is nn.Linear:
        are_rows = all(type(m) is nn.Embedding and m.max_norm is None for m in others)
    else:
        dense = type(first) is QuantizedLinear and weights_of(first).is_dense
        are_rows = dense and all(type(module) is QuantizedEmbedding for module in others)
    if not others or are_rows:
        return ""
    return f"it shares a parameter with a {type(group[1]).__name__}"


def _why_not_faster(layer: nn.Module) -> str:
    reasons = backends.why_not_packed(weights_of(layer), dtype_of(layer)).items()
    return "; ".join(f"{name}: {reason}" for name, reason in reasons)


def _pack(layer: nn.Module, for_group: bool = False) -> PackedState | None:
    """The layer's packed weights, None where no backend is faster with them."""
    packed = backends.pack(weights_of(layer), dtype_of(layer), for_group)
    if packed is None:
        return None
    is_factors = isinstance(layer, SVDLoRALinear)
    count = layer.parameter_count(merged=False) if is_factors else layer.weight.numel()
    return PackedState(packed, packed_weights(layer), count)


def dtype_of(layer: nn.Module) -> torch.dtype:
    """The dtype that the layer computes in."""
    return layer.SVh.dtype if isinstance(layer, SVDLoRALinear) else layer.weight.dtype


def weights_of(layer: nn.Module) -> Weights:
    """A dense layer is the pivoted form at rank N, SVh its matrix."""
    if isinstance(layer, SVDLoRALinear):
        A, B = (None if t is None else t.to(layer.SVh.dtype) for t in (layer.A, layer.B))
        return Weights(*layer.stored(), A, B, layer.bias, layer.alpha, layer.pivots)
    weight: Tensor = layer.weight
    pivots = torch.arange(len(weight), dtype=torch.int32, device=weight.device)
    U = weight.new_empty(0, len(weight))
    return Weights(weight, U, bias=layer.bias, pivots=pivots)
