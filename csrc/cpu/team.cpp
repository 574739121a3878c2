// The worker threads of a process (team.h).
#include "team.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <vector>

#include "futex.h"

namespace hylora {
namespace {

using Clock = std::chrono::steady_clock;

// Waiting threads look again and again for so long before they sleep: a sleeping thread is woken in
// 5 to 60 us, a call from Python follows the one before in 10 to 30.
constexpr auto kSpin = std::chrono::microseconds(50);

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Looks until `ready` for at most kSpin; false if it took longer.
template <class F>
bool spin_until(const F& ready) {
  const auto end = Clock::now() + kSpin;
  do
    for (int i = 0; i < 16; i++) {
      if (ready()) return true;
      pause_briefly();
    }
  while (Clock::now() < end);
  return false;
}

}  // namespace

// One for each process, never freed: a worker may look at it at any time.
struct Pool {
  struct alignas(64) Worker {
    int64_t number;
    Word asleep{0};
  };

  // Of the current stage. The caller writes the plain members while no part is left.
  void (*run)(const void*, int64_t) = nullptr;
  const void* run_part = nullptr;
  int64_t parts = 0;
  std::atomic<int64_t> wanted{0};  // workers that may take parts: those numbered below
  std::atomic<bool> failed{false};
  char error[1024] = "";                     // what the first part to fail has thrown
  alignas(64) std::atomic<int64_t> left{0};  // parts that nobody has taken; below 0 means 0
  alignas(64) Word unfinished{0};            // parts that are not done
  Word caller_asleep{0};

  std::atomic<bool> has_caller{false};
  std::vector<Worker*> workers;  // the caller's

  void start_workers(int64_t count) {
    while (int64_t(workers.size()) < count) {
      auto* worker = new Worker{int64_t(workers.size())};
      try {
        std::thread([this, worker] { serve(*worker); }).detach();
      } catch (const std::system_error&) {  // the system gives no more threads
        delete worker;
        return;
      }
      workers.push_back(worker);
    }
  }

  // A worker never ends. While it waits, it sleeps.
  void serve(Worker& me) {
    const auto ready = [&] { return left.load() > 0 && me.number < wanted.load(); };
    for (;;) {
      if (!spin_until(ready))
        for (;;) {
          me.asleep.store(1);
          if (ready()) break;
          sleep_while(me.asleep, 1);
        }
      me.asleep.store(0);
      run_parts();
    }
  }

  void wake(Worker& worker) {
    if (worker.asleep.load() && worker.asleep.exchange(0)) wake_one(worker.asleep);
  }

  // Takes parts until none is left. A taken part keeps its stage from ending, so until it is
  // counted as done the stage's members stay what they are.
  void run_parts() {
    for (int64_t taken; left.load() > 0 && (taken = left.fetch_sub(1)) > 0;) {
      try {
        run(run_part, parts - taken);
      } catch (const std::exception& thrown) {
        keep_error(thrown.what());
      } catch (...) {
        keep_error("a part threw what is no std::exception");
      }
      if (unfinished.fetch_sub(1) == 1 && caller_asleep.load()) wake_one(unfinished);
    }
  }

  // A std::exception_ptr would need a libstdc++ of GCC 11 or newer.
  void keep_error(const char* text) {
    if (!failed.exchange(true)) std::strncpy(error, text, sizeof error - 1);
  }

  void wait_for_parts() {
    if (spin_until([&] { return unfinished.load() == 0; })) return;
    caller_asleep.store(1);
    for (uint32_t seen; (seen = unfinished.load()) > 0;)
      sleep_while(unfinished, seen);
    caller_asleep.store(0);
  }
};

namespace {

std::atomic<Pool*> process_pool{nullptr};

Pool& pool_of_process() {
  Pool* pool = process_pool.load();
  if (pool) return *pool;
  auto* made = new Pool;
  if (process_pool.compare_exchange_strong(pool, made)) return *made;
  delete made;  // another thread was faster
  return *pool;
}

std::atomic<bool> is_child{false};

// A child of fork() has none of its parent's workers: it makes a pool of its own.
void after_fork() {
  process_pool.store(nullptr);
  is_child.store(true);
}
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, after_fork);

}  // namespace

bool is_forked_child() { return is_child.load(std::memory_order_relaxed); }

Team::Team(int64_t threads) {
  if (threads <= 1) return;
  Pool& pool = pool_of_process();
  if (pool.has_caller.exchange(true)) return;
  pool.start_workers(threads - 1);
  pool_ = &pool;
  threads_ = std::min(threads, 1 + int64_t(pool.workers.size()));
}

Team::~Team() {
  if (pool_) pool_->has_caller.store(false);
}

void Team::share(int64_t parts, void (*run)(const void*, int64_t), const void* run_part) {
  Pool& pool = *pool_;
  const int64_t helpers = std::min(threads_, parts) - 1;
  pool.run = run, pool.run_part = run_part, pool.parts = parts;
  pool.wanted.store(threads_ - 1);
  pool.unfinished.store(uint32_t(parts));
  pool.left.store(parts);
  for (int64_t i = 0; i < helpers; i++)
    pool.wake(*pool.workers[i]);
  pool.run_parts();
  pool.wait_for_parts();
  if (pool.failed.exchange(false)) throw std::runtime_error(pool.error);
}

}  // namespace hylora
