"""The linear head of the segmentation protocols: dropout, batch norm over all processes, 1 x 1 convolution."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipless.common.distributed import all_reduce_mean, world_size


@dataclass
class HeadSettings:
    """The linear head: dropout, batch norm, 1 x 1 convolution."""

    batch_norm: bool = True
    """Batch norm before the convolution, its statistics over all processes."""
    dropout: float = 0.0
    """Rate of channel dropout (Dropout2d) before the batch norm."""
    init_std: float | None = 0.01
    """Standard deviation of the convolution's initial weights, its bias being 0; None for torch's own default."""


class FrozenInputBatchNorm(nn.BatchNorm2d):
    """Batch norm with the statistics of all processes, on CPU too, where torch's SyncBatchNorm does not run.

    It is right for an input that needs no gradient, as a frozen backbone's features: none flows through the statistics.
    All processes must hold equally many tokens.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(x)
        mean = all_reduce_mean(x.mean((0, 2, 3)))
        variance = all_reduce_mean((x - mean[:, None, None]).square().mean((0, 2, 3)))
        count = x.numel() / x.shape[1] * world_size()
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum or 0.0)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum or 0.0)
        return F.batch_norm(x, mean, variance, self.weight, self.bias, training=False, eps=self.eps)


class LinearHead(nn.Sequential):
    """Logits [B, C, h, w] from features [B, D, h, w]: dropout, batch norm, 1 x 1 convolution."""

    def __init__(self, dim: int, classes: int, settings: HeadSettings):
        conv = nn.Conv2d(dim, classes, 1)
        if settings.init_std is not None:
            nn.init.normal_(conv.weight, std=settings.init_std)
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)
        norm = FrozenInputBatchNorm(dim) if settings.batch_norm else nn.Identity()
        super().__init__(nn.Dropout2d(settings.dropout), norm, conv)


class LinearHeads(nn.Module):
    """A head for each choice of blocks."""

    def __init__(self, dim: int, classes: int, choices: Sequence[tuple[int, ...]], settings: HeadSettings):
        super().__init__()
        self.choices = tuple(choices)
        self.heads = nn.ModuleList(LinearHead(dim * len(choice), classes, settings) for choice in choices)

    def forward(self, features: dict[int, Tensor]) -> list[Tensor]:
        """Features [B, D, h, w] by block -> logits [B, C, h, w] for each choice."""
        pairs = zip(self.choices, self.heads, strict=True)
        return [head(torch.cat([features[block] for block in choice], dim=1)) for choice, head in pairs]
