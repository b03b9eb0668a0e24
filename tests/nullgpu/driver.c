/* The CUDA driver, with which Triton and torch's inductor load and launch the kernels that they have made; build.py makes
   the rest. What it needs to know of the runtime lies in the library that is loaded before all. */
#include <cuda.h>
#include <cuda_runtime_api.h>

void null_handle(void *to);
void null_launched(void *stream);

#define DONE return CUDA_SUCCESS
CUresult cuInit(unsigned flags) { DONE; }
CUresult cuDriverGetVersion(int *version) { return (CUresult)cudaDriverGetVersion(version); }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = "null"; DONE; }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (void *)1; DONE; }
CUresult cuCtxGetDevice(CUdevice *device) { return (CUresult)cudaGetDevice(device); }
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) { *flags = 0, *active = 1; DONE; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = (void *)1; DONE; }
CUresult cuDeviceGet(CUdevice *device, int index) { *device = index; DONE; }
CUresult cuDeviceGetCount(int *n) { return (CUresult)cudaGetDeviceCount(n); }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    return (CUresult)cudaDeviceGetAttribute(value, (enum cudaDeviceAttr)attribute, device);
}
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
    if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *(CUdeviceptr *)value = pointer;
    DONE;
}
CUresult cuModuleLoad(CUmodule *module, const char *file) { null_handle(module); DONE; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { null_handle(module); DONE; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) { null_handle(function); DONE; }
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    if (attribute == CU_FUNC_ATTRIBUTE_NUM_REGS) *value = 32;
    DONE;
}
CUresult cuLaunchKernel(
    CUfunction function, unsigned x, unsigned y, unsigned z, unsigned of_x, unsigned of_y, unsigned of_z,
    unsigned shared, CUstream stream, void **values, void **more) {
    null_launched(stream);
    DONE;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **values, void **more) {
    null_launched(config->hStream);
    DONE;
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
    *status = CU_STREAM_CAPTURE_STATUS_NONE;
    DONE;
}
