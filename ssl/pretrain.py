"""DINO pretraining of a Vision Transformer, skipless or residual, on any folder of images.

One process, on a laptop's CPU or one GPU:

    python ssl/pretrain.py --config configs/imagenette_cpu.yaml --data.path photos --out runs/photos

Without flags, on the images that datasets/prepare.py has put into data/, or else for minutes on synthetic scenes:

    torchrun ssl/pretrain.py

One machine with 8 GPUs:

    torchrun --nproc-per-node 8 ssl/pretrain.py --config configs/vits16_skipless_soap.yaml --data.path imagenet/train

Several machines, on each of them (docs/training.md has the SLURM script):

    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 ssl/pretrain.py ...

`--batch_size` counts images over all processes, so a recipe means the same on any number of them.
`--resume` continues a run exactly where its last checkpoint left it, or starts it: safe to requeue.
"""

import skipless.common.interruption  # noqa: F401

import math
from functools import partial
from pathlib import Path

import torch

from skipless.common import cli, distributed
from skipless.datasets.images import ImageSource, open_images
from skipless.ssl.config import Settings, check, check_size, resolve
from skipless.ssl.data.crops import Crops
from skipless.ssl.data.device_crops import where_made
from skipless.ssl.data.loader import StepBatches, UnreadableImages, crop_loader, loader_workers, micro_batches
from skipless.ssl.dino import DINOModel, build_dino, make_teacher, update_teacher
from skipless.ssl.model.start import start_backbone, start_heads
from skipless.ssl.monitor import CollapseAlarm, Monitor
from skipless.ssl.objectives.objective import Objective
from skipless.ssl.optim.optimizers import make_optimizer, set_rates
from skipless.ssl.optim.schedules import DINOSchedule
from skipless.ssl.run.compiling import Compiler, resolve_compile
from skipless.ssl.run.defaults import fill
from skipless.ssl.run.meter import Meter
from skipless.ssl.run.parallel import clip_grad_norm, full_backbone, parallelize
from skipless.ssl.run.run import Run


