"""Depth: how well one linear layer tells the distance of every pixel from frozen features.

    python eval/depth.py --ckpt dinov2_vits14_pretrain.pth --data.root NYUv2 --out depth
    python eval/depth.py --ckpt runs/photos --blocks last4 --data.name depth --data.root my_folder --out depth

NYUv2 is nyu_depth_v2_labeled.mat and splits.mat: 795 images to learn from, 654 to measure. my_folder holds images/ and
depth/, of which docs/data.md says more. A result has delta1 (the share of pixels within a factor of 1.25), AbsRel and
RMSE, means over the images; NYUv2 within Eigen's crop.

The head and its losses are DINOv2's (arXiv 2304.07193, section 7.4), the rest is ours, for minutes in place of hours:
features are computed once, of whole images resized to multiples of the patch, without augmentation, and 795 images are
learned from in place of 24,231 frames of the raw videos. So figures compare checkpoints with each other, and not with
the published ones. DINOv2's four blocks are 3,6,9,12 of twelve (--blocks 3,6,9,12).

torchrun shares the features and the evaluated images out. An interrupted run is continued by the same command, which
finds the features in the cache.
"""

import skipless.common.interruption  # noqa: F401

from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from skipless.common import cli
from skipless.common.distributed import gather_objects, rank, world_size
from skipless.common.files import printable
from skipless.common.progress import Progress, duration
from skipless.datasets.labels.counts import COUNTS, describe_split
from skipless.datasets.labels.depth import DepthSet, depth_folder, nyuv2
from skipless.eval.dense.depth import DepthHead, HeadSettings, depth_scores, predict, train_head, within
from skipless.eval.dense.report import protocol_id
from skipless.eval.evaluation import Context, FeatureSettings, SheetSettings, announce, finish, prepare
from skipless.eval.features import Features, data_sha256, extract
from skipless.eval.figures.pictures import label_row, sheet, write_figure
from skipless.eval.metrics import mean_interval

SIZE = 480
PICTURES = 8
MEASURES = ("delta1", "AbsRel", "RMSE")
SPLITS = {"nyuv2": ("train", "test"), "depth": ("train", "val")}


@dataclass
class DataSettings:
    """Images with depths."""

    name: Literal["nyuv2", "depth"] = "nyuv2"
    """NYUv2, or depth: your own images and depths."""
    root: str = "data/NYUv2"
    """Its folder."""
    split: str | None = None
    """Split that is measured; by default test of nyuv2, val of your own."""


