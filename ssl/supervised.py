"""Supervised training of a Vision Transformer, skipless or residual, on labeled images: Table 1 of arXiv 2510.00345.

One process, on a laptop's CPU or one GPU; the folder holds train/CLASS/*.jpg and val/CLASS/*.jpg:

    python ssl/supervised.py --config configs/supervised_small.yaml --data.root imagenette --out runs/skipless

Any arm of the comparison, by flags:

    python ssl/supervised.py --config configs/supervised_small.yaml --data.root imagenette --model.residual false \\
        --model.init small --optimizer.name soap --out runs/x

One machine with 8 GPUs (several machines: as ssl/pretrain.py says):

    torchrun --nproc-per-node 8 ssl/supervised.py --config configs/supervised_vitb16_skipless.yaml --data.root imagenet

`--batch_size` counts images over all processes. `--resume` continues a run exactly where its last checkpoint left it,
or starts it: safe to requeue. What it leaves is what pretraining leaves: the backbone, for every evaluation, and beside
it the validation accuracy, in metrics.jsonl after every epoch and in backbone.json at the end.
"""

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset

from skipless.common import cli, distributed
from skipless.common.files import write_text
from skipless.common.pixels import normalize
from skipless.common.precision import autocast, describe, has_bf16
from skipless.common.provenance import provenance
from skipless.common.settings import plain
from skipless.datasets.labels.classes import LabeledSet, SetName, open_splits
from skipless.ssl.config import ModelSettings as BackboneSettings
from skipless.ssl.data.augmentation import Augmentation, TrainingImages, ValidationImages, mixing
from skipless.ssl.data.loader import StepBatches, leave_signals_to_main, loader_workers
from skipless.ssl.model.attention import choose_backend
from skipless.ssl.model.classifier import Classifier, Pool, gather_into_cls_
from skipless.ssl.model.vit import VisionTransformer
from skipless.ssl.optim.optimizers import Optimizer, OptimizerSettings, make_optimizer, set_rates
from skipless.ssl.optim.schedules import cosine
from skipless.ssl.run.checkpoints import export_backbone, save_checkpoint
from skipless.ssl.run.job import (
    Interruption,
    build_backbone,
    check_run,
    check_size,
    keep_freed_memory,
    settle_beta,
    settle_embedding,
    state_to_resume,
    whiten,
)
from skipless.ssl.run.logging import RunLog
from skipless.ssl.run.meter import memory_gb, peak_flops


@dataclass
class DataSettings:
    """What is classified."""

    root: str
    """folder: the folder that holds train/CLASS/*.jpg and val/CLASS/*.jpg (or train.zip, val.zip). cifar10, cifar100:
    the one that holds the authors' Python version. arrays: the one that holds train.npz and val.npz, with the arrays
    images (uint8 [N, H, W, 3]) and labels. huggingface: a folder that save_to_disk wrote, or a name on the hub."""
    name: SetName = "folder"
    """Where the data come from."""
    split: str | None = None
    """Split to validate on: by default val, for CIFAR test, for huggingface validation."""
    train_split: str = "train"
    """Split to train on."""
    image: str = "image"
    """huggingface: the column of images."""
    label: str = "label"
    """huggingface: the column of classes."""
    workers: int | None = None
    """Processes per training process that load and augment images; by default all cores shared out on a GPU machine,
    none on a CPU, where training needs the cores itself."""


@dataclass
class ModelSettings(BackboneSettings):
    """The backbone, and what the classifier reads of it."""

    pool: Pool = "mean"  # type: ignore[assignment]  # two more ways than pretraining has
    """What the classifier reads: the `mean` of the patch tokens; the class token `cls`, which near-identity attention
    starves in a skipless model; `gathering-cls`, a class token that starts by attending to all tokens alike; or
    `attention`, one learned query over the patch tokens, after the last block."""


