// The fused pair of products, once for every way of multiplying (K: Fma, Paired, Amx) and type T.
//
//     middle = x first^T          rounded once, the adapter's columns scaled, never leaves cache
//     y      = middle second^T + bias
//
// A block of rows goes through both before the next one starts. In the pivoted form the base's
// second matrix is [I; U] with its rows sorted, and the identity is never multiplied by: forward,
// the pivot outputs stand beside the middle, and rows of y are woven out of them and the others;
// backward, x is sorted into (pivots, others) first and the pivots are added to the
// middle.
#pragma once
#include "adapter_gradients.h"
#include "expand.h"

namespace hylora {
namespace {

// Up to here multiply-adds keep up with memory, and other users of a core's tile unit don't matter:
// M = 1, 4.5 MB from L3, 232 us instead of 241 (one row), where the tiles are contended 230 and
// 580.
constexpr int64_t kFewestRows = 4;

template <class K, class T>
struct Engine {
  using B = Block<K, T>;

  static void block_of_rows(const Dual& d, int64_t m0, int64_t rows) {
    B b(d, m0, rows, false);
    b.lay_out(static_cast<char*>(scratch(0, b.lay_out(nullptr))));
    b.prepare();
    if (b.has_middle) first_product(b, 0, first_panels(d));
    if constexpr (B::kSplit)
      if (!b.fits_limbs()) return Engine<Fma<T>, T>::rows(d, m0, m0 + rows);
    second_product(b, 0, second_panels(d));
  }

  static void rows(const Dual& d, int64_t m0, int64_t m1) {
    const int64_t blocks = ceil_div(m1 - m0, B::rows_per_block(d));
    const int64_t even = blocks ? round_up(ceil_div(m1 - m0, blocks), 32) : 0;
    for (int64_t m = m0; m < m1; m += even) {
      const int64_t left = m1 - m;
      // A last block of less than a tile would have to be copied: the one before it takes it along.
      if (left > even && left < even + 32) {
        block_of_rows(d, m, left);
        return;
      }
      block_of_rows(d, m, left < even ? left : even);
    }
  }

  static size_t block_bytes(const Dual& d) { return B(d, 0, d.M, true).lay_out(nullptr); }
  static B shared_block(const Dual& d, void* memory) {
    B b(d, 0, d.M, true);
    b.lay_out(static_cast<char*>(memory));
    return b;
  }
  static void prepare(const Dual& d, void* memory) { shared_block(d, memory).prepare(); }
  static void first(const Dual& d, void* memory, int64_t begin, int64_t end) {
    B b = shared_block(d, memory);
    first_product(b, begin, end);
  }
  static void between(const Dual& d, void* memory) {
    B b = shared_block(d, memory);
    pivots_alone(b, 0, b.row_tiles());
  }
  static void second(const Dual& d, void* memory, int64_t begin, int64_t end) {
    B b = shared_block(d, memory);
    second_product(b, begin, end);
  }
  static void weave(const Dual& d, void* memory, int64_t row0, int64_t row1) {
    weave_rows(shared_block(d, memory), row0, row1, 0, ceil_div(d.N, 32), 0);
  }
};

// What each type is multiplied by, with many rows and with few: limbs only pay with many.
template <class Bf16, class FewBf16, class F>
void for_type(const Dual& d, F&& call) {
  if (d.type == Type::bf16) {
    if (d.M <= kFewestRows) return call(Engine<Fma<bf16>, bf16>());
    if (d.M <= 16) return call(Engine<FewBf16, bf16>());
    return call(Engine<Bf16, bf16>());
  }
#if defined(HYLORA_LIMBS)
  // Splitting rows into limbs costs as much as multiplying them by about 64 columns.
  const bool narrow = d.first.n + d.first_tail.n < 64 && d.first.n > 0;
  if (d.M > kFewRows && d.products && !narrow && d.K >= 64 && d.N >= 64) {
    if (d.type == Type::fp16) return call(Engine<Amx<2>, fp16>());
    if (d.products == 3) return call(Engine<Amx<2>, float>());
    return call(Engine<Amx<3>, float>());
  }
#endif
  if (d.type == Type::fp16) return call(Engine<Fma<fp16>, fp16>());
  call(Engine<Fma<float>, float>());
}

template <class Bf16, class FewBf16 = Bf16>
Kernels kernels_with() {
  Kernels table;
  table.rows = [](const Dual& d, int64_t m0, int64_t m1) {
    for_type<Bf16, FewBf16>(d, [&](auto engine) { engine.rows(d, m0, m1); });
  };
  table.block_bytes = [](const Dual& d) {
    size_t bytes = 0;
    for_type<Bf16, FewBf16>(d, [&](auto engine) { bytes = engine.block_bytes(d); });
    return bytes;
  };
  table.prepare = [](const Dual& d, void* block) {
    for_type<Bf16, FewBf16>(d, [&](auto engine) { engine.prepare(d, block); });
  };
  table.first = [](const Dual& d, void* block, int64_t begin, int64_t end) {
    for_type<Bf16, FewBf16>(d, [&](auto engine) { engine.first(d, block, begin, end); });
  };
  table.between = [](const Dual& d, void* block) {
    for_type<Bf16, FewBf16>(d, [&](auto engine) { engine.between(d, block); });
  };
  table.second = [](const Dual& d, void* block, int64_t begin, int64_t end) {
    for_type<Bf16, FewBf16>(d, [&](auto engine) { engine.second(d, block, begin, end); });
  };
  table.weave = [](const Dual& d, void* block, int64_t row0, int64_t row1) {
    for_type<Bf16, FewBf16>(d, [&](auto engine) { engine.weave(d, block, row0, row1); });
  };
  table.thin = [](const Thin& t, int64_t col0, int64_t col1) {
    if (t.type == Type::bf16) return thin_with<Bf16, bf16>(t, col0, col1);
    if (t.type == Type::fp16) return thin_with<Fma<fp16>, fp16>(t, col0, col1);
    thin_with<Fma<float>, float>(t, col0, col1);
  };
  table.pack = pack;
  table.unpack = unpack;
  return table;
}

}  // namespace
}  // namespace hylora
