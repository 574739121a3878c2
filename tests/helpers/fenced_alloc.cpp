// Preloaded by backends/cpu/test_safety.py: what torch and the library allocate for tensors and
// scratch (aligned memory) ends at a page without access, but for what alignment leaves there.
// Those bytes and the ones before the block hold a pattern that free() checks, and a freed block
// stays out of reach: nothing may be read or written past the end, written before the start, or
// used again.
#include <sys/mman.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

extern "C" void* __libc_memalign(size_t, size_t);
extern "C" void __libc_free(void*);

namespace {

constexpr size_t kPage = 4096, kPages = size_t(1) << 24;  // 64 GB of addresses, each used once
constexpr unsigned char kPattern = 0xa5;

char* region() {
  static char* const start = static_cast<char*>(
      mmap(nullptr, kPages * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0));
  return start;
}

// Bytes of the block that starts in a page.
size_t* sizes() {
  static size_t* const start =
      static_cast<size_t*>(mmap(nullptr, kPages * sizeof(size_t), PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0));
  return start;
}

std::atomic<size_t> used{1};  // pages

void* fenced(size_t alignment, size_t size) {
  const size_t pages = (size + kPage - 1) / kPage;
  const size_t first = used.fetch_add(pages + 1);  // and one without access behind it
  if (alignment > kPage || size == 0 || first + pages + 1 >= kPages)
    return __libc_memalign(alignment, size);
  char* const base = region() + first * kPage;
  if (mprotect(base, pages * kPage, PROT_READ | PROT_WRITE) != 0) return nullptr;
  memset(base, kPattern, pages * kPage);
  sizes()[first] = size;
  return base + (pages * kPage - size) / alignment * alignment;
}

bool untouched(const char* begin, const char* end) {
  for (; begin < end; ++begin)
    if (static_cast<unsigned char>(*begin) != kPattern) return false;
  return true;
}

}  // namespace

extern "C" int posix_memalign(void** block, size_t alignment, size_t size) {
  *block = fenced(alignment, size);
  return *block ? 0 : ENOMEM;
}

extern "C" void* aligned_alloc(size_t alignment, size_t size) { return fenced(alignment, size); }

extern "C" void free(void* block) {
  char* const p = static_cast<char*>(block);
  if (p < region() || p >= region() + kPages * kPage) return __libc_free(block);
  const size_t first = size_t(p - region()) / kPage, size = sizes()[first];
  char* const base = region() + first * kPage;
  const size_t whole = (size + kPage - 1) / kPage * kPage;
  if (!untouched(base, p) || !untouched(p + size, base + whole)) {
    fprintf(stderr, "a block of %zu bytes was written past its ends\n", size);
    abort();
  }
  mprotect(base, whole, PROT_NONE);
  madvise(base, whole, MADV_DONTNEED);
}
