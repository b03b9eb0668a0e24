"""What a machine can do, and what a program has taken of it."""

import ctypes
import resource
import sys

import torch


def memory_gb(device: torch.device) -> float:
    """Most memory held so far: of the device on CUDA, of this process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / (2**30 if sys.platform == "darwin" else 2**20)


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of the GPU by its data sheet, in FLOP/s; None for a CPU and for GPUs not listed."""
    if device.type != "cuda":
        return None
    peaks = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in peaks.items() if part in name), None)


def keep_freed_memory() -> None:
    """Stop glibc from handing large blocks back to the kernel: to fetch them anew for every tensor of every step costs
    page faults that take a good part of the step. Elsewhere than on glibc this does nothing."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_threshold, gigabyte = -1, -3, 1 << 30
        # Older glibc refuses a threshold above 32 MB; to set only the other one would make things worse.
        if ctypes.CDLL(None).mallopt(mmap_threshold, gigabyte):
            ctypes.CDLL(None).mallopt(trim_threshold, gigabyte)
