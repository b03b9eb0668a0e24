"""LOST, TokenCut and MaskCut: patch features in, masks and boxes out.

    features = model.features(images, kind="keys")[0].patches  # [B, h, w, D]
    localization = tokencut(features)[0]
    localization.mask, box_in_pixels(localization.box, patch=16, height=375, width=500)

Each takes features of images of one size, on any device, and never reads a file. Everything that decides is float64:
similarities, eigenvectors, sums. An edge, a mask or a box then does not depend on the device, on the number of threads
or on the other images of a batch, unless a similarity equals its threshold to 15 digits.

The graphs of TokenCut and MaskCut have two weights, W = eps + (1 - eps) A with A of zeros and ones. A overwrites the
similarities, one N x N matrix an image, and W is never made: W v = eps sum(v) + (1 - eps) A v.

Where the algorithms leave the outcome open, it is the following, always:
- Ties go to the lowest patch index (rows first).
- The sign of an eigenvector is chosen so that its entry of largest magnitude is positive. Entries that differ by less
  than 1e-9 of that magnitude count as equal: patches with the same edges have the same entry up to rounding, and
  rounding depends on the solver. An entry equal to the mean is background.
- A graph in which every pair has the same weight (a single-color image, all features zero, a grid of one patch) has no
  second eigenvector, and a patch without features is no seed for LOST. The object is then the whole image, and the
  result says `degenerate`.
- Where the second eigenvalue is a multiple one (`eigengap` about 0: three blobs of the same size, say), any vector of
  its space is a valid answer. What comes out is one of them: reproducible on one machine, but not meaningful.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import scipy.linalg
import scipy.ndimage
import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5
"""Weight of the pairs that are not similar (TokenCut, section 3.2)."""
TIE = 1e-9
"""Entries of an eigenvector are equal when they differ by less than this share of the largest magnitude."""

# Up to this many patches LAPACK is faster than an iteration, and a Krylov space would soon fill the whole space.
_SMALL = 200
_MAX_STEPS = 100
# The iteration stops when residual / eigengap, the error of the vector, is below the first, or the residual below the
# second, where rounding begins. Real images take about ten steps.
_CONVERGED = 1e-10
_ROUNDING = 1e-14
_ACCEPTED = 1e-10

Box = tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class Localization:
    """One object found in an image of h x w patches, and how far the graph it was found in can be trusted."""

    mask: np.ndarray = field(repr=False)
    """bool [h, w]: the patches of the object."""
    box: Box
    """(x0, y0, x1, y1) of `mask`, in patches, half-open."""
    seed: int
    """The patch the object was grown from, row * w + column."""
    map: np.ndarray = field(repr=False)
    """float64 [h, w], for pictures. LOST: the degree of each patch, without itself. TokenCut and MaskCut: the second
    eigenvector, scaled to magnitude 1 at most, positive at the seed; zeros where the graph has none."""
    edges: float
    """Share of the pairs of patches that are similar, 0 to 1 (1 for a single patch). Near 1 nearly all patches look
    alike to the graph: often the sign of a trained key bias, which is to be subtracted from the keys."""
    degenerate: bool
    """Whether there was nothing to find, and `mask` is the whole image for that reason; see the top of this file."""
    eigengap: float | None = None
    """Third less second smallest eigenvalue, good to some digits (the third need not have converged), infinite for two
    patches; None for LOST and for degenerate graphs."""
    residual: float | None = None
    """Norm of N x - theta x for the unit vector x, N = D^-1/2 W D^-1/2; None for LOST and for degenerate graphs.
    `residual / eigengap` bounds the sine of the angle to the exact eigenvector."""
    fallback: bool = False
    """Whether the iteration left a residual above 1e-10, and the eigenvector is that of a dense solver."""


def box_in_pixels(box: Box, patch: int, height: int, width: int) -> Box:
    """A box of patches in pixels of the unpadded image.

    Args:
        box: (x0, y0, x1, y1) in patches, half-open.
        patch: side of a patch in pixels.
        height, width: size of the image before padding, at most `patch` - 1 pixels to the right and to the bottom.

    Returns:
        (x0, y0, x1, y1) in pixels, half-open, clamped to the image.
    """
    x0, y0, x1, y1 = box
    return x0 * patch, y0 * patch, min(x1 * patch, width), min(y1 * patch, height)


@torch.no_grad()
def lost(features: Tensor, k: int = 100) -> list[Localization]:
    """LOST (arXiv 2109.14279, section 3): the patch with the fewest similar ones, and what resembles it.

    Two patches are similar when the dot product of their features is positive. The seed is the patch of lowest degree.
    Of the `k` patches of lowest degree those similar to the seed are summed, and the object is the 4-connected set of
    patches around the seed whose dot product with this sum is positive.

    Args:
        features: [B, h, w, D], any floating dtype; the paper takes the keys of the last block. Not normalized.
        k: number of patches of lowest degree that may extend the seed, at least 1; 100 in the paper.

    Returns:
        One `Localization` for each image.

    Raises:
        ValueError: features of another shape or not finite, or `k` below 1.
    """
    if k < 1:
        raise ValueError(f"k is {k}: choose 1 or more patches of lowest degree.")
    objects = []
    for grids in _groups(features):
        b, h, w, _ = grids.shape
        keys = grids.flatten(1, 2)
        similar = similarity_graph(keys, 0.0)
        itself = similar.diagonal(dim1=1, dim2=2)
        degrees = (similar.sum(-1) - itself).cpu().numpy()
        for i in range(b):
            order = np.argsort(degrees[i], kind="stable")
            seed = int(order[0])
            lowest = torch.from_numpy(order[:k].copy()).to(keys.device)
            chosen = lowest[similar[i, seed, lowest] > 0]
            foreground = (keys[i] @ keys[i, chosen].sum(0) > 0).cpu().numpy().reshape(h, w)
            empty = not bool(itself[i, seed])
            mask = np.ones((h, w), bool) if empty else component(foreground, seed)
            objects.append(
                Localization(
                    mask, bounding_box(mask), seed, degrees[i].reshape(h, w), _share(degrees[i]), degenerate=empty
                )
            )
    return objects


@torch.no_grad()
def tokencut(features: Tensor, tau: float = 0.2) -> list[Localization]:
    """TokenCut (arXiv 2202.11539, section 3): a normalized cut of the graph of similar patches.

    Patches whose cosine exceeds `tau` are tied with weight 1, all others with 1e-5. The second smallest eigenvector of
    (D - W) x = lambda D x is split at its mean. The seed is the patch of largest magnitude, its side the foreground,
    and the object the 4-connected part of it that holds the seed.

    Args:
        features: [B, h, w, D], any floating dtype; the paper takes the keys of the last block.
        tau: threshold of the cosine, -1 to 1; 0.2 in the paper.

    Returns:
        One `Localization` for each image.

    Raises:
        ValueError: features of another shape or not finite, or `tau` outside of [-1, 1].
    """
    _check_tau(tau)
    objects = []
    for grids in _groups(features):
        shape = grids.shape[1:3]
        for cut in _cut(grids.flatten(1, 2), tau):
            if cut.degenerate:
                objects.append(_whole(cut, shape))
                continue
            mask = component(cut.foreground.reshape(shape), cut.seed)
            objects.append(_localization(mask, cut.seed, cut.vector, cut))
    return objects


@torch.no_grad()
def maskcut(features: Tensor, n: int = 3, tau: float = 0.15) -> list[list[Localization]]:
    """MaskCut (CutLER, arXiv 2301.11320, section 3.2): several objects by repeated normalized cuts.

    A round is a cut as in `tokencut`, with one more rule: a foreground that holds three or four corners of the image is
    swapped for the other side, the sign of the eigenvector with it, and the seed is then its largest entry. The patches
    of the object lose their features for the rounds that follow; they stay in the graph, similar to nothing, not even
    to themselves.
    From the second round on, an object is rejected when it covers at most 1 % of the image or when its IoU with that of
    the round before exceeds 0.5. As in the release, a rejected round leaves nothing behind: the next one sees the same
    graph, finds the same object, and accepts it unless it is too small.

    In the release, what the corners do depends on the sign that the eigenvector happens to have. Here the seed's side
    is the one whose corners count. The release also refines masks with a CRF, which is not part of this.

    Args:
        features: [B, h, w, D], any floating dtype; the paper takes the keys of the last block, 480 x 480 pixels.
        n: number of rounds, at least 1; 3 in the paper.
        tau: threshold of the cosine, -1 to 1; 0.15 in the paper.

    Returns:
        For each image the objects in the order of their rounds, at most `n`. A mask does not cover those before it, and
        may fall into parts; a round whose object is rejected or covered entirely adds none. The first is always there.

    Raises:
        ValueError: features of another shape or not finite, `n` below 1, or `tau` outside of [-1, 1].
    """
    if n < 1:
        raise ValueError(f"n is {n}: choose 1 or more rounds.")
    _check_tau(tau)
    objects = []
    for grids in _groups(features):
        shape = grids.shape[1:3]
        keys = grids.flatten(1, 2).clone()
        results: list[list[Localization]] = [[] for _ in keys]
        covered = np.zeros((len(keys), *shape), bool)
        previous = np.zeros_like(covered)
        cuts: list[_Cut] = []
        changed = list(range(len(keys)))
        for step in range(n):
            solved = _cut(keys[changed], tau) if changed else []
            cuts = solved if step == 0 else _replaced(cuts, changed, solved)
            changed = []
            for i, cut in enumerate(cuts):
                if cut.degenerate:
                    results[i] += [_whole(cut, shape)] if step == 0 else []
                    previous[i] = False
                    continue
                foreground, vector, seed = cut.foreground.reshape(shape), cut.vector, cut.seed
                if foreground[[0, 0, -1, -1], [0, -1, 0, -1]].sum() >= 3:
                    foreground, vector = ~foreground, -vector
                    seed = _first(vector >= vector.max() - TIE)
                mask = component(foreground, seed)
                if step > 0 and (mask.sum() <= 0.01 * mask.size or _iou(mask, previous[i]) > 0.5):
                    previous[i] = False
                    continue
                previous[i] = mask
                visible = mask & ~covered[i]
                if visible.any():
                    results[i].append(_localization(visible, seed, vector, cut))
                covered[i] |= mask
                keys[i, torch.from_numpy(mask.ravel()).to(keys.device)] = 0
                changed.append(i)
        objects += results
    return objects


@dataclass(frozen=True, eq=False)
class _Cut:
    """A graph of N patches, cut in two."""

    vector: np.ndarray  # float64 [N], largest magnitude 1, attained with a positive sign
    seed: int
    foreground: np.ndarray  # bool [N], the seed's side
    edges: float
    degenerate: bool = False
    eigengap: float | None = None
    residual: float | None = None
    fallback: bool = False


def _cut(keys: Tensor, tau: float) -> list[_Cut]:
    """Normalized cuts of the graphs of keys, float64 [B, N, D]."""
    n = keys.shape[1]
    similar = similarity_graph(F.normalize(keys, dim=-1), tau)
    rows = similar.sum(-1)
    shares = [_share(degrees) for degrees in (rows - similar.diagonal(dim1=1, dim2=2)).cpu().numpy()]
    cuts = [_Cut(np.zeros(n), 0, np.ones(n, bool), share, degenerate=True) for share in shares]
    proper = [0 < total < n * n for total in rows.sum(1).tolist()]
    if not any(proper):
        return cuts
    for i, (x, eigengap, residual, fallback) in enumerate(second_eigenvectors(similar)):
        if not proper[i]:
            continue
        x = x / np.abs(x).max()
        seed = _first(np.abs(x) >= 1 - TIE)
        x = x if x[seed] > 0 else -x
        cuts[i] = _Cut(x, seed, x > x.mean() + TIE, shares[i], False, eigengap, residual, fallback)
    return cuts


def second_eigenvectors(similar: Tensor) -> list[tuple[np.ndarray, float, float, bool]]:
    """Second smallest eigenvectors of (D - W) x = lambda D x for W = 1e-5 + (1 - 1e-5) A, D = diag(W 1).

    Block Lanczos on N = D^-1/2 W D^-1/2, whose second largest eigenvalue is 1 - lambda. The largest, 1, belongs to
    D^1/2 1, which stays the first vector of the basis. Blocks of two cost hardly more than single vectors, as A is read
    once for both, and tell a double eigenvalue from a simple one. Every block is orthogonalized against all others,
    twice. An image whose residual stays above 1e-10 is solved by LAPACK, and so are graphs of up to 200 patches.

    Args:
        similar: A, float64 [B, N, N] of zeros and ones, symmetric, N >= 2. Overwritten where a dense solver is used.
            What comes out for a matrix of only zeros or only ones has no meaning.

    Returns:
        For each image x, float64 [N] of any sign and scale; the eigengap and the residual, see `Localization`; and
        whether the dense solver had to step in for the iteration.
    """
    b, n, _ = similar.shape
    degree = EPS * n + (1 - EPS) * similar.sum(-1, keepdim=True)
    scale = degree.rsqrt()
    trivial = degree.sqrt() / degree.sum(1, keepdim=True).sqrt()

    def multiply(v: Tensor) -> Tensor:
        """N v, of columns [B, N, C]."""
        v = (scale * v).contiguous()  # BLAS reads A a fifth faster
        return scale * (EPS * v.sum(1, keepdim=True) + (1 - EPS) * (similar @ v))

    if n <= _SMALL:
        dense = [True] * b
        vectors, gaps, residuals = torch.zeros_like(trivial), [0.0] * b, [0.0] * b
    else:
        vectors, gaps = _lanczos(multiply, trivial)
        products = multiply(vectors)
        theta = (vectors * products).sum(1, keepdim=True)
        residuals = (products - theta * vectors).norm(dim=1)[:, 0].tolist()
        # One multiplication more makes the entries of patches with the same edges equal up to rounding.
        vectors = products
        dense = [not residual <= _ACCEPTED for residual in residuals]
    solved = []
    for i, x in enumerate((scale * vectors)[..., 0].cpu().numpy()):
        if dense[i]:
            y, gaps[i], residuals[i] = _dense(similar[i], scale[i], trivial[i])
            x = scale[i, :, 0].cpu().numpy() * y
        solved.append((x, gaps[i], residuals[i], dense[i] and n > _SMALL))
    return solved


def _lanczos(multiply: Callable[[Tensor], Tensor], trivial: Tensor) -> tuple[Tensor, list[float]]:
    """Leading eigenvector, beside `trivial`, of the symmetric `multiply`.

    Args:
        multiply: takes and returns columns, float64 [B, N, C].
        trivial: float64 [B, N, 1], the unit eigenvectors that are known.

    Returns:
        Unit vectors [B, N, 1], and for each image the gap between the first and the second eigenvalue found.
    """
    b, n, _ = trivial.shape
    steps = min(_MAX_STEPS, n // 2 - 2)
    basis = trivial.new_empty(b, 2 * steps + 3, n)
    basis[:, 0] = trivial[..., 0]
    projected = trivial.new_zeros(b, 2 * steps + 2, 2 * steps + 2)
    # The same on every device and for every image; moved on by a patch a step, it is as good as new noise.
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(trivial.device)

    # The first column is a good guess: objects resemble fewer patches than the background. The second has a share of
    # every eigenvector, which the first may lack.
    start = torch.cat([trivial.square(), noise[:, 1:].expand(b, n, 1)], -1)
    block, _, _ = _orthonormal(start - start.mean(1, keepdim=True), basis[:, :1], noise.roll(1, 0))
    basis[:, 1:3] = block.mT
    for step in range(steps):
        m = 2 * step + 2
        block, overlap, remainder = _orthonormal(multiply(block), basis[:, : m + 1], noise.roll(step + 2, 0))
        basis[:, m + 1 : m + 3] = block.mT
        projected[:, m - 2 : m, m - 2 : m] = overlap[:, -2:]
        projected[:, m : m + 2, m - 2 : m] = remainder
        # Looking at the result makes a GPU wait: there only every other step.
        if (step >= 5 and (step % 2 == 1 or trivial.device.type == "cpu")) or step == steps - 1:
            lower = projected[:, : m + 2, :m].cpu()
            values, coefficients = torch.linalg.eigh(lower[:, :m])  # reads the lower triangle only
            gaps = values[:, -1] - values[:, -2]
            residuals = (lower[:, m:, m - 2 :] @ coefficients[:, m - 2 :, -1:]).norm(dim=(1, 2))
            if (residuals <= (_CONVERGED * gaps).clamp_min(_ROUNDING)).all():
                break
    vectors = basis[:, 1 : m + 1].mT @ coefficients[..., -1:].to(trivial.device)
    return vectors / vectors.norm(dim=1, keepdim=True), gaps.tolist()


def _orthonormal(block: Tensor, basis: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Two columns [B, N, 2] made orthonormal, to each other and to the rows of `basis` [B, m, N].

    Returns:
        The columns Q, C [B, m, 2] and R [B, 2, 2], upper triangular, such that block = basis^T C + Q R. For a column in
        the span of what comes before it, R has zeros (up to 1e-14) and Q a new direction, which comes from `noise`.
    """
    overlap = basis @ block
    # What rounding leaves of a column in the span can lie in the span itself, however often that is subtracted. Noise
    # just above rounding does not.
    q, r = _qr(block - basis.mT @ overlap + 1e-16 * noise)
    q, again = _qr(q - basis.mT @ (basis @ q))
    return q, overlap, again @ r


