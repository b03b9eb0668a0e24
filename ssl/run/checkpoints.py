"""Checkpoints that appear whole or not at all, of whole and of sharded runs, and the exported backbone."""

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from skipless.common import distributed
from skipless.common.files import refused, save_tensors, write_atomically, write_text
from skipless.common.settings import renamed
from skipless.ssl.dino import DINOModel
from skipless.ssl.model.build import filled_backbone
from skipless.ssl.model.files import GUARDS
from skipless.ssl.model.vit import VisionTransformer
from skipless.ssl.optim.optimizers import Optimizer
from skipless.ssl.optim.sharded import ShardedOptimizer
from skipless.ssl.run.folder import older_beside, point_last_at, whole_checkpoints
from skipless.ssl.run.parallel import assemble

SHARDED = ("student", "teacher", "optimizer")  # what of a sharded run's state is written in parts

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


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `folder`/step-N.pt, point last.pt at it, and delete all but the `keep` newest up to it.

    Args:
        state: what is written; the checkpoint of the step that it names as `spared`, if any, is not deleted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step}.pt"
    save_tensors(path, state)
    point_last_at(folder, path.name)
    _delete_old(path, keep, state.get("spared"))
    return path


def _delete_old(saved: Path, keep: int, spared: int | None) -> None:
    """Keep the checkpoint that was just saved, `keep` - 1 before it, that of a step to be spared, and any that a run
    took further before."""
    whole = whole_checkpoints(saved.parent)
    for old in whole[: max(0, whole.index(saved) + 1 - keep)]:
        if old.stem == f"step-{spared}":
            continue
        if old.is_dir():
            _delete(old)
        else:
            old.unlink()


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of any version onto the CPU, without unpickling anything but tensors and plain values.

    Settings and tensors come under today's names.

    Raises:
        ValueError: the file is missing, damaged, or holds something else.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    try:
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():
                raise ValueError(f"the checksum of {damaged} in it is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path} cannot be read as a checkpoint ({reason}); it is damaged or of another kind{older_beside(path)}"
        ) from None
    if not isinstance(state, dict) or not {"student", "shards"} & state.keys():
        raise ValueError(f"{path} is no checkpoint of a pretraining run: it has no student; give one from checkpoints/")
    state["settings"] = renamed(state["settings"])
    if "centre" in state.get("objective", {}):
        state["objective"]["center"] = state["objective"].pop("centre")
    return state


def export_backbone(folder: Path, backbone: VisionTransformer, about: dict[str, Any]) -> None:
    """Write backbone.safetensors (float32) and backbone.json (`architecture` and `about`) into a run's folder.

    The architecture is in the safetensors' metadata too: tensors do not tell heads, nor whether there are skips. Where
    there are none, or attention is shaped, one tensor more keeps libraries whose networks differ from taking the rest.
    """
    tensors = {name: tensor.detach().cpu().float().contiguous() for name, tensor in backbone.state_dict().items()}
    guarded = (not backbone.architecture["residual"], backbone.architecture.get("shaped", False))
    tensors |= {name: torch.ones(1) for name, there in zip(GUARDS, guarded, strict=True) if there}
    metadata = {"architecture": json.dumps(backbone.architecture)}
    write_atomically(folder / "backbone.safetensors", lambda beside: save_file(tensors, beside, metadata))
    write_text(folder / "backbone.json", json.dumps({"architecture": backbone.architecture, **about}, indent=1) + "\n")


def load_run_backbone(folder: str | Path) -> tuple[VisionTransformer, dict[str, Any]]:
    """The backbone that a run exported, in evaluation mode, and what backbone.json says.

    Raises:
        ValueError: the folder has no exported backbone, or a damaged one.

    Examples:
        >>> backbone, about = load_run_backbone("runs/demo")  # doctest: +SKIP
    """
    folder = Path(folder)
    if not (folder / "backbone.json").exists():
        raise ValueError(f"{folder} has no backbone.json; give the folder of a finished pretraining run")
    try:
        about = json.loads((folder / "backbone.json").read_bytes())
        architecture = about["architecture"]
        tensors = load_file(folder / "backbone.safetensors")
        for name in GUARDS:
            tensors.pop(name, None)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise ValueError(f"{folder} holds a damaged backbone ({error}); export it again") from None
    if not isinstance(architecture, dict):
        raise ValueError(f"{folder / 'backbone.json'} states no architecture; export the backbone again")
    try:
        return filled_backbone(architecture, tensors), about
    except ValueError as error:
        raise ValueError(f"{folder / 'backbone.safetensors'} {error}") from None


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
    try:
        dcp.save(_sharded(state), storage_writer=writer)
    except dcp.api.CheckpointException as error:  # on all processes
        cause = next(iter(error.failures.values()))[0]
        raise refused(path, cause) or OSError(f"{path} cannot be written ({cause}): is the disk full?") from None
    prefix = "backbone."
    teacher = {name.removeprefix(prefix): t for name, t in state["teacher"].items() if name.startswith(prefix)}
    backbone = assemble(state["architecture"], teacher)
    if first_process:
        rest = {name: value for name, value in state.items() if name not in SHARDED}
        rest["shards"] = distributed.world_size()
        save_tensors(beside / "state.pt", rest)
        settings = state["settings"]
        export_backbone(beside, backbone, {"pool": settings["model"]["pool"], "step": step, "settings": settings})
        if path.exists():  # written by a job that was killed before it pointed last.pt here
            _delete(path)
        os.rename(beside, path)
        point_last_at(folder, f"{path.name}/state.pt")
        _delete_old(path, keep, state.get("spared"))
    distributed.any_process(False)  # no process ends, and with it the job, before the folder has its name
    return path


def _delete(path: Path) -> None:
    """Remove a checkpoint that is whole, so that no part of it is ever found under its name."""
    hidden = path.with_name(f".{path.name}.old")
    os.rename(path, hidden)
    shutil.rmtree(hidden)


def load_shards(path: Path, student: DINOModel, teacher: DINOModel, optimizer: Optimizer) -> None:
    """Fill sharded models and their optimizer from the checkpoint whose state.pt is given, of any number of processes.

    Raises:
        ValueError: files are missing, damaged, of another model, or hold something else than tensors.
    """
    import torch.distributed.checkpoint as dcp

    folder = path.resolve().parent
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
            f"{older_beside(path)}"
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
