"""The initialization that makes a Vision Transformer trainable without skip connections (arXiv 2510.00345).

Without skips the derivative of a block is that of its attention and MLP alone, so these must be well conditioned from
the start. Three parts, each of which can be left out:

1. value-output (`value_output_matrices`): W_V W_O = c^2 x (an orthogonal matrix), so its condition number is 1;
2. query-key (`query_key_matrices`): W_Q W_K^T of a head is close to alpha Z + beta I, so its attention map is close to
   the identity;
3. MLP (`suo_matrices`, `mirrored_matrices`): orthogonal matrices ("suo"), or a pair of mirrored layers that is exactly
   an orthogonal map ("mirrored").

Weights follow the row-vector convention of the paper (y = x W); torch's `Linear.weight` is the transpose of W.
"""

import bisect
import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from skipless.ssl.model.foreign import Weights, block_weights
from skipless.ssl.model.statistics import effective_rank
from skipless.ssl.model.vit import VisionTransformer

MlpInit = Literal["suo", "mirrored"]

# `small`: with SUO and beta = 1 the deep blocks of a narrow model start dead. GELU after an orthogonal layer has a
# positive mean that all tokens share and nothing subtracts, and attention that is not diagonal enough averages tokens
# block after block, until nothing but an image's mean is left; DINO does not revive them in a small budget. Mirrored
# layers have no such mean and beta = 4 keeps attention diagonal. See docs/initialization.md for the measurement.
PRESETS: dict[str, dict[str, Any]] = {
    "paper-dino": {"alpha": 1.8, "beta": 1.0, "c": 3.0, "mlp": "suo"},  # ViT-S, DINO, ImageNet-1k, 300 epochs
    "paper-supervised": {"alpha": 2.0, "beta": 0.6, "c": 3.0, "mlp": "suo"},  # ViT-B, supervised, 300 epochs
    "small": {"alpha": 1.8, "beta": 4.0, "c": 3.0, "mlp": "mirrored"},  # narrow models, small budgets
}


# What `choose_beta` tries.
BETAS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0)


@torch.no_grad()
def skipless_init_(
    model: nn.Module,
    alpha: float = 1.8,
    beta: float = 1.0,
    c: float = 3.0,
    mlp: MlpInit | None = "suo",
    value_output: bool = True,
    query_key: bool = True,
    seed: int = 0,
    depth_scale: float = 1.0,
) -> nn.Module:
    """Initialize the blocks of a transformer in place, for training without skip connections.

    Shaped attention is the identity where queries and keys are small, so they stay as they are there.

    Works on `skipless.ssl.model.vit.VisionTransformer`, timm's, `nn.TransformerEncoder` with `norm_first=True` and
    transformers' `ViTModel`: see `skipless.ssl.model.foreign`, whose `remove_skips_` makes residual ones skipless. All
    of them get the same matrices for the same seed. Embeddings and norms stay as they are. Biases of the initialized
    layers become zero. Random numbers are drawn on the CPU, so they do not depend on the model's device.

    `depth_scale` is a temperature of attention that depends on depth: the logits of block l of L, from 0, are
    multiplied by depth_scale^(l / (L - 1)), by way of alpha and beta alone, so the forward pass stays as it is. Without
    skips, attention averages tokens block after block; the closer they get, the smaller the differences between logits,
    and the more uniform attention. A scale above 1 counters that in the deep blocks and leaves the first ones their
    mixing. The idea is that of arXiv 2605.25880, whose abstract names a "depth-aware scaling of attention temperature";
    we know no more of it than that, so its formula may well be another one, and this one is ours.

    Args:
        alpha, beta: scale of the noise and of the identity in W_Q W_K^T. A larger beta makes attention more diagonal;
            0 or more.
        c: scale of W_V and of W_O.
        mlp: "suo", "mirrored", or None to leave the MLPs alone.
        value_output, query_key: False leaves that part alone.
        seed: of the random draws; independent of torch's global state.
        depth_scale: how many times larger the last block's logits are than with 1; positive.

    Returns:
        The same model.

    Raises:
        ValueError: the model has no blocks of a known kind, or attention or MLPs that the initialization is not derived
            for; a mirrored MLP is asked of layers whose shape or activation does not allow it; or a value is out of
            its range. The model is unchanged then.

    Examples:
        >>> from skipless.ssl.model.vit import vit_small
        >>> model = skipless_init_(vit_small(residual=False), **PRESETS["paper-dino"])
    """
    if mlp not in ("suo", "mirrored", None):
        raise ValueError(f"mlp is {mlp!r}; choose suo, mirrored or None")
    if not (isinstance(beta, (int, float)) and 0 <= beta < math.inf):
        raise ValueError(f"beta is {beta!r}; it must be a number, 0 or more (`choose_beta` finds one)")
    if not depth_scale > 0:
        raise ValueError(f"depth_scale is {depth_scale:g}; it must be positive")
    blocks = block_weights(model)
    for block in blocks if mlp == "mirrored" else ():
        hidden, d = block.first.weight.shape
        _check_mirrored(d, hidden, block.activation, block.name)
    generator = torch.Generator().manual_seed(seed)
    query_key = query_key and not (isinstance(model, VisionTransformer) and model.architecture.get("shaped"))
    for number, block in enumerate(blocks):
        hidden, d = block.first.weight.shape
        if value_output:
            w_v, w_o = value_output_matrices(d, c, generator)
            _set(block.value, w_v)
            _set(block.output, w_o)
        if query_key:
            scale = depth_scale ** (number / max(1, len(blocks) - 1))
            device = block.query.weight.device
            w_q, w_k = query_key_matrices(d, block.heads, scale * alpha, scale * beta, generator, device)
            _set(block.query, w_q)
            _set(block.key, w_k)
        if mlp is not None:
            make = suo_matrices if mlp == "suo" else mirrored_matrices
            first, second = make(d, hidden, generator)
            _set(block.first, first)
            _set(block.second, second)
    return model


