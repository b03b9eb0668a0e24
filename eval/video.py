"""Video object segmentation: objects that are marked in the first frame, followed by the similarity of patches; J&F.

    python eval/video.py --ckpt dino_vits16.pth --data.root DAVIS --out davis
    python eval/video.py --ckpt runs/photos --data.name videos --data.root my_videos --out followed

Nothing is trained. A patch takes the labels of the patches that resemble it most, near its place, in the first frame
and in the seven before it, as DINO does (arXiv 2104.14294, section 4.2.2, and the code it released). J, the IoU of an
object's masks, and F, the F-measure of their boundaries, are those of the DAVIS 2017 evaluation: means over objects,
the first and the last frame left out. What differs from DINO's code: pixels are normalized with the backbone's own
constants (theirs has 0.228 for ImageNet's red), and a patch that does not divide 480 takes the multiple below.

my_videos holds images/NAME/*.jpg and masks/NAME/FRAME.png, at least for the first frame of each video: 0 is the
background, 1, 2, ... are objects. Frames with a mask are scored. With --out: video.json, video.md, pictures, and all
masks as masks/NAME/FRAME.png, which other evaluations of DAVIS read. An interrupted run with --out is continued by the
same command. torchrun shares the videos out.
"""

import skipless.common.interruption  # noqa: F401

from collections.abc import Iterator
from dataclasses import KW_ONLY, asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from skipless.common import cli, distributed
from skipless.common.files import printable
from skipless.common.progress import Progress, duration
from skipless.datasets.labels.counts import describe_split
from skipless.datasets.labels.masks import read_values
from skipless.datasets.labels.videos import Video, VideoSet, davis, video_folders
from skipless.datasets.labels.voc import voc_palette
from skipless.eval.backbones import Backbone
from skipless.eval.dense.report import overlay, protocol_id
from skipless.eval.entries import append_entries, read_entries
from skipless.eval.evaluation import Context, EvaluationSettings, announce, finish, prepare
from skipless.eval.features import data_sha256
from skipless.eval.figures.pictures import label_row, sheet, write_figure
from skipless.eval.metrics import boundary_accuracy, region_similarity, video_scores
from skipless.eval.propagation import PropagationSettings, follow, pixel_mask

SIZE = 480
SHOWN = 8
PALETTE = voc_palette()


@dataclass
class DataSettings:
    """Videos whose first frame has a mask."""

    name: Literal["davis17", "videos"] = "davis17"
    """DAVIS 2017, or videos: your own."""
    root: str = "data/DAVIS"
    """Its folder, as its authors' archive unpacks, or your own with images/ and masks/."""
    split: str = "val"
    """davis17: val or train."""


