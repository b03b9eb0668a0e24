"""Synthetic scenes with exact masks, boxes and classes: the offline default data set.

    python datasets/scenes.py --out data/scenes
    python datasets/scenes.py --out data/small --train 500 --val 100 --size 64

A scene shows one large object and up to three smaller ones, which may hide parts of each other, in front of a cluttered
background. A class is a shape together with a family of textures and a range of their periods (`CLASSES`). As in the
world, things of a class tend to have a color, but the hues of classes overlap: color is a hint, and texture or
outline tell the class. Position, proportions, turn (upright, give or take 17 degrees), texture phase, contrast and
illumination are drawn alike for every class.

What `write_scenes` leaves under its root:

    VOCdevkit/VOC2012/JPEGImages/NAME.jpg            RGB, size x size
                      SegmentationClass/NAME.png     palette PNG: 0 background, n = the n-th line of classes.txt
                      SegmentationObject/NAME.png    palette PNG: 0 background, n = the n-th object of the XML
                      Annotations/NAME.xml           boxes, 1-based and inclusive, of the visible part of each object
                      ImageSets/{Main,Segmentation}/{train,val,trainval}.txt
                      classes.txt                    one class name a line, in label order, without background
    train/CLASS/NAME.jpg, val/CLASS/NAME.jpg         the same images by the class of their largest visible object
    scenes.json                                      the settings that made them

There are no void pixels. The class folders hold relative symlinks (copies where the file system has no symlinks): give
`ROOT/train` to pretraining and `ROOT/VOCdevkit` to whatever reads PASCAL VOC.
"""

import json
import multiprocessing
import os
import secrets
import shutil
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from skipless.datasets.labels.voc import voc_palette
from skipless.datasets.synthetic.drawing import CLASSES, MIN_SIZE, Scene, render_scene

# Raised with every change of the drawing, so that a folder made by an older one is never mistaken for a new one.
VERSION = 2
SPLITS = ("train", "val")

_SCENES_PER_TASK = 16
_PALETTE = voc_palette().ravel().tolist()


def _save_mask(mask: npt.NDArray[np.uint8], path: Path) -> None:
    picture = Image.fromarray(mask)
    picture.putpalette(_PALETTE)
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


def _write_range(root: Path, size: int, seed: int, split: str, indices: range) -> int:
    for index in indices:
        _write_scene(root, size, seed, split, index)
    return len(indices)


def _start_worker() -> None:
    cv2.setNumThreads(1)
    # Ctrl-C reaches every process of the terminal: only the parent answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _run(tasks: list[partial[int]], workers: int) -> Iterator[int]:
    """Run `tasks`, in this process or in `workers` others, and yield what each returns as it finishes."""
    if workers == 1:
        for task in tasks:
            yield task()
        return
    # Spawned, not forked: the caller may hold threads or a GPU.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        for future in as_completed([pool.submit(task) for task in tasks]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _already_written(root: Path, settings: dict[str, int]) -> bool:
    """Whether `root` holds the scenes of `settings`; ValueError if it holds anything else."""
    if not root.exists():
        return False
    if not root.is_dir():
        raise ValueError(f"{root} is a file: scenes are written as a folder; choose another path.")
    record = root / "scenes.json"
    if not record.exists():
        if any(root.iterdir()):
            raise ValueError(f"{root} holds files other than scenes: choose a new or an empty folder.")
        return False
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{record} cannot be read ({error}): delete {root} or choose another folder.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{record} does not hold the settings of scenes: delete {root} or choose another folder.")
    differing = [
        f"{field} = {found.get(field)} (asked for: {value})"
        for field, value in settings.items()
        if found.get(field) != value
    ]
    if differing:
        raise ValueError(
            f"{root} already holds scenes with {', '.join(differing)}: delete it, choose another folder, "
            "or ask for the same settings."
        )
    return True


