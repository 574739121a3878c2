// The instruction set that the kernels use. It depends on the processor's feature bits (never its
// model), on the registers that the system saves at a context switch, and on HYLORA_ISA.
#pragma once
#include <cstddef>

namespace hylora {

// Ascending: each level needs all that the one before it needs.
//   avx2          AVX2, FMA, F16C
//   avx512        AVX-512 F, BW, DQ, VL
//   avx512_bf16   AVX512-BF16, AVX512-VNNI
//   amx_bf16      AMX-TILE, AMX-BF16
enum class Isa { scalar, avx2, avx512, avx512_bf16, amx_bf16 };
constexpr int isa_count = 5;

const char* isa_name(Isa isa);

// Sets *isa to the level of this name. Returns false, with *isa unchanged, for any other name.
bool isa_parse(const char* name, Isa* isa);

// The reason in words why this level can't run here, or nullptr. For amx_bf16 the process first has
// to ask the system for the use of tiles, which is done once.
const char* isa_unavailable(Isa isa);

// The highest level that can run here.
Isa isa_best();

struct IsaChoice {
  Isa isa;
  const char*
      error;  // the reason why HYLORA_ISA can't be followed (isa is then scalar), or nullptr
};

// The level that HYLORA_ISA named when the library was loaded, or else isa_best().
const IsaChoice& isa_chosen();

// Bytes of one core's L2 cache; 1 MiB if neither the processor nor the system reports it.
size_t l2_bytes();

}  // namespace hylora
