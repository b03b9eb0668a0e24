"""DINO pretraining of a Vision Transformer, skipless or residual, on any folder of images.

One process, on a laptop's CPU or one GPU:

    python ssl/pretrain.py --config configs/imagenette_cpu.yaml --data.path photos --out runs/photos

One machine with 8 GPUs:

    torchrun --nproc-per-node 8 ssl/pretrain.py --config configs/vits16_skipless_soap.yaml --data.path imagenet/train

Several machines, on each of them (docs/training.md has the SLURM script):

    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 ssl/pretrain.py ...

`--batch_size` counts images over all processes, so a recipe means the same on any number of them.
`--resume` continues a run exactly where its last checkpoint left it, or starts it: safe to requeue.
"""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from skipless.common import cli, distributed
from skipless.common.files import write_text
from skipless.common.pixels import normalize
from skipless.common.precision import autocast, describe, has_bf16
from skipless.common.provenance import provenance
from skipless.common.settings import plain
from skipless.datasets.images import ImageSource, open_images
from skipless.ssl.config import Settings
from skipless.ssl.data.crops import CropDataset, collate
from skipless.ssl.data.device_crops import (
    DeviceCropDataset,
    DeviceCrops,
    collate_images,
    crops_on_device,
    decodes_jpegs,
)
from skipless.ssl.data.loader import StepBatches, leave_signals_to_main, loader_workers
from skipless.ssl.data.squares import normalized_squares
from skipless.ssl.dino import (
    DINOHead,
    DINOLoss,
    DINOModel,
    make_teacher,
    update_teacher,
)
from skipless.ssl.model.attention import choose_backend
from skipless.ssl.model.statistics import cheap_conditioning
from skipless.ssl.monitor import describe_blocks, labeled_sets, measure_blocks
from skipless.ssl.optim.optimizers import Optimizer, make_optimizer, set_rates
from skipless.ssl.optim.schedules import Rates
from skipless.ssl.run import sharding
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
from skipless.ssl.run.meter import Meter

Logits = Callable[[Sequence[Tensor]], Tensor]


