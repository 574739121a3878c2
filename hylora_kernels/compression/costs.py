"""What a matrix takes in each choice of rank and bits: bytes of the saved model, or bits of codes.

The bytes are those of the layer that would be saved, built on the meta device, so that no format is
described a second time here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from hylora_kernels.compression.embedding import holders
from hylora_kernels.compression.options import AS_IS, CompressOptions
from hylora_kernels.compression.ranks import DENSE, Choice, adapter_rank
from hylora_kernels.layers.factors import factor_count
from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.layers.quantized import QuantizedFactor, QuantizedLinear
from hylora_kernels.model.modules import tensors_saved_once
from hylora_kernels.model.structure import Target

HEADER = 256  # Bytes, at most, of a file's header besides an entry for each tensor.


class Costs:
    """The costs of the candidates of a model's matrices.

    linears, tables: the linears, and the embedding and output head, that candidates replace.
    rest:  bytes of the saved model's weights besides theirs, with the header of the file; at most.
    dense: bytes of the whole as it is.
    """

    def __init__(
        self,
        model: nn.Module,
        linears: Sequence[Target],
        tables: Sequence[Target],
        options: CompressOptions,
    ):
        self._options = options
        self._places = {t.path: len(holders(model, t.module.weight)) for t in tables}
        state = model.state_dict()
        size = sum(t.nbytes for t in tensors_saved_once(model))
        self._digits = len(str(size))
        self.dense = size + HEADER + sum(self._entry(n, t.shape) for n, t in state.items())
        self._as_is = {t.path: self._held(t) for t in (*linears, *tables)}
        self.rest = self.dense - sum(self._as_is.values())

    def total(self, choices: Mapping[Target, Choice]) -> int:
        """Bytes of the saved model's weights, at most."""
        return self.rest + sum(self.bytes(target, choice) for target, choice in choices.items())

    def bytes(self, target: Target, choice: Choice) -> int:
        """Of the matrix in the file and of its entries in the header, at most."""
        if choice == as_is(target):
            return self._as_is[target.path]
        saved = _saved(self._kind(target, choice), target.matrix.dtype)
        return sum(t.nbytes + self._entry(f"{target.path}.{n}", t.shape) for n, t in saved.items())

    def bits(self, target: Target, choice: Choice) -> int:
        """Of all codes, scales aside; of a matrix that has no codes, of its numbers."""
        element = 8 * target.matrix.element_size() if choice.bits == AS_IS else choice.bits
        return element * self.numbers(target, choice)

    def numbers(self, target: Target, choice: Choice) -> int:
        """The numbers in a matrix or its factors, an adapter merged."""
        N, K = target.shape
        if isinstance(target.module, SVDLoRALinear):
            return target.module.parameter_count()
        if choice.rank == DENSE:
            return N * K
        return factor_count(choice.rank, K, N, self._options.form)

    def _held(self, target: Target) -> int:
        """Bytes of a module in the file, its bias aside."""
        held = target.module.state_dict(prefix=f"{target.path}.")
        matrices = ((name, t) for name, t in held.items() if not name.endswith(".bias"))
        return sum(t.nbytes + self._entry(name, t.shape) for name, t in matrices)

    def _entry(self, name: str, shape: Sequence[int]) -> int:
        """Bytes of a tensor's entry in the header, at most:
        "name":{"dtype":"BF16","shape":[1,2],"data_offsets":[0,4]},"""
        return 50 + len(name) + len(",".join(map(str, shape))) + 2 * self._digits

    def _kind(self, target: Target, choice: Choice) -> tuple[Any, ...]:
        (N, K), o, module = target.shape, self._options, target.module
        if target.path in self._places:
            return "table", N, K, self._places[target.path] > 1, choice.bits
        if isinstance(module, SVDLoRALinear):
            return "layer", N, K, module.rank, module.lora_rank, module.form, choice.bits
        if choice.rank == DENSE:
            return "layer", N, K, N, 0, "pivoted", choice.bits
        adapter = adapter_rank(choice.rank, o.lora_rank) if o.count == "as_is" else 0
        return "layer", N, K, choice.rank - adapter, adapter, o.form, choice.bits


def as_is(target: Target) -> Choice:
    """The candidate that changes nothing; a low-rank layer keeps its rank."""
    module = target.module
    is_cut = isinstance(module, SVDLoRALinear)
    return Choice(module.rank + module.lora_rank if is_cut else DENSE)


@cache
def _saved(kind: tuple[Any, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors, on the meta device, that a layer is saved as, without its bias."""
    what, N, K, *rest = kind
    on_meta: dict[str, Any] = {"device": "meta", "dtype": dtype}
    if what == "layer":
        rank, adapter, form, bits = rest
        module: nn.Module = _linear(K, N, rank, adapter, form, bits, on_meta)
        return module.state_dict()
    tied, bits = rest
    module = QuantizedFactor(N, K, bits, **on_meta)
    found = {f"matrix.{name}": tensor for name, tensor in module.state_dict().items()}
    if tied:  # The head has the embedding's codes, but an empty U of its own.
        head = _linear(K, N, N, 0, "pivoted", bits, on_meta).state_dict()
        found |= {name: t for name, t in head.items() if not name.startswith("SVh.")}
    return found


def _linear(
    K: int, N: int, rank: int, adapter: int, form: str, bits: int, on_meta: dict[str, Any]
) -> SVDLoRALinear:
    if bits == AS_IS:
        return SVDLoRALinear(K, N, rank, adapter, bias=False, form=form, **on_meta)
    names = ("SVh", "U") if form == "pair" or rank < N else ("SVh",)
    by_name = dict.fromkeys(names, bits)
    return QuantizedLinear(K, N, rank, adapter, bias=False, form=form, bits=by_name, **on_meta)
