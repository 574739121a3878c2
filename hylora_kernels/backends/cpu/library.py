"""The C++ ops of csrc/cpu: the instruction set they use, and their rules for torch's tools.

csrc/cpu/bindings.cpp says what each op takes and returns.
"""

from __future__ import annotations

import math

import torch

from hylora_kernels.backends.shared.library import in_words, lacks

LEVELS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx_bf16")
OPS = (
    *("cpu_isa", "cpu_isa_reason", "cpu_pack", "cpu_unpack", "cpu_rows", "cpu_linear", "cpu_layer"),
    *("cpu_pack_layer", "cpu_packed_layer", "cpu_packed_group", "cpu_unpack_part"),
    *("cpu_pack_quantized", "cpu_unpack_quantized", "cpu_packed_rows"),
    *("cpu_pivot_table", "cpu_adapter_gradients", "cpu_fingerprint"),
    *("cpu_attention", "cpu_norm", "cpu_rotary", "cpu_activation", "cpu_add", "cpu_argmax"),
    *("cpu_decoder_plan", "cpu_decode"),
)


def _level() -> tuple[str, str]:
    """(the instruction set in use, "") or ("", the reason why this backend can't be used)."""
    if reason := lacks(*OPS):
        return "", reason
    try:
        return torch.ops.hylora.cpu_isa.default(), ""
    except RuntimeError as error:  # HYLORA_ISA can't be followed
        return "", in_words(error)


LEVEL, REFUSAL = _level()


def op(name: str) -> torch._ops.OpOverload:
    return getattr(torch.ops.hylora, f"cpu_{name}").default


def _fake_linear(x, weights, bias, n, limb_products):
    return x.new_empty((*x.shape[:-1], n))


def _fake_group(x, weights, matrix_outputs, biases, limb_products, width):
    return x.new_empty((*x.shape[:-1], width))


def _fake_layer(
    x,
    shrink,
    adapter_shrink,
    expand,
    adapter_expand,
    bias,
    pivot_table,
    r,
    ra,
    n,
    alpha,
    emit_h_a,
    backward,
    limb_products,
):
    emitted = math.prod(x.shape[:-1]) if emit_h_a else 0
    return x.new_empty((*x.shape[:-1], n)), x.new_empty((emitted, ra))


def _fake_rows(panels, n, k, ids):
    return panels.new_empty((*ids.shape, k))


def _fake_packed_rows(layer, k, ids):
    return layer.new_empty((*ids.shape, k))


def _refuse_vmap(info, in_dims, *args):
    raise NotImplementedError(
        "a layer packed for inference has no vmap rule: give the batch as leading dims of x instead"
    )


if not REFUSAL:
    for _name, _fake in (
        ("linear", _fake_linear),
        ("packed_layer", _fake_linear),
        ("packed_group", _fake_group),
        ("layer", _fake_layer),
        ("rows", _fake_rows),
        ("packed_rows", _fake_packed_rows),
    ):
        torch.library.register_fake(f"hylora::cpu_{_name}", _fake)
        torch.library.register_vmap(f"hylora::cpu_{_name}", _refuse_vmap)
