"""PEFT on compressed models: SVDLoRALinear and QuantizedLinear as targets of a LoraConfig.

Importing this module enters LowRankLoraModel in PEFT's table of tuners, where get_peft_model,
PeftModel and transformers' add_adapter look for one. It happens when peft is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PEFT_TYPE_TO_TUNER_MAPPING, LoraConfig, LoraModel, PeftType
from peft.tuners import lora
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_adapters_to_merge,
)
from torch import Tensor, nn

from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.layers.packed import refuse_packed
from hylora_kernels.layers.quantized import QuantizedLinear
from hylora_kernels.model.adapters import log_rounding
from hylora_kernels.weights import Weights

# Values of LoraConfig.init_lora_weights that leave the base as it is.
INITS = (True, False, "gaussian", "orthogonal")
# Fields of LoraConfig that ask for another forward than LoRA's.
VARIANTS = (
    *("use_dora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "velora_config"),
    *("monteclora_config", "kasa_config"),
)


class LowRankLoraModel(LoraModel):
    """PEFT's LoraModel, which wraps an SVDLoRALinear or QuantizedLinear in a LoraLowRankLinear.

    target_modules="all-linear" selects these as well as what is left dense, but not the output
    head. Raises ValueError for a packed model, and where a target is one of ours for a variant of
    LoRA or an initialisation that changes the base.
    """

    def _prepare_model(self, peft_config: LoraConfig, model: nn.Module) -> None:
        refuse_packed(model)
        super()._prepare_model(peft_config, model)
        peft_config._register_custom_module({SVDLoRALinear: LoraLowRankLinear})
        ours, targets = _low_rank_linears(model), peft_config.target_modules
        if isinstance(targets, str) and targets.lower() == "all-linear":
            _maybe_include_all_linear_layers(peft_config, model)
            head = getattr(model, "get_output_embeddings", lambda: None)()
            body = {path for path, module in ours.items() if module is not head}
            peft_config.target_modules = {*peft_config.target_modules, *body}
        if any(self._check_target_module_exists(peft_config, path) for path in ours):
            _check_config(peft_config)

    def merge_adapter(self, *args: Any, **kw: Any) -> None:
        with _rounding_logged(self.model):
            super().merge_adapter(*args, **kw)

    def _unload_and_optionally_merge(self, *args: Any, **kw: Any) -> nn.Module:
        with _rounding_logged(self.model), _ties_kept(self.model):
            return super()._unload_and_optionally_merge(*args, **kw)


class LoraLowRankLinear(lora.Linear):
    """x [..., K] -> y [..., N] = base(x) + the sum over active adapters of scaling x A^T B^T.

    base_layer: SVDLoRALinear or QuantizedLinear, frozen. An adapter of its own stays apart from
                PEFT's, in training and in merge().

    A single adapter is the op's A and B, so that one call computes all. They are cast to the base's
    dtype, as SVDLoRALinear casts float32 masters.
    """

    # The base before merge(), in a list since it is no part of the model meanwhile.
    _unmerged: list[SVDLoRALinear]

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features

    @property
    def lora_variants(self) -> dict:
        return {(): None}

    def forward(self, x: Tensor, *args: Any, **kw: Any) -> Tensor:
        name = None if args or kw else self._only_adapter()
        if name is None:
            return super().forward(x, *args, **kw)
        base, scaling = self.base_layer, self.scaling[name]
        A, B = (m[name].weight.to(base.SVh.dtype) for m in (self.lora_A, self.lora_B))
        return base._op(x, *base.stored(), A, B, base.bias, scaling, base.pivots)

    def _only_adapter(self) -> str | None:
        """The name of the only adapter, if the op can add it: nothing acts on its input, its
        products or the base's call."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        base = self.base_layer
        if self.disable_adapters or self.merged or len(names) != 1 or base.lora_rank:
            return None
        A, B, dropout = (m[names[0]] for m in (self.lora_A, self.lora_B, self.lora_dropout))
        drops = self.training and not isinstance(dropout, nn.Identity)
        whole = all(type(m.weight) is nn.Parameter for m in (A, B))  # No shard of one.
        return names[0] if whole and not drops and all(map(_is_plain, (base, A, B))) else None

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put a base in the place of base_layer into which adapters are folded, at rank r + the sum
        of theirs; the base's own adapter stays as it is.

        A QuantizedLinear is rounded to the same bits, and base_layer.merge_error says what that
        cost. safe_merge: raise ValueError, with nothing changed, for factors that are not finite.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.lora_A]
        if not names:
            return
        base = self.base_layer
        made = _folded(base, *self._stacked(names))
        bias = self._merged_bias(base.bias, names)
        if safe_merge:
            tensors = (*made.parameters(), *(() if bias is None else (bias,)))
            if not all(t.isfinite().all() for t in tensors if t.is_floating_point()):
                raise ValueError(f"adapters {names} must be finite to be merged, but they aren't")
        made.bias = bias
        self._unmerged = getattr(self, "_unmerged", None) or [base]
        self.base_layer = made
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the base of before merge() back, bit for bit."""
        if self.merged_adapters:
            merged, self.base_layer = self.base_layer, self._unmerged.pop()
            self.base_layer.to(merged.SVh.device).train(merged.training)
            self.merged_adapters.clear()

    def _stacked(self, names: list[str]) -> tuple[Tensor, Tensor]:
        """A [ra, K] and B [N, ra] of adapters side by side, their scaling in B."""
        A = [self.lora_A[name].weight for name in names]
        B = [self.lora_B[name].weight * self.scaling[name] for name in names]
        return torch.cat(A), torch.cat(B, 1)

    def _merged_bias(self, bias: nn.Parameter | None, names: list[str]) -> nn.Parameter | None:
        """The bias with those of adapters (lora_bias=True) added."""
        added = [self.lora_B[n].bias * self.scaling[n] for n in names if self.lora_bias[n]]
        if not added:
            return bias
        if bias is None:
            raise ValueError("lora_bias=True can't be merged into a layer without a bias")
        return nn.Parameter(bias + sum(added).to(bias.dtype), requires_grad=bias.requires_grad)


def _is_plain(module: nn.Module) -> bool:
    """True if calling the module is its class's forward and, of an nn.Linear, one product."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return not hooked and (isinstance(module, SVDLoRALinear) or module.bias is None)


