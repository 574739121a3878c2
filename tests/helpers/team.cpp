// Stress of csrc/cpu/team.h for tests/backends/cpu/test_team.py: a check's name is the argument.
// Compiled with a sanitizer, it finds races too.
#include "cpu/team.h"

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

using hylora::Team;

namespace {

void require(bool holds, const char* words) {
  if (holds) return;
  std::fprintf(stderr, "%s\n", words);
  std::_Exit(1);
}

void rest(int microseconds) {
  std::this_thread::sleep_for(std::chrono::microseconds(microseconds));
}

// A few stages, each of which reads what the one before left on the caller's stack.
void chain(int64_t threads, int rounds) {
  for (int round = 0; round < rounds; round++) {
    Team team(threads);
    std::vector<int64_t> numbers(1 + round % 7, 1);
    for (int stage = 0; stage < 5; stage++) {
      std::vector<int64_t> next(numbers.size(), -1);
      team.stage(int64_t(next.size()), [&](int64_t i) {
        next[i] = 0;
        for (int64_t number : numbers)
          next[i] += number;
      });
      numbers = next;  // the caller's own work between two stages
    }
    int64_t wanted = 1;
    for (int stage = 0; stage < 5; stage++)
      wanted *= int64_t(numbers.size());
    for (int64_t number : numbers)
      require(number == wanted, "a part was left out, done twice or too late");
    if (round % 16 == 0) rest(round % 32 ? 20 : 200);  // workers fall asleep
  }
}

void changing_threads() {
  for (int64_t threads : {2, 5, 1, 3, 8, 2})
    chain(threads, 40);
}

void several_callers() {
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; i++)
    callers.emplace_back([] { chain(3, 150); });
  for (std::thread& caller : callers)
    caller.join();
}

// Threads that are in a stage at once, at most the team's.
void as_many_as_asked() {
  for (int64_t threads : {6, 2, 3, 1}) {
    std::atomic<int64_t> inside{0}, most{0};
    Team team(threads);
    require(team.threads() == threads, "a free team has as many threads as were asked for");
    for (int round = 0; round < 20; round++)
      team.stage(12, [&](int64_t) {
        const int64_t now = ++inside;
        for (int64_t seen = most; now > seen && !most.compare_exchange_weak(seen, now);)
          ;
        rest(50);
        inside--;
      });
    require(most <= threads, "more threads came than were asked for");
  }
}

// In a part, and beside a team of the same thread, a team is its caller alone.
void nested() {
  Team team(3);
  Team beside(3);
  require(beside.threads() == 1, "a second team of the same thread has no workers");
  std::atomic<int64_t> sum{0};
  for (int round = 0; round < 50; round++)
    team.stage(8, [&](int64_t i) {
      Team inner(3);
      require(inner.threads() == 1, "a team within a part has no workers");
      const auto here = std::this_thread::get_id();
      inner.stage(3, [&](int64_t j) {
        require(std::this_thread::get_id() == here, "a part of it ran on another thread");
        sum += i + j;
      });
    });
  require(sum == 50 * (3 * 28 + 8 * 3), "nested parts are all done once");
}

// What a part throws reaches the caller when all parts are done, and the team goes on.
void exceptions() {
  for (int64_t threads : {1, 3})
    for (int round = 0; round < 50; round++) {
      const int64_t bad = round % 6;
      std::atomic<int64_t> done{0};
      std::string caught;
      try {
        Team team(threads);
        team.stage(6, [&](int64_t i) {
          if (i == bad) throw std::runtime_error("part " + std::to_string(i));
          done++;
        });
      } catch (const std::runtime_error& error) {
        caught = error.what();
      }
      require(caught == "part " + std::to_string(bad), "the exception did not reach the caller");
      require(threads == 1 || done == 5, "a part was left out because of another's exception");
      chain(threads, 2);
    }
}

// A child has no workers of its parent and makes its own, whatever the parent's threads were doing.
void fork_child() {
  chain(3, 20);
  std::atomic<bool> stop{false};
  std::thread other([&] {
    while (!stop)
      chain(3, 1);
  });
  for (int i = 0; i < 20; i++) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(60);
      chain(3, 40);
      Team team(3);
      std::_Exit(team.threads() == 3 ? 0 : 2);
    }
    int status = 1;
    waitpid(child, &status, 0);
    require(status == 0, "a forked child failed or waited for ever");
  }
  stop = true;
  other.join();
}

double cpu_seconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const timeval &user = usage.ru_utime, &system = usage.ru_stime;
  return double(user.tv_sec + system.tv_sec) + 1e-6 * double(user.tv_usec + system.tv_usec);
}

// Workers that have nothing to do sleep.
void idle() {
  chain(4, 20);
  rest(50000);
  const double before = cpu_seconds();
  rest(300000);
  require(cpu_seconds() - before < 0.02, "idle workers burn time");
}

// The process ends while workers sleep or spin, and while another thread has a team.
void leave() {
  std::thread([] {
    for (;;)
      chain(3, 1);
  }).detach();
  chain(3, 20);
  std::exit(0);
}

// The caller goes on while a worker does not come: all parts are taken by those that are there.
void nobody_waits_for_who_has_not_come() {
  for (int round = 0; round < 200; round++) {
    Team team(8);  // more threads than cores: some come late
    int64_t on_stack[64] = {};
    team.stage(64, [&](int64_t i) { on_stack[i]++; });
    for (int64_t number : on_stack)
      require(number == 1, "a part was left out or done twice");
  }
}

struct Check {
  const char* name;
  void (*run)();
};
const Check checks[] = {
    {"chain", [] { chain(3, 300); }},
    {"changing_threads", changing_threads},
    {"several_callers", several_callers},
    {"as_many_as_asked", as_many_as_asked},
    {"nested", nested},
    {"exceptions", exceptions},
    {"late_workers", nobody_waits_for_who_has_not_come},
    {"fork_child", fork_child},
    {"idle", idle},
    {"leave", leave},
};

}  // namespace

int main(int count, char** words) {
  for (const Check& check : checks)
    if (count == 2 && !std::strcmp(check.name, words[1])) return check.run(), 0;
  std::fprintf(stderr, "no such check\n");
  return 2;
}
