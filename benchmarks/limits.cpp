// Limits of one machine: multiply-adds a second from registers and from L1, bytes a second read from
// a buffer of each size given. Prints one JSON object.
//
//   limits THREADS SECONDS BYTES...
//
// Bytes are of all threads together; every thread reads its own part. Compiled for the baseline:
// wider instructions run only after a check of the processor and the system.
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define TARGET(isa) __attribute__((target(isa), noinline))
#endif

namespace {

volatile uint64_t sink;
volatile float one_third = 0.333f, two_thirds = 0.667f;  // unknown to the compiler

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Work a second of `threads` threads that each do `work(thread, n)` between two barriers. The best
// of five: in the others other processes ran too.
double rate(int threads, double seconds, const std::function<double(int, long)>& work) {
  long n = 1;
  for (;; n *= 2) {
    double begin = now();
    work(0, n);
    if (now() - begin > seconds / 4) break;
  }
  n *= 4;
  double best = 0;
  for (int repeat = 0; repeat < 5; repeat++) {
    pthread_barrier_t barrier;
    pthread_barrier_init(&barrier, nullptr, threads);
    std::vector<double> done(threads), from(threads), to(threads);
    std::vector<std::thread> team;
    for (int t = 0; t < threads; t++)
      team.emplace_back([&, t] {
        pthread_barrier_wait(&barrier);
        from[t] = now();
        done[t] = work(t, n);
        to[t] = now();
      });
    for (auto& thread : team) thread.join();
    pthread_barrier_destroy(&barrier);
    double total = 0;
    for (double amount : done) total += amount;
    double first = *std::min_element(from.begin(), from.end());
    double last = *std::max_element(to.begin(), to.end());
    best = std::max(best, total / (last - first));
  }
  return best;
}

double fma_plain(long n) {
  float a[8] = {}, x = one_third, y = two_thirds;
  for (long i = 0; i < n * 1024; i++)
    for (float& value : a) {
      value = value * x + y;
      asm volatile("" : "+m"(value));
    }
  sink = uint64_t(a[0] + a[7]);
  return n * 1024.0 * 8 * 2;
}

double read_plain(const char* data, size_t bytes, int) {
  uint64_t sums[8] = {};
  for (size_t i = 0; i < bytes; i += 64)
    for (int j = 0; j < 8; j++) sums[j] ^= reinterpret_cast<const uint64_t*>(data + i)[j];
  for (uint64_t sum : sums) sink = sum;
  return double(bytes);
}

#if defined(__x86_64__)

TARGET("avx2,fma") double fma_avx2(long n) {
  __m256 a[12], x = _mm256_set1_ps(one_third), y = _mm256_set1_ps(two_thirds);
  for (__m256& value : a) value = y;
  for (long i = 0; i < n * 1024; i++) {
#pragma GCC unroll 12
    for (int j = 0; j < 12; j++) a[j] = _mm256_fmadd_ps(a[j], x, y);
  }
  for (int j = 1; j < 12; j++) a[0] = _mm256_add_ps(a[0], a[j]);
  sink = uint64_t(_mm256_cvtss_f32(a[0]));
  return n * 1024.0 * 12 * 8 * 2;
}

TARGET("avx512f") double fma_avx512(long n) {
  __m512 a[16], x = _mm512_set1_ps(one_third), y = _mm512_set1_ps(two_thirds);
  for (__m512& value : a) value = y;
  for (long i = 0; i < n * 1024; i++) {
#pragma GCC unroll 16
    for (int j = 0; j < 16; j++) a[j] = _mm512_fmadd_ps(a[j], x, y);
  }
  for (int j = 1; j < 16; j++) a[0] = _mm512_add_ps(a[0], a[j]);
  sink = uint64_t(_mm512_cvtss_f32(a[0]));
  return n * 1024.0 * 16 * 16 * 2;
}

TARGET("avx2") double read_avx2(const char* data, size_t bytes, int ahead) {
  __m256i sums[8];
  for (__m256i& sum : sums) sum = _mm256_setzero_si256();
  for (size_t i = 0; i < bytes; i += 256) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) {
      if (ahead && j % 2 == 0) _mm_prefetch(data + i + j * 32 + ahead, _MM_HINT_T0);
      auto* at = reinterpret_cast<const __m256i*>(data + i + j * 32);
      sums[j] = _mm256_xor_si256(sums[j], _mm256_load_si256(at));
    }
  }
  for (int j = 1; j < 8; j++) sums[0] = _mm256_xor_si256(sums[0], sums[j]);
  sink = uint64_t(_mm256_extract_epi64(sums[0], 0));
  return double(bytes);
}

TARGET("avx512f") double read_avx512(const char* data, size_t bytes, int ahead) {
  __m512i sums[8];
  for (__m512i& sum : sums) sum = _mm512_setzero_si512();
  for (size_t i = 0; i < bytes; i += 512) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) {
      if (ahead) _mm_prefetch(data + i + j * 64 + ahead, _MM_HINT_T0);
      sums[j] = _mm512_xor_si512(sums[j], _mm512_load_si512(data + i + j * 64));
    }
  }
  for (int j = 1; j < 8; j++) sums[0] = _mm512_xor_si512(sums[0], sums[j]);
  uint64_t lanes[8];
  _mm512_storeu_si512(lanes, sums[0]);
  sink = lanes[0];
  return double(bytes);
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

