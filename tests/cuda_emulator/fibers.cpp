#include "fibers.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <vector>

// The sanitizers' own calls, where the program is built with one.
extern "C" {
void* __tsan_create_fiber(unsigned flags) __attribute__((weak));
void __tsan_switch_to_fiber(void* fiber, unsigned flags) __attribute__((weak));
void* __tsan_get_current_fiber() __attribute__((weak));
void __tsan_acquire(void* at) __attribute__((weak));
void __tsan_release(void* at) __attribute__((weak));
void __asan_unpoison_memory_region(void const volatile* at, size_t size) __attribute__((weak));
void hylora_switch_stacks(void** from, void* to);
}

// Push the registers that a callee must preserve, change stacks, pop the ones kept there.
asm(R"(
.text
.globl hylora_switch_stacks
.type hylora_switch_stacks, @function
hylora_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size hylora_switch_stacks, .-hylora_switch_stacks
.section .note.GNU-stack, "", @progbits
.text
)");

namespace hylora::emulation {
namespace {

constexpr size_t kStack = 128 << 10, kMostFibers = 8000, kCopies = 64, kGroups = 16;
constexpr long kPatience = 200000;  // switches without anyone's progress: far more than any needs

struct Block;

struct Fiber {
  void* stack_pointer;
  void* tsan;
  Block* block;
  int thread;
  int at;  // in `runnable`, -1 while it waits
  Copy copies[kCopies];
  int first_copy, copy_end, groups[kGroups], first_group, group_end, open;
};

struct Warp {
  Together what;
  const void* caller;
  int arrived;
  Fiber* lanes[32];
  uint32_t in[32][6], out[32][4];
};

struct Block {
  int index, alive, at_barrier, barriers;
  unsigned char* shared;
  Fiber* fibers;
  Warp warps[32];
  char barrier[2];  // for the sanitizer: a fast thread's next barrier is not a slow one's last
};

// All of it is made before the grid runs: allocations by fibers would look like races.
Fiber* fibers;
char* stacks;
std::deque<Block> blocks;
Fiber* runnable[kMostFibers];
int runnable_count;

Fiber* current;
void* main_stack_pointer;
void* main_tsan;
char started, ended;
void (*grid_body)(const void*);
const void* grid_argument;
int grid_blocks, grid_threads, next_block, favourite;
long idle;
uint64_t state, hash, turn;
Order order;

uint64_t draw() {
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return state;
}

void make_runnable(Fiber* f) {
  f->at = runnable_count;
  runnable[runnable_count++] = f;
}

void make_wait(Fiber* f) {
  runnable[f->at] = runnable[--runnable_count];
  runnable[f->at]->at = f->at;
  f->at = -1;
}

// Seed 0 takes turns, even seeds draw evenly, odd ones let one block run ahead of the others.
Fiber* pick() {
  if (order.seed == 0) return runnable[turn++ % runnable_count];
  Fiber* f = runnable[draw() % runnable_count];
  if (order.seed % 2 == 0) return f;
  if (draw() % 512 == 0) favourite = int(draw() % grid_blocks);
  for (int tries = 0; tries < 6 && f->block->index != favourite; tries++)
    f = runnable[draw() % runnable_count];
  return f;
}

void switch_to(Fiber* f) {
  Fiber* before = current;
  if (f == before) return;
  current = f;
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(f->tsan, 1);  // 1: which orders nothing
  hylora_switch_stacks(&before->stack_pointer, f->stack_pointer);
}

void wait_here() {
  make_wait(current);
  if (runnable_count == 0) fault("deadlock: every thread waits at a barrier or for its warp");
  switch_to(pick());
}

void start_fiber();

void prepare(Fiber* f, Block* block, int thread) {
  void* const tsan = f->tsan;
  *f = Fiber{};
  f->tsan = tsan;
  if (!f->tsan && __tsan_create_fiber) f->tsan = __tsan_create_fiber(0);
  f->block = block, f->thread = thread, f->at = -1;
  char* const stack = stacks + (f - fibers) * kStack;
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(stack, kStack);
  void** top = reinterpret_cast<void**>(stack + kStack);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&start_fiber);
  for (int i = 0; i < 6; i++)
    *--top = nullptr;
  f->stack_pointer = top;
}

void start_block() {
  Block& block = blocks[next_block++];
  for (int i = 0; i < grid_threads; i++)
    make_runnable(block.fibers + i);
}

[[noreturn]] void end_fiber() {
  Block& block = *current->block;
  if (current->first_copy != current->copy_end) fault("a thread ended before its copies");
  if (block.at_barrier) fault("a thread ended while others wait at a barrier");
  idle = 0;
  make_wait(current);
  if (--block.alive == 0 && next_block < grid_blocks) start_block();
  if (runnable_count) switch_to(pick());
  for (Block& other : blocks)
    if (other.alive) fault("deadlock: threads wait for one that has ended");
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(main_tsan, 1);
  void* unused;
  hylora_switch_stacks(&unused, main_stack_pointer);
  abort();
}

void start_fiber() {
  if (__tsan_acquire) __tsan_acquire(&started);
  grid_body(grid_argument);
  if (__tsan_release) __tsan_release(&ended);
  end_fiber();
}

// ----------------------------------------------------- instructions of a warp: PTX ISA, 9.7.14

// Matrix i of ldmatrix: lane 8 i + r brings its row r, four words of two numbers.
uint16_t number(const Warp& w, int matrix, int row, int column) {
  return uint16_t(w.in[8 * matrix + row][column / 2] >> 16 * (column % 2));
}

void spread(Warp& w, bool transposed) {
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 4; i++) {
      const int major = lane / 4, minor = 2 * (lane % 4);
      const uint32_t low = transposed ? number(w, i, minor, major) : number(w, i, major, minor);
      const uint32_t high =
          transposed ? number(w, i, minor + 1, major) : number(w, i, major, minor + 1);
      w.out[lane][i] = low | high << 16;
    }
}

