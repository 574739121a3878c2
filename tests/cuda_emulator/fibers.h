// A GPU's grid on one thread of a CPU: every thread of every block is a fiber.
//
// Blocks are alive together, so flags between them work and races between them show. Which fiber
// goes on is drawn from a seed wherever one may have to wait: at barriers, at a warp's common
// instructions, at atomics. Nothing but a barrier or an atomic orders one thread's memory before
// another's, and so ThreadSanitizer sees the races of the grid, not of the one thread it runs on.
//
// fibers.cpp is compiled without sanitizers: it doesn't touch the kernels' memory.
#pragma once
#include <cstddef>
#include <cstdint>

namespace hylora::emulation {

struct Order {
  uint64_t seed;  // 0: one after the other
  int alive;      // blocks alive together
};

int thread_index();
int block_index();
int block_count();
unsigned char* shared_memory();

// The block's barrier.
void synchronize();

// Instructions that the 32 threads of a warp execute together. They order no memory, as on a GPU.
enum class Together { ldmatrix, ldmatrix_transposed, mma_bf16, mma_fp16 };
void exchange(Together what, const uint32_t* in, int count, uint32_t (&out)[4]);

// Lets other threads go on. progress: this thread has done something that others may wait for.
void pause(bool progress);

// Asynchronous copies of this thread, performed as late as it may: due() hands out one that a wait
// for all but `pending` groups has to see done.
struct Copy {
  void* to;
  const void* from;
  int bytes;
};
void push(const Copy&);
void commit();
bool due(int pending, Copy&);

// Prints the kernel's fault and ends the process.
[[noreturn]] void fault(const char* what);

// Runs body(argument) in every thread of the grid; returns a hash of the order in which blocks came
// to atomics.
uint64_t run_grid(void (*body)(const void*), const void* argument, int blocks, int threads,
                  size_t shared_bytes, const Order&);

float from_bf16(uint16_t bits);
float from_fp16(uint16_t bits);
uint16_t to_bf16(float value);
uint16_t to_fp16(float value);

}  // namespace hylora::emulation
