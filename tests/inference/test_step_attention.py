"""Attention of one query, held against torch's own in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny

from hylora_kernels.inference.step_attention import NAME, attend, attending


def inputs(heads, groups, size, value_size, dtype, device):
    n, length = 3, 37
    shapes = (n, heads, 1, size), (n, groups, length, size), (n, groups, length, value_size)
    query, key, value = (torch.randn(*shape, device=device).to(dtype) for shape in shapes)
    mask = torch.rand(n, 1, 1, length, device=device) < 0.6
    mask[..., 5] = True
    return query, key, value, mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(4, 4, 16, 16), (6, 2, 8, 8), (8, 1, 24, 16)])
@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("masked", [True, False])
def test_as_exact_as_torchs_own(dtype, sizes, scaling, masked, device):
    query, key, value, mask = inputs(*sizes, dtype, device)
    mask = mask if masked else None

    def by_torch(*given):
        out = F.scaled_dot_product_attention(*given, attn_mask=mask, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2)

    exact = by_torch(query.double(), key.double(), value.double())
    y, nothing = attend(None, query, key, value, mask, scaling=scaling)
    assert nothing is None and y.shape == exact.shape and y.dtype == dtype
    own = (by_torch(query, key, value).double() - exact).norm()
    # The scores are rounded once more on a CPU, whose products have no float32 result.
    least = torch.finfo(dtype).eps * exact.norm()
    assert (y.double() - exact).norm() <= 2 * own + least


def test_several_queries_and_masks_of_numbers_go_to_sdpa():
    query, key, value, mask = inputs(4, 4, 16, 16, torch.float32, "cpu")
    numbers = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    expected, _ = attend(None, query, key, value, mask)
    module = SimpleNamespace(num_key_value_groups=1, is_causal=True)
    found, _ = attend(module, query, key, value, numbers)
    torch.testing.assert_close(found, expected)
    several = query.expand(-1, -1, 2, -1)
    found, _ = attend(module, several, key, value, mask.expand(-1, -1, 2, -1))
    torch.testing.assert_close(found, expected.expand(-1, 2, -1, -1))


def test_the_models_attention_is_put_back():
    model = tiny.llama()
    before = model.config._attn_implementation
    with pytest.raises(KeyError), attending(model):
        assert model.config._attn_implementation == NAME
        raise KeyError
    assert model.config._attn_implementation == before