bool amx_bf16() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if (!(d >> 24 & 1) || !(d >> 22 & 1)) return false;  // AMX-TILE, AMX-BF16
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low >> 17 & 3) != 3) return false;
  return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) == 0;
}

// g++'s tile intrinsics don't declare that they read memory: without the barrier the compiler drops
// the stores before them, and an invalid configuration raises a fault.
TARGET("amx-tile") void configure_tiles(const char* data) {
  TileConfig config;
  asm volatile("" : : "r"(&config), "r"(data) : "memory");
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// data: 8 KB of random bf16. On zeros the rate is 15 % higher: they draw less power.
TARGET("amx-tile,amx-bf16") double amx_registers(const char* data, long n) {
  configure_tiles(data);
  _tile_loadd(4, data, 64);
  _tile_loadd(5, data + 1024, 64);
  _tile_loadd(6, data + 2048, 64);
  _tile_loadd(7, data + 3072, 64);
  for (long i = 0; i < n * 64; i++) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return n * 64.0 * 4 * 16 * 16 * 32 * 2;
}

// The same with both operands of every step loaded from L1, as a product of matrices must.
TARGET("amx-tile,amx-bf16") double amx_l1(const char* data, long n) {
  configure_tiles(data);
  for (long i = 0; i < n * 64; i++) {
    const char* step = data + (i & 1) * 4096;
    _tile_loadd(4, step, 64);
    _tile_loadd(6, step + 2048, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, step + 3072, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, step + 1024, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return n * 64.0 * 4 * 16 * 16 * 32 * 2;
}

#endif

double (*widest_fma())(long) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return fma_avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return fma_avx2;
#endif
  return fma_plain;
}

double (*widest_read())(const char*, size_t, int) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return read_avx512;
  if (__builtin_cpu_supports("avx2")) return read_avx2;
#endif
  return read_plain;
}

// Random bytes, in the pages of 4 KB that torch's tensors have by default.
char* buffer(size_t bytes) {
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) return nullptr;
#ifdef MADV_NOHUGEPAGE
  madvise(data, bytes, MADV_NOHUGEPAGE);
#endif
  std::mt19937_64 random(1);
  for (size_t i = 0; i < bytes / 8; i++) static_cast<uint64_t*>(data)[i] = random();
  return static_cast<char*>(data);
}

double read_rate(int threads, double seconds, size_t bytes, const char* data) {
  size_t part = bytes / threads / 512 * 512;
  double best = 0;
  for (int ahead : {0, 1024, 4096})
    best = std::max(best, rate(threads, seconds, [&](int t, long n) {
                      double read = 0;
                      auto* mine = data + t * part;
                      for (long i = 0; i < n; i++) read += widest_read()(mine, part, ahead);
                      return read;
                    }));
  return best;
}

}  // namespace

int main(int count, char** words) {
  if (count < 4) return fprintf(stderr, "usage: limits THREADS SECONDS BYTES...\n"), 2;
  int threads = atoi(words[1]);
  double seconds = atof(words[2]);
  size_t largest = 0;
  for (int i = 3; i < count; i++)
    largest = std::max<size_t>(largest, strtoull(words[i], nullptr, 10));
  const char* data = buffer(largest);
  if (!data) return fprintf(stderr, "no %zu bytes of memory\n", largest), 1;
  printf("{\"threads\": %d, ", threads);
  printf("\"fma\": %.4g, ", rate(threads, seconds, [](int, long n) { return widest_fma()(n); }));
#if defined(__x86_64__)
  if (amx_bf16()) {
    alignas(64) static uint16_t tiles[4096];
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (uint16_t& value : tiles) {
      float drawn = normal(random);
      uint32_t bits;
      std::memcpy(&bits, &drawn, 4);
      value = uint16_t(bits >> 16);
    }
    auto* raw = reinterpret_cast<const char*>(tiles);
    auto registers = [raw](int, long n) { return amx_registers(raw, n); };
    auto l1 = [raw](int, long n) { return amx_l1(raw, n); };
    double from_registers = rate(threads, seconds, registers), from_l1 = rate(threads, seconds, l1);
    printf("\"amx_registers\": %.4g, ", from_registers);
    printf("\"amx_l1\": %.4g, ", from_l1);
    // The rate moment by moment: some hosts throttle the tile unit to a quarter, off and on.
    std::vector<double> moments;
    for (double begin = now(); now() - begin < 50 * seconds;) {
      double from = now(), work = amx_l1(raw, 16);
      moments.push_back(work / (now() - from));
    }
    std::sort(moments.begin(), moments.end());
    double best = std::max({from_registers / threads, from_l1 / threads, moments.back()});
    auto slow = std::lower_bound(moments.begin(), moments.end(), best / 2) - moments.begin();
    printf("\"amx_l1_median\": %.4g, ", moments[moments.size() / 2]);
    printf("\"amx_slow_share\": %.3f, ", double(slow) / moments.size());
  }
#endif
  printf("\"read\": {");
  for (int i = 3; i < count; i++) {
    double best = read_rate(threads, seconds, strtoull(words[i], nullptr, 10), data);
    printf("%s\"%s\": %.4g", i == 3 ? "" : ", ", words[i], best);
  }
  printf("}}\n");
}
