"""ADE20K with 150 classes, as the scene parsing benchmark ships it (ADEChallengeData2016.zip).

    ADEChallengeData2016/images/{training,validation}/NAME.jpg
                         annotations/{training,validation}/NAME.png     0 other, 1..150 classes
                         objectInfo150.txt                              the classes; not needed

Source: Zhou et al., "Scene Parsing through ADE20K Dataset", CVPR 2017; sceneparsing.csail.mit.edu.
"""

from pathlib import Path
from typing import Literal

import numpy as np

from skipless.datasets.labels.masks import SegmentationSet, label_table, paired_names

_NAMES = """
    wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door,
    table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, armchair,
    seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, chest of drawers,
    counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table,
    pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench,
    countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel,
    light, truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane, dirt track, apparel,
    pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt,
    canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball,
    food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood,
    sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator,
    glass, clock, flag
"""
CLASSES = tuple(" ".join(name.split()) for name in _NAMES.split(","))
"""The 150 classes in label order, each by the first of its names."""

# The benchmark's color table (color150.mat), one RGB triple a class. Road and skyscraper share theirs.
_COLORS = bytes.fromhex(
    """
    787878 b47878 06e6e6 503232 04c803 787850 8c8c8c cc05ff e6e6e6 04fa07 e005ff ebff07 96053d 787846 08ff33
    ff0652 8fff8c ccff04 ff3307 cc4603 0066c8 3de6fa ff0633 0b66ff ff0747 ff09e0 0907e6 dcdcdc ff095c 7009ff
    08ffd6 07ffe0 ffb806 0aff47 ff290a 07ffff e0ff08 6608ff ff3d06 ffc207 ff7a08 00ff14 ff0829 ff0599 0633ff
    eb0cff a09614 00a3ff 8c8c8c fa0a0f 14ff00 1fff00 ff1f00 ffe000 99ff00 0000ff ff4700 00ebff 00adff 1f00ff
    0bc8c8 ff5200 00fff5 003dff 00ff70 00ff85 ff0000 ffa300 ff6600 c2ff00 008fff 33ff00 0052ff 00ff29 00ffad
    0a00ff adff00 00ff99 ff5c00 ff00ff ff00f5 ff0066 ffad00 ff0014 ffb8b8 001fff 00ff3d 0047ff ff00cc 00ffc2
    00ff52 000aff 0070ff 3300ff 00c2ff 007aff 00ffa3 ff9900 00ff0a ff7000 8fff00 5200ff a3ff00 ffeb00 08b8aa
    8500ff 00ff5c b800ff ff001f 00b8ff 00d6ff ff0070 5cff00 00e0ff 70e0ff 46b8a0 a300ff 9900ff 47ff00 ff00a3
    ffcc00 ff008f 00ffeb 85ff00 ff00eb f500ff ff007a fff500 0abed4 d6ff00 00ccff 1400ff ffff00 0099ff 0029ff
    00ffcc 2900ff 29ff00 ad00ff 00f5ff 4700ff 7a00ff 00ffb8 005cff b8ff00 0085ff ffd600 19c2c2 66ff00 5c00ff
    """
)


def ade20k(root: str | Path, split: Literal["train", "val"]) -> SegmentationSet:
    """ADE20K's training (20,210) or validation (2,000) images. Value 0 ('other') is void, 1..150 are labels 0..149.

    `root` is ADEChallengeData2016 or the folder that holds it. Every image needs its annotation, and the reverse.
    Class names are `CLASSES`, or the first names in objectInfo150.txt where that lies in the root.

    Raises FileNotFoundError for a missing folder, image or annotation, ValueError for another split and a damaged
    objectInfo150.txt.
    """
    if split not in ("train", "val"):
        raise ValueError(f"ADE20K has the splits train (training) and val (validation), not {split}")
    root = Path(root).expanduser()
    if (root / "ADEChallengeData2016").is_dir():
        root = root / "ADEChallengeData2016"
    part = {"train": "training", "val": "validation"}[split]
    images, masks = root / "images" / part, root / "annotations" / part
    for folder in (images, masks):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; give the root of ADEChallengeData2016")
    names = paired_names(images, masks)
    return SegmentationSet(
        "ade20k",
        split,
        names,
        tuple(images / f"{name}.jpg" for name in names),
        tuple(masks / f"{name}.png" for name in names),
        _class_names(root / "objectInfo150.txt"),
        np.frombuffer(_COLORS, np.uint8).reshape(-1, 3).copy(),
        label_table(1, len(CLASSES), void=[0]),
        "0 other, 1 to 150 classes",
    )


def _class_names(path: Path) -> tuple[str, ...]:
    """First names in objectInfo150.txt: a header and a line a class, fields divided by tabs, first the label and last
    the names, divided by commas. `CLASSES` where there is no such file."""
    if not path.exists():
        return CLASSES
    try:
        rows = [line.split("\t") for line in path.read_text(encoding="utf-8-sig").splitlines()[1:] if line.strip()]
        if [int(row[0]) for row in rows] != list(range(1, len(CLASSES) + 1)):
            raise ValueError(f"does not list the labels 1 to {len(CLASSES)} in order")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); repair or remove it") from error
    return tuple(row[-1].split(",")[0].strip() for row in rows)
