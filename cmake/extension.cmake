# The Python module rewardfuse._C. Sources are listed by name: a new op adds its lines here.

set(cuda_ops all_pairs approx_kl bradley_terry bradley_terry_tie kl_penalized_rewards plackett_luce)
set(cpu_ops ${cuda_ops} token_logprobs)  # on a GPU Triton alone serves the last
list(TRANSFORM cpu_ops REPLACE "(.+)" "kernels/\\1/cpu.cpp" OUTPUT_VARIABLE cpu_kernels)
list(TRANSFORM cuda_ops REPLACE "(.+)" "kernels/\\1/cuda.cu" OUTPUT_VARIABLE cuda_kernels)
set(host_sources
    csrc/bindings.cpp
    csrc/autograd/all_pairs.cpp
    csrc/autograd/approx_kl.cpp
    csrc/autograd/bradley_terry.cpp
    csrc/autograd/bradley_terry_tie.cpp
    csrc/autograd/kl_penalized_rewards.cpp
    csrc/autograd/kl_penalized_rewards_cuda.cpp
    csrc/autograd/lists.cpp
    csrc/autograd/lists_cuda.cpp
    csrc/autograd/pairwise.cpp
    csrc/autograd/pairwise_cuda.cpp
    csrc/autograd/plackett_luce.cpp
    csrc/autograd/token_logprobs.cpp
    csrc/common/instruction_set.cpp)

if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release)
endif()
add_compile_options(-std=c++20)  # not by CXX_STANDARD: CMake 3.25 does not know how nvcc 13 takes it
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(include_dirs ${CMAKE_CURRENT_SOURCE_DIR} ${CMAKE_CURRENT_SOURCE_DIR}/csrc ${CMAKE_CURRENT_SOURCE_DIR}/kernels)

# Every cpu.cpp once for each instruction set, inside a namespace of that name.
function(rewardfuse_cpu_variant name simd_bytes)
  add_library(cpu_${name} OBJECT ${cpu_kernels})
  target_compile_options(cpu_${name} PRIVATE -O3 -fno-math-errno -ffp-contract=fast ${ARGN})
  target_compile_definitions(cpu_${name} PRIVATE REWARDFUSE_TARGET=${name} REWARDFUSE_SIMD_BYTES=${simd_bytes})
  target_include_directories(cpu_${name} PRIVATE ${include_dirs})
endfunction()

if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  add_compile_definitions(REWARDFUSE_X86_64)
  set(variants baseline avx2 avx512)
  rewardfuse_cpu_variant(avx2 32 -mavx2 -mfma)
  rewardfuse_cpu_variant(avx512 64 -mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma -mprefer-vector-width=512)
else()
  set(variants baseline)
endif()
rewardfuse_cpu_variant(baseline 16)

Python_add_library(_C MODULE WITH_SOABI ${host_sources})
foreach(variant IN LISTS variants)
  target_sources(_C PRIVATE $<TARGET_OBJECTS:cpu_${variant}>)
endforeach()
# torch's own pybind11 comes first: exceptions translate only between equal versions.
target_include_directories(_C PRIVATE ${include_dirs})
target_include_directories(_C SYSTEM BEFORE PRIVATE ${torch_include_dir} ${torch_include_dir}/torch/csrc/api/include)
target_compile_definitions(_C PRIVATE REWARDFUSE_TORCH_VERSION="${torch_version}" TORCH_EXTENSION_NAME=_C)
# Most of the work of compiling each host source is torch's headers: they are compiled once (2:06 in place of 2:49).
target_precompile_headers(_C PRIVATE <ATen/ATen.h> <torch/csrc/autograd/custom_function.h>)
target_link_directories(_C PRIVATE ${torch_library_dir})
target_link_libraries(_C PRIVATE c10 torch torch_cpu torch_python)
# at::parallel_for is OpenMP in a header. Its calls bind to the runtime that torch has loaded: linking one here could
# bring a second into the process.
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  target_compile_options(_C PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-fopenmp>)
endif()

if(REWARDFUSE_HAS_CUDA)
  add_library(cuda_kernels OBJECT ${cuda_kernels})
  target_include_directories(cuda_kernels PRIVATE ${include_dirs})
  target_sources(_C PRIVATE $<TARGET_OBJECTS:cuda_kernels>)
  set_target_properties(_C cuda_kernels PROPERTIES CUDA_RUNTIME_LIBRARY Shared)
  target_link_libraries(_C PRIVATE c10_cuda torch_cuda CUDA::cudart)
  target_compile_definitions(_C PRIVATE REWARDFUSE_WITH_CUDA=1)
else()
  target_compile_definitions(_C PRIVATE REWARDFUSE_WITH_CUDA=0)
endif()
install(TARGETS _C DESTINATION rewardfuse)
