// A block of rows on its way through both products: what lies where, and how x gets there.
#pragma once
#include "pipeline.h"
#include "pivots.h"

namespace hylora {
namespace {

// The part of L2 (2 MB where there are tiles) for a group of panels. The next group is fetched
// while this one is worked on, and rows and partial sums need the rest.
constexpr int64_t kPanelsInL2 = 576 << 10;
// The same for a group's outputs of the rows of a block, where panels stay and rows stream.
constexpr int64_t kOthersInL2 = 512 << 10;
// Multiply-adds whose second matrix is longer (in k-blocks) read rows too often when rows go first:
// M = 512, K = 2048 0.93 of the speed, K = 1024 0.91; k = 301 1.05, k = 768 1.08.
constexpr int64_t kRowsFirstBlocks = 24;

// K: how to multiply (Fma, Paired, Amx); T: the tensors' type; A: what rows are kept as.
template <class K, class T>
struct Block {
  using A = typename K::A;
  using Type = T;
  static constexpr bool kTiles = K::kTiles;
  static constexpr int kWide = K::kWide;
  static constexpr bool kRowsStay = K::kTiles && K::kPlanes == 1;  // in L1; else panels do
  static constexpr bool kTilePanels = __is_same(T, bf16);          // else [k][32]
  static constexpr bool kSplit = K::kPlanes > 1;                   // rows and panels as bf16 limbs

  const Dual& d;
  K k;
  const int64_t m0, rows;  // of x
  const bool shared;       // few rows: several threads work on this block, each on its panels
  // A row tile goes through a group of panels of the second matrix before the next one does: y is
  // written in long runs, not 128 bytes of one row after the other (float32, M = 61, K = 194,
  // N = 4982, r = 44: 0.53 ms instead of 1.1).
  const bool rows_first;
  const bool tilewise;  // and is done then, so what the second product leaves is one tile's
  const int64_t r32;    // panels of the base in the middle
  const bool has_middle, weaves;
  const bool pivots_in_middle;  // the middle, as it is kept, is what the pivot outputs are
  const bool joined_pivots;     // the adapter's columns follow the base's, and weave into pivots
  bool straight;                // x is read where it is
  bool whole_x;                 // or laid down before the first product (else chunk by chunk)
  int64_t chunk;                // k-blocks of 32 a pass

  A *x = nullptr, *middle = nullptr;
  A* adapter = nullptr;  // its columns of the middle, with nothing of the base's beside them
  T *pivots = nullptr, *others = nullptr, *carried = nullptr;
  T *bias = nullptr, *biased = nullptr;  // sorted; pivots with theirs, where the middle has none
  float *partial = nullptr, *row_most = nullptr;
  bf16* split = nullptr;
  int64_t ldx, x_plane, ld_middle, middle_plane, ld_adapter, adapter_plane;
  int64_t ld_pivots, ld_others = 0;
  int64_t group_begin = 0;  // the first of the panels that go through L2 now
  bool out_of_range = false;

  Block(const Dual& d, int64_t m0, int64_t rows, bool shared)
      : d(d), k(d.products), m0(m0), rows(rows), shared(shared),
        rows_first(kRowsStay ? !shared
                             : !kTiles && rows > 32 && second_blocks(d) <= kRowsFirstBlocks),
        tilewise(rows_first && !shared), r32(ceil_div(d.first.n, 32)), has_middle(d.first.n > 0),
        weaves(d.order.panels && !d.sorts_input),
        pivots_in_middle(weaves && __is_same(A, T) && !kSplit && d.ra == 0),
        joined_pivots(weaves && d.ra > 0 && d.first_tail.n == 0) {
    const bool exact_k = !kTilePanels || d.K % 32 == 0;
    const bool half_tile = K::kTiles && rows > 16 && rows < 32;
    // Rows a multiple of 4096 bytes apart fall into one set of L1.
    const bool far_rows = rows > 4 && d.ldx * int64_t(sizeof(A)) % 4096 == 0;
    straight = __is_same(A, T) && !kSplit && exact_k && !half_tile && !far_rows && !d.sorts_input;
    whole_x = !straight && (shared || d.sorts_input || !has_middle);
    chunk = shared ? int64_t(1) << 40 : K::kChunk;
  }

