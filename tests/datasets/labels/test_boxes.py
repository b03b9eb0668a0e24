"""Box data sets: VOC, scenes, COCO, COCO20k and plain folders."""

import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import write_archive
from PIL import Image
from pycocotools import mask as coco_mask

from skipless.datasets.labels.boxes import BoxSet, folder_boxes
from skipless.datasets.labels.coco import coco20k, coco_boxes
from skipless.datasets.labels.instances import decoded_runs
from skipless.datasets.labels.voc import scenes_boxes, voc_boxes
from skipless.datasets.synthetic.dataset import write_scenes

DATA = os.environ.get("SKIPLESS_TEST_DATA")


def save_image(path: Path, orientation: int = 1) -> None:
    """6 wide, 4 high as stored."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tags = Image.Exif()
    tags[0x0112] = orientation
    Image.new("RGB", (6, 4)).save(path, exif=tags)


def assert_aligned(found: BoxSet) -> None:
    """Every image has all of its fields, of the types and shapes that are documented."""
    for field in (found.images, found.ids, found.boxes, found.categories, found.difficult, found.truncated):
        assert len(field) == len(found) == len(found.names)
    for boxes, categories, difficult, truncated in zip(
        found.boxes, found.categories, found.difficult, found.truncated, strict=True
    ):
        assert (boxes.dtype, boxes.shape) == (np.float64, (len(categories), 4))
        assert (categories.dtype, categories.shape) == (np.int64, (len(boxes),))
        for flag in (difficult, truncated):
            assert (flag.dtype, flag.shape) == (np.bool_, (len(boxes),))


def thing(name: str, box: tuple[float, ...], flags: str = "", more: str = "") -> str:
    xmin, ymin, xmax, ymax = box
    return (
        f"<object><name>{name}</name>{flags}{more}"
        f"<bndbox><xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax></bndbox></object>"
    )


HARD, CUT = "<difficult>1</difficult>", "<truncated>1</truncated>"
PART = "<part><name>head</name><bndbox><xmin>2</xmin><ymin>2</ymin><xmax>3</xmax><ymax>3</ymax></bndbox></part>"
OBJECTS = {
    "a": [thing("person", (1, 1, 6, 4), "<difficult>0</difficult><truncated>0</truncated>", PART)],
    "b": [thing("cat", (2, 3, 4, 4), HARD), thing("aeroplane", (1.5, 1, 6, 2), CUT)],
    "c": [],
    "d": [thing("dog", (1, 2, 3, 4), HARD + CUT), thing("tvmonitor", (3, 1, 6, 4))],
}


def fake_voc(folder: Path) -> None:
    for name, objects in OBJECTS.items():
        save_image(folder / "JPEGImages" / f"{name}.jpg")
        (folder / "Annotations").mkdir(exist_ok=True)
        (folder / "Annotations" / f"{name}.xml").write_text(f"<annotation>{''.join(objects)}</annotation>")
    lists = folder / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "trainval.txt").write_text("".join(f"{name}\n" for name in OBJECTS))
    (lists / "cat_train.txt").write_text("a -1\nb 1\n")


@pytest.mark.parametrize("year", [2007, 2012])
def test_voc_boxes(tmp_path: Path, year: int) -> None:
    fake_voc(tmp_path / "VOCdevkit" / f"VOC{year}")
    for root in (tmp_path, tmp_path / "VOCdevkit", tmp_path / "VOCdevkit" / f"VOC{year}"):
        found = voc_boxes(root, "trainval", year)  # type: ignore[arg-type]
    assert (found.name, found.split, found.names) == (f"voc{year - 2000:02}", "trainval", ("a", "b", "c", "d"))
    assert_aligned(found)
    # A box from pixel 1 to pixel 6 of 6 is the whole width; parts of a person are no objects.
    assert [boxes.tolist() for boxes in found.boxes] == [
        [[0, 0, 6, 4]],
        [[1, 2, 4, 4], [0.5, 0, 6, 2]],
        [],
        [[0, 1, 3, 4], [2, 0, 6, 4]],
    ]
    assert [flags.tolist() for flags in found.difficult] == [[False], [True, False], [], [True, False]]
    assert [flags.tolist() for flags in found.truncated] == [[False], [False, True], [], [True, False]]
    assert [labels.tolist() for labels in found.categories] == [[15], [8, 1], [], [12, 20]]
    assert found.read_image(0).shape == (4, 6, 3)


def test_hard_boxes_and_empty_images_are_dropped(tmp_path: Path) -> None:
    fake_voc(tmp_path)
    found = voc_boxes(tmp_path, "trainval", 2007)
    easy, boxes, images = found.without_hard()
    assert (boxes, images) == (3, 2)
    assert easy.names == ("a", "d")
    assert easy.ids == (0, 3)
    assert [path.name for path in easy.images] == ["a.jpg", "d.jpg"]
    assert [boxes.tolist() for boxes in easy.boxes] == [[[0, 0, 6, 4]], [[2, 0, 6, 4]]]
    assert [labels.tolist() for labels in easy.categories] == [[15], [20]]
    assert_aligned(easy)
    assert len(found) == 4  # as it was
    assert easy.without_hard()[1:] == (0, 0)
    (tmp_path / "ImageSets" / "Main" / "hard.txt").write_text("b\nc\n")
    with pytest.raises(ValueError, match="voc07 hard: no box is left"):
        voc_boxes(tmp_path, "hard", 2007).without_hard()


def test_what_voc_lacks_is_named(tmp_path: Path) -> None:
    fake_voc(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"test\.txt: no such split; lists that are there: trainval$"):
        voc_boxes(tmp_path, "test", 2007)
    with pytest.raises(ValueError, match=r"cat_train\.txt, line 1: holds 2 words"):
        voc_boxes(tmp_path, "cat_train", 2007)
    (tmp_path / "JPEGImages" / "b.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.jpg: no such image \(1 of 4"):
        voc_boxes(tmp_path, "trainval", 2007)
    (tmp_path / "Annotations" / "c.xml").unlink()
    with pytest.raises(FileNotFoundError, match=r"c\.xml: no such annotation \(1 of 4"):
        voc_boxes(tmp_path, "trainval", 2007)


@pytest.mark.parametrize(
    "text",
    [
        "<annotation><object>",
        "",
        "<annotation><object><name>cat</name></object></annotation>",
        f"<annotation>{thing('unicorn', (1, 1, 2, 2))}</annotation>",
        f"<annotation>{thing('cat', (1, 1, 2, 2)).replace('<xmin>1', '<xmin>one')}</annotation>",
        f"<annotation>{thing('cat', (3, 1, 2, 2))}</annotation>",
        f"<annotation>{thing('cat', (1, 1, float('nan'), 2))}</annotation>",
    ],
)
def test_damaged_annotations_are_named(tmp_path: Path, text: str) -> None:
    fake_voc(tmp_path)
    (tmp_path / "Annotations" / "b.xml").write_text(text)
    with pytest.raises(ValueError, match=r"b\.xml: cannot be read as a VOC annotation \(.+\)$") as caught:
        voc_boxes(tmp_path, "trainval", 2007)
    assert "\n" not in str(caught.value)


def test_scenes_boxes_enclose_their_objects(tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes", train=6, val=1, size=48, workers=1)
    found = scenes_boxes(tmp_path / "scenes", "train")
    assert (found.name, len(found)) == ("scenes", 6)
    assert_aligned(found)
    folder = tmp_path / "scenes" / "VOCdevkit" / "VOC2012"
    for index, name in enumerate(found.names):
        with Image.open(folder / "SegmentationObject" / f"{name}.png") as stored:
            objects = np.asarray(stored)
        with Image.open(folder / "SegmentationClass" / f"{name}.png") as stored:
            labels = np.asarray(stored)
        assert len(found.boxes[index]) == objects.max()
        for number, box in enumerate(found.boxes[index], 1):
            rows, columns = np.nonzero(objects == number)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert set(labels[objects == number].tolist()) == {found.categories[index][number - 1]}
    with pytest.raises(ValueError, match="as the data set 'scenes'"):
        voc_boxes(tmp_path / "scenes", "train", 2012)


def fake_coco(root: Path) -> Path:
    """Three images of train2014 with two boxes and a crowd, a crowd alone, and nothing."""
    images = [
        {"id": number, "file_name": f"COCO_train2014_{number:012}.jpg", "width": 6, "height": 4}
        for number in (30, 9, 25)
    ]
    items: list[dict[str, Any]] = [
        {"image_id": 30, "bbox": [0.5, 1.5, 2, 2], "category_id": 90, "iscrowd": 0},
        {"image_id": 30, "bbox": [0, 0, 6, 4], "category_id": 1, "iscrowd": 1},
        {"image_id": 30, "bbox": [1, 0, 2.25, 3.5], "category_id": 3, "iscrowd": 0},
        {"image_id": 9, "bbox": [0, 0, 1, 1], "category_id": 1, "iscrowd": 1},
    ]
    items = [{"id": number, "area": 1.0, **item} for number, item in enumerate(items, 1)]
    for image in images:
        save_image(root / "train2014" / str(image["file_name"]))
    path = root / "annotations" / "instances_train2014.json"
    path.parent.mkdir()
    categories = [{"id": number, "name": str(number)} for number in (1, 3, 90)]
    path.write_text(json.dumps({"images": images, "annotations": items, "categories": categories}))
    return path


def test_coco_boxes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = fake_coco(tmp_path)
    found = coco_boxes(path, tmp_path / "train2014")
    assert (found.name, found.split, found.ids) == ("coco", "train2014", (9, 25, 30))
    assert found.names[0] == "COCO_train2014_000000000009"
    assert_aligned(found)
    assert [boxes.tolist() for boxes in found.boxes] == [[], [], [[0.5, 1.5, 2.5, 3.5], [1, 0, 3.25, 3.5]]]
    assert found.categories[2].tolist() == [90, 3]
    assert not any(flags.any() for flags in found.difficult + found.truncated)
    assert found.read_image(2).shape == (4, 6, 3)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "lines",
    [
        ["train2014/COCO_train2014_000000000030.jpg", "train2014/COCO_train2014_000000000009.jpg"],
        ["COCO_train2014_000000000030.jpg", "COCO_train2014_000000000009.jpg", ""],
        ["30", "9"],
        ["000000000030", "000000000009"],
    ],
)
def test_coco20k_takes_the_named_images_with_rounded_boxes(tmp_path: Path, lines: list[str]) -> None:
    fake_coco(tmp_path)
    (tmp_path / "names.txt").write_text("\n".join(lines))
    found = coco20k(tmp_path, tmp_path / "names.txt")
    assert (found.name, found.split, found.ids) == ("coco20k", "train2014", (30, 9))
    assert_aligned(found)
    # Ties to even, as Python's round in LOST's release: 0.5 -> 0, 1.5 -> 2, 2.5 -> 2, 3.5 -> 4.
    assert [boxes.tolist() for boxes in found.boxes] == [[[0, 2, 2, 4], [1, 0, 3, 4]], []]
    easy, boxes, images = found.without_hard()
    assert (easy.ids, boxes, images) == ((30,), 0, 1)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("31", "31 is no image of"),
        ("val2014/COCO_val2014_000000000030.jpg", "COCO_val2014_000000000030.jpg is no image of"),
        ("COCO_train2014_30.jpg", "is no image of"),
        ("cat.jpg", "cat.jpg is no image of"),
        ("COCO_train2014_000000000030.jpg", "names 1 images more than once"),
        ("30", "30 is named twice"),
    ],
)
def test_coco20k_names_must_be_known(tmp_path: Path, line: str, reason: str) -> None:
    fake_coco(tmp_path)
    (tmp_path / "names.txt").write_text(f"30\n{line}\n")
    with pytest.raises(ValueError, match=re.escape(reason)):
        coco20k(tmp_path, tmp_path / "names.txt")


def test_what_coco_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"instances_val2017\.json: no such annotation file"):
        coco_boxes(tmp_path / "instances_val2017.json", tmp_path)
    path = fake_coco(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere.COCO_train2014_000000000009\.jpg: no such image \(3 of 3"):
        coco_boxes(path, tmp_path / "nowhere")
    (tmp_path / "names.txt").write_text("9\n30\n")
    (tmp_path / "train2014" / "COCO_train2014_000000000030.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"000000000030\.jpg: no such image \(1 of 2"):
        coco20k(tmp_path, tmp_path / "names.txt")
    with pytest.raises(FileNotFoundError, match=r"gone\.txt: no such list"):
        coco20k(tmp_path, tmp_path / "gone.txt")
    (tmp_path / "train2014").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="no folder of images there"):
        coco20k(tmp_path, tmp_path / "names.txt")


DAMAGED = '{"images": [{"id": 1, "file_name": "a.jpg", "width": 6, "height": 4}], "annotations": [%s]}'
OBJECT = '{"id": 7, "image_id": 1, "category_id": 1, "bbox": [1, 1, 2, 2], "segmentation": %s}'
RLE = '{"size": [4, 6], "counts": %s}'


def rectangle_text(height: int, width: int) -> str:
    """Run lengths of a mask with one pixel out of it, as pycocotools writes them."""
    mask = np.ones((height, width), np.uint8, order="F")
    mask[0, 1] = 0
    return json.dumps(coco_mask.encode(mask)["counts"].decode())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        ("[]", "list indices"),
        ("[" * 200_000, "nested too deeply"),
        ("{}", "it lacks 'images'"),
        ('{"images": []}', "it lacks 'annotations'"),
        ('{"images": [], "annotations": []}', "no images"),
        ('{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": []}', "it lacks 'width'"),
        ('{"images": [{"id": 1, "width": 6, "height": 4}], "annotations": []}', "it lacks 'file_name'"),
        (
            '{"images": [{"id": 1, "file_name": "a", "width": 6, "height": 1e9}], "annotations": []}',
            "height 1000000000",
        ),
        (DAMAGED.replace("[{", '[{"id": 1, "file_name": "b.jpg", "width": 6, "height": 4}, {', 1) % "", "the id of"),
        (DAMAGED % '{"id": 1, "image_id": 1}', "annotation 1 of image 1 has no box: its bbox is null"),
        (DAMAGED % '{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1]}', r"its bbox is \[1\]"),
        (DAMAGED % '{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, -1, 1]}', "a box of negative size"),
        (DAMAGED % '{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 1, "a"]}', "no finite number"),
        (DAMAGED % '{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 1, NaN]}', "no finite number"),
        (DAMAGED % '{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 1, 1e9]}', "6 x 4 pixels"),
        (DAMAGED % '{"id": 1, "image_id": 1, "bbox": [1, 1, 1, 1]}', "category_id None"),
        (
            DAMAGED % OBJECT % "[[0, 0, 1e9, 0, 1e9, 1e9]]",
            "annotation 7 of image 1 has a polygon that lies far outside",
        ),
        (DAMAGED % OBJECT % "[[0, 0, Infinity, 0, 1, 1]]", "a polygon that holds what is no finite number"),
        (DAMAGED % OBJECT % "[[0, 0, 1, 0, 1, 1, 2]]", "a polygon of 7 numbers"),
        (DAMAGED % OBJECT % "3", "neither polygons nor run lengths"),
        (DAMAGED % OBJECT % '{"size": [6, 4], "counts": [24]}', r"run lengths of size \[6, 4\]"),
        (DAMAGED % OBJECT % (RLE % "[23]"), "run lengths of 23 pixels, and its image has 24"),
        (DAMAGED % OBJECT % (RLE % "[25, -1]"), "damaged run lengths"),
        (DAMAGED % OBJECT % (RLE % '"~~~~"'), "damaged run lengths"),
        (DAMAGED % OBJECT % (RLE % rectangle_text(4, 7)), "run lengths of 28 pixels"),
        (DAMAGED.replace("[%s]", "3"), "not iterable"),
        (DAMAGED.replace("%s]}", ""), "Expecting value"),
    ],
)
def test_damaged_instances_are_named(tmp_path: Path, text: str, reason: str) -> None:
    save_image(tmp_path / "a.jpg")
    path = tmp_path / "instances_val2017.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"^{path}: .*{reason}.*; give an instances file$"):
        coco_boxes(path, tmp_path)


@pytest.mark.parametrize("counts", ["[24]", rectangle_text(4, 6)])
def test_run_lengths_that_fit_are_taken(tmp_path: Path, counts: str) -> None:
    save_image(tmp_path / "a.jpg")
    path = tmp_path / "instances_val2017.json"
    path.write_text(DAMAGED % OBJECT % (RLE % counts))
    assert coco_boxes(path, tmp_path).boxes[0].tolist() == [[1, 1, 3, 3]]


def test_the_text_of_run_lengths_is_decoded_as_by_pycocotools() -> None:
    rng = np.random.default_rng(0)
    for share in (0.01, 0.5, 0.99):
        mask = np.asfortranarray(rng.random((70, 90)) < share, np.uint8)
        runs = np.diff(np.flatnonzero(np.diff(mask.ravel("F"), prepend=2, append=2)))  # lengths of equal stretches
        expected = ([0] if mask[0, 0] else []) + runs.tolist()
        assert decoded_runs(coco_mask.encode(mask)["counts"].decode()) == expected


def test_photographs_are_turned_where_the_annotations_are_of_them_upright(tmp_path: Path) -> None:
    """6 x 4 pixels as stored; by its orientation, 4 x 6."""
    path = tmp_path / "instances_val2017.json"
    turned = {"id": 1, "file_name": "a.jpg", "width": 4, "height": 6}
    stored = {"id": 2, "file_name": "b.jpg", "width": 6, "height": 4}
    for orientation, images, upright in ((6, [turned], True), (1, [stored], False), (6, [stored], False)):
        save_image(tmp_path / "a.jpg", orientation=6)
        save_image(tmp_path / "b.jpg", orientation)
        path.write_text(json.dumps({"images": images, "annotations": []}))
        found = coco_boxes(path, tmp_path)
        assert found.upright == upright
        assert found.read_image(0).shape[:2] == (images[0]["height"], images[0]["width"])
    path.write_text(json.dumps({"images": [turned, stored], "annotations": []}))
    with pytest.raises(ValueError, match=r"describes b\.jpg as it is stored, and a\.jpg as EXIF turns it"):
        coco_boxes(path, tmp_path)
    save_image(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"a\.jpg has 6 x 4 pixels, and .* says 4 x 6: .*swapped"):
        coco_boxes(path, tmp_path)


def test_a_folder_has_no_boxes_and_upright_images(tmp_path: Path) -> None:
    save_image(tmp_path / "photos" / "b.jpg", orientation=6)
    save_image(tmp_path / "photos" / "trip.1" / "a.png")
    found = folder_boxes(tmp_path / "photos")
    assert found.name == "folder"
    assert found.names == ("b", "trip.1/a")
    assert_aligned(found)
    assert all(len(boxes) == 0 for boxes in found.boxes)
    assert [found.read_image(index).shape for index in range(2)] == [(6, 4, 3), (4, 6, 3)]


def test_boxes_refer_to_stored_pixels_wherever_they_are_read(tmp_path: Path) -> None:
    fake_voc(tmp_path)
    save_image(tmp_path / "JPEGImages" / "a.jpg", orientation=6)
    copy = pickle.loads(pickle.dumps(voc_boxes(tmp_path, "trainval", 2007)))  # as loader workers get it
    assert copy.read_image(0).shape == (4, 6, 3)


def test_archives_and_missing_folders_are_refused(tmp_path: Path) -> None:
    save_image(tmp_path / "a.jpg")
    write_archive(tmp_path / "photos.zip", {"a.jpg": (tmp_path / "a.jpg").read_bytes()})
    with pytest.raises(ValueError, match=r"photos\.zip: is a zip archive; unpack it"):
        folder_boxes(tmp_path / "photos.zip")
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        folder_boxes(tmp_path / "nowhere")


@pytest.mark.skipif(not DATA, reason="SKIPLESS_TEST_DATA is not set")
def test_real_voc_boxes_lie_inside_their_images() -> None:
    root = Path(DATA or "", "VOCdevkit")
    found = voc_boxes(root, "test", 2007)
    assert_aligned(found)
    texts = [(root / "VOC2007" / "Annotations" / f"{name}.xml").read_text() for name in found.names]
    assert [len(boxes) for boxes in found.boxes] == [text.count("<object>") for text in texts]
    for index in range(0, len(found), 10):
        height, width = found.read_image(index).shape[:2]
        boxes = found.boxes[index]
        assert boxes[:, :2].min() >= 0
        assert boxes[:, 2].max() <= width
        assert boxes[:, 3].max() <= height
        assert (boxes[:, 2:] > boxes[:, :2]).all()
    easy, dropped, _ = found.without_hard()
    hard = sum(
        "<difficult>1" in item or "<truncated>1" in item for text in texts for item in text.split("<object>")[1:]
    )
    assert dropped == hard
    assert not any(flags.any() for flags in easy.difficult + easy.truncated)


@pytest.mark.skipif(not DATA, reason="SKIPLESS_TEST_DATA is not set")
def test_real_coco_boxes_are_those_of_the_file() -> None:
    root = Path(DATA or "", "coco")
    path = root / "annotations" / "instances_val2017.json"
    found = coco_boxes(path, root / "val2017")
    assert_aligned(found)
    content = json.loads(path.read_text())
    assert sorted(found.ids) == sorted(image["id"] for image in content["images"])
    expected = {
        (item["image_id"], item["category_id"], *item["bbox"]) for item in content["annotations"] if not item["iscrowd"]
    }
    assert any(item["iscrowd"] for item in content["annotations"])
    got = {
        (id, category, x0, y0, round(x1 - x0, 2), round(y1 - y0, 2))
        for id, boxes, categories in zip(found.ids, found.boxes, found.categories, strict=True)
        for (x0, y0, x1, y1), category in zip(boxes.tolist(), categories.tolist(), strict=True)
    }
    assert got == expected
