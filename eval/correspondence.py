"""Semantic correspondence: points of one object found again on another of its kind, PCK on SPair-71k.

    python eval/correspondence.py --ckpt dinov2_vits14_pretrain.pth --data.root SPair-71k --out pairs
    python eval/correspondence.py --ckpt runs/photos --data.root SPair-71k --window 5 --blocks last4 --out pairs

Images are resized to squares. A point's feature is compared with those of all patches of the other image; the most
similar one is the answer (with --window, a weighted mean around it). It is right within a tenth of the longer side of
the object's box: PCK@0.1. Two averages are common, and differ by points: over all points (the figure here), and over
pairs; both are given, by category too. Nothing is trained.

For two pictures of your own there is eval/match.py. torchrun shares the pairs out.
"""

import skipless.common.interruption  # noqa: F401

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from skipless.common import cli, distributed
from skipless.common.pixels import resample
from skipless.datasets.labels.counts import describe_split
from skipless.datasets.labels.masks import read_stored
from skipless.datasets.labels.pairs import Pair, spair
from skipless.eval.evaluation import Context, EvaluationSettings, announce, finish, name_blocks, prepare
from skipless.eval.matching import match_points
from skipless.eval.metrics import bootstrap_interval

ALPHAS = (0.01, 0.05, 0.1, 0.15)


@dataclass
class DataSettings:
    """Pairs of images with points that belong together."""

    root: str
    """Folder of SPair-71k."""
    split: str = "test"
    """trn, val or test."""


@dataclass
class Settings(EvaluationSettings):
    """Semantic correspondence."""

    data: DataSettings
    _: KW_ONLY
    size: int = 448
    """Side in pixels of the squares that images are resized to; the nearest multiple of the patch is taken."""
    blocks: str = "last"
    """Blocks whose features are concatenated: last, last4, or numbers from 1, as in 9,12."""
    window: int = 0
    """Side in patches of the window around the most similar patch whose centers are averaged; odd, 0 for none."""
    limit: int | None = None
    """At most so many pairs, evenly spread over the categories: for a quick look. Named SUBSET."""
    untrained: bool = False
    """Measure the checkpoint's architecture with random weights: the floor its figure stands on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window and self.window % 2 == 0:
            raise ValueError(f"window is {self.window}; give an odd number of patches, or 0")
        if self.size < 1 or self.limit == 0:
            raise ValueError("size and limit must be 1 or more")


class Found(NamedTuple):
    """What came of a pair."""

    place: int
    """Of the pair in the set."""
    distances: list[float]
    """Of each point from where it should be, as shares of the longer side of the target's box."""


def evaluate(settings: Settings) -> dict[str, Any]:
    """Find the points again as `settings` say, and return the result.

    Raises:
        ValueError, FileNotFoundError: a checkpoint, data or settings that cannot be used.
    """
    context = prepare(settings, "correspondence")
    patch = context.backbone.patch
    side = max(1, round(settings.size / patch)) * patch
    data = spair(settings.data.root, settings.data.split)
    count = min(len(data), settings.limit or len(data))
    chosen = np.linspace(0, len(data) - 1, count).round().astype(int).tolist()
    parts = ["spair-nearest" if not settings.window else f"spair-window-{settings.window}", f"{side}px"]
    parts += [name_blocks(context.choices[-1])] if settings.blocks != "last" else []
    description = describe_split(data.name, data.split, count).replace("images", "pairs")
    announce(context, "/".join(parts), description)
    found = find(context, [(place, data.pairs[place]) for place in chosen], side, settings.window)
    scores = score([(data.pairs[place].category, distances) for place, distances in found], settings.seed)
    details = {"data": description, "points": sum(len(row.distances) for row in found), **scores}
    images = Measured(data.name, data.split, count)
    return finish(context, "/".join(parts), images, "PCK@0.1", scores["pck_per_point"]["0.1"], details, report)


@dataclass(frozen=True)
class Measured:
    """What was measured, for the result."""

    name: str
    split: str
    pairs: int

    def __len__(self) -> int:
        return self.pairs


