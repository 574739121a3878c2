"""optimize_for_inference and its undo: a model's weights in the layout that its backend reads.

An optimised layer keeps its place, its name and its hooks; only its class changes
(SVDLoRALinear to PackedSVDLoRALinear), and its weights lie in panels, the plain ones freed. Read as
before, `layer.U`, `layer.weight` and `state_dict()` give plain copies, made when asked for.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hylora_kernels import backends
from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.ops import packed_embedding, packed_linear

_log = logging.getLogger(__name__)
_RESTORE = "restore_from_inference(model) first"
_FROZEN = "hylora_frozen"  # on an optimised model: names of parameters that required grad


def optimize_for_inference(model: nn.Module) -> nn.Module:
    """Lay out the weights of a model in eval() for the fastest decoding; in place, the same model.

    Packed are SVDLoRALinear layers and plain nn.Linear layers, the output head among them, where a
    backend gains by it (the CPU's, in bfloat16, float16 and float32); an embedding that is tied to
    the head is served from the head's panels. Everything else is left as it is, which one line of
    the log tells. The plain weights are freed layer by layer; state_dict() and save_pretrained give
    them as before. There is no backward until restore_from_inference(model): all parameters stop
    requiring grad. model.to(...) to another dtype or device restores first.
    Raises ValueError for a model in training mode or one that accelerate has spread over devices.
    """
    _check(model)
    packed, layers = set(), _layers_to_pack(model)
    # Panels made under inference_mode would be inference tensors, and so would what comes of them.
    with torch.inference_mode(False), torch.no_grad():
        for modules in tqdm(layers, desc="packing", unit="layer", delay=2):
            held = _pack(modules[0])
            if held is not None:
                packed.add(held)
                for module in modules:
                    _take(module, held)
    if packed:
        frozen = [n for n, p in model.named_parameters() if p.requires_grad]
        vars(model)[_FROZEN] = (*vars(model).get(_FROZEN, ()), *frozen)
        model.requires_grad_(False)
    _tell(packed, layers)
    return model


def restore_from_inference(model: nn.Module) -> nn.Module:
    """Undo optimize_for_inference: the same parameters, bit for bit, requires_grad as before; in
    place, the same model. A model that isn't optimised stays as it is."""
    for module in list(model.modules()):
        if isinstance(module, _Packed):
            module.restore()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in vars(model).pop(_FROZEN, ()):
        if name in parameters:
            parameters[name].requires_grad_(True)
    return model


def _tell(packed: set[_Held], layers: list[list[nn.Module]]) -> None:
    """One line of the log: what was packed, and why the first of the others was not."""
    left = [group[0] for group in layers if not isinstance(group[0], _Packed)]
    why = ""
    if left:
        reasons = backends.why_not_packed(*_factors(left[0])).items()
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
    """The layers, each with the embeddings (and twins) that share its weight, to be packed as one.

    Left out is whatever a packed layer can't stand in for: a subclass with ideas of its own, a
    weight that other modules read, a tensor that is no plain one on the CPU.
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
        weights = [module._parameters.get(name) for name in _packed_class(module).names]
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
    """Whether one set of panels serves them all: a layer alone, or one linear and embeddings."""
    if any("forward" in vars(module) for module in group):  # put there by someone else
        return False
    others = all(type(module) is nn.Embedding and module.max_norm is None for module in group[1:])
    return len(group) == 1 or (type(group[0]) is nn.Linear and others)


def _pack(layer: nn.Module) -> _Held | None:
    """The layer's weights as the chosen backend wants them; None where none gains by it."""
    SVh, U, A, B, bias, pivots = _factors(layer)
    alpha = layer.alpha if isinstance(layer, SVDLoRALinear) else 1.0
    packed = backends.pack(SVh, U, A, B, bias, alpha, pivots)
    names = _packed_class(layer).names
    return packed and _Held(packed, {name: layer._parameters.get(name) for name in names})


def _factors(layer: nn.Module) -> tuple[Tensor | None, ...]:
    """SVh, U, A, B, bias, pivots; a dense layer is the pivoted form at rank N, SVh its matrix."""
    if isinstance(layer, SVDLoRALinear):
        A, B = (None if t is None else t.to(layer.SVh.dtype) for t in (layer.A, layer.B))
        return layer.SVh, layer.U, A, B, layer.bias, layer.pivots
    weight = layer.weight
    U, pivots = weight.new_empty(0, len(weight)), torch.arange(len(weight), dtype=torch.int32)
    return weight, U, None, None, layer.bias, pivots


class _Held:
    """What the layers that share a weight hold together once it is packed.

    wider: parameters of a wider dtype than the packed one (float32 masters of an adapter), which
           panels don't hold exactly: they stay.
    """

    def __init__(self, packed, parameters: dict[str, nn.Parameter | None]):
        self.packed = packed
        there = {name: p for name, p in parameters.items() if p is not None}
        self.needed_grad = {name: p.requires_grad for name, p in there.items()}
        self.wider = {name: p for name, p in there.items() if p.dtype != packed.dtype}
        self.count = sum(p.numel() for p in there.values())
        self.plain_bytes = sum(p.nbytes for p in there.values())
        self.tensors = [*packed.tensors, *(p.detach() for p in self.wider.values())]
        self.restored: dict[str, nn.Parameter | None] | None = None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    def plain(self) -> dict[str, Tensor | None]:
        """SVh, U, A, B of an SVDLoRALinear or weight of a dense layer, as they were."""
        if self.restored is not None:
            return self.restored
        if "weight" in self.needed_grad:
            return {"weight": backends.unpack(self.packed)[0]}
        plain = dict(zip(("SVh", "U", "A", "B"), backends.unpack(self.packed)[:4], strict=True))
        return plain | self.wider

    def parameters(self) -> dict[str, nn.Parameter | None]:
        """The same as parameters, made once: tied layers get the same one back."""
        if self.restored is None:
            with torch.inference_mode(False), torch.no_grad():
                self.restored = {
                    name: None if t is None else nn.Parameter(t, self.needed_grad[name])
                    for name, t in self.plain().items()
                }
        return self.restored


# --------------------------------------------------------------------------------- optimised layers


def _take(layer: nn.Module, held: _Held) -> None:
    """Turn the layer into one that reads the packed weights, and drop its own."""
    packed_class = _packed_class(layer)
    if isinstance(layer, SVDLoRALinear):
        backends.forget(layer.SVh)
    for name in packed_class.names:
        layer._parameters.pop(name, None)
    layer.held = held
    for index, tensor in enumerate(held.tensors):  # seen by whoever sums up a model's memory
        layer.register_buffer(f"packed_{index}", tensor, persistent=False)
    layer.__class__ = packed_class


# state of layers that share a weight -> what the last state_dict() call got of it
_lent: WeakKeyDictionary[_Held, ref] = WeakKeyDictionary()


class _Packed(nn.Module):
    """A layer whose parameters `names` lie in `held`."""

    names: tuple[str, ...]
    plain_class: type[nn.Module]
    held: _Held

    def restore(self) -> None:
        """Make the layer what it was, with parameters of the same bits."""
        held = self.held
        own, buffers = self._parameters.copy(), len(held.tensors)
        self.__class__ = self.plain_class
        self._parameters.clear()
        self._parameters.update({**held.parameters(), **own})
        del self.held
        for index in range(buffers):
            delattr(self, f"packed_{index}")

    def train(self, mode: bool = True):
        if mode:
            raise RuntimeError(f"a layer packed for inference can't be trained: {_RESTORE}")
        return nn.Module.train(self, False)

    def __setattr__(self, name, value):
        if name in self.names:
            raise RuntimeError(f"{name} is packed for inference and can't be set: {_RESTORE}")
        super().__setattr__(name, value)

    def _apply(self, fn, recurse=True):
        """To the dtype and device that it has already, nothing is to be done; to others it goes as
        what it was, with everything tied to it (the next layer finds its parameter restored)."""
        probe = torch.empty(0, dtype=self.held.packed.dtype)
        moved = fn(probe)
        if (moved.dtype, moved.device) == (probe.dtype, probe.device):
            return self
        self.restore()
        return self._apply(fn, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        lent = _lent.get(self.held, lambda: None)()
        if lent is not None and any(value is lent for value in destination.values()):
            plain = {"weight": lent.detach()}  # tied, and already there
        else:
            plain = self.held.plain()
            if "weight" in plain:
                _lent[self.held] = ref(plain["weight"])
        for name, tensor in plain.items():
            if tensor is not None:
                is_parameter = isinstance(tensor, nn.Parameter)
                destination[prefix + name] = (
                    tensor.detach() if is_parameter and not keep_vars else tensor
                )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        error_msgs.append(f"{prefix[:-1] or 'the layer'} is packed for inference: {_RESTORE}")


def _copy_of(name: str) -> property:
    """A plain copy on every access. An inference tensor, so that a write to it is an error instead
    of being lost."""

    def read(self: _Packed) -> Tensor | None:
        with torch.inference_mode():
            return self.held.plain()[name]

    return property(read, doc=f"A copy of the packed {name}, to read.")


class PackedSVDLoRALinear(_Packed, SVDLoRALinear):
    """An SVDLoRALinear that optimize_for_inference has packed."""

    names, plain_class = ("SVh", "U", "A", "B"), SVDLoRALinear
    SVh, U, A, B = (_copy_of(name) for name in names)

    def forward(self, x: Tensor) -> Tensor:
        return packed_linear(x, self.held.packed)

    @property
    def rank(self) -> int:
        return self.held.packed.rank

    @property
    def lora_rank(self) -> int:
        return self.held.packed.lora_rank

    def parameter_count(self, merged: bool = True) -> int:
        return super().parameter_count(True) if merged else self.held.count

    def merge(self) -> SVDLoRALinear:
        if self.lora_rank:
            raise RuntimeError(f"a layer packed for inference can't be merged: {_RESTORE}")
        return self

    def to_linear(self) -> nn.Linear:
        plain = SVDLoRALinear.from_factors(
            **self.held.plain(), bias=self.bias, alpha=self.alpha, pivots=self.pivots
        )
        return plain.eval().to_linear()


class PackedLinear(_Packed, nn.Linear):
    """An nn.Linear that optimize_for_inference has packed."""

    names, plain_class = ("weight",), nn.Linear
    weight = _copy_of("weight")

    def forward(self, x: Tensor) -> Tensor:
        return packed_linear(x, self.held.packed)


class PackedEmbedding(_Packed, nn.Embedding):
    """An nn.Embedding that reads the panels of the linear it is tied to."""

    names, plain_class = ("weight",), nn.Embedding
    weight = _copy_of("weight")

    def forward(self, ids: Tensor) -> Tensor:
        return packed_embedding(ids, self.held.packed)


def _packed_class(module: nn.Module) -> type[_Packed]:
    classes = (PackedSVDLoRALinear, PackedLinear, PackedEmbedding)
    return next(c for c in classes if c.plain_class is type(module))


def refuse_packed(model: nn.Module) -> None:
    """Raise ValueError where layers are packed for inference, and can't be trained or replaced."""
    if held_by(model):
        raise ValueError(f"model must not be packed for inference: {_RESTORE}")


def held_by(model: nn.Module) -> list[_Held]:
    """What the model's optimised layers hold in the place of parameters, each once."""
    found = {id(m.held): m.held for m in model.modules() if isinstance(m, _Packed)}
    return list(found.values())