@dataclass
class Settings(EvaluationSettings):
    """Video object segmentation."""

    data: DataSettings = field(default_factory=DataSettings)
    propagation: PropagationSettings = field(default_factory=PropagationSettings)
    """How labels are carried on."""
    _: KW_ONLY
    size: int = SIZE
    """Short side in pixels that frames are resized to; the multiple of the patch below it is taken."""
    blocks: str = "last"
    """Blocks whose features are concatenated: last, last4, or numbers from 1, as in 9,12."""
    limit: int | None = None
    """At most so many videos, evenly spread over the set: for a quick look. Named SUBSET."""
    untrained: bool = False
    """Measure the checkpoint's architecture with random weights: the floor its figure stands on."""
    batch_size: int = 4
    """Frames in one forward pass of the backbone. Changes speed and memory alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 1 or (self.limit is not None and self.limit < 1):
            raise ValueError("size and limit must be 1 or more")


def evaluate(settings: Settings) -> dict[str, Any]:
    """Follow the objects of all videos as `settings` say, and return the result.

    Raises:
        ValueError, FileNotFoundError: a checkpoint, data or settings that cannot be used.
    """
    context = prepare(settings, "video")
    where = settings.data
    data = davis(where.root, where.split) if where.name == "davis17" else video_folders(where.root)
    side, whole = context.backbone.multiple_below(settings.size), len(data)
    count = min(whole, settings.limit or whole)
    rows = np.linspace(0, whole - 1, count).round().astype(int).tolist()
    data = VideoSet(data.name, data.split, tuple(data.videos[row] for row in rows))
    name = f"{data.name}-propagation/dino" + (f"/{side}px" if side != SIZE else "")
    published = asdict(PropagationSettings())
    changed = {key: [published[key], value] for key, value in asdict(settings.propagation).items()}
    changed = {key: pair for key, pair in changed.items() if pair[0] != pair[1]}
    protocol = protocol_id(context, name, bool(changed))
    official = whole if where.name == "videos" else None
    description = describe_split(data.name, data.split, count, official).replace("images", "videos")
    announce(context, protocol, description)
    entries = follow_all(context, data, side, settings.propagation)
    details: dict[str, Any] = {"data": description, "objects": sum(video.objects for video in data.videos)}
    details |= score(data, entries, settings.seed) | {"changed_settings": changed}
    value = details.get("J&F")
    files = {"video.png": partial(draw, data)}
    result = finish(context, protocol, data, None if value is None else "J&F", value, details, report, files)
    if context.first and context.out:
        for log in context.out.glob("followed-*.jsonl"):
            log.unlink()
    return result


def follow_all(context: Context, data: VideoSet, side: int, settings: PropagationSettings) -> list[dict[str, Any]]:
    """J and F of every video, from an interrupted run's files as far as they are there, on every process: {"index",
    "J": [objects x scored frames], "F": likewise}. Masks are written where the result goes."""
    files = [file for video in data.videos for file in (*video.frames, *video.masks) if file is not None]
    blocks = context.choices[-1]
    identity = {
        "checkpoint": context.backbone.fingerprint(),
        "data": data_sha256(files),
        "settings": [side, list(blocks), asdict(settings)],
    }
    known: dict[int, dict[str, Any]] = {}
    for path in sorted(context.out.glob("followed-*.jsonl")) if context.out else []:
        known |= read_entries(path, identity)
    distributed.any_process(False)  # all have read before one writes
    rest = [index for index in range(len(data)) if index not in known]
    mine: list[dict[str, Any]] = []
    share = rest[distributed.rank() :: distributed.world_size()]
    frames = sum(len(data.videos[index].frames) - 1 for index in share)
    with Progress(total=frames, desc="videos", unit="frame", active=distributed.rank() == 0) as progress:
        for index in share:
            video = data.videos[index]
            folder = context.out / "masks" / video.name if context.out else None
            scores = []
            for place, mask in enumerate(segment(video, context.backbone, blocks, side, settings, context.batch_size)):
                if folder:
                    save_mask(mask, folder / f"{video.frames[place].stem}.png")
                if 0 < place < len(video.frames) - 1 and video.masks[place]:
                    scores.append(compare(mask, video.read_mask(place), video.objects))
                progress.update(int(place > 0))
            j, f = np.array(scores).reshape(-1, video.objects, 2).transpose(2, 1, 0).tolist()
            mine.append({"index": index, "J": j, "F": f})
            if context.out:
                append_entries(context.out / f"followed-{distributed.rank()}.jsonl", identity, mine[-1:])
    for part in distributed.gather_objects(mine):
        known |= {entry["index"]: entry for entry in part}
    return [known[index] for index in range(len(data))]


def segment(
    video: Video, backbone: Backbone, blocks: tuple[int, ...], side: int, settings: PropagationSettings, batch_size: int
) -> Iterator[np.ndarray]:
    """A mask uint8 [H, W] for every frame, the first being the given one."""
    first = video.read_mask(0)
    yield first
    grids = frame_features(video, backbone, blocks, side, batch_size)
    for shares in follow(grids, first, settings):
        yield pixel_mask(shares, backbone.patch, *video.size)


def frame_features(
    video: Video, backbone: Backbone, blocks: tuple[int, ...], side: int, batch_size: int
) -> Iterator[Tensor]:
    """Features [h, w, D] of one frame after the other, resized as DINO does, bilinearly: the short side to `side`
    pixels, the long one in proportion, down to a multiple of 64 (of the patch, where that does not divide 64)."""
    height, width = video.size
    unit = 64 if 64 % backbone.patch == 0 and side >= 64 else backbone.patch
    longer = max(side, int(side * max(height, width) / min(height, width) // unit * unit))
    tall, wide = (longer, side) if height > width else (side, longer)
    backbone.require_room(video.frames[0], tall, wide)
    for start in range(0, len(video.frames), batch_size):
        places = range(start, min(start + batch_size, len(video.frames)))
        pictures = np.stack([cv2.resize(video.read_frame(place), (wide, tall)) for place in places])
        outputs = backbone.features(backbone.normalize(pictures), blocks)
        for place, grid in zip(places, torch.cat([output.patches for output in outputs], dim=-1), strict=True):
            if not grid.isfinite().all():
                raise ValueError(f"{video.frames[place]}: its features are NaN or infinite; check the checkpoint")
            yield grid


def compare(mask: np.ndarray, truth: np.ndarray, objects: int) -> list[tuple[float, float]]:
    """J and F of every object of a frame, whose masks are uint8 [H, W]."""
    pairs = [(mask == number, truth == number) for number in range(1, objects + 1)]
    return [(region_similarity(*pair), boundary_accuracy(*pair)) for pair in pairs]


def score(data: VideoSet, entries: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Means over the objects of all videos, their 95 % interval by drawing videos, and each video; nothing where no
    frame has a mask to compare with."""
    scored = [(video.name, entry) for video, entry in zip(data.videos, entries, strict=True) if entry["J"][0]]
    if not scored:
        return {}
    objects = {
        measure: [[video_scores(np.array(frames)) for frames in entry[measure]] for _, entry in scored]
        for measure in ("J", "F")
    }
    figures: dict[str, Any] = {}
    for measure, videos in objects.items():
        means = np.array([scores for video in videos for scores in video]).mean(0).tolist()
        figures[measure] = dict(zip(("mean", "recall", "decay"), means, strict=True))
    by_video = {
        name: {"objects": len(j), **{m: float(np.mean([s.mean for s in v])) for m, v in (("J", j), ("F", f))}}
        for (name, _), j, f in zip(scored, objects["J"], objects["F"], strict=True)
    }
    counts = np.array([row["objects"] for row in by_video.values()], float)
    sums = counts * [(row["J"] + row["F"]) / 2 for row in by_video.values()]
    drawn = np.random.default_rng(seed).multinomial(len(counts), np.full(len(counts), 1 / len(counts)), 10_000)
    interval = np.percentile(drawn @ sums / (drawn @ counts), [2.5, 97.5]).tolist()
    value = (figures["J"]["mean"] + figures["F"]["mean"]) / 2
    return {"J&F": value, "interval_95": interval, **figures, "by_video": by_video}


