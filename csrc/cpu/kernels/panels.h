// Panels and the pivoted form's table, where speed does not matter: plain code for any processor.
#pragma once
#include <cstddef>

#include "../call.h"

namespace hylora {

// Row `row` of W [n, k] out of its panels.
void copy_panel_row(Type type, const Panels& panels, int64_t row, void* to);

// pivots [r] strictly ascending in [0, n) -> the panels of 32 outputs.
void fill_order(const int32_t* pivots, int64_t r, int64_t n, OrderPanel* panels);

// Asks for huge pages behind memory that nothing has touched yet: weights are streamed.
void want_huge_pages(void* p, size_t bytes);

}  // namespace hylora
