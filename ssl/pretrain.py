"""DINO pretraining of a Vision Transformer, skipless or residual, on any folder of images.

One process, on a laptop's CPU or one GPU:

    python ssl/pretrain.py --config configs/imagenette_cpu.yaml --data.path photos --out runs/photos

One machine with 8 GPUs:

    torchrun --nproc-per-node 8 ssl/pretrain.py --config configs/vits16_skipless_soap.yaml --data.path imagenet/train

Several machines, on each of them (README.md has the SLURM script):

    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 ssl/pretrain.py ...

`--batch_size` counts images over all processes, so a recipe means the same on any number of them.
`--resume` continues a run exactly where its last checkpoint left it, or starts it: safe to requeue.
"""

import argparse
import ctypes
import dataclasses
import json
import math
import os
import resource
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from skipless.datasets.images import ImageSource, open_images
from skipless.ssl import distributed
from skipless.ssl.attention import Backend, choose_backend
from skipless.ssl.checkpoints import export_backbone, load_checkpoint, save_checkpoint, write_text
from skipless.ssl.crops import CropDataset, Crops, collate, normalize
from skipless.ssl.dino import (
    DINOHead,
    DINOLoss,
    DINOModel,
    Pool,
    diagnose_collapse,
    make_teacher,
    update_teacher,
)
from skipless.ssl.initialization import PRESETS, MlpInit, skipless_init_
from skipless.ssl.logs import RunLog
from skipless.ssl.monitor import MonitorSettings, labelled_sets, measure_blocks
from skipless.ssl.optimizers import OptimizerSettings, cosine, make_optimizer, ramp, set_rates
from skipless.ssl.provenance import provenance
from skipless.ssl.vit import SIZES, VisionTransformer


@dataclass
class DataSettings:
    """Where the images are."""

    path: str
    """Folder of images (searched in all its subfolders; no labels needed) or a zip archive of images. Folders right
    below it are taken as classes by the monitor, never by training."""
    workers: int | None = None
    """Processes per training process that load and crop images; by default all cores shared out on a GPU machine, none
    on a CPU, where training needs the cores itself."""
    max_unreadable: float = 0.01
    """Share of unreadable images above which the run stops and names them; below, they are skipped and listed in
    unreadable.txt."""


@dataclass
class ModelSettings:
    """The backbone. `size` gives dim, depth and heads; each can be set on its own too."""

    size: Literal["tiny", "small", "base", "large", "huge", "giant"] = "small"
    """ViT-Ti, S, B, L, H or g."""
    dim: int | None = None
    """Width of a token; by default that of `size`."""
    depth: int | None = None
    """Number of blocks; by default that of `size`."""
    heads: int | None = None
    """Attention heads; by default those of `size`. 64 channels a head are usual, 32 do for narrow models."""
    patch: int = 16
    """Side of a patch in pixels. Half the patch: four times the tokens, finer features, four times the time."""
    residual: bool = False
    """With skip connections (true) or without (false)."""
    init: Literal["default", "paper-dino", "paper-supervised", "small"] | None = None
    """Initialization; by default `small` without skip connections and `default` (ViT's usual one) with them. `small` is
    for narrow models and small budgets, `paper-dino` is arXiv 2510.00345's for ViT-S on ImageNet."""
    alpha: float | None = None
    """Noise in the query-key product, instead of the initialization's own."""
    beta: float | None = None
    """Identity in the query-key product, instead of the initialization's own: larger is more diagonal attention."""
    c: float | None = None
    """Scale of the value and output matrices, instead of the initialization's own."""
    mlp: MlpInit | None = None
    """suo or mirrored MLP layers, instead of the initialization's own."""
    pool: Pool = "mean"
    """What the DINO head reads: `mean` of the patch tokens, or the class token `cls` (DINO's). Without skip connections
    use mean: near-identity attention starves a class token, and the loss would stay at ln K."""
    registers: int = 0
    """Register tokens; 4 in DINOv2."""
    layer_scale: float | None = None
    """Initial scale of each branch (DINOv2: 1e-5). Residual models only."""
    drop_path: float = 0.0
    """Stochastic depth; DINO uses 0.1. Residual models only."""
    attention: Backend = "auto"
    """auto takes xformers on CUDA where it is installed, torch's SDPA elsewhere."""
    checkpoint_activations: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""


