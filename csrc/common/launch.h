// What a CUDA launch needs beside its arguments. Torch-free.
#pragma once

namespace rewardfuse {

struct CudaLaunch {
  void* stream = nullptr;
  unsigned blocks = 1;
  double* partials = nullptr;           // [blocks, sums of the kernel]
  unsigned long long* flags = nullptr;  // [blocks]
  unsigned long long nonce = 0;         // of this launch alone, see common/reduce.cuh
};

}  // namespace rewardfuse
