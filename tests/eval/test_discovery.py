"""Object discovery as a user runs it, CorLoc and AP by hand, resuming, and whatever odd images there are."""

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import refusal, run_group
from helpers import write_voc as write_masks
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from safetensors.torch import save_file

from skipless.common import cli
from skipless.datasets.labels.boxes import BoxSet
from skipless.datasets.labels.coco import coco_boxes
from skipless.datasets.labels.counts import describe_split
from skipless.datasets.labels.voc import voc_boxes
from skipless.datasets.synthetic.dataset import write_scenes
from skipless.eval import backbones, discovery
from skipless.eval.backbones import Backbone, load_backbone
from skipless.eval.discovery import Settings, evaluate, main
from skipless.eval.metrics import bootstrap_interval
from skipless.eval.objects import search
from skipless.eval.objects.localization import Localization, box_in_pixels, lost, tokencut
from skipless.eval.objects.report import draw as draw_sheet
from skipless.eval.objects.scores import coco_ap, detections
from skipless.eval.report import main as make_report
from skipless.eval.segmentation import main as segment
from skipless.eval.similarity import main as draw_similarity
from skipless.ssl.model.vit import VisionTransformer

PATCH = 8
METHODS = ("lost", "tokencut", "maskcut")
IDS = {"lost": "lost", "tokencut": "tokencut", "maskcut": "maskcut/no-crf/corners-by-seed"}
FILES = ["detections.json", "discovery.json", "discovery.md", "discovery.png"]
# (width, height), objects (x0, y0, x1, y1 half-open, flags). 37 x 50 and 40 x 56 have one size after padding.
HARD, CUT = "<difficult>1</difficult>", "<truncated>1</truncated>"
Save = Callable[[dict[str, torch.Tensor]], Path]
Objects = list[tuple[tuple[int, int, int, int], str]]
VOC: dict[str, tuple[tuple[int, int], Objects]] = {
    "a": ((40, 56), [((0, 0, 40, 56), "")]),
    "b": ((64, 33), [((3, 4, 20, 20), HARD), ((10, 0, 64, 33), ""), ((1, 1, 9, 9), "")]),
    "c": ((37, 50), []),
    "d": ((33, 64), [((0, 8, 33, 64), HARD)]),
    "e": ((40, 50), [((5, 5, 30, 40), CUT), ((8, 0, 40, 50), HARD)]),
    "f": ((37, 56), [((20, 20, 37, 56), "")]),
}


def picture(width: int, height: int, seed: int) -> Image.Image:
    """A noisy disc on noise of another color."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    inside = ((x - 0.6 * width) / (0.3 * width)) ** 2 + ((y - 0.4 * height) / (0.35 * height)) ** 2 < 1
    base = np.where(inside[..., None], (230, 60, 40), (40, 90, 160))
    return Image.fromarray((base + rng.integers(-40, 25, (height, width, 3))).clip(0, 255).astype(np.uint8))


def write_voc(folder: Path, content: dict[str, tuple[tuple[int, int], Objects]] = VOC, split: str = "trainval") -> None:
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for seed, (name, (size, objects)) in enumerate(content.items()):
        picture(*size, seed).save(folder / f"JPEGImages/{name}.jpg", quality=95)
        text = "".join(
            f"<object><name>dog</name>{flags}<bndbox><xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin>"
            f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
            for (x0, y0, x1, y1), flags in objects
        )
        (folder / f"Annotations/{name}.xml").write_text(f"<annotation>{text}</annotation>")
    (folder / f"ImageSets/Main/{split}.txt").write_text("".join(f"{name}\n" for name in content))


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "VOCdevkit"
    write_voc(root / "VOC2007")
    return root


def rectangle(x: int, y: int, width: int, height: int) -> dict[str, Any]:
    """An object of whole pixels: its box, its polygon and its area."""
    corners = [x, y, x + width, y, x + width, y + height, x, y + height]
    return {"bbox": [x, y, width, height], "segmentation": [corners], "area": width * height, "iscrowd": 0}


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images: one object of two categories each, a crowd alone, nothing, two objects."""
    root = tmp_path_factory.mktemp("coco")
    sizes = {7: (48, 40), 8: (40, 32), 9: (32, 40), 12: (64, 48)}
    counts = [0, 30 * 32, 10 * 32]  # columns first: none that are out, then thirty columns in, ten out
    items = [
        {"image_id": 12, "category_id": 3, **rectangle(2, 3, 30, 20)},
        {"image_id": 12, "category_id": 90, **rectangle(36, 20, 24, 24)},
        {"image_id": 8, "category_id": 3, "bbox": [0, 0, 30, 32], "area": 960, "iscrowd": 1,
         "segmentation": {"size": [32, 40], "counts": counts}},
        {"image_id": 7, "category_id": 90, **rectangle(8, 8, 32, 30)},
    ]  # fmt: skip
    (root / "val2017").mkdir()
    (root / "annotations").mkdir()
    for number, size in sizes.items():
        picture(*size, number).save(root / "val2017" / f"{number:012}.jpg")
    content = {
        "images": [{"id": n, "file_name": f"{n:012}.jpg", "width": w, "height": h} for n, (w, h) in sizes.items()],
        "annotations": [{"id": number, **item} for number, item in enumerate(items, 1)],
        "categories": [{"id": number, "name": str(number)} for number in (3, 90)],
    }
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    return root


def random_tensors(depth: int = 2) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return VisionTransformer(dim=192, depth=depth, heads=3, patch=PATCH, image_size=64).state_dict()


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Save:
    def save(tensors: dict[str, torch.Tensor]) -> Path:
        path = tmp_path_factory.mktemp("ckpt") / "tiny.safetensors"
        save_file(tensors, path)
        return path

    return save


