"""Synthetic scenes written to disk, in PASCAL VOC's layout and as class folders."""

import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from skipless.common.files import holds_already, whole_folder
from skipless.common.processes import available_cores, spread
from skipless.common.progress import Progress
from skipless.datasets.labels.voc import voc_palette
from skipless.datasets.synthetic.drawing import CLASSES, MIN_SIZE, Scene, render_scene

# Raised with every change of the drawing, so that a folder made by an older one is never mistaken for a new one.
VERSION = 2
RECORD = "scenes.json"
SPLITS = ("train", "val")
SCENES_PER_TASK = 16
MOST_SCENES = 10**6
PALETTE = voc_palette().ravel().tolist()


def write_scenes(
    root: str | Path, train: int = 3000, val: int = 600, size: int = 128, seed: int = 0, workers: int | None = None
) -> None:
    """Write a data set of scenes under `root`, in the layout that `datasets/scenes.py` describes.

    The files depend on the settings alone, not on the number of processes. The folder appears whole or not at all. A
    folder that already holds scenes of the same settings is left as it is, with a line on stderr that says so.

    Args:
        root: folder to make; it must not exist, be empty, or hold scenes of the same settings.
        train, val: number of scenes, 1 to `MOST_SCENES`.
        size: side of the images in pixels, at least 32.
        seed: everything random follows from it, 0 or larger. Scene i of a split is the same whatever the counts.
        workers: number of processes; None = one for each available core, fewer for few scenes.

    Raises:
        ValueError: a setting out of range, or a `root` that is a file or holds anything else.
        OSError: the folder cannot be written.
    """
    for field, value, least in (("train", train, 1), ("val", val, 1), ("size", size, MIN_SIZE), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{field} is {value}: choose {least} or more.")
    if max(train, val) > MOST_SCENES:
        raise ValueError(f"train is {train:,} and val {val:,}: choose at most {MOST_SCENES:,}.")
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}: choose 1 or more, or leave it out for one a core.")
    # Resolved, so that the temporary folder lies beside the real one also where `root` is a symlink.
    root = Path(root).expanduser().resolve()
    counts = {"train": train, "val": val}
    settings = {"version": VERSION, "seed": seed, **counts, "size": size}
    if holds_already(root, RECORD, _read_settings, settings, "scenes"):
        print(f"{root} already holds these scenes: nothing to do.", file=sys.stderr)
        return
    tasks = [
        (split, range(start, min(start + SCENES_PER_TASK, count)))
        for split, count in counts.items()
        for start in range(0, count, SCENES_PER_TASK)
    ]
    # Starting a process costs about as much as drawing a hundred scenes.
    processes = min(workers or available_cores(), -(-len(tasks) // 4))
    try:
        with (
            whole_folder(root) as folder,
            Progress(total=train + val, desc=f"scenes in {root}", unit="scene") as progress,
        ):
            _write_lists(folder / "VOCdevkit" / "VOC2012", counts)
            for done in spread(partial(_write_range, folder, size, seed), tasks, processes):
                progress.update(done)
            (folder / RECORD).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    except OSError:
        # Another process (the next rank, say) may have written the same scenes meanwhile.
        if not holds_already(root, RECORD, _read_settings, settings, "scenes"):
            raise


def _write_lists(voc: Path, counts: dict[str, int]) -> None:
    """The folders of a VOC, its lists of names and classes."""
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationObject", "Annotations"):
        (voc / folder).mkdir(parents=True)
    names = {split: [_name(split, index) for index in range(count)] for split, count in counts.items()}
    names["trainval"] = names["train"] + names["val"]
    for task in ("Main", "Segmentation"):
        lists = voc / "ImageSets" / task
        lists.mkdir(parents=True)
        for split, members in names.items():
            (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in members), encoding="utf-8")
    (voc / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES), encoding="utf-8")


def _read_settings(record: Path) -> dict[str, Any]:
    try:
        settings = json.loads(record.read_text(encoding="utf-8"))
        return dict(settings.items())
    except (ValueError, OSError, AttributeError) as error:
        raise ValueError(f"{record} cannot be read ({error}): delete the folder, or choose another") from error


def _save_mask(mask: npt.NDArray[np.uint8], path: Path) -> None:
    picture = Image.fromarray(mask)
    picture.putpalette(PALETTE)
    picture.save(path)


def _annotation(name: str, scene: Scene) -> str:
    height, width = scene.class_mask.shape
    lines = [
        "<annotation>",
        "\t<folder>VOC2012</folder>",
        f"\t<filename>{name}.jpg</filename>",
        f"\t<size><width>{width}</width><height>{height}</height><depth>3</depth></size>",
        "\t<segmented>1</segmented>",
    ]
    for item in scene.objects:
        x0, y0, x1, y1 = item.box
        lines += [
            "\t<object>",
            f"\t\t<name>{CLASSES[item.label - 1]}</name>",
            "\t\t<pose>Unspecified</pose>",
            f"\t\t<truncated>{int(item.truncated)}</truncated>",
            f"\t\t<difficult>{int(item.difficult)}</difficult>",
            f"\t\t<bndbox><xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox>",
            "\t</object>",
        ]
    return "\n".join([*lines, "</annotation>", ""])


def _name(split: str, index: int) -> str:
    return f"{split}_{index:06d}"


def _write_scene(root: Path, size: int, seed: int, split: str, index: int) -> None:
    # Labels go round, so that every class is equally frequent among the main objects of a split.
    label = 1 + index % len(CLASSES)
    scene = render_scene(np.random.default_rng((seed, SPLITS.index(split), index)), size, label)
    voc, name = root / "VOCdevkit" / "VOC2012", _name(split, index)
    Image.fromarray(scene.image).save(voc / "JPEGImages" / f"{name}.jpg", quality=92)
    _save_mask(scene.class_mask, voc / "SegmentationClass" / f"{name}.png")
    _save_mask(scene.instance_mask, voc / "SegmentationObject" / f"{name}.png")
    (voc / "Annotations" / f"{name}.xml").write_text(_annotation(name, scene), encoding="utf-8")

    folder = root / split / CLASSES[label - 1]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        os.symlink(Path("../../VOCdevkit/VOC2012/JPEGImages", f"{name}.jpg"), folder / f"{name}.jpg")
    except OSError:  # a file system without symlinks, or Windows without the right to make them
        shutil.copyfile(voc / "JPEGImages" / f"{name}.jpg", folder / f"{name}.jpg")


def _write_range(root: Path, size: int, seed: int, task: tuple[str, range]) -> int:
    split, indices = task
    for index in indices:
        _write_scene(root, size, seed, split, index)
    return len(indices)
