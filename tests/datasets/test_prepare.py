"""Every public data set from miniature archives with the real names inside, as this project's own readers open them."""

import hashlib
import importlib
import io
import json
import re
import shlex
import shutil
import tempfile
import zipfile
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision
from helpers import refusal, write_archive
from PIL import Image
from scipy.io import savemat

from skipless.common import cli
from skipless.datasets import prepare as command
from skipless.datasets.labels.ade20k import ade20k
from skipless.datasets.labels.classes import LabeledData, open_splits
from skipless.datasets.labels.coco import coco20k, coco_stuff
from skipless.datasets.labels.context import pascal_context
from skipless.datasets.labels.counts import BOX_COUNTS, COUNTS
from skipless.datasets.labels.depth import split_rows
from skipless.datasets.labels.voc import voc_boxes, voc_segmentation
from skipless.datasets.prepare import Settings, main, prepare
from skipless.datasets.public import builders, downloads
from skipless.datasets.public.downloads import DamagedArchive
from skipless.datasets.public.sets import DATA_SETS, DataSet, Part
from skipless.eval import discovery

Files = Mapping[str, bytes]


def jpg(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((6, 8), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


XML = b"<annotation><object><name>cat</name><bndbox><xmin>2</xmin><ymin>3</ymin><xmax>5</xmax><ymax>6</ymax></bndbox>"
XML += b"<difficult>1</difficult></object></annotation>"


def lists(folder: str, **splits: str) -> Files:
    return {
        f"{folder}/{split}.txt": "".join(f"{name}\n" for name in names.split()).encode()
        for split, names in splits.items()
    }


def voc07() -> Mapping[str, Files]:
    voc = "VOCdevkit/VOC2007"
    made = {}
    for archive, split, names in (
        ("VOCtrainval_06-Nov-2007.tar", "trainval", "000005 000007"),
        ("VOCtest_06-Nov-2007.tar", "test", "000001"),
    ):
        made[archive] = {
            **{f"{voc}/JPEGImages/{name}.jpg": jpg() for name in names.split()},
            **{f"{voc}/Annotations/{name}.xml": XML for name in names.split()},
            **lists(f"{voc}/ImageSets/Main", **{split: names}),
        }
    return made


def sbd(value: int) -> bytes:
    """As SBD's: a struct in a struct's place, with more than the segmentation."""
    buffer = io.BytesIO()
    mask = np.full((6, 8), value, np.uint8)
    savemat(buffer, {"GTcls": {"Boundaries": np.zeros(3), "Segmentation": mask, "CategoriesPresent": [[value]]}})
    return buffer.getvalue()


def voc12() -> Mapping[str, Files]:
    voc, dataset = "VOCdevkit/VOC2012", "benchmark_RELEASE/dataset"
    return {
        "VOCtrainval_11-May-2012.tar": {
            **{f"{voc}/JPEGImages/{name}.jpg": jpg() for name in ("t1", "t2", "v1", "s1", "s2")},
            **{f"{voc}/Annotations/{name}.xml": XML for name in ("t1", "t2", "v1", "s1")},
            **{f"{voc}/SegmentationClass/{name}.png": png(9) for name in ("t1", "t2", "v1")},
            **lists(f"{voc}/ImageSets/Segmentation", train="t1 t2", val="v1", trainval="t1 t2 v1"),
            **lists(f"{voc}/ImageSets/Main", train="t1", val="v1 s1", trainval="t1 v1 s1"),
        },
        # SBD has other masks for images of VOC's own: one of train, one of val.
        "benchmark.tgz": {
            **{f"{dataset}/cls/{name}.mat": sbd(value) for name, value in (("s1", 3), ("s2", 4), ("t1", 5), ("v1", 6))},
            f"{dataset}/inst/s1.mat": sbd(1),
            f"{dataset}/img/s1.jpg": jpg(),
            **lists(dataset, train="s1 t1", val="s2 v1"),
        },
    }


def instances(*names: str) -> bytes:
    ids = [int(Path(name).stem.rpartition("_")[2]) for name in names]
    return json.dumps(
        {
            "images": [
                {"id": i, "file_name": name, "height": 6, "width": 8} for i, name in zip(ids, names, strict=True)
            ],
            "annotations": [
                {"id": n, "image_id": i, "category_id": 1, "bbox": [1, 2, 3.4, 2.6], "iscrowd": 0, "area": 8}
                for n, i in enumerate(ids, 1)
            ],
            "categories": [{"id": 1, "name": "person"}],
        }
    ).encode()


def coco_20k() -> Mapping[str, Files]:
    names = [f"COCO_train2014_{number:012}.jpg" for number in (9, 25, 30)]
    return {
        "coco_20k_filenames.txt": {"coco_20k_filenames.txt": f"train2014/{names[2]}\ntrain2014/{names[0]}\n".encode()},
        "train2014.zip": {"train2014/": b"", **{f"train2014/{name}": jpg() for name in names}},
        "annotations_trainval2014.zip": {
            "annotations/instances_train2014.json": instances(*names),
            "annotations/captions_train2014.json": b"{}",
        },
    }


def coco_val2017() -> Mapping[str, Files]:
    return {
        "val2017.zip": {"val2017/": b"", "val2017/000000000139.jpg": jpg()},
        "annotations_trainval2017.zip": {
            "annotations/instances_train2017.json": b"{}",
            "annotations/instances_val2017.json": instances("000000000139.jpg"),
        },
    }


def coco_stuff_maps() -> Mapping[str, Files]:
    return {
        "train2017.zip": {f"train2017/{name}.jpg": jpg() for name in ("000000000009", "000000000025")},
        "val2017.zip": coco_val2017()["val2017.zip"],
        "stuffthingmaps_trainval2017.zip": {
            "train2017/000000000009.png": png(0),
            "train2017/000000000025.png": png(181),
            "val2017/000000000139.png": png(255),
        },
    }


def ade() -> Mapping[str, Files]:
    top = "ADEChallengeData2016"
    rows = "".join(f"{n}\t0.1\t1\t1\tname{n}, other\n" for n in range(1, 151))
    files = {
        f"{top}/objectInfo150.txt": f"Idx\tRatio\tTrain\tVal\tName\n{rows}".encode(),
        f"{top}/sceneCategories.txt": b"ADE_train_00000001 airport_terminal\n",
    }
    for folder, short, count in (("training", "train", 2), ("validation", "val", 1)):
        for number in range(1, count + 1):
            files[f"{top}/images/{folder}/ADE_{short}_{number:08}.jpg"] = jpg()
            files[f"{top}/annotations/{folder}/ADE_{short}_{number:08}.png"] = png(number)
    return {"ADEChallengeData2016.zip": files}


def mat(**values: Any) -> bytes:
    buffer = io.BytesIO()
    savemat(buffer, values)
    return buffer.getvalue()


def city_files() -> Mapping[str, Files]:
    names = {"train": "ulm/ulm_000000_000019", "val": "bonn/bonn_000000_000019"}
    return {
        "leftImg8bit_trainvaltest.zip": {
            "license.txt": b"",
            **{f"leftImg8bit/{split}/{name}_leftImg8bit.png": png(3) for split, name in names.items()},
        },
        "gtFine_trainvaltest.zip": {
            f"gtFine/{split}/{name}_gtFine_{kind}.png": png(26)
            for split, name in names.items()
            for kind in ("labelIds", "color")
        },
    }


def context() -> Mapping[str, Files]:
    voc = "VOCdevkit/VOC2010"
    return {
        "VOCtrainval_03-May-2010.tar": {
            **{f"{voc}/JPEGImages/{name}.jpg": jpg() for name in "abc"},
            **{f"{voc}/Annotations/{name}.xml": XML for name in "abc"},
            **lists(f"{voc}/ImageSets/Main", train="a b", val="c"),
        },
        "trainval.tar.gz": {
            "labels.txt": b"",
            **{f"trainval/{name}.mat": mat(LabelMap=np.full((6, 8), 458, np.uint16)) for name in "ac"},
        },
    }


def videos() -> Mapping[str, Files]:
    files = lists("DAVIS/ImageSets/2017", train="bear", val="bike")
    for name in ("bear", "bike"):
        files = {**files, **{f"DAVIS/JPEGImages/480p/{name}/{i:05}.jpg": jpg(i) for i in range(3)}}
        files = {**files, **{f"DAVIS/Annotations/480p/{name}/{i:05}.png": png(1) for i in range(3)}}
    return {"DAVIS-2017-trainval-480p.zip": files}


def nyu() -> Mapping[str, Files]:
    name = "nyu_depth_v2_labeled.mat"
    return {name: {name: b"HDF"}, "splits.mat": {"splits.mat": mat(trainNdxs=[[1], [3]], testNdxs=[[2]])}}


def pairs() -> Mapping[str, Files]:
    side = {"imname": "a.jpg", "imsize": [8, 6, 3], "bndbox": [1, 1, 7, 5], "kps": [[2, 3]]}
    pair = {"category": "cat"} | {f"{end}_{name}": value for end in ("src", "trg") for name, value in side.items()}
    top = "SPair-71k"
    return {
        "SPair-71k.tar.gz": {
            f"{top}/JPEGImages/cat/a.jpg": jpg(),
            f"{top}/PairAnnotation/test/1.json": json.dumps(pair).encode(),
        }
    }


def ecssd() -> Mapping[str, Files]:
    return {
        "images.zip": {"images/0001.jpg": jpg()},
        "ground_truth_mask.zip": {"ground_truth_mask/0001.png": png(255)},
    }


def duts() -> Mapping[str, Files]:
    return {"DUTS-TE.zip": {"DUTS-TE/DUTS-TE-Image/a.jpg": jpg(), "DUTS-TE/DUTS-TE-Mask/a.png": png(255)}}


def imagenette() -> Mapping[str, Files]:
    top = "imagenette2-320"
    return {
        "imagenette2-320.tgz": {
            f"{top}/noisy_imagenette.csv": b"",
            **{f"{top}/train/{wnid}/{wnid}_{n}.JPEG": jpg() for wnid in ("n01440764", "n02102040") for n in (1, 2)},
            **{
                f"{top}/val/{wnid}/ILSVRC2012_val_0000{n}.JPEG": jpg()
                for n, wnid in ((1, "n02102040"), (2, "n01440764"))
            },
        }
    }


def tiny_imagenet() -> Mapping[str, Files]:
    top = "tiny-imagenet-200"
    files = {f"{top}/wnids.txt": b"n02\nn01\n", f"{top}/words.txt": b"", f"{top}/test/images/test_0.JPEG": jpg()}
    for wnid in ("n01", "n02"):
        files[f"{top}/train/{wnid}/{wnid}_boxes.txt"] = b""
        files |= {f"{top}/train/{wnid}/images/{wnid}_{n}.JPEG": jpg() for n in range(2)}
    files |= {f"{top}/val/images/val_{n}.JPEG": jpg(n) for n in range(3)}
    files[f"{top}/val/val_annotations.txt"] = (
        b"val_0.JPEG\tn02\t0\t1\t2\t3\nval_1.JPEG\tn01\t0\t1\t2\t3\nval_2.JPEG\tn02\t0\t1\t2\t3\n"
    )
    return {"tiny-imagenet-200.zip": files}


def tar(files: Files) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return write_archive(Path(folder, "a.tar"), files).read_bytes()


def imagenet() -> Mapping[str, Files]:
    """meta.mat lists leaves in the order of their ids, which is not the alphabetical one, and then their parents."""
    buffer = io.BytesIO()
    rows = [(1, "n02119789", 0), (2, "n01440764", 0), (3, "n00001740", 2)]
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    synsets = np.array([[(number, wnid, "a fox, say", children)] for number, wnid, children in rows], kind)
    savemat(buffer, {"synsets": synsets})
    devkit = "ILSVRC2012_devkit_t12"
    return {
        "ILSVRC2012_img_val.tar": {f"ILSVRC2012_val_{n:08}.JPEG": jpg(n) for n in (3, 1, 2)},
        "ILSVRC2012_devkit_t12.tar.gz": {
            f"{devkit}/data/meta.mat": buffer.getvalue(),
            f"{devkit}/data/ILSVRC2012_validation_ground_truth.txt": b"2\n2\n1\n",
            f"{devkit}/readme.txt": b"",
        },
        "ILSVRC2012_img_train.tar": {
            f"{wnid}.tar": tar({f"{wnid}_{n}.JPEG": jpg() for n in range(2)}) for wnid in ("n01440764", "n02119789")
        },
    }


MINIATURES: dict[str, tuple[Callable[[], Mapping[str, Files]], dict[str, dict[str, int]]]] = {
    "voc07": (voc07, {"VOCdevkit/VOC2007": {"trainval": 2, "test": 1}}),
    "voc12": (
        voc12,
        {
            "VOCdevkit/VOC2012": {"train": 2, "val": 1, "trainval": 3},
            "VOCdevkit/VOC2012/SegmentationClassAug": {"masks": 4},
            "VOCdevkit/VOC2012/ImageSets/Segmentation/trainaug.txt": {"trainaug": 4},
        },
    ),
    "coco20k": (coco_20k, {"coco/coco_20k_filenames.txt": {"names": 2}, "coco/train2014": {"train2014": 2}}),
    "coco-val2017": (coco_val2017, {"coco/val2017": {"val2017": 1}}),
    "coco-stuff": (
        coco_stuff_maps,
        {
            "coco/train2017": {"train2017": 2},
            "coco/val2017": {"val2017": 1},
            "coco/stuffthingmaps": {"train": 2, "val": 1},
        },
    ),
    "ade20k": (ade, {"ADEChallengeData2016": {"train": 2, "val": 1}}),
    "cityscapes": (city_files, {f"cityscapes/{f}": {"train": 1, "val": 1} for f in ("leftImg8bit", "gtFine")}),
    "pascal-context": (
        context,
        {
            "VOCdevkit/VOC2010": {"train": 2, "val": 1},
            "VOCdevkit/VOC2010/SegmentationClassContext": {"masks": 2},
            "VOCdevkit/VOC2010/ImageSets/SegmentationContext": {"train": 1, "val": 1},
        },
    ),
    "davis17": (videos, {"DAVIS": {"train": 1, "val": 1}}),
    "nyuv2": (nyu, {"NYUv2": {"train": 2, "test": 1}}),
    "spair": (pairs, {"SPair-71k": {"test": 1}}),
    "ecssd": (ecssd, {"ECSSD/images": {"images": 1}, "ECSSD/ground_truth_mask": {"masks": 1}}),
    "duts-te": (duts, {"DUTS-TE": {"all": 1}}),
    "imagenette": (imagenette, {"imagenette": {"train": 4, "val": 2}}),
    "tiny-imagenet": (tiny_imagenet, {"tiny-imagenet": {"train": 4, "val": 3}}),
    "imagenet": (imagenet, {"imagenet/val": {"val": 3}, "imagenet/train": {"train": 4}}),
}


def miniature(name: str, folder: Path) -> dict[str, DataSet]:
    """The real table's entry with sizes, checksums and counts of miniature archives, which are written to `folder`."""
    make, counts = MINIATURES[name]
    folder.mkdir(parents=True, exist_ok=True)
    for archive, files in make().items():
        if archive.endswith((".txt", ".mat")):  # no archive, but its one file
            (folder / archive).write_bytes(files[archive])
        else:
            write_archive(folder / archive, files)

    def shrink(part: Part) -> Part:
        archives = []
        for archive in part.archives:
            content = (folder / archive.name).read_bytes()
            checksum = archive.checksum and f"md5:{hashlib.md5(content).hexdigest()}"
            archives.append(replace(archive, size=len(content), checksum=checksum, urls=()))
        return replace(part, archives=tuple(archives), expected=counts.get(part.place, part.expected), disk=1000)

    return {name: replace(DATA_SETS[name], parts=tuple(shrink(part) for part in DATA_SETS[name].parts))}


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def prepare_with(name: str, root: Path, table: Mapping[str, DataSet], **settings: Any) -> None:
    prepare(Settings(name, root, **settings), table)


def make(name: str, tmp_path: Path) -> Path:
    table = miniature(name, tmp_path / "mine")
    before = tree(tmp_path / "mine")
    prepare_with(name, tmp_path / "data", archives=tmp_path / "mine", table=table)
    assert tree(tmp_path / "mine") == before, "somebody else's archives were changed"
    return tmp_path / "data"


def test_voc07(tmp_path: Path) -> None:
    root = make("voc07", tmp_path)
    trainval = voc_boxes(root / "VOCdevkit", "trainval", 2007)
    assert trainval.names == ("000005", "000007")
    assert voc_boxes(root / "VOCdevkit", "test", 2007).names == ("000001",)
    assert trainval.boxes[0].tolist() == [[1, 2, 5, 6]]
    assert trainval.read_image(0).shape == (6, 8, 3)


def test_voc12_and_trainaug(tmp_path: Path) -> None:
    root = make("voc12", tmp_path) / "VOCdevkit"
    assert voc_segmentation(root, "train").names == ("t1", "t2")
    assert voc_segmentation(root, "val").read_mask(0).tolist() == [[9] * 8] * 6
    assert voc_boxes(root, "trainval", 2012).names == ("t1", "v1", "s1")
    augmented = voc_segmentation(root, "trainaug")
    # VOC's own masks (9) where there are any; no image of val.
    assert {n: int(augmented.read(i)[1][0, 0]) for i, n in enumerate(augmented.names)} == {
        "s1": 3, "s2": 4, "t1": 9, "t2": 9,
    }  # fmt: skip
    with Image.open(root / "VOC2012/SegmentationClassAug/s1.png") as mask:
        assert mask.convert("RGB").getpixel((0, 0)) == (128, 128, 0)  # VOC's color of class 3, bird


def test_voc12_where_voc_is_there_already(tmp_path: Path) -> None:
    table = miniature("voc12", tmp_path / "mine")
    write_archive(tmp_path / "VOC.zip", voc12()["VOCtrainval_11-May-2012.tar"])
    with zipfile.ZipFile(tmp_path / "VOC.zip") as archive:
        archive.extractall(tmp_path / "data")
    (tmp_path / "mine" / "VOCtrainval_11-May-2012.tar").unlink()
    prepare_with("voc12", tmp_path / "data", archives=tmp_path / "mine", table=table)
    assert len(voc_segmentation(tmp_path / "data", "trainaug")) == 4


def test_coco20k(tmp_path: Path) -> None:
    root = make("coco20k", tmp_path) / "coco"
    found = coco20k(root, root / "coco_20k_filenames.txt")
    assert found.ids == (30, 9)
    assert found.boxes[0].tolist() == [[1, 2, 4, 5]]  # 1 + 3.4 and 2 + 2.6, rounded
    assert found.read_image(1).shape == (6, 8, 3)
    assert len(list((root / "train2014").iterdir())) == 2, "only the named images are worth the disk"
    assert [path.name for path in (root / "annotations").iterdir()] == ["instances_train2014.json"]


def test_coco_val2017(tmp_path: Path) -> None:
    root = make("coco-val2017", tmp_path) / "coco"
    found, _ = discovery.open_data(discovery.DataSettings("coco", str(root)))
    assert found.ids == (139,)
    assert found.read_image(0).shape == (6, 8, 3)


def test_coco_stuff(tmp_path: Path) -> None:
    root = make("coco-stuff", tmp_path) / "coco"
    train = coco_stuff(root, "train", 171)
    assert [train.classes[train.read(i)[1][0, 0]] for i in range(2)] == ["person", "wood"]  # ids 1 and 182
    assert coco_stuff(root, "val", 27).read(0)[1][0, 0] == 255


def test_ade20k(tmp_path: Path) -> None:
    train = ade20k(make("ade20k", tmp_path) / "ADEChallengeData2016", "train")
    assert train.names == ("ADE_train_00000001", "ADE_train_00000002")
    assert train.read(1)[1][0, 0] == 1  # value 2
    assert len(ade20k(tmp_path / "data", "val")) == 1


def test_pascal_context(tmp_path: Path) -> None:
    """Of three images two have masks, all of the 458th label, which is the last of the 59."""
    train = pascal_context(make("pascal-context", tmp_path) / "VOCdevkit", "train")
    assert train.names == ("a",)
    assert train.classes[train.read(0)[1][0, 0]] == "wood"


def test_nyuv2(tmp_path: Path) -> None:
    root = make("nyuv2", tmp_path) / "NYUv2"
    assert (root / "nyu_depth_v2_labeled.mat").read_bytes() == b"HDF"
    assert split_rows(root / "splits.mat", "train") == (0, 2)


@pytest.mark.parametrize(
    ("name", "train_classes", "val_files"),
    [
        ("imagenette", ["n01440764"] * 2 + ["n02102040"] * 2, ["n01440764/00002", "n02102040/00001"]),
        ("tiny-imagenet", ["n01"] * 2 + ["n02"] * 2, ["n01/val_1", "n02/val_0", "n02/val_2"]),
        # ground truth 2, 2, 1 where 1 is n02119789 and 2 is n01440764
        (
            "imagenet",
            ["n01440764"] * 2 + ["n02119789"] * 2,
            ["n01440764/00000001", "n01440764/00000002", "n02119789/00000003"],
        ),
    ],
)
def test_class_folders(tmp_path: Path, name: str, train_classes: list[str], val_files: list[str]) -> None:
    root = make(name, tmp_path) / name
    train, val = open_splits(LabeledData(str(root)))
    assert [train.classes[label] for label in train.labels] == train_classes
    short = [path.relative_to(root / "val").as_posix().replace("ILSVRC2012_val_", "") for path in val.places]
    assert short == [f"{file}.JPEG" for file in val_files]
    assert [val.classes[label] for label in val.labels] == [Path(file).parts[0] for file in val_files]
    assert train.read(3).shape == val.read(0).shape == (6, 8, 3)


@pytest.mark.parametrize("name", DATA_SETS)
def test_plan_then_data_set_then_nothing_to_do(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A plan writes nothing, a second call does nothing, and the next command is one that its script accepts."""
    root = tmp_path / "a b" / "data"
    table = miniature(name, tmp_path / "a b" / "mine")
    before = tree(tmp_path)
    prepare_with(name, root, archives=tmp_path / "a b" / "mine", dry_run=True, table=table)
    assert tree(tmp_path) == before
    printed = capsys.readouterr().out
    assert DATA_SETS[name].terms in printed
    assert "disk: " in printed

    make(name, tmp_path / "a b")
    first = capsys.readouterr().out.splitlines()
    files = {path: path.stat().st_mtime_ns for path in sorted(root.rglob("*"))}
    assert not [path for path in files if "unfinished" in path.name or path.name == "downloads"]
    prepare_with(name, root, table=table)
    second = capsys.readouterr().out.splitlines()
    assert {path: path.stat().st_mtime_ns for path in sorted(root.rglob("*"))} == files
    assert second[0].endswith("Nothing to do.")
    assert second[1:] == first[-1:]

    words = shlex.split(first[-1].removeprefix("next: "))
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    room, _, name = words[script].removesuffix(".py").partition("/")
    command = importlib.import_module(f"skipless.{room}.{name}")
    settings: Any = cli.parse(command.Settings, words[script + 1 :])
    path = settings.data.path if hasattr(settings.data, "path") else settings.data.root
    assert Path(path).is_dir()
    assert Path(path).is_relative_to(root)


def test_plan_says_how_much_and_how_long(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with disk_of(10**12):
        main(["coco-stuff", "--root", str(tmp_path / "new"), "--dry_run"])
    printed = capsys.readouterr().out
    assert "train2017.zip: 19.3 GB from s3.amazonaws.com" in printed
    assert "download: 20.8 GB, about 17 min at 20 MB/s" in printed  # 20.84e9 / 20e6 / 60 = 17.4
    # Images of train, of val and all maps; and for the peak, train2017.zip, which goes when its images are unpacked.
    assert "disk: 38.9 GB while it works, 21.4 GB in the end; 1000.0 GB are free" in printed
    assert re.search(r"stuffthingmaps\S+: 690 MB from \S+, neither checksum nor exact size are published", printed)
    with disk_of(10**12):
        main(["coco-stuff", "--root", str(tmp_path / "new"), "--dry-run", "--keep_archives"])
    assert "disk: 42.3 GB while it works, 42.3 GB in the end" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


Usage = namedtuple("Usage", "total used free")


@contextmanager
def disk_of(free: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: Usage(10**15, 0, free))
        yield


def test_disk_too_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with disk_of(1_900_000_000):
        sentence = refusal(main, ["voc07", "--root", tmp_path / "data"], capsys)
    assert sentence == f"{tmp_path}: 1.9 GB are free and 1.9 GB needed; make room or give another --root"
    assert list(tmp_path.iterdir()) == []


def test_imagenet_has_to_be_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sentence = refusal(main, ["imagenet", "--root", tmp_path / "data"], capsys)
    for words in ("ILSVRC2012_img_train.tar", "image-net.org", "--archives FOLDER"):
        assert words in sentence
    assert "no such folder" in refusal(main, ["imagenet", "--archives", tmp_path / "none"], capsys)
    assert list(tmp_path.iterdir()) == []


def test_sites_that_cannot_be_reached(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = miniature("ade20k", tmp_path / "mine")
    part = table["ade20k"].parts[0]
    gone = replace(part.archives[0], urls=("http://127.0.0.1:9/ADEChallengeData2016.zip",))
    monkeypatch.setitem(DATA_SETS, "ade20k", replace(table["ade20k"], parts=(replace(part, archives=(gone,)),)))
    sentence = refusal(main, ["ade20k", "--root", tmp_path / "data"], capsys)
    assert "fetch http://127.0.0.1:9/ADEChallengeData2016.zip by other means" in sentence
    assert "--archives FOLDER" in sentence
    main(["ade20k", "--root", str(tmp_path / "data"), "--archives", str(tmp_path / "mine")])
    assert len(ade20k(tmp_path / "data", "train")) == 2


def download_from(folder: Path) -> Callable[..., Path]:
    """What `download` does, from a folder instead of a site."""

    def download(archive: downloads.Archive, into: Path, mirror: str | None = None) -> Path:
        into.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(folder / archive.name, into))

    return download


@pytest.mark.parametrize("keep", [True, False])
def test_archives_go_unless_they_are_to_be_kept(tmp_path: Path, keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    table = miniature("voc12", tmp_path / "site")
    monkeypatch.setattr(command, "download", download_from(tmp_path / "site"))
    prepare_with("voc12", tmp_path / "data", mirror="http://site", keep_archives=keep, table=table)
    left = [".fetched", "VOCtrainval_11-May-2012.tar", "benchmark.tgz"] if keep else None
    folder = tmp_path / "data" / "downloads"
    assert (sorted(path.name for path in folder.iterdir()) if folder.exists() else None) == left


@pytest.mark.parametrize("named", [True, False])
def test_archives_that_the_user_put_among_the_downloads_stay(tmp_path: Path, named: bool) -> None:
    folder = tmp_path / "data" / "downloads"
    table = miniature("ade20k", folder)
    prepare_with("ade20k", tmp_path / "data", archives=folder if named else None, table=table)
    assert [path.name for path in folder.iterdir()] == ["ADEChallengeData2016.zip"]


def test_stopped_while_unpacking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing half-made is left in a place, nothing is fetched again, and the same command finishes."""
    table = miniature("voc07", tmp_path / "site")
    monkeypatch.setitem(DATA_SETS, "voc07", table["voc07"])
    monkeypatch.setattr(command, "download", download_from(tmp_path / "site"))
    arguments = ["voc07", "--root", str(tmp_path / "data"), "--mirror", "http://site"]
    unpack = builders.unpack
    with monkeypatch.context() as patch:

        def stop_at_second(path: Path, *rest: object) -> None:
            unpack(path, *rest)  # type: ignore[arg-type]
            if "test" in path.name:
                raise KeyboardInterrupt

        patch.setattr(builders, "unpack", stop_at_second)
        with pytest.raises(SystemExit) as caught:
            main(arguments)
    assert caught.value.code == 130
    assert "same command goes on" in capsys.readouterr().err
    assert set(tree(tmp_path / "data")) == {
        "VOCdevkit", "downloads", "downloads/.fetched",
        "downloads/VOCtest_06-Nov-2007.tar", "downloads/VOCtrainval_06-Nov-2007.tar",
    }  # fmt: skip
    # A process that was killed leaves its folder, too, which the next one replaces.
    (tmp_path / "data/VOCdevkit/.VOC2007.unfinished/VOCdevkit/VOC2007/JPEGImages").mkdir(parents=True)
    monkeypatch.setattr(command, "download", None)
    main(arguments)
    assert set(tree(tmp_path / "data")) == {"VOCdevkit"} | {
        f"VOCdevkit/{name}" for name in tree(tmp_path / "data" / "VOCdevkit")
    }
    assert len(voc_boxes(tmp_path / "data", "test", 2007)) == 1
    assert not list((tmp_path / "data").rglob(".*"))


def test_archive_that_lacks_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = miniature("ade20k", tmp_path / "mine")
    data = table["ade20k"]
    table = {"ade20k": replace(data, parts=(replace(data.parts[0], expected={"train": 3, "val": 1}),))}
    with pytest.raises(ValueError, match=r"gives 2 of 3 \(train\) for ADEChallengeData2016; the archives were left"):
        prepare_with("ade20k", tmp_path / "data", archives=tmp_path / "mine", table=table)
    assert tree(tmp_path / "data") == {}
    monkeypatch.setattr(command, "download", download_from(tmp_path / "mine"))
    # One that fits its published checksum would be the same if it were fetched again.
    with pytest.raises(ValueError, match="the archives were left"):
        prepare_with("ade20k", tmp_path / "data", mirror="http://site", table=table)
    part = table["ade20k"].parts[0]
    unsure = replace(part, archives=(replace(part.archives[0], checksum=None),))
    with pytest.raises(ValueError, match="zip was removed: run the same command again"):
        prepare_with("ade20k", tmp_path / "data", table={"ade20k": replace(data, parts=(unsure,))})
    assert [path.name for path in (tmp_path / "data" / "downloads").iterdir()] == [".fetched"]


def test_wrong_archives_of_the_user_are_left_alone(tmp_path: Path) -> None:
    table = miniature("ade20k", tmp_path / "mine")
    path = tmp_path / "mine" / "ADEChallengeData2016.zip"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"its md5 is .*; remove or replace it"):
        prepare_with("ade20k", tmp_path / "data", archives=tmp_path / "mine", table=table)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"has [\d,]+ bytes, and .*; remove or replace it"):
        prepare_with("ade20k", tmp_path / "data", archives=tmp_path / "mine", table=table)
    assert path.exists()
    assert not (tmp_path / "data").exists()


def test_incomplete_copy_is_left_alone(tmp_path: Path) -> None:
    root = make("ade20k", tmp_path)
    (root / "ADEChallengeData2016/annotations/training/ADE_train_00000002.png").unlink()
    before = tree(root)
    with pytest.raises(ValueError, match=r"an incomplete copy, with 1 of 2 \(train\), is left as it is; move it away"):
        prepare_with("ade20k", root, archives=tmp_path / "mine", table=miniature("ade20k", tmp_path / "mine"))
    assert tree(root) == before


def test_names_of_other_images_are_refused(tmp_path: Path) -> None:
    table = miniature("coco20k", tmp_path / "mine")
    path = tmp_path / "mine" / "coco_20k_filenames.txt"
    path.write_bytes(path.read_bytes().replace(b"train2014_", b"valid2014_"))
    with pytest.raises(ValueError, match=r"COCO_valid2014_000000000030\.jpg is no image of COCO's train2014"):
        prepare_with("coco20k", tmp_path / "data", archives=tmp_path / "mine", table=table)


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert all(re.search(rf"^    {name} ", printed, re.MULTILINE) for name in DATA_SETS)
    assert "there is no data set voc13: choose one of voc07, voc12, " in refusal(main, ["voc13"], capsys)


def archives() -> dict[str, downloads.Archive]:
    return {a.name: a for data in DATA_SETS.values() for part in data.parts for a in part.archives}


def test_checksums_are_torchvisions() -> None:
    """Where torchvision has the same archive."""
    voc = torchvision.datasets.voc.DATASET_YEAR_DICT
    theirs = {voc[year]["filename"]: voc[year]["md5"] for year in ("2007", "2007-test", "2010", "2012")}
    theirs |= dict(torchvision.datasets.imagenet.ARCHIVE_META.values())
    url, md5 = torchvision.datasets.Imagenette._ARCHIVES["320px"]
    theirs |= {url.rpartition("/")[2]: md5, "benchmark.tgz": torchvision.datasets.SBDataset.md5}
    assert len(theirs) == 9
    assert {name: archives()[name].checksum for name in theirs} == {name: f"md5:{md5}" for name, md5 in theirs.items()}


def test_table_is_sound() -> None:
    for name, archive in archives().items():
        assert archive.checksum is None or re.fullmatch(r"md5:[0-9a-f]{32}|sha256:[0-9a-f]{64}", archive.checksum)
        assert all(url.startswith("http") and url.endswith(f"/{name}") for url in archive.urls)
    assert {name for name, archive in archives().items() if archive.checksum is None} == {
        "coco_20k_filenames.txt", "stuffthingmaps_trainval2017.zip", "trainval.tar.gz", "SPair-71k.tar.gz",
        "DUTS-TE.zip",
    }  # fmt: skip
    expected = {part.place: part.expected for data in DATA_SETS.values() for part in data.parts}
    assert expected["VOCdevkit/VOC2012"] == {"train": 1464, "val": 1449, "trainval": BOX_COUNTS["voc12", "trainval"]}
    assert expected["coco/train2014"] == {"train2014": COUNTS["coco20k", "train2014"]}
    assert archives()["coco_20k_filenames.txt"].size == 41 * 19817 + 19817  # train2014/COCO_train2014_(12 digits).jpg


@pytest.mark.parametrize("line", ["authorized_keys\t../../../victim", "../up.JPEG\tn01", "alone.JPEG"])
def test_annotations_cannot_move_files_elsewhere(tmp_path: Path, line: str) -> None:
    val = "tiny-imagenet-200/val"
    files = {f"{val}/val_annotations.txt": line.encode(), f"{val}/images/authorized_keys": b"x"}
    archive = write_archive(tmp_path / "tiny.zip", files)
    (tmp_path / "work").mkdir()
    with pytest.raises(DamagedArchive, match=r"names .* of class"):
        builders.tiny_imagenet([archive], tmp_path / "work", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.zip", "work"}
