"""Tensors out of checkpoints, whoever wrote them. Nothing is unpickled but tensors and plain values."""

import argparse
import hashlib
import json
import pathlib
import pickle
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

Weights = Literal["teacher", "student"]

ENDINGS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".pth.tar", ".pt.tar", ".tar")
# Tensors for which other libraries refuse weights that they would compute something else with: with the same names they
# would add the skips, and leave out what shapes attention.
GUARDS = ("without_skip_connections", "with_shaped_attention")
LARGEST_JSON = 2**22  # bytes; a description has hundreds
# What else weights come in, and what to do.
OTHERS = {
    ".npz": "weights of JAX: timm has most of them, as timm:vit_base_patch16_224.augreg_in21k",
    ".msgpack": "weights of Flax: give the same model's .safetensors",
    ".h5": "weights of TensorFlow: give the same model's .safetensors",
    ".onnx": "a program: give the checkpoint that it was exported from",
    ".pt2": "a program: give the checkpoint that it was exported from",
}
# Where training scripts put the state dict, in the order in which it is looked for; the first stands for the half that
# is wanted, teacher or student.
PLACES = ("state_dict", "model", "model_state_dict", "target_encoder", "encoder", "module", "backbone", "net", "ema")
# What lies beside tensors: command lines, numbers of NumPy, paths.
_SCALAR: Any = np.float64(0).__reduce__()[0]
PLAIN: list[Any] = [
    argparse.Namespace, pathlib.PosixPath, pathlib.PurePosixPath, np.dtype,
    (_SCALAR, "numpy.core.multiarray.scalar"), (_SCALAR, "numpy._core.multiarray.scalar"),
    *(type(np.dtype(name)) for name in ("float64", "float32", "float16", "int64", "int32", "uint8", "bool")),
]  # fmt: skip


class Contents(NamedTuple):
    """What a checkpoint holds."""

    tensors: dict[str, Tensor]
    architecture: dict[str, Any] | None
    """Arguments of VisionTransformer, where the file or its .json neighbor states them: then it is ours."""
    pool: str | None
    """What the head read, by the same."""


def read_checkpoint(path: Path, weights: Weights, beside: dict[str, Any]) -> Contents:
    """The tensors of a file.

    Args:
        weights: which half of a file with a "teacher" and a "student".
        beside: what the .json of the file's name says, see `description`.

    Raises:
        ValueError: it is damaged, would run code, is something else, or holds no tensors.
    """
    _require_no_page(path)
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                names = [name for name in file.keys() if name not in GUARDS]  # noqa: SIM118 (not a dict)
                tensors = {name: file.get_tensor(name) for name in names}
                stored = (file.metadata() or {}).get("architecture", "")
            if stored.startswith("{"):
                beside = {**beside, "architecture": json.loads(stored)}
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged or no safetensors file ({error}); fetch or export it again") from None
        return Contents(tensors, _stored_architecture(beside), beside.get("pool"))
    content = _unpickled(path)
    settings = content.get("settings") if isinstance(content, dict) else None
    model = settings.get("model") if isinstance(settings, dict) else None
    pool = model.get("pool") if isinstance(model, dict) else beside.get("pool")
    return Contents(_choose(path, content, weights), _stored_architecture(content), pool)


def _unpickled(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(PLAIN):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        content = f"Python objects beside tensors ({code[1]})" if code else "more than tensors and plain values"
        raise ValueError(
            f"{path} holds {content}, and loading it could run code: "
            "if you trust it, open it yourself and save its state_dict as .safetensors"
        ) from None
    except Exception as error:
        if "TorchScript" in str(error):
            raise ValueError(
                f"{path} is a TorchScript archive, which is a program: open it with torch.jit.load, and save its "
                "state_dict() as .safetensors"
            ) from None
        raise ValueError(
            f"{path} is damaged or no file of torch.save ({first_line(error)}); fetch or export it again"
        ) from None


def _require_no_page(path: Path) -> None:
    """Raises ValueError for what is often found under a checkpoint's name, and is something else."""
    with open(path, "rb") as file:
        start = file.read(512).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a pointer of Git LFS and not the file itself: fetch it with git lfs pull")
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError(f"{path} is a web page and no checkpoint, as a wrong link gives: download the file itself")


def description(path: Path) -> dict[str, Any]:
    """What a .json beside a checkpoint says; {} without one.

    Raises:
        ValueError: it is damaged.
    """
    try:
        if not path.is_file():
            return {}
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); export the backbone again, or move it away") from None
    return content if isinstance(content, dict) else {}


def _stored_architecture(content: Any) -> dict[str, Any] | None:
    """The architecture that our files state; other projects' state none, or no more than a name."""
    architecture = content.get("architecture") if isinstance(content, dict) else None
    return architecture if isinstance(architecture, dict) else None


def _choose(path: Path, content: Any, weights: Weights) -> dict[str, Tensor]:
    """The state dict in a file: at its top, or where training scripts put it."""
    if isinstance(content, dict):
        both = [key for key in ("teacher", "student") if isinstance(content.get(key), dict)]
        if weights == "student" and both == ["teacher"]:
            raise ValueError(f"{path} holds no student, only a teacher; ask for that")
        for key in (weights, *both, *PLACES):  # supervised training and distillation have a student alone
            if isinstance(content.get(key), dict):
                content = content[key]
                break
        tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        if tensors := tensors or _below(content):
            return tensors
    raise ValueError(f"{path} holds no tensors, neither at its top nor in the dicts in it: save a model's state_dict()")


def _below(content: dict[Any, Any], levels: int = 3) -> dict[str, Tensor]:
    """The tensors in dicts within a dict, with dotted names."""
    found: dict[str, Tensor] = {}
    for name, value in content.items():
        if isinstance(value, Tensor):
            found[str(name)] = value
        elif isinstance(value, dict) and levels:
            found |= {f"{name}.{inner}": tensor for inner, tensor in _below(value, levels - 1).items()}
    return found


def file_sha256(path: Path) -> str:
    """sha256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
