"""Unsupervised saliency: how well the object that TokenCut or LOST cuts out is what stands out in an image.

    python eval/saliency.py --ckpt dino_vits16.pth --data.name ecssd --data.root ECSSD --out ecssd
    python eval/saliency.py --ckpt runs/photos --data.name saliency --data.root my_folder --out mine

The mask of the found object is compared with the true one as TokenCut does (arXiv 2202.11539, section 4.2): images are
resized to the nearest multiple of the patch; IoU and accuracy are means over the images, maxF is the F-measure with
beta^2 = 0.3 of every image, averaged. (The masks have no shades, so no threshold changes them, and the largest F is the
only one.) With --bilateral-solver, TokenCut's second row, masks get shades that follow the borders in the image: IoU
and accuracy are those above a half, maxF that of the best of 255 thresholds for all images.

my_folder holds images/ and masks/. With --out: saliency.json, saliency.md and pictures, saliency.png. An interrupted
run with --out is continued by the same command. torchrun shares the images out.
"""

import skipless.common.interruption  # noqa: F401

from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from skipless.common import cli, distributed
from skipless.common.files import printable
from skipless.common.progress import Progress, duration
from skipless.datasets.labels.counts import describe_split
from skipless.datasets.labels.saliency import SaliencyName, SaliencySet, saliency_masks
from skipless.eval.backbones import choose_block
from skipless.eval.evaluation import EvaluationSettings, SheetSettings, announce, finish, prepare
from skipless.eval.figures.pictures import label_row, sheet, write_figure
from skipless.eval.metrics import mean_interval
from skipless.eval.objects.bilateral import bilateral_solver
from skipless.eval.objects.scores import graph_report
from skipless.eval.objects.search import FeatureChoice, Search, choose_features, decode, find_objects

PICTURES = 12
BETA_SQUARED = 0.3
MEASURES = ("maxF", "IoU", "accuracy")


@dataclass
class DataSettings:
    """Images with masks of what stands out in them."""

    name: SaliencyName
    """Data set; saliency is a folder of your own."""
    root: str
    """Its folder, as its authors' archives unpack: a folder of images and one of masks."""