def choose_beta(
    model: VisionTransformer,
    images: Tensor,
    arguments: Mapping[str, Any],
    keep: float = 0.9,
    betas: Sequence[float] = BETAS,
    seed: int = 0,
) -> float:
    """The smallest beta with which a fresh skipless model keeps `keep` of its patch tokens' effective rank.

    See `rank_kept`, which grows with beta, but for values of below a half, where tokens have collapsed anyway.

    One beta for all blocks, found by bisection, each time from the initialization that training would start from. (A
    beta for each block, the smallest that meets a target there, did not work: the first blocks, which could keep more
    rank than they are asked to, spend it, and no beta of later blocks brings it back.)

    Args:
        model: skipless, of this package; it is not changed. Embeddings as they will be at the start of training.
        images: normalized, [B, 3, H, W], on the model's device; 16 to 32 will do.
        arguments: of `skipless_init_`, as in `PRESETS`; a beta among them is ignored.
        keep: share of the rank, positive. Above 1, blocks have to add to it.
        betas: the candidates.
        seed: of the initialization; the same seed and images give the same beta.

    Raises:
        ValueError: a residual model; or not even the largest candidate keeps that much.

    Examples:
        beta = choose_beta(model, images, PRESETS["small"], seed=0)
        skipless_init_(model, **PRESETS["small"] | {"beta": beta}, seed=0)
    """
    if model.architecture["residual"]:
        raise ValueError("the model is residual, and beta is of no consequence there; give one with residual=False")
    model, candidates = copy.deepcopy(model), sorted(betas)

    def kept(beta: float) -> float:
        skipless_init_(model, **{**arguments, "beta": beta, "seed": seed})
        return rank_kept(model, images)

    position = bisect.bisect_left(candidates, True, key=lambda beta: kept(beta) >= keep)
    if position == len(candidates):
        raise ValueError(
            f"beta {candidates[-1]:g} keeps {kept(candidates[-1]):.2f} of the tokens' effective rank, less than keep "
            f"({keep:g}); lower keep, or give larger betas"
        )
    return candidates[position]


@torch.inference_mode()
def rank_kept(model: VisionTransformer, images: Tensor) -> float:
    """Effective rank of an image's patch tokens, after the block where it is lowest, over that of its embedded patches.

    The lowest and not the last: once all tokens of an image are the same but for noise, the rank is that of noise, and
    high; but on the way there it has been low.

    Args:
        images: normalized, [B, 3, H, W], on the model's device.

    Returns:
        The mean over the images; 1 if no block lowers the rank, more if the first ones raise it and none undoes that.
    """
    embedded = effective_rank(model.embed(images)[:, model.prefix :])
    blocks = model.features(images, blocks=range(model.depth), norm=False)
    ranks = torch.stack([effective_rank(block.patches.flatten(1, 2)) for block in blocks])
    return (ranks.amin(0) / embedded).mean().item()


