"""Distillation of a frozen Vision Transformer into a smaller one, skipless or residual, on any folder of images.

The student learns to say the teacher's patch tokens. This gives the best dense features that a small budget can buy:

    python ssl/distill.py --config configs/distill_cpu.yaml --teacher.ckpt timm:vit_small_patch14_dinov2.lvd142m \\
        --data.path photos --out runs/student

One machine with 8 GPUs (several machines: as ssl/pretrain.py says):

    torchrun --nproc-per-node 8 ssl/distill.py --config configs/distill_vits16_skipless.yaml \\
        --teacher.ckpt dinov2_vitl14_reg4_pretrain.pth --data.path imagenet/train

`--teacher.cache FOLDER` computes the teacher's features once, for any number of runs. `--resume` continues a run
exactly where its last checkpoint left it, or starts it. What a run leaves is what pretraining leaves.
"""

import skipless.common.interruption  # noqa: F401

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skipless.common import cli, distributed
from skipless.common.pixels import normalize
from skipless.datasets.images import ImageSource, open_images
from skipless.ssl.config import DataSettings, RunSettings, check, check_size, resolve
from skipless.ssl.data.loader import StepBatches, UnreadableImages, loader_workers, micro_batches, step_loader
from skipless.ssl.data.squares import central_squares
from skipless.ssl.data.teacher_views import StudentViews, TeacherFeatures, Views, collate
from skipless.ssl.model.start import start_backbone, start_heads
from skipless.ssl.model.teacher import Teacher, TeacherSettings
from skipless.ssl.model.vit import VisionTransformer
from skipless.ssl.monitor import Monitor, MonitorSettings
from skipless.ssl.objectives.distillation import DistillationSettings, Student
from skipless.ssl.optim.optimizers import OptimizerSettings, make_optimizer, set_rates
from skipless.ssl.optim.schedules import Schedule
from skipless.ssl.run.meter import Meter
from skipless.ssl.run.parallel import clip_grad_norm, parallelize
from skipless.ssl.run.run import Run

SAMPLE = 256  # images whose tokens standardize the teacher's channels


@dataclass(kw_only=True)
class Settings(RunSettings):
    """Everything a run depends on."""

    data: DataSettings
    teacher: TeacherSettings
    views: Views = field(default_factory=Views)
    distillation: DistillationSettings = field(default_factory=DistillationSettings)
    optimizer: OptimizerSettings = field(
        default_factory=lambda: OptimizerSettings(
            name="soap", lr=2e-3, warmup_epochs=1, weight_decay=0.05, weight_decay_end=0.05, betas=(0.8, 0.9)
        )
    )
    monitor: MonitorSettings = field(default_factory=MonitorSettings)
    epochs: int = 100
    batch_size: int = 256
    clip_grad: float = 3.0
    """Gradients whose norm over all parameters is larger are scaled down to it; 0 turns this off."""


