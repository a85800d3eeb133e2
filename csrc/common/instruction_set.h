// Which instruction set the CPU kernels use: the best of this machine, unless a test asks for another. Torch-free.
#pragma once

#include <string>

namespace rewardfuse {

enum class InstructionSet : int { kBaseline, kAvx2, kAvx512 };

InstructionSet instruction_set();
const char* instruction_set_name();
void set_instruction_set(const std::string& name);  // throws std::invalid_argument where this machine lacks it

}  // namespace rewardfuse

// Declares the `Type name` that a cpu.cpp defines once for each instruction set, and `name_cpu()`, which picks one.
#ifdef REWARDFUSE_X86_64
#define RF_CPU_VARIANTS(Type, name)                                                      \
  namespace baseline {                                                                   \
  extern const Type name;                                                                \
  }                                                                                      \
  namespace avx2 {                                                                       \
  extern const Type name;                                                                \
  }                                                                                      \
  namespace avx512 {                                                                     \
  extern const Type name;                                                                \
  }                                                                                      \
  inline const Type& name##_cpu() {                                                      \
    static const Type* const variants[] = {&baseline::name, &avx2::name, &avx512::name}; \
    return *variants[static_cast<int>(instruction_set())];                               \
  }
#else
#define RF_CPU_VARIANTS(Type, name) \
  namespace baseline {              \
  extern const Type name;           \
  }                                 \
  inline const Type& name##_cpu() { return baseline::name; }
#endif
