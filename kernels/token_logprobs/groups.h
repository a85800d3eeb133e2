// Rows as a CPU kernel moves through them: a register's worth of memory at a time, which is one register of
// accumulation type T, or two for 16-bit storage.
#pragma once

#ifdef REWARDFUSE_X86_64
#include <immintrin.h>
#endif

#include "common/storage.h"

namespace rewardfuse::REWARDFUSE_TARGET::token_logprobs {

template <class T, class S>
struct Group {
  using V = typename Lanes<T>::Reg;
  using Words = typename Packed<uint32_t, REWARDFUSE_SIMD_BYTES / 4>::type;
  static constexpr int lanes = Lanes<T>::count;
  static constexpr int registers = sizeof(T) / sizeof(S);
  static constexpr int count = registers * lanes;
  // Neighbours are the halves of a 32-bit word: even items in the first register, odd ones in the second.
  static constexpr bool by_halves = std::is_same_v<S, BFloat16>;

  V part[registers];

  static RF_HD Group load(const S* from) {
    Group group;
    if constexpr (by_halves) {
      Words words;
      __builtin_memcpy(&words, from, sizeof(words));
      group.part[0] = (V)(words << 16);
      group.part[1] = (V)(words & 0xffff0000u);
    } else {
      for (int r = 0; r < registers; ++r) group.part[r] = load_as<V>(from + r * lanes, 1, lanes);
    }
    return group;
  }

  // The first `n` items alone are read; the others are 0.
  static RF_HD Group load_first(const S* from, int64_t n) {
    S items[count] = {};
    for (int64_t i = 0; i < n; ++i) items[i] = from[i];
    return load(items);
  }

  // Which lanes of a register hold one of the first `n` items.
  static RF_HD typename Lanes<T>::Mask valid(int r, int64_t n) {
    return first_lanes<T>(by_halves ? (n + 1 - r) / 2 : n - r * lanes);
  }

  // `streams`: past the caches; `to` is then aligned to a register.
  RF_HD void store(S* to, bool streams) const {
    const Words words = packed();
    if (streams) {
      stream(to, words);
    } else {
      __builtin_memcpy(to, &words, sizeof(words));
    }
  }

  RF_HD void store_first(S* to, int64_t n) const {
    S items[count];
    store(items, false);
    for (int64_t i = 0; i < n; ++i) to[i] = items[i];
  }

  static RF_HD void stream(S* to, Words words) {
#if defined(__AVX512F__)
    _mm512_stream_si512((__m512i*)to, (__m512i)words);
#elif defined(__AVX2__)
    _mm256_stream_si256((__m256i*)to, (__m256i)words);
#elif defined(REWARDFUSE_X86_64)
    _mm_stream_si128((__m128i*)to, (__m128i)words);
#else
    __builtin_memcpy(to, &words, sizeof(words));
#endif
  }

 private:
  RF_HD Words packed() const {
    Words words;
    if constexpr (by_halves) {
      words = (rounded(part[0]) >> 16) | (rounded(part[1]) & 0xffff0000u);
    } else if constexpr (registers == 2) {
      typename Packed<uint16_t, lanes>::type halves[2];
      for (int r = 0; r < 2; ++r) halves[r] = narrow_16_bit<S, lanes>(part[r]);
      __builtin_memcpy(&words, halves, sizeof(words));
    } else {
      __builtin_memcpy(&words, part, sizeof(words));
    }
    return words;
  }

  // To nearest, ties to even, in the upper half. A NaN that comes out of arithmetic on 16-bit numbers has nothing in
  // its lower half, so it stays one.
  static RF_HD Words rounded(V x) {
    const Words bits = (Words)x;
    return bits + 0x7fffu + ((bits >> 16) & 1u);
  }
};

// Streamed stores are seen by other threads.
RF_HD void finish_streams() {
#ifdef REWARDFUSE_X86_64
  _mm_sfence();
#endif
}

template <class S>
RF_HD const S* row_of(const auto& matrix, int64_t row) {
  const int64_t outer = row / matrix.inner;
  return static_cast<const S*>(matrix.data) + outer * matrix.outer_stride +
         (row - outer * matrix.inner) * matrix.inner_stride;
}

}  // namespace rewardfuse::REWARDFUSE_TARGET::token_logprobs
