"""How tokens start: patches that are whitened, and positions that tell them apart.

Patches of photographs differ in brightness first of all: of 12 x 12 pixels it is more than half of the variance. So
tokens of the usual embedding differ in a few directions only. With skip connections the blocks add
what is missing. Without them a block can do no more than turn what it is given, as long as it is near the orthogonal
map it starts as; and attention cannot be diagonal between tokens that are alike. Tokens that differ from the start
help both kinds of models, and the skipless one more (docs/skipless.md).

Both are initializations: parameters that are there anyway get other values, and are learned as ever.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipless.ssl.model.vit import VisionTransformer


def images_to_whiten_on(image_size: int, patch: int) -> int:
    """How many images of a set to look at: enough for the covariance of 768 values, in seconds. 64 to 512."""
    return min(512, max(64, 50_000 // (image_size // patch) ** 2))


@torch.no_grad()
def whiten_patches_(proj: nn.Conv2d, images: Tensor, seed: int = 0, ridge: float = 0.01) -> nn.Conv2d:
    """Initialize a patch embedding in place so that its outputs have mean 0, variance 1, and no correlations.

    That is exact with a ridge of 0 and no more channels than a patch has values. Else it holds as far as the ridge
    and the number of values let it, and the mean variance is 1.

    Principal components of the images' patches, as many as there are channels (or as a patch has values, if those are
    fewer), each divided by its standard deviation, then turned by a random orthogonal matrix. Whitened patches as a
    first layer: Coates and Ng 2012, "Learning feature representations with k-means"; frozen: Jordan, arXiv 2404.00498.

    Args:
        proj: kernel and stride of one patch, 3 input channels, with a bias: `model.patch_embed.proj`, here and in timm.
        images: normalized as in training, [B, 3, H, W], at least of a patch's size. Some hundred; what is left beside
            whole patches is ignored.
        seed: of the orthogonal matrix.
        ridge: added to the components' variances, in units of their mean, so that those that hardly occur (as in images
            that were enlarged) are not blown up; 0 or more.

    Returns:
        The same layer.

    Raises:
        ValueError: no such layer; images without a whole patch, not floating-point, not finite, or all the same.

    Examples:
        >>> proj = whiten_patches_(nn.Conv2d(3, 8, 4, 4), torch.rand(16, 3, 32, 32))
        >>> tuple(proj(torch.rand(2, 3, 8, 8)).shape)
        (2, 8, 2, 2)
    """
    cuts_patches = isinstance(proj, nn.Conv2d) and proj.stride == proj.kernel_size
    if not cuts_patches or (proj.in_channels, proj.padding, proj.dilation) != (3, (0, 0), (1, 1)) or proj.bias is None:
        raise ValueError(f"{proj} is no patch embedding with a bias; give the layer, as in model.patch_embed.proj")
    patch = (proj.kernel_size[0], proj.kernel_size[1])
    if not images.is_floating_point() or not images.isfinite().all():
        raise ValueError(f"images are {images.dtype}; they must be normalized, and all values finite")
    if not len(images) or images.shape[2] < patch[0] or images.shape[3] < patch[1]:
        raise ValueError(f"images of shape {tuple(images.shape)} hold no patch of {patch[0]} x {patch[1]} pixels")
    channels, values = proj.out_channels, 3 * patch[0] * patch[1]
    total, products, count = torch.zeros(values).double(), torch.zeros(values, values).double(), 0
    for batch in images.split(64):
        patches = F.unfold(batch.cpu().double(), patch, stride=patch).mT.flatten(0, 1)
        total += patches.sum(0)
        products += patches.T @ patches
        count += len(patches)
    mean = total / count
    variances, components = torch.linalg.eigh(products / count - torch.outer(mean, mean))  # ascending
    if not variances[-1] > 1e-8:
        raise ValueError(
            f"the {count} patches of {len(images)} images are all the same, so they cannot be whitened; give other "
            "images, or model.patches default"
        )
    kept = min(channels, values)
    variances, components = variances.clamp_min(0).flip(0), components.flip(1)[:, :kept]
    spread = variances[:kept] + ridge * variances.mean()
    scale = torch.where(spread > 1e-12 * variances[0], spread.rsqrt(), 0.0)
    turn = nn.init.orthogonal_(
        torch.empty(channels, kept, dtype=torch.double), generator=torch.Generator().manual_seed(seed)
    )
    weight = turn @ (components * scale).T
    weight *= (channels / (scale.square() * variances[:kept]).sum()).sqrt()
    proj.weight.copy_(weight.view_as(proj.weight))
    proj.bias.copy_(-weight @ mean)
    return proj


@torch.no_grad()
def sine_positions_(model: VisionTransformer, std: float = 0.5) -> VisionTransformer:
    """Initialize the patches' positions in place as sines and cosines of row and column, as in MAE (arXiv 2111.06377).

    A quarter of the channels each: sine and cosine of the row, sine and cosine of the column, at frequencies from 1
    down towards 1 / 10,000 in equal ratios. Less their mean over the grid, a vector that all patches would share, and
    scaled together. Smooth, so what interpolation makes of them for other image sizes is as good.

    Args:
        std: root mean square of all values. Beside whitened patches, of variance 1, ViT's usual 0.02 would be nothing.

    Raises:
        ValueError: a width that is not divisible by 4.
    """
    if model.dim % 4:
        raise ValueError(
            f"sines and cosines of rows and columns need a width divisible by 4, and dim is {model.dim}; "
            "choose another, or model.positions default"
        )
    n = round((model.pos_embed.shape[1] - 1) ** 0.5)
    frequencies = 10_000.0 ** -torch.linspace(0, 1, model.dim // 4 + 1)[:-1]
    angles = torch.arange(n)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    line -= line.mean(0)
    line *= std / line.square().mean().sqrt().clamp_min(1e-6)  # a grid of one patch has no positions
    rows, columns = line[:, None].expand(n, n, -1), line[None].expand(n, n, -1)
    model.pos_embed[0, 1:] = torch.cat([rows, columns], dim=2).flatten(0, 1).to(model.pos_embed)
    return model
