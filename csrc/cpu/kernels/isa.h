// Which instruction sets the kernels may use here: what the processor has (feature bits, never its
// model), what the system keeps across a context switch, and what HYLORA_ISA says.
#pragma once
#include <cstddef>

namespace hylora {

// Ascending: each level needs all that the one before it needs.
//   avx2          AVX2, FMA, F16C
//   avx512        AVX-512 F, BW, DQ, VL
//   avx512_bf16   AVX512-BF16
//   amx_bf16      AMX-TILE, AMX-BF16
enum class Isa { scalar, avx2, avx512, avx512_bf16, amx_bf16 };
constexpr int isa_count = 5;

const char* isa_name(Isa isa);

// False, and *isa untouched, where `name` is none of the five.
bool isa_parse(const char* name, Isa* isa);

// nullptr where this level can run here, else why not, in words. Asking for amx_bf16 asks the
// system for the use of tiles, once per process.
const char* isa_unavailable(Isa isa);

// The highest level that can run here.
Isa isa_best();

struct IsaChoice {
  Isa isa;
  const char* error;  // nullptr, or why HYLORA_ISA can't be followed; isa is then scalar
};

// What HYLORA_ISA named when the library was loaded, else isa_best().
const IsaChoice& isa_chosen();

// Bytes of one core's L2 cache, 1 MiB where nothing says.
size_t l2_bytes();

}  // namespace hylora