@pytest.fixture(scope="module")
def ckpt(save: Save) -> Path:
    """A random ViT of two blocks."""
    return save(random_tensors())


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take longer than all the rest."""
    monkeypatch.setattr(discovery, "draw", lambda *_: None)


def command(root: Path, ckpt: Path, *more: object, name: str = "voc07") -> list[str]:
    return list(map(str, ["--ckpt", ckpt, "--data.name", name, "--data.root", root, "--device", "cpu", *more]))


def measure(root: Path, ckpt: Path, *more: object, name: str = "voc07") -> dict[str, Any]:
    """The result, in this process."""
    return evaluate(cli.parse(Settings, command(root, ckpt, *more, name=name)))


def found_in(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / "detections.json").read_text())
    return found


def decode(rle: dict[str, Any]) -> np.ndarray:
    mask: np.ndarray = coco_mask.decode({"size": rle["size"], "counts": rle["counts"].encode()}).astype(bool)
    return mask


def enclosing(mask: np.ndarray) -> list[int]:
    """x, y, width, height."""
    ys, xs = np.nonzero(mask)
    return [xs.min(), ys.min(), xs.max() + 1 - xs.min(), ys.max() + 1 - ys.min()]


def pixels(box: tuple[int, int, int, int]) -> set[tuple[int, int]]:
    return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}


def test_a_part_of_a_split_is_called_so() -> None:
    assert describe_split("voc12", "val", 180) == "voc12 val SUBSET, 180 of 1,449 images"
    assert describe_split("voc07", "trainval", 5011) == "voc07 trainval, 5,011 images"
    assert describe_split("voc07", "trainval", 4900, official=4900) == "voc07 trainval, 4,900 images"
    assert describe_split("folder", "all", 3) == "folder all, 3 images"


def perfect(annotations: Path, images: BoxSet) -> list[dict[str, Any]]:
    """Detections made of the truth itself, by pycocotools."""
    truth = COCO(str(annotations))
    found = []
    for number in images.ids:
        for item in truth.imgToAnns[number]:
            if not item["iscrowd"]:
                rle = truth.annToRLE(item)
                rle = {"size": rle["size"], "counts": rle["counts"].decode()}
                found.append({"image_id": number, "category_id": 1, "bbox": item["bbox"], "score": 1.0})
                found[-1]["segmentation"] = rle
    return found


def test_perfect_detections_have_an_ap_of_one(coco: Path, voc: Path) -> None:
    """Whatever their categories, and with something found inside the crowd, too; not with something found elsewhere."""
    path = coco / "annotations" / "instances_val2017.json"
    images = coco_boxes(path, coco / "val2017")
    best = perfect(path, images)
    score = coco_ap(images, path, best)
    assert (score["metric"], score["value"]) == ("mask AP, class-agnostic", pytest.approx(1))
    assert score["details"]["objects"] == 3
    for name in ("box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50", "mask_ap75", "mask_ar100"):
        assert score["details"][name] == pytest.approx(1), name

    def extra(image: int, size: tuple[int, int]) -> dict[str, Any]:
        mask = np.zeros(size, np.uint8, order="F")
        mask[4:20, 4:20] = 1
        rle = coco_mask.encode(mask)
        segmentation = {"size": list(size), "counts": rle["counts"].decode()}
        box = {"bbox": [4, 4, 16, 16], "segmentation": segmentation}
        return {"image_id": image, "category_id": 1, "score": 2.0, **box}

    assert coco_ap(images, path, [*best, extra(8, (32, 40))])["value"] == pytest.approx(1)
    # Image 9 has no boxes: first of four, it takes the precision to 3/4 at most, at every recall.
    worse = coco_ap(images, path, [*best, extra(9, (40, 32))])["details"]
    assert worse["mask_ap"] == pytest.approx(3 / 4)
    assert worse["box_ap"] == pytest.approx(3 / 4)

    # Of the annotations, those of the set's images count alone.
    part = replace(images, ids=(7,), names=images.names[:1], images=images.images[:1], boxes=images.boxes[:1])
    assert coco_ap(part, path, perfect(path, part))["value"] == pytest.approx(1)
    assert coco_ap(images, path, perfect(path, part))["value"] < 0.5

    of_voc = voc_boxes(voc, "trainval", 2007)
    all_of_voc = [
        {"image_id": number, "category_id": 1, "bbox": [x0, y0, x1 - x0, y1 - y0], "score": 1.0}
        for number, boxes in zip(of_voc.ids, of_voc.boxes, strict=True)
        for x0, y0, x1, y1 in boxes.tolist()
    ]
    score = coco_ap(of_voc, None, all_of_voc)
    assert (score["metric"], score["value"]) == ("box AP, class-agnostic", pytest.approx(1))
    assert "mask_ap" not in score["details"]


def test_objects_of_earlier_rounds_come_first(coco: Path) -> None:
    """One object. Found in the first of two rounds it is perfect, in the second one half of what was found."""
    path = coco / "annotations" / "instances_val2017.json"
    images = coco_boxes(path, coco / "val2017")
    alone = replace(images, ids=(7,), names=images.names[:1], images=images.images[:1], boxes=images.boxes[:1])
    (right,) = perfect(path, alone)
    wrong = np.zeros((40, 48), np.uint8, order="F")
    wrong[:3, :3] = 1
    rle = coco_mask.encode(wrong)
    objects = [
        {"box": [8, 8, 40, 38], "rle": right["segmentation"]},
        {"box": [0, 0, 3, 3], "rle": {"size": [40, 48], "counts": rle["counts"].decode()}},
    ]
    for order, expected in ((objects, 1), (objects[::-1], 1 / 2)):
        found = detections(alone, [{"index": 0, "blocks": [{"objects": order}]}], 0)
        assert found[0]["score"] > found[1]["score"] > 0
        score = coco_ap(alone, path, found)["details"]
        assert score["mask_ap"] == score["box_ap"] == pytest.approx(expected)


@pytest.mark.parametrize("method", METHODS)
def test_command_leaves_a_result_detections_and_pictures(
    coco: Path, ckpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    out = tmp_path / "new" / "out"
    flags = ["--method", method, "--size=64", "--batch-size=3", "--seed=1", "--every-block", "--out", out]
    main(command(coco, ckpt, *flags, name="coco"))
    printed = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == FILES

    result = json.loads((out / "discovery.json").read_text())
    assert (result["task"], result["protocol"]) == ("discovery", f"coco-{IDS[method]}/64px")
    assert (result["dataset"], result["split"], result["images"]) == ("coco", "val2017", 4)
    assert (result["official_images"], result["seed"], result["processes"]) == (5000, 1, 1)
    assert result["checkpoint"]["path"] == str(ckpt)
    assert len(result["checkpoint"]["sha256"]) == 64
    assert result["checkpoint"]["architecture"] == "ViT-Ti/8, 2 blocks, 192 wide, residual, 3 heads assumed"
    assert result["settings"]["batch_size"] == 3
    assert result["settings"]["data"]["root"] == str(coco)
    assert {"seconds", "hardware", "versions", "commit"} <= set(result)
    details = result["details"]
    assert details["block"] == 2
    assert details["image_size"] == 64
    assert [entry["block"] for entry in details["every_block"]] == [1, 2]
    assert 0 <= result["value"] <= 1
    if method == "maskcut":
        assert result["metric"] == "mask AP, class-agnostic"
        assert details["mask_ap"] == result["value"]
        assert details["objects"] == len(found_in(out))
    else:
        assert result["metric"] == "CorLoc"
        assert (details["scored_images"], details["hits"]) == (2, round(2 * result["value"]))
        assert details["interval_95"][0] <= result["value"] <= details["interval_95"][1]

    table = (out / "discovery.md").read_text()
    assert f"**coco-{IDS[method]}/64px** {100 * result['value']:.1f} {result['metric']}" in table
    assert "coco val2017 SUBSET, 4 of 5,000 images" in table
    assert "coco val2017 SUBSET, 4 of 5,000 images; 2 with boxes" in printed
    assert f"| 2 | {100 * result['value']:.1f} |" in table
    assert table.strip() in printed

    truth = COCO(str(coco / "annotations" / "instances_val2017.json"))
    loaded = truth.loadRes(str(out / "detections.json"))
    assert sorted(loaded.imgToAnns) == [7, 8, 9, 12]
    for number, items in loaded.imgToAnns.items():
        about = truth.imgs[number]
        assert len(items) == 1 or method == "maskcut"
        assert [item["score"] for item in items] == pytest.approx([1 / (1 + rank) for rank in range(len(items))])
        for item in items:
            assert item["file_name"] == about["file_name"]
            mask = decode(item["segmentation"])
            assert mask.shape == (about["height"], about["width"])
            assert item["bbox"] == enclosing(mask)
        assert sum(decode(item["segmentation"]).astype(int) for item in items).max() == 1  # type: ignore[union-attr]
    with Image.open(out / "discovery.png") as sheet:
        sheet.load()
        assert min(sheet.size) > 200


def test_boxes_and_corloc_are_those_of_images_alone(voc: Path, ckpt: Path, tmp_path: Path, undrawn: None) -> None:
    """Normalized, then padded with zeros by hand; the patches' box and mask in pixels, cut at the image's edges."""
    backbone = load_backbone(ckpt)
    for method, locate in (("lost", lost), ("tokencut", tokencut)):
        result = measure(voc, ckpt, "--method", method, "--out", tmp_path / method)
        hits = []
        for found, (name, ((width, height), objects)) in zip(found_in(tmp_path / method), VOC.items(), strict=True):
            with Image.open(voc / "VOC2007" / "JPEGImages" / f"{name}.jpg") as opened:
                image = np.asarray(opened)
            assert image.shape == (height, width, 3)
            padded = np.zeros((-(-height // PATCH) * PATCH, -(-width // PATCH) * PATCH, 3), np.float32)
            padded[:height, :width] = (image / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
            (features,) = backbone.features(torch.from_numpy(padded).permute(2, 0, 1)[None], kind="keys")
            (expected,) = locate(features.patches)
            assert not expected.degenerate
            assert expected.mask.sum() < expected.mask.size  # or there would be nothing to compare
            x0, y0, x1, y1 = box_in_pixels(expected.box, PATCH, height, width)
            assert found["bbox"] == [x0, y0, x1 - x0, y1 - y0]
            large = np.kron(expected.mask, np.ones((PATCH, PATCH), bool))[:height, :width]
            np.testing.assert_array_equal(decode(found["segmentation"]), large)
            assert found["file_name"] == f"{name}.jpg"
            box = pixels((x0, y0, x1, y1))
            ious = [len(box & pixels(one)) / len(box | pixels(one)) for one, _ in objects]
            hits += [max(ious) >= 0.5] if ious else []
        assert len(hits) == 5
        assert result["details"]["hits"] == sum(hits)
        assert result["value"] == sum(hits) / 5
        assert result["details"]["interval_95"] == bootstrap_interval(np.array(hits), 0)


def test_masks_of_resized_images_come_back_to_their_pixels(
    tmp_path: Path, ckpt: Path, monkeypatch: pytest.MonkeyPatch, undrawn: None
) -> None:
    """An image of 3 x 10 seen as 16 x 16, 2 x 2 patches. The centers of its columns lie at 0.8, 2.4, ..., 7.2 | 8.8,
    ..., those of its rows at 2.7 | 8 (which belongs to the second patch) and 13.3. Without a size it is 480 x 480."""
    (tmp_path / "in").mkdir()
    picture(10, 3, 0).save(tmp_path / "in" / "x.png")
    patches = [np.array(mask, bool) for mask in ([[0, 1], [0, 0]], [[0, 0], [1, 0]], [[1, 0], [0, 1]])]

    def by_hand(features: torch.Tensor) -> list[list[Localization]]:
        assert features.shape == (1, 2, 2, 192)
        return [[Localization(mask, (0, 0, 1, 1), 0, np.zeros((2, 2)), 0.5, False) for mask in patches]]

    monkeypatch.setattr(search, "maskcut", by_hand)
    out = tmp_path / "out"
    measure(tmp_path / "in", ckpt, "--method=maskcut", "--size=16", "--out", out, name="folder")
    found = found_in(out)
    assert [item["bbox"] for item in found] == [[5, 0, 5, 1], [0, 1, 5, 2], [0, 0, 10, 3]]
    diagonal = np.zeros((3, 10), bool)
    diagonal[0, :5] = diagonal[1:, 5:] = True
    np.testing.assert_array_equal(decode(found[2]["segmentation"]), diagonal)

    def whole(features: torch.Tensor) -> list[list[Localization]]:
        assert features.shape == (1, 60, 60, 192)
        return [[Localization(np.ones((60, 60), bool), (0, 0, 60, 60), 0, np.zeros((60, 60)), 0.5, False)]]

    monkeypatch.setattr(search, "maskcut", whole)
    result = measure(tmp_path / "in", ckpt, "--method=maskcut", "--out", tmp_path / "square", name="folder")
    assert (result["protocol"], result["details"]["image_size"]) == ("folder-maskcut/no-crf/corners-by-seed", 480)
    assert found_in(tmp_path / "square")[0]["bbox"] == [0, 0, 10, 3]


@pytest.mark.parametrize("method", METHODS)
def test_batches_and_workers_change_nothing(
    voc: Path, ckpt: Path, tmp_path: Path, undrawn: None, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    sizes: list[int] = []
    plain = Backbone.features

    def count(self: Backbone, images: torch.Tensor, *more: Any) -> Any:
        sizes.append(len(images))
        return plain(self, images, *more)

    monkeypatch.setattr(Backbone, "features", count)
    flags = ["--method", method, *(["--size=64"] if method == "maskcut" else [])]
    one = measure(voc, ckpt, *flags, "--batch-size=1", "--out", tmp_path / "one")
    assert sizes == [1] * 6
    more = measure(voc, ckpt, *flags, "--batch-size=4", "--workers=1", "--out", tmp_path / "more")
    # 40 x 56, 37 x 50, 40 x 50 and 37 x 56 are all 40 x 56 after padding; squares are all alike.
    assert sorted(sizes[6:]) == ([2, 4] if method == "maskcut" else [1, 1, 4])
    assert found_in(tmp_path / "one") == found_in(tmp_path / "more")
    for key in ("value", "details"):
        assert one[key] == more[key]


@pytest.mark.parametrize("method", ["tokencut", "maskcut"])
def test_every_block_gives_what_each_block_gives_alone(voc: Path, ckpt: Path, method: str) -> None:
    flags = [f"--method={method}", "--size=64"]
    together = measure(voc, ckpt, *flags, "--every-block")
    entries = together["details"]["every_block"]
    assert [entry["block"] for entry in entries] == [1, 2]
    assert entries[-1]["value"] == together["value"]
    for entry in entries:
        alone = measure(voc, ckpt, *flags, "--block", entry["block"])
        assert (entry["metric"], entry["value"]) == (alone["metric"], alone["value"])
        assert alone["details"]["block"] == entry["block"]
        assert alone["protocol"].endswith(f"/block-{entry['block']}/64px")
    assert together["details"]["mean_edge_share"] == alone["details"]["mean_edge_share"]


def test_hard_boxes_are_dropped_on_demand(voc: Path, ckpt: Path, tmp_path: Path, undrawn: None) -> None:
    """Left are a, one box of f and two of b; c had none to begin with."""
    easy = measure(voc, ckpt, "--no-hard", "--out", tmp_path / "easy")
    assert easy["protocol"] == "voc07-tokencut/no-hard"
    assert (easy["images"], easy["details"]["dropped_images"], easy["details"]["dropped_boxes"]) == (3, 3, 4)
    assert easy["details"]["scored_images"] == 3
    assert [item["file_name"] for item in found_in(tmp_path / "easy")] == ["a.jpg", "b.jpg", "f.jpg"]
    assert easy["official_images"] == 5011
    hits = 0
    for item, name in zip(found_in(tmp_path / "easy"), "abf", strict=True):
        x, y, width, height = item["bbox"]
        box = pixels((x, y, x + width, y + height))
        objects = [pixels(one) for one, flags in VOC[name][1] if not flags]
        hits += any(len(box & one) >= 0.5 * len(box | one) for one in objects)
    assert easy["details"]["hits"] == hits


def test_subsets_are_named_and_whole_sets_are_not(
    voc: Path, ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main(command(voc, ckpt))
    assert capsys.readouterr().out.count("voc07 trainval SUBSET, 6 of 5,011 images") == 2
    # The lists of boxes are others than those of segmentation: 1,449 in val and 2,913 in trainval.
    for split, official in (("train", "5,717"), ("val", "5,823"), ("trainval", "11,540")):
        write_voc(tmp_path / split / "VOC2012", {"a": VOC["a"]}, split)
        main(command(tmp_path / split, ckpt, "--data.split", split, name="voc12"))
        assert capsys.readouterr().out.count(f"voc12 {split} SUBSET, 1 of {official} images") == 2
    monkeypatch.setitem(discovery.BOX_COUNTS, ("voc07", "trainval"), 6)
    for flags, more in (([], ""), (["--no-hard"], ", less 3 without an easy box")):
        main(command(voc, ckpt, *flags))
        assert capsys.readouterr().out.count(f"voc07 trainval, 6 images{more};") == 2


def test_scenes_and_folders(ckpt: Path, tmp_path: Path, undrawn: None, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder has no score. Its images are turned upright, whatever size is stored, and named by their path."""
    write_scenes(tmp_path / "scenes", train=1, val=2, size=48, workers=1)
    scenes = measure(tmp_path / "scenes", ckpt, name="scenes")
    assert (scenes["split"], scenes["images"], scenes["metric"]) == ("val", 2, "CorLoc")

    for name, orientation in (("x/1.jpg", 1), ("y/1.jpg", 6), ("y/2.jpg", 1)):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        tags = Image.Exif()
        tags[0x0112] = orientation
        picture(64, 40, 0).save(path, exif=tags)
    for method, flags in (("tokencut", []), ("maskcut", ["--size=64"])):
        out = tmp_path / method
        capsys.readouterr()
        main(command(tmp_path / "in", ckpt, "--method", method, *flags, "--out", out, name="folder"))
        assert "3 images searched; none has boxes" in capsys.readouterr().out
        result = json.loads((out / "discovery.json").read_text())
        assert (result["metric"], result["value"], result["split"]) == (None, None, "all")
        sizes = {item["file_name"]: item["segmentation"]["size"] for item in found_in(out)}
        assert sizes == {"x/1.jpg": [40, 64], "y/1.jpg": [64, 40], "y/2.jpg": [40, 64]}


