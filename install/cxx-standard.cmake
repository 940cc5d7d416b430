# Included by CMake at the end of `project(horovod CXX)`: see horovod-toolchain.cmake.
foreach(standard 11 14 17)
  set(CMAKE_CXX${standard}_STANDARD_COMPILE_OPTION "-std=c++20")
  set(CMAKE_CXX${standard}_EXTENSION_COMPILE_OPTION "-std=gnu++20")
  set(CMAKE_CUDA${standard}_STANDARD_COMPILE_OPTION "-std=c++17")
  set(CMAKE_CUDA${standard}_EXTENSION_COMPILE_OPTION "-std=c++17")
endforeach()

# The library lies in <prefix>/lib/pythonX.Y/site-packages/horovod/torch and an MPI installed by pip in <prefix>/lib.
# A relative run path lets a kept wheel be installed into any other environment.
set(CMAKE_BUILD_RPATH "$ORIGIN/../../../..")
set(CMAKE_BUILD_WITH_INSTALL_RPATH OFF)
