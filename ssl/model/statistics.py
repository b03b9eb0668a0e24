"""How well conditioned a Vision Transformer is, block by block: what skip connections do to a network, as numbers.

Plain functions, each of one measure. `cheap_conditioning` gathers those that need a forward pass alone and can be
logged during training, `gradient_norms` needs a backward pass, and Jacobians are in eval/spectra.py. The command that
compares models is eval/conditioning.py; what the measures mean is in docs/conditioning.md.
"""

import copy
import math

import torch
from torch import Tensor

from skipless.ssl.model.vit import Block, LayerScale, VisionTransformer

# A singular value below this part of the largest cannot be told from zero in float64.
PRECISION = 1e-14

# Mean share from which a block's tokens are, for training, one and the same vector.
DEAD = 0.98


# --- tokens


def mean_share(tokens: Tensor) -> Tensor:
    """How much of the tokens' energy is their image's mean token: 1 when all tokens of an image are the same vector.

    Args:
        tokens: [B, N, D], the patch tokens of B images.

    Returns:
        float64 [B], in [0, 1]: N |mean|^2 / sum |token|^2.
    """
    tokens = tokens.double()
    return tokens.mean(1).square().sum(-1) / tokens.square().sum(-1).mean(1)


def effective_rank(tokens: Tensor) -> Tensor:
    """exp(entropy of the squared singular values, normalized to sum 1) of an image's centered tokens.

    After Roy and Vetterli (EUSIPCO 2007), who take the singular values themselves: squared, they are shares of energy.

    When the mean share is close to 1, what is left after centering is noise, and its rank is that of noise: high, and
    meaningless. Read the two together.

    Args:
        tokens: [B, N, D].

    Returns:
        float64 [B], in [1, min(N - 1, D)].
    """
    tokens = tokens.double()
    centered = tokens - tokens.mean(1, keepdim=True)
    energy = torch.linalg.eigvalsh(centered @ centered.mT).clamp_min(0)  # the squared singular values, in less time
    share = energy / energy.sum(-1, keepdim=True).clamp_min(1e-300)
    return torch.special.entr(share).sum(-1).exp()


def excess_kurtosis(tokens: Tensor) -> Tensor:
    """Excess kurtosis of an image's activations, all tokens and channels pooled into one sample.

    Fourth central moment over squared variance, minus 3: 0 for a Gaussian, large where few values are far larger than
    the rest, which is what makes activations hard to quantize (arXiv 2605.25880). The moments are those of the sample,
    without correction for bias.

    Args:
        tokens: [B, N, D].

    Returns:
        float64 [B], at least -2.
    """
    values = tokens.double().flatten(1)
    squares = (values - values.mean(1, keepdim=True)).square()
    return squares.square().mean(1) / squares.mean(1).square() - 3


@torch.inference_mode()
def token_statistics(model: VisionTransformer, images: Tensor) -> dict[str, list[float]]:
    """Mean share and effective rank of the patch tokens after each block, before the final norm.

    Args:
        images: normalized, [B, 3, H, W].

    Returns:
        {"mean_share": one number a block, "effective_rank": likewise}, averaged over the images.
    """
    blocks = [f.patches.flatten(1, 2) for f in model.features(images, blocks=range(model.depth), norm=False)]
    return {
        "mean_share": [mean_share(tokens).mean().item() for tokens in blocks],
        "effective_rank": [effective_rank(tokens).mean().item() for tokens in blocks],
    }


# --- attention


def attention_logits(block: Block, tokens: Tensor) -> Tensor:
    """q_i . k_j / sqrt(d_h), what the softmax of a block's attention gets.

    Args:
        tokens: the attention's normalized input, [B, N, D].

    Returns:
        [B, heads, N, N]; a row belongs to a query.
    """
    b, n, _ = tokens.shape
    q, k, _ = (x.unflatten(0, (b, n)).transpose(1, 2) for x in block.attn.split(tokens.flatten(0, 1)))
    return q @ k.mT / q.shape[-1] ** 0.5


def attention_entropy(maps: Tensor) -> Tensor:
    """Mean entropy of the rows of attention maps [..., N, N], over ln N: 1 if uniform, 0 if each looks at one token."""
    return torch.special.entr(maps).sum(-1).mean(-1) / math.log(maps.shape[-1])


def diagonal_share(maps: Tensor) -> Tensor:
    """Mean of the diagonal of attention maps [..., N, N], in [0, 1]: the attention that tokens pay to themselves."""
    return maps.diagonal(dim1=-2, dim2=-1).mean(-1)


def diagonal_gap(logits: Tensor) -> Tensor:
    """Diagonal dominance of logits [..., N, N]: mean over the rows of s_ii minus the mean of the row's other entries.

    In units of the logits: e to this power is how much more attention a token pays to itself than to a typical other.
    """
    diagonal = logits.diagonal(dim1=-2, dim2=-1)
    others = (logits.sum(-1) - diagonal) / (logits.shape[-1] - 1)
    return (diagonal - others).mean(-1)


def diagonal_margin(logits: Tensor) -> Tensor:
    """The strict form of `diagonal_gap`: mean over the rows of s_ii minus the largest of the row's other entries.

    Negative where tokens look at others more than at themselves.
    """
    diagonal = logits.diagonal(dim1=-2, dim2=-1)
    others = logits.masked_fill(torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device), -math.inf)
    return (diagonal - others.amax(-1)).mean(-1)