@dataclass
class DINOSettings:
    """Head, teacher and loss."""

    prototypes: int = 65536
    """Outputs of the head, K. 65,536 for ImageNet; 1,024 to 4,096 for some thousand images."""
    hidden: int = 2048
    """Width of the head's hidden layers."""
    bottleneck: int = 256
    """Width of the head before the prototypes."""
    norm_last_layer: bool = True
    """Prototypes of length 1: stable. false is what DINO used for ViT-S."""
    freeze_last_layer_epochs: float = 1.0
    """Epochs at the start in which the last layer of the head has learning rate 0."""
    momentum: float = 0.996
    """Momentum of the teacher at the start; it rises to 1 by half a cosine. Lower it (0.99) for short runs."""
    student_temperature: float = 0.1
    """Temperature of the student's softmax."""
    teacher_temperature: float = 0.04
    """Temperature of the teacher's softmax after its warm-up. Long runs raise it to 0.07."""
    warmup_teacher_temperature: float = 0.04
    """Temperature of the teacher's softmax in the first epoch."""
    warmup_teacher_temperature_epochs: int = 0
    """Epochs over which the teacher's temperature changes linearly."""
    balancing: Literal["centre", "sinkhorn"] = "centre"
    """How collapse is avoided: centring (DINO) or Sinkhorn-Knopp (DINOv2)."""
    centre_momentum: float = 0.9
    """Momentum of the centre."""


