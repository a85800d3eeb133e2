// 64-bit numbers that no two launches of a process share; see common/reduce.cuh.
#pragma once

#include <atomic>
#include <cstdint>
#include <random>

namespace rewardfuse {

inline uint64_t next_nonce() {
  static std::atomic<uint64_t> state{(uint64_t{std::random_device{}()} << 32) | std::random_device{}()};
  // A Weyl sequence through SplitMix64's bijection: all different for 2^64 calls, and unlike any data.
  uint64_t x = state.fetch_add(0x9e3779b97f4a7c15u) + 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  x ^= x >> 31;
  return x == 0 ? 1 : x;
}

}  // namespace rewardfuse
