"""Attention over a packed sequence: crops of several sizes in one call, each seeing only itself.

A batch of crops is one long sequence of tokens. `groups` says how it is put together: `((batch, length), ...)`, one
entry for each crop size, in the order in which the tokens lie. On CUDA, xformers computes all groups in a single
kernel with a block-diagonal mask; elsewhere torch's scaled dot-product attention runs once per group. Both give the
same numbers.
"""

import importlib.util
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Groups = tuple[tuple[int, int], ...]
Backend = Literal["auto", "xformers", "sdpa"]


def choose_backend(device: torch.device | str, setting: Backend = "auto") -> tuple[Literal["xformers", "sdpa"], str]:
    """The backend that runs on `device`, and a sentence that says why.

    Raises:
        ValueError: `setting` is "xformers" where xformers cannot run.

    Examples:
        >>> choose_backend("cpu")[0]
        'sdpa'
    """
    if setting not in ("auto", "xformers", "sdpa"):
        raise ValueError(f"attention is {setting!r}; choose auto, xformers or sdpa")
    if setting == "sdpa":
        return "sdpa", "torch SDPA, one call per crop size: chosen by the settings"
    # xformers is not even imported without CUDA: it has no CPU kernel and would only print warnings.
    if torch.device(device).type != "cuda":
        missing = "xformers runs on CUDA only"
    elif importlib.util.find_spec("xformers") is None:
        missing = "xformers is not installed (pip install 'skipless[gpu]')"
    else:
        return "xformers", "xformers, one call for all crop sizes"
    if setting == "xformers":
        raise ValueError(f"attention is 'xformers' on device {str(device)!r}, but {missing}; use auto or sdpa")
    return "sdpa", f"torch SDPA, one call per crop size: {missing}"


@lru_cache(maxsize=32)
def _block_diagonal(groups: Groups, device: torch.device) -> Any:
    from xformers.ops import fmha

    lengths = [length for batch, length in groups for _ in range(batch)]
    with torch.inference_mode(False):  # the cached mask may serve training next
        return fmha.BlockDiagonalMask.from_seqlens(lengths, device=device)


def attention(q: Tensor, k: Tensor, v: Tensor, groups: Groups, backend: Literal["xformers", "sdpa"]) -> Tensor:
    """softmax(q k^T / sqrt(d_h)) v for every head, within each sequence of a packed batch.

    Args:
        q, k, v: [T, heads, d_h], T = sum of batch * length over `groups`.
        groups: ((batch, length), ...) in the order of the tokens.
        backend: what `choose_backend` returned for the tensors' device.

    Returns:
        [T, heads * d_h], in the dtype of `v`.
    """
    if backend == "xformers":
        from xformers.ops import memory_efficient_attention

        mask = _block_diagonal(groups, q.device)
        return memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask)[0].flatten(1)
    sizes = [batch * length for batch, length in groups]
    outputs = []
    for (batch, length), *qkv in zip(groups, q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        heads_first = (x.unflatten(0, (batch, length)).transpose(1, 2) for x in qkv)  # [B, heads, L, d_h]
        outputs.append(F.scaled_dot_product_attention(*heads_first).transpose(1, 2).flatten(0, 1).flatten(1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