def pretrain(cfg: Settings) -> Path:
    """Run DINO pretraining as the settings say, and return the run's folder.

    Raises:
        ValueError, FileNotFoundError: settings that contradict each other, the data or an existing run, before anything
            is written; too many unreadable images; a loss that is not finite.
    """
    device = distributed.start(cfg.device)
    images = open_images(cfg.data.path)
    cfg, notes = check_and_resolve(cfg, images, device)  # nothing is written before the run is opened
    size, workers = cfg.crops.global_crops_size, loader_workers(cfg.data.workers, device)
    monitor = Monitor(cfg.monitor, images, size, cfg.model.pool, device, workers, cfg.out)
    torch.manual_seed(cfg.seed)
    backbone = start_backbone(cfg.model, cfg.position_size, cfg.seed, images, fresh=not cfg.earlier)
    student = build_dino(backbone, cfg.dino, cfg.model.pool, cfg.ibot.on, cfg.ibot.out_dim).to(device)
    notes += start_heads(student, cfg.model, fresh=not cfg.earlier)
    distributed.sync(student)
    teacher, compiler = make_teacher(student), Compiler(cfg.compile is True)
    schedule = DINOSchedule(cfg.optimizer, cfg.dino, cfg.epochs, cfg.batch_size, len(images))
    objective = Objective(cfg, student.backbone, schedule.steps_per_epoch, device, compiler)
    student_parallel = parallelize(student, device, cfg.precision, cfg.shard, compiler)  # DDP, FSDP2 or nothing
    teacher_parallel = parallelize(teacher, device, cfg.precision, cfg.shard, compiler)
    optimizer = make_optimizer(student, cfg.optimizer)
    parts = {"student": student, "teacher": teacher, **objective.parts, "optimizer": optimizer}
    run = Run(cfg, schedule, device, cfg.data.path, images.identity, parts)
    start = run.resume(may_change=("monitor.", "crops.device", "compile"), extend=cfg.extend)

    order = StepBatches(len(images), cfg.batch_size, cfg.accumulate, cfg.seed, start, schedule.steps)
    masks, ln_k = cfg.ibot.masks(size // cfg.model.patch), math.log(cfg.dino.out_dim)
    loader, make_crops = crop_loader(images, cfg.crops, order, workers, device, cfg.precision == "bf16", masks)
    unreadable = UnreadableImages(images, cfg.data.max_unreadable, run.folder / "unreadable.txt")
    meter = Meter(objective.names, cfg.batch_size // cfg.accumulate, flops_per_image(student, cfg.crops), device)
    alarm = CollapseAlarm(cfg.dino.out_dim, schedule.warmup, partial(full_backbone, student), student_parallel.autocast)
    run.open(start, f"{len(images):,} images of {images.origin}", student.backbone, where_made(cfg.crops, device))
    run.say(*images.remarks, *monitor.introduction(), *notes)

    def measure_teacher(step: int) -> None:
        if run.measure_due(step, cfg.monitor.every_epochs, monitor.metric):
            run.log_values(step, *monitor(full_backbone(teacher), student_parallel.autocast))
            meter.restart_clock()  # images a second are those of training

    measure_teacher(start)
    batches = meter.timed(run.saving_where_data_ends(iter(loader)))
    for step in range(start, schedule.steps):
        now = schedule.at(step)
        set_rates(optimizer, now.lr, now.weight_decay, now.last_layer_frozen)
        distributed.seed_step(cfg.seed, step, schedule.steps)
        objective.start_step(step, partial(full_backbone, teacher))
        for batch, last in micro_batches(batches, cfg.accumulate):
            crops, larger, hidden = make_crops(batch)
            with torch.no_grad(), student_parallel.autocast:
                targets = teacher_parallel.forward(crops[:1], hidden.read)  # the two global crops of every image
            with student_parallel.sync_gradients(last):
                with student_parallel.autocast:
                    outputs = student_parallel.forward(crops, hidden.read, hidden.patches, cfg.gram.on)
                loss, *values = objective(outputs, targets, hidden, larger, now.teacher_temperature)
                (loss / cfg.accumulate).backward()
            meter.add(*values)
            unreadable.add(batch["unreadable"])
        meter.add_gradient(clip_grad_norm(student.parameters(), cfg.clip_grad or math.inf))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        objective.end_step()
        update_teacher(teacher, student, now.momentum)

        done = step + 1
        saving = (interrupted := run.interrupted()) or run.save_due(done)
        if saving or done % cfg.log_every == 0:
            unreadable.check(partial(run.save, done))
            means, speed = meter.read()  # between two checkpoints the host waits for the device here alone
            more = {"below_ln_k": ln_k - means["loss"]} | now.metrics()
            run.log_step(done, means | more | speed, f"loss {means['loss']:.3f} (ln K {ln_k:.2f})")
            run.say(*alarm(done, means, crops[0]))
        if not interrupted and done % schedule.steps_per_epoch == 0:
            measure_teacher(done)
        if saving:
            run.save(done)
        if interrupted:
            run.stop(done)
    return run.finish(full_backbone(teacher), "the teacher's backbone", {"pool": cfg.model.pool}, unreadable.in_words())


def check_and_resolve(cfg: Settings, images: ImageSource, device: torch.device) -> tuple[Settings, list[str]]:
    """Find contradictions before anything is built or written, and then see `resolve`."""
    check(cfg, len(images), "data.path", images.root, device)
    if cfg.shard and not torch.distributed.is_initialized():
        raise ValueError(
            "shard is true, but no launcher has started the processes to shard over; use torchrun (--nproc-per-node 1 "
            "does for one GPU), or leave shard out"
        )
    if cfg.dino.koleo_loss_weight and cfg.batch_size == distributed.world_size() * cfg.accumulate:
        raise ValueError(
            "dino.koleo_loss_weight is set, and a micro-batch has one image, which has no neighbors: lower accumulate"
        )
    if cfg.ibot.on and cfg.ibot.from_epoch >= cfg.epochs:
        raise ValueError(f"ibot.from_epoch is {cfg.ibot.from_epoch} in a run of {cfg.epochs} epochs: lower it")
    if cfg.extend is not None and cfg.model.from_ckpt is not None:
        raise ValueError("extend and model.from are both given, and each brings weights: leave one of them out")
    if cfg.extend is not None:
        check_extends(cfg.extend, cfg.out)
    if cfg.dino.freeze_last_layer >= cfg.epochs:
        raise ValueError(
            f"dino.freeze_last_layer is {cfg.dino.freeze_last_layer:g} in a run of "
            f"{cfg.epochs} epochs; the last layer would never learn: lower it, or raise epochs"
        )
    if cfg.crops.gram_teacher_crops_size:
        check_size("crops.gram_teacher_crops_size", cfg.crops.gram_teacher_crops_size, cfg.model.patch)
    if cfg.gram.on and cfg.gram.from_epoch >= cfg.epochs:
        raise ValueError(f"gram.from_epoch is {cfg.gram.from_epoch} in a run of {cfg.epochs} epochs: lower it")
    if cfg.crops.gram_teacher_crops_size and not cfg.gram.on:
        raise ValueError("crops.gram_teacher_crops_size is set, and gram.loss_weight is 0: give both or none")
    check_size("crops.global_crops_size", cfg.crops.global_crops_size, cfg.model.patch)
    if cfg.crops.local_crops_number:
        check_size("crops.local_crops_size", cfg.crops.local_crops_size, cfg.model.patch)
    if cfg.monitor.every_epochs and cfg.monitor.size:
        check_size("monitor.size", cfg.monitor.size, cfg.model.patch)
    cfg, notes = resolve(cfg, images, device, cfg.crops.global_crops_size)
    if cfg.extend is not None:
        rate = cfg.optimizer.lr * cfg.batch_size / 256
        notes.append(
            f"goes on from {cfg.extend} for {cfg.epochs} more epochs, counted from 0: learning rate up to {rate:g} in "
            f"{cfg.optimizer.warmup_epochs:g} epochs and down to {cfg.optimizer.min_lr:g}; the teacher's momentum "
            f"rises from {cfg.dino.momentum_teacher:g} to 1, its temperature is {cfg.dino.teacher_temp:g}"
        )
    resolve_compile(cfg, device)
    return cfg, notes


def check_extends(folder: str, out: str) -> None:
    """Raise ValueError where a folder holds no finished run, or is the new run's own."""
    if not (Path(folder) / "backbone.json").exists():
        raise ValueError(f"extend is {folder}, which has no backbone.json: give the folder of a finished run")
    if Path(folder).resolve() == Path(out).resolve():
        raise ValueError(f"extend and out are both {folder}: give the longer run a folder of its own as --out")


def flops_per_image(student: DINOModel, crops: Crops) -> float:
    """Forward of the teacher; forward and backward (twice the forward) of the student."""
    one_global, one_local = (
        student.backbone.flops(size, size) for size in (crops.global_crops_size, crops.local_crops_size)
    )
    return 2 * one_global + 3 * (2 * one_global + crops.local_crops_number * one_local)


main = partial(cli.run, pretrain, Settings, __doc__, fill=fill)

if __name__ == "__main__":
    main()
