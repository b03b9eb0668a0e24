"""Linear segmentation: how well one linear layer tells the class of every patch from frozen features.

In minutes on a CPU, for comparing checkpoints:

    python eval/segmentation.py --protocol quick --ckpt runs/photos --data.name voc12 --data.root VOCdevkit --out voc

As published, on a GPU (or on several: torchrun --nproc-per-node 8 eval/segmentation.py ...):

    python eval/segmentation.py --ckpt dinov2_vits14_pretrain.pth --data.name voc12 --data.root VOCdevkit --out voc

mIoU after every block of the network:

    python eval/segmentation.py --protocol quick --every-block --ckpt runs/photos --data.name scenes --data.root scenes

Protocols differ by several points on the same weights, so the figure's id names its own: voc12-linear/mmseg (DINOv2's),
voc12-linear/dinov3, voc12-linear/neco (Leopart, NeCo, Franca), voc12-linear/quick. Their settings are the recipes in
configs/segmentation/; a figure made with other settings says "(changed)". An interrupted run is continued by the same
command.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from skipless.common import cli, distributed
from skipless.common.files import write_result
from skipless.common.settings import flat, plain
from skipless.datasets.labels.ade20k import ade20k
from skipless.datasets.labels.coco import coco_stuff
from skipless.datasets.labels.counts import COUNTS, describe_split
from skipless.datasets.labels.masks import SegmentationSet
from skipless.datasets.labels.voc import scenes_segmentation, voc_segmentation
from skipless.eval.backbones import Precision, Weights, choose_blocks, load_backbone, untrained
from skipless.eval.dense.quick import QuickSettings, quick
from skipless.eval.dense.report import PICTURES, draw, report
from skipless.eval.dense.training import TrainingSettings, train_and_evaluate
from skipless.eval.evaluation import keep_other_result, result_of
from skipless.eval.features import default_cache
from skipless.eval.metrics import miou_interval, segmentation_scores
from skipless.ssl.data.loader import loader_workers

RECIPES = Path(__file__).resolve().parent.parent / "configs" / "segmentation"

DATA: dict[str, Callable[..., SegmentationSet]] = {
    "voc12": voc_segmentation,
    "coco-stuff-27": partial(coco_stuff, classes=27),
    "coco-stuff-171": partial(coco_stuff, classes=171),
    "ade20k": ade20k,
    "scenes": scenes_segmentation,
}


@dataclass
class DataSettings:
    """What is segmented."""

    name: Literal["voc12", "coco-stuff-27", "coco-stuff-171", "ade20k", "scenes"]
    """Data set: PASCAL VOC 2012 (21 classes), COCO-Stuff (27 coarse or 171 classes), ADE20K (150), or the scenes that
    datasets/scenes.py writes."""
    root: str
    """Its folder, laid out as its authors ship it: VOCdevkit, COCO's, ADEChallengeData2016, or the scenes' folder."""
    split: str = "val"
    """Split whose mIoU is measured."""
    train_split: str | None = None
    """Split that heads are trained on. By default train; for neco on voc12 trainaug."""


@dataclass
class Settings:
    """Linear segmentation."""

    ckpt: str
    """Backbone: the folder of a run; a .pt, .pth or .safetensors of ours, DINO, DINOv2 or timm; or timm:NAME."""
    data: DataSettings
    protocol: Literal["mmseg", "dinov3", "neco", "quick"] = "mmseg"
    """Which recipe of configs/segmentation/ to follow. Figures of different protocols are not comparable."""
    weights: Weights = "teacher"
    """Which half of a training checkpoint that holds a teacher and a student."""
    untrained: bool = False
    """Measure the checkpoint's architecture with random weights: the floor its figure stands on."""
    blocks: str = "last"
    """Blocks whose patch features are concatenated: last, last4, or numbers from 1, as in 3,6,9,12. Named in the
    figure's id where they are not the last."""
    every_block: bool = False
    """Train a head on each block by itself, and report mIoU block by block."""
    out: str | None = None
    """Folder for segmentation.json, segmentation.md and pictures.png (and, except for quick, head.pt); by default
    nothing is written."""
    cache: str | None = None
    """quick: folder for features; by default ~/.cache/skipless/features. Safe to delete."""
    seed: int = 0
    """Of the heads, the order of images and their augmentation."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Precision = "fp32"
    """In which the network computes features: fp32, or bf16 where the device is fast in it. bf16 saves time on a GPU;
    a model without skips feels the rounding. The figure's id then ends in /bf16."""
    batch_size: int = 16
    """Images (windows, for mmseg and dinov3) in one forward pass of the backbone: of quick, and of the evaluation by
    the other protocols. Changes speed and memory alone."""
    workers: int | None = None
    """Processes that read images; by default all cores shared out with a GPU, and none on a CPU, which needs them
    itself."""
    quick: QuickSettings = field(default_factory=QuickSettings)
    """Settings of the protocol quick, of its recipe."""
    training: TrainingSettings = field(default_factory=TrainingSettings)
    """Settings of the other protocols. The defaults shown here are those of mmseg; another recipe brings its own."""


