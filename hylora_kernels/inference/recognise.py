"""A model's form, for a decoder that computes it whole: found by watching forwards, no class named.

Each step asks which of a few forms makes the numbers that were seen. verify.py then holds what was
found against the model's own blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hylora_kernels import backends
from hylora_kernels.backends.shared.decoder_form import (
    BlockForm,
    DecoderForm,
    HeadsForm,
    LayerForm,
    NormForm,
    RotaryForm,
)
from hylora_kernels.inference.norms import norm_of, same
from hylora_kernels.inference.optimize import weights_of
from hylora_kernels.inference.rotary import Table, rotated, table_of, tables_of, windows_of
from hylora_kernels.inference.watch import (
    Attention,
    Blocks,
    Call,
    NotRecognised,
    Seen,
    Watched,
    watch,
)
from hylora_kernels.layers.packed import (
    PackedEmbedding,
    PackedModule,
    PackedQuantizedEmbedding,
)
from hylora_kernels.model.context import probe_ids

_POSITIONS = 8192  # of the rotary tables that are made at first, if the limit is no less
_ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


@dataclass
class Recognised:
    """form: of the model, with rotary tables for some positions. tables: number of each block's
    table, None without."""

    blocks: Blocks
    form: DecoderForm
    tables: list[int | None]

    def with_positions(self, count: int) -> DecoderForm:
        """The form with rotary tables of at least `count` positions."""
        if count <= self.form.positions or not self.form.positions:
            return self.form
        longer = tables_of(self.blocks, count)
        blocks = []
        for block, number in zip(self.form.blocks, self.tables, strict=True):
            rotary = block.rotary
            if rotary is not None and number is not None:
                cos, sin = longer[number].angles
                known = min(len(cos), len(rotary.cos))
                if not torch.equal(cos[:known], rotary.cos[:known]):
                    raise NotRecognised("its rotary embeddings depend on the number of tokens")
                block = replace(block, rotary=replace(rotary, cos=cos, sin=sin))
            blocks.append(block)
        return replace(self.form, blocks=tuple(blocks), positions=count)


@torch.no_grad()
def recognise(model: Any, limit: int) -> Recognised:
    """The form of a packed model that is to decode `limit` tokens. Raises NotRecognised."""
    blocks = Blocks(model, blocks_of(model))
    watched = watch(blocks, probe_ids(model))
    count = max(watched.logits.shape[0], min(limit, _POSITIONS))
    windows = windows_of(blocks, limit)
    tables = tables_of(blocks, count)
    forms, numbers, x = [], [], watched.blocks[0].x
    for index, seen in enumerate(watched.blocks):
        if not same(seen.x, x):
            raise NotRecognised(f"block {index} does not read what the block before it made")
        try:
            table = table_of(seen.arguments, tables)
            form = _block(seen, None if table is None else tables[table], windows[index])
        except NotRecognised as reason:
            raise NotRecognised(f"block {index}: {reason}") from None
        forms.append(form)
        numbers.append(table if form.rotary is not None else None)
        x = seen.y
    norm, head, scale, softcap = _head(model, watched, x)
    form = DecoderForm(
        width=x.shape[-1],
        positions=count if any(n is not None for n in numbers) else 0,
        blocks=tuple(forms),
        final_norm=norm,
        head=head,
        logit_scale=scale,
        logit_softcap=softcap,
        embedding=_embedding(model.get_input_embeddings(), x.dtype),
        embedding_scale=_embedding_scale(watched),
    )
    return Recognised(blocks, form, numbers)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The children of the outermost module list that holds most of the packed layers."""
    best: list[nn.Module] = []
    most = 0
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            packed = sum(isinstance(m, PackedModule) for m in module.modules())
            if packed > most:
                best, most = list(module), packed
    if not best:
        raise NotRecognised("none of its layers is packed: optimize_for_inference(model) first")
    return best


# ----------------------------------------------------------------------------------------- a block