def save_mask(mask: np.ndarray, path: Path) -> None:
    """A PNG with a palette, as DAVIS has its masks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(mask)
    picture.putpalette(PALETTE.ravel().tolist())
    picture.save(path)


def report(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    details, checkpoint = result["details"], result["checkpoint"]
    about = f"{checkpoint['architecture']} ({checkpoint['path']}); {details['data']}, {details['objects']:,} objects; "
    about += f"{duration(result['seconds'])} on {result['hardware']}."
    changed = "; ".join(f"{name} {used} (DINO: {was})" for name, (was, used) in details["changed_settings"].items())
    if result["value"] is None:
        return f"**{result['protocol']}** without a score: no frame but the first has a mask\n\n{about}\n"
    low, high = details["interval_95"]
    lines = [
        f"**{result['protocol']}** {100 * result['value']:.1f} J&F (95 % interval {100 * low:.1f} to {100 * high:.1f})",
        "",
        about,
        "",
        *([f"Changed, so not comparable with the protocol's figures: {changed}.", ""] if changed else []),
        "| | mean | recall | decay |",
        "|---|---:|---:|---:|",
    ]
    for measure in ("J", "F"):
        lines.append(f"| {measure} | " + " | ".join(f"{100 * x:.1f}" for x in details[measure].values()) + " |")
    lines += ["", "| video | objects | J | F |", "|---|---:|---:|---:|"]
    for name, row in details["by_video"].items():
        lines.append(f"| {printable(name)} | {row['objects']} | {100 * row['J']:.1f} | {100 * row['F']:.1f} |")
    return "\n".join(lines) + "\n"


def draw(data: VideoSet, path: Path) -> None:
    """A sheet: of some videos the first frame with its mask, and below it three later ones with theirs."""
    rows = np.linspace(0, len(data) - 1, min(SHOWN, len(data))).round().astype(int)
    figure, axes = sheet(len(rows), 4)
    for column, (row, parts) in enumerate(zip(rows, axes, strict=True)):
        video = data.videos[row]
        places = np.linspace(0, len(video.frames) - 1, 4).round().astype(int).tolist()
        parts[0].set_title(printable(video.name), fontsize=8, pad=2)
        for axis, place in zip(parts, places, strict=True):
            mask = read_values(path.parent / "masks" / video.name / f"{video.frames[place].stem}.png")
            frame = video.read_frame(place)
            axis.imshow(np.where(mask[..., None] > 0, overlay(frame, PALETTE[mask]), frame))
        if column % 4 == 0:
            for axis, title in zip(parts, ("given", "1/3", "2/3", "last"), strict=True):
                label_row(axis, title)
    write_figure(figure, path)


main = partial(cli.run, evaluate, Settings, __doc__)

if __name__ == "__main__":
    main()
