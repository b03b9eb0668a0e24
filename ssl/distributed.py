"""One process or many: the process group, the few reductions that training needs, and who sees which images.

Under torchrun (or any launcher that sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT) there is a process
group: NCCL on CUDA, gloo on CPU. Without, every function here does what it should for one process.
"""

import os
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Sampler


def start(device: str = "auto") -> torch.device:
    """Join the process group if a launcher set one up, and return this process's device.

    Args:
        device: "auto" (CUDA if there is any, else CPU), "cpu", "cuda", or "cuda:N".

    Raises:
        ValueError: CUDA was asked for and there is none, or the name is no device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device is {device!r}; choose auto, cpu, cuda or cuda:N") from None
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device is {device!r}, but torch finds no CUDA here; use --device cpu or auto")
        if chosen.index is not None and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
            raise ValueError(f"device is {device!r}, which would put all processes on one GPU; use --device cuda")
        if chosen.index is None:
            chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(chosen)
    if "RANK" in os.environ and not dist.is_initialized():
        # gloo beside NCCL: what the host decides together (to stop, say) then never waits for the device.
        dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
    return chosen


def wait_for_all() -> None:
    """Wait until every process is here: for the end of a command, before `stop`.

    Gloo's threads have then let go of the tensors of the last exchange. DistributedDataParallel keeps these threads
    alive beyond `stop`, and one that lets go of a tensor while the interpreter ends aborts the process.
    """
    if world_size() > 1:
        dist.barrier()


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


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


def rank() -> int:
    """This process's number, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of `x` over all processes; in place where there are several."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def all_reduce_mean(x: Tensor) -> Tensor:
    """The mean of `x` over all processes; in place where there are several."""
    return all_reduce_sum(x).div_(world_size()) if world_size() > 1 else x


def all_reduce_max(x: Tensor) -> Tensor:
    """The maximum of `x` over all processes; in place where there are several."""
    if world_size() > 1:
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def broadcast(x: Tensor) -> Tensor:
    """The first process's `x`, on all of them; in place where there are several."""
    if world_size() > 1:
        dist.broadcast(x, src=0)
    return x


def gather_objects(value: Any) -> Sequence[Any]:
    """`value` of every process, in the order of ranks, on every process."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def any_process(flag: bool) -> bool:
    """Whether `flag` is set on any process. Waits for the other hosts, not for the devices."""
    return bool(all_reduce_sum(torch.tensor(float(flag))).item())


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
