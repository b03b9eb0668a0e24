"""What a training command does around its loop, whatever it trains.

Settings from the command line and what contradicts itself in them, the backbone at its start, the checkpoint to go on
from, the signals that end a job, and what to ask of the machine.
"""

import ctypes
import importlib.util
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import yaml

from skipless.common import distributed
from skipless.common.settings import flat, plain, renamed
from skipless.ssl.config import ModelSettings, changed_initialization, embedding_of, initialization_of
from skipless.ssl.data.squares import Images, normalized_squares
from skipless.ssl.model.attention import choose_backend
from skipless.ssl.model.embedding import images_to_whiten_on, sine_positions_, whiten_patches_
from skipless.ssl.model.initialization import PRESETS, choose_beta, skipless_init_
from skipless.ssl.model.vit import SIZES, VisionTransformer
from skipless.ssl.run.checkpoints import load_checkpoint

if TYPE_CHECKING:
    from skipless.ssl import pretrain, supervised

    AnySettings = pretrain.Settings | supervised.Settings

T = TypeVar("T")

# Settings that came after the first runs, with the value that runs without them had.
LATER: dict[str, Any] = {
    "model.value_output": True,
    "model.query_key": True,
    "model.depth_scale": 1.0,
    "model.patches": "default",
    "model.positions": "default",
    "shard": False,
}


