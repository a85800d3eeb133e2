#include "common/instruction_set.h"

#include <stdexcept>

namespace rewardfuse {
namespace {

InstructionSet best() {
#ifdef REWARDFUSE_X86_64
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl")) {
    return InstructionSet::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return InstructionSet::kAvx2;
#endif
  return InstructionSet::kBaseline;
}

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};
InstructionSet chosen = best();

}  // namespace

InstructionSet instruction_set() { return chosen; }

const char* instruction_set_name() { return kNames[static_cast<int>(chosen)]; }

void set_instruction_set(const std::string& name) {
  for (int i = 0; i <= static_cast<int>(best()); ++i) {
    if (name == kNames[i]) {
      chosen = static_cast<InstructionSet>(i);
      return;
    }
  }
  throw std::invalid_argument("instruction set: expected one that this machine has (up to " +
                              std::string(kNames[static_cast<int>(best())]) + "), got '" + name + "'");
}

}  // namespace rewardfuse