@dataclass
class Settings(SheetSettings, EvaluationSettings):
    """Unsupervised saliency."""

    data: DataSettings
    method: Literal["tokencut", "lost"] = "tokencut"
    """tokencut (arXiv 2202.11539) or lost (arXiv 2109.14279)."""
    features: FeatureChoice = "auto"
    """What patches are compared by, as in eval/discovery.py: keys is the published way."""
    block: str = "last"
    """Block whose features are taken: last, or a number from 1."""
    every_block: bool = False
    """Measure every block, in one pass over the images."""
    tau: float | None = None
    """tokencut: cosine above which two patches are tied; by default the published 0.2."""
    bilateral_solver: bool = False
    """Refine the masks by the bilateral solver. Named in the figure's id."""
    _: KW_ONLY
    limit: int | None = None
    """At most so many images, evenly spread over the set: for a quick look. Named SUBSET."""
    untrained: bool = False
    """Measure the checkpoint's architecture with random weights: the floor its figure stands on."""
    batch_size: int = 8
    """Images of one size that go through the network together. Changes speed and memory alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit is not None and self.limit < 1:
            raise ValueError("limit must be 1 or more")
        if self.bilateral_solver and self.every_block:
            raise ValueError("bilateral-solver refines the masks of one block; leave out every-block")


def evaluate(settings: Settings) -> dict[str, Any]:
    """Cut an object out of every image as `settings` say, compare it with the mask, and return the result.

    Raises:
        ValueError, FileNotFoundError: a checkpoint, data or settings that cannot be used.
    """
    if settings.method == "lost" and settings.tau is not None:
        raise ValueError("tau has no effect on lost, whose threshold is 0; leave it out")
    context = prepare(settings, "saliency")  # in float32: thresholds on cosines hang on small differences
    features = context.recorded["features"] = choose_features(settings.features, context.backbone)
    blocks = choose_block(settings.block, settings.every_block, context.backbone)
    whole = saliency_masks(settings.data.root, settings.data.name)
    data = whole.spread(settings.limit or len(whole))
    images, own = data.images, len(whole) if settings.data.name == "saliency" else None
    description = describe_split(images.name, images.split, len(images), own)
    parts = [f"{images.name}-{settings.method}"]
    parts += [features] if features != "keys" else []
    parts += [f"block-{blocks[-1] + 1}"] if settings.block != "last" else []
    parts += [f"tau-{settings.tau:g}"] if settings.tau is not None else []
    parts += ["bilateral-solver"] if settings.bilateral_solver else []
    announce(context, "/".join(parts), description)
    if context.out:
        context.out.mkdir(parents=True, exist_ok=True)

    shown = np.linspace(0, len(images) - 1, min(PICTURES, len(images))).round().astype(int).tolist()
    search = Search(settings.method, features, blocks, "nearest", settings.tau, settings.batch_size, context.workers)
    entries = find_objects(context.backbone, images, search, shown, context.out)
    figures = measure(data, entries, len(blocks))  # [blocks, images, 3]
    last, found = figures[-1], {index: decode(entries[index]["blocks"][-1]["objects"][0]) for index in shown}
    if settings.bilateral_solver:
        last, found = measure_refined(data, entries, shown)
    details: dict[str, Any] = {
        name: {"value": float(last[:, column].mean()), "interval_95": mean_interval(last[:, column], settings.seed)}
        for column, name in enumerate(MEASURES)
    }
    details |= {"data": description, "block": blocks[-1] + 1, **graph_report(entries, len(blocks) - 1)}
    if settings.bilateral_solver:
        details["without_solver"] = dict(zip(MEASURES, figures[-1].mean(0).tolist(), strict=True))
    if settings.every_block:
        details["every_block"] = [
            {"block": block + 1, **dict(zip(MEASURES, of_block.mean(0).tolist(), strict=True))}
            for block, of_block in zip(blocks, figures, strict=True)
        ]
    files = {"saliency.png": lambda path: draw(data, found, last, path)}
    result = finish(context, "/".join(parts), images, "maxF", details["maxF"]["value"], details, report, files)
    if context.first and context.out:
        for log in context.out.glob("found-*.jsonl"):
            log.unlink()
    return result


def measure(data: SaliencySet, entries: list[dict[str, Any]], blocks: int) -> np.ndarray:
    """F-measure, IoU and accuracy of every image, float64 [blocks, N, 3].

    Raises UnreadableImage for a mask that cannot be read, a ValueError.
    """
    truths = (data.read_mask(entry["index"]) for entry in entries)
    rows = [
        [compare(decode(entry["blocks"][block]["objects"][0]), truth) for block in range(blocks)]
        for entry, truth in zip(entries, truths, strict=True)
    ]
    return np.array(rows).transpose(1, 0, 2)


def measure_refined(
    data: SaliencySet, entries: list[dict[str, Any]], shown: list[int]
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """F-measure at the threshold that is best for all images, IoU and accuracy of every refined mask, float64 [N, 3];
    and the refined masks of some images. Raises UnreadableImage."""
    curves, rest, found = [], [], {}
    for entry in Progress(entries, desc="bilateral solver", unit="image", active=distributed.rank() == 0):
        index = entry["index"]
        mask, truth = decode(entry["blocks"][-1]["objects"][0]), data.read_mask(index)
        shades = bilateral_solver(data.images.read_image(index), mask)
        curves.append(f_curve(shades, truth))
        rest.append(compare(shades > 0.5, truth)[1:])
        if index in shown:
            found[index] = shades > 0.5
    best = np.array(curves)[:, np.mean(curves, 0).argmax()]
    return np.column_stack([best, rest]), found


def f_curve(shades: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """F-measure with beta^2 = 0.3 of what is above each of 255 thresholds, 0, 1/255, ..., 254/255: float64 [255].
    Shades are float [H, W], truth bool [H, W]; empty masks as in `compare`."""
    thresholds = np.arange(255) / 255
    inside, outside = (np.sort(shades[where]) for where in (truth, ~truth))
    hits, false = (len(part) - np.searchsorted(part, thresholds, "right") for part in (inside, outside))
    precision = np.where(hits + false > 0, hits / np.maximum(hits + false, 1), 1.0)
    recall = hits / len(inside) if len(inside) else np.ones(255)
    below = BETA_SQUARED * precision + recall
    return np.where(below > 0, (1 + BETA_SQUARED) * precision * recall / np.where(below > 0, below, 1), 0.0)


def compare(found: np.ndarray, truth: np.ndarray) -> tuple[float, float, float]:
    """F-measure with beta^2 = 0.3, IoU and accuracy of one mask, bool [H, W] both.

    An empty mask has precision 1, an empty truth recall 1; two empty masks are equal.
    """
    hits = int((found & truth).sum())
    precision = hits / found.sum() if found.any() else 1.0
    recall = hits / truth.sum() if truth.any() else 1.0
    below = BETA_SQUARED * precision + recall
    f = (1 + BETA_SQUARED) * precision * recall / below if below else 0.0
    union = int((found | truth).sum())
    return float(f), hits / union if union else 1.0, float((found == truth).mean())


def report(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    details, checkpoint = result["details"], result["checkpoint"]
    lines = [
        f"**{result['protocol']}** {100 * result['value']:.1f} maxF",
        "",
        f"{checkpoint['architecture']} ({checkpoint['path']}), block {details['block']}; {details['data']}; "
        f"{duration(result['seconds'])} on {result['hardware']}. "
        + ("With" if "without_solver" in details else "Without")
        + " a bilateral solver.",
        "",
        "| | percent | 95 % interval |",
        "|---|---:|---|",
    ]
    for name in MEASURES:
        low, high = details[name]["interval_95"]
        lines.append(f"| {name} | {100 * details[name]['value']:.1f} | {100 * low:.1f} to {100 * high:.1f} |")
    if "without_solver" in details:
        plain = ", ".join(f"{name} {100 * value:.1f}" for name, value in details["without_solver"].items())
        lines += ["", f"Without the solver: {plain}."]
    if "every_block" in details:
        lines += ["", f"| block | {' | '.join(MEASURES)} |", "|---:|---:|---:|---:|"]
        lines += [
            f"| {row['block']} | " + " | ".join(f"{100 * row[name]:.1f}" for name in MEASURES) + " |"
            for row in details["every_block"]
        ]
    if details["degenerate_images"]:
        lines += ["", f"Images with nothing to cut: {details['degenerate_images']:,}; the object is the image."]
    return "\n".join(lines) + "\n"


def draw(data: SaliencySet, found: dict[int, np.ndarray], figures: np.ndarray, path: Path) -> None:
    """A sheet: image, true mask and found mask on it, with the IoU above."""
    figure, axes = sheet(len(found), 3)
    for place, ((index, mask_found), parts) in enumerate(zip(found.items(), axes, strict=True)):
        image = data.images.read_image(index)
        parts[0].set_title(
            f"{printable(data.images.images[index].name)}   IoU {figures[index, 1]:.2f}", fontsize=8, pad=2
        )
        parts[0].imshow(image)
        for axis, mask in zip(parts[1:], (data.read_mask(index), mask_found), strict=True):
            overlay = (0.25 * image).astype(np.uint8)
            overlay[mask] = image[mask]
            axis.imshow(overlay)
        if place % 4 == 0:
            for axis, title in zip(parts, ("image", "true", "found"), strict=True):
                label_row(axis, title)
    write_figure(figure, path)


main = partial(cli.run, evaluate, Settings, __doc__)

if __name__ == "__main__":
    main()
