"""csrc/cpu/kernels/plan.h by itself: the decisions about a block of rows of made-up layers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import hylora_kernels

ROOT = Path(hylora_kernels.__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or not (ROOT / "csrc").is_dir(), reason="needs g++ and a checkout"
)

# Arguments: method, K, N, r, ra, adapter (0 none, 1 separate, 2 joined), pivoted, backward, ldx,
# rows, shared, bits of both matrices. The methods are those of amx.h (bf16, and float32 by three
# limbs) and fma.h (float32 with AVX-512, and bf16).
MAIN = """
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include "kernels/plan.h"
using namespace hylora;
int main(int, char** words) {
  int64_t v[13];
  for (int i = 2; i < 13; i++) v[i] = std::atoll(words[i]);
  const char* name = words[1];
  Method method = {true, 1, 1, 18, 256, true, true, 2, 2};
  if (!std::strcmp(name, "limbs")) method = {true, 3, 1, 8, 192, false, false, 4, 2};
  if (!std::strcmp(name, "fma")) method = {false, 1, 2, 8, 192, true, false, 4, 4};
  if (!std::strcmp(name, "fma bf16")) method = {false, 1, 1, 8, 192, false, true, 2, 4, true};
  const int64_t K = v[2], N = v[3], r = v[4], ra = v[5], others = N - r;
  const bool pivoted = v[7], backward = v[8];
  LayerCall call{};
  call.adapter = Adapter(v[6]), call.backward = backward;
  call.K = backward ? N : K, call.N = backward ? K : N, call.ra = ra, call.ldx = v[9];
  const bool joined = call.adapter == Adapter::joined;
  call.shrink = {nullptr, r ? r + joined * ra : 0, backward && pivoted ? others : call.K};
  call.expand = {nullptr, !backward && pivoted ? others : call.N, r ? r + joined * ra : call.K};
  if (call.adapter == Adapter::separate) {
    call.adapter_shrink = {nullptr, ra, call.K};
    call.adapter_expand = {nullptr, call.N, ra};
  }
  call.shrink.bits = call.expand.bits = int(v[12]);
  PivotPanel panel{};
  if (pivoted) call.table = {&panel, N, r};
  const BlockPlan p = plan_block(method, call, v[10], v[11]);
  const char* x[] = {"in_place", "chunk_copy", "whole_copy"};
  std::printf("shared=%d row_tiles_first=%d finishes_row_tiles=%d x=%s has_h=%d merges_pivots=%d "
              "h_is_pivots=%d adapter_h_apart=%d base_panels=%d shrink=%dx%d expand=%dx%d "
              "shrink_group=%lld expand_group=%lld rows=%lld fixed_point=%d",
              p.shared, p.row_tiles_first, p.finishes_row_tiles, x[int(p.x)], p.has_h,
              p.merges_pivots, p.h_is_pivots, p.adapter_h_apart, int(p.base_panels),
              int(p.shrink.count), int(p.shrink.blocks), int(p.expand.count),
              int(p.expand.blocks), (long long)p.shrink_group, (long long)p.expand_group,
              (long long)rows_per_block(method, call), p.fixed_point);
}
"""
UNLIMITED = str(1 << 40)
SEPARATE, JOINED = 1, 2


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    (folder / "main.cpp").write_text(MAIN)
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function"]
    command = ["g++", *flags, f"-I{ROOT / 'csrc' / 'cpu'}", "main.cpp", "-o", "plan"]
    subprocess.run(command, cwd=folder, check=True, timeout=300)
    return folder / "plan"


def plan_of(
    program: Path, method: str, K=576, N=1536, r=224, ra=0, adapter=0, pivoted=False, **more
):
    options = {"backward": False, "ldx": K, "rows": 256, "shared": False, "bits": 0} | more
    numbers = [K, N, r, ra, adapter, int(pivoted), *(int(value) for value in options.values())]
    done = subprocess.run(
        [program, method, *map(str, numbers)], capture_output=True, text=True, check=True
    )
    return dict(word.split("=") for word in done.stdout.split())


def test_many_rows_in_amx_tiles(program):
    plan = plan_of(program, "amx")
    assert plan["row_tiles_first"] == plan["finishes_row_tiles"] == plan["has_h"] == "1"
    assert plan["x"] == "in_place", "bf16 rows of 18 whole k-blocks need no copy"
    assert plan["shrink"] == "1x18" and plan["expand"] == "1x7" and plan["rows"] == "512"
    # 576 KB of L2 hold 16 panels of 18 k-blocks of 2 KB, or 41 of 7.
    assert plan["shrink_group"] == "16" and plan["expand_group"] == "41"


def test_a_long_k_is_summed_in_even_passes(program):
    plan = plan_of(program, "amx", K=2048, ldx=2080)
    assert plan["shrink"] == "4x16" and plan["rows"] == "256", "64 k-blocks in chunks of at most 18"
    assert plan_of(program, "limbs", K=2048)["shrink"] == "8x8"
    assert plan_of(program, "fma", K=300)["shrink"] == "2x5"


@pytest.mark.parametrize(
    "wanted, method, change",
    [
        ("in_place", "fma", {}),
        ("in_place", "amx", {"rows": 16, "shared": True}),
        ("chunk_copy", "amx", {"K": 570}),  # no whole k-blocks
        ("chunk_copy", "amx", {"K": 2048}),  # rows 4096 bytes apart share a set of L1
        ("chunk_copy", "limbs", {}),
        ("chunk_copy", "fma bf16", {}),  # bf16 rows become floats
        ("whole_copy", "amx", {"rows": 20, "shared": True}),  # more than half a tile
        ("whole_copy", "fma bf16", {"rows": 1, "shared": True}),
        ("whole_copy", "limbs", {"r": 0}),  # without h the one product reads x again and again
        ("whole_copy", "amx", {"pivoted": True, "backward": True}),  # dy is sorted
    ],
)
def test_where_x_is_read(program, wanted, method, change):
    assert plan_of(program, method, **change)["x"] == wanted


def test_quantised_panels(program):
    """Few rows are fixed point, whatever the method; many where it says so: then passes end between
    units of 64 k, and x is read by fix_row alone."""
    assert plan_of(program, "amx", bits=4, rows=8, shared=True)["fixed_point"] == "1"
    for method in ("amx", "fma", "limbs"):
        assert plan_of(program, method, bits=4)["fixed_point"] == "0"
    plan = plan_of(program, "fma bf16", bits=4, K=896, r=800)
    assert (plan["fixed_point"], plan["x"]) == ("1", "in_place")
    assert plan["shrink"] == plan["expand"] == "4x8", "28 and 25 k-blocks, even passes of 7"
    assert plan_of(program, "fma bf16", K=896, r=800)["shrink"] == "4x7"
    assert plan_of(program, "fma bf16", bits=4, K=224)["shrink"] == "1x7"
    adapted = plan_of(program, "fma bf16", bits=4, K=896, ra=8, adapter=SEPARATE)
    assert adapted["x"] == "chunk_copy", "the adapter multiplies floats"


def test_few_rows_are_one_pass_without_groups(program):
    for method in ("amx", "fma", "fma bf16"):
        plan = plan_of(program, method, K=4096, ldx=4100, rows=4, shared=True)
        assert plan["shared"] == "1" and plan["finishes_row_tiles"] == "0"
        assert plan["shrink"] == "1x128" and plan["shrink_group"] == UNLIMITED
        assert plan["row_tiles_first"] == "0" and plan["expand_group"] == UNLIMITED


def test_fma_takes_row_tiles_first_where_expand_is_short(program):
    assert plan_of(program, "fma", r=768)["row_tiles_first"] == "1"
    assert plan_of(program, "fma", r=769)["row_tiles_first"] == "0"
    assert plan_of(program, "fma", r=768, ra=8, adapter=SEPARATE)["row_tiles_first"] == "0"
    assert plan_of(program, "fma", rows=32)["row_tiles_first"] == "0"
    shared = plan_of(program, "fma", rows=33, shared=True)
    assert shared["row_tiles_first"] == "1" and shared["finishes_row_tiles"] == "0"
    # Its short stretches need no passes; panels first, 25 k-blocks are taken in chunks of 8.
    assert plan_of(program, "fma", r=768)["expand"] == "1x24"
    assert plan_of(program, "fma", r=769)["expand"] == "4x7"


def test_the_pivoted_form(program):
    plan = plan_of(program, "amx", pivoted=True)
    assert plan["merges_pivots"] == plan["h_is_pivots"] == "1" and plan["adapter_h_apart"] == "0"
    assert plan["base_panels"] == "7"
    assert plan_of(program, "fma bf16", pivoted=True)["h_is_pivots"] == "0", "h is float there"
    assert plan_of(program, "limbs", pivoted=True)["h_is_pivots"] == "0", "h is limbs there"
    separate = plan_of(program, "amx", pivoted=True, ra=16, adapter=SEPARATE)
    joined = plan_of(program, "amx", pivoted=True, ra=16, adapter=JOINED)
    assert separate["h_is_pivots"] == joined["h_is_pivots"] == "0", "the adapter adds to pivots"
    assert (separate["adapter_h_apart"], joined["adapter_h_apart"]) == ("0", "1")
    backward = plan_of(program, "amx", pivoted=True, backward=True)
    assert backward["merges_pivots"] == "0"
    # Panels first, a group's outputs of all rows take at most 512 KB.
    assert plan_of(program, "fma", r=1024, pivoted=True, rows=192)["expand_group"] == "20"
