"""Segmentation data sets: the layouts that are taken, the labels that come out, and what is said about damaged ones."""

import multiprocessing
import os
import pickle
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from skipless.datasets.images import UnreadableImage
from skipless.datasets.labels.ade20k import ade20k
from skipless.datasets.labels.cityscapes import cityscapes
from skipless.datasets.labels.coco import coco_stuff
from skipless.datasets.labels.context import fewer_labels, pascal_context
from skipless.datasets.labels.masks import (
    VOID,
    SegmentationSet,
    distinct_colors,
    label_table,
    read_names,
    read_stored,
    read_values,
)
from skipless.datasets.labels.voc import scenes_segmentation, voc_palette, voc_segmentation
from skipless.datasets.synthetic.dataset import write_scenes

DATA = os.environ.get("SKIPLESS_TEST_DATA")
HEIGHT, WIDTH = 4, 6


def save_image(path: Path, height: int = HEIGHT, width: int = WIDTH, orientation: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tags = Image.Exif()
    if orientation:
        tags[0x0112] = orientation
    Image.fromarray(np.full((height, width, 3), 100, np.uint8)).save(path, exif=tags)


def save_mask(path: Path, values: np.ndarray | list[int], palette: bool = True) -> None:
    """A label file of HEIGHT x WIDTH; a list of values fills it row by row and is repeated as needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(np.resize(np.array(values, np.uint8), (HEIGHT, WIDTH)))
    if palette:
        picture.putpalette(voc_palette().ravel().tolist())
    picture.save(path)


def save_list(path: Path, names: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def one_image(tmp_path: Path, labels: np.ndarray | None = None) -> SegmentationSet:
    """A set of one image, tmp_path/a.jpg, and one mask, tmp_path/a.png, of two classes."""
    labels = label_table(0, 2, void=[VOID]) if labels is None else labels
    colors = distinct_colors(2)
    return SegmentationSet(
        "toy", "all", ("a",), (tmp_path / "a.jpg",), (tmp_path / "a.png",), ("x", "y"), colors, labels
    )


VALUES = np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH) * 10


@pytest.mark.parametrize(
    ("palette", "options"),
    [
        (False, {}),
        (True, {}),
        (True, {"transparency": 10}),
        (True, {"bits": 1}),
        (True, {"bits": 2}),
        (True, {"bits": 4}),
    ],
)
def test_values_are_read_as_stored(tmp_path: Path, palette: bool, options: dict[str, int]) -> None:
    """Indices, not the palette's colors, whatever their bits; a transparent entry changes nothing."""
    bits = options.get("bits", 8)
    values = VALUES & ((1 << bits) - 1)
    picture = Image.fromarray(values)
    if palette:
        picture.putpalette(voc_palette().ravel().tolist())
    picture.save(tmp_path / "a.png", **options)
    assert (tmp_path / "a.png").read_bytes()[24] == bits
    assert np.array_equal(read_values(tmp_path / "a.png"), values)


@pytest.mark.parametrize(
    ("picture", "kind"),
    [
        (np.zeros((4, 6), np.uint16), "16-bit gray"),
        (np.zeros((4, 6, 3), np.uint8), "8-bit RGB"),
        (np.zeros((4, 6, 4), np.uint8), "8-bit RGBA"),
        (np.zeros((4, 6), bool), "1-bit gray"),
    ],
)
def test_other_kinds_of_png_are_refused(tmp_path: Path, picture: np.ndarray, kind: str) -> None:
    Image.fromarray(picture).save(tmp_path / "a.png")
    with pytest.raises(
        UnreadableImage, match=rf"a\.png: masks must be 8-bit gray or palette PNG .* this one is {kind}$"
    ):
        read_values(tmp_path / "a.png")


def test_what_is_no_png_is_refused(tmp_path: Path) -> None:
    save_image(tmp_path / "a.jpg")
    (tmp_path / "jpeg.png").write_bytes((tmp_path / "a.jpg").read_bytes())
    (tmp_path / "empty.png").write_bytes(b"")
    for name, reason in (("jpeg", "not that of one"), ("empty", "the file is empty"), ("gone", "No such file")):
        with pytest.raises(UnreadableImage, match=rf"{name}\.png: .*{reason}"):
            read_values(tmp_path / f"{name}.png")


@pytest.mark.parametrize("palette", [True, False])
def test_truncated_masks_are_unreadable(tmp_path: Path, palette: bool) -> None:
    noise = np.random.default_rng(0).integers(0, 21, (50, 60), np.uint8)
    picture = Image.fromarray(noise)
    if palette:
        picture.putpalette(voc_palette().ravel().tolist())
    picture.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    for length in range(9, len(data) - 20, 37):
        (tmp_path / "a.png").write_bytes(data[:length])
        with pytest.raises(UnreadableImage, match=r"a\.png: ") as caught:
            read_values(tmp_path / "a.png")
        assert "\n" not in str(caught.value)


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6))
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_gives_values_or_one_of_our_errors(tmp_path: Path, changes: list[tuple[float, int]]) -> None:
    save_mask(tmp_path / "a.png", VALUES)
    data = bytearray((tmp_path / "a.png").read_bytes())
    for place, value in changes:
        data[int(place * (len(data) - 1))] = value
    (tmp_path / "a.png").write_bytes(data)
    try:
        values = read_values(tmp_path / "a.png")
    except UnreadableImage:
        return
    assert values.dtype == np.uint8
    assert values.ndim == 2