def _qr(block: Tensor) -> tuple[Tensor, Tensor]:
    """Q and R of columns [B, N, 2] by Householder reflections. torch.linalg.qr would spend most of its time on the rows
    of R that are zero."""
    reflections, factors = torch.geqrf(block)
    return torch.linalg.householder_product(reflections, factors), reflections[:, :2].triu()


def _dense(similar: Tensor, scale: Tensor, trivial: Tensor) -> tuple[np.ndarray, float, float]:
    """As the iteration, by LAPACK: eigenvector of D^-1/2 W D^-1/2, gap and residual. Overwrites `similar`."""
    n = len(similar)
    similar.mul_(1 - EPS).add_(EPS).mul_(scale).mul_(scale.T)
    # The known eigenvector moves from the top to 0; all that count lie above.
    matrix = similar.addr_(trivial[:, 0], trivial[:, 0], alpha=-1).cpu().numpy()
    # LAPACK works in place on one triangle (and the diagonal) of the transpose, which is the same matrix; what is left
    # of it, the other triangle, gives the residual.
    diagonal = matrix.diagonal().copy()
    values, vectors = scipy.linalg.eigh(matrix.T, lower=True, subset_by_index=[n - 2, n - 1], overwrite_a=True)
    y = vectors[:, 1]
    np.fill_diagonal(matrix, diagonal)
    residual = np.linalg.norm(scipy.linalg.blas.dsymv(1.0, matrix.T, y, lower=0) - values[1] * y)
    return y, float(values[1] - values[0]) if n > 2 else math.inf, float(residual)


