// Threads that share one caller's work, stage by stage.
#pragma once
#include <cstdint>

namespace hylora {

struct Pool;

// The calling thread and the process's worker threads, for as long as the object lives. Between two
// stages only the caller runs, so it may prepare the next one. Nothing forks and nothing joins: a
// stage costs the caller about 1 us while the workers are awake, so a whole token is one team.
//
// The caller waits for parts that a worker has taken, never for a worker that the system has not
// scheduled yet: that one comes late and finds nothing to do. While another thread of the process
// has a team, or this one has one already, a new team is the caller alone.
class Team {
 public:
  // At most so many threads, the caller among them.
  explicit Team(int64_t threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  // How many threads there may be: a stage is worth cutting into so many parts, or a few times
  // that.
  int64_t threads() const { return threads_; }

  // Calls run_part(i) for each i in [0, parts). Each thread takes the next part that no other has
  // taken. Returns when all parts are done; then the text of what the first to fail threw is thrown
  // here as a std::runtime_error.
  template <class F>
  void stage(int64_t parts, const F& run_part) {
    if (threads_ > 1 && parts > 1)
      return share(
          parts, [](const void* f, int64_t i) { (*static_cast<const F*>(f))(i); }, &run_part);
    for (int64_t i = 0; i < parts; i++)
      run_part(i);
  }

 private:
  void share(int64_t parts, void (*run)(const void*, int64_t), const void* run_part);

  Pool* pool_ = nullptr;
  int64_t threads_ = 1;
};

// Whether fork() has made this process. OpenMP's threads, which are torch's, don't outlive it.
bool is_forked_child();

}  // namespace hylora
