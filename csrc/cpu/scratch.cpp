#include <sys/mman.h>

#include <cstdlib>

#include "call.h"

namespace hylora {
namespace {

constexpr size_t kHugePage = size_t(2) << 20;

struct Memory {
  void* p = nullptr;
  size_t size = 0;
  ~Memory() { std::free(p); }
};

thread_local Memory memories[2];

}  // namespace

void* scratch(int which, size_t bytes) {
  Memory& memory = memories[which];
  if (bytes > memory.size) {
    std::free(memory.p);
    // Whole huge pages where it is worth one: a block walks over many rows, each on its own page.
    const size_t unit = bytes >= kHugePage / 2 ? kHugePage : 64;
    memory.size = (bytes + unit - 1) / unit * unit;
    memory.p = std::aligned_alloc(unit, memory.size);
    if (!memory.p) std::abort();
#if defined(MADV_HUGEPAGE)
    if (unit == kHugePage) madvise(memory.p, memory.size, MADV_HUGEPAGE);
#endif
  }
  return memory.p;
}

}  // namespace hylora