  static int64_t rows_per_block(const Dual& d) {
    // One chunk spills nothing, so there is room in L2 for more rows.
    return K::kTiles && !kSplit && ceil_div(d.K, 32) <= K::kChunk ? 2 * K::kRows : K::kRows;
  }

  static int64_t second_blocks(const Dual& d) {
    return ceil_div(d.second.k, 32) + (d.first_tail.n ? ceil_div(d.second_tail.k, 32) : 0);
  }

  // ---------------------------------------------------------------------------------------- layout

  // Sets the pointers into `memory` (null: only counts); returns the bytes.
  size_t lay_out(char* memory) {
    size_t at = 0;
    auto take = [&](int64_t size) {
      char* p = memory + at;
      at += size_t(round_up(size, 64));
      return p;
    };
    const int64_t padded = round_up(rows, 32);
    const int64_t x_rows = whole_x || !kRowsStay ? padded : 32;
    const int64_t not_pivots = d.order.n - d.order.pivots;
    const int64_t x_width = d.sorts_input ? 32 * r32 + round_up(not_pivots, 32)
                            : whole_x     ? round_up(d.K, 32)
                            : straight    ? 0
                                          : chunk * 32;
    ldx = x_width ? odd_lines<A>(x_width) : 0;
    x_plane = x_rows * ldx;
    x = reinterpret_cast<A*>(take(K::kPlanes * x_plane * int64_t(sizeof(A))));
    ld_middle = odd_lines<A>(32 * first_panels(d));
    middle_plane = padded * ld_middle;
    middle = reinterpret_cast<A*>(take((K::kPlanes * middle_plane + 32) * int64_t(sizeof(A))));
    adapter = middle + 32 * r32, ld_adapter = ld_middle, adapter_plane = middle_plane;
    if (joined_pivots) {
      ld_adapter = odd_lines<A>(round_up(d.second_tail.k, 32));
      adapter_plane = padded * ld_adapter;
      adapter = reinterpret_cast<A*>(take(K::kPlanes * adapter_plane * int64_t(sizeof(A))));
    }
    // 32 numbers are read from any pivot on.
    ld_pivots = weaves ? 32 * r32 + 32 : 0;
    const int64_t kept_rows = tilewise ? 32 : padded;  // until they are woven
    pivots = reinterpret_cast<T*>(take(
        pivots_in_middle ? 0
                         : ((d.ra ? kept_rows : padded) * ld_pivots + 32) * int64_t(sizeof(T))));
    if (pivots_in_middle) pivots = reinterpret_cast<T*>(middle), ld_pivots = ld_middle;
    if (weaves) {
      const int64_t outputs = ceil_div(d.second.n, 32);
      const int64_t group = shared ? outputs : most_outputs_a_group();  // few rows keep all
      // Of more groups than one the last 32 others of the group before stand in front of a group.
      ld_others = odd_lines<T>(32 * (1 + at_most(outputs, group)));
      others = reinterpret_cast<T*>(take((kept_rows * ld_others + 64) * int64_t(sizeof(T))));
      carried = reinterpret_cast<T*>(take(outputs > group ? padded * 32 * int64_t(sizeof(T)) : 0));
      bias = reinterpret_cast<T*>(take(d.bias ? (d.N + d.ra + 128) * int64_t(sizeof(T)) : 0));
      if (d.bias && pivots_in_middle)
        biased = reinterpret_cast<T*>(
            take((shared ? padded : kWovenRows) * ld_pivots * int64_t(sizeof(T)) + 128));
    }
    if (!shared) {
      const int64_t longest = ceil_div(d.first.k > d.first_tail.k ? d.first.k : d.first_tail.k, 32);
      const int64_t first = longest > chunk ? first_panels(d) * row_tiles() : 0;
      const int64_t second = kRowsStay ? panels_in_l2(1) : K::kWide * row_tiles();
      partial = reinterpret_cast<float*>(take((first > second ? first : second) * 4096));
      row_most = reinterpret_cast<float*>(take(kSplit ? padded * 4 : 0));
      split = reinterpret_cast<bf16*>(take(kSplit ? 2 * K::kPlanes * split_plane() * 2 : 0));
    }
    return at;
  }

