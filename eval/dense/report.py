"""Segmentation for people: the tables in Markdown and the sheet of pictures, for all its evaluations."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.patches import Patch

from skipless.common.files import printable
from skipless.common.progress import duration
from skipless.datasets.labels.counts import COUNTS, describe_split
from skipless.datasets.labels.masks import VOID, SegmentationSet
from skipless.eval.evaluation import Context, finish, name_blocks
from skipless.eval.figures.pictures import label_row, sheet, write_figure
from skipless.eval.metrics import confusion_matrix, segmentation_scores

PICTURES = 12


def choose_shown(images: SegmentationSet) -> list[int]:
    """The images on the sheet, evenly spread over the set."""
    return np.linspace(0, len(images) - 1, min(PICTURES, len(images))).round().astype(int).tolist()


def protocol_id(context: Context, name: str, changed: bool) -> str:
    """The figure's id: `name`, the blocks where they are not the last, and whether settings of the protocol differ."""
    parts = [name] if context.recorded["blocks"] == "last" else [name, name_blocks(context.choices[-1])]
    return "/".join(parts) + (" (changed)" if changed else "")


def finish_segmentation(
    context: Context,
    protocol: str,
    images: SegmentationSet,
    miou: float,
    details: dict[str, Any],
    predictions: dict[int, np.ndarray],
    how: str,
    published: str = "recipe",
) -> dict[str, Any]:
    """Write, print and return the result; see `finish` and `report`."""
    files = {f"{context.task}.png": partial(draw, images, predictions)}
    official = COUNTS.get((images.name, images.split))
    in_words = partial(report, how=how, published=published)
    return finish(context, protocol, images, "mIoU", miou, details, in_words, files, official)


def report(result: dict[str, Any], how: str, published: str = "recipe") -> str:
    """The result in Markdown: the figure, what was measured and `how`, what was changed from `published`, blocks and
    classes."""
    details, checkpoint = result["details"], result["checkpoint"]
    spread = ""
    if details.get("interval_95"):
        low, high = details["interval_95"]
        spread = f" (95 % interval {100 * low:.1f} to {100 * high:.1f})"
    elif details.get("std") is not None:
        spread = f" (standard deviation {100 * details['std']:.1f})"
    lines = [
        f"**{result['protocol']}** {100 * result['value']:.1f} mIoU{spread}, "
        f"{100 * details['pixel_accuracy']:.1f} % of pixels",
        "",
        f"{checkpoint['architecture']} ({checkpoint['path']}), blocks {', '.join(map(str, details['blocks']))}; "
        f"{describe_split(result['dataset'], result['split'], result['images'])}; {how}; seed {result['seed']}; "
        f"{duration(result['seconds'])} on {result['hardware']}, {result['precision']}.",
        "",
    ]
    if details["changed_settings"]:
        pairs = "; ".join(
            f"{name} {used} ({published}: {was})" for name, (was, used) in details["changed_settings"].items()
        )
        lines += [f"Changed, so not comparable with the protocol's figures: {pairs}.", ""]
    if "every_block" in details:
        lines += ["| block | mIoU | pixels |", "|---:|---:|---:|"]
        for entry in details["every_block"]:
            lines.append(f"| {entry['block']} | {100 * entry['miou']:.1f} | {100 * entry['pixel_accuracy']:.1f} |")
        lines.append("")
    block = f" of block {details['blocks'][0]}" if "every_block" in details else ""
    empty = "; empty where a class is neither in truth nor in prediction" if None in details["iou"].values() else ""
    lines += [f"IoU by class{block}{empty}:", ""]
    columns = 4
    cells = [f"{name} | {'' if iou is None else f'{100 * iou:.1f}'}" for name, iou in details["iou"].items()]
    lines += ["| " + " | ".join(["class | IoU"] * columns) + " |", "|" + "---|---:|" * columns]
    rows = -(-len(cells) // columns)
    for row in range(rows):
        lines.append("| " + " | ".join([*cells[row::rows], *[" | "] * columns][:columns]) + " |")
    return "\n".join(lines) + "\n"


def draw(images: SegmentationSet, predictions: dict[int, np.ndarray], path: Path) -> None:
    """A sheet of images, and on them truths and predictions in the data set's colors, each with the image's mIoU; void
    is white."""
    colors = np.full((256, 3), 255, np.uint8)
    colors[: len(images.classes)] = images.colors
    figure, axes = sheet(len(predictions), 3)
    seen: set[int] = set()
    for place, ((index, prediction), parts) in enumerate(zip(sorted(predictions.items()), axes, strict=True)):
        image, mask = images.read(index)
        seen |= set(np.unique(mask)) | set(np.unique(prediction))
        labels = at_size(prediction, *mask.shape)
        parts[0].imshow(image)
        parts[1].imshow(overlay(image, colors[mask]))
        parts[2].imshow(overlay(image, colors[labels]))
        parts[0].set_title(printable(images.names[index]), fontsize=8, pad=2)
        parts[2].set_title(image_score(mask, labels, len(images.classes)), fontsize=8, pad=2)
        if place % 4 == 0:
            for axis, title in zip(parts, ("image", "truth", "prediction"), strict=True):
                label_row(axis, title)
    known = sorted(label for label in seen if label < len(images.classes))[:40]
    handles = [Patch(color=colors[label] / 255, label=images.classes[label]) for label in known]
    if VOID in seen:
        handles.append(Patch(facecolor="white", edgecolor="gray", label="void: not scored"))
    ncols = max(1, int(figure.get_figwidth() / 1.5))
    figure.legend(handles=handles, loc="outside lower center", ncols=ncols, fontsize=8, frameon=False)
    write_figure(figure, path)


def at_size(labels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Labels [h, w] at another size: a pixel takes the label that its center lies in."""
    h, w = labels.shape
    rows, columns = (2 * np.arange(height) + 1) * h // (2 * height), (2 * np.arange(width) + 1) * w // (2 * width)
    return labels[rows[:, None], columns]


def overlay(image: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Colors laid on a photograph without its own: uint8 [H, W, 3], as both are."""
    return (0.4 * image.mean(-1, keepdims=True) + 0.6 * colors).astype(np.uint8)


def image_score(mask: np.ndarray, labels: np.ndarray, classes: int) -> str:
    """mIoU of one image, over the classes that are in its truth or its prediction."""
    confusion = confusion_matrix(torch.from_numpy(mask), torch.from_numpy(labels), classes)
    return f"mIoU {100 * segmentation_scores(confusion).miou:.1f}" if confusion.any() else "all void"