// in: a[4], b[2]; out: the product, which each lane adds to its sums.
void multiply(Warp& w, float (*widen)(uint16_t)) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; lane++) {
    const int group = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; half++) {
      for (int i = 0; i < 4; i++) {
        const int row = i % 2 ? group + 8 : group, column = (i < 2 ? 0 : 8) + 2 * t + half;
        a[row][column] = widen(uint16_t(w.in[lane][i] >> 16 * half));
      }
      for (int i = 0; i < 2; i++)
        b[8 * i + 2 * t + half][group] = widen(uint16_t(w.in[lane][4 + i] >> 16 * half));
    }
  }
  float d[16][8] = {};
  for (int row = 0; row < 16; row++)
    for (int k = 0; k < 16; k++)
      for (int column = 0; column < 8; column++)
        d[row][column] += a[row][k] * b[k][column];
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 4; i++)
      memcpy(&w.out[lane][i], &d[lane / 4 + (i < 2 ? 0 : 8)][2 * (lane % 4) + i % 2], 4);
}

void perform(Warp& w) {
  switch (w.what) {
  case Together::ldmatrix:
    return spread(w, false);
  case Together::ldmatrix_transposed:
    return spread(w, true);
  case Together::mma_bf16:
    return multiply(w, from_bf16);
  case Together::mma_fp16:
    return multiply(w, from_fp16);
  }
}

}  // namespace

int thread_index() { return current->thread; }
int block_index() { return current->block->index; }
int block_count() { return grid_blocks; }
unsigned char* shared_memory() { return current->block->shared; }

void synchronize() {
  Block& block = *current->block;
  if (block.alive < grid_threads) fault("a barrier after a thread has ended");
  char* const place = &block.barrier[block.barriers % 2];
  if (__tsan_release) __tsan_release(place);
  if (++block.at_barrier < grid_threads) {
    wait_here();
  } else {
    block.at_barrier = 0, block.barriers++, idle = 0;
    for (int i = 0; i < grid_threads; i++)
      if (block.fibers[i].at < 0) make_runnable(block.fibers + i);
    pause(true);
  }
  if (__tsan_acquire) __tsan_acquire(place);
}

__attribute__((noinline)) void exchange(Together what, const uint32_t* in, int count,
                                        uint32_t (&out)[4]) {
  const int lane = current->thread % 32;
  Warp& w = current->block->warps[current->thread / 32];
  const void* const caller = __builtin_return_address(0);
  if (w.arrived && (w.what != what || w.caller != caller))
    fault("divergence: one warp's threads do different things that they must do together");
  w.what = what, w.caller = caller, w.lanes[lane] = current;
  for (int i = 0; i < count; i++)
    w.in[lane][i] = in[i];
  if (++w.arrived < 32) {
    wait_here();
  } else {
    perform(w);
    w.arrived = 0, idle = 0;
    for (Fiber* other : w.lanes)
      if (other != current) make_runnable(other);
  }
  for (int i = 0; i < 4; i++)
    out[i] = w.out[lane][i];
}

