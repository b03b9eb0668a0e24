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
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from skipless.datasets.images import ImageSource, open_images
from skipless.ssl import distributed
from skipless.ssl.attention import choose_backend
from skipless.ssl.checkpoints import export_backbone, load_checkpoint, save_checkpoint, write_text
from skipless.ssl.crops import CropDataset, collate, normalize
from skipless.ssl.dino import (
    DINOHead,
    DINOLoss,
    DINOModel,
    make_teacher,
    update_teacher,
)
from skipless.ssl.initialization import PRESETS, skipless_init_
from skipless.ssl.logs import RunLog
from skipless.ssl.meter import Meter
from skipless.ssl.monitor import describe_blocks, labelled_sets, measure_blocks
from skipless.ssl.optimizers import make_optimizer, set_rates
from skipless.ssl.provenance import provenance
from skipless.ssl.schedules import Rates
from skipless.ssl.settings import Settings, check, flat, initialization_of, plain
from skipless.ssl.vit import SIZES, VisionTransformer


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
    check(settings, images, device)
    out = Path(settings.out)
    sets = labelled_sets(images, settings.monitor, settings.crops.global_size)
    bf16 = settings.precision == "bf16" or (settings.precision == "auto" and _has_bf16(device))
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)

    torch.manual_seed(settings.seed)
    student = build_model(settings).to(device)
    model: nn.Module = student
    if distributed.world_size() > 1:
        # Makes all students equal, so it comes before the teacher is copied from one.
        model = DistributedDataParallel(
            student, [device] if device.type == "cuda" else None, gradient_as_bucket_view=True
        )
    teacher = make_teacher(student)
    objective = DINOLoss(
        settings.dino.prototypes,
        settings.dino.student_temperature,
        settings.dino.centre_momentum,
        settings.dino.balancing,
    ).to(device)
    optimizer = make_optimizer(student, settings.optimizer)
    start, seconds_before = _resume(settings, len(images), student, teacher, objective, optimizer)
    began = time.perf_counter()

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
        worker_init_fn=distributed.leave_signals_to_main,
    )
    rates = Rates(settings, steps_per_epoch, total)
    first_process = distributed.rank() == 0
    if first_process:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "settings.yaml", yaml.safe_dump(plain(settings), sort_keys=False))
    log = RunLog(out, plain(settings), start, total, active=first_process, wandb=settings.wandb)
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
                "settings": plain(settings),
                "images": len(images),
            }
            save_checkpoint(out / "checkpoints", step, state, settings.keep)

    def monitor(step: int) -> None:
        """Measure where it is due and has not been measured (by the run that is resumed)."""
        due = step == total or step % (steps_per_epoch * max(1, settings.monitor.every_epochs)) == 0
        if not sets or not due or distributed.any_process(log.has(step, "monitor/knn")):
            return
        with autocast:
            blocks = measure_blocks(teacher.backbone, *sets[:2], settings.monitor.k, settings.model.pool, workers)
        by_name = {f"monitor/{name}": [block[name] for block in blocks] for name in blocks[0]}
        log.metrics(step, step / steps_per_epoch, by_name)
        log.say(f"epoch {step / steps_per_epoch:g}: {describe_blocks(blocks, settings.monitor.k)}")
        meter.restart_clock()

    monitor(start)
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
        if epoch_ends and not stopping:
            monitor(done)
        if saving:
            save(done)
        if stopping:
            log.say(f"interrupted after step {done}: checkpoint written; continue with --resume")
            break
    else:
        if first_process:
            about = {
                "pool": settings.model.pool,
                "step": total,
                "seconds": round(seconds_before + time.perf_counter() - began, 1),
                "processes": distributed.world_size(),
                **provenance(device),
                "settings": plain(settings),
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
    preset = initialization_of(wanted)
    if preset != "default":
        changes = {
            name: getattr(wanted, name) for name in ("alpha", "beta", "c", "mlp") if getattr(wanted, name) is not None
        }
        skipless_init_(backbone, **(PRESETS[preset] | changes), seed=settings.seed)
    dino = settings.dino
    head = DINOHead(backbone.dim, dino.prototypes, dino.hidden, dino.bottleneck, dino.norm_last_layer)
    return DINOModel(backbone, head, wanted.pool)


class _Interruption:
    """Notes SIGTERM and SIGUSR1, which schedulers send before they end a job."""

    def __init__(self) -> None:
        self.yes = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, *_: Any) -> None:
        self.yes = True


def _resume(
    settings: Settings,
    images: int,
    student: DINOModel,
    teacher: DINOModel,
    objective: DINOLoss,
    optimizer: torch.optim.Optimizer,
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
    if state["images"] != images:
        raise ValueError(
            f"{path} is of a run on {state['images']:,} images, and {settings.data.path} has {images:,}; give the same "
            "images, or another --out"
        )
    old, new = flat(state["settings"]), flat(plain(settings))
    may_change = ("out", "device", "wandb", "keep", "log_every", "save_every_epochs", "accumulate")
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
    parameters = sum(p.numel() for p in student.backbone.parameters())
    millions = f"{parameters / 1e6:.1f} M" if parameters >= 1e5 else f"{parameters:,}"
    processes = distributed.world_size()
    kind = "residual" if settings.model.residual else "skipless"
    log.say(
        f"{len(images):,} images of {images.root}; {kind} ViT, {millions} parameters; {total:,} steps of "
        f"{settings.batch_size} images" + (f", from step {start:,}" if start else "")
    )
    why = choose_backend(device, settings.model.attention)[1]
    log.say(f"{processes} process{'es' if processes > 1 else ''} on {device}; attention: {why}")
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


def _has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bf16 by itself: GPUs from Ampere on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _keep_freed_memory() -> None:
    """Stop glibc from handing large blocks back to the kernel: to fetch them anew for every tensor of every step costs
    page faults that take a good part of the step. Elsewhere than on glibc this does nothing."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_threshold, gigabyte = -1, -3, 1 << 30
        # Older glibc refuses a threshold above 32 MB; to set only the other one would make things worse.
        if ctypes.CDLL(None).mallopt(mmap_threshold, gigabyte):
            ctypes.CDLL(None).mallopt(trim_threshold, gigabyte)


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
        help="Continue from the last checkpoint in `out`, where there is one.",
    )
    values = parser.instantiate(parser.parse_args(arguments)).as_dict()
    values.pop("config", None)
    return Settings(**values)


def main(arguments: list[str] | None = None) -> None:
    """The command line: a sentence and exit code 2 for whatever the user can mend."""
    from jsonargparse import ArgumentError

    try:
        pretrain(parse(arguments))
    except (ValueError, OSError, ArgumentError) as error:
        # An error inside a loader's worker comes with the worker's traceback: its last line is the sentence.
        sentence = str(error).strip().splitlines()[-1] if "Traceback" in str(error) else " ".join(str(error).split())
        who = f" (process {distributed.rank()})" if distributed.rank() else ""
        print(f"error{who}: {sentence}", file=sys.stderr)
        sys.exit(2)
    finally:
        distributed.stop()


if __name__ == "__main__":
    main()