def _groups(features: Tensor) -> list[Tensor]:
    """Checked features, detached and in float64, in groups that are worked on at once."""
    if features.ndim != 4 or not features.is_floating_point() or 0 in features.shape[1:]:
        raise ValueError(
            f"features are {features.dtype} of shape {list(features.shape)}: give floating-point patch features "
            "[B, h, w, D] with at least one patch."
        )
    finite = features.isfinite().flatten(1).all(1).tolist()
    if not all(finite):
        raise ValueError(
            f"features of image {finite.index(False)} of the batch hold NaN or infinite values: "
            "check the image and the checkpoint, or extract them in float32."
        )
    if features.device.type == "mps":  # has no float64
        features = features.cpu()
    # A CPU gains nothing from several images at once, and would lose what its caches hold of one graph.
    size = 1 if features.device.type == "cpu" else max(1, len(features))
    return [group.detach().double() for group in features.split(size)] if len(features) else []


def _check_tau(tau: float) -> None:
    if not -1 <= tau <= 1:
        raise ValueError(f"tau is {tau}: choose a cosine between -1 and 1.")


def similarity_graph(keys: Tensor, threshold: float) -> Tensor:
    """1.0 where the dot product of two keys [B, N, D] exceeds the threshold, else 0.0: float64 [B, N, N]."""
    return torch.bmm(keys, keys.mT).gt_(threshold)


