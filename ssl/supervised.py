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

import skipless.common.interruption  # noqa: F401

import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset

from skipless.common import cli, distributed
from skipless.common.pixels import normalize
from skipless.datasets.labels.classes import LabeledData, LabeledSet, open_splits
from skipless.ssl.config import RunSettings, check, check_size, resolve
from skipless.ssl.data.augmentation import (
    Augmentation,
    TrainingImages,
    ValidationImages,
    collate,
    mixing,
    prepare,
)
from skipless.ssl.data.loader import StepBatches, leave_signals_to_main, loader_workers, micro_batches, step_loader
from skipless.ssl.data.squares import Images
from skipless.ssl.model.build import ModelSettings as BackboneSettings
from skipless.ssl.model.classifier import Classifier, Pool, gather_into_cls_
from skipless.ssl.model.start import start_backbone, start_heads
from skipless.ssl.optim.optimizers import OptimizerSettings, make_optimizer, set_rates
from skipless.ssl.optim.schedules import Schedule
from skipless.ssl.run.meter import Meter
from skipless.ssl.run.parallel import clip_grad_norm, parallelize
from skipless.ssl.run.run import Run


@dataclass
class DataSettings(LabeledData):
    """What is learned from and what is classified."""

    workers: int | None = None
    """Processes per training process that load and augment images; by default its share of the cores but two
    with a GPU, and none on a CPU, where training needs the cores itself."""


@dataclass
class ModelSettings(BackboneSettings):
    """The backbone, and what the classifier reads of it."""

    pool: Pool = "mean"  # type: ignore[assignment]  # two more ways than pretraining has
    """What the classifier reads: the `mean` of the patch tokens; the class token `cls`, which near-identity attention
    starves in a skipless model; `gathering-cls`, a class token that starts by attending to all tokens alike; or
    `attention`, one learned query over the patch tokens, after the last block."""


@dataclass(kw_only=True)
class Settings(RunSettings):
    """Everything a run depends on."""

    data: DataSettings
    model: ModelSettings = field(default_factory=lambda: ModelSettings(size="base"))
    augmentation: Augmentation = field(default_factory=Augmentation)
    optimizer: OptimizerSettings = field(
        default_factory=lambda: OptimizerSettings(
            lr=2.5e-4, min_lr=1e-5, warmup_epochs=5, weight_decay=0.05, weight_decay_end=0.05
        )
    )
    epochs: int = 300
    batch_size: int = 1024
    accumulate: int = 1
    """Micro-batches per step: a fraction of the memory. Images are mixed within a micro-batch of a process."""
    clip_grad: float = 1.0
    validate_every_epochs: int = 1
    """Epochs between two measurements on the validation images; the last epoch always ends with one."""


