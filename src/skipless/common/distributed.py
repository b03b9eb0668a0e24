"""One process or many: the process group, the few reductions that training needs, and who sees which images.

Under torchrun (or any launcher that sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT) there is a process
group: NCCL on CUDA, gloo on CPU. Without, every function here does what it should for one process.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

PR_SET_PDEATHSIG = 1  # linux/prctl.h


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
            local = int(os.environ.get("LOCAL_RANK", 0))
            if "TORCHELASTIC_RUN_ID" not in os.environ:  # srun may show each task a GPU of its own, always number 0
                local %= torch.cuda.device_count()
            chosen = torch.device("cuda", local)
        if (chosen.index or 0) >= (count := torch.cuda.device_count()):
            raise ValueError(f"there is no GPU {chosen.index} here, of {count}: their numbers begin at 0")
        torch.cuda.set_device(chosen)
        # float32 is float32: left alone, convolutions would use TF32.
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        # Killed, torchrun would leave us to train on, and to meet the run that is started again.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if "RANK" in os.environ and not dist.is_initialized():
        # gloo beside NCCL: what the host decides together (to stop, say) then never waits for the device.
        dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
    return chosen


def wait_for_all() -> None:
    """Wait until every process is here: for the end of a command, before `stop`.

    Gloo's threads have then let go of the tensors of the last exchange. DistributedDataParallel keeps these threads
    alive beyond `stop`, and one that lets go of a tensor while the interpreter ends aborts the process.
    """
    any_process(False)  # torch's barrier would be NCCL's, which waits for the devices


def stop() -> None:
    """Leave the process group, if there is one: after success alone, since this may wait for processes that still sit
    in a collective."""
    if dist.is_initialized():
        dist.destroy_process_group()


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


def sync(model: nn.Module) -> None:
    """Give all processes the first one's parameters and buffers."""
    for tensor in chain(model.parameters(), model.buffers()):
        broadcast(tensor.data)


def seed_step(seed: int, step: int, steps: int) -> None:
    """Let torch's random numbers in a step of a run of `steps` depend on (seed, step, rank) alone, so that a run that
    is resumed has no random state to restore."""
    torch.manual_seed((seed * steps + step) * world_size() + rank())


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
