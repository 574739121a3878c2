// How layers are split among threads (group.h).
#include "group.h"

#include <algorithm>
#include <vector>

#include "threads.h"
#include "torch_products.h"

namespace hylora {
namespace {

// Rows that a thread takes at a time. Each part reads all weights again; over this many rows that
// costs little.
constexpr int64_t kRowsPerPart = 512;

// Bytes of weights from which on another thread of a team pays. It is awake, so that a stage costs
// about 1 us.
constexpr int64_t kBytesPerAwakeThread = 32 << 10;

// How many threads the layers are worth, where each is worth so many bytes of weights.
int64_t useful_threads(const LayerCall* calls, int64_t count, int64_t bytes_per_thread) {
  const int64_t size = calls[0].type == Type::fp32 ? 4 : 2;
  const auto bits_of = [&](const Panels& panels) {
    return panels.n * panels.k * (panels.bits ? panels.bits : 8 * size);
  };
  int64_t bits = 0;
  for (const LayerCall* call = calls; call < calls + count; call++)
    bits +=
        bits_of(call->shrink) + bits_of(call->expand) + call->ra * (call->K + call->N) * 8 * size;
  return std::max<int64_t>(1, bits / 8 / bytes_per_thread);
}

// A layer and its block of memory.
struct Member {
  LayerCall call;
  void* block;
};

// What a stage does for one member: run() on ranges of `count` panels or rows, of `cost` each.
struct Work {
  void (*run)(const LayerCall&, void* block, int64_t begin, int64_t end);
  int64_t count, cost;
};

// Runs work_of(call) of all members as one stage, in at most `most` parts of the same cost.
template <class F>
void run_stage(Team& team, int64_t most, const std::vector<Member>& members, const F& work_of) {
  int64_t items = 0, cost = 0;
  for (const Member& member : members) {
    const Work work = work_of(member.call);
    items += work.count, cost += work.count * work.cost;
  }
  const int64_t parts = std::min(most, items);
  team.stage(parts, [&](int64_t i) {
    // The part has the items that begin in [from, to), counted from each member's first.
    int64_t from = cost * i / parts, to = cost * (i + 1) / parts;
    for (const Member& member : members) {
      const Work work = work_of(member.call);
      const auto item_at = [&](int64_t at) {
        return std::min(ceil_div(std::max<int64_t>(at, 0), work.cost), work.count);
      };
      const int64_t begin = item_at(from), end = item_at(to);
      if (begin < end) work.run(member.call, member.block, begin, end);
      from -= work.count * work.cost, to -= work.count * work.cost;
    }
  });
}

// Each layer with a part of this thread's scratch, which holds all of its rows. x is prepared in
// that of the first quantised layer for those, of the first other one for the others.
std::vector<Member> members_of(const LayerCall* calls, int64_t count) {
  const Kernels& k = kernels();
  std::vector<Member> members;
  size_t bytes = 0;
  bool seen[2] = {};
  for (const LayerCall* call = calls; call < calls + count; call++) {
    if (call->N == 0) continue;
    members.push_back({*call, nullptr});
    bool& is_prepared = seen[call->is_quantized()];
    // Any address: the bytes of a block without x are counted.
    if (is_prepared) members.back().call.x_block = &bytes;
    is_prepared = true;
    bytes += k.block_bytes(members.back().call);
  }
  char* block = static_cast<char*>(scratch(Scratch::shared_block, bytes));
  char* prepared[2] = {};
  for (Member& member : members) {
    char*& x = prepared[member.call.is_quantized()];
    if (member.call.x_block) member.call.x_block = x;
    if (!x) x = block;
    member.block = block;
    block += k.block_bytes(member.call);
    k.prepare(member.call, member.block);
  }
  return members;
}

// Threads share the members' blocks and split their panels.
void run_few_rows(const LayerCall* calls, int64_t count, Team& team) {
  const Kernels& k = kernels();
  const std::vector<Member> members = members_of(calls, count);
  const int64_t parts =
      std::min(team.threads(), useful_threads(calls, count, kBytesPerAwakeThread));
  run_stage(team, parts, members, [&](const LayerCall& call) {
    return Work{k.shrink, call.shrink.n ? shrink_panels(call) : 0, 1};  // each of K numbers
  });
  for (const Member& member : members)
    k.between(member.call, member.block);
  run_stage(team, parts, members, [&](const LayerCall& call) {
    const int64_t blocks = ceil_div(call.expand.k, 32) + ceil_div(call.adapter_expand.k, 32);
    return Work{k.expand, expand_panels(call), larger(blocks, 1)};
  });
  run_stage(team, parts, members, [&](const LayerCall& call) {
    return Work{k.merge_pivots, call.merges_pivots() ? call.M : 0, ceil_div(call.N, 32)};
  });
}

// Threads split the rows.
void run_many_rows(const LayerCall& call, int64_t threads) {
  const Kernels& k = kernels();
  const int64_t used = std::min<int64_t>(threads, call.M / 32);
  const int64_t parts = used > 1 ? std::max(used, call.M / kRowsPerPart / used * used) : 1;
  on_torch_threads(used, parts, [&](int64_t i) {
    const int64_t end = i + 1 == parts ? call.M : call.M * (i + 1) / parts / 32 * 32;
    k.rows(call, call.M * i / parts / 32 * 32, end);
  });
}

void run_many_rows(const LayerCall* calls, int64_t count, int64_t threads) {
  for (const LayerCall* call = calls; call < calls + count; call++)
    if (call->N) run_many_rows(*call, threads);
}

}  // namespace

void run_group(const LayerCall* calls, int64_t count) {
  if (count == 0) return;
  if (std::any_of(calls, calls + count, torch_products_are_faster)) {
    // Torch's products have threads of their own, so they are called outside of a team.
    for (const LayerCall* call = calls; call < calls + count; call++)
      torch_products_are_faster(*call) ? run_torch_products(*call) : run_layer(*call);
    return;
  }
  const int64_t threads = torch::stable::get_num_threads();
  if (calls[0].M > kFewRows) return run_many_rows(calls, count, threads);
  Team team(std::min(threads, useful_threads(calls, count, kBytesPerThread)));
  run_group(calls, count, team);
}

void run_group(const LayerCall* calls, int64_t count, Team& team) {
  if (count == 0 || calls[0].M == 0) return;
  if (calls[0].M > kFewRows) return run_many_rows(calls, count, team.threads());
  run_few_rows(calls, count, team);
}

}  // namespace hylora
