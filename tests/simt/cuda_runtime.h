// Runs CUDA kernels on the CPU, to test them where there is no GPU: a fiber a thread, in one thread of the host.
//
// What it emulates: one-dimensional grids and blocks of whole warps of 32 lanes; __syncthreads, __syncthreads_or,
// __syncwarp and the shuffles below, all of which every thread of the block or warp has to reach at one place of the
// code; shared memory; atomics. A fiber runs until it waits. One warp after another is let run as far as it can, its
// lanes in an order drawn anew at each barrier, so that a missing barrier shows on either side: something is read
// before it was written, or overwritten before it was read.
//
// What it does not: blocks run one after another from block 0, so that races between blocks and missing fences stay
// hidden and a block that waits for a later one fails; shared memory starts with what the last block left in it; maths
// functions are the host's, without contraction; streams, timing, registers. Compile with -O1: higher levels may copy
// a barrier into both branches around it, which then look like two places.
//
// A kernel that goes wrong (waits for ever, touches what it must not) ends its launch with a std::runtime_error.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

using cudaStream_t = void*;

namespace simt {

constexpr unsigned kLanes = 32;
constexpr size_t kStackBytes = 128 * 1024;

struct Index {
  unsigned x = 0;
};
inline Index thread, block, grid;

enum class Waits { kNo, kForWarp, kForBlock, kDone };

// A fiber is entered by setcontext, which costs a system call, and from then on switched by _longjmp, which costs none
// (but objects to such jumps under _FORTIFY_SOURCE).
struct Fiber {
  ucontext_t entry;
  jmp_buf course;
  bool entered = false;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  Waits waits = Waits::kNo;
  const void* place = nullptr;  // where it waits
  unsigned sent = 0;            // what other threads may ask for
};

inline std::vector<Fiber> fibers;
inline jmp_buf scheduler;
inline std::function<void()> body;
inline bool in_fiber = false;
inline const char* failure = nullptr;
inline uint64_t random_state = 1;

// Xorshift.
inline uint64_t random() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  return random_state ^= random_state << 17;
}

inline void fail(const char* why) {
  if (!in_fiber) throw std::runtime_error(std::string(why) + " (block " + std::to_string(block.x) + ")");
  failure = why;
  _longjmp(scheduler, 1);
}

inline void resume(unsigned t) {
  Fiber& fiber = fibers[t];
  fiber.waits = Waits::kNo;
  thread.x = t;
  in_fiber = true;
  if (_setjmp(scheduler) == 0) {
    if (fiber.entered) _longjmp(fiber.course, 1);
    fiber.entered = true;
    setcontext(&fiber.entry);
  }
  in_fiber = false;
  if (failure) fail(failure);
}

inline void wait(Waits how, const void* place) {
  Fiber& fiber = fibers[thread.x];
  fiber.waits = how;
  fiber.place = place;
  if (_setjmp(fiber.course) == 0) _longjmp(scheduler, 1);
}

inline void run_thread() {
  body();
  wait(Waits::kDone, nullptr);
}

// Whether threads [begin, end) all wait, at one place, for each other.
inline bool meet(unsigned begin, unsigned end, Waits how) {
  for (unsigned t = begin; t < end; ++t) {
    if (fibers[t].waits != how) return false;
    if (fibers[t].place != fibers[begin].place) fail("threads wait at different places");
  }
  return true;
}

// Runs the warp to its next barrier; false where it cannot go on by itself.
inline bool run_warp(unsigned first) {
  if (fibers[first].waits != Waits::kNo && !meet(first, first + kLanes, Waits::kForWarp)) return false;
  unsigned lanes[kLanes];
  for (unsigned i = 0; i < kLanes; ++i) lanes[i] = first + i;
  for (unsigned i = kLanes - 1; i > 0; --i) std::swap(lanes[i], lanes[random() % (i + 1)]);
  for (const unsigned t : lanes) resume(t);
  return true;
}

inline void run_block(unsigned threads) {
  fibers.resize(threads);
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.entry);
    fiber.entry.uc_stack.ss_sp = fiber.stack.get();
    fiber.entry.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.entry, &run_thread, 0);
    fiber.entered = false;
    fiber.waits = Waits::kNo;
  }
  for (bool goes_on = true; goes_on;) {
    goes_on = false;
    const unsigned first = random() % threads / kLanes * kLanes;
    for (unsigned i = 0; i < threads; i += kLanes) {
      while (run_warp((first + i) % threads)) goes_on = true;
    }
    if (!goes_on && meet(0, threads, Waits::kForBlock)) {
      for (Fiber& fiber : fibers) fiber.waits = Waits::kNo;
      goes_on = true;
    }
  }
  for (const Fiber& fiber : fibers) {
    if (fiber.waits != Waits::kDone) fail("threads wait for ever");
  }
}

