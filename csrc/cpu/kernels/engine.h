// A layer, computed block of rows by block of rows, for every way of multiplying (K: Fma, Paired,
// Amx) and every type T.
//
// A block goes through shrink and expand before the next one starts, so h never leaves the cache;
// it is rounded to T once. In the pivoted form the base's expand matrix is [I; U] with its rows put
// in output order, and nothing is multiplied by I. Forward, the pivots are kept beside h, and rows
// of y are merged from them and the others (merge.h). Backward, dy is first sorted into pivots and
// others (block.h), and the pivots are added to h (shrink.h).
#pragma once
#include "adapter_gradients.h"
#include "expand.h"
#include "rows.h"

namespace hylora {
namespace {

// At 4 rows or fewer, FMA keeps up with memory and beats AMX when another process uses the core's
// tile unit (M = 1, 4.5 MB from L3: 230 us against 580; uncontended 232 against 241).
constexpr int64_t kFmaRows = 4;

template <class K, class T>
struct Engine {
  using B = Block<K, T>;

  static void block_of_rows(const LayerCall& call, int64_t m0, int64_t rows) {
    B b(call, m0, rows, false);
    b.lay_out(static_cast<char*>(scratch(Scratch::own_work, b.lay_out(nullptr))));
    b.prepare();
    if (b.plan.has_h) Shrink<B>(b).run(0, shrink_panels(call)), b.fix_h();
    if constexpr (B::kLimbs)
      if (!b.fits_limbs()) return Engine<Fma<T>, T>::rows(call, m0, m0 + rows);
    expand_product(b, 0, expand_panels(call));
  }

  static void rows(const LayerCall& call, int64_t m0, int64_t m1) {
    const int64_t blocks = ceil_div(m1 - m0, rows_per_block(B::kMethod, call));
    const int64_t even = blocks ? round_up(ceil_div(m1 - m0, blocks), 32) : 0;
    for (int64_t m = m0; m < m1; m += even) {
      const int64_t left = m1 - m;
      // A last block smaller than a tile would need a copy of x, so it joins the one before.
      if (left > even && left < even + 32) {
        block_of_rows(call, m, left);
        return;
      }
      block_of_rows(call, m, left < even ? left : even);
    }
  }

  // A block of all rows, which threads share: each has its own Block on the same memory.
  static B shared_block(const LayerCall& call, void* memory) {
    B b(call, 0, call.M, true);
    b.lay_out(static_cast<char*>(memory));
    return b;
  }
  static size_t block_bytes(const LayerCall& call) {
    return B(call, 0, call.M, true).lay_out(nullptr);
  }
  static void prepare(const LayerCall& call, void* memory) { shared_block(call, memory).prepare(); }
  static void shrink(const LayerCall& call, void* memory, int64_t panel0, int64_t panel1) {
    B b = shared_block(call, memory);
    Shrink<B>(b).run(panel0, panel1);
  }
  static void between(const LayerCall& call, void* memory) {
    B b = shared_block(call, memory);
    if (call.merges_pivots()) add_adapter_to_all_pivots(b, 0, b.row_tiles());
    b.fix_h();
  }
  static void expand(const LayerCall& call, void* memory, int64_t panel0, int64_t panel1) {
    B b = shared_block(call, memory);
    expand_product(b, panel0, panel1);
  }
  static void merge_pivots(const LayerCall& call, void* memory, int64_t row0, int64_t row1) {
    merge_rows(shared_block(call, memory), row0, row1, 0, ceil_div(call.N, 32), 0);
  }
};

// Splitting a row into bf16 limbs costs as much as multiplying it by about 64 columns, so limbs
// only pay with many rows and in wide products.
inline bool limbs_pay(const LayerCall& call) {
  const int64_t h_columns = call.shrink.n + call.adapter_shrink.n;
  const bool is_narrow = h_columns < 64 && call.shrink.n > 0;
  return call.limb_products && call.M > kFewRows && !is_narrow && call.K >= 64 && call.N >= 64;
}

// Calls work(engine) with the engine for the call's type and number of rows. Bf16: how this
// instruction set multiplies bf16; FewBf16: the same for at most 16 rows. Few rows of quantised
// panels are fixed point, which only Fma takes.
template <class Bf16, class FewBf16, class F>
void with_engine(const LayerCall& call, F&& work) {
  if (call.type == Type::bf16) {
    const bool fixed_point = call.is_quantized() && call.M <= kFewRows;
    if (call.M <= kFmaRows || fixed_point) return work(Engine<Fma<bf16>, bf16>());
    if (call.M <= 16) return work(Engine<FewBf16, bf16>());
    return work(Engine<Bf16, bf16>());
  }
#if defined(HYLORA_LIMBS)
  if (limbs_pay(call)) {
    if (call.type == Type::fp16) return work(Engine<Amx<2>, fp16>());
    if (call.limb_products == 3) return work(Engine<Amx<2>, float>());
    return work(Engine<Amx<3>, float>());
  }
#endif
  if (call.type == Type::fp16) return work(Engine<Fma<fp16>, fp16>());
  work(Engine<Fma<float>, float>());
}

// The kernels of an instruction set; templates as in with_engine.
template <class Bf16, class FewBf16 = Bf16>
Kernels kernels_with() {
  Kernels table;
  table.rows = [](const LayerCall& call, int64_t m0, int64_t m1) {
    with_engine<Bf16, FewBf16>(call, [&](auto engine) { engine.rows(call, m0, m1); });
  };
  table.block_bytes = [](const LayerCall& call) {
    size_t bytes = 0;
    with_engine<Bf16, FewBf16>(call, [&](auto engine) { bytes = engine.block_bytes(call); });
    return bytes;
  };
  table.prepare = [](const LayerCall& call, void* block) {
    with_engine<Bf16, FewBf16>(call, [&](auto engine) { engine.prepare(call, block); });
  };
  table.shrink = [](const LayerCall& call, void* block, int64_t panel0, int64_t panel1) {
    with_engine<Bf16, FewBf16>(call,
                               [&](auto engine) { engine.shrink(call, block, panel0, panel1); });
  };
  table.between = [](const LayerCall& call, void* block) {
    with_engine<Bf16, FewBf16>(call, [&](auto engine) { engine.between(call, block); });
  };
  table.expand = [](const LayerCall& call, void* block, int64_t panel0, int64_t panel1) {
    with_engine<Bf16, FewBf16>(call,
                               [&](auto engine) { engine.expand(call, block, panel0, panel1); });
  };
  table.merge_pivots = [](const LayerCall& call, void* block, int64_t row0, int64_t row1) {
    with_engine<Bf16, FewBf16>(call,
                               [&](auto engine) { engine.merge_pivots(call, block, row0, row1); });
  };
  table.adapter_gradients = [](const AdapterGradients& call, int64_t col0, int64_t col1) {
    if (call.type == Type::bf16) return adapter_gradients_by<Bf16, bf16>(call, col0, col1);
    if (call.type == Type::fp16) return adapter_gradients_by<Fma<fp16>, fp16>(call, col0, col1);
    adapter_gradients_by<Fma<float>, float>(call, col0, col1);
  };
  table.pack = pack;
  table.unpack = unpack;
  add_row_kernels(table);
  return table;
}

}  // namespace
}  // namespace hylora
