// Detects the instruction sets (isa.h). Compiled for the baseline, since it runs before one is
// chosen.
#include "isa.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace hylora {
namespace {

constexpr const char* names[isa_count] = {"scalar", "avx2", "avx512", "avx512_bf16", "amx_bf16"};
#define HYLORA_ISA_NAMES "scalar, avx2, avx512, avx512_bf16, amx_bf16"

// setup.py defines a macro as 1 if the compiler can't compile that level's file.
#ifndef HYLORA_NO_AVX2
#define HYLORA_NO_AVX2 0
#endif
#ifndef HYLORA_NO_AVX512
#define HYLORA_NO_AVX512 0
#endif
#ifndef HYLORA_NO_AVX512_BF16
#define HYLORA_NO_AVX512_BF16 0
#endif
#ifndef HYLORA_NO_AMX_BF16
#define HYLORA_NO_AMX_BF16 0
#endif
constexpr bool has_file[isa_count] = {true, !HYLORA_NO_AVX2, !HYLORA_NO_AVX512,
                                      !HYLORA_NO_AVX512_BF16, !HYLORA_NO_AMX_BF16};

// A copy of HYLORA_ISA from when the library was loaded: later changes of the environment may move
// its strings.
struct Forced {
  char name[64] = "";
  Forced() {
    if (const char* value = std::getenv("HYLORA_ISA"))
      std::snprintf(name, sizeof name, "%s", value);
  }
} const forced;

#if defined(__x86_64__)

struct Registers {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r;
  if (!__get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d)) return Registers{};
  return r;
}

bool bit(uint64_t word, int index) { return (word >> index) & 1; }

// XCR0, the registers that the system saves for a thread: bit 1 SSE, 2 AVX, 5-7 AVX-512, 17-18 AMX.
// 0 if the system doesn't use XSAVE.
uint64_t xcr0(const Registers& leaf1) {
  if (!bit(leaf1.c, 27)) return 0;
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t(high) << 32 | low;
}

struct Feature {
  Isa isa;
  const char* name;
  bool present;
};

// "this processor has no ..." with the features that it lacks, or "".
struct Missing {
  char text[160];
};

// The features that `isa` and the levels below it need.
Missing missing_features(Isa isa) {
  const Registers leaf1 = cpuid(1, 0), leaf7 = cpuid(7, 0);
  const Registers leaf7_1 = leaf7.a >= 1 ? cpuid(7, 1) : Registers{};
  const Feature features[] = {
      {Isa::avx2, "AVX", bit(leaf1.c, 28)},
      {Isa::avx2, "AVX2", bit(leaf7.b, 5)},
      {Isa::avx2, "FMA", bit(leaf1.c, 12)},
      {Isa::avx2, "F16C", bit(leaf1.c, 29)},
      {Isa::avx512, "AVX-512F", bit(leaf7.b, 16)},
      {Isa::avx512, "AVX-512BW", bit(leaf7.b, 30)},
      {Isa::avx512, "AVX-512DQ", bit(leaf7.b, 17)},
      {Isa::avx512, "AVX-512VL", bit(leaf7.b, 31)},
      {Isa::avx512_bf16, "AVX512-BF16", bit(leaf7_1.a, 5)},
      {Isa::avx512_bf16, "AVX512-VNNI", bit(leaf7.c, 11)},
      {Isa::amx_bf16, "AMX-TILE", bit(leaf7.d, 24)},
      {Isa::amx_bf16, "AMX-BF16", bit(leaf7.d, 22)},
  };
  Missing missing{};
  for (const Feature& feature : features) {
    if (feature.present || feature.isa > isa) continue;
    const size_t used = std::strlen(missing.text);
    std::snprintf(missing.text + used, sizeof missing.text - used, "%s%s",
                  used ? ", " : "this processor has no ", feature.name);
  }
  return missing;
}

// True if the processor has the eight tiles of 16 rows of 64 bytes that the kernels configure.
bool tiles_fit() {
  if (cpuid(0x1d, 0).a < 1) return false;
  const Registers palette = cpuid(0x1d, 1);
  return palette.b >> 16 >= 8 && (palette.b & 0xffff) >= 64 && (palette.c & 0xffff) >= 16;
}

