"""Singular values of the Jacobians of a block's attention and MLP: exact where they are small, estimated where not.

Jacobians are those of arXiv 2510.00345, section 3: of a block's attention and of its MLP, each with respect to its
*normalized* input, the output of the LayerNorm in front of it. With respect to the input of that LayerNorm each would
be singular whatever the weights, for a LayerNorm forgets the mean and the scale of every token. Layer scale belongs to
the branch, where a model has it. K + I, "with its skip", adds the identity to such a Jacobian, as the paper does.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from skipless.ssl.model.statistics import PRECISION, branch_inputs, scaled_output
from skipless.ssl.model.vit import Block, Mlp, VisionTransformer

# What counts as a small singular value, as a part of the largest.
SMALL = 0.01
# A smallest singular value is called known if one lies within this part of it, and a bound if not.
TOLERANCE = 0.05
# Jacobians of at most so many rows are computed whole, and decomposed, or at least factorized.
DECOMPOSED, FACTORIZED = 1536, 8192


@torch.no_grad()
def jacobian_conditioning(
    model: VisionTransformer,
    images: Tensor,
    mlp_tokens: int = 16,
    steps: int = 160,
    seed: int = 0,
    done: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """The ends of the spectrum of every block's two Jacobians, in float64.

    Args:
        images: normalized, [B, 3, H, W]. One or a few: every one takes a ViT-S of 224 pixels minutes.
        mlp_tokens: so many tokens, drawn from all images, stand for all in the Jacobian of the MLP.
        steps: see `attention_singular_values`.
        seed: of the draws.
        done: called after each block.

    Returns:
        One number a block for each of
        "attention_smallest", "attention_largest", "attention_condition": geometric mean over the images;
        "attention_small_share": mean over the images;
        "attention_smallest_error", "attention_largest_error", "attention_share_error": the largest of the images', see
        `SingularValues`; where the first exceeds `TOLERANCE`, the condition number is a lower bound;
        the same with "mlp" for "attention", over the tokens drawn; and, for residual models, the same with
        "attention_skip" and "mlp_skip", of K + I. The model itself is left as it is.
    """
    model = copy.deepcopy(model).double().eval()
    model.attention = "sdpa"  # xformers has no float64
    generator = torch.Generator().manual_seed(seed)
    measures: dict[str, list[float]] = {}
    for block, tokens, _ in model.walk(model.embed(images.double())):
        attention_inputs, mlp_inputs = branch_inputs(block, tokens)
        pooled = mlp_inputs.flatten(0, 1)
        drawn = pooled[torch.randperm(len(pooled), generator=generator)[:mlp_tokens].to(pooled.device)]
        for suffix, skip in (("", False), ("_skip", True)) if block.residual else (("", False),):
            attention = [attention_singular_values(block, image, skip, steps, seed) for image in attention_inputs]
            for name, several in (("attention", attention), ("mlp", [mlp_singular_values(block, drawn, skip)])):
                for key, value in _summary(several).items():
                    measures.setdefault(f"{name}{suffix}_{key}", []).append(value)
        done()
    return measures


@dataclass(frozen=True)
class SingularValues:
    """The ends of a Jacobian's spectrum, and how much of it is small."""

    smallest: float
    """Never less than the true one but for rounding: an upper bound in every case, and see `smallest_error`."""
    largest: float
    small_share: float
    """Share of the singular values below `SMALL` times the largest, in [0, 1]."""
    smallest_error: float = 0.0
    """A singular value lies within this part of `smallest`. That no other is smaller is not proven."""
    largest_error: float = 0.0
    """The true one exceeds `largest` by at most this part of it, with a probability of 99 %."""
    share_error: float = 0.0
    """Of `small_share`, absolute: bound of the quadrature's, plus two standard deviations of the random start's."""

    @property
    def condition(self) -> float:
        """Largest over smallest, at most 1 / `PRECISION`."""
        return self.largest / self.smallest if self.smallest > PRECISION * self.largest else 1 / PRECISION

    @property
    def bound(self) -> bool:
        """Whether `smallest` is no more than an upper bound, and `condition` a lower one."""
        return self.smallest_error > TOLERANCE