def test_labels_follow_the_table(tmp_path: Path) -> None:
    assert label_table(1, 150, void=[0]).tolist() == [255, *range(150), *[-1] * 105]
    save_image(tmp_path / "a.jpg")
    save_mask(tmp_path / "a.png", [5, 6, 200, 0, 5, 6])
    labels = np.full(256, -1, np.int16)
    labels[[5, 6, 200, 0]] = [1, 0, VOID, VOID]
    image, mask = one_image(tmp_path, labels).read(0)
    assert mask.dtype == np.uint8
    assert mask.tolist() == [[1, 0, 255, 255, 1, 0]] * 4
    assert image.shape == (HEIGHT, WIDTH, 3)


def test_a_value_that_must_not_occur_is_reported_with_its_pixels(tmp_path: Path) -> None:
    save_image(tmp_path / "a.jpg")
    save_mask(tmp_path / "a.png", [0, 1, 255, 7, 8, 30])
    with pytest.raises(UnreadableImage) as caught:
        one_image(tmp_path).read(0)
    for part in (f"{tmp_path / 'a.png'}: 12 of 24 pixels hold 7-8, 30", "masks hold 0-1, 255"):
        assert part in str(caught.value)


@pytest.mark.parametrize("size", [(WIDTH, HEIGHT), (HEIGHT, WIDTH + 1)])
def test_image_and_mask_of_different_size(tmp_path: Path, size: tuple[int, int]) -> None:
    save_image(tmp_path / "a.jpg", *size)
    save_mask(tmp_path / "a.png", [0])
    with pytest.raises(UnreadableImage, match=rf"a\.png: the mask has 6 x 4 pixels .*a\.jpg {size[1]} x {size[0]};"):
        one_image(tmp_path).read(0)


@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 5, 6, 8])
def test_exif_orientation_is_left_aside(tmp_path: Path, orientation: int, extension: str) -> None:
    path = tmp_path / f"a.{extension}"
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :8] = 255  # white in the upper left corner only
    tags = Image.Exif()
    tags[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=tags, quality=95)
    image = read_stored(path)
    assert image.shape == pixels.shape
    assert np.abs(image.astype(int) - pixels).mean() < 3


def test_images_without_orientation_are_read_as_ever(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (16, 32, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "a.jpg"), noise)
    assert np.array_equal(read_stored(tmp_path / "a.jpg"), cv2.imread(str(tmp_path / "a.jpg"))[..., ::-1])
    with pytest.raises(UnreadableImage, match=r"gone\.jpg: No such file"):
        read_stored(tmp_path / "gone.jpg")


