"""Fully sharded training (PyTorch's FSDP2) for models that are too large for one GPU with all that training adds.

Every process keeps one part of each parameter, of its gradient and of the optimizer's state, for the student and for
the teacher. A block's parameters are gathered when it runs and let go of after it. What is element-wise (AdamW, the
teacher's moving average) then works on the parts as they are; what is not is here: the gradient's norm, checkpoints,
and the backbone as a whole; and in ssl/optim/sharded.py: SOAP and Muon. docs/scaling.md says when this pays.
"""

import os
import pickle
import shutil
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from skipless.common import distributed
from skipless.common.files import write_atomically
from skipless.ssl.dino import DINOModel
from skipless.ssl.model.attention import Backend
from skipless.ssl.model.vit import VisionTransformer
from skipless.ssl.optim.optimizers import Optimizer
from skipless.ssl.optim.sharded import ShardedOptimizer
from skipless.ssl.run.checkpoints import export_backbone, point_last_at

if TYPE_CHECKING:
    from torch.distributed.tensor import Shard

    from skipless.ssl.config import Settings

# torch's modules for sharding are imported where they are needed: they take a second, at every start of every run.

SHARDED = ("student", "teacher", "optimizer")  # what of a run's state is written in parts

# All that the index of a sharded checkpoint refers to. It is a pickle, and a pickle can call anything.
_INDEX_NAMES = {
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch", "float32"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
}


def check_shard(settings: "Settings") -> None:
    """Raise ValueError where `shard` is true without a process group, or beside a setting that it cannot go with."""
    if settings.shard and not dist.is_initialized():
        raise ValueError(
            "shard is true, but no launcher has started the processes to shard over; use torchrun (--nproc-per-node 1 "
            "does for one GPU), or leave shard out"
        )
    if settings.shard and settings.compile:
        raise ValueError("shard and compile are true; they have not been made to work together: leave one of them out")


def shard(student: DINOModel, teacher: DINOModel, bf16: bool) -> None:
    """Cut both models over all processes, in place: each block is gathered by itself, the rest with the head.

    Args:
        student, teacher: whole models on this process's device. All processes get the first one's numbers.
        bf16: gather the blocks in bf16, to be used under autocast on CUDA. Parameters stay float32 where they are
            updated, and gradients are reduced in float32. The rest is gathered in float32, so that embeddings, the
            final norm and prototypes are what they are without sharding. Without effect on a CPU.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    device = student.backbone.pos_embed.device.type
    mesh = init_device_mesh(device, (distributed.world_size(),))
    blocks_policy = MixedPrecisionPolicy()
    if bf16 and device == "cuda":
        # Autocast casts what enters a layer; cast for the whole block, the residual stream would lose its float32.
        blocks_policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for model in (student, teacher):
        for tensor in chain(model.parameters(), model.buffers()):
            distributed.broadcast(tensor.data)
        for block in model.backbone.blocks:
            fully_shard(
                block,
                mesh=mesh,
                reshard_after_forward=True,
                shard_placement_fn=_placement,
                mp_policy=blocks_policy,
            )
        # A backward pass would let go of what is kept after the forward pass. The teacher has none, and would go on
        # with the parameters of its first step.
        keep = model is student
        fully_shard(model, mesh=mesh, reshard_after_forward=not keep, shard_placement_fn=_placement)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has cut it."""
    return hasattr(model, "set_requires_gradient_sync")


def _placement(parameter: nn.Parameter) -> "Shard | None":
    """The axis to cut, None for the first one.

    Of an axis of length 1 (tokens, positions) all processes but one would get padding, as large as the whole and sent
    around like it. Another axis must be divisible.
    """
    from torch.distributed.tensor import Shard

    last_divides = parameter.shape[-1] % distributed.world_size() == 0
    return Shard(parameter.ndim - 1) if parameter.ndim > 2 and parameter.shape[0] == 1 and last_divides else None


def hold_reduction(model: nn.Module, hold: bool) -> AbstractContextManager[None]:
    """Where `hold` is true, backward passes within leave their gradients on this process: for all micro-batches of a
    step but the last. With FSDP2 a process then holds the gradients of the whole model."""
    if is_sharded(model):
        model.set_requires_gradient_sync(not hold)  # type: ignore[operator]
    return model.no_sync() if hold and isinstance(model, DistributedDataParallel) else nullcontext()


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """`nn.utils.clip_grad_norm_`, over the parts on all processes where gradients are sharded.

    Returns:
        float32 []: the norm over all gradients before they were scaled down to at most `limit`.
    """
    parameters = list(parameters)
    shards = [p.grad.to_local() for p in parameters if p.grad is not None and hasattr(p.grad, "to_local")]
    if not shards:
        return nn.utils.clip_grad_norm_(parameters, limit)
    norm = distributed.all_reduce_sum(nn.utils.get_total_norm(shards).square()).sqrt()
    torch._foreach_mul_(shards, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


def full_backbone(teacher: DINOModel) -> VisionTransformer:
    """The backbone with whole parameters on this process, in evaluation mode: a copy of a sharded one, in float32,
    otherwise the model's own. All processes must call it."""
    if not is_sharded(teacher):
        return teacher.backbone
    return _assemble(teacher.backbone.architecture, teacher.backbone.state_dict(), teacher.backbone.attention)


def _assemble(
    architecture: dict[str, Any], tensors: Mapping[str, Tensor], attention: Backend = "auto"
) -> VisionTransformer:
    with torch.device("meta"):
        backbone = VisionTransformer(**architecture, attention=attention)
    whole = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in tensors.items()}
    backbone.load_state_dict(whole, assign=True)
    return backbone.requires_grad_(False).eval()


