"""The CUDA sources compiled as C++, so that their kernels run on the CPU.

cuda_runtime.h says what is checked, `build.load()` compiles, and `controls.Shim` steers what was compiled.
"""
