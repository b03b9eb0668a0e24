/* cuBLAS, cuBLASLt and NCCL, as far as their calls return something; build.py makes the rest. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cublasLt.h>
#include <cublas_v2.h>
#include <nccl.h>

enum { PRODUCTS = 4, COLLECTIVES = 7 };
void null_count(int which);
void null_handle(void *to);

#define DONE return CUBLAS_STATUS_SUCCESS
cublasStatus_t cublasCreate_v2(cublasHandle_t *h) { null_handle(h); DONE; }
cublasStatus_t cublasGetMathMode(cublasHandle_t h, cublasMath_t *mode) { *mode = 0; DONE; }
cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t h, cublasPointerMode_t *mode) { *mode = 0; DONE; }
cublasStatus_t cublasLtCreate(cublasLtHandle_t *h) { null_handle(h); DONE; }
cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *d, cublasComputeType_t compute, cudaDataType_t type) {
    null_handle(d);
    DONE;
}
cublasStatus_t cublasLtMatrixLayoutCreate(
    cublasLtMatrixLayout_t *l, cudaDataType type, uint64_t rows, uint64_t columns, int64_t stride) {
    null_handle(l);
    DONE;
}
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *p) { null_handle(p); DONE; }
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t h, cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
    cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d, cublasLtMatmulPreference_t preference, int wanted,
    cublasLtMatmulHeuristicResult_t *result, int *found) {
    memset(result, 0, sizeof *result);
    *found = 1;
    DONE;
}
cublasStatus_t cublasLtMatmul(
    cublasLtHandle_t h, cublasLtMatmulDesc_t desc, const void *alpha, const void *A, cublasLtMatrixLayout_t a,
    const void *B, cublasLtMatrixLayout_t b, const void *beta, const void *C, cublasLtMatrixLayout_t c, void *D,
    cublasLtMatrixLayout_t d, const cublasLtMatmulAlgo_t *how, void *space, size_t size, cudaStream_t stream) {
    null_count(PRODUCTS);
    DONE;
}

#undef DONE
#define DONE return ncclSuccess
static int of_environment(const char *name, int otherwise) { return getenv(name) ? atoi(getenv(name)) : otherwise; }
ncclResult_t ncclGetVersion(int *version) { *version = NCCL_VERSION_CODE; DONE; }
ncclResult_t ncclGetUniqueId(ncclUniqueId *id) { memset(id, 7, sizeof *id); DONE; }
ncclResult_t ncclCommInitRank(ncclComm_t *c, int n, ncclUniqueId id, int rank) { null_handle(c); DONE; }
ncclResult_t ncclCommInitRankConfig(ncclComm_t *c, int n, ncclUniqueId id, int rank, ncclConfig_t *config) {
    null_handle(c);
    DONE;
}
ncclResult_t ncclCommInitRankScalable(ncclComm_t *c, int n, int rank, int ids, ncclUniqueId *id, ncclConfig_t *config) {
    null_handle(c);
    DONE;
}
ncclResult_t ncclCommSplit(ncclComm_t old, int color, int key, ncclComm_t *c, ncclConfig_t *config) {
    null_handle(c);
    DONE;
}
ncclResult_t ncclCommCount(const ncclComm_t c, int *n) { *n = of_environment("WORLD_SIZE", 1); DONE; }
ncclResult_t ncclCommUserRank(const ncclComm_t c, int *rank) { *rank = of_environment("RANK", 0); DONE; }
ncclResult_t ncclCommCuDevice(const ncclComm_t c, int *device) { *device = 0; DONE; }
ncclResult_t ncclCommGetAsyncError(ncclComm_t c, ncclResult_t *error) { *error = ncclSuccess; DONE; }
const char *ncclGetErrorString(ncclResult_t error) { return "null"; }
const char *ncclGetLastError(ncclComm_t c) { return "null"; }

/* As with a peer that sits in a collective, where NULL_STUCK is set. */
#define LEAVE { while (of_environment("NULL_STUCK", 0)) pause(); DONE; }
ncclResult_t ncclCommFinalize(ncclComm_t c) LEAVE
ncclResult_t ncclCommDestroy(ncclComm_t c) LEAVE
ncclResult_t ncclCommAbort(ncclComm_t c) LEAVE

#define COLLECTIVE { null_count(COLLECTIVES); DONE; }
ncclResult_t ncclAllReduce(
    const void *s, void *r, size_t n, ncclDataType_t t, ncclRedOp_t o, ncclComm_t c, cudaStream_t st) COLLECTIVE
ncclResult_t ncclBroadcast(
    const void *s, void *r, size_t n, ncclDataType_t t, int root, ncclComm_t c, cudaStream_t st) COLLECTIVE
ncclResult_t ncclBcast(void *r, size_t n, ncclDataType_t t, int root, ncclComm_t c, cudaStream_t st) COLLECTIVE
ncclResult_t ncclAllGather(const void *s, void *r, size_t n, ncclDataType_t t, ncclComm_t c, cudaStream_t st) COLLECTIVE
ncclResult_t ncclReduceScatter(
    const void *s, void *r, size_t n, ncclDataType_t t, ncclRedOp_t o, ncclComm_t c, cudaStream_t st) COLLECTIVE
