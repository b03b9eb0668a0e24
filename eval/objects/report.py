"""The report of object discovery: the table in Markdown and the sheet of pictures."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle

from skipless.common.files import printable
from skipless.common.progress import duration
from skipless.datasets.labels.boxes import BoxSet
from skipless.eval.figures.pictures import label_row, sheet, write_figure
from skipless.eval.metrics import box_iou
from skipless.eval.objects.search import decode

# Okabe and Ito's, which people with any kind of color blindness tell apart.
COLORS = ("#D55E00", "#56B4E9", "#F0E442", "#CC79A7", "#E69F00")


def report(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    details, checkpoint = result["details"], result["checkpoint"]
    searched = result["images"] - len(details["unreadable"])
    if result["value"] is None:
        headline = f"**{result['protocol']}** {searched:,} images searched; none has boxes to compare with"
    else:
        headline = f"**{result['protocol']}** {100 * result['value']:.1f} {result['metric']}"
    if "interval_95" in details:
        low, high = details["interval_95"]
        headline += f" (95 % interval {100 * low:.1f} to {100 * high:.1f}; {details['scored_images']:,} images)"
    lines = [
        headline,
        "",
        f"{checkpoint['architecture']} ({checkpoint['path']}), block {details['block']}; {details['data']}; "
        f"{duration(result['seconds'])} on {result['hardware']}.",
        "",
    ]
    if "whole_image" in details:
        lines += [f"For comparison: the whole image as the box scores {100 * details['whole_image']:.1f}.", ""]
    if "box_ap" in details:
        lines += ["| | AP | AP50 | AP75 | AR100 |", "|---|---:|---:|---:|---:|"]
        for name in ("box", "mask"):
            if f"{name}_ap" in details:
                values = (100 * details[f"{name}_{key}"] for key in ("ap", "ap50", "ap75", "ar100"))
                lines.append(f"| {name} | " + " | ".join(f"{v:.1f}" for v in values) + " |")
        lines += ["", f"{details['objects'] / searched:.2f} objects an image.", ""]
        if "masks_from_boxes" in details:
            lines += [f"{details['masks_from_boxes']:,} true objects have no mask; their boxes stand for them.", ""]
    if "every_block" in details:
        lines += [f"| block | {details['every_block'][0]['metric']} |", "|---:|---:|"]
        lines += [
            f"| {e['block']} | {100 * e['value']:.1f} |" for e in details["every_block"] if e["value"] is not None
        ]
        lines.append("")
    if details["nearly_complete_graphs"] > 0.1 * searched:
        advice = " Try --features keys_without_bias." if result["settings"]["features"] == "keys" else ""
        lines += [
            f"Warning: in {details['nearly_complete_graphs']:,} of {searched:,} images nearly all patches "
            f"count as similar, and what is found there means little.{advice}",
            "",
        ]
    if details["degenerate_images"]:
        lines += [f"Images with nothing to cut: {details['degenerate_images']:,}; the object is the image.", ""]
    if details["unreadable"]:
        lines += [f"Images that could not be read and were left out: {len(details['unreadable']):,}", ""]
        lines += [*(f"- {sentence}" for sentence in details["unreadable"]), ""]
    if details["dense_fallbacks"]:
        lines += [f"{details['dense_fallbacks']:,} images needed the dense eigensolver.", ""]
    return "\n".join(lines[:-1]) + "\n"


def draw(images: BoxSet, entries: list[dict[str, Any]], block: int, shown: list[int], method: str, path: Path) -> None:
    """A sheet: image with true boxes (dashed) and found ones, the map the algorithm decides by, and the masks, each in
    the color of its box. Over an image with true boxes stands the highest IoU of a found box with one of them."""
    by_index = {entry["index"]: entry for entry in entries}
    drawn = [index for index in shown if index in by_index] or [entries[0]["index"]]
    figure, axes = sheet(len(drawn), 3)
    maps = "degree" if method == "lost" else "eigenvector"
    titles = (
        "found" if not any(map(len, images.boxes)) else "true (dashed), found",
        f"{maps} of the first" if method == "maskcut" else maps,
        "masks" if method == "maskcut" else "mask",
    )
    for place, (index, parts) in enumerate(zip(drawn, axes, strict=True)):
        image, entry = images.read_image(index), by_index[index]
        found = entry["blocks"][block]
        parts[0].set_title(_title(images, index, found["objects"]), fontsize=8, pad=2)
        parts[0].imshow(image)
        for box in images.boxes[index]:
            _frame(parts[0], box, "black", "-")
            _frame(parts[0], box, "white", (0, (4, 4)))
        if found["degenerate"]:
            for axis in parts[1:]:
                axis.imshow((0.35 * image).astype(np.uint8))
                axis.text(0.5, 0.5, "nothing to cut", ha="center", color="white", fontsize=9, transform=axis.transAxes)
        else:
            _draw_found(parts, image, entry, found["objects"])
        if place % 4 == 0:
            for axis, title in zip(parts, titles, strict=True):
                label_row(axis, title)
    write_figure(figure, path)


def _draw_found(parts: Any, image: np.ndarray, entry: dict[str, Any], objects: list[dict[str, Any]]) -> None:
    """Boxes on the first of the axes, the map on the second, masks on the third."""
    height, width = image.shape[:2]
    if "map" in entry:
        parts[1].imshow(np.array(entry["map"]), extent=(0, width, height, 0), cmap="viridis", interpolation="bilinear")
    overlay = (0.35 * image).astype(np.uint8)
    for number, item in enumerate(objects):
        mask = decode(item)
        color = np.array(to_rgb(COLORS[number % len(COLORS)]))
        overlay[mask] = 0.6 * image[mask] + 0.4 * 255 * color
        _frame(parts[0], item["box"], color, "-")
    parts[2].imshow(overlay)


def _frame(axis: Any, box: Any, color: Any, style: Any) -> None:
    x0, y0, x1, y1 = box
    axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=color, linestyle=style, linewidth=1.5))


def _title(images: BoxSet, index: int, objects: list[dict[str, Any]]) -> str:
    """The image's name and, where it has true boxes, its score."""
    name = printable(images.images[index].name)
    if not len(images.boxes[index]) or not objects:
        return name
    best = max(box_iou(np.array(item["box"], float), images.boxes[index]).max() for item in objects)
    return f"{name}   IoU {best:.2f}"
