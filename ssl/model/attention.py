"""Attention over a packed sequence: crops of several sizes in one call, each seeing only itself.

A batch of crops is one long sequence of tokens. `groups` says how it is put together: `((batch, length), ...)`, one
entry for each crop size, in the order in which the tokens lie. On CUDA, xformers or torch's varlen attention (the
flash kernel on sequences of several lengths) computes all groups in a single kernel; elsewhere torch's scaled
dot-product attention runs once per group. All give the same numbers. Which one runs is tried, not guessed.
"""

import ctypes
import importlib.util
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Groups = tuple[tuple[int, int], ...]
Chosen = Literal["xformers", "varlen", "sdpa"]
Backend = Literal["auto", "xformers", "varlen", "sdpa"]

# In the order of choice: one call for all crop sizes.
PACKED: dict[Chosen, str] = {"xformers": "xformers", "varlen": "torch's varlen attention"}
RUNTIME = "nvidia/cuda_runtime/lib/libcudart.so.12"


def choose_backend(
    device: torch.device | str, setting: Backend = "auto", dtype: torch.dtype = torch.bfloat16, channels: int = 64
) -> tuple[Chosen, str]:
    """The backend that runs on `device`, and a sentence that says why it does and those before it do not.

    Args:
        dtype: of queries, keys and values.
        channels: d_h, of a head.

    Raises:
        ValueError: `setting` is "xformers" or "varlen" where that cannot run.

    Examples:
        >>> choose_backend("cpu")[0]
        'sdpa'
    """
    if setting not in get_args(Backend):
        raise ValueError(f"attention is {setting!r}; choose auto, xformers, varlen or sdpa")
    if setting == "sdpa":
        return "sdpa", "torch SDPA, one call per crop size: chosen by the settings"
    hindrances: list[str] = []
    for backend, name in PACKED.items():
        if setting in ("auto", backend):
            hindrance = _hindrance(backend, torch.device(device), dtype, channels)
            if hindrance is None:
                return backend, ": ".join([f"{name}, one call for all crop sizes", *hindrances])
            hindrances.append(f"{name} {hindrance}")
    if setting != "auto":
        raise ValueError(f"attention is {setting!r} on device {str(device)!r}, but {hindrances[0]}; use auto or sdpa")
    return "sdpa", f"torch SDPA, one call per crop size: {'; '.join(hindrances)}"


@lru_cache(maxsize=32)
def _hindrance(backend: Chosen, device: torch.device, dtype: torch.dtype, channels: int) -> str | None:
    """Why a backend does not run there, as it shows when it is tried; None where it does."""
    # xformers is not even imported without CUDA: it has no CPU kernel and would only print warnings.
    if device.type != "cuda":
        return "runs on CUDA only"
    if backend == "xformers" and (missing := _load_xformers()):
        return missing
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cuda", enabled=False):
            q = torch.zeros(8, 1, channels, dtype=dtype, device=device, requires_grad=True)
            _packed(q, q, q, ((1, 3), (1, 5)), backend).sum().backward()
    except Exception as error:  # each version has kinds of its own, with pages of text
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        kind = str(dtype).removeprefix("torch.")
        return (
            f"does not take {kind} with {channels} channels a head on compute capability {capability} "
            f"({type(error).__name__})"
        )
    return None


def _load_xformers() -> str | None:
    """Load xformers' kernels; why they do not load, if so, in place of the warnings that importing it would print.

    The wheels want the runtime of CUDA 12, which torch built for CUDA 13 has not loaded.
    """
    found = importlib.util.find_spec("xformers")
    if found is None or found.origin is None:
        return "is not installed (pip install 'skipless[gpu]')"
    runtimes = [at for folder in sys.path if (at := Path(folder) / RUNTIME).exists()]
    try:
        for library in (*runtimes[:1], *Path(found.origin).parent.glob("_C*.so")):
            ctypes.CDLL(str(library))
    except OSError as error:
        return f"does not load ({error}; pip install 'skipless[gpu]' brings the CUDA 12 runtime)"
    return None


