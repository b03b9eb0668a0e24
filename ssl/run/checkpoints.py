"""Checkpoints that appear whole or not at all, and the exported backbone."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from skipless.common.files import write_atomically, write_text
from skipless.ssl.model.vit import VisionTransformer


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `folder`/step-N.pt, point last.pt at it, and delete all but the `keep` newest."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step}.pt"
    write_atomically(path, lambda beside: torch.save(state, beside))
    point_last_at(folder, path.name)
    for unfinished in folder.glob(".step-*.pt.*"):  # of a process that was killed while it wrote
        unfinished.unlink()
    by_step = sorted(folder.glob("step-*.pt"), key=lambda p: int(p.stem.removeprefix("step-")))
    for old in by_step[:-keep]:
        old.unlink()
    return path


def point_last_at(folder: Path, name: str) -> None:
    """Make `folder`/last.pt a link to `name` in the same folder, atomically."""
    link = folder / ".last.pt"
    link.unlink(missing_ok=True)
    link.symlink_to(name)
    os.replace(link, folder / "last.pt")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, without unpickling anything but tensors and plain values.

    Raises:
        ValueError: the file is missing, damaged, or holds something else.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path} cannot be read as a checkpoint ({reason}); it is damaged or of another kind"
        ) from None
    if not isinstance(state, dict) or not {"student", "shards"} & state.keys():
        raise ValueError(f"{path} is no checkpoint of a pretraining run: it has no student; give one from checkpoints/")
    return state


def export_backbone(folder: Path, backbone: VisionTransformer, about: dict[str, Any]) -> None:
    """Write backbone.safetensors (float32) and backbone.json (`architecture` and `about`) into a run's folder.

    The architecture is in the safetensors' metadata too: tensors do not tell heads, nor whether there are skips.
    """
    tensors = {name: tensor.detach().cpu().float().contiguous() for name, tensor in backbone.state_dict().items()}
    metadata = {"architecture": json.dumps(backbone.architecture)}
    write_atomically(folder / "backbone.safetensors", lambda beside: save_file(tensors, beside, metadata))
    write_text(folder / "backbone.json", json.dumps({"architecture": backbone.architecture, **about}, indent=1) + "\n")


def load_run_backbone(folder: str | Path) -> tuple[VisionTransformer, dict[str, Any]]:
    """The backbone that a run exported, in evaluation mode, and what backbone.json says.

    Raises:
        ValueError: the folder has no exported backbone.

    Example:
        >>> backbone, about = load_run_backbone("runs/demo")  # doctest: +SKIP
    """
    folder = Path(folder)
    if not (folder / "backbone.json").exists():
        raise ValueError(f"{folder} has no backbone.json; give the folder of a finished pretraining run")
    about = json.loads((folder / "backbone.json").read_text())
    backbone = VisionTransformer(**about["architecture"])
    backbone.load_state_dict(load_file(folder / "backbone.safetensors"))
    return backbone.eval(), about