def value_output_matrices(d: int, c: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """W_V = c U and W_O = c V^T, singular vectors of a random d x d matrix: W_V W_O / c^2 is orthogonal.

    U and V are whole; heads are slices of them. (Orthonormal slices drawn for each head on its own would not do: their
    sum over the heads is not orthogonal.)

    Returns:
        W_V and W_O, [d, d] each.
    """
    u, _, v_t = torch.linalg.svd(torch.randn(d, d, generator=generator))
    return c * u, c * v_t


def query_key_matrices(
    d: int,
    heads: int,
    alpha: float,
    beta: float,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """For each head, the best rank-d_h factorization of M = alpha Z + beta I, Z_ij ~ N(0, 1 / d) (arXiv 2305.09828).

    With M = U S V^T and the d_h largest singular values: W_Q = U_k S_k^(1/2), W_K = V_k S_k^(1/2). The eigenvectors of
    M^T M are V, and U_k S_k = M V_k: several times faster than the whole decomposition, batched over the heads.

    Returns:
        W_Q and W_K, [d, d] each; the columns of head h are h d_h to (h + 1) d_h.
    """
    k = d // heads
    m = alpha * torch.randn(heads, d, d, generator=generator) / d**0.5 + beta * torch.eye(d)
    m = m.to(device)
    squares, vectors = torch.linalg.eigh(m.mT @ m)  # ascending
    s = squares[:, -k:].clamp_min(1e-12).sqrt().flip(-1)[:, None, :]
    v = vectors[:, :, -k:].flip(-1)
    w_q, w_k = m @ v / s.sqrt(), v * s.sqrt()  # [heads, d, d_h]
    return w_q.transpose(0, 1).flatten(1), w_k.transpose(0, 1).flatten(1)


def suo_matrices(d: int, hidden: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Scale-corrected uniform orthogonal matrices (arXiv 2110.01765): orthogonal, times max(1, sqrt(out / in)).

    Returns:
        The MLP's two matrices, [d, hidden] and [hidden, d].
    """
    first = _orthogonal(d, hidden, generator) * max(1.0, (hidden / d) ** 0.5)
    return first, _orthogonal(hidden, d, generator) * max(1.0, (d / hidden) ** 0.5)


def mirrored_matrices(d: int, hidden: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mirrored layers: [W, -W] and [V; -V] with orthonormal rows in W [d, hidden / 2] and V = W^T R, R orthogonal.

    GELU(x) - GELU(-x) = x, so the MLP is exactly the orthogonal map x -> x R: perfectly conditioned, and without the
    positive mean that GELU gives to all tokens alike. Balduzzi et al. ("looks-linear", arXiv 1702.08591), for GELU.

    The identity holds for every x g(x) with g(x) + g(-x) = 1: GELU and its approximations, ReLU (theirs), SiLU and
    hard swish. It does not for leaky ReLU, ELU, Mish or squared ReLU.

    Returns:
        The MLP's two matrices, [d, hidden] and [hidden, d].
    """
    _check_mirrored(d, hidden)
    w = _orthogonal(d, hidden // 2, generator)
    v = w.T @ _orthogonal(d, d, generator)
    return torch.cat([w, -w], dim=1), torch.cat([v, -v])


def _check_mirrored(
    d: int, hidden: int, activation: Callable[[Tensor], Tensor] | None = None, name: str = "the model"
) -> None:
    if hidden % 2 or hidden < 2 * d:
        raise ValueError(
            f"a mirrored MLP needs an even hidden width of at least 2 x {d}, this one has {hidden}; use suo"
        )
    if activation is None:
        return
    x = torch.linspace(-8, 8, 65)
    learned = isinstance(activation, nn.Module) and any(True for _ in activation.parameters())
    if learned or not torch.allclose(activation(x.clone()) - activation(-x), x, atol=1e-5):
        called = type(activation).__name__ if isinstance(activation, nn.Module) else getattr(activation, "__name__", "")
        raise ValueError(
            f"{name}: a mirrored MLP needs an activation with f(x) - f(-x) = x (GELU, ReLU, SiLU), this one is "
            f"{called}; use suo"
        )


def _orthogonal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Haar-distributed [rows, columns] with orthonormal rows or columns, whichever are fewer."""
    return nn.init.orthogonal_(torch.empty(rows, columns), generator=generator)


def _set(layer: Weights, matrix: Tensor) -> None:
    layer.weight.copy_(matrix.T)
    if layer.bias is not None:
        layer.bias.zero_()
