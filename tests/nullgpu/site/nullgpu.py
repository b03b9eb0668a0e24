"""What a program did on the null GPU."""

import ctypes
import os

NAMES = ("kernels", "waits", "to_host", "to_device", "products", "memsets", "on_device", "collectives", "aside")

_counters = ctypes.CDLL(os.environ["LD_PRELOAD"].split()[0]).null_counters
_counters.restype = ctypes.POINTER(ctypes.c_ulong)


def counts() -> dict[str, int]:
    """Calls of each kind, since the start or `reset`; products are those of cuBLAS, waits those of the host,
    aside the kernels on other streams than the standard one."""
    return {name: int(_counters()[index]) for index, name in enumerate(NAMES)}


def reset() -> None:
    """Count from zero."""
    for index in range(len(NAMES)):
        _counters()[index] = 0