  // A stride of an odd number of cache lines spreads rows over the sets of L1.
  template <class Number>
  static int64_t odd_lines(int64_t width) {
    const int64_t per_line = 64 / int64_t(sizeof(Number));
    return (ceil_div(width, per_line) | 1) * per_line;
  }
  // Room for a chunk of a panel or for a whole panel of the adapter, whichever is longer.
  int64_t split_plane() const {
    const int64_t tail = ceil_div(d.second_tail.k, 32);
    return (chunk > tail ? chunk : tail) * 1024;
  }
  bf16* split_tail() const { return split + K::kPlanes * split_plane(); }
  int64_t row_tiles() const { return ceil_div(rows, 32); }

  // The last tile of a ragged block starts early enough to be whole; it finishes only its own rows.
  int64_t row_of(int64_t tile) const {
    return K::kTiles && rows >= 32 && tile * 32 + 32 > rows ? rows - 32 : tile * 32;
  }
  int64_t rows_of(int64_t tile) const {
    return rows - row_of(tile) < 32 ? rows - row_of(tile) : 32;
  }

  // --------------------------------------------------------------------------------------------- x

  T* pivots_row(int64_t r) const { return pivots + (tilewise && d.ra ? r % 32 : r) * ld_pivots; }
  T* biased_row(int64_t r) const { return biased + (shared ? r : r % kWovenRows) * ld_pivots; }
  // 32 of the group before, then the group's others.
  T* others_row(int64_t r) const { return others + (tilewise ? r % 32 : r) * ld_others; }
  const T* x_row(int64_t r) const { return static_cast<const T*>(d.x) + (m0 + r) * d.ldx; }

  void prepare() {
    if (kSplit)
      for (int64_t r = 0; r < rows; r++)
        row_most[r] = 0;
    if (weaves && d.bias)  // sorted as the pivots' and the others' columns are
      sort_columns(d.order, static_cast<const T*>(d.bias),
                   [&](int part, const T* numbers, int64_t at, int) {
                     copy_row_of(bias + (part ? 32 * r32 : 0) + at, numbers);
                   });
    if (!whole_x) return;
    for (int64_t r = 0; r < rows; r++) {
      if (d.sorts_input)
        sort_row(x_row(r), x + r * ldx, r);
      else
        copy_row(x_row(r), x + r * ldx, d.K, r);
    }
  }

  void copy_columns(int64_t row0, int64_t count, int64_t begin, int64_t end) {
    for (int64_t r = 0; r < count; r++)
      copy_row(x_row(row0 + r) + begin, x + r * ldx, end - begin, row0 + r);
    asm volatile("" ::: "memory");
  }

  static int64_t panels_in_l2(int64_t blocks) {
    const int64_t panels = kPanelsInL2 / (1024 * int64_t(sizeof(T)) * (blocks > 4 ? blocks : 4));
    return panels > kWide ? panels / kWide * kWide : kWide;
  }
  // `count` panels in even groups of at most `most`: every group reads the rows again.
  static int64_t panels_a_group(int64_t count, int64_t most) {
    return count ? ceil_div(count, ceil_div(count, most)) : 1;
  }
  // Of the second matrix.
  int64_t most_outputs_a_group() const {
    if (rows_first) return panels_in_l2(second_blocks(d));
    if (shared || !weaves) return int64_t(1) << 40;
    const int64_t panels = kOthersInL2 / (rows * 32 * int64_t(sizeof(T)));
    return panels > kWide ? panels / kWide * kWide : kWide;
  }