def test_damaged_images_of_a_folder_are_left_out_and_listed(
    ckpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / "in").mkdir(exist_ok=True)
        picture(32, 24, 0).save(tmp_path / "in" / f"{name}.jpg")
    (tmp_path / "in" / "b.jpg").write_bytes(b"no picture")
    result = measure(tmp_path / "in", ckpt, "--out", tmp_path / "out", name="folder")
    (sentence_on_b,) = result["details"]["unreadable"]
    assert "b.jpg: the content is not that of a" in sentence_on_b
    assert [item["file_name"] for item in found_in(tmp_path / "out")] == ["a.jpg", "c.jpg"]
    printed = capsys.readouterr().out
    assert "left out: 1\n" in printed
    assert "2 images searched" in printed  # the damaged one is counted once
    assert Image.open(tmp_path / "out" / "discovery.png").size[0] > 0
    for name in ("a", "c"):
        (tmp_path / "in" / f"{name}.jpg").write_bytes(b"no picture")
    assert "none of its 3 images can be read" in refusal(main, command(tmp_path / "in", ckpt, name="folder"), capsys)


@pytest.mark.parametrize("method", METHODS)
def test_squares_are_made_as_published(
    tmp_path: Path, ckpt: Path, monkeypatch: pytest.MonkeyPatch, undrawn: None, method: str
) -> None:
    """CutLER's release takes Pillow's Lanczos filter; the others have no squares, and get bicubic ones."""
    (tmp_path / "in").mkdir()
    photo = picture(61, 43, 0)
    photo.save(tmp_path / "in" / "x.png")
    seen: list[np.ndarray] = []
    plain = Backbone.normalize
    monkeypatch.setattr(Backbone, "normalize", lambda self, images: seen.append(images[0]) or plain(self, images))
    measure(tmp_path / "in", ckpt, "--method", method, "--size=32", name="folder")
    expected = {name: np.asarray(photo.resize((32, 32), Image.Resampling[name])) for name in ("LANCZOS", "BICUBIC")}
    distance = {name: np.abs(seen[0].astype(int) - other).max() for name, other in expected.items()}
    assert distance["LANCZOS"] == 0 if method == "maskcut" else distance["BICUBIC"] <= 2 < distance["LANCZOS"]


