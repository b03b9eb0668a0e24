"""Nearest neighbors by cosine similarity: faiss, on a GPU where it was built for one; torch where it does not load."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def find_faiss() -> Any | None:
    """The module; None where it is missing or does not load."""
    try:
        import faiss
    except (ImportError, RuntimeError):  # the latter from faiss-gpu, without its CUDA libraries
        return None
    return faiss


def require_faiss() -> Any:
    """The module. Raises ValueError, saying what to install, where it does not load."""
    if (faiss := find_faiss()) is None:
        raise ValueError("this needs the package faiss: pip install faiss-cpu, or faiss-gpu")
    return faiss


def searches_on_gpu(device: torch.device) -> bool:
    """Whether it is a GPU and searched on: by a faiss that was built for it, or by torch where faiss does not load."""
    faiss = find_faiss()
    return device.type == "cuda" and (faiss is None or getattr(faiss, "get_num_gpus", lambda: 0)() > 0)


def torch_search(bank: Tensor, queries: np.ndarray, k: int, largest: int = 2**26) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of `bank` with the largest inner product with each query, without faiss, where `bank` lies.

    Args:
        bank: float32 [N, D], N >= k; queries: float32 [M, D].
        largest: number of inner products that are held at once.

    Returns:
        Inner products float32 [M, k], descending, and rows int64 [M, k].
    """
    parts = torch.from_numpy(queries).split(max(1, largest // len(bank)))
    found = [(part.to(bank.device) @ bank.T).topk(k) for part in parts]
    return (
        torch.cat([each.values.cpu() for each in found]).numpy(),
        torch.cat([each.indices.cpu() for each in found]).numpy(),
    )


def nearest(
    bank: np.ndarray, queries: np.ndarray, k: int, device: torch.device | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k vectors of `bank` with the largest cosine similarity to each query, by exhaustive search.

    Args:
        bank: float [N, D], N >= k; vectors of length zero are at similarity 0 from all.
        queries: float [M, D].
        device: a GPU to search on, see `searches_on_gpu`.

    Returns:
        Similarities float32 [M, k], descending, and rows of `bank` int64 [M, k].
    """
    bank, queries = unit(bank), unit(queries)
    if (faiss := find_faiss()) is None:
        return torch_search(torch.from_numpy(bank).to(device or "cpu"), queries, k)
    index = faiss.IndexFlatIP(bank.shape[1])
    if device is not None and searches_on_gpu(device):
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), device.index or 0, index)
    index.add(bank)
    return index.search(queries, k)


def knn_predict(
    similarities: np.ndarray, neighbor_labels: np.ndarray, classes: int, temperature: float = 0.07
) -> np.ndarray:
    """Classes by DINO's weighted vote.

    Args:
        similarities: float [M, k], cosines in [-1, 1].
        neighbor_labels: integers [M, k] in 0..classes - 1.

    Returns:
        int64 [M]. Ties go to the lower class.

    Examples:
        >>> knn_predict(np.array([[0.9, 0.86, 0.85]]), np.array([[1, 0, 0]]), classes=2)
        array([0])
    """
    # Weights relative to the nearest: the same vote, and exp cannot overflow.
    weights = np.exp((similarities - similarities.max(1, keepdims=True)) / temperature)
    votes = np.zeros((len(similarities), classes))
    np.add.at(votes, (np.arange(len(similarities))[:, None], neighbor_labels), weights)
    return votes.argmax(1)


def unit(x: np.ndarray) -> np.ndarray:
    """Vectors [N, D] at length 1, float32 and contiguous; those of length zero stay."""
    x = np.ascontiguousarray(x, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