@dataclass
class Settings:
    """Everything a run depends on."""

    data: DataSettings
    out: str
    """Folder of the run: settings, metrics, checkpoints, and the backbone at the end."""
    model: ModelSettings = field(default_factory=lambda: ModelSettings(size="base"))
    augmentation: Augmentation = field(default_factory=Augmentation)
    optimizer: OptimizerSettings = field(
        default_factory=lambda: OptimizerSettings(
            lr=2.5e-4, min_lr=1e-5, warmup_epochs=5, weight_decay=0.05, weight_decay_end=0.05
        )
    )
    epochs: int = 300
    """Passes over the training images."""
    batch_size: int = 1024
    """Images per optimizer step, over all processes and micro-batches. The learning rate scales with it."""
    accumulate: int = 1
    """Micro-batches per step: a fraction of the memory. Images are mixed within a micro-batch of a process."""
    clip_grad: float = 1.0
    """Gradients whose norm over all parameters is larger are scaled down to it; 0 turns this off."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto is bf16 where it is fast: on GPUs from Ampere on, and on CPUs with AMX (Xeons since 2023), where it is
    the products of linear layers alone; fp32 elsewhere. Parameters are float32 in both."""
    seed: int = 0
    """Of initialization, order of the images, augmentation and mixing."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    resume: bool = False
    """Continue from the last checkpoint in `out`, where there is one: bit by bit on a CPU."""
    validate_every_epochs: int = 1
    """Epochs between two measurements on the validation images; the last epoch always ends with one."""
    save_every_epochs: int = 1
    """Epochs between two checkpoints; one is also written at the end and on SIGTERM or SIGUSR1."""
    keep: int = 2
    """Checkpoints kept; older ones are deleted."""
    log_every: int = 10
    """Steps between two lines of metrics. Between them the host does not wait for the GPU (but in soap's first
    step, for the eigenbases)."""
    wandb: bool = False
    """Log to Weights & Biases too (pip install wandb)."""


def train(settings: Settings) -> Path:
    """Train a classifier as `settings` say, and return the run's folder.

    Raises:
        ValueError, FileNotFoundError: settings that contradict each other, the data or an existing run, before anything
            is written; an unreadable image; a loss that is not finite.
    """
    device = distributed.start(settings.device)
    if device.type == "cpu":
        keep_freed_memory()
    data = settings.data
    images, val_images = open_splits(data.name, data.root, data.train_split, data.split, data.image, data.label)
    check(settings, images, device)
    settle_embedding(settings.model)
    beta_from = settle_beta(settings, images, settings.augmentation.size)
    out = Path(settings.out)
    bf16 = settings.precision == "bf16" or (settings.precision == "auto" and has_bf16(device))
    low_precision = autocast(device, bf16)

    torch.manual_seed(settings.seed)
    classifier = build_classifier(settings, len(images.classes))
    whiten(classifier.backbone, settings, images, settings.augmentation.size)
    classifier.to(device)
    model: nn.Module = classifier
    if distributed.world_size() > 1:
        model = DistributedDataParallel(
            classifier, [device] if device.type == "cuda" else None, gradient_as_bucket_view=True
        )
    optimizer = make_optimizer(classifier, settings.optimizer)
    start, seconds_before = _resume(settings, images, classifier, optimizer)
    began = time.perf_counter()

    augmentation, rates = settings.augmentation, settings.optimizer
    steps_per_epoch = len(images) // settings.batch_size
    total = settings.epochs * steps_per_epoch
    peak, warmup = rates.lr * settings.batch_size / 256, round(rates.warmup_epochs * steps_per_epoch)
    workers = loader_workers(settings.data.workers, device)
    loader = DataLoader(
        TrainingImages(images, augmentation, settings.seed),
        batch_sampler=StepBatches(len(images), settings.batch_size, settings.accumulate, settings.seed, start, total),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_signals_to_main,
    )
    mix = mixing(augmentation, len(images.classes))
    first_process = distributed.rank() == 0
    if first_process:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "settings.yaml", yaml.safe_dump(plain(settings), sort_keys=False))
    log = RunLog(out, plain(settings), start, total, active=first_process, wandb=settings.wandb)
    meter = Meter(settings, classifier.backbone, device, steps_per_epoch, log)
    _introduce(log, settings, images, val_images, classifier, device, bf16, start, total)
    if beta_from:
        log.say(f"model.beta is {settings.model.beta:g}: {beta_from}")
    interrupted = Interruption()
    validation: dict[str, float] = {}

    def save(step: int) -> None:
        if first_process:
            state = {
                "step": step,
                "seconds": seconds_before + time.perf_counter() - began,
                "student": classifier.state_dict(),  # the name under which evaluation looks for a network
                "optimizer": optimizer.state_dict(),
                "architecture": classifier.backbone.architecture,
                "settings": plain(settings),
                "images": len(images),
                "classes": list(images.classes),
            }
            save_checkpoint(out / "checkpoints", step, state, settings.keep)

    def measure(step: int) -> None:
        """Validate where it is due and has not been done (by the run that is resumed); always at the end."""
        due = step > 0 and step % (steps_per_epoch * settings.validate_every_epochs) == 0
        known = distributed.any_process(log.has(step, "val/top1"))
        if step == total or (due and not known):
            with low_precision:
                validation.update(validate(classifier, val_images, augmentation.size, workers))
            if not known:
                log.metrics(step, step / steps_per_epoch, {f"val/{name}": x for name, x in validation.items()})
            log.say(
                f"epoch {step / steps_per_epoch:g}: validation top-1 {100 * validation['top1']:.1f} %, "
                f"top-5 {100 * validation['top5']:.1f} %, loss {validation['loss']:.3f}"
            )
            meter.restart_clock()

    measure(start)
    batches = iter(loader)
    for step in range(start, total):
        lr = cosine(step, total, peak, rates.min_lr, warmup)
        weight_decay = cosine(step, total, rates.weight_decay, rates.weight_decay_end)
        set_rates(optimizer, lr, weight_decay, freeze_last_layer=False)
        # Randomness of a step depends on (seed, step, rank) alone, so there is no random state to save.
        torch.manual_seed((settings.seed * total + step) * distributed.world_size() + distributed.rank())
        for micro in range(settings.accumulate):
            views, targets = (x.to(device, non_blocking=True) for x in next(batches))
            if mix is not None:
                views, targets = mix(views, targets)
            last_micro = micro == settings.accumulate - 1
            hold_reduction = (
                nullcontext() if last_micro or not isinstance(model, DistributedDataParallel) else model.no_sync()
            )
            with hold_reduction:
                with low_precision:
                    logits = model(views)
                loss = F.cross_entropy(logits.float(), targets, label_smoothing=augmentation.label_smoothing)
                (loss / settings.accumulate).backward()
            meter.add(loss)
        norm = nn.utils.clip_grad_norm_(classifier.parameters(), settings.clip_grad or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        done = step + 1
        log.advance()
        epoch_ends = done % steps_per_epoch == 0
        stopping = distributed.any_process(interrupted.yes)
        save_due = epoch_ends and done // steps_per_epoch % settings.save_every_epochs == 0
        saving = stopping or done == total or save_due
        if done % settings.log_every == 0 or saving:
            meter.report(done, norm, lr, weight_decay)  # the only place where the host waits for the device
        if epoch_ends and not stopping:
            measure(done)
        if saving:
            save(done)
        if stopping:
            log.say(f"interrupted after step {done}: checkpoint written; continue with --resume")
            break
    else:
        if first_process:
            about = {
                "pool": "cls" if settings.model.pool in ("cls", "gathering-cls") else "mean",
                "step": total,
                "seconds": round(seconds_before + time.perf_counter() - began, 1),
                "processes": distributed.world_size(),
                "validation": {"dataset": val_images.name, "split": val_images.split, "images": len(val_images)}
                | validation,
                **provenance(device),
                "settings": plain(settings),
            }
            export_backbone(out, classifier.backbone, about)
            log.say(f"done: the backbone is {out / 'backbone.safetensors'}")
    log.close()
    return out


def check(settings: Settings, images: LabeledSet, device: torch.device) -> None:
    """Contradictions that can be found before anything is built or written."""
    if settings.validate_every_epochs < 1:
        raise ValueError(f"validate_every_epochs is {settings.validate_every_epochs}; it must be at least 1")
    check_run(settings, len(images), "data.root", Path(settings.data.root).expanduser(), device)
    check_size("augmentation.size", settings.augmentation.size, settings.model.patch)


def build_classifier(settings: Settings, classes: int) -> Classifier:
    """The classifier at its start: backbone, initialized as the settings say but for `whiten`, and head.

    Draws from torch's global random state, except for the skipless initialization, which draws from `settings.seed`.
    """
    backbone = build_backbone(settings.model, settings.augmentation.size, settings.seed)
    if settings.model.pool == "gathering-cls":
        gather_into_cls_(backbone)
    return Classifier(backbone, classes, settings.model.pool)


@torch.no_grad()
def validate(classifier: Classifier, images: LabeledSet, size: int, workers: int = 0) -> dict[str, float]:
    """Accuracy and loss on central crops; images are shared out over the processes, and all get the result.

    Returns:
        {"top1", "top5": in [0, 1] (of fewer than five classes, top5 is 1), "loss": mean cross-entropy}.
    """
    device = classifier.head.weight.device
    mine = Subset(ValidationImages(images, size), range(distributed.rank(), len(images), distributed.world_size()))
    loader = DataLoader(mine, batch_size=128, num_workers=workers, worker_init_fn=leave_signals_to_main)
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    classifier.eval()
    for views, labels in loader:
        labels = labels.to(device)
        logits = classifier(normalize(views[None].to(device))).float()
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        sums += torch.stack([hits[:, 0].sum(), hits.sum(), F.cross_entropy(logits, labels, reduction="sum").double()])
    classifier.train()
    top1, top5, loss = (distributed.all_reduce_sum(sums) / len(images)).tolist()
    return {"top1": top1, "top5": top5, "loss": loss}


class Meter:
    """Average loss between two log lines, kept on the device until then, and speed."""

    def __init__(
        self,
        settings: Settings,
        backbone: VisionTransformer,
        device: torch.device,
        steps_per_epoch: int,
        log: RunLog,
    ):
        self.settings, self.device, self.steps_per_epoch, self.log = settings, device, steps_per_epoch, log
        side = settings.augmentation.size
        self.flops_per_image = 3 * backbone.flops(side, side)  # the backward pass is twice the forward
        self.loss = torch.zeros((), device=device)
        self.micro_batches = self.images = 0
        self.seconds_from = time.perf_counter()

    def add(self, loss: Tensor) -> None:
        """Count one micro-batch."""
        self.loss += loss.detach()
        self.micro_batches += 1
        self.images += self.settings.batch_size // self.settings.accumulate

    def restart_clock(self) -> None:
        """Leave the time up to now out of images/s."""
        self.seconds_from, self.images = time.perf_counter(), 0

    def report(self, step: int, gradient_norm: Tensor, lr: float, weight_decay: float) -> None:
        """Write one line of metrics, and stop where going on is pointless."""
        values = {
            "loss": distributed.all_reduce_mean(self.loss / self.micro_batches).item(),
            "gradient_norm": gradient_norm.item(),
            "lr": lr,
            "weight_decay": weight_decay,
            "images_per_second": self.images / (time.perf_counter() - self.seconds_from),
            "memory_gb": memory_gb(self.device),
        }
        peak = peak_flops(self.device)
        if peak:
            flops = values["images_per_second"] * self.flops_per_image
            values["model_flops_utilisation"] = flops / (peak * distributed.world_size())
        if not math.isfinite(values["loss"]) or not math.isfinite(values["gradient_norm"]):
            raise ValueError(
                f"stopped at step {step}: the loss is {values['loss']:g} and the gradient's norm "
                f"{values['gradient_norm']:g}; lower the learning rate (--optimizer.lr) or clip gradients harder "
                "(--clip_grad); the last checkpoint is from before"
            )
        self.log.metrics(step, step / self.steps_per_epoch, values)
        self.log.progress(
            step,
            f"loss {values['loss']:.3f}, {values['images_per_second']:.0f} images/s, {values['memory_gb']:.1f} GB"
            + (f", {100 * values['model_flops_utilisation']:.0f} % of peak FLOPs" if peak else ""),
        )
        self.loss.zero_()
        self.micro_batches = 0
        self.restart_clock()


def _resume(settings: Settings, images: LabeledSet, classifier: Classifier, optimizer: Optimizer) -> tuple[int, float]:
    """Load the run's last checkpoint if it is to be resumed and has one; return its steps and seconds so far."""
    root = settings.data.root
    state = state_to_resume(
        settings, classifier.backbone.architecture, len(images), root, may_change=("validate_every_epochs",)
    )
    if state is None:
        return 0, 0.0
    if state["classes"] != list(images.classes):
        raise ValueError(f"{settings.out} is of a run with other classes than {root} has; give another --out")
    classifier.load_state_dict(state["student"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["seconds"]


def _introduce(
    log: RunLog,
    settings: Settings,
    images: LabeledSet,
    val_images: LabeledSet,
    classifier: Classifier,
    device: torch.device,
    bf16: bool,
    start: int,
    total: int,
) -> None:
    """What is about to happen, in a few lines."""
    parameters = sum(p.numel() for p in classifier.parameters())
    millions = f"{parameters / 1e6:.1f} M" if parameters >= 1e5 else f"{parameters:,}"
    processes = distributed.world_size()
    kind = "residual" if settings.model.residual else "skipless"
    log.say(
        f"{len(images):,} images of {len(images.classes)} classes ({images.name}, {images.split}); {kind} ViT, "
        f"{millions} parameters; {total:,} steps of {settings.batch_size} images"
        + (f", from step {start:,}" if start else "")
    )
    why = choose_backend(device, settings.model.attention)[1]
    log.say(
        f"{processes} process{'es' if processes > 1 else ''} on {device}; {describe(device, bf16)}; attention: {why}"
    )
    log.say(f"validation: {len(val_images):,} images of {val_images.name}, {val_images.split}")
    if images.split == val_images.split:
        log.say(f"WARNING: {images.split} is both trained and validated on: its accuracy says nothing about new images")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    cli.run(train, Settings, __doc__, arguments)


if __name__ == "__main__":
    main()