def _block(seen: Seen, table: Table | None, window: int) -> BlockForm:
    attention = [call for call in seen.calls if isinstance(call, Attention)]
    if len(attention) != 1:
        raise NotRecognised(f"it has {len(attention)} calls of attention, not one")
    cut = seen.calls.index(attention[0])
    before = [c for c in seen.calls[:cut] if isinstance(c, Call)]
    behind = [c for c in seen.calls[cut:] if isinstance(c, Call)]
    layers = _layers(before)
    if not layers:
        raise NotRecognised("no layer makes queries, keys and values")
    later = _layers(behind)
    if len(later) not in (3, 4) or not same(later[0].x, attention[0].out):
        raise NotRecognised("attention is not followed by its output layer and an MLP")
    output, *up, down = later
    norms = [c for c in before + behind if c not in layers and c not in later]
    attention_norm = _input_norm(norms, seen.x, _one_input(layers))
    q, k, v, rotary = _heads(attention[0], layers, before, table)

    post_norm, added = _post_norm(norms, output.y)
    mlp_input, attention_scale = _one_input(up), 1.0
    reader = _writer_of(norms, mlp_input)
    source = mlp_input if reader is None else reader.x
    parallel = same(source, seen.x) or (
        reader is not None and reader is _writer_of(norms, layers[0].x)
    )
    if not parallel:
        attention_scale = _share_of(source - seen.x, added, seen)
    mlp_norm = None
    if reader is not None and not (parallel and same(mlp_input, layers[0].x)):
        mlp_norm = norm_of(reader.module, reader.x, reader.y)
    mlp_post_norm, made = _post_norm(norms, down.y)
    residual = seen.y - (seen.x + attention_scale * added if parallel else source)
    mlp_scale = _share_of(residual, made, seen)
    activation, inner, gate, other = _activation(up, down)
    return BlockForm(
        attention_norm=attention_norm,
        projections=tuple(map(_form_of, layers)),
        q=q,
        k=k,
        v=v,
        rotary=rotary,
        window=window,
        scale=attention[0].scale,
        softcap=attention[0].softcap,
        output=_form_of(output),
        attention_post_norm=post_norm,
        attention_scale=attention_scale,
        parallel=parallel,
        mlp_norm=mlp_norm,
        up=tuple(map(_form_of, up)),
        activation=activation,  # type: ignore[arg-type]
        inner=inner,
        gate_column=gate,
        up_column=other,
        down=_form_of(down),
        mlp_post_norm=mlp_post_norm,
        mlp_scale=mlp_scale,
    )


def _layers(calls: list[Call]) -> list[Call]:
    return [c for c in calls if isinstance(c.module, nn.Linear | PackedModule)]


def _form_of(call: Call, may_be_plain: bool = False) -> LayerForm:
    """A plain head is packed for the decoder alone: an embedding that is no plain nn.Embedding
    shares its weight, and optimize_for_inference leaves both."""
    module = call.module
    if may_be_plain and type(module) is nn.Linear:
        packed = backends.pack(weights_of(module))
        if packed is not None and packed.backend == "cpu":
            return LayerForm(packed, module.bias)
    if not isinstance(module, PackedModule) or module.packed_state.packed.backend != "cpu":
        raise NotRecognised(f"a {type(module).__name__} of it is not packed for the CPU")
    return LayerForm(module.packed_state.packed, module.bias)


def _one_input(layers: list[Call]) -> Tensor:
    x = layers[0].x
    if not all(same(layer.x, x) for layer in layers):
        raise NotRecognised("layers that should share an input do not")
    return x


def _writer_of(norms: list[Call], value: Tensor) -> Call | None:
    return next((c for c in norms if same(c.y, value)), None)


def _input_norm(norms: list[Call], x: Tensor, value: Tensor) -> NormForm | None:
    """The norm that makes `value` of x, None if they are the same."""
    if same(x, value):
        return None
    call = _writer_of(norms, value)
    if call is None or not same(call.x, x):
        raise NotRecognised("something else than a norm stands before attention")
    return norm_of(call.module, call.x, call.y)


