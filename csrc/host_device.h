// How a function is declared that runs on the host and on the device.
#pragma once

#ifdef __CUDACC__
#define NEXUS_FN __host__ __device__ static inline
#else
#define NEXUS_FN static inline  // internal linkage: one header is compiled for several instruction sets
#endif