def test_graphs_that_say_nothing_are_warned_of_after_a_few_images(
    tmp_path: Path, save: Save, undrawn: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in DINOv2's weights, a large bias of the keys makes all patches alike; for them, it is left out."""
    (tmp_path / "in").mkdir()
    for number in range(10):
        picture(48, 40, number).save(tmp_path / "in" / f"{number}.png")
    biased = random_tensors()
    for block in range(2):
        biased[f"blocks.{block}.attn.qkv.bias"][192:384] = 100
    result = measure(tmp_path / "in", save(biased), "--batch-size=4", name="folder")
    said = capsys.readouterr().out
    assert "warning: in 8 of the first 8 images nearly all patches count as similar" in said
    assert said.index("the first 8 images") < said.index("10 images searched")
    assert (result["settings"]["features"], result["details"]["nearly_complete_graphs"]) == ("keys", 10)
    dinov2 = biased | {f"blocks.{block}.ls{n}.gamma": torch.ones(192) for block in range(2) for n in (1, 2)}
    result = measure(tmp_path / "in", save(dinov2), name="folder")
    assert result["protocol"] == "folder-tokencut/keys_without_bias"
    assert (result["settings"]["features"], result["details"]["nearly_complete_graphs"]) == ("keys_without_bias", 0)
    assert "of the first" not in capsys.readouterr().out
    published = measure(tmp_path / "in", save(dinov2), "--features=keys", name="folder")
    assert (published["protocol"], published["details"]["nearly_complete_graphs"]) == ("folder-tokencut", 10)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow only Unicode in file names")
@pytest.mark.parametrize("name", [b"caf\xe9.jpg", b"price $5$ _^{.jpg", b"a\nb\x1b[31m.jpg"])
def test_names_that_are_no_text_are_searched_drawn_and_written(
    ckpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: bytes
) -> None:
    (tmp_path / "in").mkdir()
    picture(32, 24, 0).save(tmp_path / "in" / "a.jpg")
    os.rename(tmp_path / "in" / "a.jpg", os.fsencode(tmp_path / "in") + b"/" + name)
    (tmp_path / "in" / "damaged.jpg").touch()
    main(command(tmp_path / "in", ckpt, "--out", tmp_path / "out", name="folder"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    assert found_in(tmp_path / "out")[0]["file_name"] == os.fsdecode(name)
    draw_similarity(list(map(str, ["--ckpt", ckpt, "--image", tmp_path / "in" / os.fsdecode(name), "--size=32",
                                   "--out", tmp_path / "similar.png"])))  # fmt: skip
    make_report(list(map(str, ["--ckpt", ckpt, "--images", tmp_path / "in" / os.fsdecode(name), "--device=cpu",
                               "--size=32", "--out", tmp_path / "report"])))  # fmt: skip
    assert (tmp_path / "report" / "report.html").exists()


def test_the_sheet_scores_images_and_says_where_there_is_nothing_to_cut(voc: Path, tmp_path: Path) -> None:
    images = voc_boxes(voc, "trainval", 2007)
    place = {path.stem: index for index, path in enumerate(images.images)}

    def entry(name: str, degenerate: bool, *boxes: list[int]) -> dict[str, Any]:
        width, height = VOC[name][0]
        masks = np.zeros((len(boxes), height, width), np.uint8)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
            mask[y0:y1, x0:x1] = 1
        rles = [coco_mask.encode(np.asfortranarray(mask)) for mask in masks]
        objects = [
            {"box": box, "rle": {"size": list(rle["size"]), "counts": rle["counts"].decode()}}
            for box, rle in zip(boxes, rles, strict=True)
        ]
        found = {"objects": objects, "degenerate": degenerate}
        return {"index": place[name], "blocks": [found], "map": [[0.0, 1.0], [0.5, 0.2]]}

    entries = [entry("c", True, [0, 0, 37, 50]), entry("f", False, [0, 0, 9, 9], [20, 20, 37, 38])]
    shown = [place["c"], place["f"]]
    draw_sheet(images, entries, 0, shown, "maskcut", tmp_path / "sheet.svg")
    text = (tmp_path / "sheet.svg").read_text()  # letters are drawn; what they say stands in comments
    assert text.count("<!-- nothing to cut -->") == 2  # in place of c's map and mask
    assert "<!-- c.jpg -->" in text  # which has no true box
    assert "<!-- f.jpg   IoU 0.50 -->" in text  # the second is half of the true one
    assert {"#d55e00", "#56b4e9"} <= set(re.findall(r"stroke: (#\w{6})", text))


def test_results_of_two_tasks_share_a_folder(voc: Path, ckpt: Path, tmp_path: Path) -> None:
    measure(voc, ckpt, "--out", tmp_path)
    before = (tmp_path / "discovery.png").read_bytes()
    segmented = write_masks(tmp_path / "masks", {"train": 4, "val": 2})
    words = ["--ckpt", ckpt, "--data.name=voc12", "--data.root", segmented, "--protocol=quick", "--quick.size=32"]
    segment(list(map(str, [*words, "--quick.epochs=1", "--device=cpu", "--cache", tmp_path / "c", "--out", tmp_path])))
    assert (tmp_path / "segmentation.png").exists()
    assert (tmp_path / "discovery.png").read_bytes() == before


def test_another_result_in_out_is_not_overwritten(
    voc: Path, ckpt: Path, tmp_path: Path, undrawn: None, capsys: pytest.CaptureFixture[str]
) -> None:
    measure(voc, ckpt, "--out", tmp_path / "out")
    before = (tmp_path / "out" / "discovery.json").read_bytes()
    line = refusal(main, command(voc, ckpt, "--method=lost", "--out", tmp_path / "out"), capsys)
    assert "holds another result (voc07-tokencut of " in line
    assert (tmp_path / "out" / "discovery.json").read_bytes() == before
    measure(voc, ckpt, "--batch-size=1", "--out", tmp_path / "out")  # the same experiment


def test_the_whole_image_is_a_baseline(voc: Path, ckpt: Path) -> None:
    """A box of more than half of the image's pixels is met by the whole image."""
    hits = [
        any(2 * len(pixels((x0, y0, x1, y1))) >= size[0] * size[1] for (x0, y0, x1, y1), _ in objects)
        for size, objects in VOC.values()
        if objects
    ]
    assert measure(voc, ckpt)["details"]["whole_image"] == pytest.approx(np.mean(hits))


def interrupt(voc: Path, ckpt: Path, out: Path, monkeypatch: pytest.MonkeyPatch, images: int) -> None:
    """Ctrl-C when so many images have been read."""
    reads = 0
    plain = BoxSet.read_image

    def read(self: BoxSet, index: int) -> np.ndarray:
        nonlocal reads
        reads += 1
        if reads > images:
            raise KeyboardInterrupt
        return plain(self, index)

    with monkeypatch.context() as patched:
        patched.setattr(BoxSet, "read_image", read)
        with pytest.raises(SystemExit) as ended:
            main(command(voc, ckpt, "--batch-size=2", "--out", out))
    assert ended.value.code == 130


def test_interrupted_run_is_continued(
    voc: Path, ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undrawn: None
) -> None:
    """Also when the last line was cut off, and with batches of another size."""
    whole = measure(voc, ckpt, "--out", tmp_path / "whole")
    passes = 0
    plain = Backbone.features

    def count(self: Backbone, images: torch.Tensor, *more: Any) -> Any:
        nonlocal passes
        passes += len(images)
        return plain(self, images, *more)

    monkeypatch.setattr(Backbone, "features", count)
    for cut, batch, left in ((0, 2, 2), (40, 3, 3), (-1, 2, 6)):
        out = tmp_path / f"out{cut}"
        interrupt(voc, ckpt, out, monkeypatch, 4)  # batches are a and c; b; d; e and f
        assert [path.name for path in out.iterdir()] == ["found-0.jsonl"]
        content = (out / "found-0.jsonl").read_text()
        assert content.count("\n") == 1 + 4  # the first line says what it is of
        (out / "found-0.jsonl").write_text(content[: len(content) - cut] if cut >= 0 else content[:20])
        passes = 0
        result = measure(voc, ckpt, "--out", out, f"--batch-size={batch}")
        assert passes == left
        assert sorted(path.name for path in out.iterdir()) == FILES[:-1]
        assert found_in(out) == found_in(tmp_path / "whole")
        assert result["value"] == whole["value"]
        assert result["details"] == whole["details"]


def test_interrupted_twice(voc: Path, ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows a line that was cut off is read again."""
    whole = measure(voc, ckpt)
    out = tmp_path / "out"
    interrupt(voc, ckpt, out, monkeypatch, 2)
    path = out / "found-0.jsonl"
    path.write_text(path.read_text()[:-10])
    interrupt(voc, ckpt, out, monkeypatch, 3)
    lines = path.read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines[1:]] == [0, 1, 2, 4]  # then b, and c with e
    result = measure(voc, ckpt, "--out", out)
    assert result["details"] == whole["details"]
    assert sorted(path.name for path in out.iterdir()) == FILES


def test_leftovers_of_another_run_are_not_mixed_in(
    voc: Path,
    ckpt: Path,
    save: Save,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    interrupt(voc, ckpt, out, monkeypatch, 3)
    before = (out / "found-0.jsonl").read_bytes()
    other = save({name: tensor * 1.01 for name, tensor in random_tensors().items()})
    data = tmp_path / "data"
    write_voc(data / "VOC2007")
    flags = [["--method=lost"], ["--features=values"], ["--block=1"], ["--tau=0.3"], ["--size=64"], ["--no-hard"]]
    for arguments in [*(command(voc, ckpt, *more) for more in flags), command(voc, other), command(data, ckpt)]:
        line = refusal(main, [*arguments, "--out", str(out)], capsys)
        assert "found-0.jsonl is of a run with other settings, weights or data: delete it" in line
        assert [path.name for path in out.iterdir()] == ["found-0.jsonl"]
        assert (out / "found-0.jsonl").read_bytes() == before
    for damage in (b"\0" * 30 + b"\n", b"[]\n" * 2, before + b"{}\n"):
        (out / "found-0.jsonl").write_bytes(damage)
        assert "found-0.jsonl is damaged: delete it" in refusal(main, command(voc, ckpt, "--out", out), capsys)


def test_two_processes_find_what_one_does(
    voc: Path, ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From what one process left when it was interrupted, with the last line cut off."""
    one, two = tmp_path / "one", tmp_path / "two"
    alone = measure(voc, ckpt, "--out", one)
    interrupt(voc, ckpt, two, monkeypatch, 4)
    path = two / "found-0.jsonl"
    path.write_text(path.read_text()[:-30])
    first, second = run_group("skipless.eval.discovery", command(voc, ckpt, "--batch-size=1", "--out", two))
    assert "voc07-tokencut" in first.stdout
    assert "voc07" not in second.stdout
    assert sorted(path.name for path in two.iterdir()) == FILES
    result = json.loads((two / "discovery.json").read_text())
    assert result["processes"] == 2
    assert result["value"] == alone["value"]
    assert result["details"] == json.loads(json.dumps(alone["details"]))
    assert found_in(two) == found_in(one)


@pytest.mark.parametrize("method", METHODS)
def test_odd_images_are_searched_like_others(save: Save, tmp_path: Path, method: str) -> None:
    """One color and no positions: all patches are the same, and the object is the image. LOST finds that all patches
    resemble the seed; the others have nothing to cut."""
    flat = save(random_tensors() | {"pos_embed": torch.zeros(1, 65, 192)})
    (tmp_path / "in").mkdir()
    Image.new("RGB", (40, 32), (90, 10, 200)).save(tmp_path / "in" / "color.png")
    Image.new("RGB", (1, 1), (3, 2, 1)).save(tmp_path / "in" / "dot.png")
    picture(800, 16, 0).save(tmp_path / "in" / "panorama.png")
    out = tmp_path / "out"
    flags = ["--method", method, *(["--size=64"] if method == "maskcut" else []), "--out", out]
    result = measure(tmp_path / "in", flat, *flags, name="folder")
    assert result["details"]["degenerate_images"] == (0 if method == "lost" else 2)
    assert result["details"]["nearly_complete_graphs"] == 2
    told = "Images with nothing to cut: 2; the object is the image." in (out / "discovery.md").read_text()
    assert told == (method != "lost")
    found = found_in(out)
    assert [(item["file_name"], item["bbox"]) for item in found[:2]] == [
        ("color.png", [0, 0, 40, 32]),
        ("dot.png", [0, 0, 1, 1]),
    ]
    assert found[2]["file_name"] == "panorama.png"
    for item in found[2:]:
        x, y, width, height = item["bbox"]
        assert 0 <= x < x + width <= 800
        assert 0 <= y < y + height <= 16
    with Image.open(out / "discovery.png") as sheet:
        sheet.load()


def test_images_without_boxes_leave_a_run_without_a_score(ckpt: Path, tmp_path: Path) -> None:
    write_voc(tmp_path / "VOC2007", {"c": VOC["c"]})
    for method in ("tokencut", "maskcut"):
        result = measure(tmp_path, ckpt, "--method", method, "--size=64")
        assert (result["metric"], result["value"]) == (None, None)


@pytest.mark.parametrize("method", ["lost", "tokencut", "maskcut"])
def test_a_key_bias_is_warned_of_and_can_be_left_out(
    voc: Path, ckpt: Path, save: Save, tmp_path: Path, undrawn: None, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    tensors = random_tensors()
    tensors["blocks.1.attn.qkv.bias"][192:384] += 50
    biased = save(tensors)
    flags = ["--method", method, *(["--size=64"] if method == "maskcut" else []), "--out"]
    main(command(voc, biased, *flags, tmp_path / "keys"))
    warned = capsys.readouterr().out
    assert "Warning: in 6 of 6 images nearly all patches count as similar" in warned
    assert "Try --features keys_without_bias." in warned
    assert "Warning: in 6 of 6" in (tmp_path / "keys" / "discovery.md").read_text()
    assert json.loads((tmp_path / "keys" / "discovery.json").read_text())["details"]["nearly_complete_graphs"] == 6

    main(command(voc, biased, "--features=keys_without_bias", *flags, tmp_path / "without"))
    assert "Warning" not in capsys.readouterr().out
    measure(voc, ckpt, *flags, tmp_path / "unbiased")  # its bias is zero
    assert found_in(tmp_path / "without") == found_in(tmp_path / "unbiased")
    result = json.loads((tmp_path / "without" / "discovery.json").read_text())
    assert result["protocol"].startswith(f"voc07-{IDS[method]}/keys_without_bias")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--block=3"], "block 3 does not exist: .* has blocks 1 to 2"),
        (["--block=0"], "block 0 does not exist"),
        (["--block=first"], "blocks is 'first'"),
        (["--every-block", "--block=1"], "leave out blocks '1'"),
        (["--method=lost", "--tau=0.2"], "tau has no effect on lost"),
        (["--tau=2"], "tau is 2.0: choose a cosine between -1 and 1"),
        (["--size=60"], "size is 60; it must be a multiple of the patch, 8 pixels"),
        (["--size=0"], "size is 0; it must be a multiple of the patch"),
        (["--batch-size=0"], "batch-size must be 1 or more"),
        (["--workers=-1"], "workers and seed 0 or more"),
        (["--device=toaster"], "device is 'toaster'; choose auto, cpu"),
        (["--method=cutler"], "cutler"),
        (["--method=lost", "--nonsense=1"], "nonsense"),
        (["--data.names=list.txt"], "data.names is for coco20k"),
        (["--data.split=test"], r"test\.txt: no such split"),
        (["--data.name=voc12"], "VOC2007.*VOC2012|no PASCAL VOC 2012"),
        (["--data.name=coco"], r"instances_val2017\.json: no such file; splits that are there: none"),
        (["--data.name=coco20k"], "coco20k needs data.names"),
        (["--data.name=boxes"], "data.annotations and the data.name boxes belong together, and data.name is boxes"),
        (["--data.annotations=boxes.json"], "belong together, and data.name is voc07"),
        (["--data.name=coco20k", "--data.split=val2014"], "data.split has no effect on coco20k"),
        (["--data.name=folder", "--data.split=val"], "data.split has no effect on folder"),
        (["--data.name=coco", "--no-hard"], "no-hard: coco does not tell"),
        (["--data.root=/no/such/folder"], "/no/such/folder: no such folder"),
        (["--ckpt=/no/such/run"], "/no/such/run: no such checkpoint"),
    ],
)
def test_wrong_settings_are_one_sentence(
    voc: Path, ckpt: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    line = refusal(main, [*command(voc, ckpt), *flags], capsys)
    assert re.search(message, line), line


def test_data_that_cannot_be_used_are_one_sentence(
    voc: Path, ckpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty: no image found" in refusal(main, command(tmp_path / "empty", ckpt, name="folder"), capsys)

    write_voc(tmp_path / "hard" / "VOC2007", {"d": VOC["d"]})
    line = refusal(main, command(tmp_path / "hard", ckpt, "--no-hard"), capsys)
    assert "voc07 trainval: no box is left without the difficult and truncated ones" in line

    write_voc(tmp_path / "cut" / "VOC2007")
    path = tmp_path / "cut" / "VOC2007" / "JPEGImages" / "e.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    for workers in (0, 1):
        out = tmp_path / f"out{workers}"
        line = refusal(main, command(tmp_path / "cut", ckpt, "--workers", workers, "--out", out), capsys)
        assert line.startswith(f"{path}: truncated JPEG")
        assert not {path.name for path in out.iterdir()} & set(FILES)


def test_a_crowd_alone_is_no_object(coco: Path, ckpt: Path, tmp_path: Path, undrawn: None) -> None:
    path = tmp_path / "annotations" / "instances_val2017.json"
    path.parent.mkdir()
    content = json.loads((coco / "annotations" / "instances_val2017.json").read_text())
    content["images"] = [image for image in content["images"] if image["id"] == 8]
    content["annotations"] = [item for item in content["annotations"] if item["image_id"] == 8]
    path.write_text(json.dumps(content))
    (tmp_path / "val2017").symlink_to(coco / "val2017")
    for method in ("lost", "maskcut"):
        out = tmp_path / method
        result = measure(tmp_path, ckpt, "--method", method, "--size=64", "--out", out, name="coco")
        assert (result["images"], result["metric"], result["value"]) == (1, None, None)
        assert found_in(out)[0]["image_id"] == 8


def test_boxes_of_ones_own(coco: Path, ckpt: Path, tmp_path: Path, undrawn: None) -> None:
    """In a file of any name, of images in any folders: as COCO's."""
    content = json.loads((coco / "annotations" / "instances_val2017.json").read_text())
    for image in content["images"]:
        image["file_name"] = f"val2017/{image['file_name']}"
    path = tmp_path / "birds.json"
    path.write_text(json.dumps(content))
    for method in ("tokencut", "maskcut"):
        flags = ["--method", method, "--size=64"]
        theirs = measure(coco, ckpt, *flags, name="coco")
        own = measure(coco, ckpt, *flags, "--data.annotations", path, name="boxes")
        assert own["protocol"] == theirs["protocol"].replace("coco-", "boxes-")
        assert (own["dataset"], own["split"], own["official_images"]) == ("boxes", "birds", None)
        assert (own["images"], own["value"]) == (theirs["images"], theirs["value"])


@pytest.mark.parametrize("masks", [None, [], [[8, 8, 40]], [[8, 8, 40, 38]]])
def test_where_an_object_has_no_mask_its_box_stands_for_it(coco: Path, tmp_path: Path, masks: Any) -> None:
    """Here the masks are boxes, so that perfect detections keep an AP of 1."""
    truth = coco / "annotations" / "instances_val2017.json"
    content = json.loads(truth.read_text())
    content["annotations"][3]["segmentation"] = masks
    path = tmp_path / "instances_val2017.json"
    path.write_text(json.dumps(content))
    images = coco_boxes(path, coco / "val2017")
    score = coco_ap(images, path, perfect(truth, images))
    assert (score["value"], score["details"]["masks_from_boxes"]) == (pytest.approx(1), 1)


@pytest.mark.parametrize("ids", [[0, 1, 2, 3], [5, 5, 5, 5], ["a", None, -1, 1.5]])
def test_ids_of_annotations_change_nothing(coco: Path, tmp_path: Path, ids: list[Any]) -> None:
    """pycocotools alone gives a perfect detector less, as 0 is its "no match" and two of one id are one to it."""
    truth = coco / "annotations" / "instances_val2017.json"
    content = json.loads(truth.read_text())
    for number, item in zip(ids, content["annotations"], strict=True):
        item["id"] = number
    path = tmp_path / "instances_val2017.json"
    path.write_text(json.dumps(content))
    images = coco_boxes(path, coco / "val2017")
    score = coco_ap(images, path, perfect(truth, images))["details"]
    assert (score["mask_ap"], score["box_ap"]) == (pytest.approx(1), pytest.approx(1))


def test_an_image_whose_graph_does_not_fit_into_memory_is_named(
    voc: Path, ckpt: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backbones, "host_memory", lambda: 16)
    line = refusal(main, command(voc, ckpt), capsys)
    assert "patches; to compare each with each takes" in line
    assert "give a smaller --size" in line


def test_nan_is_not_searched(
    voc: Path,
    save: Save,
    ckpt: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tensors = random_tensors()
    tensors["blocks.0.mlp.fc1.weight"][3, 5] = torch.nan
    assert "has NaN or infinite weights, in blocks.0.mlp.fc1.weight" in refusal(
        main, command(voc, save(tensors)), capsys
    )
    tensors = random_tensors()
    tensors["blocks.0.mlp.fc2.bias"].fill_(3e38)
    line = refusal(main, command(voc, save(tensors), "--out", tmp_path / "out"), capsys)
    assert "a.jpg: keys of block 2 of " in line
    assert line.endswith("are NaN or infinite; check the checkpoint")
    assert list((tmp_path / "out").iterdir()) == []

    plain = Backbone.features

    def poisoned(self: Backbone, images: torch.Tensor, *more: Any) -> Any:
        found = plain(self, images, *more)
        if len(images) == 4:
            found[0].patches[2, 1, 1, 7] = torch.inf
        return found

    monkeypatch.setattr(Backbone, "features", poisoned)  # the third image of a, c, e and f
    line = refusal(main, command(voc, ckpt, "--every-block"), capsys)
    assert "e.jpg: keys of block 1 of " in line


def test_the_published_settings_are_the_defaults() -> None:
    found = cli.parse(Settings, ["--ckpt=x", "--data.name=voc07", "--data.root=x"])
    assert (found.method, found.features, found.block) == ("tokencut", "auto", "last")
    assert (found.size, found.tau) == (None, None)
    assert (found.no_hard, found.every_block, found.untrained) == (False, False, False)


def test_a_dangling_link_in_a_folder_is_left_out_and_said(
    ckpt: Path, tmp_path: Path, undrawn: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    picture(64, 40, 0).save(tmp_path / "in/a.png")
    (tmp_path / "in/gone.png").symlink_to("nowhere.png")
    found = measure(tmp_path / "in", ckpt, name="folder")
    assert len(found["details"]["unreadable"]) == 1
    assert "gone.png" in found["details"]["unreadable"][0]