// Asks Linux for the use of tiles (8 KB of state). Threads and forked children inherit it.
bool tiles_granted() {
#if defined(__linux__)
  constexpr long arch_req_xcomp_perm = 0x1023, xtiledata = 18;
  return syscall(SYS_arch_prctl, arch_req_xcomp_perm, xtiledata) == 0;
#else
  return false;
#endif
}

const char* amx_refusal() {
  if (!tiles_fit()) return "this processor's AMX tiles are not eight of 16 rows of 64 bytes";
  static const bool granted = tiles_granted();
  return granted ? nullptr : "the system refuses this process the use of AMX tiles";
}

const char* processor_lacks(Isa isa) {
  static const Missing missing[isa_count] = {
      missing_features(Isa::scalar), missing_features(Isa::avx2), missing_features(Isa::avx512),
      missing_features(Isa::avx512_bf16), missing_features(Isa::amx_bf16)};
  if (const char* text = missing[int(isa)].text; *text) return text;
  static const uint64_t saved = xcr0(cpuid(1, 0));
  constexpr uint64_t avx = 0x6, avx512 = 0xe6, amx = 0x600e6;
  if (isa >= Isa::avx2 && (saved & avx) != avx)
    return "the system does not save AVX registers (XCR0)";
  if (isa >= Isa::avx512 && (saved & avx512) != avx512)
    return "the system does not save AVX-512 registers (XCR0)";
  if (isa == Isa::amx_bf16 && (saved & amx) != amx)
    return "the system does not save AMX tiles (XCR0)";
  return isa == Isa::amx_bf16 ? amx_refusal() : nullptr;
}

// L2 bytes by cpuid leaf 4, or AMD's leaf 0x8000001d of the same form: each subleaf describes a
// cache, the one after the last has type 0.
size_t l2_of_leaf(uint32_t leaf) {
  for (uint32_t index = 0; index < 16; ++index) {
    const Registers r = cpuid(leaf, index);
    const uint32_t type = r.a & 31, level = r.a >> 5 & 7;
    if (type == 0) break;
    if (level != 2 || type == 2) continue;  // type 2 holds instructions only
    const size_t ways = (r.b >> 22) + 1, parts = (r.b >> 12 & 1023) + 1, line = (r.b & 4095) + 1;
    return ways * parts * line * (size_t(r.c) + 1);
  }
  return 0;
}

size_t l2_of_processor() {
  const size_t bytes = l2_of_leaf(4);
  return bytes ? bytes : l2_of_leaf(0x8000001d);
}

#else

const char* processor_lacks(Isa isa) {
  return isa == Isa::scalar ? nullptr : "this processor is not x86-64";
}

size_t l2_of_processor() { return 0; }

#endif

size_t find_l2() {
  long bytes = long(l2_of_processor());
#if defined(_SC_LEVEL2_CACHE_SIZE)
  if (bytes <= 0) bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
  return bytes >= 128 << 10 ? size_t(bytes) : size_t(1) << 20;
}

IsaChoice choose() {
  if (!*forced.name) return {isa_best(), nullptr};
  static char error[256];
  Isa isa = Isa::scalar;
  if (!isa_parse(forced.name, &isa)) {
    std::snprintf(error, sizeof error, "HYLORA_ISA must be one of " HYLORA_ISA_NAMES ", got '%s'",
                  forced.name);
    return {Isa::scalar, error};
  }
  if (const char* reason = isa_unavailable(isa)) {
    std::snprintf(error, sizeof error, "HYLORA_ISA=%s can't be served: %s", forced.name, reason);
    return {Isa::scalar, error};
  }
  return {isa, nullptr};
}

}  // namespace

const char* isa_name(Isa isa) { return names[int(isa)]; }

bool isa_parse(const char* name, Isa* isa) {
  for (int level = 0; level < isa_count; ++level) {
    if (std::strcmp(name, names[level]) != 0) continue;
    *isa = Isa(level);
    return true;
  }
  return false;
}

const char* isa_unavailable(Isa isa) {
  if (const char* reason = processor_lacks(isa)) return reason;
  return has_file[int(isa)] ? nullptr
                            : "not compiled in: the compiler did not know its instructions";
}

Isa isa_best() {
  int level = isa_count - 1;
  while (level > 0 && isa_unavailable(Isa(level)))
    --level;
  return Isa(level);
}

const IsaChoice& isa_chosen() {
  static const IsaChoice choice = choose();
  return choice;
}

size_t l2_bytes() {
  static const size_t bytes = find_l2();
  return bytes;
}

}  // namespace hylora
