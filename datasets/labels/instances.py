"""COCO's instances files, checked when they are opened: pycocotools trusts them, computes for hours, or crashes.

    coco = read_instances("annotations/instances_val2017.json")  # pycocotools' COCO

Format: cocodataset.org, "Data format"; pycocotools/mask.py for run lengths. Ids of annotations are numbered anew, from
1: pycocotools takes 0 for "no match", and counts two of one id as one, so that a perfect detector would score 0.
"""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np


def read_instances(path: Path) -> Any:
    """The file as pycocotools' COCO. Where an object has no mask, its box stands for it, and the object has
    "mask_from_box"; polygons of fewer than three points, which enclose nothing, are left out.

    Raises FileNotFoundError for a missing file; ValueError, naming the image or the annotation, for one that is damaged
    or of another kind; for images that are listed twice or lack their size; for objects without a box, with numbers
    that are not finite or lie farther outside of the image than it is large, and with run lengths that do not fit it.
    """
    from pycocotools.coco import COCO

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such annotation file")
    try:
        content = json.loads(path.read_bytes())
        images, items = content["images"], content["annotations"]
        if not images or not all(isinstance(item, dict) for part in (images, items) for item in part):
            raise ValueError("no images or no annotations in it")
        by_id = {image["id"]: _checked_image(image) for image in images}
        if len(by_id) < len(images):
            raise ValueError(f"{len(images) - len(by_id)} of its images have the id of another one")
        content["annotations"] = items = [item for item in items if item["image_id"] in by_id]
        for number, item in enumerate(items, 1):
            image = by_id[item["image_id"]]
            _check_annotation(item, image["width"], image["height"])
            item["id"] = number
    except RecursionError:
        raise ValueError(f"{path}: is nested too deeply for COCO instances; give an instances file") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}: cannot be read as COCO instances ({reason}); give an instances file") from None
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):  # it reports its progress
        coco.createIndex()
    return coco


def _checked_image(image: dict[str, Any]) -> dict[str, Any]:
    sides = [image[name] for name in ("width", "height")]
    if not all(isinstance(side, int) and 0 < side < 2**20 for side in sides):
        raise ValueError(f"image {image['id']} has width {sides[0]!r} and height {sides[1]!r}")
    if not isinstance(image["id"], int) or not isinstance(image["file_name"], str):
        raise ValueError(f"image {image['id']!r} has the file_name {image['file_name']!r}")
    return image


def _check_annotation(item: dict[str, Any], width: int, height: int) -> None:
    """Raises ValueError, saying what is wrong, and completes a mask that is missing."""
    where = f"annotation {item.get('id')} of image {item['image_id']}"
    box = item.get("bbox")
    if not isinstance(box, list) or len(box) != 4:
        raise ValueError(f"{where} has no box: its bbox is {json.dumps(box)[:60]}")
    x, y, w, h = _numbers(box, f"{where} has the box {box}, which")
    if w < 0 or h < 0:
        raise ValueError(f"{where} has a box of negative size, {box}")
    _require_near([x, x + w], [y, y + h], width, height, f"{where} has the box {box}, which")
    if not isinstance(item.get("category_id"), int) or item.setdefault("iscrowd", 0) not in (0, 1):
        raise ValueError(f"{where} has category_id {item.get('category_id')!r} and iscrowd {item.get('iscrowd')!r}")
    _numbers([item.setdefault("area", w * h)], f"{where} has an area that")
    masks = item.get("segmentation")
    if isinstance(masks, dict):
        _check_run_lengths(masks, width, height, where)
        return
    if masks is not None and not (isinstance(masks, list) and all(isinstance(polygon, list) for polygon in masks)):
        raise ValueError(f"{where} has a segmentation that is neither polygons nor run lengths")
    polygons = []
    for polygon in masks or []:
        points = _numbers(polygon, f"{where} has a polygon that")
        if len(points) < 6:
            continue
        if len(points) % 2:
            raise ValueError(f"{where} has a polygon of {len(points)} numbers, which are no pairs")
        _require_near(points[::2], points[1::2], width, height, f"{where} has a polygon that")
        polygons.append(polygon)
    if not polygons:
        item["mask_from_box"] = True
        polygons = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    item["segmentation"] = polygons


def _numbers(values: list[Any], what: str) -> Any:
    numbers = np.array(values, np.float64) if all(isinstance(v, int | float) for v in values) else np.array([np.nan])
    if not np.isfinite(numbers).all():
        raise ValueError(f"{what} holds what is no finite number")
    return numbers.tolist()


def _require_near(x: list[float], y: list[float], width: int, height: int, what: str) -> None:
    """Not farther outside than the image is large: pycocotools takes memory for every pixel on the way."""
    if not (min(x) >= -width and max(x) <= 2 * width and min(y) >= -height and max(y) <= 2 * height):
        raise ValueError(f"{what} lies far outside of the image, which has {width} x {height} pixels")


def _check_run_lengths(rle: dict[str, Any], width: int, height: int, where: str) -> None:
    if rle.get("size") != [height, width]:
        raise ValueError(f"{where} has run lengths of size {rle.get('size')}, and its image is {[height, width]}")
    counts = rle.get("counts")
    runs = decoded_runs(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(isinstance(run, int) and run >= 0 for run in runs):
        raise ValueError(f"{where} has damaged run lengths")
    if sum(runs) != width * height:
        raise ValueError(f"{where} has run lengths of {sum(runs)} pixels, and its image has {width * height}")


def decoded_runs(counts: str) -> list[int] | None:
    """Run lengths from COCO's text: five bits a character, the sixth says that more follow; from the fourth on, each is
    the difference to the one before the last. None where it is damaged."""
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 30:
            return None
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            value -= (code & 16) << (shift - 4) if code & 16 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return None if shift else runs