def save_shards(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `folder`/step-N, point last.pt into it, and delete all but the `keep` newest. All processes must call it.

    The parts of student, teacher and optimizer are in the format of torch.distributed.checkpoint, one file for each
    process; state.pt holds everything else; backbone.safetensors is the teacher's backbone, as at the end of a run. The
    folder appears under its name when all of it is on the disk. Processes on several machines must share the file
    system.

    Args:
        state: what `save_checkpoint` takes, with the state dicts of sharded modules and of their optimizer.
    """
    import torch.distributed.checkpoint as dcp

    beside, path = folder / f".step-{step}", folder / f"step-{step}"
    first_process = distributed.rank() == 0
    if first_process:
        for unfinished in folder.glob(".step-*"):  # of a job that was killed while it wrote
            shutil.rmtree(unfinished)
        beside.mkdir(parents=True)
    distributed.any_process(False)  # the folder is there
    writer = dcp.FileSystemWriter(beside)  # waits for the disk
    dcp.save(_sharded(state), storage_writer=writer)
    prefix = "backbone."
    teacher = {name.removeprefix(prefix): t for name, t in state["teacher"].items() if name.startswith(prefix)}
    backbone = _assemble(state["architecture"], teacher)
    if first_process:
        rest = {name: value for name, value in state.items() if name not in SHARDED}
        rest["shards"] = distributed.world_size()
        write_atomically(beside / "state.pt", lambda file: torch.save(rest, file))
        settings = state["settings"]
        export_backbone(beside, backbone, {"pool": settings["model"]["pool"], "step": step, "settings": settings})
        if path.exists():  # written by a job that was killed before it pointed last.pt here
            _delete(path)
        os.rename(beside, path)
        point_last_at(folder, f"{path.name}/state.pt")
        by_step = sorted(folder.glob("step-*"), key=lambda p: int(p.name.removeprefix("step-")))
        for old in by_step[:-keep]:
            _delete(old)
    distributed.any_process(False)  # no process ends, and with it the job, before the folder has its name
    return path


def _delete(path: Path) -> None:
    """Remove a checkpoint that is whole, so that no part of it is ever found under its name."""
    hidden = path.with_name(f".{path.name}.old")
    os.rename(path, hidden)
    shutil.rmtree(hidden)


def load_shards(folder: Path, student: DINOModel, teacher: DINOModel, optimizer: Optimizer) -> None:
    """Fill sharded models and their optimizer from the last checkpoint in `folder`, written by any number of processes.

    Raises:
        ValueError: files are missing, damaged, of another model, or hold something else than tensors.
    """
    import torch.distributed.checkpoint as dcp

    folder = (folder / "last.pt").resolve().parent
    _fill_state(student, optimizer)
    state = {"student": student.state_dict(), "teacher": teacher.state_dict(), "optimizer": optimizer.state_dict()}
    try:
        for index in {folder / ".metadata", *folder.glob("*.metadata")}:
            with open(index, "rb") as file:
                _IndexUnpickler(file).load()
        dcp.load(_sharded(state), storage_reader=dcp.FileSystemReader(folder))
    except (Exception, dcp.api.CheckpointException) as error:
        failures = getattr(error, "failures", {})
        cause = next(iter(failures.values()))[0] if failures else error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise ValueError(
            f"{folder} cannot be read as a sharded checkpoint ({reason}); it is damaged or of another kind"
        ) from None
    if isinstance(optimizer, ShardedOptimizer):
        optimizer.load_state_dict(state["optimizer"])


class _IndexUnpickler(pickle.Unpickler):
    """Reads the index of a sharded checkpoint, and refuses what no index holds."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _INDEX_NAMES:
            raise pickle.UnpicklingError(f"its index refers to {module}.{name}, and loading it could run code")
        return super().find_class(module, name)


def _sharded(state: dict[str, Any]) -> dict[str, Any]:
    """The tensors of a run's state. Options of the optimizer are left out: the settings and the step determine them."""
    return {name: state[name] for name in SHARDED} | {"optimizer": state["optimizer"]["state"]}


def _fill_state(student: DINOModel, optimizer: Optimizer) -> None:
    """Give a fresh optimizer tensors to load into, by a step that moves nothing."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
