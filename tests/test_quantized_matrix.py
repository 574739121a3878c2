"""The layout of a quantised matrix: its bytes as written down by hand, and what they stand for."""

from __future__ import annotations

import pytest
import torch

from hylora_kernels.reference import dequantize, pack_bits, quantized, unpack_bits
from hylora_kernels.weights import GROUP, PLANES


def _random(rows: int, k: int, bits: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    groups = -(-k // GROUP)
    codes = torch.randint(0, 2**bits, (rows, k), generator=g)
    scales = torch.rand(rows, groups, generator=g).half()
    zeros = None if bits == 8 else torch.randint(0, 2**bits, (rows, groups), generator=g)
    return codes, scales, zeros


@pytest.mark.parametrize("bits", PLANES)
def test_every_code_is_where_the_layout_says(bits):
    """One code at a time, found by the words of the docstring, not by the package's shifts."""
    for place in (0, 1, 7, 8, 31, 32, 33, 63):
        codes = torch.zeros(GROUP, dtype=torch.uint8)
        codes[place] = 2**bits - 1
        found, before = pack_bits(codes, bits), 0
        expected = torch.zeros(8 * bits, dtype=torch.long)
        for width in PLANES[bits]:
            byte, number = place % (8 * width), place // (8 * width)
            expected[before + byte] = (2**width - 1) * 2 ** (width * number)
            before += 8 * width
        assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("bits", PLANES)
def test_planes_are_undone_bit_for_bit(bits):
    codes = torch.randint(0, 2**bits, (3, 5, GROUP), dtype=torch.uint8)
    assert torch.equal(unpack_bits(pack_bits(codes, bits), bits), codes)


@pytest.mark.parametrize("bits", PLANES)
@pytest.mark.parametrize(("rows", "k"), [(5, 64), (3, 100), (1, 1), (70, 130)])
def test_dequantize_is_scale_times_code_minus_zero(bits, rows, k):
    codes, scales, zeros = _random(rows, k, bits)
    matrix = quantized(codes, scales, zeros, bits)
    by_zero = torch.full_like(scales, 128) if zeros is None else zeros
    group = torch.arange(k) // GROUP
    exact = scales.double()[:, group] * (codes - by_zero[:, group]).double()
    assert matrix.shape == (rows, k)
    assert torch.equal(dequantize(matrix).double(), exact)
    assert torch.equal(dequantize(matrix, torch.float64), exact)
    assert torch.equal(dequantize(matrix, torch.bfloat16), exact.float().bfloat16())


@pytest.mark.parametrize("bits", PLANES)
def test_size_is_what_the_format_promises(bits):
    """b + (16 + b) / 64 bits a weight, and 8.25 at 8 bits."""
    matrix = quantized(*_random(64, 640, bits), bits)
    per_group = 64 * bits + 16 + (0 if bits == 8 else bits)
    assert 8 * matrix.nbytes == 64 * 10 * per_group
