// decode for several layers on one x: the shrink tiles of all members come first, then the expand
// tiles of all. A member's expand tiles wait for its own h alone.
#pragma once
#include "decode.h"

namespace hylora::cuda {

struct GroupLaunch {
  LayerLaunch members[kMostMembers];
  int32_t ends[2 * kMostMembers];
  int count;
};

template <class T>
KERNEL(DecodeShape::THREADS, kTiles[kDecode].blocks_per_sm)
decode_group(ARGUMENT GroupLaunch g) {
  auto& shared = *reinterpret_cast<DecodeShared*>(shared_memory());
  // Nothing but the arguments is kept from tile to tile: registers are scarce.
#pragma unroll 1
  for (;;) {
    Queue q;
    q.counters = g.members[0].d.counters;  // the first member's next ticket is that of all
    const int ticket = q.draw(&shared.ticket), runs = 2 * g.count;
    int run = 0;
    while (run < runs && ticket >= g.ends[run])
      run++;
    if (run == runs) {
      // As Queue::reset, with the ready counter of each member.
      const int tiles = g.ends[runs - 1];
      if (ticket != tiles + block_count() - 1) return;
      if (thread_index() == 0) add_relaxed(q.counters, -tiles - block_count());
      if (thread_index() < g.count) {
        q = Queue::of<DecodeShape>(g.members[thread_index()]);
        add_relaxed(q.ready(0), -q.rank_blocks);
      }
      return;
    }
    const bool shrinks = run < g.count;
    const int tile = ticket - (run ? g.ends[run - 1] : 0);
    const LayerLaunch& f = g.members[shrinks ? run : run - g.count];
    q = Queue::of<DecodeShape>(f);
    q.row_blocks = 1;  // a constant, which saves dividing by a runtime number
    if (shrinks)
      shrink<T>(f, q, Shrink::of(q, tile, f.split), shared);
    else
      expand<T>(f, q, Expand::of(q, f.d, tile, DecodeShape::COLUMNS), shared);
  }
}

}  // namespace hylora::cuda
