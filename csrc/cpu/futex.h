// Sleeping on a number in memory until another thread changes it.
#pragma once
#include <atomic>
#include <cstdint>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <condition_variable>
#include <mutex>
#endif

namespace hylora {

using Word = std::atomic<uint32_t>;

#if defined(__linux__)

// Sleeps if `word` is `value`, until it is woken. May return without a reason.
inline void sleep_while(Word& word, uint32_t value) {
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}

// Wakes a thread that sleeps on `word`.
inline void wake_one(Word& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0);
}

#else

struct Sleepers {
  std::mutex mutex;
  std::condition_variable woken;
};
inline Sleepers& sleepers() {
  static auto* all = new Sleepers;
  return *all;
}

inline void sleep_while(Word& word, uint32_t value) {
  std::unique_lock<std::mutex> lock(sleepers().mutex);
  if (word.load() == value) sleepers().woken.wait(lock);
}

inline void wake_one(Word&) {
  std::lock_guard<std::mutex> lock(sleepers().mutex);
  sleepers().woken.notify_all();
}

#endif

}  // namespace hylora