def write_scenes(
    root: str | Path,
    train: int = 3000,
    val: int = 600,
    size: int = 128,
    seed: int = 0,
    workers: int | None = None,
) -> None:
    """Write a data set of scenes under `root`, in the layout described at the top of this file.

    The files depend on the settings alone, not on the number of processes. The folder appears whole or not at all. A
    folder that already holds scenes of the same settings is left as it is, with a line on stderr that says so.

    Args:
        root: Folder to make; it must not exist, be empty, or hold scenes of the same settings.
        train: Number of training scenes, at least 1.
        val: Number of validation scenes, at least 1.
        size: Side of the images in pixels, at least 32.
        seed: Everything random follows from it, 0 or larger. Scene i of a split is the same whatever the counts.
        workers: Number of processes; None = one for each available core, fewer for few scenes.

    Raises:
        ValueError: A setting out of range, or a `root` that is a file or holds anything else.
        OSError: The folder cannot be written.
    """
    for field, value, least in (("train", train, 1), ("val", val, 1), ("size", size, MIN_SIZE), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{field} is {value}: choose {least} or more.")
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}: choose 1 or more, or leave it out for one a core.")

    # Resolved, so that the temporary folder lies beside the real one also where `root` is a symlink.
    root = Path(root).expanduser().resolve()
    counts = {"train": train, "val": val}
    settings = {"version": VERSION, "seed": seed, **counts, "size": size}
    if _already_written(root, settings):
        print(f"{root} already holds these scenes: nothing to do.", file=sys.stderr)
        return

    root.parent.mkdir(parents=True, exist_ok=True)
    unfinished = root.with_name(f".{root.name}.unfinished-{secrets.token_hex(4)}")
    try:
        voc = unfinished / "VOCdevkit" / "VOC2012"
        for folder in ("JPEGImages", "SegmentationClass", "SegmentationObject", "Annotations"):
            (voc / folder).mkdir(parents=True)
        names = {split: [_name(split, index) for index in range(count)] for split, count in counts.items()}
        for task in ("Main", "Segmentation"):
            lists = voc / "ImageSets" / task
            lists.mkdir(parents=True)
            for split, of_split in {**names, "trainval": names["train"] + names["val"]}.items():
                (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in of_split), encoding="utf-8")
        (voc / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES), encoding="utf-8")

        tasks = [
            partial(_write_range, unfinished, size, seed, split, range(start, min(start + _SCENES_PER_TASK, count)))
            for split, count in counts.items()
            for start in range(0, count, _SCENES_PER_TASK)
        ]
        # Starting a process costs about as much as drawing a hundred scenes.
        processes = min(workers or _available_cores(), -(-len(tasks) // 4))
        with tqdm(total=train + val, desc=f"scenes in {root}", unit="scene") as progress:
            for done in _run(tasks, processes):
                progress.update(done)
        (unfinished / "scenes.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        try:
            if root.exists():
                root.rmdir()
            unfinished.rename(root)
        except OSError:
            # Another process (the next rank, say) may have written the same scenes meanwhile.
            if not _already_written(root, settings):
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def main() -> None:
    """Command line: see the docstring of this file."""
    from jsonargparse import auto_cli

    def scenes(
        out: Path = Path("data/scenes"),
        train: int = 3000,
        val: int = 600,
        size: int = 128,
        seed: int = 0,
        workers: int | None = None,
    ) -> None:
        """Write synthetic scenes with exact masks, boxes and classes, in PASCAL VOC's layout.

        Args:
            out: Folder to make. It appears whole or not at all; one that already holds these scenes is left as it is.
            train: Number of training scenes.
            val: Number of validation scenes.
            size: Side of the images in pixels, at least 32.
            seed: Everything random follows from it: the same seed, the same files.
            workers: Number of processes; by default one for each available core. Does not change the files.
        """
        write_scenes(out, train, val, size, seed, workers)
        print(f"next: python ssl/pretrain.py --config configs/demo.yaml --data.path {out / 'train'} --out runs/scenes")

    try:
        auto_cli(scenes)
    except KeyboardInterrupt:
        print("Stopped: nothing was written.", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
