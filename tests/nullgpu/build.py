"""Build a GPU that does nothing, on which torch's own CUDA code runs where there is no GPU.

The CUDA runtime, cuBLAS, cuSOLVER and NCCL are replaced by functions that succeed, count, and do nothing else. torch's
dispatcher, autograd, allocator, autocast, DDP, FSDP2, fused optimizers and sync-debug mode are the real ones. So it
finds tensors on the wrong device, types that a kernel refuses, extensions that do not load, waits for the device, and
launches that have become more. It cannot find wrong numbers, races, or anything of cuDNN, Triton and nvJPEG.

    python tests/nullgpu/build.py build/nullgpu        # gcc, and the CUDA headers of torch's wheels: 10 seconds
    env $(python tests/nullgpu/build.py build/nullgpu) python ssl/pretrain.py ...

NULL_GPUS is the number of GPUs; the standard one is 1.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
USERS = ("torch_cuda", "c10_cuda", "torch_python", "torch_cuda_linalg", "caffe2_nvrtc")
# What hands kernels over to the runtime when a library is loaded: the real runtime may keep it.
REAL = re.compile(r"__cuda(Un)?[rR]egister\w+")
PRODUCT = re.compile("gemm|Gemm|trsm|syrk|dot|gemv")


class Unavailable(Exception):
    """Why there can be no null GPU here."""


def environment(folder: Path) -> dict[str, str]:
    """What a program needs to see the GPU that was built in `folder`."""
    source = HERE.parent.parent / "src"
    return {
        "LD_PRELOAD": str(folder / "libnullgpu.so"),
        "LD_LIBRARY_PATH": str(folder / "lib"),
        "TRITON_LIBCUDA_PATH": str(folder / "lib"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE / "site"), str(source)]),
    }


def build(folder: Path) -> dict[str, str]:
    """Build it, and return its `environment`. Raises Unavailable, with the reason."""
    if shutil.which("gcc") is None or shutil.which("nm") is None:
        raise Unavailable("the null GPU is built with gcc and nm, and one of them is missing")
    spec = importlib.util.find_spec("torch")
    torch = Path(str(spec.origin)).parent if spec else Path()
    libraries = [torch / "lib" / f"lib{name}.so" for name in USERS]
    if not all(map(Path.exists, libraries)):
        raise Unavailable("the null GPU needs a torch that was built for CUDA, as the wheels for Linux are")
    nvidia = torch.parent / "nvidia"
    headers = [HERE / "include", *sorted(nvidia.glob("cu1*/include")), nvidia / "nccl/include"]
    wanted = ("cuda_runtime_api.h", "cublasLt.h", "cusolverDn.h", "nccl.h")
    missing = [name for name in wanted if not any((at / name).exists() for at in headers)]
    if missing:
        raise Unavailable(f"the null GPU needs headers of CUDA that torch's wheels have not brought: {missing}")

    (folder / "lib").mkdir(parents=True, exist_ok=True)
    flags = ["-O1", "-fPIC", "-w", *(f"-I{at}" for at in headers)]
    written = [folder / "runtime.o", folder / "libraries.o"]
    for file in written:
        _run("gcc", *flags, "-c", "-o", file, HERE / f"{file.stem}.c")
    needed = _symbols("--undefined-only", *libraries) - _symbols("--defined-only", *written)
    header = next(at / "cusolverDn.h" for at in headers if (at / "cusolverDn.h").exists())
    (folder / "rest.c").write_text(_rest(needed, header.read_text()))
    _run("gcc", *flags, "-shared", "-o", folder / "libnullgpu.so", *written, folder / "rest.c", "-lpthread")

    soname, written = "libcuda.so.1", folder / "driver.o"
    _run("gcc", *flags, "-c", "-o", written, HERE / "driver.c")
    for source in (torch.parent / "triton/backends/nvidia").glob("driver.c"):
        needed |= set(re.findall(r"\bcu[A-Z]\w+(?=\()", source.read_text()))
    driver = {name for name in needed if re.match("cu[A-Z]", name)} - _symbols("--defined-only", written)
    (folder / "rest.c").write_text("\n".join(f"int {name}(void) {{ return 0; }}" for name in sorted(driver)))
    linked = ["-w", "-shared", "-fPIC", f"-Wl,-soname,{soname}"]
    _run("gcc", *linked, "-o", folder / "lib" / soname, written, folder / "rest.c")
    return environment(folder)


def _rest(needed: set[str], cusolver: str) -> str:
    """C for all that nobody has written: it succeeds; what creates makes a handle, what asks for a size gets one."""
    cusolver = re.sub(r"/\*.*?\*/", "", cusolver, flags=re.S)
    prototypes = dict(re.findall(r"cusolverStatus_t\s+CUSOLVERAPI\s+(\w+)\s*\(([^;]*?)\)\s*;", cusolver))
    lines = ["#include <cusolverDn.h>", "void null_count(int);", "void null_handle(void *);"]
    sized = {name for name in needed & set(prototypes) if "ufferSize" in name}
    for name in sorted(sized):
        sizes = re.findall(r"\*\s*(lwork|workspaceInBytes\w*|worksize|lwork_bytes)\s*(?:,|$)", prototypes[name])
        body = " ".join(f"*{size} = 1024;" for size in sizes)
        lines.append(f"cusolverStatus_t {name}({prototypes[name]}) {{ {body} return 0; }}")
    # Beyond the prototypes of cusolverDn.h, which C would hold against another signature.
    for name in sorted(needed - sized):
        if REAL.fullmatch(name) or not re.match("cuda|__cuda|cublas|cusolver|nccl", name):
            continue
        body = "null_handle(p);" if "cusolver" in name and "Create" in name else ""
        body = "null_count(4);" if name.startswith("cublas") and PRODUCT.search(name) else body
        lines.append(f'int null_{name}(void *p) __asm__("{name}");\nint null_{name}(void *p) {{ {body} return 0; }}')
    return "\n".join(lines) + "\n"


def _symbols(which: str, *files: Path) -> set[str]:
    dynamic = ["-D"] if files[0].suffix == ".so" else []
    lines = _run("nm", *dynamic, which, "--no-sort", *files).splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines if len(line.split()) > 1}


def _run(*command: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"the null GPU cannot be built: {' '.join(done.stderr.split())[:400]}")
    return done.stdout


if __name__ == "__main__":
    print(*(f"{name}={value}" for name, value in build(Path(sys.argv[1]).absolute()).items()))
