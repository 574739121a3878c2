"""The modules whose weights are packed for inference, and the way there and back.

A packed layer keeps its place, its name, its hooks and its parameter objects; its class changes and
its parameters give their memory up (packed_parameter.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary, ref

import torch
from torch import Tensor, nn

from hylora_kernels import backends
from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.layers.packed_parameter import RESTORE_HINT, PackedParameter
from hylora_kernels.layers.quantized import (
    QuantizedEmbedding,
    QuantizedFactor,
    QuantizedLinear,
    own_parameters,
    stored_parts,
)
from hylora_kernels.ops.packed import packed_embedding, packed_linear
from hylora_kernels.weights import QuantizedMatrix


class PackedState:
    """The packed weights of one layer, or of several that share them.

    wider:      numbers of parameters of a wider dtype than the packed one (float32 masters of an
                adapter), since panels would not hold them exactly.
    count:      the parameters that it was packed from; of codes the weights that they stand for.
    tensors:    all tensors that hold numbers.
    parameters: the emptied parameters; modules: the layers. Both live elsewhere.
    """

    def __init__(self, packed, parameters: dict[str, nn.Parameter], count: int):
        self.packed, self.count = packed, count
        floats = {n: p for n, p in parameters.items() if p.is_floating_point()}
        self.wider = {n: p.detach() for n, p in floats.items() if p.dtype != packed.dtype}
        self.plain_bytes = sum(p.nbytes for p in parameters.values())
        self.tensors = [*packed.tensors, *self.wider.values()]
        self.parameters: WeakValueDictionary[str, PackedParameter] = WeakValueDictionary()
        self.modules: WeakSet[PackedModule] = WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, whose parameters and modules enter themselves."""
        return {n: value for n, value in vars(self).items() if n not in ("parameters", "modules")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, parameters=WeakValueDictionary(), modules=WeakSet())

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    def plain(self) -> dict[str, Tensor]:
        """Parameter name -> its numbers, bit for bit as they were packed, in new memory."""
        weights = backends.unpack(self.packed)
        plain: dict[str, Tensor] = {}
        for name in ("SVh", "U", "A", "B"):
            value = getattr(weights, name)
            if isinstance(value, QuantizedMatrix):
                plain |= stored_parts(name, value)
            elif value is not None:
                plain[name] = value
        if isinstance(weights.SVh, Tensor):
            plain["weight"] = weights.SVh
        return plain | {name: values.clone() for name, values in self.wider.items()}

    def restore(self) -> None:
        """Turn all layers that read it back into their plain classes, with the parameters that they
        had, of the same bits. A failure leaves all of them packed."""
        with torch.inference_mode(False), torch.no_grad():
            plain = self.plain()
            refilled = [(p, p.packed.refilled(plain[name])) for name, p in self.parameters.items()]
            for parameter, values in refilled:
                parameter.restore(values)
        for module in self.modules:
            module._become_plain()
        _count_conversion()


# How many times layers of this process were packed or restored. Asking after the tensors of a model
# takes 0.8 ms behind a token, since its weights have driven them out of the caches.
_conversions = 0


def conversions() -> int:
    """A number that is another one once any layer of this process was packed or restored."""
    return _conversions


def _count_conversion() -> None:
    global _conversions
    _conversions += 1


# state of layers that share a weight -> name -> the copy that the last state_dict() call got of it,
# so that tied layers put one tensor into a checkpoint
_last_export: WeakKeyDictionary[PackedState, dict[str, ref]] = WeakKeyDictionary()


class Columns(NamedTuple):
    """The columns [begin, end) of a group's output [..., width]; width is never K."""

    begin: int
    end: int
    width: int


