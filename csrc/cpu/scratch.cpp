// Scratch memory of each thread (call.h).
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

void* scratch(Scratch which, size_t bytes) {
  Memory& memory = memories[int(which)];
  if (bytes > memory.size) {
    std::free(memory.p);
    // From half a huge page on, use whole ones: a block's rows lie far apart, and with small pages
    // each row would need an entry of the TLB.
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