def _base_of(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _low_rank_linears(model: nn.Module) -> dict[str, nn.Module]:
    """path -> each of our linears, or the layer of PEFT that wraps it."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(_base_of(module), SVDLoRALinear) and not path.endswith(".base_layer")
    }


def _check_config(config: LoraConfig) -> None:
    """Raise ValueError unless this is LoRA that leaves the base as it is."""
    for name in VARIANTS:
        if getattr(config, name, None):
            raise ValueError(
                f"{name} must be left out where a target is a compressed layer: it works on a "
                "dense weight"
            )
    init = config.init_lora_weights
    if init not in INITS:
        raise ValueError(
            f"init_lora_weights must be one of {INITS} where a target is a compressed layer, as "
            f"others change a dense weight; got {init!r}"
        )


def _folded(base: SVDLoRALinear, A: Tensor, B: Tensor) -> SVDLoRALinear:
    """A new layer whose factors are those of `base` and A, B; `base`'s own adapter is shared."""
    weights = Weights(*base.stored(), A, B, None, 1.0, base.pivots)
    if isinstance(base, QuantizedLinear):
        made: SVDLoRALinear = QuantizedLinear.from_weights(weights, dtype=base.SVh.dtype)
    else:
        made = SVDLoRALinear.from_factors(*weights)
    made.merge()
    made.A, made.B, made.alpha, made.lora_dropout = base.A, base.B, base.alpha, base.lora_dropout
    return made.train(base.training)


@contextmanager
def _rounding_logged(model: nn.Module) -> Iterator[None]:
    """Log what rounding cost the quantised layers that are merged in the block."""
    layers = {p: m for p, m in model.named_modules() if isinstance(m, LoraLowRankLinear)}
    before = {path: layer.base_layer for path, layer in layers.items()}
    yield
    after = {path: layer.base_layer for path, layer in layers.items()}
    log_rounding(
        {
            path: base.merge_error or 0.0
            for path, base in after.items()
            if isinstance(base, QuantizedLinear) and base is not before[path]
        }
    )


@contextmanager
def _ties_kept(model: nn.Module) -> Iterator[None]:
    """Keep the config's word on tied embeddings in the block.

    PEFT compares the addresses of both weights. Those of a low-rank or quantised embedding and its
    head are computed when they are read, so they never have the same.
    """
    config = getattr(model, "config", None)
    tied = getattr(config, "tie_word_embeddings", False)
    if not tied or isinstance(model.get_input_embeddings(), nn.Embedding):
        yield
        return
    config.tie_word_embeddings = False
    try:
        yield
    finally:
        config.tie_word_embeddings = tied


PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = LowRankLoraModel
