"""Memory of this machine."""

import math
import os


def host_memory() -> float:
    """Bytes of this machine's memory; infinite where the system does not say."""
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) if hasattr(os, "sysconf") else math.inf
