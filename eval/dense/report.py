"""Segmentation for people: the tables in Markdown and the sheet of pictures, for all its evaluations."""

from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from skipless.common.files import printable, write_atomically
from skipless.datasets.labels.counts import COUNTS, describe_split
from skipless.datasets.labels.masks import VOID, SegmentationSet
from skipless.eval.evaluation import Context, finish, name_blocks
from skipless.eval.figures.pictures import label_row

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

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
        f"{result['seconds'] / 60:.1f} minutes on {result['hardware']}, {result['precision']}.",
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
    """A sheet of images, truths and predictions in the data set's colors; void is white."""
    colors = np.full((256, 3), 255, np.uint8)
    colors[: len(images.classes)] = images.colors
    columns = min(4, len(predictions))
    rows = -(-len(predictions) // columns)
    figure, axes = plt.subplots(3 * rows, columns, figsize=(3 * columns, 6.6 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    seen: set[int] = set()
    for place, (index, prediction) in enumerate(sorted(predictions.items())):
        image, mask = images.read(index)
        seen |= set(np.unique(mask)) | set(np.unique(prediction))
        row, column = 3 * (place // columns), place % columns
        extent = (0, image.shape[1], image.shape[0], 0)
        for offset, picture in enumerate((image, colors[mask], colors[prediction])):
            axis = axes[row + offset, column]
            axis.imshow(picture, interpolation="nearest", extent=extent)
            if column == 0:
                label_row(axis, ("image", "truth", "prediction")[offset])
        axes[row, column].set_title(printable(images.names[index]), fontsize=8, pad=2)
    known = sorted(seen - {VOID})[:40]
    handles = [Patch(color=colors[label] / 255, label=images.classes[label]) for label in known]
    ncols = max(1, 2 * columns)
    figure.legend(handles=handles, loc="lower center", ncols=ncols, fontsize=8, frameon=False)
    bottom = (0.3 + 0.25 * -(-len(handles) // ncols)) / (6.6 * rows)
    figure.tight_layout(pad=0.6, rect=(0.01, bottom, 1, 1))
    write_atomically(path, lambda beside: figure.savefig(beside, dpi=100, format="png"))
    plt.close(figure)
