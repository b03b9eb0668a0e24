"""Pairs of images with points that belong together: SPair-71k (arXiv 1908.10543).

test = spair("data/SPair-71k", "test")
test.pairs[0].source_points  # float64 [n, 2], x and y in pixels
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from skipless.datasets.labels.masks import list_folder, require_files


@dataclass(frozen=True, eq=False)
class Pair:
    """Two images of one category, and points of the one that are found again in the other."""

    category: str
    source: Path
    target: Path
    source_points: np.ndarray
    target_points: np.ndarray
    """float64 [n, 2] both: x, y in pixels."""
    target_box: np.ndarray
    """float64 [4], x0, y0, x1, y1 of the object in the target."""


@dataclass(frozen=True, eq=False)
class PairSet:
    """Pairs, those of one category after the other."""

    name: str
    split: str
    pairs: tuple[Pair, ...]

    def __len__(self) -> int:
        return len(self.pairs)


def spair(root: str | Path, split: str = "test") -> PairSet:
    """A split of SPair-71k: JPEGImages/CATEGORY/*.jpg and PairAnnotation/SPLIT/*.json below `root`.

    Raises FileNotFoundError for a missing folder or image, and ValueError for an annotation that is damaged, or has a
    point outside of its image.
    """
    root = Path(root).expanduser()
    folder = root / "PairAnnotation" / split
    files = sorted(name for name in list_folder(folder) if name.endswith(".json"))
    if not files:
        there = ", ".join(sorted(list_folder(root / "PairAnnotation"))) or "none"
        raise FileNotFoundError(f"{folder}: no pairs (*.json) there; splits that are there: {there}")
    pairs = sorted((_read(root, folder / name) for name in files), key=lambda pair: pair.category)
    require_files(sorted({image for pair in pairs for image in (pair.source, pair.target)}), "image")
    return PairSet("spair", split, tuple(pairs))


def _read(root: Path, file: Path) -> Pair:
    try:
        content = json.loads(file.read_bytes())
        category = str(content["category"])
        source, target = (root / "JPEGImages" / category / str(content[f"{side}_imname"]) for side in ("src", "trg"))
        asked, answers = (_points(content, side) for side in ("src", "trg"))
        box = np.array(content["trg_bndbox"], float)
        if len(asked) != len(answers) or not len(asked):
            raise ValueError(f"{len(asked)} and {len(answers)} points; as many of both are needed")
        if box.shape != (4,) or not (np.isfinite(box).all() and (box[2:] > box[:2]).all()):
            raise ValueError(f"trg_bndbox is {content['trg_bndbox']}; it must be x0, y0, x1, y1")
    except KeyError as error:
        raise ValueError(f"{file}: no {error.args[0]} in it; is it an annotation of SPair-71k?") from None
    except (ValueError, TypeError, OSError, RecursionError) as error:
        raise ValueError(f"{file}: {error}") from None
    return Pair(category, source, target, asked, answers, box)


def _points(content: dict[str, Any], side: str) -> np.ndarray:
    points, (width, height) = np.array(content[f"{side}_kps"], float), content[f"{side}_imsize"][:2]
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"{side}_kps has the shape {list(points.shape)}; it must hold x, y of every point")
    outside = ~((points >= 0) & (points <= (width, height))).all(1)
    if outside.any():
        x, y = points[outside][0]
        raise ValueError(
            f"{side}_kps has the point {x:g}, {y:g} outside of the image, which has {width} x {height} pixels"
        )
    return points
