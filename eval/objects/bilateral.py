"""A mask whose borders follow those of its image: the bilateral solver.

Source: Barron and Poole, "The Fast Bilateral Solver" (arXiv 1511.03296), in the form and with the settings in which
TokenCut (arXiv 2202.11539) refines its masks for saliency.
"""

import numpy as np
from scipy.sparse import csr_matrix, diags, identity
from scipy.sparse.linalg import cg

SPATIAL, LUMA, CHROMA = 16, 16, 8  # width of a cell of the grid, in pixels and in gray levels
SMOOTHNESS = 256.0
CONFIDENCE = 0.999
YUV = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])


def bilateral_solver(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The mask as shades, float64 [H, W]: smooth where the image is, near the mask elsewhere; about 0..1.

    Args:
        image: uint8 [H, W, 3], RGB.
        mask: bool [H, W].
    """
    y, x = np.indices(mask.shape)
    luma, u, v = np.moveaxis(image @ YUV.T, -1, 0)
    axes = (x / SPATIAL, y / SPATIAL, luma / LUMA, (u + 128) / CHROMA, (v + 128) / CHROMA)
    cells = np.stack([axis.astype(np.int64).ravel() for axis in axes])  # [5, pixels]
    sides = cells.max(1) + 3  # with a cell of room on both sides, so that neighbors' numbers mean nothing else
    numbers, cell_of = np.unique(np.ravel_multi_index(tuple(cells + 1), tuple(sides)), return_inverse=True)
    blur = blur_of(numbers, sides)
    pixels = np.bincount(cell_of).astype(float)
    scale = np.ones(len(numbers))
    for _ in range(10):  # until rows and columns of the blur add up to the pixels of a cell, nearly
        scale = np.sqrt(scale * pixels / (blur @ scale))
    sums = scale * (blur @ scale)
    smooth = diags(sums) - diags(scale) @ blur @ diags(scale)
    system = SMOOTHNESS * smooth + diags(CONFIDENCE * pixels)
    wanted = CONFIDENCE * np.bincount(cell_of, weights=mask.ravel())
    solved, _ = cg(
        system, wanted, x0=wanted / (CONFIDENCE * pixels), rtol=1e-5, maxiter=25,
        M=diags(1 / np.maximum(system.diagonal(), 1e-5)),
    )  # fmt: skip
    return np.asarray(solved[cell_of].reshape(mask.shape))


def blur_of(numbers: np.ndarray, sides: np.ndarray) -> csr_matrix:
    """The blur by 1, 2, 1 along each axis, over the cells of these (sorted) numbers in a grid of these sides."""
    count = len(numbers)
    blur = 2.0 * len(sides) * identity(count, format="csr")
    for stride in np.cumprod([1, *sides[:0:-1]]):
        places = np.searchsorted(numbers, numbers + stride).clip(max=count - 1)
        own = np.flatnonzero(numbers[places] == numbers + stride)
        ahead = csr_matrix((np.ones(len(own)), (own, places[own])), (count, count))
        blur = blur + ahead + ahead.T
    return blur