class AttentionJacobian:
    """The Jacobian of a block's attention, as products: of one image, with respect to the normalized tokens.

    Written out, so that a product costs four matrix products of the forward pass's size and nothing is computed twice.
    With A = softmax(S), dS = (dQ K^T + Q dK^T) / sqrt(d_h) and dA = A * (dS - rowsum(A * dS)), the derivative in the
    direction dX is, over all heads, (dA V + A dV) W_O.

    Args:
        tokens: normalized, [N, D]; computed with in float64.
        skip: add the identity: K + I in place of K.
    """

    def __init__(self, block: Block, tokens: Tensor, skip: bool = False):
        self.shape, self.skip, heads = tokens.shape, skip, block.attn.num_heads
        self.w_qkv = block.attn.qkv.weight.detach().double().T
        self.w_o = scaled_output(block.attn.proj.weight.detach(), block.ls1).T
        projected = tokens.double() @ self.w_qkv + block.attn.qkv.bias.detach().double()
        self.q, self.k, self.v = self.heads(projected, 3 * heads).unflatten(0, (3, heads)).contiguous()
        self.scale = self.q.shape[-1] ** -0.5
        self.maps = (self.q @ self.k.mT * self.scale).softmax(-1)
        n = len(tokens)
        fixed = torch.eye(n, dtype=torch.float64, device=tokens.device) - 1 / n if block.attn.shaped else 0.0
        self.mixing = self.maps + fixed  # what the values are multiplied with
        self._inverses: tuple[Tensor, Tensor, Tensor] | None = None

    def heads(self, x: Tensor, count: int) -> Tensor:
        """[..., N, count * d_h] -> [..., count, N, d_h]."""
        return x.unflatten(-1, (count, -1)).transpose(-3, -2)

    def product(self, x: Tensor) -> Tensor:
        """J x: the derivative in the direction x, [N * D], or in several, [..., N * D]."""
        h = len(self.q)
        projected = self.heads(x.unflatten(-1, self.shape) @ self.w_qkv, 3 * h)
        dq, dk, dv = projected.unflatten(-3, (3, h)).unbind(-4)
        change = self.maps * (dq @ self.k.mT + self.q @ dk.mT) * self.scale
        change -= self.maps * change.sum(-1, keepdim=True)
        y = ((change @ self.v + self.mixing @ dv).transpose(-3, -2).flatten(-2) @ self.w_o).flatten(-2)
        return y + x if self.skip else y

    def transposed(self, y: Tensor) -> Tensor:
        """J^T y, [N * D]: what backpropagation computes."""
        g = self.heads(y.view(self.shape) @ self.w_o.T, len(self.q))
        change = self.maps * (g @ self.v.mT)
        change = (change - self.maps * change.sum(-1, keepdim=True)) * self.scale
        x = torch.cat([change @ self.k, change.mT @ self.q, self.mixing.mT @ g])
        x = (x.transpose(0, 1).flatten(1) @ self.w_qkv.T).flatten()
        return x + y if self.skip else x

    def precondition(self, x: Tensor) -> Tensor:
        """(T^T T)^-1 x for T(X) = the part of the Jacobian that holds the attention maps fixed; x itself with the skip.

        T is `W_V`, then each head's map, then `W_O`, and so is inverted factor by factor. Where the maps are close to
        the identity, little else is in the Jacobian.
        """
        if self.skip:
            return x
        if self._inverses is None:
            maps = _pseudo_inverse(self.mixing)
            w_v = self.w_qkv[:, -self.shape[1] :]
            self._inverses = _pseudo_inverse(w_v), maps, _pseudo_inverse(self.w_o)
        w_v, maps, w_o = self._inverses
        g = maps.mT @ self.heads(x.view(self.shape) @ w_v.T, len(self.q))
        g = self.heads(g.transpose(0, 1).flatten(1) @ w_o.T @ w_o, len(self.q))
        return ((maps @ g).transpose(0, 1).flatten(1) @ w_v).flatten()

    def whole(self) -> Tensor:
        """The matrix itself, [N * D, N * D]: for small models."""
        columns = torch.eye(self.shape.numel(), dtype=torch.float64, device=self.maps.device)
        for first in range(0, len(columns), 32):
            columns[first : first + 32] = self.product(columns[first : first + 32])
        return columns.T