def check_run(settings: "AnySettings", images: int, source: str, root: Path, device: torch.device) -> None:
    """Contradictions that can be found before anything is built or written.

    Args:
        images: how many there are to train on; source: the setting that named them, for messages; root: where they lie.

    Raises:
        ValueError: naming the setting, its value, and what to do.
    """
    processes = distributed.world_size()
    for name in ("epochs", "batch_size", "accumulate", "save_every_epochs", "keep", "log_every"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} is {getattr(settings, name)}; it must be at least 1")
    if settings.seed < 0:
        raise ValueError(f"seed is {settings.seed}; it must be 0 or more")
    if settings.clip_grad < 0:
        raise ValueError(f"clip_grad is {settings.clip_grad:g}; it must be positive, or 0 for no clipping")
    if settings.optimizer.warmup_epochs >= settings.epochs:
        raise ValueError(
            f"optimizer.warmup_epochs is {settings.optimizer.warmup_epochs:g} in a run of {settings.epochs} epochs; "
            "the learning rate would never reach its peak: lower it, or raise epochs"
        )
    changed = [*changed_initialization(settings.model)]
    if changed and initialization_of(settings.model) == "default":
        raise ValueError(
            f"model.{changed[0]} belongs to the skipless initializations; give model.init {', '.join(PRESETS)}"
        )
    idle = {"value_output": ("c",), "query_key": ("alpha", "beta", "depth_scale")}
    for part, names in idle.items():
        given = [name for name in names if name in changed]
        if given and not getattr(settings.model, part):
            raise ValueError(f"model.{given[0]} has no effect with model.{part} false; leave one of them out")
    if settings.model.beta == "auto" and settings.model.residual:
        raise ValueError("model.beta auto is for skipless models, and model.residual is true; give a number")
    if not settings.model.depth_scale > 0:
        raise ValueError(f"model.depth_scale is {settings.model.depth_scale:g}; it must be positive")
    choose_backend(device, settings.model.attention)
    if settings.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError("wandb is true, but the package is not installed; pip install wandb, or leave it out")
    if settings.model.patch < 1:
        raise ValueError(f"model.patch is {settings.model.patch}; it must be at least 1")
    if settings.batch_size % (processes * settings.accumulate):
        raise ValueError(
            f"batch_size {settings.batch_size} cannot be shared out over {processes} processes x {settings.accumulate} "
            "micro-batches (accumulate); choose a multiple of their product"
        )
    if images < settings.batch_size:
        raise ValueError(
            f"{source} {root} has {images} images, fewer than one batch; lower batch_size ({settings.batch_size})"
        )
    out = Path(settings.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out is {out}, which is a file; give a folder")
    if out.exists() and root.is_dir() and out.samefile(root):
        raise ValueError(f"out is the folder of the images, {out}; give the run a folder of its own")
    if any((out / name).exists() for name in ("checkpoints/last.pt", "backbone.json")) and not settings.resume:
        raise ValueError(f"{out} already holds a run; add --resume to continue it, or give another --out")


def check_size(name: str, size: int, patch: int) -> None:
    """Raise ValueError, with the sizes nearest to it, where the side of an image is no multiple of the patch."""
    if size % patch:
        near = sorted({max(patch, size // patch * patch), (size // patch + 1) * patch})
        raise ValueError(
            f"{name} is {size}, which is no multiple of model.patch {patch}; use {' or '.join(map(str, near))}"
        )


def build_backbone(model: ModelSettings, image_size: int, seed: int) -> VisionTransformer:
    """The backbone at its start, initialized as the settings say.

    Draws from torch's global random state, except for the skipless initialization, which draws from `seed`. Only
    whitened patches are missing: they need images, see `whiten`.
    """
    overrides = {name: getattr(model, name) for name in ("dim", "depth", "heads") if getattr(model, name) is not None}
    backbone = VisionTransformer(
        **(SIZES[model.size] | overrides),
        patch=model.patch,
        residual=model.residual,
        registers=model.registers,
        layer_scale=model.layer_scale,
        drop_path=model.drop_path,
        image_size=image_size,
        attention=model.attention,
        checkpoint_activations=model.checkpoint_activations,
    )
    preset = initialization_of(model)
    if preset != "default":
        skipless_init_(backbone, **(PRESETS[preset] | changed_initialization(model)), seed=seed)
    if embedding_of(model)[1] == "sines":
        sine_positions_(backbone)
    return backbone


def whiten(backbone: VisionTransformer, settings: "AnySettings", images: Images, image_size: int) -> None:
    """Whiten the patch embedding, if the settings say so and the run does not go on from a checkpoint.

    The first process does, from which the others get their weights when they come together for training.

    Args:
        images: those to train on; some hundred, evenly spread, are looked at.
        image_size: side of the squares that are cut out of them, in pixels.

    Raises:
        ValueError: none of them can be read, or all patches are the same.
    """
    if embedding_of(settings.model)[0] == "whitened" and not _goes_on(settings) and distributed.rank() == 0:
        squares = normalized_squares(images, images_to_whiten_on(image_size, settings.model.patch), image_size)
        whiten_patches_(backbone.patch_embed.proj, squares, settings.seed)


def _goes_on(settings: "AnySettings") -> bool:
    """Whether the run has a checkpoint, and is to go on from it."""
    out = Path(settings.out)
    return settings.resume and (out / "settings.yaml").exists() and (out / "checkpoints" / "last.pt").exists()


def settle_embedding(model: ModelSettings) -> None:
    """Put words in the place of `model.patches` and `model.positions` where they are not given."""
    model.patches, model.positions = embedding_of(model)


def settle_beta(settings: "AnySettings", images: Images, image_size: int) -> str | None:
    """Put a number in the place of `model.beta: auto`: that of the run that is resumed, or else `choose_beta`'s.

    Args:
        images: those to train on; 32 of them, evenly spread, are looked at.
        image_size: side of the squares that are cut out of them, in pixels.

    Returns:
        Where it is from, for a message; None where it was given.

    Raises:
        ValueError: the run that is resumed has none; no beta keeps the rank; fewer than one image can be read.
    """
    if settings.model.beta != "auto":
        return None
    # By one process, on its CPU: all have to start from the same number, whatever their machines see and round to.
    beta = 0.0
    goes_on = _goes_on(settings)
    if distributed.rank() == 0 and goes_on:
        beta = yaml.safe_load((Path(settings.out) / "settings.yaml").read_text())["model"]["beta"]
        if beta is None:
            raise ValueError(
                f"{settings.out} is of a run that named no model.beta; leave it out, or give another --out"
            )
    elif distributed.rank() == 0:
        torch.manual_seed(settings.seed)
        start = replace(settings.model, beta=1.0)
        backbone = build_backbone(start, image_size, settings.seed)
        whiten(backbone, settings, images, image_size)
        arguments = PRESETS[initialization_of(start)] | changed_initialization(start)
        beta = choose_beta(backbone, normalized_squares(images, 32, image_size), arguments, seed=settings.seed)
    settings.model.beta = distributed.gather_objects(beta)[0]
    return "as in the run so far" if goes_on else f"chosen on {min(32, len(images))} of the images"


def state_to_resume(
    settings: "AnySettings",
    architecture: dict[str, Any],
    images: int,
    source: str,
    may_change: Sequence[str] = (),
) -> dict[str, Any] | None:
    """The run's last checkpoint, if it is to be resumed and has one.

    Args:
        architecture, images, source: of the run that resumes; source is where its images lie, for messages.
        may_change: settings, or groups of them ending in a dot, that a resumed run may have others of, beside those
            that every run may.

    Raises:
        ValueError: the checkpoint is damaged, or of another architecture, other images or other settings.
    """
    path = Path(settings.out) / "checkpoints" / "last.pt"
    if not settings.resume or not path.exists():
        return None
    state = load_checkpoint(path)
    differing = [
        f"{name} is {state['architecture'].get(name)!r} there and {value!r} here"
        for name, value in architecture.items()
        if state["architecture"].get(name) != value
    ]
    if differing:
        raise ValueError(
            f"{path} is of another architecture: {', '.join(differing)}; use its settings or another --out"
        )
    if state["images"] != images:
        raise ValueError(
            f"{path} is of a run on {state['images']:,} images, and {source} has {images:,}; give the same "
            "images, or another --out"
        )
    old, new = LATER | flat(renamed(state["settings"])), flat(plain(settings))
    free = ("out", "device", "wandb", "keep", "log_every", "save_every_epochs", "accumulate", *may_change)
    groups = ("data.", "model.attention", "model.checkpoint", *(name for name in may_change if name.endswith(".")))
    differing = [
        f"{name} is {old.get(name)!r} there and {value!r} here"
        for name, value in new.items()
        if old.get(name) != value and name not in free and not name.startswith(groups)
    ]
    if differing:
        raise ValueError(
            f"{path} is of a run with other settings: {', '.join(differing)}; use its own, or another --out"
        )
    return state


class Interruption:
    """Notes SIGTERM and SIGUSR1, which schedulers send before they end a job."""

    def __init__(self) -> None:
        self.yes = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, *_: Any) -> None:
        self.yes = True


def keep_freed_memory() -> None:
    """Stop glibc from handing large blocks back to the kernel: to fetch them anew for every tensor of every step costs
    page faults that take a good part of the step. Elsewhere than on glibc this does nothing."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_threshold, gigabyte = -1, -3, 1 << 30
        # Older glibc refuses a threshold above 32 MB; to set only the other one would make things worse.
        if ctypes.CDLL(None).mallopt(mmap_threshold, gigabyte):
            ctypes.CDLL(None).mallopt(trim_threshold, gigabyte)