// Turns faults of a kernel into failures of its launch while it is in scope.
class Faults {
 public:
  Faults() {
    struct sigaction action = {};
    action.sa_handler = &handle;
    action.sa_flags = SA_NODEFER;
    for (int i = 0; i < kSignals; ++i) sigaction(signals[i], &action, &before_[i]);
  }
  ~Faults() {
    for (int i = 0; i < kSignals; ++i) sigaction(signals[i], &before_[i], nullptr);
  }
  Faults(const Faults&) = delete;

 private:
  static constexpr int kSignals = 4;
  static constexpr int signals[kSignals] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP};

  static void handle(int signal) {
    if (!in_fiber) {
      ::signal(signal, SIG_DFL);  // not a kernel's
      return;
    }
    const bool is_access = signal == SIGSEGV || signal == SIGBUS;
    fail(is_access ? "an access out of bounds" : "undefined behaviour");
  }

  struct sigaction before_[kSignals];
};

// The same launch takes the same course every time.
template <class Kernel, class... Args>
void launch(Kernel kernel, unsigned blocks, unsigned threads, const Args&... args) {
  if (threads % kLanes != 0) fail("a block of no whole warps");
  const Faults faults;
  failure = nullptr;
  random_state = 1;
  grid.x = blocks;
  body = [&] { kernel(args...); };
  for (block.x = 0; block.x < blocks; ++block.x) run_block(threads);
}

// What thread `from` of the warp sends.
inline unsigned exchange(unsigned x, unsigned from, const void* place) {
  fibers[thread.x].sent = x;
  wait(Waits::kForWarp, place);
  const unsigned got = fibers[from].sent;
  wait(Waits::kForWarp, place);
  return got;
}

}  // namespace simt

#define threadIdx ::simt::thread
#define blockIdx ::simt::block
#define gridDim ::simt::grid
#define SIMT_BARRIER __attribute__((noinline)) inline  // the place of a barrier is its return address
#define SIMT_PLACE __builtin_return_address(0)

SIMT_BARRIER void __syncthreads() { simt::wait(simt::Waits::kForBlock, SIMT_PLACE); }
SIMT_BARRIER void __syncwarp() { simt::wait(simt::Waits::kForWarp, SIMT_PLACE); }

SIMT_BARRIER int __syncthreads_or(int predicate) {
  simt::fibers[threadIdx.x].sent = predicate != 0;
  simt::wait(simt::Waits::kForBlock, SIMT_PLACE);
  int any = 0;
  for (const auto& fiber : simt::fibers) any |= static_cast<int>(fiber.sent);
  simt::wait(simt::Waits::kForBlock, SIMT_PLACE);
  return any;
}

SIMT_BARRIER unsigned __shfl_sync(unsigned mask, unsigned x, int lane, int width) {
  if (mask != ~0u) simt::fail("a shuffle of part of a warp");
  const unsigned first = threadIdx.x / width * width;
  return simt::exchange(x, first + (static_cast<unsigned>(lane) & (width - 1)), SIMT_PLACE);
}

SIMT_BARRIER double __shfl_down_sync(unsigned mask, double x, unsigned offset) {
  if (mask != ~0u) simt::fail("a shuffle of part of a warp");
  const unsigned from = threadIdx.x % simt::kLanes + offset < simt::kLanes ? threadIdx.x + offset : threadIdx.x;
  unsigned words[2];
  memcpy(words, &x, sizeof(x));
  for (unsigned& word : words) word = simt::exchange(word, from, SIMT_PLACE);
  memcpy(&x, words, sizeof(x));
  return x;
}

inline void __threadfence() {}
inline void __nanosleep(unsigned) { simt::fail("a block waits for one that has not run"); }

template <class T>
void __stcg(T* p, T x) {
  *p = x;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
inline unsigned long long atomicExch(unsigned long long* p, unsigned long long x) {
  std::swap(*p, x);
  return x;
}
inline unsigned long long atomicAdd(unsigned long long* p, unsigned long long x) {
  const unsigned long long before = *p;
  *p += x;
  return before;
}
