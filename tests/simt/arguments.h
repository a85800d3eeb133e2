// The arguments of a call as Python hands them over: operands by name.
#pragma once

#include <map>
#include <stdexcept>
#include <string>

#include "common/launch.h"
#include "common/operand.h"

class Arguments {
 public:
  void set(const std::string& name, const rewardfuse::Operand& operand) { operands_[name] = operand; }

  // Each is asked for once; what was not given is the number `otherwise`.
  rewardfuse::Operand operand(const char* name, double otherwise = 0) {
    rewardfuse::Operand operand;
    operand.value = otherwise;
    if (const auto found = operands_.extract(name)) operand = found.mapped();
    return operand;
  }

  template <class T>
  T* data(const char* name) {
    return static_cast<T*>(const_cast<void*>(operand(name).data));
  }

  double number(const char* name) { return operand(name).value; }
  int64_t integer(const char* name) { return static_cast<int64_t>(number(name)); }

  rewardfuse::CudaLaunch launch() {
    rewardfuse::CudaLaunch launch;
    launch.blocks = static_cast<unsigned>(integer("blocks"));
    launch.partials = data<double>("partials");
    launch.flags = data<unsigned long long>("flags");
    launch.nonce = static_cast<unsigned long long>(integer("nonce"));
    return launch;
  }

  void expect_none_left() const {
    if (!operands_.empty()) throw std::invalid_argument("unknown argument " + operands_.begin()->first);
  }

  void clear() { operands_.clear(); }

 private:
  std::map<std::string, rewardfuse::Operand> operands_;
};

using Call = void (*)(Arguments&);

// Kernels of probes.cpp, by name; null where there is none.
Call find_probe(const std::string& name);
