"""What a run measures of itself between two log lines: averages, kept on the device until then, and speed."""

import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from skipless.common import distributed
from skipless.common.hardware import memory_gb, peak_flops

Batch = TypeVar("Batch")


class Meter:
    """Averages over micro-batches, images per second, and the share of time spent waiting for data.

    Args:
        names: of what is averaged; images: in a micro-batch, over all processes; flops: of one image's training.
    """

    def __init__(self, names: Sequence[str], images: int, flops: float, device: torch.device):
        self.names, self.images_at_once, self.flops, self.device = names, images, flops, device
        self.sums = torch.zeros(len(names), device=device)
        self.micro_batches = 0
        self.norms: list[Tensor] = []
        self.restart_clock()

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; the time it takes to get them counts as waiting for data."""
        while True:
            asked = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.waited += time.perf_counter() - asked
            yield batch

    def add(self, *values: Tensor) -> None:
        """Count one micro-batch."""
        self.sums += torch.stack([value.detach().float() for value in values])
        self.micro_batches += 1
        self.images += self.images_at_once

    def add_gradient(self, norm: Tensor) -> None:
        """Count the gradient of one step, the same on all processes."""
        self.norms.append(norm)

    def restart_clock(self) -> None:
        """Leave the time up to now out of images per second and of the wait for data."""
        self.seconds_from, self.images, self.waited = time.perf_counter(), 0, 0.0

    def read(self) -> tuple[dict[str, float], dict[str, float]]:
        """Averages by name, over all processes, and speed, since the last call. This waits for the device.

        With the averages come `gradient_norm`, that of the last step, and `gradient_norm_max`, the largest.
        """
        norms = torch.stack(self.norms)
        means = distributed.all_reduce_mean(self.sums / self.micro_batches)
        values = torch.cat([means, norms[-1:], norms.max()[None]]).tolist()
        seconds = time.perf_counter() - self.seconds_from
        speed = {
            "images_per_second": self.images / seconds,
            "data_share": self.waited / seconds,
            "memory_gb": memory_gb(self.device),
        }
        if peak := peak_flops(self.device):
            share = self.flops / (peak * distributed.world_size())
            speed["model_flops_utilisation"] = speed["images_per_second"] * share
        self.sums.zero_()
        self.micro_batches = 0
        self.norms.clear()
        self.restart_clock()
        return dict(zip([*self.names, "gradient_norm", "gradient_norm_max"], values, strict=True)), speed