@dataclass
class Settings:
    """Everything a run depends on."""

    data: DataSettings
    out: str
    """Folder of the run: settings, metrics, checkpoints, and the backbone at the end."""
    model: ModelSettings = field(default_factory=ModelSettings)
    crops: Crops = field(default_factory=Crops)
    dino: DINOSettings = field(default_factory=DINOSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    monitor: MonitorSettings = field(default_factory=MonitorSettings)
    epochs: int = 100
    """Passes over the images."""
    batch_size: int = 256
    """Images per optimizer step, over all processes and micro-batches. The learning rate scales with it."""
    accumulate: int = 1
    """Micro-batches per step: the same result with a fraction of the memory. Teacher and centre move once a step."""
    clip_grad: float = 3.0
    """Gradients with a larger norm, over all parameters, are scaled down to it; 0 turns this off."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto is bf16 on CUDA and fp32 on CPU."""
    seed: int = 0
    """Of initialization, order of the images and crops."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    resume: bool = False
    """Continue from the last checkpoint in `out`, exactly; start from the beginning where there is none."""
    save_every_epochs: int = 1
    """Epochs between two checkpoints; one is also written at the end and on SIGTERM or SIGUSR1."""
    keep: int = 2
    """Checkpoints kept; older ones are deleted."""
    log_every: int = 10
    """Steps between two lines of metrics. Between them the host never waits for the GPU."""
    wandb: bool = False
    """Log to Weights & Biases too (pip install wandb)."""


def pretrain(settings: Settings) -> Path:
    """Run DINO pretraining as `settings` say, and return the run's folder.

    Raises:
        ValueError, FileNotFoundError: settings that contradict each other, the data or an existing run, before anything
            is written; too many unreadable images; a loss that is not finite.
    """
    device = distributed.start(settings.device)
    if device.type == "cpu":
        _keep_freed_memory()
    images = open_images(settings.data.path)
    _check(settings, images)
    out = Path(settings.out)
    sets = labelled_sets(images, settings.monitor, settings.monitor.size or settings.crops.global_size)
    bf16 = settings.precision == "bf16" or (settings.precision == "auto" and device.type == "cuda")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)

    torch.manual_seed(settings.seed)
    student = build_model(settings).to(device)
    teacher = make_teacher(student)
    objective = DINOLoss(
        settings.dino.prototypes,
        settings.dino.student_temperature,
        settings.dino.centre_momentum,
        settings.dino.balancing,
    ).to(device)
    optimizer = make_optimizer(student, settings.optimizer)
    start, seconds_before = _resume(settings, student, teacher, objective, optimizer)
    began = time.perf_counter()
    model: nn.Module = student
    if distributed.world_size() > 1:
        model = DistributedDataParallel(
            student, [device] if device.type == "cuda" else None, gradient_as_bucket_view=True
        )

    steps_per_epoch = len(images) // settings.batch_size
    total = settings.epochs * steps_per_epoch
    workers = _workers(settings, device)
    loader = DataLoader(
        CropDataset(images, settings.crops, settings.seed),
        batch_sampler=distributed.StepBatches(
            len(images), settings.batch_size, settings.accumulate, settings.seed, start, total
        ),
        num_workers=workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if workers else None,
    )
    rates = Rates(settings, steps_per_epoch, total)
    first_process = distributed.rank() == 0
    if first_process:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "settings.yaml", yaml.safe_dump(_plain(settings), sort_keys=False))
    log = RunLog(out, _plain(settings), start, total, active=first_process, wandb=settings.wandb)
    meter = Meter(settings, student.backbone, device, steps_per_epoch, log)
    _introduce(log, settings, images, student, device, sets[2] if sets else None, start, total)
    interrupted = _Interruption()

    def save(step: int) -> None:
        if first_process:
            state = {
                "step": step,
                "seconds": seconds_before + time.perf_counter() - began,
                "student": student.state_dict(),
                "teacher": teacher.state_dict(),
                "objective": objective.state_dict(),
                "optimizer": optimizer.state_dict(),
                "architecture": student.backbone.architecture,
                "settings": _plain(settings),
            }
            save_checkpoint(out / "checkpoints", step, state, settings.keep)

    def monitor(step: int) -> None:
        if sets and settings.monitor.every_epochs:
            with autocast:
                blocks = measure_blocks(
                    teacher.backbone, sets[0], sets[1], settings.monitor.k, settings.model.pool, workers
                )
            by_name = {f"monitor/{name}": [block[name] for block in blocks] for name in blocks[0]}
            log.metrics(step, step / steps_per_epoch, by_name)
            knn = by_name["monitor/knn"]
            log.say(
                f"epoch {step / steps_per_epoch:g}: {settings.monitor.k}-NN {100 * knn[-1]:.1f} % (last block), best "
                f"{100 * max(knn):.1f} % (block {knn.index(max(knn))}); last block's mean share "
                f"{by_name['monitor/mean_share'][-1]:.2f}, effective rank {by_name['monitor/effective_rank'][-1]:.1f}"
            )
            meter.restart_clock()

    if start == 0:
        monitor(0)
    batches = iter(loader)
    for step in range(start, total):
        set_rates(optimizer, rates.lr(step), rates.weight_decay(step), rates.last_layer_frozen(step))
        # Randomness of a step depends on (seed, step, rank) alone, so there is no random state to save.
        torch.manual_seed((settings.seed * total + step) * distributed.world_size() + distributed.rank())
        for micro in range(settings.accumulate):
            batch = next(batches)
            crops = _to_crops(batch, device)
            last_micro = micro == settings.accumulate - 1
            hold_reduction = (
                nullcontext() if last_micro or not isinstance(model, DistributedDataParallel) else model.no_sync()
            )
            with hold_reduction:
                with autocast:
                    with torch.no_grad():
                        targets = teacher(crops[:1])
                    result = objective(
                        model(crops), targets, 2 + settings.crops.local_count, rates.teacher_temperature(step)
                    )
                (result.loss / settings.accumulate).backward()
            meter.add(result, batch["unreadable"])
        norm = nn.utils.clip_grad_norm_(student.parameters(), settings.clip_grad or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        objective.update_centre()
        update_teacher(teacher, student, rates.momentum(step))

        done = step + 1
        log.advance()
        epoch_ends = done % steps_per_epoch == 0
        epoch = done // steps_per_epoch
        stopping = distributed.any_process(interrupted.yes)
        saving = stopping or done == total or (epoch_ends and epoch % settings.save_every_epochs == 0)
        if done % settings.log_every == 0 or saving:
            meter.report(done, norm, rates, images)  # the only place where the host waits for the device
        if saving:
            save(done)
        if stopping:
            log.say(f"interrupted after step {done}: checkpoint written; continue with --resume")
            break
        if epoch_ends and (
            done == total or (settings.monitor.every_epochs and epoch % settings.monitor.every_epochs == 0)
        ):
            monitor(done)

    else:
        if first_process:
            about = {
                "pool": settings.model.pool,
                "step": total,
                "seconds": round(seconds_before + time.perf_counter() - began, 1),
                "processes": distributed.world_size(),
                **provenance(device),
                "settings": _plain(settings),
            }
            export_backbone(out, teacher.backbone, about)
            log.say(f"done: the teacher's backbone is {out / 'backbone.safetensors'}")
    log.close()
    return out


def build_model(settings: Settings) -> DINOModel:
    """The student at its start: backbone, initialized as the settings say, and head.

    Draws from torch's global random state, except for the skipless initialization, which draws from `settings.seed`.
    """
    wanted = settings.model
    overrides = {name: getattr(wanted, name) for name in ("dim", "depth", "heads") if getattr(wanted, name) is not None}
    backbone = VisionTransformer(
        **(SIZES[wanted.size] | overrides),
        patch=wanted.patch,
        residual=wanted.residual,
        registers=wanted.registers,
        layer_scale=wanted.layer_scale,
        drop_path=wanted.drop_path,
        image_size=settings.crops.global_size,
        attention=wanted.attention,
        checkpoint_activations=wanted.checkpoint_activations,
    )
    preset = wanted.init or ("default" if wanted.residual else "small")
    if preset != "default":
        changes = {
            name: getattr(wanted, name) for name in ("alpha", "beta", "c", "mlp") if getattr(wanted, name) is not None
        }
        skipless_init_(backbone, **(PRESETS[preset] | changes), seed=settings.seed)
    dino = settings.dino
    head = DINOHead(backbone.dim, dino.prototypes, dino.hidden, dino.bottleneck, dino.norm_last_layer)
    return DINOModel(backbone, head, wanted.pool)


class Rates:
    """What changes over a run, as functions of the step (arXiv 2104.14294, section 3.2 and appendix)."""

    def __init__(self, settings: Settings, steps_per_epoch: int, total: int):
        self.optimizer, self.dino = settings.optimizer, settings.dino
        self.steps_per_epoch, self.total = steps_per_epoch, total
        self.peak = settings.optimizer.lr * settings.batch_size / 256
        self.warmup = round(settings.optimizer.warmup_epochs * steps_per_epoch)

    def lr(self, step: int) -> float:
        return cosine(step, self.total, self.peak, self.optimizer.min_lr, self.warmup)

    def weight_decay(self, step: int) -> float:
        return cosine(step, self.total, self.optimizer.weight_decay, self.optimizer.weight_decay_end)

    def momentum(self, step: int) -> float:
        return cosine(step, self.total, self.dino.momentum, 1.0)

    def teacher_temperature(self, step: int) -> float:
        epoch = step // self.steps_per_epoch
        warm, final = self.dino.warmup_teacher_temperature, self.dino.teacher_temperature
        return ramp(epoch, warm, final, self.dino.warmup_teacher_temperature_epochs)

    def last_layer_frozen(self, step: int) -> bool:
        return step < self.dino.freeze_last_layer_epochs * self.steps_per_epoch


class Meter:
    """Averages over the steps between two log lines, kept on the device until then."""

    NAMES = ("loss", "teacher_entropy", "kl", "usage_entropy")
    PATIENCE = 5  # log lines in a row that look like collapse before it is called so

    def __init__(
        self, settings: Settings, backbone: VisionTransformer, device: torch.device, steps_per_epoch: int, log: RunLog
    ):
        self.settings, self.device, self.steps_per_epoch, self.log = settings, device, steps_per_epoch, log
        self.sums = torch.zeros(len(self.NAMES), device=device)
        self.micro_batches = self.images = self.suspicions = 0
        self.unreadable: set[str] = set()  # on this process
        self.unreadable_everywhere: set[str] = set()
        self.seconds_from = time.perf_counter()
        crops = settings.crops
        global_view, local_view = (backbone.flops(side, side) for side in (crops.global_size, crops.local_size))
        # Forward of the teacher; forward and backward (twice the forward) of the student.
        self.flops_per_image = 2 * global_view + 3 * (2 * global_view + crops.local_count * local_view)

    def add(self, result: Any, unreadable: list[str]) -> None:
        """Count one micro-batch."""
        self.sums += torch.stack([getattr(result, name).detach().float() for name in self.NAMES])
        self.micro_batches += 1
        self.images += self.settings.batch_size // self.settings.accumulate
        self.unreadable.update(unreadable)

    def restart_clock(self) -> None:
        """Leave the time up to now out of images/s."""
        self.seconds_from, self.images = time.perf_counter(), 0

    def report(self, step: int, gradient_norm: Tensor, rates: Rates, images: ImageSource) -> None:
        """Write one line of metrics, warn of collapse, and stop where going on is pointless."""
        self._check_unreadable(images)
        if not self.micro_batches:
            return
        means = distributed.all_reduce_mean(self.sums / self.micro_batches).tolist()
        values: dict[str, Any] = dict(zip(self.NAMES, means, strict=True))
        ceiling = math.log(self.settings.dino.prototypes)
        seconds = time.perf_counter() - self.seconds_from
        speed = self.images / seconds
        values |= {
            "below_ln_k": ceiling - values["loss"],
            "gradient_norm": gradient_norm.item(),
            "lr": rates.lr(step - 1),
            "weight_decay": rates.weight_decay(step - 1),
            "momentum": rates.momentum(step - 1),
            "teacher_temperature": rates.teacher_temperature(step - 1),
            "images_per_second": speed,
            "memory_gb": _memory_gb(self.device),
        }
        peak = _peak_flops(self.device)
        if peak:
            values["model_flops_utilisation"] = speed * self.flops_per_image / (peak * distributed.world_size())
        self.log.metrics(step, step / self.steps_per_epoch, values)
        self.log.progress(
            f"loss {values['loss']:.3f} (ln K {ceiling:.2f}), {speed:.0f} images/s, {values['memory_gb']:.1f} GB"
            + (f", {100 * values['model_flops_utilisation']:.0f} % of peak FLOPs" if peak else "")
        )
        sentence = diagnose_collapse(
            prototypes=self.settings.dino.prototypes, **dict(zip(self.NAMES, means, strict=True))
        )
        if not math.isfinite(values["loss"]):
            raise ValueError(f"stopped at step {step}: {sentence}; the last checkpoint is from before")
        self.suspicions = self.suspicions + 1 if sentence and step > rates.warmup else 0
        if sentence and self.suspicions == self.PATIENCE:
            self.log.say(f"WARNING at step {step}: {sentence}")
        self.sums.zero_()
        self.micro_batches = 0
        self.restart_clock()

    def _check_unreadable(self, images: ImageSource) -> None:
        everywhere = set().union(*distributed.gather_objects(self.unreadable))
        if everywhere == self.unreadable_everywhere:
            return
        self.unreadable_everywhere = everywhere
        if self.log.active:
            write_text(Path(self.settings.out) / "unreadable.txt", "".join(f"{line}\n" for line in sorted(everywhere)))
        if len(everywhere) > self.settings.data.max_unreadable * len(images):
            shown = "; ".join(sorted(everywhere)[:5])
            raise ValueError(
                f"{len(everywhere)} of {len(images)} images in {images.root} cannot be read, more than "
                f"data.max_unreadable ({self.settings.data.max_unreadable:g}) allows: {shown}; "
                f"{self.settings.out}/unreadable.txt has all"
            )


class _Interruption:
    """Notes SIGTERM and SIGUSR1, which schedulers send before they end a job."""

    def __init__(self) -> None:
        self.yes = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, *_: Any) -> None:
        self.yes = True


def _check(settings: Settings, images: ImageSource) -> None:
    """Contradictions that can be found before anything is built or written."""
    processes, patch = distributed.world_size(), settings.model.patch
    for name in ("epochs", "batch_size", "accumulate", "save_every_epochs", "keep", "log_every"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} is {getattr(settings, name)}; it must be at least 1")
    for name in ("prototypes", "hidden", "bottleneck"):
        if getattr(settings.dino, name) < 1:
            raise ValueError(f"dino.{name} is {getattr(settings.dino, name)}; it must be at least 1")
    for name in ("student_temperature", "teacher_temperature", "warmup_teacher_temperature"):
        if getattr(settings.dino, name) <= 0:
            raise ValueError(f"dino.{name} is {getattr(settings.dino, name)}; it must be positive")
    for name in ("momentum", "centre_momentum"):
        if not 0 <= getattr(settings.dino, name) <= 1:
            raise ValueError(f"dino.{name} is {getattr(settings.dino, name)}; it must be in [0, 1]")
    if patch < 1:
        raise ValueError(f"model.patch is {patch}; it must be at least 1")
    for name in ("global_size", "local_size"):
        size = getattr(settings.crops, name)
        if size % patch and (name == "global_size" or settings.crops.local_count):
            near = sorted({max(patch, size // patch * patch), (size // patch + 1) * patch})
            raise ValueError(
                f"crops.{name} is {size}, which is no multiple of model.patch {patch}; use "
                + " or ".join(map(str, near))
            )
    if settings.batch_size % (processes * settings.accumulate):
        raise ValueError(
            f"batch_size {settings.batch_size} cannot be shared out over {processes} processes x {settings.accumulate} "
            "micro-batches (accumulate); choose a multiple of their product"
        )
    if len(images) < settings.batch_size:
        raise ValueError(
            f"data.path {images.root} has {len(images)} images, fewer than one batch; lower batch_size "
            f"({settings.batch_size})"
        )
    out = Path(settings.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out is {out}, which is a file; give a folder")
    if (out / "settings.yaml").exists() and not settings.resume:
        raise ValueError(f"{out} already holds a run; add --resume to continue it, or give another --out")


def _resume(
    settings: Settings, student: DINOModel, teacher: DINOModel, objective: DINOLoss, optimizer: torch.optim.Optimizer
) -> tuple[int, float]:
    """Load the run's last checkpoint if it is to be resumed and has one; return its steps and seconds so far."""
    path = Path(settings.out) / "checkpoints" / "last.pt"
    if not settings.resume or not path.exists():
        return 0, 0.0
    state = load_checkpoint(path)
    differing = [
        f"{name} is {state['architecture'].get(name)!r} there and {value!r} here"
        for name, value in student.backbone.architecture.items()
        if state["architecture"].get(name) != value
    ]
    if differing:
        raise ValueError(
            f"{path} is of another architecture: {', '.join(differing)}; use its settings or another --out"
        )
    old, new = _flat(state["settings"]), _flat(_plain(settings))
    may_change = ("out", "resume", "device", "wandb", "keep", "log_every", "save_every_epochs", "accumulate")
    differing = [
        f"{name} is {old.get(name)!r} there and {value!r} here"
        for name, value in new.items()
        if old.get(name) != value
        and name not in may_change
        and not name.startswith(("monitor.", "data.", "model.attention", "model.checkpoint"))
    ]
    if differing:
        raise ValueError(
            f"{path} is of a run with other settings: {', '.join(differing)}; use its own, or another --out"
        )
    student.load_state_dict(state["student"])
    teacher.load_state_dict(state["teacher"])
    objective.load_state_dict(state["objective"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["seconds"]


def _introduce(
    log: RunLog,
    settings: Settings,
    images: ImageSource,
    student: DINOModel,
    device: torch.device,
    monitored: str | None,
    start: int,
    total: int,
) -> None:
    """What is about to happen, in a few lines."""
    millions = sum(p.numel() for p in student.backbone.parameters()) / 1e6
    kind = "residual" if settings.model.residual else "skipless"
    log.say(
        f"{len(images):,} images of {images.root}; {kind} ViT, {millions:.1f} M parameters; {total:,} steps of "
        f"{settings.batch_size} images" + (f", from step {start:,}" if start else "")
    )
    why = choose_backend(device, settings.model.attention)[1]
    log.say(f"{distributed.world_size()} process(es) on {device}; attention: {why}")
    if settings.monitor.every_epochs:
        log.say(
            f"k-NN monitor: {monitored}" if monitored else "k-NN monitor: off, since the images have no class folders"
        )


def _to_crops(batch: dict[str, Any], device: torch.device) -> list[Tensor]:
    """Normalised crops [views * B, 3, S, S], globals first, locals second if there are any."""
    views = [batch["global"]] + ([batch["local"]] if batch["local"] is not None else [])
    return [normalize(v.to(device, non_blocking=True)) for v in views]


def _workers(settings: Settings, device: torch.device) -> int:
    if settings.data.workers is not None:
        return settings.data.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return cores // local_processes if device.type == "cuda" else 0


def _keep_freed_memory() -> None:
    """Stop glibc from handing large blocks back to the kernel: fetching them anew for every tensor of every step costs
    a fifth of the step in page faults. Elsewhere than on glibc this does nothing."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_threshold, gigabyte = -1, -3, 1 << 30
        ctypes.CDLL(None).mallopt(mmap_threshold, gigabyte)
        ctypes.CDLL(None).mallopt(trim_threshold, gigabyte)


def _memory_gb(device: torch.device) -> float:
    """Most memory held so far: of the device on CUDA, of this process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / (2**30 if sys.platform == "darwin" else 2**20)


def _peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of the GPU by its data sheet, in FLOP/s; None for a CPU and for GPUs not listed."""
    if device.type != "cuda":
        return None
    peaks = {
        "H100": 989e12,
        "H200": 989e12,
        "B200": 2250e12,
        "A100": 312e12,
        "L40S": 362e12,
        "A10": 125e12,
        "4090": 165e12,
    }
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in peaks.items() if part in name), None)


def _plain(settings: Settings) -> dict[str, Any]:
    """Settings as plain dicts, lists and values."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def parse(arguments: list[str] | None = None) -> Settings:
    """Settings from the command line and the files it names with --config; later ones win."""
    from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

    class HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
        """Keeps the lines of the description."""

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="ssl/pretrain.py", description=__doc__, exit_on_error=False, formatter_class=HelpFormatter
    )
    parser.add_argument("--config", action="config", help="YAML file of settings, as in configs/; flags after it win.")
    parser.add_class_arguments(Settings, skip={"resume"})
    parser.add_argument(
        "--resume",
        action="store_true",
        help="Continue exactly from the last checkpoint in `out`, if there is one.",
    )
    values = parser.instantiate(parser.parse_args(arguments)).as_dict()
    values.pop("config", None)
    return Settings(**values)


def main(arguments: list[str] | None = None) -> None:
    """The command line: a sentence and exit code 2 for whatever the user can mend."""
    from jsonargparse import ArgumentError

    try:
        pretrain(parse(arguments))
    except (ValueError, FileNotFoundError, ArgumentError) as error:
        if distributed.rank() == 0:
            print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    finally:
        distributed.stop()


if __name__ == "__main__":
    main()
