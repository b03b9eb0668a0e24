"""The initialization that makes a Vision Transformer trainable without skip connections (arXiv 2510.00345).

Without skips the derivative of a block is that of its attention and MLP alone, so these must be well conditioned from
the start. Three parts, each of which can be left out:

1. value-output: W_V W_O = c^2 x (an orthogonal matrix), so its condition number is 1;
2. query-key: W_Q W_K^T of a head is close to alpha Z + beta I, so its attention map is close to the identity;
3. MLP: orthogonal matrices ("suo"), or a pair of mirrored layers that is exactly an orthogonal map ("mirrored").

Weights follow the row-vector convention of the paper (y = x W); torch's `Linear.weight` is the transpose of W.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

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
) -> nn.Module:
    """Initialize the blocks of a ViT in place, for training without skip connections.

    Works on `skipless.ssl.vit.VisionTransformer` and on timm's: any model whose `blocks` have `attn.qkv`, `attn.proj`,
    `attn.num_heads`, `mlp.fc1` and `mlp.fc2`. Embeddings and norms stay as they are. Biases of the initialized layers
    become zero. Random numbers are drawn on the CPU, so they do not depend on the model's device.

    Args:
        alpha, beta: scale of the noise and of the identity in W_Q W_K^T. A larger beta makes attention more diagonal.
        c: scale of W_V and of W_O.
        mlp: "suo", "mirrored", or None to leave the MLPs alone.
        value_output, query_key: False leaves that part alone.
        seed: of the random draws; independent of torch's global state.

    Returns:
        The same model.

    Raises:
        ValueError: the model has no such blocks, or a mirrored MLP is asked of layers whose shape does not allow it.

    Example:
        >>> from skipless.ssl.vit import vit_small
        >>> model = skipless_init_(vit_small(residual=False), **PRESETS["paper-dino"])
    """
    if mlp not in ("suo", "mirrored", None):
        raise ValueError(f"mlp is {mlp!r}; choose suo, mirrored or None")
    generator = torch.Generator().manual_seed(seed)
    for attn, perceptron in _attention_and_mlp(model):
        d = attn.qkv.in_features
        queries_and_keys, values = slice(0, 2 * d), slice(2 * d, 3 * d)
        if value_output:
            w_v, w_o = value_output_matrices(d, c, generator)
            _set(attn.qkv, w_v.T, rows=values)
            _set(attn.proj, w_o.T)
        if query_key:
            w_q, w_k = query_key_matrices(d, attn.num_heads, alpha, beta, generator, attn.qkv.weight.device)
            _set(attn.qkv, torch.cat([w_q, w_k], dim=1).T, rows=queries_and_keys)
        if mlp is not None:
            make = suo_matrices if mlp == "suo" else mirrored_matrices
            first, second = make(d, perceptron.fc1.out_features, generator)
            _set(perceptron.fc1, first.T)
            _set(perceptron.fc2, second.T)
    return model


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
    """For each head, the best rank-d_h factorisation of M = alpha Z + beta I, Z_ij ~ N(0, 1 / d) (arXiv 2305.09828).

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

    Returns:
        The MLP's two matrices, [d, hidden] and [hidden, d].
    """
    if hidden % 2 or hidden < 2 * d:
        raise ValueError(
            f"a mirrored MLP needs an even hidden width of at least 2 x {d}, this one has {hidden}; use suo"
        )
    w = _orthogonal(d, hidden // 2, generator)
    v = w.T @ _orthogonal(d, d, generator)
    return torch.cat([w, -w], dim=1), torch.cat([v, -v])


def _orthogonal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Haar-distributed [rows, columns] with orthonormal rows or columns, whichever are fewer."""
    return nn.init.orthogonal_(torch.empty(rows, columns), generator=generator)


def _set(linear: nn.Linear, weight: Tensor, rows: slice = slice(None)) -> None:
    linear.weight[rows].copy_(weight)
    if linear.bias is not None:
        linear.bias[rows].zero_()


def _attention_and_mlp(model: nn.Module) -> list[tuple[Any, Any]]:
    blocks = getattr(model, "blocks", None)
    if blocks is None or not all(hasattr(b, "attn") and hasattr(b.attn, "qkv") and hasattr(b, "mlp") for b in blocks):
        raise ValueError(f"{type(model).__name__} has no blocks with attn.qkv and mlp; give a ViT of skipless or timm")
    return [(block.attn, block.mlp) for block in blocks]