def distill(cfg: Settings) -> Path:
    """Distill a teacher as the settings say, and return the run's folder.

    Raises:
        ValueError, FileNotFoundError: settings that contradict each other, the teacher, the data or an existing run,
            before anything is written; too many unreadable images; a loss that is not finite.
    """
    device = distributed.start(cfg.device)
    images = open_images(cfg.data.path)
    cfg, notes = check_and_resolve(cfg, images, device)  # nothing is written before the run is opened
    size, workers = cfg.views.size, loader_workers(cfg.data.workers, device)
    teacher = Teacher(cfg.teacher, size // cfg.model.patch).to(device)
    monitor = Monitor(cfg.monitor, images, size, cfg.model.pool, device, workers, cfg.out)
    torch.manual_seed(cfg.seed)
    backbone = start_backbone(cfg.model, size, cfg.seed, images, fresh=not cfg.last_checkpoint)
    student = Student(backbone, teacher.model.dim, cfg.distillation, cfg.model.pool).to(device)
    notes += start_heads(student, cfg.model, fresh=not cfg.last_checkpoint)
    distributed.sync(student)
    parallel = parallelize(student, device, cfg.precision)
    optimizer = make_optimizer(student, cfg.optimizer)
    schedule = Schedule(cfg.optimizer, cfg.epochs, cfg.batch_size, len(images))
    facts = {**images.identity, "teacher": f"{teacher.sha256} at {teacher.size} pixels"}
    run = Run(cfg, schedule, device, cfg.data.path, facts, {"student": student, "optimizer": optimizer})
    start = run.resume(may_change=("monitor.", "teacher."))
    run.open(start, f"{len(images):,} images of {images.origin}", backbone)
    run.say(*images.remarks, *monitor.introduction(), *notes, introduce(teacher))

    features = keep_features(cfg, teacher, images, run, parallel.autocast, workers)
    if start == 0:
        student.standardize(sample_tokens(teacher, images, features, parallel.autocast, device))
        distributed.sync(student)
    order = StepBatches(len(images), cfg.batch_size, cfg.accumulate, cfg.seed, start, schedule.steps)
    views = StudentViews(images, cfg.views, cfg.seed, teacher.size, features)
    loader = step_loader(views, order, workers, device, collate)
    unreadable = UnreadableImages(images, cfg.data.max_unreadable, run.folder / "unreadable.txt")
    flops = flops_per_image(backbone, size, None if features else teacher)
    meter = Meter(["loss", "cosine"], cfg.batch_size // cfg.accumulate, flops, device)

    def measure(step: int) -> None:
        if run.measure_due(step, cfg.monitor.every_epochs, monitor.metric):
            run.log_values(step, *monitor(backbone, parallel.autocast))
            meter.restart_clock()

    measure(start)
    batches = meter.timed(run.saving_where_data_ends(iter(loader)))
    for step in range(start, schedule.steps):
        now = schedule.at(step)
        set_rates(optimizer, now.lr, now.weight_decay, freeze_last_layer=False)
        distributed.seed_step(cfg.seed, step, schedule.steps)
        for batch, last in micro_batches(batches, cfg.accumulate):
            view, seen, boxes = (batch[name].to(device, non_blocking=True) for name in ("view", "teacher", "box"))
            with parallel.autocast:
                tokens = seen if features else teacher(seen)
            targets = student.targets(tokens, boxes, size // cfg.model.patch)
            with parallel.sync_gradients(last):
                with parallel.autocast:
                    said = parallel.forward(normalize(view[None]))
                loss, cosine = student.loss(said, targets)
                (loss / cfg.accumulate).backward()
            meter.add(loss, cosine)
            unreadable.add(batch["unreadable"])
        meter.add_gradient(clip_grad_norm(student.parameters(), cfg.clip_grad or math.inf))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        done = step + 1
        saving = (interrupted := run.interrupted()) or run.save_due(done)
        if saving or done % cfg.log_every == 0:
            unreadable.check(partial(run.save, done))
            means, speed = meter.read()  # between two checkpoints the host waits for the device here alone
            text = f"loss {means['loss']:.3f}, cosine similarity {means['cosine']:.3f}"
            run.log_step(done, means | now.metrics() | speed, text)
        if not interrupted and done % schedule.steps_per_epoch == 0:
            measure(done)
        if saving:
            run.save(done)
        if interrupted:
            run.stop(done)
    about = {"pool": cfg.model.pool, "teacher": teacher.sha256}
    return run.finish(backbone, "the student's backbone", about, unreadable.in_words())


def check_and_resolve(cfg: Settings, images: ImageSource, device: torch.device) -> tuple[Settings, list[str]]:
    """Find contradictions before anything is built or written, and then see `resolve`."""
    check(cfg, len(images), "data.path", images.root, device)
    check_size("views.size", cfg.views.size, cfg.model.patch)
    if cfg.monitor.every_epochs and cfg.monitor.size:
        check_size("monitor.size", cfg.monitor.size, cfg.model.patch)
    return resolve(cfg, images, device, cfg.views.size)


def introduce(teacher: Teacher) -> str:
    """A line about the teacher, for the start of a run."""
    millions = sum(p.numel() for p in teacher.model.parameters()) / 1e6
    return (
        f"teacher: {teacher.name}, {millions:.0f} M parameters, sees {teacher.size} x {teacher.size} pixels as "
        f"{teacher.side} x {teacher.side} patches"
    )


def keep_features(
    cfg: Settings, teacher: Teacher, images: ImageSource, run: Run, autocast: AbstractContextManager[Any], workers: int
) -> TeacherFeatures | None:
    """The teacher's features on disk, computed where they are not there yet; None where they are computed along."""
    if cfg.teacher.cache is None:
        return None
    features = TeacherFeatures(Path(cfg.teacher.cache).expanduser(), teacher, images, cfg.precision == "bf16")
    run.say(f"teacher's features: {features.gigabytes:.2g} GB in {features.folder}")
    features.compute(autocast, run.device, workers)
    return features


def sample_tokens(
    teacher: Teacher,
    images: ImageSource,
    features: TeacherFeatures | None,
    autocast: AbstractContextManager[Any],
    device: torch.device,
) -> Tensor:
    """The teacher's tokens of some hundred images, evenly spread, [B, 1 + N, D]."""
    if features is not None:
        rows = np.linspace(0, len(images) - 1, min(SAMPLE, len(images))).round().astype(int).tolist()
        return torch.from_numpy(np.stack([features[row] for row in rows])).to(device)
    squares = central_squares(images, SAMPLE, teacher.size).to(device)
    with autocast:
        return torch.cat([teacher(part) for part in squares.split(32)])


def flops_per_image(backbone: VisionTransformer, size: int, teacher: Teacher | None) -> float:
    """Forward and backward (twice the forward) of the student; forward of a teacher that sees the images."""
    seen = teacher.model.flops(teacher.size, teacher.size) if teacher else 0
    return 3 * backbone.flops(size, size) + seen


main = partial(cli.run, distill, Settings, __doc__)

if __name__ == "__main__":
    main()