def test_missing_files_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    names = ("a", "b", "c")
    images = tuple(tmp_path / f"{name}.jpg" for name in names)
    masks = tuple(tmp_path / "masks" / f"{name}.png" for name in names)

    def opened() -> SegmentationSet:
        return SegmentationSet("toy", "all", names, images, masks, ("x", "y"), distinct_colors(2), label_table(0, 2))

    for path in images:
        save_image(path)
    with pytest.raises(FileNotFoundError, match=r"masks.a\.png: no such mask \(3 of 3 mask files are missing\)"):
        opened()
    for path in (masks[0], masks[2]):
        save_mask(path, [0])
    with pytest.raises(FileNotFoundError, match=r"b\.png: no such mask \(1 of 3"):
        opened()
    save_mask(masks[1], [1])
    assert len(opened()) == 3
    images[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.jpg: no such image \(1 of 3"):
        opened()


def test_a_set_goes_into_worker_processes(tmp_path: Path) -> None:
    save_image(tmp_path / "a.jpg")
    save_mask(tmp_path / "a.png", [0, 1])
    found = one_image(tmp_path)
    copy = pickle.loads(pickle.dumps(found))
    assert copy.images == found.images
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        mask = pool.submit(found.read, 0).result()[1]
    assert mask.tolist() == [[0, 1, 0, 1, 0, 1]] * HEIGHT


def test_lists_of_names(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_bytes(b"\xef\xbb\xbf2007_000032 \r\n\r\n2007_000039\n\n")
    assert read_names(path) == ("2007_000032", "2007_000039")
    for text, reason in (
        ("\n \n", "the list is empty"),
        ("a\nb\n\na\n", "line 4: a is named twice, first in line 1"),
        ("a -1\n", "line 1: holds 2 words"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"train\.txt.*{reason}"):
            read_names(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"train\.txt: cannot be read as a list"):
        read_names(path)
    with pytest.raises(FileNotFoundError, match=r"gone\.txt: no such list"):
        read_names(tmp_path / "gone.txt")


@pytest.mark.parametrize("count", [27, 171])
def test_colors_are_distinct_and_not_those_of_voc(count: int) -> None:
    colors = distinct_colors(count).astype(int)
    assert colors.shape == (count, 3)
    apart = np.abs(colors[:, None] - colors).max(axis=2)
    assert apart[~np.eye(count, dtype=bool)].min() >= 51
    assert not {tuple(color) for color in colors.tolist()} & {tuple(color) for color in voc_palette().tolist()}


def fake_voc(folder: Path) -> None:
    for name in ("a", "b", "c"):
        save_image(folder / "JPEGImages" / f"{name}.jpg")
    save_mask(folder / "SegmentationClass" / "a.png", [0, 15, 255])
    save_mask(folder / "SegmentationClass" / "b.png", [20])
    save_list(folder / "ImageSets" / "Segmentation" / "train.txt", ["a"])
    save_list(folder / "ImageSets" / "Segmentation" / "val.txt", ["b"])


def test_voc_from_any_of_its_folders(tmp_path: Path) -> None:
    fake_voc(tmp_path / "VOCdevkit" / "VOC2012")
    for root in (tmp_path, tmp_path / "VOCdevkit", tmp_path / "VOCdevkit" / "VOC2012"):
        train = voc_segmentation(root, "train")
        assert (train.name, train.split, train.names) == ("voc12", "train", ("a",))
        assert train.read(0)[1].tolist() == [[0, 15, 255, 0, 15, 255]] * HEIGHT
    assert train.classes[0] == "background"
    assert (train.classes[1], train.classes[15], train.classes[20]) == ("aeroplane", "person", "tvmonitor")
    # As the devkit shows them.
    assert train.colors[[0, 1, 2, 15]].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [192, 128, 128]]
    assert train.colors[20].tolist() == [0, 64, 128]


def test_what_voc_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        voc_segmentation(tmp_path / "nowhere", "train")
    with pytest.raises(FileNotFoundError, match="holds no PASCAL VOC 2012"):
        voc_segmentation(tmp_path, "train")
    fake_voc(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"test\.txt: no such split; lists that are there: train, val"):
        voc_segmentation(tmp_path, "test")
    fake_voc(tmp_path / "VOC2007")
    with pytest.raises(ValueError, match="is VOC2007, and VOC2012 was asked for"):
        voc_segmentation(tmp_path / "VOC2007", "train")


def test_trainaug_from_its_own_list(tmp_path: Path) -> None:
    fake_voc(tmp_path)
    for name, value in (("a", 1), ("c", 2)):
        save_mask(tmp_path / "SegmentationClassAug" / f"{name}.png", [value], palette=False)
    save_list(tmp_path / "ImageSets" / "Segmentation" / "trainaug.txt", ["c", "a"])
    found = voc_segmentation(tmp_path, "trainaug")
    assert found.names == ("c", "a")
    assert found.read_mask(0)[0, 0] == 2
    # VOC's own mask, which has void contours, though SBD has one, too.
    assert found.read_mask(1)[0, :3].tolist() == [0, 15, 255]


def test_trainaug_from_train_and_aug(tmp_path: Path) -> None:
    fake_voc(tmp_path)
    with pytest.raises(FileNotFoundError, match="trainaug needs SBD's masks"):
        voc_segmentation(tmp_path, "trainaug")
    save_mask(tmp_path / "SegmentationClassAug" / "c.png", [2], palette=False)
    with pytest.raises(FileNotFoundError, match=r"trainaug\.txt, or train\.txt and aug\.txt"):
        voc_segmentation(tmp_path, "trainaug")
    save_list(tmp_path / "ImageSets" / "Segmentation" / "aug.txt", ["c"])
    found = voc_segmentation(tmp_path, "trainaug")
    assert found.names == ("a", "c")
    assert [found.read_mask(index)[0, 1] for index in range(2)] == [15, 2]
    save_list(tmp_path / "ImageSets" / "Segmentation" / "aug.txt", ["c", "d"])
    save_image(tmp_path / "JPEGImages" / "d.jpg")
    with pytest.raises(FileNotFoundError, match=r"SegmentationClassAug.d\.png: no such mask \(1 of 3"):
        voc_segmentation(tmp_path, "trainaug")


def test_scenes_have_their_own_classes(tmp_path: Path) -> None:
    root = tmp_path / "scenes"
    write_scenes(root, train=4, val=3, size=32, workers=1)
    names = (root / "VOCdevkit" / "VOC2012" / "classes.txt").read_text().split()
    for place in (root, root / "VOCdevkit"):
        found = scenes_segmentation(place, "trainval")
    assert found.classes == ("background", *names)
    assert len(found.colors) == len(found.classes)
    assert len(found) == 7
    for index in range(7):
        image, mask = found.read(index)
        assert image.shape == (32, 32, 3)
        with Image.open(found.masks[index]) as stored:
            assert np.array_equal(mask, np.asarray(stored))
    save = np.full((32, 32), VOID, np.uint8)
    Image.fromarray(save).save(found.masks[0])
    with pytest.raises(UnreadableImage, match="1024 of 1024 pixels hold 255"):
        found.read(0)


def test_scenes_and_voc_are_not_mixed_up(tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes", train=1, val=1, size=32, workers=1)
    with pytest.raises(ValueError, match=r"classes\.txt: names other classes than VOC's .* as the data set 'scenes'"):
        voc_segmentation(tmp_path / "scenes", "train")
    fake_voc(tmp_path / "voc")
    with pytest.raises(FileNotFoundError, match=r"classes\.txt: not found"):
        scenes_segmentation(tmp_path / "voc", "train")


# Coarse class of category ids 1..182, "a" the first of 27, "A" the last: the mapping that IIC released and that PiCIE
# and STEGO use.
COARSE = (
    "jlllllllliiiiiihhhhhhhhhhggggggggkkkkkkkkkkffffffffccccccccccddddddddddaaaaaabbbbbbeeeeeeeerrwuuwpzqnmmrrxpprpvpzn"
    "nnnnwAoopwvvyuwprqpwyvrzqvrwqvvzvAvyurovApxuvypywzpurrwosssssssAAtty"
)
# Ids of categories that COCO has given up.
UNUSED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}


def fake_coco_stuff(images: Path, maps: Path, values: list[int]) -> None:
    save_image(images / "000000000139.jpg")
    save_mask(maps / "000000000139.png", values, palette=False)


@pytest.mark.parametrize("images", ["images", "."])
@pytest.mark.parametrize(
    "maps",
    [
        "annotations",
        "stuffthingmaps",
        "annotations/stuffthingmaps",
        "stuffthingmaps_trainval2017",
        "annotations/stuffthingmaps_trainval2017",
    ],
)
def test_coco_stuff_layouts(tmp_path: Path, images: str, maps: str) -> None:
    (tmp_path / "annotations").mkdir()  # the folder of the instances files, beside maps elsewhere
    fake_coco_stuff(tmp_path / images / "val2017", tmp_path / maps / "val2017", [0, 255])
    found = coco_stuff(tmp_path, "val", 171)
    assert (found.name, found.split, found.names) == ("coco-stuff-171", "val", ("000000000139",))
    assert found.read(0)[1][0, :2].tolist() == [0, VOID]
    with pytest.raises(
        FileNotFoundError, match=r"no folder of images there \(looked for images/train2017, train2017\)"
    ):
        coco_stuff(tmp_path, "train", 171)


def test_the_27_coarse_classes(tmp_path: Path) -> None:
    fake_coco_stuff(tmp_path / "val2017", tmp_path / "stuffthingmaps" / "val2017", [0])
    found = coco_stuff(tmp_path, "val", 27)
    assert found.name == "coco-stuff-27"
    letters = "abcdefghijklmnopqrstuvwxyzA"
    expected = [-1 if id in UNUSED else letters.index(COARSE[id - 1]) for id in range(1, 183)]
    assert found.labels.tolist() == expected + [-1] * 73 + [VOID]
    things, stuff = found.classes[:12], found.classes[12:]
    superclasses = "person vehicle outdoor animal accessory sports kitchen food furniture electronic appliance indoor"
    assert sorted(things) == sorted(superclasses.split())
    assert things.index("person") == 9
    assert things.index("vehicle") == 11
    assert (stuff[0], stuff[-1], len(stuff)) == ("ceiling", "water", 15)
    assert found.colors.shape == (27, 3)


def test_the_171_classes(tmp_path: Path) -> None:
    fake_coco_stuff(tmp_path / "val2017", tmp_path / "stuffthingmaps" / "val2017", [0])
    found = coco_stuff(tmp_path, "val", 171)
    used = [id for id in range(1, 183) if id not in UNUSED]
    expected = np.full(256, -1)
    expected[np.array(used) - 1] = np.arange(171)
    expected[255] = VOID
    assert found.labels.tolist() == expected.tolist()
    # Some ids of labels.txt, from both ends and from both sides of each gap.
    things = {
        1: "person",
        11: "fire hydrant",
        13: "stop sign",
        25: "giraffe",
        27: "backpack",
        65: "bed",
        90: "toothbrush",
    }
    stuff = {92: "banner", 110: "desk-stuff", 120: "fog", 133: "mirror-stuff", 169: "tree", 182: "wood"}
    for id, name in (things | stuff).items():
        assert found.classes[found.labels[id - 1]] == name
    assert list(found.classes[80:]) == sorted(found.classes[80:])


def test_coco_stuff_in_part_is_found_out(tmp_path: Path) -> None:
    maps = tmp_path / "annotations" / "val2017"
    fake_coco_stuff(tmp_path / "val2017", maps, [0])
    save_mask(maps / "000000000139_labelTrainIds.png", [0])
    assert len(coco_stuff(tmp_path, "val", 27)) == 1
    save_image(tmp_path / "val2017" / "000000000285.jpg")
    with pytest.raises(FileNotFoundError, match=r"000000000285\.png: no such mask \(1 of 2"):
        coco_stuff(tmp_path, "val", 27)
    (tmp_path / "val2017" / "000000000285.jpg").unlink()
    save_mask(maps / "000000000285.png", [0])
    with pytest.raises(FileNotFoundError, match=r"000000000285\.jpg: no such image \(1 of 2"):
        coco_stuff(tmp_path, "val", 27)


def fake_ade(root: Path, values: list[int]) -> None:
    for part, name in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        save_image(root / "images" / part / f"{name}.jpg", orientation=6)
        save_mask(root / "annotations" / part / f"{name}.png", values, palette=False)


def test_ade20k(tmp_path: Path) -> None:
    fake_ade(tmp_path / "ADEChallengeData2016", [0, 1, 150])
    for root in (tmp_path, tmp_path / "ADEChallengeData2016"):
        val = ade20k(root, "val")
        assert (val.name, val.split, val.names) == ("ade20k", "val", ("ADE_val_00000001",))
        assert ade20k(root, "train").names == ("ADE_train_00000001",)
        assert val.read(0)[1].tolist() == [[VOID, 0, 149, VOID, 0, 149]] * HEIGHT
    assert len(val.classes) == len(set(val.classes)) == 150
    # Lines of objectInfo150.txt.
    published = {
        1: "wall",
        8: "bed",
        45: "chest of drawers",
        59: "screen door",
        100: "buffet",
        131: "screen",
        150: "flag",
    }
    assert {label: val.classes[label - 1] for label in published} == published
    assert val.colors.shape == (150, 3)
    assert val.colors[[0, 1, 2, 12]].tolist() == [[120] * 3, [180, 120, 120], [6, 230, 230], [150, 5, 61]]
    assert val.colors[149].tolist() == [92, 0, 255]
    # The published table has one color twice.
    counts = Counter(tuple(color) for color in val.colors.tolist())
    assert {color: count for color, count in counts.items() if count > 1} == {(140, 140, 140): 2}


def test_ade20k_takes_names_from_object_info(tmp_path: Path) -> None:
    fake_ade(tmp_path, [0])
    lines = ["Idx\tRatio\tTrain\tVal\tStuff\tName"]
    lines += [f"{label} \t0.1\t2\t1\t1\tname{label}, other \r" for label in range(1, 151)]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(lines))
    assert ade20k(tmp_path, "val").classes == tuple(f"name{label}" for label in range(1, 151))
    (tmp_path / "objectInfo150.txt").write_text("\n".join(lines[:-1]))
    with pytest.raises(ValueError, match=r"objectInfo150\.txt: cannot be read \(does not list the labels 1 to 150"):
        ade20k(tmp_path, "val")


def fake_cityscapes(root: Path, values: list[int]) -> None:
    for split, city in (("train", "ulm"), ("val", "bonn")):
        name = f"{city}/{city}_000000_000019"
        save_image(root / f"leftImg8bit/{split}/{name}_leftImg8bit.png")
        save_mask(root / f"gtFine/{split}/{name}_gtFine_labelIds.png", values, palette=False)


def test_cityscapes(tmp_path: Path) -> None:
    """Values 7, 33 and 26 are road, bicycle and car; 0 to 6 are none of the classes that are evaluated."""
    fake_cityscapes(tmp_path, [7, 33, 26, 0, 6, 34])
    val = cityscapes(tmp_path, "val")
    assert (val.name, val.names, len(val.classes)) == ("cityscapes", ("bonn_000000_000019",), 19)
    with pytest.raises(UnreadableImage, match=r"pixels hold 34, where cityscapes masks hold 0-33, 255"):
        val.read_mask(0)
    fake_cityscapes(tmp_path, [7, 33, 26, 0, 6, 255])
    assert val.read(0)[1][0].tolist() == [0, 18, 13, VOID, VOID, VOID]
    assert [val.classes[label] for label in (0, 18, 13)] == ["road", "bicycle", "car"]
    assert val.colors[[0, 13]].tolist() == [[128, 64, 128], [0, 0, 142]]
    save_mask(tmp_path / "gtFine/val/ulm/ulm_1_gtFine_labelIds.png", [7])
    with pytest.raises(FileNotFoundError, match=r"ulm_1_leftImg8bit.png: no such image \(1 of 2"):
        cityscapes(tmp_path, "val")
    with pytest.raises(FileNotFoundError, match="give the folder of leftImg8bit and gtFine"):
        cityscapes(tmp_path / "gtFine", "val")


def test_pascal_context(tmp_path: Path) -> None:
    """Classes in the order of their names; the 2nd of the authors' labels is the aeroplane, the 458th wood."""
    root = tmp_path / "VOC2010"
    values = fewer_labels(np.array([0, 2, 458, 9, 3, 459]))
    assert values.tolist() == [0, 1, 59, 2, 0, 0]
    save_image(root / "JPEGImages/a.jpg")
    save_mask(root / "SegmentationClassContext/a.png", values)
    save_list(root / "ImageSets/SegmentationContext/val.txt", ["a"])
    for place in (tmp_path, root):
        val = pascal_context(place, "val")
        assert val.read(0)[1][0].tolist() == [VOID, 0, 58, 1, VOID, VOID]
    assert val.classes == tuple(sorted(val.classes))
    assert (len(val.classes), val.classes[0], val.classes[58]) == (59, "aeroplane", "wood")
    with pytest.raises(FileNotFoundError, match=r"train\.txt: no such list"):
        pascal_context(tmp_path, "train")


def test_what_ade20k_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"images.validation: no such folder"):
        ade20k(tmp_path, "val")
    fake_ade(tmp_path, [0])
    (tmp_path / "annotations" / "validation" / "ADE_val_00000001.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"ADE_val_00000001\.png: no such mask \(1 of 1"):
        ade20k(tmp_path, "val")


def test_values_beyond_the_classes_are_refused(tmp_path: Path) -> None:
    fake_voc(tmp_path / "voc")
    save_mask(tmp_path / "voc/SegmentationClass/a.png", [21])
    fake_coco_stuff(tmp_path / "val2017", tmp_path / "stuffthingmaps" / "val2017", [11, 182, 255])
    fake_ade(tmp_path / "ade", [151, 255])
    for images, words in (
        (voc_segmentation(tmp_path / "voc", "train"), "24 of 24 pixels hold 21, where voc12 masks hold 0-20, 255"),
        (coco_stuff(tmp_path, "val", 27), "16 of 24 pixels hold 11, 182, where coco-stuff"),
        (coco_stuff(tmp_path, "val", 171), "16 of 24 pixels hold 11, 182, where coco-stuff"),
        (ade20k(tmp_path / "ade", "val"), "24 of 24 pixels hold 151, 255, where ade20k masks hold 0-150"),
    ):
        with pytest.raises(UnreadableImage, match=words):
            images.read_mask(0)


@pytest.mark.parametrize("values", [[67, 0, 9], [182, 0], [1, 2]])
def test_maps_of_ids_are_not_taken_for_those_of_the_release(tmp_path: Path, values: list[int]) -> None:
    """There 67 is the dining table; in the release, where the values are less by one, that id has been given up."""
    maps = tmp_path / "stuffthingmaps" / "val2017"
    fake_coco_stuff(tmp_path / "val2017", maps, values)
    if values == [1, 2]:  # nothing tells, as long as there are few and none is unlabeled
        coco_stuff(tmp_path, "val", 27)
        for number in range(20):
            save_image(tmp_path / "val2017" / f"{number}.jpg")
            save_mask(maps / f"{number}.png", [0, 3], palette=False)
    for classes in (27, 171):
        with pytest.raises(ValueError, match=r"no 255, as where the values are the ids.*category id - 1.*subtract 1"):
            coco_stuff(tmp_path, "val", classes)  # type: ignore[arg-type]
    save_mask(maps / "000000000139.png", [66, 255, 0], palette=False)
    found = coco_stuff(tmp_path, "val", 171)  # where the dining table is the 61st of the things
    assert found.read_mask(found.names.index("000000000139"))[0, :3].tolist() == [60, VOID, 0]


def test_masks_of_foreground_are_not_taken_for_vocs(tmp_path: Path) -> None:
    fake_voc(tmp_path)
    save_mask(tmp_path / "SegmentationClass/a.png", [0, 255])
    with pytest.raises(ValueError, match=r"SegmentationClass: the masks hold 0 and 255 alone, .*1 to 20 classes"):
        voc_segmentation(tmp_path, "train")
    save_list(tmp_path / "ImageSets/Segmentation/both.txt", ["a", "b"])  # one without a class is not unusual
    assert voc_segmentation(tmp_path, "both").read_mask(0)[0, :2].tolist() == [0, VOID]


@pytest.mark.parametrize("opened", [ade20k, cityscapes, lambda root, split: coco_stuff(root, split, 27)])
def test_unknown_splits(tmp_path: Path, opened: Callable[[Path, str], SegmentationSet]) -> None:
    with pytest.raises(ValueError, match=r"has the splits train.* and val.*, not test"):
        opened(tmp_path, "test")


@pytest.mark.skipif(not DATA, reason="SKIPLESS_TEST_DATA is not set")
def test_real_voc_masks_are_their_palette_indices() -> None:
    root = Path(DATA or "", "VOCdevkit")
    found = voc_segmentation(root, "val")
    # Independently: the color that the file shows, looked up in VOC's color map.
    label_of = {tuple(color): label for label, color in enumerate(found.colors.tolist())} | {(224, 224, 192): VOID}
    seen = set()
    for index in range(0, len(found), 12):
        image, mask = found.read(index)
        with Image.open(found.masks[index]) as stored:
            shown = np.asarray(stored.convert("RGB"))
        # Each color and label as one number, of which there are few.
        numbers = np.unique(shown.astype(np.int64) @ [1 << 24, 1 << 16, 1 << 8] + mask)
        pairs = np.stack([numbers >> shift & 255 for shift in (24, 16, 8, 0)], axis=1)
        assert all(label_of[tuple(color)] == label for *color, label in pairs.tolist())
        assert image.shape == (*mask.shape, 3)
        seen |= set(pairs[:, 3].tolist())
    assert {0, 255} < seen <= {*range(21), 255}
