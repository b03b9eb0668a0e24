"""Samples that worker processes read; what cannot be read ends in one sentence."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader, Dataset

from skipless.ssl.data.loader import leave_signals_to_main

Key = TypeVar("Key")
Sample = TypeVar("Sample")


@dataclass
class Unreadable:
    """Stands for a sample that could not be read: an exception would reach the main process without its type."""

    reason: str


def read_batches(
    read: Callable[[Key], Sample], batches: Iterable[Sequence[Key]], workers: int
) -> Iterator[list[Sample]]:
    """The samples of one batch after the other, each batch read by one worker.

    Args:
        read: a sample by its key; it must be possible to pickle it.

    Raises:
        ValueError: what `read` raised as ValueError or OSError.
    """
    for samples in read_batches_leniently(read, batches, workers):
        for sample in samples:
            if isinstance(sample, Unreadable):
                raise ValueError(sample.reason)
        yield samples  # type: ignore[misc]


def read_batches_leniently(
    read: Callable[[Key], Sample], batches: Iterable[Sequence[Key]], workers: int
) -> Iterator[list[Sample | Unreadable]]:
    """As `read_batches`, with `Unreadable` in the place of what could not be read."""
    return iter(
        DataLoader(
            _Samples(read),
            batch_sampler=batches,  # type: ignore[arg-type]
            num_workers=workers,
            collate_fn=list,
            worker_init_fn=leave_signals_to_main,
        )
    )


class _Samples(Dataset[Any], Generic[Key, Sample]):
    def __init__(self, read: Callable[[Key], Sample]):
        self.read = read

    def __getitem__(self, key: Key) -> Sample | Unreadable:
        try:
            return self.read(key)
        except (ValueError, OSError) as error:
            return Unreadable(str(error))
