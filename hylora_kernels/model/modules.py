"""Modes of a model's modules: made empty, eval() for a while, all but the adapters frozen."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from hylora_kernels.layers.embedding import LowRankEmbedding
from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.layers.packed import packed_states
from hylora_kernels.layers.packed_parameter import PackedParameter
from hylora_kernels.layers.quantized import QuantizedEmbedding, QuantizedFactor, own_parameters
from hylora_kernels.model.by_block import in_memory
from hylora_kernels.support.hashing import all_tensors, fingerprint

_empty = threading.RLock()


@contextmanager
def empty_weights() -> Iterator[None]:
    """Parameters that are made inside are on the meta device; buffers hold what the model made.

    Nothing is drawn for the parameters: on meta, torch would take half of the time of making a
    model for it.

    One thread at a time: accelerate changes nn.Module for the whole process, and two threads that
    end in another order than they began would leave it changed.
    """
    with _empty, init_empty_weights(include_buffers=False), no_init_weights():
        yield


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """All modules in eval(); afterwards each is in its own mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def model_fingerprint(model: nn.Module) -> str:
    """20 hex digits that change with all that a model's outputs depend on: weights, config, and the
    scales of its adapters, which no state_dict holds. Weights in files are read one by one."""
    config = {k: v for k, v in model.config.to_dict().items() if not k.startswith("_")}
    scales = [layer.alpha for layer in model.modules() if isinstance(layer, SVDLoRALinear)]
    tensors = all_tensors(model).items()
    read = ((name, in_memory(model, name, tensor)) for name, tensor in tensors)
    return fingerprint(model=read, config=config, scales=scales)


def tensors_saved_once(model: nn.Module) -> list[Tensor]:
    """The tensors of the model's state_dict, each of several tied ones once."""
    state = model.state_dict(keep_vars=True)
    own = {id(t) if t.is_meta else (t.data_ptr(), t.shape): t for t in state.values()}
    return list(own.values())


def is_offloaded(model: nn.Module) -> bool:
    """True if weights are not in memory: their bytes, and so a fingerprint, would be read from disk
    layer by layer."""
    return any(parameter.is_meta for parameter in model.parameters())


def forget_ties_of_factors(model: nn.Module) -> None:
    """Have transformers' tie_weights() leave alone an embedding of factors or codes.

    Its head is tied by holding the same ones. tie_weights(), which lm-evaluation-harness calls on
    every model, would look for parameters that such an embedding hasn't, or has packed, and raise.
    """
    for module in model.modules():
        ties = getattr(module, "_tied_weights_keys", None)
        if isinstance(ties, dict):
            left = {head: own for head, own in ties.items() if not _is_of_factors(module, own)}
            if left != ties:
                vars(module)["_tied_weights_keys"] = left


def _is_of_factors(model: nn.Module, name: str) -> bool:
    """True if `name` is a weight or tensor of an embedding that is factors or codes."""
    path = name.rpartition(".")[0]
    while path:
        with contextlib.suppress(AttributeError):  # a pattern
            if isinstance(model.get_submodule(path), LowRankEmbedding | QuantizedEmbedding):
                return True
        path = path.rpartition(".")[0]
    return False


def keep_unscaled(model: nn.Module) -> None:
    """Have an RWKV compute with its weights as they were loaded.

    Its first forward in eval() divides some by powers of two, against overflow in float16, and
    notes it in an attribute, not in the checkpoint. A saved model divided them once more, silently,
    and the weight of an SVDLoRALinear can't be divided.
    """
    for module in model.modules():
        if hasattr(module, "layers_are_rescaled"):
            if module.layers_are_rescaled:
                training, module.training = module.training, True
                module._rescale_layers()  # multiplies them again
                module.training = training
            module.config.rescale_every = 0


def parameter_count(model: nn.Module) -> int:
    """The model's parameters, each once; of a quantised matrix the weights that its codes stand
    for, of a layer packed for inference those that it was packed from."""
    factors = {id(m.codes): m for m in model.modules() if type(m) is QuantizedFactor}
    codes = {id(p) for m in factors.values() for p in m.parameters()}
    plain = [p for p in model.parameters() if id(p) not in codes]
    return (
        sum(p.numel() for p in plain if not isinstance(p, PackedParameter))
        + sum(m.numel() for m in factors.values())
        + sum(state.count for state in packed_states(model))
    )


def holder_counts(model: nn.Module) -> Counter[int]:
    """id of a parameter -> the number of modules that hold it themselves; those of a quantised
    matrix count as its layer's."""
    return Counter(
        id(p)
        for module in model.modules()
        if not isinstance(module, QuantizedFactor)
        for p in own_parameters(module).values()
    )


def base_of(layer: SVDLoRALinear) -> tuple[int, int]:
    """Values that layers with the same SVh and U share, which another module may hold too."""
    SVh, U = (getattr(factor, "codes", factor) for factor in (layer.SVh, layer.U))
    return id(SVh), id(U)


def unshared_layers(model: nn.Module) -> dict[str, SVDLoRALinear]:
    """path -> SVDLoRALinear, without those whose factors another module holds too, as a head with a
    low-rank embedding. A layer that is used in several places stands under each path."""
    counts, named = holder_counts(model), model.named_modules(remove_duplicate=False)
    layers = ((path, layer) for path, layer in named if isinstance(layer, SVDLoRALinear))
    return {path: m for path, m in layers if all(counts[factor] == 1 for factor in base_of(m))}


def freeze_all_but_adapters(model: nn.Module) -> nn.Module:
    """Let only A and B of the SVDLoRALinears require gradients; returns the model."""
    model.requires_grad_(False)
    for layer in model.modules():
        if isinstance(layer, SVDLoRALinear) and layer.A is not None:
            layer.A.requires_grad_()
            layer.B.requires_grad_()
    return model
