// Kernels of test_emulation.py: they go wrong in ways that cuda_runtime.h is there to show, or convert numbers.
#include <cuda_runtime.h>

#include "arguments.h"
#include "common/storage.cuh"

namespace {

constexpr unsigned kMost = 64;

// Hands x round the threads `rounds` times. Wrong without either barrier.
template <bool before_reading, bool before_writing>
void hand_round(const int* in, int* out, int rounds) {
  __shared__ int held[kMost];
  const unsigned threads = simt::fibers.size();
  const auto wait = [&] { threads > simt::kLanes ? __syncthreads() : __syncwarp(); };
  int x = in[threadIdx.x];
  for (int round = 0; round < rounds; ++round) {
    held[threadIdx.x] = x;
    if (before_reading) wait();
    x = held[(threadIdx.x + 1) % threads];
    if (before_writing) wait();
  }
  out[threadIdx.x] = x;
}

template <bool before_reading, bool before_writing>
void hand_round_of(Arguments& from) {
  const int* in = from.data<int>("in");
  int* out = from.data<int>("out");
  const auto threads = static_cast<unsigned>(from.integer("threads"));
  const int rounds = static_cast<int>(from.integer("rounds"));
  from.expect_none_left();
  simt::launch(&hand_round<before_reading, before_writing>, 1, threads, in, out, rounds);
}

void some_threads_wait(int* out) {
  if (threadIdx.x < 40) __syncthreads();
  out[threadIdx.x] = 1;
}

void some_lanes_shuffle(int* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = static_cast<int>(__shfl_sync(~0u, threadIdx.x, 0, 32));
}

void part_of_a_warp_shuffles(int* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = static_cast<int>(__shfl_sync(0xffffu, threadIdx.x, 0, 16));
}

void block_0_waits(int* out) {
  auto* const flag = reinterpret_cast<unsigned long long*>(out);
  if (blockIdx.x == 1) atomicExch(flag, 1);
  while (atomicAdd(flag, 0) != 1) __nanosleep(1);
}

void read_at(const int* in, int* out, int64_t offset) { out[threadIdx.x] = in[threadIdx.x + offset]; }

void write_at(int* out, int64_t offset) { out[threadIdx.x + offset] = 1; }

void read_unaligned(const int* in, int* out, int64_t offset) {
  const auto items = *reinterpret_cast<const rewardfuse::cuda::Vector<int, 4>*>(in + offset);
  out[threadIdx.x] = items.item[threadIdx.x % 4];
}

void leave_shared_memory(int* out, int64_t offset) {
  __shared__ int held[kMost];
  held[threadIdx.x + offset] = 1;
  __syncthreads();
  out[threadIdx.x] = held[threadIdx.x];
}

void convert(rewardfuse::Operand in, rewardfuse::Operand out, int64_t count) {
  for (int64_t i = threadIdx.x; i < count; i += kMost) {
    rewardfuse::cuda::store(const_cast<void*>(out.data), out.dtype, i, rewardfuse::cuda::load<double>(in, 0, i));
  }
}

template <auto kernel, int blocks = 1>
void take_out(Arguments& from) {
  simt::launch(kernel, blocks, kMost, from.data<int>("out"));
}

template <auto kernel>
void take_out_and_offset(Arguments& from) {
  int* out = from.data<int>("out");
  simt::launch(kernel, 1, kMost, out, from.integer("offset"));
}

template <auto kernel>
void take_in_out_and_offset(Arguments& from) {
  const int* in = from.data<int>("in");
  int* out = from.data<int>("out");
  simt::launch(kernel, 1, kMost, in, out, from.integer("offset"));
}

void take_operands(Arguments& from) {
  const auto in = from.operand("in"), out = from.operand("out");
  simt::launch(&convert, 1, kMost, in, out, from.integer("count"));
}

}  // namespace

Call find_probe(const std::string& name) {
  static const std::map<std::string, Call> calls = {
      {"hand_round", &hand_round_of<true, true>},
      {"hand_round_unread", &hand_round_of<true, false>},
      {"hand_round_unwritten", &hand_round_of<false, true>},
      {"some_threads_wait", &take_out<&some_threads_wait>},
      {"some_lanes_shuffle", &take_out<&some_lanes_shuffle>},
      {"part_of_a_warp_shuffles", &take_out<&part_of_a_warp_shuffles>},
      {"block_0_waits", &take_out<&block_0_waits, 2>},
      {"read_at", &take_in_out_and_offset<&read_at>},
      {"read_unaligned", &take_in_out_and_offset<&read_unaligned>},
      {"write_at", &take_out_and_offset<&write_at>},
      {"leave_shared_memory", &take_out_and_offset<&leave_shared_memory>},
      {"convert", &take_operands},
  };
  const auto found = calls.find(name);
  return found == calls.end() ? nullptr : found->second;
}
