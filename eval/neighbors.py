"""Nearest neighbors by cosine similarity: faiss, on a GPU where it has one."""

from typing import Any

import numpy as np
import torch


def require_faiss() -> Any:
    """The module. Raises ValueError, saying what to install, where it is missing."""
    try:
        import faiss
    except ImportError:
        raise ValueError("this needs the package faiss: pip install faiss-cpu, or faiss-gpu") from None
    return faiss


def searches_on_gpu(device: torch.device) -> bool:
    """Whether the device is a GPU, and faiss was built for it."""
    return device.type == "cuda" and getattr(require_faiss(), "get_num_gpus", lambda: 0)() > 0


def nearest(
    bank: np.ndarray, queries: np.ndarray, k: int, device: torch.device | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k vectors of `bank` with the largest cosine similarity to each query, by exhaustive search.

    Args:
        bank: float [N, D], N >= k; vectors of length zero are at similarity 0 from all.
        queries: float [M, D].
        device: a GPU to search on, where faiss was built for it.

    Returns:
        Similarities float32 [M, k], descending, and rows of `bank` int64 [M, k].

    Raises:
        ValueError: faiss is missing.
    """
    faiss = require_faiss()
    bank, queries = unit(bank), unit(queries)
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
