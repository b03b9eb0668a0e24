"""Depth from frozen features by a linear head, its losses and its measures.

Source: DINOv2 (arXiv 2304.07193, section 7.4) and the code it released: the head classifies depth into uniform bins, as
AdaBins (arXiv 2011.14141) does, and is trained by the scale-invariant loss and a loss of gradients.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipless.datasets.labels.depth import DepthSet
from skipless.eval.dense.heads import fit, row_batches
from skipless.eval.features import Features

EPS = 1e-3  # added to depths before their logarithm
WARM_UP = 100  # steps in which the mean of the logarithms alone is brought right


@dataclass
class HeadSettings:
    """The head and its training."""

    bins: int = 256
    """Depths, evenly spread, that are mixed in every pixel."""
    min_depth: float = 0.001
    """Meters of the first of them."""
    max_depth: float = 10.0
    """Meters of the last of them. What is farther away is neither learned from nor scored."""
    upsample: int = 4
    """Points along a side of a patch at which depth is computed, before it is resized to the image."""
    lr: float = 1e-3
    """Peak learning rate of AdamW; half a cosine to 0."""
    weight_decay: float = 0.01
    """Of AdamW."""
    gradient_weight: float = 0.5
    """Weight of the loss of gradients."""
    epochs: int = 10
    """Passes over the training images."""
    images_per_step: int = 8
    """Images whose gradients make a step."""

    def __post_init__(self) -> None:
        if min(self.upsample, self.epochs, self.images_per_step) < 1 or self.bins < 2:
            raise ValueError("upsample, epochs and images_per_step must be 1 or more, bins 2 or more")
        if not 0 < self.min_depth < self.max_depth < np.inf:
            raise ValueError(f"min_depth is {self.min_depth:g} and max_depth {self.max_depth:g}; give 0 < min < max")
        if not 0 < self.lr < np.inf or not 0 <= min(self.weight_decay, self.gradient_weight) < np.inf:
            raise ValueError("lr must be above 0, weight_decay and gradient_weight 0 or more")


class DepthHead(nn.Module):
    """Depth from the features of patches and of CLS, which is put beside every patch: one linear layer."""

    def __init__(self, dim: int, settings: HeadSettings):
        super().__init__()
        self.linear = nn.Linear(2 * dim, settings.bins)
        self.upsample = settings.upsample
        self.register_buffer("depths", torch.linspace(settings.min_depth, settings.max_depth, settings.bins))

    def forward(self, patches: Tensor, cls: Tensor) -> Tensor:
        """[B, h, w, D] and [B, D] -> meters [B, h * upsample, w * upsample]."""
        weight, own = self.linear.weight, patches.shape[-1]
        logits = patches @ weight[:, :own].T + F.linear(cls, weight[:, own:], self.linear.bias)[:, None, None]
        # A linear layer and a bilinear resize can trade places; this way round there are fewer channels.
        logits = F.interpolate(logits.permute(0, 3, 1, 2), scale_factor=self.upsample, mode="bilinear")
        shares = logits.relu() + 0.1
        assert isinstance(self.depths, Tensor)
        return torch.einsum("bkhw,k->bhw", shares, self.depths) / shares.sum(1)


def scale_invariant_loss(found: Tensor, truth: Tensor, warm_up: bool = False) -> Tensor:
    """sqrt(var(g) + 0.15 mean(g)^2) of g, the difference of the logarithms, over pixels [P] (Eigen et al., arXiv
    1406.2283; AdaBins' weights); in the warm-up without the variance."""
    g = (found + EPS).log() - (truth + EPS).log()
    mean = 0.15 * g.mean().square()
    return (mean if warm_up or len(g) < 2 else mean + g.var()).sqrt()


def gradient_loss(found: Tensor, truth: Tensor) -> Tensor:
    """How much the difference of the logarithms changes over two pixels, down and to the right, by the number of pixels
    that are known; the sum of four strides: MegaDepth's loss (arXiv 1804.00607). (DINOv2's released code cuts batch and
    channels in the place of rows and columns, of which with two images nothing is left.)

    Args:
        found, truth: [H, W]; truth is NaN where it is not known.
    """
    total = found.new_zeros(())
    for stride in (1, 2, 4, 6):
        g = (found[::stride, ::stride] + EPS).log() - (truth[::stride, ::stride] + EPS).log()
        known = g.isfinite()
        changes = [(g[2:] - g[:-2])[known[2:] & known[:-2]], (g[:, 2:] - g[:, :-2])[known[:, 2:] & known[:, :-2]]]
        total = total + sum(change.abs().sum() for change in changes) / known.sum().clamp(min=1)
    return total


def depth_scores(found: np.ndarray, truth: np.ndarray) -> tuple[float, float, float]:
    """delta1, the share of pixels within a factor of 1.25; AbsRel, the mean error as a share of the depth; and RMSE in
    meters. Both arrays are [P], above 0."""
    ratio = np.maximum(found / truth, truth / found)
    error = found - truth
    return float((ratio < 1.25).mean()), float((np.abs(error) / truth).mean()), float(np.sqrt((error**2).mean()))


def within(depth: np.ndarray, settings: HeadSettings) -> np.ndarray:
    """A depth [H, W] with NaN where it is not between the bounds."""
    return np.where((depth > settings.min_depth) & (depth < settings.max_depth), depth, np.float32(np.nan))


def train_head(
    features: Features, images: DepthSet, blocks: Sequence[int], settings: HeadSettings, seed: int, device: torch.device
) -> DepthHead:
    """A head on the features of some blocks of the training images. Raises ValueError where none has a known depth."""
    torch.manual_seed(seed)
    head = DepthHead(features.dim * len(blocks), settings).to(device)
    groups = [{"params": list(head.parameters()), "lr": settings.lr, "peak": settings.lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
    steps = settings.epochs * -(-len(images) // settings.images_per_step)
    taken, learned = 0, 0

    def losses(batch: np.ndarray) -> Iterator[Tensor]:
        nonlocal taken, learned
        taken += 1
        depths = [torch.from_numpy(within(images.read_depth(int(row)), settings)) for row in batch]
        known = [row for row, depth in enumerate(depths) if depth.isfinite().any()]
        if not known:
            return
        truths = [depth.to(device) for depth in depths]
        learned += 1
        maps = predict(head, features, batch[known], blocks, device)
        pairs = [
            (F.interpolate(depth[None, None], tuple(truths[row].shape), mode="bilinear")[0, 0], truths[row])
            for depth, row in zip(maps, known, strict=True)
        ]
        found, truth = (torch.cat([pair[side][pair[1].isfinite()] for pair in pairs]) for side in (0, 1))
        loss = scale_invariant_loss(found, truth, warm_up=taken <= min(WARM_UP, steps // 10))
        gradients = sum(gradient_loss(*pair) for pair in pairs) / len(pairs)
        yield loss + settings.gradient_weight * gradients

    fit(
        [head],
        optimizer,
        row_batches(len(images), settings.images_per_step, range(settings.epochs), seed),
        steps,
        losses,
    )
    if not learned:
        raise ValueError(
            f"{images.name} {images.split}: no pixel of {len(images)} images has a depth between "
            f"{settings.min_depth:g} and {settings.max_depth:g} m to learn from"
        )
    return head


def predict(
    head: DepthHead, features: Features, rows: np.ndarray, blocks: Sequence[int], device: torch.device
) -> Tensor:
    """Depths of some images in meters, [B, h * upsample, w * upsample]."""
    patches, cls = features.read(rows, blocks), features.read_cls(rows, blocks)
    return head(patches.to(device, torch.float32), cls.to(device, torch.float32))