def value_output_singular_values(block: Block) -> Tensor:
    """Singular values of W_V W_O, the product over all heads, in the paper's convention y = x W.

    Returns:
        float64 [D], descending. The paper's initialization makes all of them c^2.
    """
    _, _, w_v = block.attn.qkv.weight.double().chunk(3)
    return torch.linalg.svdvals(scaled_output(block.attn.proj.weight, block.ls1) @ w_v)


def scaled_output(weight: Tensor, scale: torch.nn.Module) -> Tensor:
    """The weight of a branch's last layer, [out, in], with the layer scale that follows it; float64."""
    return weight.double() * scale.gamma.double()[:, None] if isinstance(scale, LayerScale) else weight.double()


# --- all blocks


def branch_inputs(block: Block, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What a block's attention and its MLP get, normalized: [B, N, D] each.

    Args:
        tokens: what enters the block, [B, N, D].
    """
    groups = ((tokens.shape[0], tokens.shape[1]),)
    attended = block.attend(tokens.flatten(0, 1), groups, "sdpa")
    return block.norm1(tokens), block.norm2(attended).unflatten(0, groups[0])


@torch.inference_mode()
def cheap_conditioning(model: VisionTransformer, images: Tensor) -> dict[str, list[float]]:
    """The measures that need one forward pass and no Jacobian: fit to be logged during training.

    Args:
        images: normalized, [B, 3, H, W], in the dtype and on the device of the model.

    Returns:
        One number a block for each of
        "attention_entropy", "diagonal_share", "diagonal_gap", "diagonal_margin": mean over images, heads and tokens; of
        shaped attention the share on the whole map's diagonal, and all else of its softmax;
        "value_output_smallest", "value_output_largest", "value_output_condition": of W_V W_O;
        "mean_share", "effective_rank": of the patch tokens after the block, mean over the images;
        "kurtosis": of all tokens after the block, mean over the images.
    """
    measures: dict[str, list[float]] = {}
    for block, before, after in model.walk(model.embed(images)):
        logits = attention_logits(block, block.norm1(before))
        maps = logits.softmax(-1)
        n = maps.shape[-1]
        used = maps + torch.eye(n, dtype=maps.dtype, device=maps.device) - 1 / n if block.attn.shaped else maps
        patches = after[:, model.prefix :]
        values = value_output_singular_values(block)
        numbers = {
            "attention_entropy": attention_entropy(maps),
            "diagonal_share": diagonal_share(used),
            "diagonal_gap": diagonal_gap(logits),
            "diagonal_margin": diagonal_margin(logits),
            "value_output_smallest": values[-1],
            "value_output_largest": values[0],
            "value_output_condition": values[0] / values[-1].clamp_min(PRECISION * values[0]),
            "mean_share": mean_share(patches),
            "effective_rank": effective_rank(patches),
            "kurtosis": excess_kurtosis(after),
        }
        for name, value in numbers.items():
            measures.setdefault(name, []).append(value.mean().item())
    return measures


def gradient_norms(model: VisionTransformer, images: Tensor, seed: int = 0) -> dict[str, list[float]]:
    """How strongly the network's output depends on each block: norms of gradients, in float64.

    The scalar is f(image) = <G, Z>: Z [N, D] all tokens after the final norm, G a fixed Gaussian direction of Frobenius
    norm 1. The gradient of f with respect to Z has norm 1, so a token gradient of 1 means that a block's input
    is felt at the end as strongly as the end itself.

    Args:
        images: normalized, [B, 3, H, W].
        seed: of G.

    Returns:
        {"parameter_gradient": norm of the gradient with respect to all parameters of a block together,
        "token_gradient": with respect to the tokens [N, D] that enter the block}; one number a block, the mean over
        images of each image's norm. The model itself is left as it is.
    """
    model = copy.deepcopy(model).double().eval().requires_grad_(False)
    model.blocks.requires_grad_(True)
    model.attention = "sdpa"  # xformers has no float64
    parameters = [list(block.parameters()) for block in model.blocks]
    parameter_gradient, token_gradient = torch.zeros(2, model.depth, dtype=torch.float64).unbind()
    generator = torch.Generator().manual_seed(seed)
    direction: Tensor | None = None
    for image in images.double().split(1):
        steps = list(model.walk(model.embed(image).requires_grad_()))
        inputs, output = [before for _, before, _ in steps], steps[-1][2]
        if direction is None:
            direction = torch.randn(output.shape, generator=generator, dtype=output.dtype).to(output.device)
            direction /= direction.norm()
        value = (model.norm(output) * direction).sum()
        gradients = iter(torch.autograd.grad(value, [*inputs, *(p for block in parameters for p in block)]))
        token_gradient += torch.stack([next(gradients).norm() for _ in inputs]).cpu()
        squares = [torch.stack([next(gradients).square().sum() for _ in block]).sum() for block in parameters]
        parameter_gradient += torch.stack(squares).sqrt().cpu()
    return {
        "parameter_gradient": (parameter_gradient / len(images)).tolist(),
        "token_gradient": (token_gradient / len(images)).tolist(),
    }