def evaluate(settings: Settings) -> dict[str, Any]:
    """Measure linear segmentation as `settings` say, write what `settings.out` asks for, and return the result.

    Raises:
        ValueError, FileNotFoundError: a checkpoint, data or settings that cannot be used.
    """
    device = distributed.start(settings.device)
    began = time.perf_counter()
    if (settings.workers or 0) < 0 or settings.batch_size < 1 or settings.seed < 0:
        raise ValueError("workers must be 0 or more, seed too, and batch-size 1 or more")
    backbone = load_backbone(settings.ckpt, settings.weights)
    if settings.untrained:
        backbone = untrained(backbone, settings.seed)
    backbone = backbone.to(device, settings.precision)
    workers = loader_workers(settings.workers, device)
    choices = choose_blocks(settings.blocks, settings.every_block, backbone)
    data = settings.data
    train = DATA[data.name](data.root, data.train_split or _default_train_split(settings))
    val = DATA[data.name](data.root, data.split)
    changed = changed_settings(settings)
    protocol = f"{data.name}-linear/{settings.protocol}"
    if not settings.every_block and settings.blocks != "last":
        protocol += "/blocks-" + "-".join(str(block + 1) for block in choices[-1])
    protocol += " (changed)" if changed else ""
    recorded = plain(settings) | {"precision": backbone.precision}
    del recorded["training" if settings.protocol == "quick" else "quick"]  # which had no effect
    out = Path(settings.out) if settings.out else None
    if out:
        keep_other_result(out / "segmentation.json", recorded)
    first = distributed.rank() == 0
    if first:
        on = f"on {device}, {backbone.described_precision}"
        print(f"{protocol}: {backbone.architecture} ({backbone.path}) {on}", flush=True)
        for images in (train, val):
            print(describe_split(data.name, images.split, len(images)), flush=True)
        if train.split == val.split:
            print(f"warning: heads are trained on {train.split}, and measured on the same images", flush=True)
        if device.type == "cpu" and settings.protocol != "quick":
            print("a head on augmented images takes long on a CPU; --protocol quick takes minutes", flush=True)
        if out:
            out.mkdir(parents=True, exist_ok=True)

    shown = np.linspace(0, len(val) - 1, min(PICTURES, len(val))).round().astype(int).tolist()
    if settings.protocol == "quick":
        cache = Path(settings.cache).expanduser() if settings.cache else default_cache()
        outcome = quick(
            backbone, train, val, choices, settings.quick, cache, settings.seed, settings.batch_size, workers,
            shown,
        )  # fmt: skip
    else:
        outcome = train_and_evaluate(
            backbone, train, val, choices, settings.training, settings.seed, settings.batch_size, workers, shown, out
        )
    scores = [segmentation_scores(confusion) for confusion in outcome.confusions]
    intervals = [miou_interval(counts.cpu().numpy(), settings.seed) for counts in outcome.counts]
    main = scores[-1]
    details: dict[str, Any] = {
        "blocks": [block + 1 for block in choices[-1]],
        "interval_95": intervals[-1],
        "pixel_accuracy": main.pixel_accuracy,
        "iou": {name: None if math.isnan(x) else x for name, x in zip(val.classes, main.iou, strict=True)},
        **outcome.details,
    }
    if settings.every_block:
        details["every_block"] = [
            {"block": choice[0] + 1, "miou": s.miou, "interval_95": interval, "pixel_accuracy": s.pixel_accuracy}
            for choice, s, interval in zip(choices, scores, intervals, strict=True)
        ]
    details["changed_settings"] = changed
    result = result_of(
        "segmentation", protocol, data.name, val.split, len(val), "mIoU", main.miou, details, backbone, recorded,
        settings.seed, time.perf_counter() - began, device, COUNTS.get((data.name, val.split)),
    )  # fmt: skip
    if first:
        more = f" ({details['held_out_images']:,} more chose the learning rate)" if "held_out_images" in details else ""
        text = report(result, f"trained on {details['train_images']:,} images{more}")
        if out:
            draw(val, outcome.predictions, out / "pictures.png")
            write_result(out / "segmentation", result, text)
        print("\n" + text, end="")
        if out:
            more = "" if settings.protocol == "quick" else ", head.pt"
            print(f"\nwritten: {out / 'segmentation.json'}, segmentation.md, pictures.png{more}")
    return result


def changed_settings(settings: Settings) -> dict[str, list[Any]]:
    """Settings of the protocol that differ from its recipe: {name: [recipe's, used]}.

    Raises:
        ValueError: a changed setting of a part that the protocol does not use.
    """
    words = [f"--protocol={settings.protocol}", "--ckpt=x", "--data.name=scenes", "--data.root=x"]
    published = cli.parse(Settings, words, recipe=recipe)
    used = "quick." if settings.protocol == "quick" else "training."
    theirs, ours = flat(plain(published)), flat(plain(settings))
    changed = {
        name: [theirs[name], value]
        for name, value in ours.items()
        if name.startswith(("quick.", "training.")) and theirs[name] != value
    }
    for name in changed:
        if not name.startswith(used):
            raise ValueError(f"{name} has no effect on the protocol {settings.protocol}; leave it out")
    default = _default_train_split(settings)
    if settings.data.train_split not in (None, default):
        changed["data.train_split"] = [default, settings.data.train_split]
    return changed


def _default_train_split(settings: Settings) -> str:
    return "trainaug" if (settings.protocol, settings.data.name) == ("neco", "voc12") else "train"


def recipe(settings: Settings) -> Path:
    """The file of settings of a protocol."""
    return RECIPES / f"{settings.protocol}.yaml"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    cli.run(evaluate, Settings, __doc__, arguments, recipe=recipe)


if __name__ == "__main__":
    main()
