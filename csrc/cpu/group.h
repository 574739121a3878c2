// Layers that read the same x, computed as one; a layer by itself is a group of one.
#pragma once
#include "call.h"
#include "team.h"

namespace hylora {

// Computes `count` layers that have type, x, M, K and ldx in common; of any forms, with and without
// adapters and bias. Their y's may be column ranges of the same rows (ldy). Each y is bit for bit
// what its layer gives alone.
//
// With few rows x is prepared once, and each stage of the kernels takes the panels of all layers
// together, so that a group has as many stages as a layer, and panels for every thread where a
// single layer has too few. With many rows the layers follow one another.
void run_group(const LayerCall* calls, int64_t count);

// The same as stages of a team.
void run_group(const LayerCall* calls, int64_t count, Team& team);

inline void run_layer(const LayerCall& call) { run_group(&call, 1); }
inline void run_layer(const LayerCall& call, Team& team) { run_group(&call, 1, team); }

}  // namespace hylora