@lru_cache(maxsize=32)
def _block_diagonal(groups: Groups, device: torch.device) -> Any:
    from xformers.ops import fmha

    lengths = [length for batch, length in groups for _ in range(batch)]
    with torch.inference_mode(False):  # the cached mask may serve training next
        return fmha.BlockDiagonalMask.from_seqlens(lengths, device=device)


def _bounds(groups: Groups, device: torch.device) -> Tensor:
    """int32 [crops + 1]: where each crop begins, and where the last one ends."""
    with torch.inference_mode(False):  # what is cached may serve training next
        parts = [torch.zeros(1, dtype=torch.int32, device=device)]
        begin = 0
        for batch, length in groups:
            parts.append(begin + length * torch.arange(1, batch + 1, dtype=torch.int32, device=device))
            begin += batch * length
        return torch.cat(parts)


_cached_bounds = lru_cache(maxsize=32)(_bounds)


@lru_cache(maxsize=32)
def _backend(device: torch.device, setting: Backend, dtype: torch.dtype, channels: int) -> Chosen:
    try:
        return choose_backend(device, setting, dtype, channels)[0]
    except ValueError:  # chosen for training in bf16, say, and this is an evaluation in float32
        return "sdpa"


def _packed(q: Tensor, k: Tensor, v: Tensor, groups: Groups, backend: Backend) -> Tensor:
    """`attention`, in one call for all groups."""
    if backend == "xformers":
        from xformers.ops import memory_efficient_attention

        mask = _block_diagonal(groups, q.device)
        return memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask)[0].flatten(1)
    from torch.nn.attention.varlen import varlen_attn

    compiling = torch.compiler.is_compiling()  # makes them once a graph, and cannot read a cache
    bounds = (_bounds if compiling else _cached_bounds)(groups, q.device)
    longest = max(length for _, length in groups)
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest)
    assert isinstance(out, Tensor)
    return out.flatten(1)


def attention(q: Tensor, k: Tensor, v: Tensor, groups: Groups, setting: Backend = "auto") -> Tensor:
    """softmax(q k^T / sqrt(d_h)) v for every head, within each sequence of a packed batch.

    Args:
        q, k, v: [T, heads, d_h], T = sum of batch * length over `groups`.
        groups: ((batch, length), ...) in the order of the tokens.
        setting: see `choose_backend`; tensors that a chosen backend does not take go to SDPA. Within torch.compile,
            where nothing can be tried, one that takes them.

    Returns:
        [T, heads * d_h], in the dtype of `v`.
    """
    backend = setting if torch.compiler.is_compiling() else _backend(q.device, setting, q.dtype, q.shape[2])
    if backend in PACKED:
        return _packed(q, k, v, groups, backend)
    sizes = [batch * length for batch, length in groups]
    outputs = []
    for (batch, length), *qkv in zip(groups, q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        heads_first = (x.unflatten(0, (batch, length)).transpose(1, 2) for x in qkv)  # [B, heads, L, d_h]
        outputs.append(F.scaled_dot_product_attention(*heads_first).transpose(1, 2).flatten(0, 1).flatten(1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def centered(v: Tensor, groups: Groups) -> Tensor:
    """v [T, heads, d_h] minus its mean over each sequence of a packed batch, [T, heads * d_h].

    Added to `attention`, it makes the map of every head I + softmax(q k^T / sqrt(d_h)) - 1 / length: where queries and
    keys are still near 0, the identity, but one whose softmax learns.
    """
    parts = []
    for (batch, length), part in zip(groups, v.flatten(1).split([b * n for b, n in groups]), strict=True):
        sequences = part.unflatten(0, (batch, length))
        parts.append((sequences - sequences.mean(1, keepdim=True)).flatten(0, 1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
