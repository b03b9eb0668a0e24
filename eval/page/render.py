"""The page of a report: one HTML file with everything in it.

Figures come as a table and as curves over the blocks. The viewer is computed from the patch features of a few images:
PCA colors of every block, and codes from which the page computes the similarity of any patch to all others.
A code is a patch's direction in the main subspace of its image's features, in 8-bit numbers; how many dimensions there
are follows from the room in the page, and how closely they give the true cosines is measured and written on it.
"""

import base64
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from skipless.common.files import write_text
from skipless.common.pca import align, component_colors, pca_components
from skipless.common.progress import Progress
from skipless.common.provenance import provenance
from skipless.datasets.images import read_image
from skipless.eval.backbones import Backbone
from skipless.eval.figures.pictures import patch_features
from skipless.eval.page.parts import MARKERS, Line, colors_of, draw_lines, picture_url, rendered
from skipless.eval.page.tables import Table, data_of

CODES = 6_500_000  # bytes of all codes together: a page of 16 images stays far below 15 MB
MAX_BLOCKS = 12  # shown of each checkpoint, evenly spread
MAX_PATCHES = 800  # an image


def write_page(
    path: Path,
    table: Table,
    results: dict[str, list[dict[str, Any]]],
    backbones: dict[str, Backbone],
    pictures: list[tuple[str, np.ndarray]],
    size: int | None,
    settings: dict[str, Any],
    command: str,
) -> None:
    """Write the page.

    Args:
        path: of the HTML file.
        table: of the figures.
        results: by checkpoint, as the evaluations write them, each with "pictures", the path of its sheet, and maybe
            "command", which measured it.
        backbones: by checkpoint, on the device to use.
        pictures: names and pixels of the images to look at.
        size: their short side in pixels, see eval/report.py.
        settings, command: of the run, to be shown.
    """
    look = viewer_content(backbones, pictures, size)
    here = provenance("cpu")
    colors = colors_of(results)
    page = rendered(
        "template.html",
        table=table,
        colors=colors,
        architectures={name: backbone.architecture for name, backbone in backbones.items()},
        plots=[
            {"title": title, "svg": Markup(curves(series, metric, colors))}
            for title, metric, series in by_block(results)
        ],
        look=Markup(json.dumps(look).replace("<", "\\u003c")),
        pictures=[name for name, _ in pictures],
        checkpoints=look["checkpoints"],
        sheets=sheets(results),
        runs=[
            {
                "name": name,
                "protocol": result["protocol"],
                "facts": {
                    **({"command": result["command"]} if "command" in result else {}),
                    "checkpoint": f"{result['checkpoint']['path']} (sha256 {result['checkpoint']['sha256'][:16]}…)",
                    "hardware": result["hardware"],
                    "seconds": f"{result['seconds']:,.0f}",
                    "seed": result["seed"],
                    "commit": result["commit"],
                    "versions": ", ".join(f"{k} {v}" for k, v in result["versions"].items()),
                    "settings": json.dumps(result["settings"]),
                },
            }
            for name, measured in results.items()
            for result in measured
        ],
        settings=json.dumps(settings),
        command=command,
        date=time.strftime("%Y-%m-%d"),
        commits=_different(results, "commit") or [here["commit"] or "not known"],
        hardware=_different(results, "hardware") or [here["hardware"]],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)


def _different(results: dict[str, list[dict[str, Any]]], name: str) -> list[str]:
    return list(dict.fromkeys(str(result[name] or "not known") for of in results.values() for result in of))


