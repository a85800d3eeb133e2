// What every kernel on pairs of numbers is told: bradley_terry (chosen, rejected), bradley_terry_tie (first, second)
// and approx_kl (the log-probabilities of policy and reference).
//
// A model of a pair has rewards a and b, one parameter p that may want a gradient (margin, log_tie, importance_weight)
// and one observation q (target, outcome). Its kernels here are the two skeletons of cpu.h and cuda.cuh around the
// scalar maths of the op's own math.h, so that masks, weights, strides, dtypes and reductions are written once.
#pragma once

#include "common/host_device.h"
#include "common/launch.h"
#include "common/operand.h"

namespace rewardfuse::pairwise {

constexpr int kOptions = 6;

struct Problem {
  Plane plane;
  DType dtype = DType::kFloat32;  // of a and b
  Operand a, b;                   // [items] rewards
  Operand p, q;                   // [items], a repeated tensor, or a number
  Operand weight;                 // likewise; a pair of weight 0 is read by nobody
  Operand mask;                   // likewise, boolean; a masked pair is not even counted
  double options[kOptions] = {};  // the model's own numbers
  bool wants_stats = false;       // fill Totals::correct … b
};

// Sums over pairs. `valid` counts mask-true pairs, the rest also leaves out pairs of weight 0.
struct Totals {
  double loss = 0, valid = 0, counted = 0, correct = 0, ties = 0, a = 0, b = 0;
  double grad_p = 0;
  double invalid = 0;  // pairs whose observation or parameter is out of range; their loss is NaN

  RF_HD void add(const Totals& other) {
    const double* from = &other.loss;
    double* to = &loss;
    for (unsigned i = 0; i < sizeof(Totals) / sizeof(double); ++i) to[i] += from[i];
  }
};

// d(loss)/d(pair i) = grad_output[i] · scale, where grad_output repeats for a reduced loss.
struct Gradients {
  Operand grad_output;
  double scale = 1;
  void* a = nullptr;  // [items] in the storage type of a; null where nobody asks
  void* b = nullptr;
  void* p = nullptr;  // [items] in p_dtype
  DType p_dtype = DType::kFloat32;
  bool sum_p = false;  // p is one number: its gradient goes to Totals::grad_p, or on CUDA to p_total
  // CUDA only, read on the device so that nothing waits: the mean's count of pairs, a normalizer.
  const double* denominator = nullptr;
  Operand normalizer;
  void* p_total = nullptr;
};

// Where a CUDA forward writes.
struct CudaForward {
  Reduction reduction = Reduction::kMean;
  void* loss = nullptr;           // [items] or []
  void* stats = nullptr;          // [5]
  double* denominator = nullptr;  // [] or null
  Operand normalizer;             // number 0: none
};

constexpr int kCudaSums = 7;

}  // namespace rewardfuse::pairwise