def find(context: Context, pairs: Sequence[tuple[int, Pair]], side: int, window: int) -> list[Found]:
    """Distances of all points of all pairs, in the pairs' order; on every process.

    Features of a category are kept while its pairs are looked at, so that no image is seen twice.
    """
    mine: list[Found] = []
    category, grids, sizes = "", dict[Any, Tensor](), dict[Any, tuple[int, int]]()
    share = pairs[distributed.rank() :: distributed.world_size()]
    for place, pair in tqdm(share, desc="pairs", unit="pair", disable=distributed.rank() > 0):
        if pair.category != category:
            category, grids, sizes = pair.category, {}, {}
        for path in (pair.source, pair.target):
            if path not in grids:
                picture = read_stored(path)
                sizes[path] = picture.shape[:2]
                square = context.backbone.normalize(resample(picture, side, side)[None])
                outputs = context.backbone.features(square, context.choices[-1])
                grids[path] = torch.cat([output.patches[0] for output in outputs], dim=-1)
                if not grids[path].isfinite().all():
                    raise ValueError(f"{path}: its features are NaN or infinite; check the checkpoint")
        (h, w), (high, wide) = sizes[pair.source], sizes[pair.target]
        points = torch.from_numpy(pair.source_points / (w, h))
        answers = match_points(grids[pair.source], grids[pair.target], points, window).cpu().numpy() * (wide, high)
        longer = (pair.target_box[2:] - pair.target_box[:2]).max()
        mine.append(Found(place, (np.linalg.norm(answers - pair.target_points, axis=1) / longer).tolist()))
    return sorted(Found(*row) for part in distributed.gather_objects([tuple(row) for row in mine]) for row in part)


def score(rows: Sequence[tuple[str, list[float]]], seed: int) -> dict[str, Any]:
    """PCK of pairs (category, distances as shares of the box), over points and over pairs, and by category."""
    every = np.concatenate([distances for _, distances in rows])
    by_category = {}
    for category in sorted({category for category, _ in rows}):
        own = [np.array(distances) <= 0.1 for name, distances in rows if name == category]
        by_category[category] = {
            "pairs": len(own),
            "per_point": float(np.concatenate(own).mean()),
            "per_image": float(np.mean([hits.mean() for hits in own])),
        }
    return {
        "pck_per_point": {f"{alpha:g}": float((every <= alpha).mean()) for alpha in ALPHAS},
        "pck_per_image": {
            f"{alpha:g}": float(np.mean([(np.array(distances) <= alpha).mean() for _, distances in rows]))
            for alpha in ALPHAS
        },
        "interval_95": bootstrap_interval(every <= 0.1, seed),
        "by_category": by_category,
    }


def report(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    details, checkpoint = result["details"], result["checkpoint"]
    low, high = details["interval_95"]
    lines = [
        f"**{result['protocol']}** {100 * result['value']:.1f} PCK@0.1 per point (95 % interval {100 * low:.1f} to "
        f"{100 * high:.1f}), {100 * details['pck_per_image']['0.1']:.1f} per image",
        "",
        f"{checkpoint['architecture']} ({checkpoint['path']}); {details['data']}, {details['points']:,} points; "
        f"{result['seconds'] / 60:.1f} minutes on {result['hardware']}.",
        "",
        "| PCK@ | per point | per image |",
        "|---:|---:|---:|",
    ]
    for alpha, value in details["pck_per_point"].items():
        lines.append(f"| {alpha} | {100 * value:.1f} | {100 * details['pck_per_image'][alpha]:.1f} |")
    lines += ["", "| category | pairs | per point | per image |", "|---|---:|---:|---:|"]
    for name, row in details["by_category"].items():
        lines.append(f"| {name} | {row['pairs']:,} | {100 * row['per_point']:.1f} | {100 * row['per_image']:.1f} |")
    return "\n".join(lines) + "\n"


main = partial(cli.run, evaluate, Settings, __doc__)

if __name__ == "__main__":
    main()
