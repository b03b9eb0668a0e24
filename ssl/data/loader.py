"""Which images a step sees, the processes that read them, and those that cannot be read."""

import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate, get_worker_info

from skipless.common import distributed
from skipless.common.files import write_text
from skipless.common.pixels import normalize
from skipless.datasets.images import ImageSource
from skipless.ssl.data.crops import CropDataset, Crops, collate
from skipless.ssl.data.device_crops import (
    DeviceCropDataset,
    DeviceCrops,
    collate_images,
    crops_on_device,
    decodes_jpegs,
)
from skipless.ssl.data.masks import Masks, masked

Batch = TypeVar("Batch")


def leave_signals_to_main(_worker: int) -> None:
    """For loader workers: a scheduler signals every process of a job, and it is the main one that saves and ends."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def loader_workers(wanted: int | None, device: torch.device) -> int:
    """Loader processes for this process: those wanted, or with a GPU its share of the cores but two, which launch
    kernels, go backward, pin memory and talk to other GPUs; none on a CPU, which needs the cores itself."""
    if wanted is not None:
        return wanted
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, cores // local_processes - 2) if device.type == "cuda" else 0


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
        share = self.batch // (self.accumulate * distributed.world_size())
        order_of = -1
        for step in range(self.start, self.total):
            epoch, position = divmod(step, per_epoch)
            if epoch != order_of:
                order, order_of = np.random.default_rng((self.seed, epoch)).permutation(self.images), epoch
            for micro in range(self.accumulate):
                first = position * self.batch + (micro * distributed.world_size() + distributed.rank()) * share
                yield [(epoch, int(index)) for index in order[first : first + share]]


def shared(collate: Callable[[Any], Any], samples: Any) -> Any:
    """What `collate` makes of samples, its tensors in shared memory already where a loader process makes it.

    They get there anyway, but from a thread of torch's whose errors are lost: with a full /dev/shm, training would
    wait forever.
    """
    batch = collate(samples)
    if get_worker_info() is not None:
        for tensor in _tensors(batch):
            tensor.share_memory_()
    return batch


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, dict | tuple):
        for part in batch.values() if isinstance(batch, dict) else batch:
            yield from _tensors(part)


def step_loader(
    dataset: Dataset[Any],
    batches: StepBatches,
    workers: int,
    device: torch.device,
    collate: Callable[..., Any] | None = None,
) -> DataLoader[Any]:
    """Loads the micro-batches of all steps, in `workers` processes."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=partial(shared, collate or default_collate),
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_signals_to_main,
    )


def crop_loader(
    images: ImageSource,
    crops: Crops,
    batches: StepBatches,
    workers: int,
    device: torch.device,
    bf16: bool = False,
    draw_masks: Callable[..., np.ndarray] | None = None,
) -> tuple[DataLoader[Any], Callable[[dict[str, Any]], tuple[list[Tensor], Tensor, Masks]]]:
    """The micro-batches of all steps, and what makes three things of one, on the device.

    These are its crops [views * B, 3, S, S], normalized, globals first, locals second if there are any; the global ones
    as Gram's teacher sees them; and masks, which are there with `draw_masks` (see `MaskedDataset`). With `bf16` crops
    that are made on a GPU are bf16.
    """

    def loader(dataset: Dataset[Any], collate: Callable[..., Any]) -> DataLoader[Any]:
        if draw_masks is not None:
            dataset, collate = masked(dataset, collate, draw_masks, batches.seed)
        return step_loader(dataset, batches, workers, device, collate)

    def normalized(batch: dict[str, Any]) -> list[Tensor]:
        views = [batch[name] for name in ("global", "local", "larger") if batch[name] is not None]
        return [normalize(view.to(device, non_blocking=True)) for view in views]

    def prepare(batch: dict[str, Any]) -> tuple[list[Tensor], Tensor, Masks]:
        made = make(batch)
        return made[: crops.sizes], (made[crops.sizes :] or made)[0], batch.get("masks", Masks()).to(device)

    if crops_on_device(crops, device):
        jpegs = crops.device == "device" and decodes_jpegs(device)
        on_device = DeviceCropDataset(images, crops, batches.seed, jpegs=jpegs)
        dtype = torch.bfloat16 if bf16 and device.type == "cuda" else torch.float32
        make: Callable[[dict[str, Any]], list[Tensor]] = DeviceCrops(on_device, device, dtype)
        return loader(on_device, collate_images), prepare
    make = normalized
    return loader(CropDataset(images, crops, batches.seed), collate), prepare


def micro_batches(batches: Iterator[Batch], accumulate: int) -> Iterator[tuple[Batch, bool]]:
    """The next step's micro-batches, and whether each is the last of them."""
    for number, batch in enumerate(islice(batches, accumulate)):
        yield batch, number == accumulate - 1


class UnreadableImages:
    """Lists the images that no process could read in a file, and stops a run that has too many of them.

    Args:
        share: of the images, the largest to be put up with (data.max_unreadable); path: of the file.
    """

    def __init__(self, images: ImageSource, share: float, path: Path):
        self.images, self.share, self.path = images, share, path
        known = set(path.read_text().splitlines()) if path.exists() else set()  # by a run that is resumed
        self.here: set[str] = known if len(known) <= share * len(images) else set()  # too many have been mended since
        self.everywhere: set[str] = set()

    def add(self, lines: list[str]) -> None:
        """Note `path: reason` of images that this process could not read."""
        self.here.update(lines)

    def check(self, save: Callable[[], object]) -> None:
        """Write the file where there are new ones. All processes must call it.

        Args:
            save: called where there are too many, before the run ends.

        Raises:
            ValueError: there are too many.
        """
        everywhere = set().union(*distributed.gather_objects(self.here))
        if everywhere == self.everywhere:
            return
        self.everywhere = everywhere
        if distributed.rank() == 0:
            write_text(self.path, "".join(f"{line}\n" for line in sorted(everywhere)))
        if len(everywhere) > self.share * len(self.images):
            save()
            raise ValueError(
                f"{len(everywhere)} of {len(self.images)} images in {self.images.origin} cannot be read, more than "
                f"data.max_unreadable ({self.share:g}) allows: {'; '.join(sorted(everywhere)[:5])}; "
                f"{self.path} has all. The run is saved: mend them, and go on with --resume"
            )

    def in_words(self) -> list[str]:
        """A sentence, where there were any."""
        if not self.everywhere:
            return []
        return [f"{len(self.everywhere):,} of {len(self.images):,} images could not be read: {self.path} lists them"]