def _share(degrees: np.ndarray) -> float:
    """Edges over pairs, from the degrees [N] without the diagonal."""
    n = len(degrees)
    return float(degrees.sum() / (n * (n - 1))) if n > 1 else 1.0


def _first(flags: np.ndarray) -> int:
    return int(np.argmax(flags))


def component(foreground: np.ndarray, seed: int) -> np.ndarray:
    """The 4-connected part of `foreground`, bool [h, w], that holds the patch `seed`."""
    labels, _ = scipy.ndimage.label(foreground)
    return labels == labels.flat[seed]


def bounding_box(mask: np.ndarray) -> Box:
    """The box around the set patches of a mask, bool [h, w]; ends are exclusive."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def _localization(mask: np.ndarray, seed: int, vector: np.ndarray, cut: _Cut) -> Localization:
    grid = vector.reshape(mask.shape)
    return Localization(
        mask, bounding_box(mask), seed, grid, cut.edges, cut.degenerate, cut.eigengap, cut.residual, cut.fallback
    )


def _whole(cut: _Cut, shape: tuple[int, ...]) -> Localization:
    return _localization(np.ones(shape, bool), 0, cut.vector, cut)


def _replaced(cuts: list[_Cut], changed: list[int], solved: list[_Cut]) -> list[_Cut]:
    new = dict(zip(changed, solved, strict=True))
    return [new.get(i, cut) for i, cut in enumerate(cuts)]
