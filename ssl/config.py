"""Settings of every run and of pretraining, and what becomes of them before anything is written."""

import copy
import importlib.util
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar

import torch
import yaml

from skipless.common import distributed
from skipless.common.precision import has_bf16
from skipless.common.settings import renamed
from skipless.ssl.data.crops import Crops
from skipless.ssl.data.squares import Images, normalized_squares
from skipless.ssl.dino import DINOSettings
from skipless.ssl.model.attention import choose_backend
from skipless.ssl.model.build import (
    ModelSettings,
    build_backbone,
    changed_initialization,
    embedding_of,
    initialization_arguments,
    initialization_of,
)
from skipless.ssl.model.initialization import PRESETS, choose_beta
from skipless.ssl.model.start import introduce_start
from skipless.ssl.monitor import MonitorSettings
from skipless.ssl.objectives.gram import GramSettings
from skipless.ssl.objectives.ibot import IBOTSettings
from skipless.ssl.optim.optimizers import OptimizerSettings
from skipless.ssl.run.folder import last_checkpoint
from skipless.ssl.run.trackers import TrackerName

DEEPEST = 1000  # blocks: ten times as many as any published Vision Transformer's
LARGEST_FACTOR = 1000  # of an initialization: a hundred times the published ones


@dataclass(kw_only=True)
class RunSettings:
    """What a training run depends on, whatever it trains."""

    out: str
    """Folder of the run: settings, metrics, checkpoints, and the backbone at the end."""
    model: ModelSettings = field(default_factory=ModelSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    epochs: int
    """Passes over the training images."""
    batch_size: int
    """Images per optimizer step, over all processes and micro-batches. The learning rate scales with it."""
    accumulate: int = 1
    """Micro-batches per step: the same result with a fraction of the memory."""
    clip_grad: float
    """Gradients whose norm over all parameters is larger are scaled down to it; 0 turns this off."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto is bf16 where it is fast: on GPUs from Ampere on, and on CPUs with AMX (Xeons since 2023), where it is
    the products of linear layers alone; fp32 elsewhere. Parameters are float32 in both."""
    seed: int = 0
    """Of everything random: initialization, order of the images, crops or augmentation."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    resume: bool = False
    """Continue from the last checkpoint in `out`, where there is one: bit by bit on a CPU."""
    save_every_epochs: int = 1
    """Epochs between two checkpoints; one is also written at the end and on SIGTERM or SIGUSR1."""
    keep: int = 2
    """Checkpoints kept; older ones are deleted."""
    log_every: int = 10
    """Steps between two lines of metrics. Between them the host does not wait for the GPU (but in soap's first
    step, for the eigenbases)."""
    log_to: TrackerName | None = None
    """Log to Weights & Biases, MLflow or trackio too (pip install wandb, mlflow or trackio). Addresses, keys and
    offline modes are theirs: WANDB_MODE=offline, MLFLOW_TRACKING_URI, TRACKIO_DIR."""

    @property
    def last_checkpoint(self) -> Path | None:
        """The checkpoint that the run goes on from; None where it starts."""
        return last_checkpoint(Path(self.out) / "checkpoints") if self.resume else None

    @property
    def earlier(self) -> Path | None:
        """Folder of the run that this one goes on from; None where it starts."""
        return Path(self.out) if self.last_checkpoint else None


@dataclass
class DataSettings:
    """Where the images are."""

    path: str
    """Folder of images (searched in all its subfolders; no labels needed), a zip archive of images, tar shards (their
    folder, the URL of what datasets/shard.py wrote, or a pattern as in data/{000000..000146}.tar), or hf:NAME:SPLIT for
    a data set of Hugging Face. Folders right below it are taken as classes by the monitor, never by training."""
    workers: int | None = None
    """Processes per training process that load and crop images; by default its share of the cores but two
    with a GPU, and none on a CPU, where training needs the cores itself."""
    max_unreadable: float = 0.01
    """Share of unreadable images above which the run stops and names them; below, they are skipped and listed in
    unreadable.txt."""


@dataclass(kw_only=True)
class Settings(RunSettings):
    """Everything a pretraining run depends on."""

    data: DataSettings
    crops: Crops = field(default_factory=Crops)
    dino: DINOSettings = field(default_factory=DINOSettings)
    ibot: IBOTSettings = field(default_factory=IBOTSettings)
    gram: GramSettings = field(default_factory=GramSettings)
    monitor: MonitorSettings = field(default_factory=MonitorSettings)
    epochs: int = 100
    batch_size: int = 256
    clip_grad: float = 3.0
    """Gradients whose norm over all parameters is larger are scaled down to it; 0 turns this off. (DINO clips each
    parameter's gradient by itself, which is weaker.)"""
    extend: str | None = None
    """Folder of a finished run to go on from, in a folder of its own: its student, teacher, centers and optimizer, for
    `epochs` more epochs. Schedules start anew, as these settings say; crops may be larger."""
    compile: bool | Literal["auto"] = "auto"
    """Compile student, teacher and loss (torch.compile): minutes at the start, fewer and larger kernels after. auto
    does so on GPUs, unless shard, ibot or xformers' attention are set; true does with shard too, block by block.
    Attention is then torch's. Where torch's compiler fails, the run goes on without."""
    shard: bool = False
    """Shard parameters, gradients, optimizer state and teacher over all processes (FSDP2), for models that crowd or do
    not fit one GPU, as ViT-g does; smaller ones are better off without. Under torchrun. The
    loss curve is the same, checkpoints are folders; docs/scaling.md says when it pays."""

    @property
    def earlier(self) -> Path | None:
        """Folder of the run whose weights this one starts with, before its own `out`; None where they are fresh."""
        return super().earlier or (Path(self.extend) if self.extend else None)

    @property
    def position_size(self) -> int:
        """Side of the images that the grid of positions fits, in pixels: of the global crops, or as it was before."""
        if self.extend is None:
            return self.crops.global_crops_size
        return json.loads((Path(self.extend) / "backbone.json").read_text())["architecture"]["image_size"]


S = TypeVar("S", bound=RunSettings)


def resolve(settings: S, images: Images, device: torch.device, image_size: int) -> tuple[S, list[str]]:
    """The settings with a value wherever they leave the choice: precision, patches, positions and beta.

    A run that is resumed keeps the values that it had. `model.attention` stays as it is, for it says nothing about the
    model, and the next machine may have another.

    Args:
        images: those to train on; to choose beta, 32 of them, evenly spread, are looked at.
        image_size: side of the squares that are cut out of them, in pixels.

    Returns:
        A copy of the settings, and sentences about what was chosen by a measurement.

    Raises:
        ValueError: the run that is resumed has no beta; no beta keeps the rank; no image can be read.
    """
    settings, notes = copy.deepcopy(settings), []
    model, earlier = settings.model, {}
    if settings.earlier and (file := settings.earlier / "settings.yaml").exists():
        earlier = renamed(yaml.safe_load(file.read_text()))
    if settings.precision == "auto":
        settings.precision = earlier.get("precision", "auto")
    if settings.precision == "auto":
        settings.precision = "bf16" if has_bf16(device) else "fp32"
    for name in ("patches", "positions") if earlier else ():  # as earlier versions chose them
        setattr(model, name, getattr(model, name) or earlier["model"].get(name, "default"))
    if settings.earlier is None:
        notes += introduce_start(model)
    model.patches, model.positions = embedding_of(model)
    if model.pool == "cls" and not model.residual:
        notes.append(
            "warning: model.pool is cls, but without skip connections a class token hardly sees the patches at the "
            "start, and the loss may stay where it is: use --model.pool mean"
        )
    if settings.optimizer.name == "adamw" and not model.residual:
        notes.append(
            "adamw: a model without skip connections learns better with --optimizer.name soap, at two to three times "
            "the learning rate"
        )
    if model.beta == "auto" and earlier:
        model.beta = earlier["model"]["beta"]
        if model.beta is None:
            raise ValueError(
                f"{settings.out} is of a run that named no model.beta; leave it out, or give another --out"
            )
        notes.append(f"model.beta is {model.beta:g}: as in the run so far")
    elif model.beta == "auto":
        # By one process, on its CPU: all have to start from the same number, whatever their machines see and round to.
        beta = _choose_beta(model, settings.seed, images, image_size) if distributed.rank() == 0 else 0.0
        model.beta = float(distributed.gather_objects(beta)[0])
        notes.append(f"model.beta is {model.beta:g}: chosen on {min(32, len(images))} of the images")
    return settings, notes


def _choose_beta(model: ModelSettings, seed: int, images: Images, image_size: int) -> float:
    model = replace(model, beta=1.0)
    torch.manual_seed(seed)
    backbone = build_backbone(model, image_size, seed, images)
    return choose_beta(backbone, normalized_squares(images, 32, image_size), initialization_arguments(model), seed=seed)


def check(settings: RunSettings, images: int, source: str, root: Path, device: torch.device) -> None:
    """Contradictions that can be found before anything is built or written.

    Args:
        images: how many there are to train on; source: the setting that named them, for messages; root: where they lie.

    Raises:
        ValueError: naming the setting, its value, and what to do.
    """
    for name in ("epochs", "batch_size", "accumulate", "save_every_epochs", "keep", "log_every"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} is {getattr(settings, name)}; it must be at least 1")
    if settings.optimizer.warmup_epochs >= settings.epochs:
        raise ValueError(
            f"optimizer.warmup_epochs is {settings.optimizer.warmup_epochs:g} in a run of {settings.epochs} epochs; "
            "the learning rate would never reach its peak: lower it, or raise epochs"
        )
    _check_model(settings.model, device)
    if (tracker := settings.log_to) and importlib.util.find_spec(tracker) is None:
        raise ValueError(f"log_to is {tracker}, which is not installed: pip install {tracker}, or leave it out")
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1" and "RANK" not in os.environ:
        raise ValueError(
            f"srun started {tasks} tasks, and each would be a run of its own: start one task a node, with torchrun in "
            "it, as in docs/training.md"
        )
    processes = distributed.world_size()
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
    if not settings.resume and (last_checkpoint(out / "checkpoints") or (out / "backbone.json").exists()):
        raise ValueError(f"{out} already holds a run; add --resume to continue it, or give another --out")


def _check_model(model: ModelSettings, device: torch.device) -> None:
    changed = [*changed_initialization(model)]
    if changed and model.from_ckpt:
        raise ValueError(f"model.{changed[0]} has no effect with model.from; leave one of them out")
    if changed and initialization_of(model) == "default":
        raise ValueError(
            f"model.{changed[0]} belongs to the skipless initializations; give model.init {', '.join(PRESETS)}"
        )
    idle = {"value_output": ("c",), "query_key": ("alpha", "beta", "depth_scale")}
    for part, names in idle.items():
        given = [name for name in names if name in changed]
        if given and not getattr(model, part):
            raise ValueError(f"model.{given[0]} has no effect with model.{part} false; leave one of them out")
        if given and part == "query_key" and model.shaped:
            raise ValueError(
                f"model.{given[0]} has no effect with model.shaped, where queries and keys start as ViT's usual ones; "
                "leave one of them out"
            )
    if model.beta == "auto" and model.residual:
        raise ValueError("model.beta auto is for skipless models, and model.residual is true; give a number")
    for name in ("alpha", "beta", "c", "depth_scale"):
        if isinstance(value := getattr(model, name), int | float) and value > LARGEST_FACTOR:
            raise ValueError(
                f"model.{name} is {value:g}, and weights that large overflow; give at most {LARGEST_FACTOR}"
            )
    if not model.depth_scale > 0:
        raise ValueError(f"model.depth_scale is {model.depth_scale:g}; it must be positive")
    if (model.depth or 0) > DEEPEST:
        raise ValueError(f"model.depth is {model.depth:,}; give at most {DEEPEST:,} blocks")
    if model.patch < 1:
        raise ValueError(f"model.patch is {model.patch}; it must be at least 1")
    choose_backend(device, model.attention)


def check_size(name: str, size: int, patch: int) -> None:
    """Raise ValueError, with the sizes nearest to it, where the side of an image is no multiple of the patch."""
    if size % patch:
        near = sorted({max(patch, size // patch * patch), (size // patch + 1) * patch})
        raise ValueError(
            f"{name} is {size}, which is no multiple of model.patch {patch}; use {' or '.join(map(str, near))}"
        )
