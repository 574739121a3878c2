// Checks a layer's weights and packs them into one tensor (packed_layer.h).
#include "packed_layer.h"

#include <torch/headeronly/util/Exception.h>

#include <cstring>

#include "kernels/panels.h"

namespace hylora {
namespace {

constexpr uint64_t kMagic = 0x3141524f4c59480a;  // no tensor of weights starts with it by chance
constexpr uint64_t kAlignment = 64;

// The panels of a matrix [n, k]. `offset` counts bytes from the header's start; 0: there is none.
struct PackedPanels {
  uint64_t offset, n, k, bits;
};

// Stands at the start of a packed layer.
struct PackedHeader {
  uint64_t magic;
  PackedPanels shrink, expand, adapter_shrink, adapter_expand;
  uint64_t pivot_table, pivots;  // its offset or 0, and how many pivots it has
  uint64_t K, N, ra, adapter_column;
  Type type;
  Adapter adapter;
  float alpha;
};

uint64_t bytes_of(const Tensor& t) { return uint64_t(t.numel()) * uint64_t(t.element_size()); }

uint64_t aligned(uint64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

PivotTable pivot_table_of(const std::optional<Tensor>& table, int64_t n, int64_t r) {
  if (!table) return {};
  const int64_t numbers = ceil_div(n, 32) * int64_t(sizeof(PivotPanel) / 4);
  STD_TORCH_CHECK(table->numel() == numbers, "pivot_table must be cpu_pivot_table(pivots, ", n,
                  ") of ", r, " pivots: ", numbers, " numbers, got ", table->numel());
  return {static_cast<const PivotPanel*>(table->data_ptr()), n, r};
}

Panels panels_at(const char* base, const PackedPanels& part) {
  return {part.offset ? base + part.offset : nullptr, int64_t(part.n), int64_t(part.k),
          int(part.bits)};
}

}  // namespace

LayerCall call_of(const LayerWeights& w, Type type, int64_t K, bool backward) {
  STD_TORCH_CHECK(w.r >= 0 && w.ra >= 0 && w.N >= 0, "r, ra and n must not be negative");
  LayerCall call{};
  call.type = type, call.backward = backward, call.K = K, call.N = w.N;
  if (w.r == 0) {
    STD_TORCH_CHECK(w.ra == 0 && !w.pivot_table,
                    "ra must be 0 and pivot_table not given if r is 0");
    call.expand = panels_of(w.expand, type, "expand", w.N, K);
    return call;
  }
  call.ra = w.ra, call.alpha = float(w.alpha);
  const bool separate = w.adapter_shrink.has_value(), joined = w.ra > 0 && !separate;
  call.adapter = w.ra == 0 ? Adapter::none : joined ? Adapter::joined : Adapter::separate;
  const bool sorts = w.pivot_table && backward, merges = w.pivot_table && !backward;
  STD_TORCH_CHECK(
      w.adapter_expand.has_value() == (separate || (joined && merges)),
      "adapter_expand must be given with adapter_shrink, and in the pivoted form with a "
      "joined adapter; else neither");
  STD_TORCH_CHECK(
      !(joined && sorts),
      "adapter_shrink and adapter_expand must be given for the pivoted form's backward");
  const int64_t outputs = sorts ? K : w.N, others = w.pivot_table ? outputs - w.r : 0;
  STD_TORCH_CHECK(others >= 0, "r must be at most the ", outputs, " outputs, got ", w.r);
  const int64_t base_columns = round_up(w.r, 32), h_columns = joined ? w.r + w.ra : w.r;
  call.table = pivot_table_of(w.pivot_table, outputs, w.r);
  call.shrink = panels_of(w.shrink, type, "shrink", h_columns, sorts ? others : K);
  call.expand = panels_of(w.expand, type, "expand", merges ? others : w.N, h_columns);
  if (separate) {
    call.adapter_shrink = panels_of(*w.adapter_shrink, type, "adapter_shrink", w.ra,
                                    sorts ? base_columns + others : K);
    call.adapter_expand = panels_of(*w.adapter_expand, type, "adapter_expand",
                                    merges ? base_columns + others : w.N, w.ra);
  } else if (joined && merges) {
    call.adapter_expand =
        panels_of(*w.adapter_expand, type, "adapter_expand", w.r, w.r % 32 + w.ra);
  }
  STD_TORCH_CHECK(!(joined && call.is_quantized()),
                  "adapter_shrink and adapter_expand must be given for a quantised base");
  call.adapter_column = joined ? w.r : base_columns;
  return call;
}

Tensor pack_layer(const Tensor& like, const LayerWeights& w, int64_t K) {
  const LayerCall call = call_of(w, type_of(like, "like"), K, false);
  PackedHeader header{};
  header.magic = kMagic;
  header.pivots = uint64_t(call.table.pivots);
  header.K = uint64_t(K), header.N = uint64_t(w.N), header.ra = uint64_t(w.ra);
  header.adapter_column = uint64_t(call.adapter_column);
  header.type = call.type, header.adapter = call.adapter, header.alpha = call.alpha;
  uint64_t size = aligned(sizeof header);
  auto place = [&](const Tensor& part) {
    const uint64_t offset = size;
    size += aligned(bytes_of(part));
    return offset;
  };
  auto place_panels = [&](const Panels& panels, const Tensor& part) {
    return PackedPanels{place(part), uint64_t(panels.n), uint64_t(panels.k), uint64_t(panels.bits)};
  };
  if (w.r) header.shrink = place_panels(call.shrink, w.shrink);
  header.expand = place_panels(call.expand, w.expand);
  if (w.adapter_shrink)
    header.adapter_shrink = place_panels(call.adapter_shrink, *w.adapter_shrink);
  if (w.adapter_expand)
    header.adapter_expand = place_panels(call.adapter_expand, *w.adapter_expand);
  if (w.pivot_table) header.pivot_table = place(*w.pivot_table);

  Tensor layer = new_tensor(like, {int64_t(size) / int64_t(like.element_size())});
  char* base = static_cast<char*>(layer.data_ptr());
  want_huge_pages(base, size);
  std::memset(base, 0, size);  // so that equal layers have equal bytes between their parts, too
  std::memcpy(base, &header, sizeof header);
  auto copy = [&](uint64_t offset, const Tensor& part) {
    // An empty part has a null pointer, which memcpy must not be given even for no bytes.
    if (const size_t size = bytes_of(part)) std::memcpy(base + offset, part.data_ptr(), size);
  };
  if (w.r) copy(header.shrink.offset, w.shrink);
  copy(header.expand.offset, w.expand);
  if (w.adapter_shrink) copy(header.adapter_shrink.offset, *w.adapter_shrink);
  if (w.adapter_expand) copy(header.adapter_expand.offset, *w.adapter_expand);
  if (w.pivot_table) copy(header.pivot_table, *w.pivot_table);
  return layer;
}

LayerCall call_of_packed(const Tensor& layer) {
  const char* base = static_cast<const char*>(layer.data_ptr());
  PackedHeader header{};
  if (bytes_of(layer) >= sizeof header) std::memcpy(&header, base, sizeof header);
  STD_TORCH_CHECK(header.magic == kMagic, "layer must be cpu_pack_layer's result");
  LayerCall call{};
  call.type = header.type, call.adapter = header.adapter, call.alpha = header.alpha;
  call.K = int64_t(header.K), call.N = int64_t(header.N), call.ra = int64_t(header.ra);
  call.adapter_column = int64_t(header.adapter_column);
  call.shrink = panels_at(base, header.shrink);
  call.expand = panels_at(base, header.expand);
  call.adapter_shrink = panels_at(base, header.adapter_shrink);
  call.adapter_expand = panels_at(base, header.adapter_expand);
  if (header.pivot_table)
    call.table = {reinterpret_cast<const PivotPanel*>(base + header.pivot_table), call.N,
                  int64_t(header.pivots)};
  return call;
}

}  // namespace hylora