def pretrain(settings: Settings) -> Path:
    """Run DINO pretraining as `settings` say, and return the run's folder.

    Raises:
        ValueError, FileNotFoundError: settings that contradict each other, the data or an existing run, before anything
            is written; too many unreadable images; a loss that is not finite.
    """
    device = distributed.start(settings.device)
    if device.type == "cpu":
        keep_freed_memory()
    images = open_images(settings.data.path)
    check(settings, images, device)
    if settings.compile:
        settings.model.attention = "sdpa"  # xformers' kernels would cut the graph
    settle_embedding(settings.model)
    beta_from = settle_beta(settings, images, settings.crops.global_crops_size)
    out = Path(settings.out)
    sets = labeled_sets(images, settings.monitor, settings.crops.global_crops_size)
    squares = None
    if settings.monitor.conditioning and settings.monitor.every_epochs:
        squares = normalized_squares(images, 16, settings.crops.global_crops_size).to(device)
    bf16 = settings.precision == "bf16" or (settings.precision == "auto" and has_bf16(device))
    low_precision = autocast(device, bf16)

    torch.manual_seed(settings.seed)
    student = build_model(settings)
    whiten(student.backbone, settings, images, settings.crops.global_crops_size)
    student.to(device)
    parallel = None
    if distributed.world_size() > 1 and not settings.shard:
        # Makes all students equal, so it comes before the teacher is copied from one.
        parallel = DistributedDataParallel(
            student, [device] if device.type == "cuda" else None, gradient_as_bucket_view=True
        )
    teacher = make_teacher(student)
    if settings.shard:
        sharding.shard(student, teacher, bf16)
    student_logits, teacher_logits = compiled(parallel or student, teacher, settings.compile)
    objective = DINOLoss(
        settings.dino.out_dim,
        settings.dino.student_temp,
        settings.dino.center_momentum,
        settings.dino.balancing,
    ).to(device)
    optimizer = make_optimizer(student, settings.optimizer)
    start, seconds_before = _resume(settings, len(images), student, teacher, objective, optimizer)
    began = time.perf_counter()

    steps_per_epoch = len(images) // settings.batch_size
    total = settings.epochs * steps_per_epoch
    workers = loader_workers(settings.data.workers, device)
    of_crops = torch.bfloat16 if bf16 and device.type == "cuda" else torch.float32
    loader, to_crops = make_loader(settings, images, device, of_crops, start, total)
    rates = Rates(settings, steps_per_epoch, total)
    first_process = distributed.rank() == 0
    if first_process:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "settings.yaml", yaml.safe_dump(plain(settings), sort_keys=False))
    log = RunLog(out, plain(settings), start, total, active=first_process, wandb=settings.wandb)
    meter = Meter(settings, student.backbone, device, steps_per_epoch, log)
    _introduce(log, settings, images, student, device, bf16, sets[2] if sets else None, start, total)
    if beta_from:
        log.say(f"model.beta is {settings.model.beta:g}: {beta_from}")
    interrupted = Interruption()

    def save(step: int) -> None:
        if first_process or settings.shard:
            state = {
                "step": step,
                "seconds": seconds_before + time.perf_counter() - began,
                "student": student.state_dict(),
                "teacher": teacher.state_dict(),
                "objective": objective.state_dict(),
                "optimizer": optimizer.state_dict(),
                "architecture": student.backbone.architecture,
                "settings": plain(settings),
                "images": len(images),
            }
            write = sharding.save_shards if settings.shard else save_checkpoint
            write(out / "checkpoints", step, state, settings.keep)

    def monitor(step: int) -> None:
        """Measure where it is due and has not been measured (by the run that is resumed)."""
        due = step == total or step % (steps_per_epoch * max(1, settings.monitor.every_epochs)) == 0
        logged = distributed.any_process(log.has(step, "monitor/knn" if sets else "monitor/conditioning/kurtosis"))
        if not due or logged or (sets is None and squares is None):
            return
        backbone = sharding.full_backbone(teacher)
        by_name: dict[str, list[float]] = {}
        if sets:
            with low_precision:
                blocks = measure_blocks(backbone, *sets[:2], settings.monitor.k, settings.model.pool, workers)
            by_name |= {f"monitor/{name}": [block[name] for block in blocks] for name in blocks[0]}
            log.say(f"epoch {step / steps_per_epoch:g}: {describe_blocks(blocks, settings.monitor.k)}")
        if squares is not None:
            found = cheap_conditioning(backbone, squares)
            by_name |= {f"monitor/conditioning/{name}": values for name, values in found.items()}
        log.metrics(step, step / steps_per_epoch, by_name)
        meter.restart_clock()

    monitor(start)
    batches = meter.timed(loader)
    for step in range(start, total):
        set_rates(optimizer, rates.lr(step), rates.weight_decay(step), rates.last_layer_frozen(step))
        # Randomness of a step depends on (seed, step, rank) alone, so there is no random state to save.
        torch.manual_seed((settings.seed * total + step) * distributed.world_size() + distributed.rank())
        for micro in range(settings.accumulate):
            batch = next(batches)
            crops = to_crops(batch)
            last_micro = micro == settings.accumulate - 1
            with sharding.hold_reduction(parallel or student, not last_micro):
                with low_precision:
                    with torch.no_grad():
                        targets = teacher_logits(crops[:1])
                    result = objective(
                        student_logits(crops),
                        targets,
                        2 + settings.crops.local_crops_number,
                        rates.teacher_temperature(step),
                    )
                (result.loss / settings.accumulate).backward()
            meter.add(result, batch["unreadable"])
        norm = sharding.clip_gradients(student.parameters(), settings.clip_grad or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        objective.update_center()
        update_teacher(teacher, student, rates.momentum(step))

        done = step + 1
        log.advance()
        epoch_ends = done % steps_per_epoch == 0
        epoch = done // steps_per_epoch
        stopping = distributed.any_process(interrupted.yes)
        saving = stopping or done == total or (epoch_ends and epoch % settings.save_every_epochs == 0)
        if done % settings.log_every == 0 or saving:
            meter.report(done, norm, rates, images)  # the only place where the host waits for the device
        if epoch_ends and not stopping:
            monitor(done)
        if saving:
            save(done)
        if stopping:
            log.say(f"interrupted after step {done}: checkpoint written; continue with --resume")
            break
    else:
        backbone = sharding.full_backbone(teacher)
        if first_process:
            about = {
                "pool": settings.model.pool,
                "step": total,
                "seconds": round(seconds_before + time.perf_counter() - began, 1),
                "processes": distributed.world_size(),
                **provenance(device),
                "settings": plain(settings),
            }
            export_backbone(out, backbone, about)
            log.say(f"done: the teacher's backbone is {out / 'backbone.safetensors'}")
    log.close()
    return out


def check(settings: Settings, images: ImageSource, device: torch.device) -> None:
    """Contradictions that can be found before anything is built or written."""
    check_run(settings, len(images), "data.path", images.root, device)
    sharding.check_shard(settings)
    dino, crops = settings.dino, settings.crops
    if settings.compile and device.type == "cpu":
        raise ValueError("compile is true, and the device is a CPU, where it gains nothing: leave it out")
    if settings.compile and settings.model.attention == "xformers":
        raise ValueError(
            "compile is true and model.attention is 'xformers', which cannot be compiled: leave model.attention on auto"
        )
    for name in ("out_dim", "hidden_dim", "bottleneck_dim"):
        if getattr(dino, name) < 1:
            raise ValueError(f"dino.{name} is {getattr(dino, name)}; it must be at least 1")
    for name in ("student_temp", "teacher_temp", "warmup_teacher_temp"):
        if getattr(dino, name) <= 0:
            raise ValueError(f"dino.{name} is {getattr(dino, name)}; it must be positive")
    for name in ("momentum_teacher", "center_momentum"):
        if not 0 <= getattr(dino, name) <= 1:
            raise ValueError(f"dino.{name} is {getattr(dino, name)}; it must be in [0, 1]")
    if dino.freeze_last_layer >= settings.epochs:
        raise ValueError(
            f"dino.freeze_last_layer is {dino.freeze_last_layer:g} in a run of "
            f"{settings.epochs} epochs; the last layer would never learn: lower it, or raise epochs"
        )
    check_size("crops.global_crops_size", crops.global_crops_size, settings.model.patch)
    if crops.local_crops_number:
        check_size("crops.local_crops_size", crops.local_crops_size, settings.model.patch)


def build_model(settings: Settings) -> DINOModel:
    """The student at its start: backbone, initialized as the settings say but for `whiten`, and head.

    Draws from torch's global random state, except for the skipless initialization, which draws from `settings.seed`.
    """
    backbone = build_backbone(settings.model, settings.crops.global_crops_size, settings.seed)
    dino = settings.dino
    head = DINOHead(backbone.dim, dino.out_dim, dino.hidden_dim, dino.bottleneck_dim, dino.norm_last_layer)
    return DINOModel(backbone, head, settings.model.pool)


def compiled(student: nn.Module, teacher: nn.Module, wanted: bool) -> tuple[Logits, Logits]:
    """The forward passes of training, compiled if wanted: each once, as one graph (with DistributedDataParallel one for
    each bucket of gradients, which are sent while the next is computed). The networks stay as they are, for
    checkpoints, and for measurements on images of other sizes, each of which would have to be compiled anew."""
    if not wanted:
        return student, teacher
    return torch.compile(student, dynamic=False), torch.compile(teacher, dynamic=False)


def make_loader(
    settings: Settings, images: ImageSource, device: torch.device, dtype: torch.dtype, start: int, total: int
) -> tuple[DataLoader[Any], Callable[[dict[str, Any]], list[Tensor]]]:
    """The batches from step `start` to `total`, and what makes the crops of one on the device: [views * B, 3, S, S],
    normalised, globals first, locals second if there are any. `dtype` is that of crops made on the device."""

    def cropped_by_loader(batch: dict[str, Any]) -> list[Tensor]:
        views = [batch["global"]] + ([batch["local"]] if batch["local"] is not None else [])
        return [normalize(v.to(device, non_blocking=True)) for v in views]

    dataset: Dataset[Any] = CropDataset(images, settings.crops, settings.seed)
    to_crops: Callable[[dict[str, Any]], list[Tensor]] = cropped_by_loader
    on_device = crops_on_device(settings.crops, device)
    if on_device:
        decoding = settings.crops.device == "device" and decodes_jpegs(device)
        dataset = DeviceCropDataset(images, settings.crops, settings.seed, jpegs=decoding)
        to_crops = DeviceCrops(dataset, device, dtype)
    loader = DataLoader(
        dataset,
        batch_sampler=StepBatches(len(images), settings.batch_size, settings.accumulate, settings.seed, start, total),
        num_workers=loader_workers(settings.data.workers, device),
        collate_fn=collate_images if on_device else collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_signals_to_main,
    )
    return loader, to_crops


def _resume(
    settings: Settings,
    images: int,
    student: DINOModel,
    teacher: DINOModel,
    objective: DINOLoss,
    optimizer: Optimizer,
) -> tuple[int, float]:
    """Load the run's last checkpoint if it is to be resumed and has one; return its steps and seconds so far."""
    state = state_to_resume(
        settings,
        student.backbone.architecture,
        images,
        settings.data.path,
        may_change=("monitor.", "crops.device", "compile"),
    )
    if state is None:
        return 0, 0.0
    objective.load_state_dict({"center" if name == "centre" else name: x for name, x in state["objective"].items()})
    if settings.shard:
        sharding.load_shards(Path(settings.out) / "checkpoints", student, teacher, optimizer)
    else:
        student.load_state_dict(state["student"])
        teacher.load_state_dict(state["teacher"])
        optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["seconds"]


def _introduce(
    log: RunLog,
    settings: Settings,
    images: ImageSource,
    student: DINOModel,
    device: torch.device,
    bf16: bool,
    monitored: str | None,
    start: int,
    total: int,
) -> None:
    """What is about to happen, in a few lines."""
    parameters = sum(p.numel() for p in student.backbone.parameters())
    millions = f"{parameters / 1e6:.1f} M" if parameters >= 1e5 else f"{parameters:,}"
    processes = distributed.world_size()
    kind = "residual" if settings.model.residual else "skipless"
    log.say(
        f"{len(images):,} images of {images.origin}; {kind} ViT, {millions} parameters; {total:,} steps of "
        f"{settings.batch_size} images" + (f", from step {start:,}" if start else "")
    )
    why = choose_backend(device, settings.model.attention)[1]
    where = f"on {device}" if crops_on_device(settings.crops, device) else "by the loader"
    log.say(
        f"{processes} process{'es' if processes > 1 else ''} on {device}; {describe(device, bf16)}; attention: {why}; "
        f"crops: made {where}"
    )
    if settings.monitor.every_epochs:
        log.say(
            f"k-NN monitor: {monitored}" if monitored else "k-NN monitor: off, since the images have no class folders"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    cli.run(pretrain, Settings, __doc__, arguments)


if __name__ == "__main__":
    main()
