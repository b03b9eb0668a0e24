"""The report of object discovery: the table in Markdown and the sheet of pictures."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from pycocotools import mask as coco_mask

from skipless.common.files import printable, write_atomically
from skipless.datasets.labels.boxes import BoxSet
from skipless.eval.figures.pictures import label_row

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle


def report(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    details, checkpoint = result["details"], result["checkpoint"]
    if result["value"] is None:
        headline = f"**{result['protocol']}** {result['images']:,} images searched; none has boxes to compare with"
    else:
        headline = f"**{result['protocol']}** {100 * result['value']:.1f} {result['metric']}"
    if "interval_95" in details:
        low, high = details["interval_95"]
        headline += f" (95 % interval {100 * low:.1f} to {100 * high:.1f}; {details['scored_images']:,} images)"
    lines = [
        headline,
        "",
        f"{checkpoint['architecture']} ({checkpoint['path']}), block {details['block']}; {details['data']}; "
        f"{result['seconds'] / 60:.1f} minutes on {result['hardware']}.",
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
        lines += ["", f"{details['objects'] / result['images']:.2f} objects an image.", ""]
        if "masks_from_boxes" in details:
            lines += [f"{details['masks_from_boxes']:,} true objects have no mask; their boxes stand for them.", ""]
    if "every_block" in details:
        lines += [f"| block | {details['every_block'][0]['metric']} |", "|---:|---:|"]
        lines += [
            f"| {e['block']} | {100 * e['value']:.1f} |" for e in details["every_block"] if e["value"] is not None
        ]
        lines.append("")
    if details["nearly_complete_graphs"] > 0.1 * result["images"]:
        advice = " Try --features keys_without_bias." if result["settings"]["features"] == "keys" else ""
        lines += [
            f"Warning: in {details['nearly_complete_graphs']:,} of {result['images']:,} images nearly all patches "
            f"count as similar, and what is found there means little.{advice}",
            "",
        ]
    if details["degenerate_images"]:
        lines += [f"In {details['degenerate_images']:,} images there was nothing to cut; the object is the image.", ""]
    if details["unreadable"]:
        lines += [f"{len(details['unreadable']):,} images could not be read and were left out:", ""]
        lines += [*(f"- {sentence}" for sentence in details["unreadable"]), ""]
    if details["dense_fallbacks"]:
        lines += [f"{details['dense_fallbacks']:,} images needed the dense eigensolver.", ""]
    return "\n".join(lines[:-1]) + "\n"


def draw(images: BoxSet, entries: list[dict[str, Any]], block: int, shown: list[int], method: str, path: Path) -> None:
    """A sheet: image with true boxes (green) and found ones, the map the algorithm decides by, and the masks."""
    by_index = {entry["index"]: entry for entry in entries}
    drawn = [index for index in shown if index in by_index] or [entries[0]["index"]]
    colors = [plt.get_cmap("Set1")(number)[:3] for number in (0, 1, 4, 3, 6)]  # none of them green
    columns = min(4, len(drawn))
    rows = -(-len(drawn) // columns)
    figure, axes = plt.subplots(3 * rows, columns, figsize=(3 * columns, 7.2 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    maps = "degree" if method == "lost" else "eigenvector"
    titles = (
        "found (red)" if not any(map(len, images.boxes)) else "true (green), found (red)",
        f"{maps} of the first" if method == "maskcut" else maps,
        "masks" if method == "maskcut" else "mask",
    )
    for place, index in enumerate(drawn):
        image, entry = images.read_image(index), by_index[index]
        height, width = image.shape[:2]
        row, column = 3 * (place // columns), place % columns
        axes[row, column].imshow(image)
        if "map" in entry:
            axes[row + 1, column].imshow(np.array(entry["map"]), extent=(0, width, height, 0), cmap="viridis")
        overlay = (0.35 * image).astype(np.uint8)
        boxes: list[tuple[Any, Any]] = [(box, "lime") for box in images.boxes[index]]
        for number, item in enumerate(entry["blocks"][block]["objects"]):
            rle = item["rle"]
            mask = coco_mask.decode({"size": rle["size"], "counts": rle["counts"].encode()}).astype(bool)
            color = colors[number % len(colors)]
            overlay[mask] = 0.6 * image[mask] + 0.4 * 255 * np.array(color)
            boxes.append((item["box"], color))
        axes[row + 2, column].imshow(overlay)
        for (x0, y0, x1, y1), edge in boxes:
            frame = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=edge, linewidth=1.5)
            axes[row, column].add_patch(frame)
        axes[row, column].set_title(printable(images.images[index].name), fontsize=8, pad=2)
        if column == 0:
            for offset, title in enumerate(titles):
                label_row(axes[row + offset, 0], title)
    figure.tight_layout(pad=0.6, rect=(0.01, 0, 1, 1))
    write_atomically(path, lambda beside: figure.savefig(beside, dpi=100, format="png"))
    plt.close(figure)
