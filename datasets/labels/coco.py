"""COCO as its authors ship it: COCO-Stuff's masks, and boxes from any instances file.

    coco_stuff("data/coco", "val", classes=27)
    coco_boxes("data/coco/annotations/instances_val2017.json", "data/coco/val2017")
    coco20k("data/coco", "coco_20k_filenames.txt")

Sources: Lin et al., "Microsoft COCO: Common Objects in Context" (arXiv 1405.0312); Caesar et al., "COCO-Stuff: Thing
and Stuff Classes in Context" (arXiv 1612.03716), whose release has the labels (labels.txt) and their hierarchy (figure
2 of the paper, CocoStuffClasses.m).
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from skipless.datasets.labels.boxes import BoxSet
from skipless.datasets.labels.instances import read_instances
from skipless.datasets.labels.masks import VOID, SegmentationSet, distinct_colors, paired_names, read_names

# Things by supercategory, in the order of their ids (1..91); "-" is one of the eleven ids that COCO has given up.
_THINGS = {
    "person": "person",
    "vehicle": "bicycle, car, motorcycle, airplane, bus, train, truck, boat",
    "outdoor": "traffic light, fire hydrant, -, stop sign, parking meter, bench",
    "animal": "bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe",
    "accessory": "-, backpack, umbrella, -, -, handbag, tie, suitcase",
    "sports": (
        "frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, "
        "tennis racket"
    ),
    "kitchen": "bottle, -, wine glass, cup, fork, knife, spoon, bowl",
    "food": "banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake",
    "furniture": "chair, couch, potted plant, bed, -, dining table, -, -, toilet, -",
    "electronic": "tv, laptop, mouse, remote, keyboard, cell phone",
    "appliance": "microwave, oven, toaster, sink, refrigerator, -",
    "indoor": "book, clock, vase, scissors, teddy bear, hair drier, toothbrush, -",
}
# Stuff by supercategory. Ids (92..182) go through all of it in alphabetical order.
_STUFF = {
    "ceiling": "ceiling-other, ceiling-tile",
    "floor": "carpet, floor-marble, floor-other, floor-stone, floor-tile, floor-wood",
    "food-stuff": "food-other, fruit, salad, vegetable",
    "furniture-stuff": (
        "cabinet, counter, cupboard, desk-stuff, door-stuff, furniture-other, light, mirror-stuff, shelf, stairs, table"
    ),
    "raw-material": "cardboard, metal, paper, plastic",
    "textile": "banner, blanket, cloth, clothes, curtain, mat, napkin, pillow, rug, textile-other, towel",
    "wall": "wall-brick, wall-concrete, wall-other, wall-panel, wall-stone, wall-tile, wall-wood",
    "window": "window-blind, window-other",
    "building": "bridge, building-other, house, roof, skyscraper, tent",
    "ground": ("dirt, gravel, ground-other, mud, pavement, platform, playingfield, railroad, road, sand, snow"),
    "plant": "branch, bush, flower, grass, leaves, moss, plant-other, straw, tree",
    "sky": "clouds, sky-other",
    "solid": "hill, mountain, rock, solid-other, stone, wood",
    "structural": "cage, fence, net, railing, structural-other",
    "water": "fog, river, sea, water-other, waterdrops",
}
COARSE = (
    *("electronic", "appliance", "food", "furniture", "indoor", "kitchen"),  # things indoors
    *("accessory", "animal", "outdoor", "person", "sports", "vehicle"),  # things outdoors
    *_STUFF,  # indoors, then outdoors
)
"""The 27 supercategories of things and stuff, in the order of their labels."""


def _members() -> list[tuple[str, str]]:
    """Name and supercategory of ids 1..182; the name is "-" for ids that are not in use."""
    things = [(name, parent) for parent, names in _THINGS.items() for name in names.split(", ")]
    stuff = [(name, parent) for parent, names in _STUFF.items() for name in names.split(", ")]
    return things + sorted(stuff)


CONVENTION = "category id - 1, 255 unlabeled"
FINE = tuple(name for name, _ in _members() if name != "-")
"""The 80 thing and 91 stuff classes, in the order of their ids."""


def coco_stuff(root: str | Path, split: Literal["train", "val"], classes: Literal[27, 171]) -> SegmentationSet:
    """COCO-Stuff on the images of 2017: train (118,287) or val (5,000); unlabeled pixels are void.

    With 171 classes these are `FINE`, as in mmsegmentation. With 27 they are `COARSE`, in the order that unsupervised
    segmentation has used since IIC (Ji et al., arXiv 1807.06653; also PiCIE and STEGO), so that confusion matrices can
    be laid side by side; mIoU does not depend on it. (Those works score a curated part of val, not all of it.)

    The release gives the pixel maps as PNG with category id - 1, 255 where unlabeled; stuffthingmaps_trainval2017.zip
    unpacks to train2017/ and val2017/. Both splits are looked for in these places, the first that exists:
        images: images/SPLIT2017/, SPLIT2017/
        maps: annotations/SPLIT2017/ (the authors' instructions), stuffthingmaps/SPLIT2017/,
            annotations/stuffthingmaps/SPLIT2017/, stuffthingmaps_trainval2017/SPLIT2017/,
            annotations/stuffthingmaps_trainval2017/SPLIT2017/
    Every image needs its map and every map its image. Files NAME_labelTrainIds.png, which mmsegmentation writes beside
    the maps, are left out. The authors give colors to stuff only, so colors are `distinct_colors`.

    Raises FileNotFoundError for a missing folder, image or map, ValueError for another split, and where the values of
    the maps are plainly those of another convention.
    """
    if split not in ("train", "val"):
        raise ValueError(f"COCO-Stuff has the splits train and val, not {split}")
    root, folder = Path(root).expanduser(), f"{split}2017"
    images = _first_folder(root, "images", [f"images/{folder}", folder])
    zipped = "stuffthingmaps_trainval2017"
    places = ("annotations", "stuffthingmaps", "annotations/stuffthingmaps", zipped, f"annotations/{zipped}")
    masks = _first_folder(root, "COCO-Stuff maps", [f"{place}/{folder}" for place in places])
    names = tuple(name for name in paired_names(images, masks) if not name.endswith("_labelTrainIds"))

    class_names = FINE if classes == 171 else COARSE
    labels = np.full(256, -1, np.int16)
    labels[VOID] = VOID
    for value, (name, parent) in enumerate(_members()):
        if name != "-":
            labels[value] = class_names.index(name if classes == 171 else parent)
    found = SegmentationSet(
        f"coco-stuff-{classes}",
        split,
        names,
        tuple(images / f"{name}.jpg" for name in names),
        tuple(masks / f"{name}.png" for name in names),
        class_names,
        distinct_colors(classes),
        labels,
        CONVENTION,
    )
    seen = found.values_seen()
    # By the other convention there is no 255, and 11, 25, ... are in use: the release has given up ids 12, 26, ...
    shifted = [value for value in sorted(seen) if labels[value] < 0]
    if VOID not in seen and (shifted or (0 in seen and len(found) >= 16)):
        raise ValueError(
            f"{masks}: the maps hold {shifted[0] if shifted else 0} and no 255, as where the values are the ids "
            f"themselves and 0 is unlabeled; COCO-Stuff's release has {CONVENTION}: subtract 1, so that 0 becomes 255"
        )
    return found


def coco_boxes(annotations: str | Path, images: str | Path, name: str = "coco") -> BoxSet:
    """Every image of an instances file with its boxes, in the order of ids. `images` is the folder of the image files.

    Crowds (`iscrowd`) are left out; an image that has nothing else stays, without boxes. COCO's boxes (x, y, width,
    height, in pixels from 0) become x, y, x + width, y + height, unrounded. `name` is the set's, `split`
    the file's without "instances_".

    Where the sizes that the file states are those of photographs as their EXIF orientation turns them, the set is
    `upright`.

    Raises FileNotFoundError for a missing file, folder or image, ValueError for a damaged file (see `read_instances`)
    and for a picture of another size than the file states.
    """
    annotations = Path(annotations).expanduser()
    coco = read_instances(annotations)
    split = annotations.stem.removeprefix("instances_")
    return _select(coco, annotations, name, split, sorted(coco.imgs), Path(images).expanduser())


def coco20k(root: str | Path, names_file: str | Path) -> BoxSet:
    """COCO20k, on which LOST and TokenCut report: 19,817 images of train2014, in the order of the file that names them.

    `names_file` is a list of image files or ids, one a line (train2014/COCO_train2014_000000560992.jpg in LOST's and
    TokenCut's releases, datasets/coco_20k_filenames.txt; without folder, or 560992, is as good). `root` holds
    annotations/instances_train2014.json, and images in train2014/ or images/train2014/. Boxes are as in `coco_boxes`,
    but rounded to whole pixels as those releases do (ties to even).

    Raises FileNotFoundError for a missing file, folder or image, ValueError for a damaged file and for a name that the
    annotations do not know.
    """
    root, names_file = Path(root).expanduser(), Path(names_file).expanduser()
    names = read_names(names_file)
    images = _first_folder(root, "images", ["train2014", "images/train2014"])
    annotations = root / "annotations" / "instances_train2014.json"
    coco = read_instances(annotations)
    ids: list[int] = []
    for name in names:
        file_name = name.rpartition("/")[2]
        number = file_name.rpartition(".")[0].rpartition("_")[2] or file_name
        known = coco.imgs.get(int(number)) if number.isdecimal() else None
        if known is None or file_name not in (number, known["file_name"]):
            raise ValueError(f"{names_file}: {name} is no image of {annotations}; check that both are of train2014")
        ids.append(known["id"])
    if len(set(ids)) < len(ids):
        raise ValueError(f"{names_file}: names {len(ids) - len(set(ids))} images more than once; each must occur once")
    return _select(coco, annotations, "coco20k", "train2014", ids, images, rounded=True)


def _first_folder(root: Path, what: str, places: list[str]) -> Path:
    for place in places:
        if (root / place).is_dir():
            return root / place
    raise FileNotFoundError(f"{root}: no folder of {what} there (looked for {', '.join(places)})")


def _select(
    coco: Any, path: Path, name: str, split: str, ids: list[int], images: Path, rounded: bool = False
) -> BoxSet:
    boxes, categories = [], []
    files = [coco.imgs[number]["file_name"] for number in ids]
    for number in ids:
        objects: list[dict[str, Any]] = [item for item in coco.imgToAnns[number] if not item.get("iscrowd", 0)]
        sides = np.array([item["bbox"] for item in objects], np.float64).reshape(-1, 4)
        corners = np.concatenate([sides[:, :2], sides[:, :2] + sides[:, 2:]], axis=1)
        boxes.append(np.rint(corners) if rounded else corners)
        categories.append(np.array([item["category_id"] for item in objects], np.int64))
    flags = tuple(np.zeros(len(objects), bool) for objects in boxes)
    found = BoxSet(
        name,
        split,
        tuple(Path(file).stem for file in files),
        tuple(images / file for file in files),
        tuple(ids),
        tuple(boxes),
        tuple(categories),
        flags,
        flags,
    )
    return replace(found, upright=_annotated_upright(found, [coco.imgs[number] for number in ids], path))


def _annotated_upright(found: BoxSet, declared: list[dict[str, Any]], path: Path) -> bool:
    """Whether the annotations are of the photographs as their EXIF orientation turns them, by the sizes they state.

    Raises ValueError where a picture has another size than its annotations, turned or not.
    """
    as_stored = turned = None  # examples of photographs that have an orientation
    for file, about in zip(found.images, declared, strict=True):
        size = (about["width"], about["height"])
        try:
            with Image.open(file) as header:
                actual, sideways = header.size, header.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        except Exception:  # whatever is wrong with it, reading it will say so
            continue
        if size == actual and size == actual[::-1]:
            continue
        if size == actual:
            as_stored = file if sideways else as_stored
        elif size == actual[::-1] and sideways:
            turned = file
        else:
            raise ValueError(
                f"{file} has {actual[0]} x {actual[1]} pixels, and {path} says {size[0]} x {size[1]}: the picture was "
                "resized or turned, or width and height are swapped in the file; no box would fit"
            )
    if as_stored and turned:
        raise ValueError(f"{path} describes {as_stored.name} as it is stored, and {turned.name} as EXIF turns it")
    return turned is not None