def _pseudo_inverse(x: Tensor) -> Tensor:
    """The inverse, with singular values below 1e-12 of the largest taken for that: finite for any matrix."""
    u, s, v_t = torch.linalg.svd(x)
    return v_t.mT @ (u.mT / s.clamp_min(1e-12 * s[..., :1])[..., None])


@torch.no_grad()
def attention_singular_values(
    block: Block, tokens: Tensor, skip: bool = False, steps: int = 160, seed: int = 0
) -> SingularValues:
    """Smallest and largest singular value of the Jacobian of a block's attention, [N * D, N * D], for one image.

    Up to `DECOMPOSED` rows by a singular value decomposition. Above, the largest and the share of small ones are
    estimated by Golub-Kahan-Lanczos bidiagonalization (`golub_kahan`), and the smallest, which that would find last of
    all, by a Davidson method (`smallest_singular_value`) with the inverse up to `FACTORIZED` rows, and an approximate
    inverse from the structure of attention above. Where the Jacobian is far from the T of
    `AttentionJacobian.precondition`, the smallest then remains an upper bound: see `SingularValues.bound`.

    Args:
        tokens: the attention's normalized input, [N, D].
        skip: of K + I in place of K.
        steps: of the first method, at two products with the Jacobian each; the second takes half as many.
        seed: of the random start.
    """
    jacobian = AttentionJacobian(block, tokens, skip)
    if tokens.numel() <= DECOMPOSED:
        return whole_spectrum(torch.linalg.svdvals(jacobian.whole()))
    small = tokens.numel() <= FACTORIZED
    precondition = inverse_of_square(jacobian.whole()) if small else jacobian.precondition
    start = torch.randn(tokens.numel(), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    start = start.to(tokens.device)
    return estimate_singular_values(jacobian.product, jacobian.transposed, precondition, start, steps)


@torch.no_grad()
def mlp_singular_values(block: Block, tokens: Tensor, skip: bool = False) -> SingularValues:
    """Smallest and largest singular value of the Jacobian of a block's MLP, exact for the given tokens.

    The MLP treats every token on its own, so the Jacobian is block-diagonal: its singular values are those of one
    D x D matrix a token, W_1^T diag(gelu'(h)) W_2^T. Over a sample of an image's tokens, `smallest` is at least that
    of all tokens, and `largest` at most.

    Args:
        tokens: the MLP's normalized input, [N, D].
        skip: of K + I in place of K.
    """
    if not isinstance(block.mlp, Mlp):
        raise ValueError("gated MLPs (SwiGLU) are not supported by this measure")
    first, second = block.mlp.fc1.weight.double(), scaled_output(block.mlp.fc2.weight, block.ls2)
    with torch.enable_grad():
        hidden = F.linear(tokens.double(), first, block.mlp.fc1.bias.double()).detach().requires_grad_()
        (slopes,) = torch.autograd.grad(F.gelu(hidden).sum(), hidden)
    identity = float(skip) * torch.eye(tokens.shape[1], dtype=torch.float64, device=tokens.device)
    values = [torch.linalg.svdvals((second * slope) @ first + identity) for slope in slopes]
    return whole_spectrum(torch.cat(values))


def whole_spectrum(values: Tensor) -> SingularValues:
    """What all singular values of a matrix, or of the blocks of a block-diagonal one, come to."""
    largest, smallest = values.max().item(), values.min().item()
    share = (values < SMALL * largest).double().mean().item()
    rounding = PRECISION * largest
    error = rounding / smallest if smallest > rounding else 1.0
    return SingularValues(max(smallest, rounding), largest, share, smallest_error=error)


def _summary(several: list[SingularValues]) -> dict[str, float]:
    """One number for the Jacobians of several images: geometric means, the mean share, the largest errors."""

    def geometric_mean(values: list[float]) -> float:
        return torch.tensor(values, dtype=torch.float64).log().mean().exp().item()

    return {
        "smallest": geometric_mean([s.smallest for s in several]),
        "largest": geometric_mean([s.largest for s in several]),
        "condition": geometric_mean([s.condition for s in several]),
        "small_share": sum(s.small_share for s in several) / len(several),
        "smallest_error": max(s.smallest_error for s in several),
        "largest_error": max(s.largest_error for s in several),
        "share_error": max(s.share_error for s in several),
    }


Product = Callable[[Tensor], Tensor]


def estimate_singular_values(
    product: Product, transposed: Product, precondition: Product, start: Tensor, steps: int
) -> SingularValues:
    """Ends of the spectrum of a square matrix J that is given by its products with vectors.

    Args:
        product, transposed: x -> J x and y -> J^T y.
        precondition: an approximation of x -> (J^T J)^-1 x; the identity will do where J is well conditioned.
        start: a Gaussian random vector, float64; the errors stated hold for such a one.
        steps: see `attention_singular_values`.
    """
    size = len(start)
    bidiagonal, rest, right = golub_kahan(product, transposed, start, steps)
    _, values, v_t = torch.linalg.svd(bidiagonal)
    largest = values[0].item()
    if not largest:
        return SingularValues(0.0, 0.0, 0.0, smallest_error=1.0)
    share, share_error = share_below(SMALL * largest, bidiagonal, rest)
    spread = 2 * math.sqrt(2 * max(share * (1 - share), 1 / size) / size)
    # Kuczynski and Wozniakowski (SIAM J. Matrix Anal. Appl. 13, 1992): from a random start, the chance that k Lanczos
    # steps miss the largest eigenvalue by more than its part e is at most 1.648 sqrt(n) exp(-sqrt(e) (2k - 1)).
    missed = (math.log(1.648 * size**0.5 / 0.01) / (2 * len(values) - 1)) ** 2 if rest else 0.0
    starts = [*(v_t[-6:] @ right), precondition(start)]
    smallest, error = smallest_singular_value(product, transposed, precondition, starts, largest, steps // 2)
    return SingularValues(
        smallest,
        largest,
        share,
        smallest_error=error,
        largest_error=1 / math.sqrt(1 - missed) - 1 if missed < 1 else math.inf,
        share_error=min(1.0, share_error + spread),
    )


def golub_kahan(product: Product, transposed: Product, start: Tensor, steps: int) -> tuple[Tensor, float, Tensor]:
    """Golub-Kahan-Lanczos bidiagonalization of J with full reorthogonalization (SIAM J. Numer. Anal. 2, 1965).

    Returns:
        B [k, k], upper bidiagonal, with J V = U B for orthonormal V and U, k <= steps;
        the norm of what is left, J^T U - V B^T: 0 where the start sees no other singular values than the k of B;
        the columns of V as rows, [k, n].
    """
    steps = min(steps, len(start))
    left, right = start.new_empty(2, steps, len(start)).unbind()
    bidiagonal = start.new_zeros(steps, steps)
    v, rest = start / start.norm(), 0.0
    for k in range(steps):
        right[k] = v
        u = product(v)
        if k:
            u = u - bidiagonal[k - 1, k] * left[k - 1]
            u -= (left[:k] @ u) @ left[:k]
        bidiagonal[k, k] = u.norm()
        rounding = PRECISION * bidiagonal.max().item()
        if bidiagonal[k, k] <= rounding:
            rest = 0.0
            break
        left[k] = u / bidiagonal[k, k]
        v = transposed(left[k]) - bidiagonal[k, k] * v
        v -= (right[: k + 1] @ v) @ right[: k + 1]
        rest = v.norm().item() if v.norm() > rounding else 0.0
        if not rest or k + 1 == steps:
            break
        bidiagonal[k, k + 1] = rest
        v = v / rest
    return bidiagonal[: k + 1, : k + 1], rest, right[: k + 1]


def share_below(threshold: float, bidiagonal: Tensor, rest: float) -> tuple[float, float]:
    """The share of the singular values below a threshold, as the random start of `golub_kahan` sees it.

    By Gauss-Radau quadrature of the spectrum of J^T J with a node at the threshold (Golub, SIAM Review 15, 1973): by
    Chebyshev, Markov and Stieltjes the share lies between the weights below that node with and without its own, and
    these are the closest bounds that the steps taken allow.

    Returns:
        the middle between the two, and half the difference.
    """
    squares, node, size = bidiagonal.T @ bidiagonal, threshold**2, len(bidiagonal)
    coupling = bidiagonal[-1, -1].item() * rest
    extended = squares.new_zeros(size + 1, size + 1)
    extended[:size, :size] = squares
    extended[-1, -2] = extended[-2, -1] = coupling
    last = squares.new_zeros(size)
    last[-1] = coupling**2
    shifted = squares - node * torch.eye(size, dtype=squares.dtype, device=squares.device)
    extended[-1, -1] = node + torch.linalg.solve(shifted, last)[-1]
    nodes, vectors = torch.linalg.eigh(extended)
    weights, own = vectors[0].square(), int((nodes - node).abs().argmin())
    half = weights[own].item() / 2
    return weights[:own].sum().item() + half, half


def inverse_of_square(matrix: Tensor) -> Product:
    """x -> (J^T J)^-1 x by an LU factorization of J; pivots that cannot be told from zero are made larger."""
    factors, pivots, _ = torch.linalg.lu_factor_ex(matrix)
    diagonal, tiny = factors.diagonal(), PRECISION * matrix.abs().max().item()
    diagonal[diagonal.abs() < tiny] = tiny

    def solve(x: Tensor) -> Tensor:
        y = torch.linalg.lu_solve(factors, pivots, x[:, None], adjoint=True)
        return torch.linalg.lu_solve(factors, pivots, y)[:, 0]

    return solve


def smallest_singular_value(
    product: Product,
    transposed: Product,
    precondition: Product,
    starts: list[Tensor],
    largest: float,
    steps: int,
) -> tuple[float, float]:
    """The smallest singular value of a square matrix J, by a generalized Davidson method.

    J is projected from the right alone: J V = Q R with orthonormal V and Q. So the singular values of R are never below
    the smallest of J, and squares of small ones are never formed. The next direction of V is the preconditioned
    residual of the smallest triple (as in PRIMME_SVDS, SIAM J. Sci. Comput. 39, 2017).

    Args:
        starts: the first directions of V.
        largest: the largest singular value, to tell what is zero in float64.
        steps: projections, the first on all of these. Fewer if a singular value is known to 1 %.

    Returns:
        an upper bound s of the smallest singular value; and the part of s within which a singular value lies, which is
        |J^T u - s v| / (sqrt(2) s) for the triple found, J v = s u. Where s cannot be told from zero: `PRECISION` times
        the largest, and 1.
    """
    x = starts[0]
    most = min(len(starts) + steps - 1, len(x))
    basis, image = x.new_empty(2, most, len(x)).unbind()  # V and Q, as rows
    r = x.new_zeros(most, most)
    for size in range(most):
        x = x / x.norm()
        for _ in range(2):
            x = x - (basis[:size] @ x) @ basis[:size]
            if x.norm() < PRECISION:  # nothing but what V spans: the axis that V sees least of is new
                x = torch.eye(len(x), dtype=x.dtype, device=x.device)[basis[:size].square().sum(0).argmin()]
                x = x - (basis[:size] @ x) @ basis[:size]
            x = x / x.norm()
        y = product(x)
        basis[size] = x
        for _ in range(2):
            along = image[:size] @ y
            y, r[:size, size] = y - along @ image[:size], r[:size, size] + along
        r[size, size] = y.norm()
        image[size] = y / y.norm().clamp_min(1e-300)
        if size + 1 < len(starts) and size + 1 < most:
            x = starts[size + 1]
            continue
        left, values, right = torch.linalg.svd(r[: size + 1, : size + 1])
        smallest = values[-1].item()
        if smallest <= PRECISION * largest:
            return PRECISION * largest, 1.0
        v, u = right[-1] @ basis[: size + 1], left[:, -1] @ image[: size + 1]
        residual = transposed(u) - smallest * v
        error = residual.norm().item() / (math.sqrt(2) * smallest)
        if error <= TOLERANCE / 5:
            break
        x = precondition(residual)
    return smallest, min(1.0, max(error, PRECISION * largest / smallest))
