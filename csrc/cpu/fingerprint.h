// A fingerprint of a matrix: whether it is what it was when panels were made of it.
#pragma once
#include <cstdint>

namespace hylora {

// Of `rows` runs of `bytes` bytes, the first bytes of which are `stride` bytes apart. Any change of
// one word of 8 bytes changes it, another change but for a chance of 2^-64. The number of threads
// doesn't matter.
int64_t fingerprint_of(const void* matrix, int64_t rows, int64_t bytes, int64_t stride);

}  // namespace hylora
