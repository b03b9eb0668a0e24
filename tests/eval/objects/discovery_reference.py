"""LOST, TokenCut and MaskCut for one image, written from the papers: plain loops and dense SciPy, slow and obvious.

What the tests and `benchmarks/discovery.py` compare `eval/objects/localization.py` against. The two share no code.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np
import scipy.linalg

EPS = 1e-5
# Patches with the same edges have the same eigenvector entry, up to what rounding in LAPACK makes of it.
TIE = 1e-9


@dataclass
class Found:
    """Mask, box (x0, y0, x1, y1) in patches and seed of one object; the eigenvector and its eigengap where one is."""

    mask: np.ndarray
    box: tuple[int, int, int, int]
    seed: int
    vector: np.ndarray | None = None
    eigengap: float = np.inf


def component(foreground: np.ndarray, seed: int) -> np.ndarray:
    """Flood fill from the seed, to the left, the right, up and down."""
    h, w = foreground.shape
    mask = np.zeros((h, w), bool)
    queue = deque([divmod(seed, w)])
    while queue:
        y, x = queue.popleft()
        if 0 <= y < h and 0 <= x < w and foreground[y, x] and not mask[y, x]:
            mask[y, x] = True
            queue.extend([(y, x - 1), (y, x + 1), (y - 1, x), (y + 1, x)])
    return mask


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """(x0, y0, x1, y1), half-open."""
    patches = [(y, x) for y in range(mask.shape[0]) for x in range(mask.shape[1]) if mask[y, x]]
    ys, xs = [y for y, _ in patches], [x for _, x in patches]
    return min(xs), min(ys), max(xs) + 1, max(ys) + 1


def lost(features: np.ndarray, k: int = 100) -> Found:
    """LOST (arXiv 2109.14279, section 3) on features [h, w, D]."""
    h, w, _ = features.shape
    keys = features.reshape(h * w, -1).astype(np.float64)
    n = h * w
    degrees = []
    for p in range(n):
        degrees.append(sum(1 for q, product in enumerate(keys @ keys[p]) if q != p and product > 0))
    # Python's sort is stable: of equal degrees, the lower index comes first.
    order = sorted(range(n), key=lambda p: degrees[p])
    seed = order[0]
    total = np.zeros(n)
    for p in order[:k]:
        if keys[p] @ keys[seed] > 0:
            total += keys @ keys[p]
    mask = component((total > 0).reshape(h, w), seed)
    return Found(mask, box_of(mask), seed)


def second_eigenvector(features: np.ndarray, tau: float) -> tuple[np.ndarray, float]:
    """The dense generalized eigenproblem (D - W) x = lambda D x: second smallest eigenvector [N] and the eigengap."""
    keys = features.reshape(-1, features.shape[-1]).astype(np.float64)
    norms = np.sqrt((keys**2).sum(1, keepdims=True))
    keys = np.where(norms > 0, keys / np.where(norms > 0, norms, 1), 0)
    weights = np.where(keys @ keys.T > tau, 1.0, EPS)
    return dense_solve(weights)


def dense_solve(weights: np.ndarray) -> tuple[np.ndarray, float]:
    """As the authors' code calls SciPy."""
    degree = np.diag(weights.sum(1))
    last = min(2, len(weights) - 1)
    values, vectors = scipy.linalg.eigh(degree - weights, degree, subset_by_index=[1, last])
    return vectors[:, 0], float(values[1] - values[0]) if last == 2 else np.inf


def first_largest(values: np.ndarray) -> int:
    """Lowest index among the largest values, ties up to rounding."""
    largest = max(values)
    return next(i for i, value in enumerate(values) if value >= largest - TIE * max(abs(values)))


def tokencut(features: np.ndarray, tau: float = 0.2) -> Found:
    """TokenCut (arXiv 2202.11539, section 3) on features [h, w, D]."""
    x, eigengap = second_eigenvector(features, tau)
    return tokencut_of(x, eigengap, features.shape[:2])


def tokencut_of(x: np.ndarray, eigengap: float, shape: tuple[int, ...]) -> Found:
    """What follows the eigenvector in `tokencut`."""
    seed = first_largest(abs(x))
    margin = TIE * max(abs(x))
    foreground = x > x.mean() + margin if x[seed] > x.mean() else x < x.mean() - margin
    mask = component(foreground.reshape(shape), seed)
    return Found(mask, box_of(mask), seed, x.reshape(shape), eigengap)


def maskcut(features: np.ndarray, n: int = 3, tau: float = 0.15) -> tuple[list[Found], float]:
    """MaskCut (CutLER, arXiv 2301.11320, section 3.2) on features [h, w, D]; every round solves its problem anew.

    Returns the objects, and the smallest eigengap of all rounds, those that found nothing included.
    """
    h, w, _ = features.shape
    features = features.astype(np.float64).copy()
    returned: list[Found] = []
    earlier: list[np.ndarray] = []
    previous = np.zeros((h, w), bool)
    smallest = np.inf
    for step in range(n):
        if not features.any():  # nothing is left to cut
            break
        x, eigengap = second_eigenvector(features, tau)
        smallest = min(smallest, eigengap)
        if x[first_largest(abs(x))] < 0:  # the sign is LAPACK's whim
            x = -x
        foreground = (x > x.mean() + TIE * max(abs(x))).reshape(h, w)
        corners = [foreground[y, x_] for y in (0, h - 1) for x_ in (0, w - 1)]
        if sum(corners) >= 3:
            x, foreground = -x, ~foreground
        seed = first_largest(x)
        mask = component(foreground, seed)
        if step > 0:
            union = (mask | previous).sum()
            if (mask & previous).sum() / union > 0.5 or mask.sum() / mask.size <= 0.01:
                previous = np.zeros((h, w), bool)
                earlier.append(previous)
                continue
        shown = mask.copy()
        for other in earlier:
            shown &= ~other
        earlier.append(mask)
        previous = mask
        features[mask] = 0
        if shown.any():
            returned.append(Found(shown, box_of(shown), seed, x.reshape(h, w), eigengap))
    return returned, smallest