def _post_norm(norms: list[Call], y: Tensor) -> tuple[NormForm | None, Tensor]:
    """(the norm of a layer's output y, what it makes of y)."""
    call = next((c for c in norms if same(c.x, y)), None)
    if call is None:
        return None, y
    return norm_of(call.module, call.x, call.y), call.y


def _share_of(total: Tensor, part: Tensor, seen: Seen) -> float:
    """The number that `part` is multiplied by in `total`, which is rounded as hidden states are."""
    total, part = total.double(), part.double()
    share = float((total * part).sum() / part.square().sum().clamp(min=1e-30))
    rounding = 4 * torch.finfo(seen.y.dtype).eps * float(seen.y.double().norm())
    if abs(share - 1) * float(part.norm()) <= rounding:
        share = 1.0
    if float((total - share * part).norm()) > rounding:
        raise NotRecognised("attention and MLP are not added to what the block reads")
    return share


def _activation(up: list[Call], down: Call) -> tuple[str, int, int, int | None]:
    """(the activation, how many columns it makes, the first column that it reads, and the first of
    those that it is multiplied by)."""
    made = torch.cat([c.y for c in up], -1).double()
    wanted, inner = down.x.double(), down.x.shape[-1]
    if made.shape[-1] == inner:
        orders: list[tuple[int, int | None]] = [(0, None)]
    elif made.shape[-1] == 2 * inner:
        orders = [(0, inner), (inner, 0)]
    else:
        raise NotRecognised("its MLP is neither plain nor gated")
    errors = {}
    for name, function in _ACTIVATIONS.items():
        for gate, other in orders:
            y = function(made[:, gate : gate + inner])
            if other is not None:
                y = y * made[:, other : other + inner]
            errors[name, gate, other] = float((y - wanted).norm())
    (name, gate, other), error = min(errors.items(), key=lambda item: item[1])
    if error > 4 * torch.finfo(down.x.dtype).eps * float(wanted.norm()):
        raise NotRecognised(f"its activation is none of {', '.join(_ACTIVATIONS)}")
    return name, inner, gate, other


# ------------------------------------------------------------------------------------------- heads


def _heads(
    attention: Attention, layers: list[Call], calls: list[Call], table: Table | None
) -> tuple[HeadsForm, HeadsForm, HeadsForm, RotaryForm | None]:
    """Where queries, keys and values lie in the projections, their norms and rotary embeddings."""
    made = torch.cat([c.y.flatten(1) for c in layers], -1)
    q, k, v = (t.transpose(0, 1) for t in (attention.q, attention.k, attention.v))
    for layout in _layouts(q, k, v, made.shape[1]):
        columns = [_columns(made, heads) for heads in layout]
        if not same(columns[2], v):
            continue
        for rotary in (None, *(table.forms if table else ())):
            found = [
                _rotated_heads(heads, columns[i], (q, k)[i], calls, rotary)
                for i, heads in enumerate(layout[:2])
            ]
            if all(found):
                return found[0], found[1], layout[2], rotary  # type: ignore[return-value]
    raise NotRecognised("its queries, keys and values are made in an unknown way")


def _layouts(q: Tensor, k: Tensor, v: Tensor, width: int) -> list[list[HeadsForm]]:
    """Where q, k and v may lie in `width` columns: one after another in any order, or head by
    head."""
    shapes = [(t.shape[1], t.shape[2]) for t in (q, k, v)]
    sizes = [count * size for count, size in shapes]
    if sum(sizes) != width:
        return []
    orders = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
    layouts = []
    for order in orders:
        starts = {t: sum(sizes[o] for o in order[:i]) for i, t in enumerate(order)}
        layouts.append(
            [HeadsForm(count, size, starts[i], size) for i, (count, size) in enumerate(shapes)]
        )
    if len(set(shapes)) == 1:
        count, size = shapes[0]
        layouts.append([HeadsForm(count, size, i * size, 3 * size) for i in range(3)])
    return layouts


