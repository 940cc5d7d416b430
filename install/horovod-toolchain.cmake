# A CMake toolchain file with which the unmodified source of Horovod 0.28.1 builds against today's PyTorch.
#
# Horovod's CMakeLists.txt asks for C++14; PyTorch's headers need C++17 (2.1 and later) or C++20 (2.12 and later).
# CMake reads this file first. It has CMake include cxx-standard.cmake at the end of Horovod's `project(...)`, where the
# compiler's flags for "C++14" are known and can be redefined. Nothing of Horovod is patched.
set(CMAKE_PROJECT_horovod_INCLUDE "${CMAKE_CURRENT_LIST_DIR}/cxx-standard.cmake" CACHE FILEPATH "" FORCE)
