# Chooses the CUDA compiler before the CUDA language is enabled, and stops with one sentence when it cannot do the job.
# Order: CMAKE_CUDA_COMPILER or CUDACXX; an nvcc on PATH, in CUDA_HOME or CUDA_PATH; the nvcc of PyPI's nvidia-cuda-nvcc.

# Directory of an installed Python package, found without importing it; empty when it is not there.
function(jax_flashmla_python_package name result)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
      "import importlib.util as u; s = u.find_spec('${name}'); print('\\n'.join(s.submodule_search_locations or []) if s else '')"
    OUTPUT_VARIABLE paths OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  string(REPLACE "\n" ";" paths "${paths}")
  set(${result} "${paths}" PARENT_SCOPE)
endfunction()

function(jax_flashmla_find_cxx)
  if(DEFINED CMAKE_CXX_COMPILER OR DEFINED ENV{CXX})
    return()
  endif()
  find_program(JAX_FLASHMLA_CXX NAMES c++ g++ clang++)
  if(NOT JAX_FLASHMLA_CXX)
    message(FATAL_ERROR "jax_flashmla: no C++ compiler was found; install g++, or build the reference alone with "
      "-C cmake.define.JAX_FLASHMLA_CUDA=OFF.")
  endif()
endfunction()

macro(jax_flashmla_find_nvcc)
  if(DEFINED CMAKE_CUDA_COMPILER)
    set(JAX_FLASHMLA_NVCC "${CMAKE_CUDA_COMPILER}")
  elseif(DEFINED ENV{CUDACXX})
    set(JAX_FLASHMLA_NVCC "$ENV{CUDACXX}")
  else()
    set(JAX_FLASHMLA_NVCC "")
    if(NOT JAX_FLASHMLA_PYPI_NVCC)
      find_program(JAX_FLASHMLA_SYSTEM_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin
        NO_CMAKE_PATH NO_CMAKE_SYSTEM_PATH)
      if(JAX_FLASHMLA_SYSTEM_NVCC)
        set(JAX_FLASHMLA_NVCC "${JAX_FLASHMLA_SYSTEM_NVCC}")
      endif()
    endif()
    if(NOT JAX_FLASHMLA_NVCC)
      jax_flashmla_python_package(nvidia _nvidia_paths)
      foreach(_path IN LISTS _nvidia_paths)
        if(EXISTS "${_path}/cu13/bin/nvcc" AND NOT JAX_FLASHMLA_NVCC)
          set(JAX_FLASHMLA_NVCC "${_path}/cu13/bin/nvcc")
          set(CMAKE_CUDA_FLAGS_INIT "-L${_path}/cu13/lib")  # where libcudart_static.a is
        endif()
      endforeach()
    endif()
    if(NOT JAX_FLASHMLA_NVCC)
      message(FATAL_ERROR "jax_flashmla: no CUDA compiler was found; set CUDACXX to an nvcc of CUDA 12.3 or newer, "
        "pip install 'nvidia-cuda-nvcc==13.0.*' with its companions from pyproject.toml, or build the reference alone "
        "with -C cmake.define.JAX_FLASHMLA_CUDA=OFF.")
    endif()
  endif()
  jax_flashmla_check_nvcc("${JAX_FLASHMLA_NVCC}")
  set(CMAKE_CUDA_COMPILER "${JAX_FLASHMLA_NVCC}")
endmacro()

function(jax_flashmla_check_nvcc nvcc)
  execute_process(COMMAND "${nvcc}" --version OUTPUT_VARIABLE text ERROR_VARIABLE text RESULT_VARIABLE status)
  if(NOT status EQUAL 0 OR NOT text MATCHES "release ([0-9]+\\.[0-9]+)")
    message(FATAL_ERROR "jax_flashmla: '${nvcc} --version' does not answer like NVIDIA's nvcc; set CUDACXX to an nvcc of "
      "CUDA 12.3 or newer.")
  endif()
  set(version "${CMAKE_MATCH_1}")
  if(version VERSION_LESS 12.3)
    message(FATAL_ERROR "jax_flashmla: ${nvcc} is CUDA ${version}, and the kernels need 12.3 or newer; set CUDACXX to a "
      "newer nvcc, or pass -C cmake.define.JAX_FLASHMLA_PYPI_NVCC=ON to use the one from PyPI.")
  endif()
  execute_process(COMMAND "${nvcc}" --list-gpu-arch OUTPUT_VARIABLE architectures ERROR_QUIET)
  if(NOT architectures MATCHES "compute_90a?[\r\n]")
    message(FATAL_ERROR "jax_flashmla: ${nvcc} (CUDA ${version}) cannot compile for sm_90a; set CUDACXX to an nvcc that can.")
  endif()
  # nvcc refuses host compilers it does not know: say so here, in one sentence, and not in CMake's compiler test.
  set(probe "${CMAKE_BINARY_DIR}/nvcc_probe")
  file(WRITE "${probe}/probe.cu" "__global__ void probe() {}\nint main() { probe<<<1, 1>>>(); }\n")
  set(host_compiler "")
  if(DEFINED CMAKE_CUDA_HOST_COMPILER)
    set(host_compiler "-ccbin=${CMAKE_CUDA_HOST_COMPILER}")
  elseif(DEFINED ENV{CUDAHOSTCXX})
    set(host_compiler "-ccbin=$ENV{CUDAHOSTCXX}")
  endif()
  execute_process(
    COMMAND "${nvcc}" ${host_compiler} -std=c++17 -gencode arch=compute_90a,code=sm_90a -c "${probe}/probe.cu" -o "${probe}/probe.o"
    OUTPUT_VARIABLE text ERROR_VARIABLE text RESULT_VARIABLE status)
  if(NOT status EQUAL 0)
    string(REGEX MATCH "[^\r\n]*([Ee]rror|unsupported|not found|No such)[^\r\n]*" reason "${text}")
    if(NOT reason)
      set(reason "exit status ${status}")
    endif()
    message(FATAL_ERROR "jax_flashmla: ${nvcc} (CUDA ${version}) cannot compile an empty kernel for sm_90a with this host "
      "compiler: ${reason}; set CUDAHOSTCXX to a g++ or clang++ that it supports.")
  endif()
  message(STATUS "jax_flashmla: CUDA ${version}, ${nvcc}")
endfunction()
