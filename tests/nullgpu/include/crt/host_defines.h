/* What CUDA's headers need of nvcc's own, which torch's wheels do not bring, for a C compiler. */
#ifndef NULLGPU_HOST_DEFINES
#define NULLGPU_HOST_DEFINES
#define __host__
#define __device__
#define __global__
#define __device_builtin__
#define __cudart_builtin__
#define __inline_hint__
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __align__(n)
#define CUDARTAPI
#endif