  // `width` numbers, zero padded to 32.
  void copy_row(const T* from, A* to, int64_t width, int64_t r) {
    if constexpr (__is_same(A, T) && !kSplit) {
      int64_t c = 0;
      for (; c + 32 <= width; c += 32)
        copy_row_of(to + c, from + c);
      for (int64_t i = c; i < round_up(width, 32); i++)
        to[i] = i < width ? from[i] : T{};
      return;
    }
    Range range;
    for (int64_t c = 0; c < width; c += 32) {
      Row value = c + 32 <= width ? load_row(from + c) : load_row(from + c, int(width - c));
      if constexpr (kSplit) range.see(value);
      k.put(to + c, x_plane, value);
    }
    if constexpr (kSplit) {
      row_most[r] = range.most() > row_most[r] ? range.most() : row_most[r];
      out_of_range |= range.unfit();
    }
  }

  // A row in natural order -> its pivots, zero padded to 32, then its others, zero padded.
  void sort_row(const T* from, A* to, int64_t r) {
    sort_columns(d.order, from, [&](int part, const T* numbers, int64_t at, int count) {
      copy_row(numbers, to + (part ? 32 * r32 : 0) + at, count, r);
    });
  }

  // What limbs can't hold: numbers that aren't finite or that rounding could overflow.
  struct Range {
    V largest{};
    VU wrong{};
    HYLORA_MEMBER void see(const Row& value) {
      for (int i = 0; i < P; i++) {
        VU magnitude = float_as_bits(value.v[i]) & 0x7fffffff;
        wrong |= reinterpret_cast<VU>(magnitude > 0x7f000000);
        V size = bits_as_float(magnitude);
        largest = size > largest ? size : largest;
      }
    }
    float most() const {
      float most = 0;
      for (int j = 0; j < W; j++)
        most = largest[j] > most ? largest[j] : most;
      return most;
    }
    bool unfit() const {
      uint32_t any = 0;
      for (int j = 0; j < W; j++)
        any |= wrong[j];
      return any != 0;
    }
  };

  // AMX flushes denormals, so the lower limbs of a row that is tiny as a whole would be lost.
  bool fits_limbs() const {
    bool fits = !out_of_range;
    if constexpr (kSplit)
      for (int64_t r = 0; r < rows; r++)
        fits &= row_most[r] == 0 || row_most[r] >= 0x1p-60f;
    return fits;
  }

  // ---------------------------------------------------------------------------------------- tiles

  static const char* panel_at(const Panels& panels, int64_t panel, int64_t block) {
    const T* data = static_cast<const T*>(panels.data);
    return reinterpret_cast<const char*>(
        kTilePanels ? data + (panel * ceil_div(panels.k, 32) + block) * 1024
                    : data + (panel * panels.k + block * 32) * 32);
  }

  // k-blocks [block, block + width) of the first matrix's panels from p on, at most `group` of
  // them.
  Fetch fetch_panels(int64_t p, int64_t block, int64_t width, int64_t left, int64_t group,
                     int64_t steps) const {
    const int64_t blocks = ceil_div(d.first.k, 32), in_base = r32 - p;
    if (in_base <= 0 || block >= blocks) return {};
    int64_t count = left < group ? left : group;
    if (count > in_base) count = in_base;
    if (width > blocks - block) width = blocks - block;
    return Fetch(panel_at(d.first, p, block), count, width * 2048, blocks * 2048, steps);
  }

  // The step of rows `a` times k-blocks from `block` on of a panel; returns how many, 0 or 1.
  HYLORA_MEMBER int steps_of(Step<A>* steps, const A* a, int64_t lda, int64_t plane,
                             const Panels& panels, int64_t panel, int64_t block, int64_t width,
                             bf16* limbs) const {
    if (width <= 0) return 0;
    if constexpr (kSplit) {
      K::split_panel(reinterpret_cast<const T*>(panel_at(panels, panel, block)), width, limbs,
                     split_plane());
      steps[0] = {a, lda, limbs, width, plane, split_plane()};
    } else {
      steps[0] = {a, lda, panel_at(panels, panel, block), width, 0, panels.k * 32};
    }
    return 1;
  }
};

// How many panels a tile takes from p on, `end` not among them.
template <class B>
int64_t panels_a_tile(int64_t p, int64_t end) {
  return end - p < B::kWide ? 1 : B::kWide;
}

}  // namespace
}  // namespace hylora
