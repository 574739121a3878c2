"""The part of cpu_battery.py for quantised matrices. It imports nothing of the package, which would
load the library that the package has."""

from __future__ import annotations

import torch
import torch.nn.functional as F

PLANES = {2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 8: [8]}
ops = torch.ops.hylora


def planes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """codes [..., 64] -> [..., 8 bits]: weights.QuantizedMatrix's layout."""
    made, done = [], 0
    for width in PLANES[bits]:
        parts = (codes >> done & 2**width - 1).unflatten(-1, (8 // width, 8 * width))
        made.append(sum(parts[..., i, :] << i * width for i in range(8 // width)))
        done += width
    return torch.cat(made, -1).byte()


class Codes:
    """A random quantised matrix [n, k], its tensors, and W [n, k] float64. Scales are powers of
    two, so that sums of few small integers times W are exact."""

    def __init__(self, n: int, k: int, bits: int):
        groups = -(-k // 64)
        codes = torch.randint(0, 2**bits, (n, groups, 64))
        zeros = torch.full((n, groups), 128)
        self.scales = (2.0 ** torch.randint(-3, 3, (n, groups)) * 2.0**-bits).half()
        self.codes, self.bits, self.k, self.zeros = planes(codes, bits), bits, k, None
        if bits < 8:
            zeros = torch.randint(0, 2**bits, (n, groups))
            flat = F.pad(zeros.flatten(), (0, -zeros.numel() % 64))
            self.zeros = planes(flat.reshape(-1, 64), bits)
        self.zero_points = zeros
        W = self.scales.double()[..., None] * (codes - zeros[..., None])
        self.W = W.flatten(1)[:, :k]

    def panels(self, t) -> torch.Tensor:
        return t.call(
            ops.cpu_pack_quantized, self.codes, self.scales, self.zeros, self.bits, self.k
        )

    def check_unpacked(self, t, layer: torch.Tensor, part: int) -> None:
        def unpack(layer):
            codes, scales = torch.empty_like(self.codes), torch.empty_like(self.scales)
            zeros = None if self.bits == 8 else torch.empty(self.scales.shape, dtype=torch.uint8)
            ops.cpu_unpack_quantized(layer, part, self.bits, codes, scales, zeros)
            return [codes, scales, *([] if zeros is None else [zeros])]

        codes, scales, *zeros = t.call(unpack, layer)
        assert torch.equal(codes, self.codes) and torch.equal(scales, self.scales)
        assert all(torch.equal(z, self.zero_points) for z in zeros)


def run_quantized(t, x: torch.Tensor, shape: tuple[int, ...], bits: int, products: int) -> None:
    """A dense matrix; a pair and a pivoted layer with and without an adapter, of two widths."""
    K, N, r, ra = shape
    dtype, other = x.dtype, {2: 8, 3: 4, 4: 2, 5: 6, 6: 3, 8: 5}[bits]
    bias = torch.randn(N).to(dtype)
    W, SVh, U = Codes(N, K, bits), Codes(r, K, bits), Codes(N, r, other)
    none = x.new_empty(0)
    sizes = (None, K, 0, 0, N, 1.0)
    layer = t.call(ops.cpu_pack_layer, x, none, None, W.panels(t), None, *sizes)
    y = t.call(ops.cpu_packed_layer, x, layer, bias, N, products)
    t.close(y, x.double() @ W.W.T + bias.double(), ("codes", x.shape, N, bits, products))
    W.check_unpacked(t, layer, 2)
    ids = torch.tensor([[0, N - 1], [N // 2, 0]])
    assert torch.equal(t.call(ops.cpu_packed_rows, layer, K, ids), W.W[ids].to(dtype))
    if len(x) <= 64:
        run_exact(t, x, layer, W)
    A = torch.randn(ra, K).to(dtype) / K**0.5
    B = torch.randn(N, ra).to(dtype) / max(ra, 1) ** 0.5
    scaled = x / r**0.5
    h = scaled.double() @ SVh.W.T
    part = 0.37 * (scaled.double() @ A.double().T) @ B.double().T
    adapter = (t.pack(A), t.pack(B)) if ra else (None, None)
    SVh_panels = SVh.panels(t)
    parts = (SVh_panels, adapter[0], U.panels(t), adapter[1], None, K, r, ra, N, 0.37)
    layer = t.call(ops.cpu_pack_layer, x, *parts)
    y = t.call(ops.cpu_packed_layer, scaled, layer, bias, N, products)
    t.close(y, h @ U.W.T + bias.double() + part, ("pair of codes", x.shape, N, r, bits, products))
    SVh.check_unpacked(t, layer, 0)
    plain = torch.ops.hylora.cpu_pack(torch.randn(N, K).to(dtype))
    for place in (0, 1):  # of the plain member: x is made ready for it and for the others
        members = [(layer, 0, bias), (layer, 0, bias)]
        members.insert(place, (plain, N, None))
        group = (*map(list, zip(*members, strict=True)), [products] * 3, 3 * N)
        found = t.call(ops.cpu_packed_group, scaled, *group).chunk(3, 1)
        for number, member in enumerate(found):
            assert number == place or torch.equal(member, y), ("grouped codes", x.shape, bits)
    if r > N:
        return
    pivots = torch.randperm(N)[:r].sort().values.int()
    others = torch.tensor([i for i in range(N) if i not in set(pivots.tolist())], dtype=torch.long)
    U = Codes(N - r, r, other)
    table = t.call(ops.cpu_pivot_table, pivots, N)
    sorted_B = torch.cat([B[pivots.long()], B.new_zeros(-r % 32, ra), B[others]])
    adapter = (adapter[0], t.pack(sorted_B)) if ra else (None, None)
    parts = (SVh_panels, adapter[0], U.panels(t), adapter[1], table, K, r, ra, N, 0.37)
    layer = t.call(ops.cpu_pack_layer, x, *parts)
    wanted = bias.double() + part
    wanted[:, pivots.long()] += h
    wanted[:, others] += h @ U.W.T
    y = t.call(ops.cpu_packed_layer, scaled, layer, bias, N, products)
    t.close(y, wanted, ("pivoted codes", x.shape, N, r, bits, products))


def run_exact(t, x: torch.Tensor, layer: torch.Tensor, W: Codes) -> None:
    """Integers, Inf and NaN: each level gives the bits of exact sums, rounded once, and a row that
    isn't finite leaves the others alone."""
    whole = torch.randint(-9, 10, x.shape).to(x.dtype)
    wanted = (whole.double() @ W.W.T).to(x.dtype)
    for bad in (torch.inf, torch.nan):
        y = t.call(ops.cpu_packed_layer, whole, layer, None, len(W.W), 0)
        assert torch.equal(y, wanted), ("exact", x.shape, W.bits)
        row, column = len(x) // 2, x.shape[1] - 1
        marred = whole.clone()
        marred[row, column] = bad
        y = t.call(ops.cpu_packed_layer, marred, layer, None, len(W.W), 0)
        assert not y[row].isfinite().any(), ("not finite", x.shape, W.bits)
        y[row] = wanted[row]
        assert torch.equal(y, wanted), ("beside a row that is not finite", x.shape, W.bits)