def train(cfg: Settings) -> Path:
    """Train a classifier as the settings say, and return the run's folder.

    Raises:
        ValueError, FileNotFoundError: settings that contradict each other, the data or an existing run, before anything
            is written; an unreadable image; a loss that is not finite.
    """
    device = distributed.start(cfg.device)
    data = cfg.data
    images, val_images = open_splits(data)
    cfg, notes = check_and_resolve(cfg, images, device)  # nothing is written before the run is opened
    size, workers = cfg.augmentation.size, loader_workers(data.workers, device)

    torch.manual_seed(cfg.seed)
    classifier = build_classifier(cfg, len(images.classes), images).to(device)
    notes += start_heads(classifier, cfg.model, fresh=not cfg.last_checkpoint)
    distributed.sync(classifier)
    parallel = parallelize(classifier, device, cfg.precision)
    optimizer = make_optimizer(classifier, cfg.optimizer)
    schedule = Schedule(cfg.optimizer, cfg.epochs, cfg.batch_size, len(images))
    facts = {"images": len(images), "classes": list(images.classes)}
    run = Run(cfg, schedule, device, data.root, facts, {"student": classifier, "optimizer": optimizer})
    start = run.resume(may_change=("validate_every_epochs",))

    order = StepBatches(len(images), cfg.batch_size, cfg.accumulate, cfg.seed, start, schedule.steps)
    loader = step_loader(TrainingImages(images, cfg.augmentation, cfg.seed), order, workers, device, collate)
    mix = mixing(cfg.augmentation, len(images.classes))
    # The backward pass is twice the forward.
    meter = Meter(["loss"], cfg.batch_size // cfg.accumulate, 3 * classifier.backbone.flops(size, size), device)
    about = f"{len(images):,} images of {len(images.classes)} classes ({images.name}, {images.split})"
    run.open(start, about, classifier)
    run.say(*introduce(images, val_images), *notes)
    validation: dict[str, float] = {}

    def measure(step: int) -> None:
        new = step > 0 and run.measure_due(step, cfg.validate_every_epochs, "val/top1")
        if new or step == schedule.steps:
            with parallel.autocast:
                validation.update(validate(classifier, val_images, size, workers))
            top1, top5, loss = (validation[name] for name in ("top1", "top5", "loss"))
            text = f"validation top-1 {100 * top1:.1f} %, top-5 {100 * top5:.1f} %, loss {loss:.3f}"
            run.log_values(step, {f"val/{name}": x for name, x in validation.items()} if new else {}, text)
            meter.restart_clock()

    measure(start)
    batches = meter.timed(run.saving_where_data_ends(iter(loader)))
    for step in range(start, schedule.steps):
        now = schedule.at(step)
        set_rates(optimizer, now.lr, now.weight_decay, freeze_last_layer=False)
        distributed.seed_step(cfg.seed, step, schedule.steps)
        for batch, last in micro_batches(batches, cfg.accumulate):
            views, targets = prepare(batch, device)
            if mix is not None:
                views, targets = mix(views, targets)
            with parallel.sync_gradients(last):
                with parallel.autocast:
                    logits = parallel.forward(views)
                loss = F.cross_entropy(logits.float(), targets, label_smoothing=cfg.augmentation.label_smoothing)
                (loss / cfg.accumulate).backward()
            meter.add(loss)
        meter.add_gradient(clip_grad_norm(classifier.parameters(), cfg.clip_grad or math.inf))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        done = step + 1
        interrupted = run.interrupted()
        saving = interrupted or run.save_due(done)
        if saving or done % cfg.log_every == 0:
            means, speed = meter.read()  # the only place where the host waits for the device
            run.log_step(done, means | now.metrics() | speed, f"loss {means['loss']:.3f}")
        if not interrupted and done % schedule.steps_per_epoch == 0:
            measure(done)
        if saving:
            run.save(done)
        if interrupted:
            run.stop(done)
    measured = {"dataset": val_images.name, "split": val_images.split, "images": len(val_images), **validation}
    pool = "cls" if cfg.model.pool in ("cls", "gathering-cls") else "mean"
    return run.finish(classifier.backbone, "the backbone", {"pool": pool, "validation": measured})


def check_and_resolve(cfg: Settings, images: LabeledSet, device: torch.device) -> tuple[Settings, list[str]]:
    """Find contradictions before anything is built or written, and then see `resolve`."""
    if cfg.validate_every_epochs < 1:
        raise ValueError(f"validate_every_epochs is {cfg.validate_every_epochs}; it must be at least 1")
    if cfg.model.pool == "gathering-cls" and cfg.model.shaped:
        raise ValueError(
            "model.pool gathering-cls starts from uniform attention, which shaped attention (model.shaped) takes away; "
            "use mean"
        )
    check(cfg, len(images), "data.root", Path(cfg.data.root).expanduser(), device)
    check_size("augmentation.size", cfg.augmentation.size, cfg.model.patch)
    return resolve(cfg, images, device, cfg.augmentation.size)


def introduce(images: LabeledSet, val_images: LabeledSet) -> list[str]:
    """What is validated on, for the start of a run."""
    lines = [f"validation: {len(val_images):,} images of {val_images.name}, {val_images.split}"]
    if images.split == val_images.split:
        both = f"WARNING: {images.split} is both trained and validated on: its accuracy says nothing about new images"
        lines.append(both)
    return lines


def build_classifier(cfg: Settings, classes: int, images: Images | None = None) -> Classifier:
    """The classifier at its start: backbone and head. `images` are those to whiten patches on; see `start_backbone`.

    Draws from torch's global random state, except for the skipless initialization, which draws from the seed.
    """
    backbone = start_backbone(cfg.model, cfg.augmentation.size, cfg.seed, images, fresh=not cfg.last_checkpoint)
    if cfg.model.pool == "gathering-cls":
        gather_into_cls_(backbone)
    return Classifier(backbone, classes, cfg.model.pool)


@torch.no_grad()
def validate(classifier: Classifier, images: LabeledSet, size: int, workers: int = 0) -> dict[str, float]:
    """Accuracy and loss on central crops; images are shared out over the processes, and all get the result.

    Returns:
        {"top1", "top5": in [0, 1] (of fewer than five classes, top5 is 1), "loss": mean cross-entropy}.
    """
    device = classifier.head.weight.device
    shard = Subset(ValidationImages(images, size), range(distributed.rank(), len(images), distributed.world_size()))
    loader = DataLoader(shard, batch_size=128, num_workers=workers, worker_init_fn=leave_signals_to_main)
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


main = partial(cli.run, train, Settings, __doc__)

if __name__ == "__main__":
    main()
