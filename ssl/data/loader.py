"""Which images a step sees, and the processes that read them."""

import os
import signal
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler

from skipless.common.distributed import rank, world_size


def leave_signals_to_main(_worker: int) -> None:
    """For loader workers: a scheduler signals every process of a job, and it is the main one that saves and ends."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def loader_workers(wanted: int | None, device: torch.device) -> int:
    """Loader processes for this process: those wanted, or all cores shared out with a GPU and none on a CPU, which
    needs the cores itself."""
    if wanted is not None:
        return wanted
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return cores // local_processes if device.type == "cuda" else 0


class StepBatches(Sampler[list[tuple[int, int]]]):
    """The (epoch, index) keys of this process's micro-batches, from step `start` to `total`.

    Each epoch is a permutation that depends on (seed, epoch) alone; a step takes the next `batch` images of it, and
    what is left at its end is dropped. The images of a step do not depend on the number of processes or of
    micro-batches, and any step can be started from.

    Args:
        images: size of the data set; batch: images per step, over all processes and micro-batches.
        accumulate: micro-batches per step and process.
    """

    def __init__(self, images: int, batch: int, accumulate: int, seed: int, start: int, total: int):
        self.images, self.batch, self.accumulate = images, batch, accumulate
        self.seed, self.start, self.total = seed, start, total

    def __len__(self) -> int:
        return (self.total - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per_epoch = self.images // self.batch
        share = self.batch // (self.accumulate * world_size())
        order_of = -1
        for step in range(self.start, self.total):
            epoch, position = divmod(step, per_epoch)
            if epoch != order_of:
                order, order_of = np.random.default_rng((self.seed, epoch)).permutation(self.images), epoch
            for micro in range(self.accumulate):
                first = position * self.batch + (micro * world_size() + rank()) * share
                yield [(epoch, int(index)) for index in order[first : first + share]]
