#pragma once

#include "params.h"

namespace jax_flashmla {

inline constexpr int kMaxInvariantSplits = 16;  // parts per sequence of a batch-invariant plan

Status run_schedule(const ScheduleParams& params);
int max_schedule_batch(int num_parts);  // what fits the planner's shared memory

}  // namespace jax_flashmla
