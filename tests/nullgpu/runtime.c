/* A GPU that does nothing: the CUDA runtime, loaded before torch's (LD_PRELOAD).

   Every call succeeds. Memory is real, zero at first and written to only by small copies; kernels, products and
   collectives are counted and not carried out. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <cuda_runtime_api.h>
#undef cudaGetDeviceProperties

#define PAGE 4096ul
#define COPIED 4096ul /* larger copies onto the device would make its memory real */
#define GIGABYTE (1ul << 30)
#define DONE return cudaSuccess

/* Counters, in the order of site/nullgpu.py. */
enum { KERNELS, WAITS, TO_HOST, TO_DEVICE, PRODUCTS, MEMSETS, ON_DEVICE, COLLECTIVES, ASIDE, COUNTERS };
static unsigned long counters[COUNTERS];
unsigned long *null_counters(void) { return counters; }
void null_count(int which) { __sync_fetch_and_add(&counters[which], 1); }
void null_handle(void *to) {
    static long next = 0x1000;
    *(void **)to = (void *)__sync_add_and_fetch(&next, 16);
}

/* Memory: every block and whether it is the device's or pinned. */
static struct { char *start; size_t size; enum cudaMemoryType type; } blocks[1 << 16];
static int used;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void add(void *start, size_t size, enum cudaMemoryType type) {
    pthread_mutex_lock(&lock);
    int i = 0;
    while (i < used && blocks[i].start) i++;
    if (i == (int)(sizeof blocks / sizeof *blocks)) abort();
    if (i == used) used++;
    blocks[i].start = start, blocks[i].size = size, blocks[i].type = type;
    pthread_mutex_unlock(&lock);
}

static size_t forget(const void *start) {
    size_t size = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < used; i++)
        if (start && blocks[i].start == start) size = blocks[i].size, blocks[i].start = NULL;
    pthread_mutex_unlock(&lock);
    return size;
}

static enum cudaMemoryType type_of(const void *p) {
    enum cudaMemoryType type = cudaMemoryTypeUnregistered;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < used; i++)
        if (blocks[i].start && (char *)p >= blocks[i].start && (char *)p < blocks[i].start + blocks[i].size)
            type = blocks[i].type;
    pthread_mutex_unlock(&lock);
    return type;
}

static void copy(void *to, const void *from, size_t size) {
    int on_device = type_of(to) == cudaMemoryTypeDevice, from_device = type_of(from) == cudaMemoryTypeDevice;
    null_count(on_device == from_device ? ON_DEVICE : on_device ? TO_DEVICE : TO_HOST);
    if (!on_device || size <= COPIED) memmove(to, from, size);
}

cudaError_t cudaMalloc(void **p, size_t size) {
    size = (size + PAGE - 1) / PAGE * PAGE;
    *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (*p == MAP_FAILED) return cudaErrorMemoryAllocation;
    add(*p, size, cudaMemoryTypeDevice);
    DONE;
}
cudaError_t cudaFree(void *p) {
    size_t size = forget(p);
    if (size) munmap(p, size);
    DONE;
}
cudaError_t cudaHostAlloc(void **p, size_t size, unsigned flags) {
    *p = aligned_alloc(PAGE, (size + PAGE - 1) / PAGE * PAGE);
    add(*p, size, cudaMemoryTypeHost);
    DONE;
}
cudaError_t cudaMallocHost(void **p, size_t size) { return cudaHostAlloc(p, size, 0); }
cudaError_t cudaFreeHost(void *p) { forget(p); free(p); DONE; }
cudaError_t cudaMemGetInfo(size_t *available, size_t *total) { *available = 78 * GIGABYTE, *total = 80 * GIGABYTE; DONE; }
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
    copy(to, from, size);
    DONE;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    null_count(WAITS);
    copy(to, from, size);
    DONE;
}
cudaError_t cudaMemsetAsync(void *p, int value, size_t size, cudaStream_t stream) {
    null_count(MEMSETS);
    if (size <= COPIED) memset(p, value, size);
    DONE;
}
cudaError_t cudaMemset(void *p, int value, size_t size) { return cudaMemsetAsync(p, value, size, 0); }

