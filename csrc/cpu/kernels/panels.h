// Panels and the pivot table where speed does not matter: plain code for any processor.
#pragma once
#include <cstddef>

#include "../call.h"

namespace hylora {

// Copies row `row` of W [n, k] out of its panels, bit for bit; of a quantised matrix, rounded to
// `type`.
void copy_panel_row(Type type, const Panels& panels, int64_t row, void* to);

// Fills the pivot table of n outputs. `pivots` [r] are strictly ascending in [0, n).
void fill_pivot_table(const int32_t* pivots, int64_t r, int64_t n, PivotPanel* panels);

// Asks the system for huge pages. The memory must not have been touched yet. Weights are streamed,
// and with small pages the processor would stop at every 4 KB to translate the address.
void want_huge_pages(void* p, size_t bytes);

}  // namespace hylora