def viewer_content(
    backbones: dict[str, Backbone], pictures: Sequence[tuple[str, np.ndarray]], size: int | None
) -> dict[str, Any]:
    """The content of the page's viewer, ready for JSON.

    Returns:
        {"images": [{"name", "width", "height", "source": JPEG as a data URL}],
        "checkpoints": [{"name", "blocks": numbers from 1, "depth", "dims", "error", "grids": [image] -> [h, w],
        "pca": [block][image] -> base64 of uint8 [h, w, 3], "codes": [block][image] -> base64 of int8 [h * w, dims]}]}
    """
    shown = {name: _spread(backbone.depth, MAX_BLOCKS) for name, backbone in backbones.items()}
    features: dict[str, list[list[np.ndarray]]] = {}  # [checkpoint][image][block]
    with Progress(total=len(backbones) * len(pictures), desc="pictures", unit="image") as progress:
        for name, backbone in backbones.items():
            features[name] = []
            for _, picture in pictures:
                short_side = size or _short_side(backbone, picture)
                features[name].append(patch_features(backbone, picture, short_side, shown[name]))
                progress.update()
    vectors = sum(f[0].shape[0] * f[0].shape[1] * len(f) for grids in features.values() for f in grids)
    dims = max(4, CODES // vectors)
    checkpoints = []
    reference: list[list[np.ndarray]] = []  # components of the first checkpoint, [block][image]
    for name in backbones:
        grids = [[blocks[i] for blocks in features[name]] for i in range(len(shown[name]))]  # [block][image]
        components = aligned_components(grids, reference)
        reference = reference or components
        codes = [[similarity_codes(grid, dims) for grid in images] for images in grids]
        checkpoints.append(
            {
                "name": name,
                "blocks": [block + 1 for block in shown[name]],
                "depth": backbones[name].depth,
                "dims": codes[0][0][0].shape[-1],
                "error": max(error for images in codes for _, error in images),
                "grids": [list(grid.shape[:2]) for grid in grids[0]],
                "pca": [
                    [_base64((255 * colors).round().astype(np.uint8)) for colors in component_colors(images)]
                    for images in components
                ],
                "codes": [[_base64(code) for code, _ in images] for images in codes],
            }
        )
    shown_images = [
        {"name": name, "width": p.shape[1], "height": p.shape[0], "source": picture_url(p, 320, 80)}
        for name, p in pictures
    ]
    return {"images": shown_images, "checkpoints": checkpoints}


def aligned_components(features: list[list[np.ndarray]], reference: list[list[np.ndarray]]) -> list[list[np.ndarray]]:
    """PCA components of each block, jointly over the images, turned so that colors stay what they are from block to
    block and, with those of another checkpoint as `reference`, from checkpoint to checkpoint.

    Args:
        features: [block][image] -> [h, w, D].
        reference: [block][image] -> [h, w, 3] of another checkpoint, at other depths maybe; [] for none.

    Returns:
        [block][image] -> [h, w, 3].
    """
    components = [pca_components(images) for images in features]
    last = len(components) - 1
    for block in range(last, -1, -1):
        if reference:
            at = round(block * (len(reference) - 1) / max(last, 1))
            components[block] = align(components[block], reference[at])
        elif block < last:
            components[block] = align(components[block], components[block + 1])
    return components


def similarity_codes(features: np.ndarray, dims: int) -> tuple[np.ndarray, float]:
    """Short codes whose cosine is close to that of the features.

    The unit vectors of an image's patches are projected on the `dims` main directions of their second moments (the best
    there are for inner products, by Eckart and Young), and brought back to length 1.

    Args:
        features: [h, w, D].

    Returns:
        int8 [h * w, min(dims, D)], 127 for 1; and the root mean square difference of their cosines to the true ones.
    """
    x = features.reshape(-1, features.shape[-1]).astype(np.float64)
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    _, directions = np.linalg.eigh(x.T @ x)
    codes = x @ directions[:, ::-1][:, :dims]
    codes /= np.maximum(np.linalg.norm(codes, axis=1, keepdims=True), 1e-12)
    quantized = (127 * codes).round().astype(np.int8)
    y = quantized / 127.0
    return quantized, float(np.sqrt(np.mean((y @ y.T - x @ x.T) ** 2)))


def by_block(
    results: dict[str, list[dict[str, Any]]],
) -> list[tuple[str, str, dict[str, list[dict[str, Any]]]]]:
    """(title, metric, entries by checkpoint) of every protocol and data set that was measured in each block."""
    series: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for name, measured in results.items():
        for result in measured:
            entries = [
                {
                    "block": entry["block"],
                    "value": entry.get("top1", entry.get("miou", entry.get("value"))),
                    "interval": entry.get("interval_95") or _spread_of(entry),
                }
                for entry in result["details"].get("every_block", [])
            ]
            if entries and all(entry["value"] is not None for entry in entries):
                title = f"{result['protocol']}: {data_of(result)}"
                series.setdefault((title, result["metric"]), {})[name] = entries
    return [(title, metric, by_checkpoint) for (title, metric), by_checkpoint in series.items()]


def _spread_of(entry: dict[str, Any]) -> tuple[float, float] | None:
    """A standard deviation to both sides of a mean over seeds."""
    std = entry.get("std")
    return None if std is None else (entry["miou"] - std, entry["miou"] + std)


def curves(series: dict[str, list[dict[str, Any]]], metric: str, colors: dict[str, str]) -> str:
    """An SVG of a metric over the blocks, a line for each checkpoint."""
    lines = {}
    for name, entries in series.items():
        intervals = [entry["interval"] for entry in entries]
        band = [(100 * low, 100 * high) for low, high in intervals] if all(intervals) else None
        lines[name] = Line([entry["block"] for entry in entries], [100 * entry["value"] for entry in entries], band)
    return draw_lines(lines, "block", f"{metric}, %", colors, MARKERS)


def sheets(results: dict[str, list[dict[str, Any]]]) -> list[dict[str, str]]:
    """The sheets of pictures that evaluations left."""
    return [
        {"name": name, "protocol": result["protocol"], "source": picture_url(read_image(result["pictures"]), 1000, 60)}
        for task in ("segmentation", "discovery", "saliency", "video", "depth")
        for name, measured in results.items()
        for result in measured
        if result["task"] == task and Path(result["pictures"]).exists()
    ]


def _short_side(backbone: Backbone, picture: np.ndarray) -> int:
    """1.5 times the training size, unless that is beyond MAX_PATCHES."""
    height, width = picture.shape[:2]
    ratio = max(height, width) / min(height, width)
    most = backbone.patch * math.sqrt(MAX_PATCHES / ratio)
    return max(backbone.patch, int(min(1.5 * backbone.model.architecture["image_size"], most)))


def _spread(count: int, most: int) -> list[int]:
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
