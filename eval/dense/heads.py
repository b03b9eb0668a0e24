"""Linear heads on frozen features.

`Heads` are many linear classifiers of vectors that are trained at once, each at a learning rate of its own.
`LinearHead` is the head of the published segmentation protocols: dropout, batch norm over all processes, 1 x 1
convolution.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipless.common.distributed import all_reduce_mean, broadcast, rank, world_size
from skipless.common.progress import Progress
from skipless.ssl.optim.schedules import cosine


class Heads(nn.Module):
    """Linear classifiers of standardized patch features [P, D], one for each learning rate."""

    def __init__(self, mean: Tensor, std: Tensor, count: int, classes: int):
        super().__init__()
        self.mean, self.std, self.classes = mean, std, classes
        self.weights = nn.ParameterList(torch.zeros(len(mean), classes, device=mean.device) for _ in range(count))
        self.biases = nn.ParameterList(torch.zeros(classes, device=mean.device) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        """[P, D] -> logits [P, heads, C]."""
        # Standardization goes into the weights, which are few, and not over the features, which are many.
        weight = torch.cat(list(self.weights), dim=1) / self.std[:, None]
        bias = torch.cat(list(self.biases)) - self.mean @ weight
        return torch.addmm(bias, x.float(), weight).unflatten(1, (-1, self.classes))

    def only(self, head: int) -> "Heads":
        """One of the heads, alone."""
        alone = Heads(self.mean, self.std, 1, self.classes)
        alone.load_state_dict({"weights.0": self.weights[head].data, "biases.0": self.biases[head].data})
        return alone


def groups_by_rate(heads: Sequence[Heads], rates: Sequence[float]) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: of all heads those with one learning rate, which is also kept as the peak."""
    return [
        {"params": [p for head in heads for p in (head.weights[k], head.biases[k])], "lr": rate, "peak": rate}
        for k, rate in enumerate(rates)
    ]


def set_rates(optimizer: torch.optim.Optimizer, step: int, steps: int) -> None:
    """The learning rates of a step: half a cosine from the peak to 0."""
    for group in optimizer.param_groups:
        group["lr"] = cosine(step, steps, group["peak"], 0.0)


def row_batches(count: int, size: int, epochs: Iterable[int], seed: int) -> Iterator[np.ndarray]:
    """Rows of each step, in a new order every epoch."""
    for epoch in epochs:
        order = np.random.default_rng((seed, epoch)).permutation(count)
        for first in range(0, count, size):
            yield order[first : first + size]


def fit(
    heads: Sequence[nn.Module],
    optimizer: torch.optim.Optimizer,
    batches: Iterable[np.ndarray],
    steps: int,
    losses: Callable[[np.ndarray], Iterator[Tensor]],
) -> None:
    """Train heads in place. Each process trains them all and takes those of the first.

    Args:
        batches: rows of each of the `steps`.
        losses: of a step's rows, one after the other: each is gone before the next is made.
    """
    with Progress(total=steps, desc="linear heads", unit="step", active=rank() == 0) as progress:
        for step, rows in enumerate(batches):
            set_rates(optimizer, step, steps)
            for loss in losses(rows):
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress.update()
    for head in heads:
        for parameter in head.parameters():
            broadcast(parameter.data)


def unfinished_state(path: Path | None, identity: dict[str, Any]) -> dict[str, Any] | None:
    """What an interrupted training left in a file, which holds the `identity` that it is of; None without a file.

    Raises:
        ValueError: it is damaged, or of another training.
    """
    if path is None or not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        differs = any(state[name] != value for name, value in identity.items())
    except Exception as error:  # torch raises what its parsers raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is damaged ({reason}): delete it, or give another --out") from None
    if differs:
        raise ValueError(f"{path} is of a run with other settings, weights or images: delete it, or give another --out")
    return state


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
