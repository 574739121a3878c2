"""optimize_for_inference and its undo: a model's weights in the layout that its backend reads best.

A packed layer keeps its place, its name and its hooks; its class changes (SVDLoRALinear to
PackedSVDLoRALinear), its weights lie in panels and the plain ones are freed. `layer.U`,
`layer.weight` and `state_dict()` still give plain weights, as copies made when asked for.
"""

from __future__ import annotations

import logging
from collections import defaultdict

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hylora_kernels import backends
from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.layers.packed import PackedModule, PackedState, convert_layer, packed_class
from hylora_kernels.weights import Weights

_log = logging.getLogger(__name__)
_FROZEN = "hylora_frozen"  # on an optimised model: names of parameters that required grad


def optimize_for_inference(model: nn.Module) -> nn.Module:
    """Lay out the weights of a model in eval() for the fastest decoding; in place, the same model.

    SVDLoRALinear and nn.Linear layers, the output head among them, are packed where a backend is
    faster so (the CPU's, in bfloat16, float16 and float32); an embedding that is tied to the head
    reads the head's panels. Everything else stays as it is, and one line of the log says so. The
    plain weights are freed layer by layer; state_dict() and save_pretrained give them as before.
    There is no backward until restore_from_inference(model): all parameters stop requiring grad.
    model.to(...) to another dtype or device restores first.
    Raises ValueError for a model in training mode or one that accelerate has spread over devices.

        optimize_for_inference(model.eval())
        tokens = model.generate(ids)
    """
    _check(model)
    packed, layers = set(), _layers_to_pack(model)
    # Made under inference_mode, panels and all restored from them would be inference tensors.
    with torch.inference_mode(False), torch.no_grad():
        for modules in tqdm(layers, desc="packing", unit="layer", delay=2):
            state = _pack(modules[0])
            if state is not None:
                packed.add(state)
                for module in modules:
                    convert_layer(module, state)
    if packed:
        frozen = [n for n, p in model.named_parameters() if p.requires_grad]
        vars(model)[_FROZEN] = (*vars(model).get(_FROZEN, ()), *frozen)
        model.requires_grad_(False)
    _log_summary(packed, layers)
    return model


def restore_from_inference(model: nn.Module) -> nn.Module:
    """Undo optimize_for_inference: the same parameters, bit for bit, requires_grad as before; in
    place, the same model. A model that isn't optimised stays as it is."""
    for module in list(model.modules()):
        if isinstance(module, PackedModule):
            module.restore()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in vars(model).pop(_FROZEN, ()):
        if name in parameters:
            parameters[name].requires_grad_(True)
    return model


def _log_summary(packed: set[PackedState], layers: list[list[nn.Module]]) -> None:
    """One line of the log: what was packed, and why the first of the others was not."""
    left = [group[0] for group in layers if not isinstance(group[0], PackedModule)]
    why = ""
    if left:
        reasons = backends.why_not_packed(_weights_of(left[0])).items()
        why = f" ({'; '.join(f'{name}: {reason}' for name, reason in reasons)})"
    plain, panels = sum(h.plain_bytes for h in packed), sum(h.nbytes for h in packed)
    _log.log(
        logging.WARNING if left and not packed else logging.INFO,
        "optimize_for_inference: packed %d layers, %.1f MB in %.1f MB; left %d as they are%s",
        *(len(packed), plain / 1e6, panels / 1e6, len(left), why),
    )


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


def _layers_to_pack(model: nn.Module) -> list[list[nn.Module]]:
    """The layers to pack, each in a group with the embeddings and layers that share its weight.

    Left out: subclasses, weights that other modules read, and tensors that are not plain ones on
    the CPU, since no packed layer can replace these.
    """
    holders = defaultdict(list)
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders[id(parameter)].append(module)
    layers, seen = [], set()
    for module in model.modules():
        if type(module) not in (SVDLoRALinear, nn.Linear) or id(module) in seen:
            continue
        weights = [module._parameters.get(name) for name in packed_class(module).names]
        weights = [weight for weight in weights if weight is not None]
        sharing = {id(m): m for weight in weights for m in holders[id(weight)]}
        group = [module, *(m for key, m in sharing.items() if key != id(module))]
        if weights and all(_is_plain(weight) for weight in weights) and _can_share(group):
            layers.append(group)
            seen.update(map(id, group))
    return layers


def _is_plain(weight: Tensor) -> bool:
    return type(weight) in (Tensor, nn.Parameter) and weight.device.type == "cpu"


def _can_share(group: list[nn.Module]) -> bool:
    """True where one set of panels serves the group: a layer alone, or a linear and embeddings."""
    if any("forward" in vars(module) for module in group):  # another library has replaced it
        return False
    others = all(type(module) is nn.Embedding and module.max_norm is None for module in group[1:])
    return len(group) == 1 or (type(group[0]) is nn.Linear and others)


def _pack(layer: nn.Module) -> PackedState | None:
    """The layer's packed weights, None where no backend is faster with them."""
    packed = backends.pack(_weights_of(layer))
    names = packed_class(layer).names
    return packed and PackedState(packed, {name: layer._parameters.get(name) for name in names})


def _weights_of(layer: nn.Module) -> Weights:
    """A dense layer is the pivoted form at rank N, SVh its matrix."""
    if isinstance(layer, SVDLoRALinear):
        A, B = (None if t is None else t.to(layer.SVh.dtype) for t in (layer.A, layer.B))
        return Weights(layer.SVh, layer.U, A, B, layer.bias, layer.alpha, layer.pivots)
    weight = layer.weight
    U, pivots = weight.new_empty(0, len(weight)), torch.arange(len(weight), dtype=torch.int32)
    return Weights(weight, U, bias=layer.bias, pivots=pivots)
