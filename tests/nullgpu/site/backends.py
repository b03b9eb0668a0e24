"""Which attention is chosen for what, and why: commands.py runs it as the command `backends FILE`."""

import json
from pathlib import Path
from unittest import mock

import torch

from skipless.ssl.model import attention

CASES = {"bf16": (torch.bfloat16, 64), "bf16, 20": (torch.bfloat16, 20), "fp64": (torch.float64, 64)}


def _no_runtime(path: str) -> None:
    raise OSError("libcudart.so.12: cannot open shared object file: No such file or directory")


def main(words: list[str]) -> None:
    """Choose without the runtime of CUDA 12, then with it."""
    # Some releases of torch load it by themselves, so that it can't be missing where it is installed.
    with mock.patch("ctypes.CDLL", _no_runtime):
        chosen = {"no runtime": attention.choose_backend("cuda")}
    attention._hindrance.cache_clear()
    chosen |= {name: attention.choose_backend("cuda", "auto", *case) for name, case in CASES.items()}
    Path(words[0]).write_text(json.dumps(chosen))
