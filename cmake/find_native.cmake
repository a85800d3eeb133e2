# Sets REWARDFUSE_HAS_NATIVE and REWARDFUSE_NATIVE_REASON; with it the torch_* variables and the CXX language.
#
# torch is asked for its own paths instead of find_package(Torch), which fails on a CUDA build of torch without nvcc,
# overrides CMAKE_CUDA_ARCHITECTURES and leaves out torch_python.

macro(rewardfuse_missing_native reason)
  if(REWARDFUSE_NATIVE STREQUAL "ON")
    message(FATAL_ERROR "REWARDFUSE_NATIVE=ON, but ${reason}")
  endif()
  set(REWARDFUSE_HAS_NATIVE FALSE)
  set(REWARDFUSE_NATIVE_REASON "not built: ${reason}")
endmacro()

if(NOT REWARDFUSE_NATIVE MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "REWARDFUSE_NATIVE: expected AUTO, ON or OFF, got '${REWARDFUSE_NATIVE}'")
endif()
if(REWARDFUSE_NATIVE STREQUAL "OFF")
  set(REWARDFUSE_HAS_NATIVE FALSE)
  set(REWARDFUSE_NATIVE_REASON "not built: REWARDFUSE_NATIVE=OFF")
  return()
endif()

find_package(Python COMPONENTS Interpreter REQUIRED)
execute_process(
  COMMAND ${Python_EXECUTABLE} ${CMAKE_CURRENT_LIST_DIR}/torch_paths.py
  OUTPUT_VARIABLE torch_paths
  ERROR_VARIABLE torch_error
  RESULT_VARIABLE torch_status
  OUTPUT_STRIP_TRAILING_WHITESPACE)
if(NOT torch_status EQUAL 0)
  string(REGEX REPLACE ".*\n([^\n]+)\n*$" "\\1" torch_error "${torch_error}")
  string(STRIP "${torch_error}" torch_error)
  string(REPLACE "\"" "'" torch_error "${torch_error}")
  rewardfuse_missing_native("torch cannot be imported where it was built (${torch_error}); install torch and build with --no-build-isolation")
  return()
endif()
list(GET torch_paths 0 torch_version)
list(GET torch_paths 1 torch_cuda_version)
list(GET torch_paths 2 torch_include_dir)
list(GET torch_paths 3 torch_library_dir)

include(CheckLanguage)
check_language(CXX)
if(NOT CMAKE_CXX_COMPILER)
  rewardfuse_missing_native("no C++ compiler was found")
  return()
endif()
enable_language(CXX)
find_package(Python COMPONENTS Interpreter Development.Module REQUIRED)
set(REWARDFUSE_HAS_NATIVE TRUE)
set(REWARDFUSE_NATIVE_REASON "built with ${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION} against torch ${torch_version}")