class PackedModule(nn.Module):
    """A layer whose parameters `names` are packed in `packed_state`.

    packed_parameters: these parameters, emptied. They are outside of _parameters, so that tools
                       that sum, move or replace parameters never meet them.
    order:             the names of all its parameters, in the order that optimizers count by.
    columns:           its place in the output of its group, which its block hands to it in the
                       place of x (grouped.py); None for a layer without a group.
    """

    names: tuple[str, ...]
    fixed: tuple[str, ...] = ()  # other attributes that are packed as well
    plain_class: type[nn.Module]
    columns: Columns | None = None
    packed_state: PackedState
    packed_parameters: dict[str, PackedParameter]
    order: tuple[str, ...]

    def forward(self, x: Tensor) -> Tensor:
        columns = self.columns
        if columns is not None and x.dim() and x.size(-1) == columns.width:
            return x[..., columns.begin : columns.end]
        return packed_linear(x, self.packed_state.packed, self._bias_now())

    def restore(self) -> None:
        """Turn the layer, and all that share its weights, back into their plain classes."""
        self.packed_state.restore()

    def _become_plain(self) -> None:
        there = self.packed_parameters | self._parameters
        in_order = {name: there[name] for name in self.order if name in there}
        self._parameters.clear()
        self._parameters.update(in_order | there)
        if "packed_pivots" in self._buffers:
            self._buffers["pivots"] = self._buffers["packed_pivots"]
        for name in [name for name in self._buffers if name.startswith("packed_")]:
            delattr(self, name)
        vars(self).pop("columns", None)
        del self.packed_state, self.packed_parameters, self.order
        self.__class__ = self.plain_class  # type: ignore[assignment]

    def __setstate__(self, state):
        super().__setstate__(state)
        self.packed_state.modules.add(self)

    def _bias_now(self) -> Tensor | None:
        """self.bias, which a pruned layer holds elsewhere; nn.Module takes 0.7 us longer to ask."""
        if "bias" in self._parameters:
            return self._parameters["bias"]
        return self.bias

    def train(self, mode: bool = True):
        if mode:
            raise RuntimeError(f"a layer packed for inference can't be trained: {RESTORE_HINT}")
        return nn.Module.train(self, False)

    def requires_grad_(self, requires_grad: bool = True):
        if requires_grad:
            raise RuntimeError(f"a layer packed for inference has no gradients: {RESTORE_HINT}")
        return super().requires_grad_(False)

    def __setattr__(self, name, value):
        if name in self.names or name in self.fixed:
            if value is getattr(self, name):  # weights that are tied already are tied again
                return
            raise RuntimeError(f"{name} is packed for inference and can't be set: {RESTORE_HINT}")
        super().__setattr__(name, value)

    def __delattr__(self, name):
        if name in self.names or name in self.fixed:
            raise RuntimeError(
                f"{name} is packed for inference and can't be deleted: {RESTORE_HINT}"
            )
        super().__delattr__(name)

    def register_parameter(self, name, param):
        if isinstance(param, PackedParameter):  # torch.nn.utils.prune would give it another name
            raise RuntimeError(
                f"{param.packed.name} is packed for inference and can't become {name}:"
                f" {RESTORE_HINT}"
            )
        super().register_parameter(name, param)

    def _apply(self, fn, recurse=True):
        """No-op if dtypes and device stay the same, share_memory() included; otherwise restore the
        plain layer, and with it everything tied to it, and move that."""
        mine = [*self.packed_state.tensors, *self._parameters.values()]
        probes = [tensor.new_empty(0) for tensor in mine if tensor is not None]
        if all(fn(probe) is probe and not probe._version for probe in probes):
            return super()._apply(fn, recurse)
        self.restore()
        return self._apply(fn, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        for name, values in self._exported(destination, keep_vars).items():
            destination[prefix + name] = values
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if "packed_pivots" in self._buffers and "pivots" not in self._non_persistent_buffers_set:
            destination[prefix + "pivots"] = self._buffers["packed_pivots"].clone()

    def _exported(self, destination, keep_vars) -> dict[str, Tensor]:
        if keep_vars:
            return dict(self.packed_parameters)
        names = {name: p.packed.name for name, p in self.packed_parameters.items()}
        last = _last_export.get(self.packed_state, {})
        exported = {name: last.get(key, lambda: None)() for name, key in names.items()}
        there = set(map(id, destination.values()))
        if all(value is not None and id(value) in there for value in exported.values()):
            return {name: value.detach() for name, value in exported.items()}  # tied
        plain = self.packed_state.plain()
        _last_export[self.packed_state] = {key: ref(value) for key, value in plain.items()}
        return {name: plain[key] for name, key in names.items()}

    def _load_from_state_dict(
        self, state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        error_msgs.append(f"{prefix[:-1] or 'the layer'} is packed for inference: {RESTORE_HINT}")


def _packed_parameter(name: str) -> property:
    return property(
        lambda self: self.packed_parameters.get(name, self._modules.get(name)),
        doc=f"The emptied {name}; reads as a copy. A QuantizedFactor where it is codes.",
    )


class _PackedFactors(PackedModule):
    """What packed layers with two factors have in common."""

    names, fixed = ("SVh", "U", "A", "B"), ("alpha", "pivots")
    SVh, U, A, B = (_packed_parameter(name) for name in names)

    @property
    def pivots(self) -> Tensor | None:  # type: ignore[override]
        """A copy, as an inference tensor: a write to it raises instead of being lost."""
        with torch.inference_mode():
            pivots = self._buffers.get("packed_pivots")
            return None if pivots is None else pivots.clone()

    def merge(self):
        if self.lora_rank:
            raise RuntimeError(f"a layer packed for inference can't be merged: {RESTORE_HINT}")
        return self


class PackedSVDLoRALinear(_PackedFactors, SVDLoRALinear):
    """An SVDLoRALinear that optimize_for_inference has packed."""

    plain_class = SVDLoRALinear


class PackedQuantizedLinear(_PackedFactors, QuantizedLinear):
    """A QuantizedLinear that optimize_for_inference has packed, and with it its factors."""

    plain_class = QuantizedLinear


class PackedFactor(PackedModule, QuantizedFactor):
    """A QuantizedFactor whose codes the layers that hold it have packed."""

    names, plain_class = ("codes", "scales", "zeros"), QuantizedFactor
    codes, scales, zeros = (_packed_parameter(name) for name in names)


class PackedLinear(PackedModule, nn.Linear):
    """An nn.Linear that optimize_for_inference has packed."""

    names, plain_class = ("weight",), nn.Linear
    weight = _packed_parameter("weight")


class PackedEmbedding(PackedModule, nn.Embedding):
    """An nn.Embedding that reads the panels of the linear it is tied to."""

    names, plain_class = ("weight",), nn.Embedding
    weight = _packed_parameter("weight")

    def forward(self, ids: Tensor) -> Tensor:
        return packed_embedding(ids, self.packed_state.packed)


class PackedQuantizedEmbedding(PackedModule, QuantizedEmbedding):
    """A QuantizedEmbedding that reads the packed codes of the linear it is tied to."""

    names, plain_class = (), QuantizedEmbedding

    def forward(self, ids: Tensor) -> Tensor:
        return packed_embedding(ids, self.packed_state.packed)


_CLASSES = (
    *(PackedSVDLoRALinear, PackedLinear, PackedEmbedding),
    *(PackedQuantizedLinear, PackedQuantizedEmbedding, PackedFactor),
)


def convert_layers(modules: list[nn.Module], state: PackedState) -> None:
    """Make the layers ones that read the packed weights, and take the memory of their own."""
    _count_conversion()
    first = modules[0]
    if type(first) is SVDLoRALinear:
        backends.forget(first.SVh)
    for name, parameter in packed_weights(first).items():
        PackedParameter.of(parameter, state, name)
    for module in modules:
        _convert(module, state)
        # Buffers, so that sums of memory count them.
        for index, tensor in enumerate(state.tensors):
            module.register_buffer(f"packed_{index}", tensor, persistent=False)
        if module._buffers.get("pivots") is not None:
            module.register_buffer("packed_pivots", module._buffers.pop("pivots"), persistent=False)
        for factor in module.children():
            if type(factor) is QuantizedFactor:
                _convert(factor, state)


def _convert(module: nn.Module, state: PackedState) -> None:
    own = module._parameters
    emptied = {name: p for name, p in own.items() if isinstance(p, PackedParameter)}
    vars(module).update(packed_state=state, packed_parameters=emptied, order=tuple(own))
    for name in emptied:  # A and B stay None where a merged layer has them so
        del own[name]
    module.__class__ = packed_class(module)
    state.modules.add(module)  # type: ignore[arg-type]


def packed_class(module: nn.Module) -> type[PackedModule]:
    return next(c for c in _CLASSES if c.plain_class is type(module))


def packed_weights(layer: nn.Module) -> dict[str, nn.Parameter]:
    """name -> parameter of all that packing the layer empties, SVh.codes for one of a factor's."""
    found = {}
    for name, parameter in own_parameters(layer).items():
        owner, _, _ = name.rpartition(".")
        if name.rpartition(".")[2] in packed_class(layer.get_submodule(owner)).names:
            found[name] = parameter
    return found


def refuse_packed(model: nn.Module) -> None:
    """Raise ValueError if a layer is packed for inference: it can't be trained or replaced."""
    if packed_states(model) or any(isinstance(p, PackedParameter) for p in model.parameters()):
        raise ValueError(f"model must not be packed for inference: {RESTORE_HINT}")


def packed_states(model: nn.Module) -> list[PackedState]:
    """The states of the model's packed layers, each once."""
    found = {
        id(m.packed_state): m.packed_state for m in model.modules() if isinstance(m, PackedModule)
    }
    return list(found.values())