void pause(bool progress) {
  hash = (hash ^ uint64_t(current->block->index + 1)) * 1099511628211u;
  idle = progress ? 0 : idle + 1;
  if (idle > kPatience) fault("deadlock: threads poll for what no one writes");
  switch_to(pick());
}

void push(const Copy& copy) {
  Fiber& f = *current;
  if (f.copy_end - f.first_copy == kCopies) fault("more copies on their way than the emulator has");
  f.copies[f.copy_end++ % kCopies] = copy;
  f.open++;
}

void commit() {
  Fiber& f = *current;
  if (f.group_end - f.first_group == kGroups) fault("more groups than the emulator has");
  f.groups[f.group_end++ % kGroups] = f.open;
  f.open = 0;
}

bool due(int pending, Copy& copy) {
  Fiber& f = *current;
  while (f.group_end - f.first_group > pending) {
    int& left = f.groups[f.first_group % kGroups];
    if (left-- > 0) {
      copy = f.copies[f.first_copy++ % kCopies];
      return true;
    }
    f.first_group++;
  }
  return false;
}

void fault(const char* what) {
  fprintf(stderr, "emulator: %s (block %d, thread %d)\n", what, current ? block_index() : -1,
          current ? thread_index() : -1);
  fflush(nullptr);
  _Exit(3);
}

uint64_t run_grid(void (*body)(const void*), const void* argument, int count, int threads,
                  size_t shared_bytes, const Order& wanted) {
  if (size_t(count) * threads > kMostFibers) fault("more threads than the emulator has");
  if (!fibers) {
    fibers = static_cast<Fiber*>(calloc(kMostFibers, sizeof(Fiber)));
    stacks = static_cast<char*>(mmap(nullptr, kMostFibers * kStack, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  }
  grid_body = body, grid_argument = argument, grid_blocks = count, grid_threads = threads;
  order = wanted, state = 0x9E3779B97F4A7C15u * (wanted.seed + 1), hash = 14695981039346656037u;
  next_block = favourite = runnable_count = 0, idle = 0, turn = 0;
  blocks.resize(count);
  for (int b = 0; b < count; b++) {
    blocks[b] = Block{};
    blocks[b].index = b, blocks[b].alive = threads, blocks[b].fibers = fibers + b * threads;
    void* shared = nullptr;  // of its exact size: one byte more is another's
    if (posix_memalign(&shared, 128, shared_bytes)) fault("out of memory");
    memset(shared, 0xFF, shared_bytes);  // NaN
    blocks[b].shared = static_cast<unsigned char*>(shared);
    for (int i = 0; i < threads; i++)
      prepare(fibers + b * threads + i, &blocks[b], i);
  }
  while (next_block < count && next_block < wanted.alive)
    start_block();
  if (__tsan_release) __tsan_release(&started);
  if (__tsan_get_current_fiber) main_tsan = __tsan_get_current_fiber();
  current = pick();
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(current->tsan, 1);
  hylora_switch_stacks(&main_stack_pointer, current->stack_pointer);
  current = nullptr;
  if (__tsan_acquire) __tsan_acquire(&ended);
  for (Block& block : blocks)
    free(block.shared);
  return hash;
}

// -------------------------------------------------------------------------------------- numbers

float from_bf16(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

float from_fp16(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31;
  const uint32_t fraction = bits & 1023;
  if (exponent == 0) {  // zero and what is smaller than normal: exact in float
    const float size = float(fraction) * 0x1p-24f;
    return sign ? -size : size;
  }
  const uint32_t wide =
      sign | (exponent == 31 ? 255u << 23 : (exponent + 112) << 23) | fraction << 13;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

uint16_t to_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if (value != value) return 0x7FFF;
  return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

uint16_t to_fp16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  if (value != value) return 0x7FFF;
  const float size = value < 0 ? -value : value;
  if (size >= 65520.0f) return sign | 0x7C00;
  if (size < 0x1p-14f) {  // a multiple of 2^-24: adding 0.5 leaves it in the last bits, rounded
    const float shifted = size + 0.5f;
    memcpy(&bits, &shifted, 4);
    return uint16_t(sign | (bits & 0x7FF));
  }
  bits &= 0x7FFFFFFF;
  bits += 0xFFF + (bits >> 13 & 1);
  return uint16_t(sign | ((bits >> 13) - (112 << 10)));
}

}  // namespace hylora::emulation
