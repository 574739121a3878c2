// The scalar side of packing (panels.h).
#include "panels.h"

#include <sys/mman.h>

#include <algorithm>

#include "../quantized_panels.h"

namespace hylora {

void copy_panel_row(Type type, const Panels& panels, int64_t row, void* to) {
  if (panels.bits) return copy_quantized_row(type, panels, row, to);
  const int64_t panel = row / 32, n = row % 32, k = panels.k;
  if (type == Type::bf16) {
    const auto* from = static_cast<const uint16_t*>(panels.data) + panel * round_up(k, 32) * 32 +
                       (n / 16) * 512 + (n % 16) * 2;
    for (int64_t j = 0; j < k; j++)
      static_cast<uint16_t*>(to)[j] = from[j / 32 * 1024 + j % 32 / 2 * 32 + j % 2];
  } else if (type == Type::fp16) {
    const auto* from = static_cast<const uint16_t*>(panels.data) + panel * k * 32 + n;
    for (int64_t j = 0; j < k; j++)
      static_cast<uint16_t*>(to)[j] = from[j * 32];
  } else {
    const auto* from = static_cast<const uint32_t*>(panels.data) + panel * k * 32 + n;
    for (int64_t j = 0; j < k; j++)
      static_cast<uint32_t*>(to)[j] = from[j * 32];
  }
}

void fill_pivot_table(const int32_t* pivots, int64_t r, int64_t n, PivotPanel* panels) {
  const int64_t count = (n + 31) / 32;
  int32_t pivot = 0, other = 0;
  for (int64_t p = 0; p < count; p++) {
    PivotPanel panel{};
    panel.pivot0 = pivot, panel.other0 = other;
    for (int c = 0; c < 32 && p * 32 + c < n; c++) {
      if (pivot < r && pivots[pivot] == p * 32 + c) {
        panel.is_pivot |= 1u << c;
        panel.pivot_at[pivot - panel.pivot0] = uint8_t(c);
        panel.from[c] = uint8_t(pivot++ - panel.pivot0);
      } else {
        panel.other_at[other - panel.other0] = uint8_t(c);
        panel.from[c] = uint8_t(other++ - panel.other0);
      }
    }
    panels[p] = panel;
  }
}

void want_huge_pages(void* p, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t huge = uintptr_t(2) << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + huge - 1) / huge * huge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + bytes) / huge * huge;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace hylora