def _columns(made: Tensor, heads: HeadsForm) -> Tensor:
    """[tokens, heads, size]: the heads' columns of the projections."""
    tokens = len(made)
    return made.as_strided(
        (tokens, heads.count, heads.size), (made.stride(0), heads.stride, 1), heads.column
    )


def _rotated_heads(
    heads: HeadsForm, columns: Tensor, wanted: Tensor, calls: list[Call], rotary: RotaryForm | None
) -> HeadsForm | None:
    """The heads with their norm, if norm and rotary embeddings make `wanted` of their columns."""
    tokens, count, size = columns.shape
    x, norm = columns, None
    for call in calls:
        if call.x.numel() != x.numel() or isinstance(call.module, nn.Linear | PackedModule):
            continue
        by_token = call.x.reshape(tokens, count, size), call.y.reshape(tokens, count, size)
        by_head = (t.reshape(count, tokens, size).transpose(0, 1) for t in (call.x, call.y))
        made = next((y for x_, y in (by_token, tuple(by_head)) if same(x_, columns)), None)
        if made is not None:
            x, norm = made, norm_of(call.module, call.x, call.y)
            break
    y = x.float() if rotary is None else rotated(x.float(), rotary)
    error = float((y - wanted.float()).norm())
    if error > 4 * torch.finfo(wanted.dtype).eps * float(wanted.float().norm()):
        return None
    return replace(heads, norm=norm)


# -------------------------------------------------------------------------- before and behind them


def _embedding(module: nn.Module, dtype: torch.dtype) -> LayerForm | Tensor | None:
    """The matrix that tokens are rows of; None for an embedding that computes anything else."""
    if isinstance(module, PackedEmbedding | PackedQuantizedEmbedding):
        return LayerForm(module.packed_state.packed, None)
    if type(module) is nn.Embedding and module.max_norm is None and "forward" not in vars(module):
        weight = module.weight.detach()
        return weight if weight.dtype == dtype and weight.is_contiguous() else None
    return None


def _embedding_scale(watched: Watched) -> float:
    embedded, x = watched.embedded, watched.blocks[0].x
    if same(embedded, x):
        return 1.0
    ratio = x.double().norm() / embedded.double().norm()
    scale = float(ratio.to(x.dtype))
    if same(embedded * scale, x):
        return scale
    for exponent in (-1, 1):  # of a ratio that was rounded to the dtype's next number
        near = torch.nextafter(ratio.to(x.dtype), x.new_tensor(torch.inf * exponent))
        if same(embedded * float(near), x):
            return float(near)
    raise NotRecognised("its first block does not read embedded tokens, but for a scale")


def _head(
    model: Any, watched: Watched, x: Tensor
) -> tuple[NormForm | None, LayerForm, float, float]:
    """(the norm behind the blocks, the head, and what logits are multiplied by and capped at)."""
    layers = _layers(watched.behind)
    if len(layers) != 1 or layers[0].module is not model.get_output_embeddings():
        raise NotRecognised("its last block is not followed by a norm and the head alone")
    head = layers[0]
    form = _form_of(head, may_be_plain=True)
    norm = _input_norm([c for c in watched.behind if c is not head], x, head.x)
    logits, made = watched.logits, head.y
    if same(made, logits):
        return norm, form, 1.0, 0.0
    made, wanted = made.double(), logits.double()
    rounding = 4 * torch.finfo(logits.dtype).eps * float(wanted.norm())
    scale = float((made * wanted).sum() / made.square().sum())
    if float((scale * made - wanted).norm()) <= rounding:
        return norm, form, scale, 0.0
    for cap in _numbers(model.config.get_text_config().to_dict()):
        if float((cap * torch.tanh(made / cap) - wanted).norm()) <= rounding:
            return norm, form, 1.0, cap
    raise NotRecognised("its logits are neither the head's outputs, nor scaled, nor capped")


def _numbers(config: dict) -> list[float]:
    """The positive numbers of a config."""
    return [
        float(v)
        for v in config.values()
        if isinstance(v, int | float) and not isinstance(v, bool) and v > 0
    ]