@dataclass
class Settings(SheetSettings, FeatureSettings):
    """Depth by a linear head."""

    data: DataSettings = field(default_factory=DataSettings)
    head: HeadSettings = field(default_factory=HeadSettings)
    """The head and its training."""
    size: int = SIZE
    """Short side in pixels that images are resized to. All get the proportions of the first of the training images, in
    multiples of the patch."""
    limit: int | None = None
    """Learn from and measure at most so many images, evenly spread: for a quick look. Named SUBSET."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 1 or (self.limit is not None and self.limit < 1):
            raise ValueError("size and limit must be 1 or more")


def evaluate(settings: Settings) -> dict[str, Any]:
    """Measure depth as `settings` say, write what `settings.out` asks for, and return the result.

    Raises:
        ValueError, FileNotFoundError: a checkpoint, data or settings that cannot be used.
    """
    context = prepare(settings, "depth")
    reader = nyuv2 if settings.data.name == "nyuv2" else depth_folder
    learned, measured = SPLITS[settings.data.name]
    whole = [reader(settings.data.root, split) for split in (learned, settings.data.split or measured)]
    train, val = (subset(images, settings.limit) for images in whole)
    height, width = whole[0].read_image(0).shape[:2]
    factor, patch = context.backbone.multiple_below(settings.size) / min(height, width), context.backbone.patch
    size = (int(height * factor / patch + 1e-6) * patch, int(width * factor / patch + 1e-6) * patch)
    context.backbone.require_room(train.names[0], *size)
    defaults = asdict(HeadSettings())
    changed = {name: [defaults[name], value] for name, value in asdict(settings.head).items()}
    changed = {name: pair for name, pair in changed.items() if pair[0] != pair[1]}
    name = f"{val.name}-depth/quick" + (f"/{settings.size}px" if settings.size != SIZE else "")
    protocol = protocol_id(context, name, bool(changed))
    official = [COUNTS.get((images.name, images.split), len(images)) for images in whole]
    pairs = zip((train, val), official, strict=True)
    descriptions = [describe_split(images.name, images.split, len(images), count) for images, count in pairs]
    warning = [f"warning: the head learns from {val.split}, which is measured"] if train.split == val.split else []
    announce(context, protocol, *descriptions, *warning)

    x_train, x_val = (features_of(context, images, size) for images in (train, val))
    shown = np.linspace(0, len(val) - 1, min(PICTURES, len(val))).round().astype(int).tolist()
    scores = []
    for choice in context.choices:
        head = train_head(x_train, train, choice, settings.head, settings.seed, context.device)
        figures, maps = score(head, x_val, val, choice, settings.head, context.device, shown)
        scores.append(figures)
    last = scores[-1]
    details: dict[str, Any] = {
        "data": descriptions[1],
        "train": descriptions[0],
        "blocks": [block + 1 for block in context.choices[-1]],
        "image_size": size,
        "interval_95": mean_interval(last[:, 0], settings.seed),
        **dict(zip(MEASURES, last.mean(0).tolist(), strict=True)),
        "images_without_depth": len(val) - len(last),
        "changed_settings": changed,
    }
    if settings.every_block:
        details["every_block"] = [
            {
                "block": choice[0] + 1,
                "value": float(of_block[:, 0].mean()),
                **dict(zip(MEASURES, of_block.mean(0).tolist(), strict=True)),
            }
            for choice, of_block in zip(context.choices, scores, strict=True)
        ]
    files = {"depth.png": partial(draw, val, maps, settings.head)}
    return finish(context, protocol, val, "delta1", details["delta1"], details, report, files, official[1])


def subset(images: DepthSet, limit: int | None) -> DepthSet:
    """At most so many of the images, evenly spread."""
    if limit is None or limit >= len(images):
        return images
    rows = np.linspace(0, len(images) - 1, limit).round().astype(int).tolist()
    return images.take(rows)


def features_of(context: Context, images: DepthSet, size: tuple[int, int]) -> Features:
    """Features of the images, each of them read together with its depth, which must fit."""
    identity = f"{data_sha256(images.files)} {images.split} {' '.join(images.names)}"
    return extract(
        context.backbone, [Path(name) for name in images.names], partial(image_of, images), size, context.blocks,
        context.cache, "tokens", context.batch_size, context.workers, f"features, {images.split}", identity=identity,
    )  # fmt: skip


def image_of(images: DepthSet, index: int) -> np.ndarray:
    """uint8 [H, W, 3]."""
    return images.read(index)[0]


@torch.inference_mode()
def score(
    head: DepthHead,
    features: Features,
    images: DepthSet,
    blocks: tuple[int, ...],
    settings: HeadSettings,
    device: torch.device,
    shown: list[int],
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """`MEASURES` of every image that has a known depth, float64 [n, 3]; and the maps of some images [H, W]; on every
    process. Raises ValueError where no image has one."""
    mine: dict[int, tuple[float, float, float]] = {}
    maps: dict[int, np.ndarray] = {}
    share = range(rank(), len(images), world_size())
    for row in Progress(share, desc=f"{images.name} {images.split}", unit="image", active=rank() == 0):
        truth = within(images.read_depth(row), settings)
        depth = predict(head, features, np.array([row]), blocks, device).clamp(settings.min_depth, settings.max_depth)
        found = F.interpolate(depth[None], truth.shape, mode="bilinear")[0, 0].cpu().numpy()
        if row in shown:
            maps[row] = found
        if images.crop:
            top, bottom, left, right = images.crop
            found, truth = found[top:bottom, left:right], truth[top:bottom, left:right]
        known = np.isfinite(truth)
        if known.any():
            mine[row] = depth_scores(found[known].astype(float), truth[known].astype(float))
    scores = {row: values for part in gather_objects(mine) for row, values in part.items()}
    if not scores:
        raise ValueError(
            f"{images.name} {images.split}: no pixel of {len(images)} images has a depth between "
            f"{settings.min_depth:g} and {settings.max_depth:g} m to compare with"
        )
    drawn = {row: found for part in gather_objects(maps) for row, found in part.items()}
    return np.array([scores[row] for row in sorted(scores)]), drawn


def report(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    details, checkpoint = result["details"], result["checkpoint"]
    low, high = details["interval_95"]
    changed = "; ".join(f"{name} {used} (default: {was})" for name, (was, used) in details["changed_settings"].items())
    height, width = details["image_size"]
    lines = [
        f"**{result['protocol']}** {100 * result['value']:.1f} delta1 (95 % interval {100 * low:.1f} to "
        f"{100 * high:.1f}), AbsRel {details['AbsRel']:.3f}, RMSE {details['RMSE']:.3f} m",
        "",
        f"{checkpoint['architecture']} ({checkpoint['path']}), blocks {', '.join(map(str, details['blocks']))}, "
        f"{width} x {height} pixels; {details['data']}; learned from {details['train']}; seed {result['seed']}; "
        f"{duration(result['seconds'])} on {result['hardware']}, {result['precision']}.",
    ]
    if changed:
        lines += ["", f"Changed: {changed}."]
    if details["images_without_depth"]:
        lines += ["", f"Images without a known depth, which are left out: {details['images_without_depth']:,}."]
    if "every_block" in details:
        lines += ["", "| block | delta1 | AbsRel | RMSE |", "|---:|---:|---:|---:|"]
        lines += [
            f"| {row['block']} | {100 * row['delta1']:.1f} | {row['AbsRel']:.3f} | {row['RMSE']:.3f} |"
            for row in details["every_block"]
        ]
    return "\n".join(lines) + "\n"


def draw(images: DepthSet, maps: dict[int, np.ndarray], settings: HeadSettings, path: Path) -> None:
    """A sheet: images, true and predicted depths in the same colors, white where nothing is known."""
    figure, axes = sheet(len(maps), 3)
    for place, ((row, found), parts) in enumerate(zip(sorted(maps.items()), axes, strict=True)):
        image, depth = images.read(row)
        truth = within(depth, settings)
        known = truth[np.isfinite(truth)]
        far = float(known.max()) if len(known) else settings.max_depth
        parts[0].set_title(printable(Path(images.names[row]).name), fontsize=8, pad=2)
        parts[2].set_title(f"0 to {far:.1f} m", fontsize=8, pad=2)
        parts[0].imshow(image)
        for axis, depths in zip(parts[1:], (truth, found), strict=True):
            axis.imshow(depths, cmap="turbo", vmin=0, vmax=far)
        if place % 4 == 0:
            for axis, title in zip(parts, ("image", "truth", "prediction"), strict=True):
                label_row(axis, title)
    write_figure(figure, path)


main = partial(cli.run, evaluate, Settings, __doc__)

if __name__ == "__main__":
    main()