/* Devices: H100s, NULL_GPUS of them. */
static __thread int current;
cudaError_t cudaGetDeviceCount(int *n) { *n = getenv("NULL_GPUS") ? atoi(getenv("NULL_GPUS")) : 1; DONE; }
cudaError_t cudaGetDevice(int *device) { *device = current; DONE; }
cudaError_t cudaSetDevice(int device) { current = device; DONE; }
cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; DONE; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; DONE; }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "NVIDIA H100 80GB HBM3 (null)");
    p->major = 9, p->minor = 0;
    p->totalGlobalMem = 80 * GIGABYTE, p->totalConstMem = 1 << 16, p->l2CacheSize = 50 << 20;
    p->multiProcessorCount = 132, p->maxThreadsPerMultiProcessor = 2048, p->maxBlocksPerMultiProcessor = 32;
    p->sharedMemPerBlock = 48 << 10, p->sharedMemPerBlockOptin = 227 << 10, p->sharedMemPerMultiprocessor = 228 << 10;
    p->regsPerBlock = p->regsPerMultiprocessor = 1 << 16, p->warpSize = 32, p->maxThreadsPerBlock = 1024;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 0x7fffffff, p->maxGridSize[1] = p->maxGridSize[2] = 0xffff;
    p->concurrentKernels = p->unifiedAddressing = p->managedMemory = 1, p->memoryBusWidth = 5120;
    DONE;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    struct cudaDeviceProp p;
    cudaGetDeviceProperties(&p, device);
    switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = p.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = p.sharedMemPerMultiprocessor; break;
    case cudaDevAttrMaxGridDimX: *value = p.maxGridSize[0]; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = p.regsPerBlock; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    default: *value = 1;
    }
    DONE;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
    memset(a, 0, sizeof *a);
    a->type = type_of(p), a->device = current, a->devicePointer = a->hostPointer = (void *)p;
    DONE;
}
_Bool _ZN3c104cuda17hasPrimaryContextEa(signed char device) { return 1; } /* c10::cuda::hasPrimaryContext */

/* Streams and events: everything is over at once. */
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0, *greatest = -5; DONE; }
cudaError_t cudaStreamCreate(cudaStream_t *s) { null_handle(s); DONE; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags) { null_handle(s); DONE; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority) { null_handle(s); DONE; }
cudaError_t cudaStreamGetPriority(cudaStream_t s, int *priority) { *priority = 0; DONE; }
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *c) {
    *c = cudaStreamCaptureStatusNone;
    DONE;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) { DONE; }
cudaError_t cudaStreamSynchronize(cudaStream_t s) { null_count(WAITS); DONE; }
cudaError_t cudaDeviceSynchronize(void) { null_count(WAITS); DONE; }
cudaError_t cudaEventSynchronize(cudaEvent_t e) { null_count(WAITS); DONE; }
cudaError_t cudaEventCreate(cudaEvent_t *e) { null_handle(e); DONE; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) { null_handle(e); DONE; }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) { *ms = 1; DONE; }
const char *cudaGetErrorString(cudaError_t error) { return "null"; }
const char *cudaGetErrorName(cudaError_t error) { return "null"; }

/* Kernels, those of other streams than the standard one also by themselves. */
void null_launched(void *s) {
    null_count(KERNELS);
    if (s) null_count(ASIDE);
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *kernel) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024, a->numRegs = 32, a->binaryVersion = a->ptxVersion = 90;
    DONE;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *kernel, int block, size_t shared) {
    *n = 2;
    DONE;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *n, const void *kernel, int block, size_t shared, unsigned flags) { *n = 2; DONE; }
cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **values, size_t shared, cudaStream_t s) {
    null_launched(s);
    DONE;
}
cudaError_t __cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **values, size_t shared, cudaStream_t s) {
    null_launched(s);
    DONE;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *kernel, void **values) {
    null_launched(config->stream);
    DONE;
}
cudaError_t __cudaGetKernel(void **kernel, const void *function) { *kernel = (void *)function; DONE; }

static __thread struct { dim3 grid, block; size_t shared; void *stream; } configurations[64];
static __thread int depth;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *stream) {
    configurations[depth].grid = grid, configurations[depth].block = block;
    configurations[depth].shared = shared, configurations[depth++].stream = stream;
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    depth--;
    *grid = configurations[depth].grid, *block = configurations[depth].block;
    *shared = configurations[depth].shared, *(void **)stream = configurations[depth].stream;
    DONE;
}
