"""How archives become the layouts that the readers of `datasets/labels/` open.

A builder takes the archives' paths, a folder to work in and the root of all data sets, and returns what it made, which
lies in the folder. Raises DamagedArchive for archives that hold something else.
"""

import re
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from skipless.common.progress import Progress
from skipless.datasets.labels.context import fewer_labels
from skipless.datasets.labels.masks import list_folder, read_names
from skipless.datasets.labels.voc import voc_palette
from skipless.datasets.public.archives import COCO20K_NAMES
from skipless.datasets.public.downloads import DamagedArchive, progress
from skipless.datasets.public.unpack import unpack, unpack_tar

VOC12 = "VOCdevkit/VOC2012"
VOC10 = "VOCdevkit/VOC2010"
CONTEXT = f"{VOC10}/SegmentationClassContext"
AUGMENTED = f"{VOC12}/SegmentationClassAug"
TRAINAUG = f"{VOC12}/ImageSets/Segmentation/trainaug.txt"


def voc(year: int) -> Callable[[Sequence[Path], Path, Path], Path]:
    def unpacked(archives: Sequence[Path], work: Path, root: Path) -> Path:
        for archive in archives:
            unpack(archive, work)
        return work / "VOCdevkit" / f"VOC{year}"

    return unpacked


def augmented(archives: Sequence[Path], work: Path, root: Path) -> Path:
    """SBD's masks as PNG with VOC's palette. In cls/NAME.mat GTcls.Segmentation holds 0 and 1..20."""
    from scipy.io import loadmat

    source, masks = work / "benchmark_RELEASE" / "dataset" / "cls", work / "masks"
    unpack(archives[0], work, keep=lambda name: re.search(r"/dataset/cls/\w+\.mat$", name) is not None)
    masks.mkdir()
    palette = voc_palette().ravel().tolist()
    for path in Progress(sorted(source.glob("*.mat")), desc="masks as PNG", unit="mask"):
        mask = Image.fromarray(np.asarray(loadmat(path)["GTcls"]["Segmentation"][0, 0], np.uint8))
        mask.putpalette(palette)
        mask.save(masks / f"{path.stem}.png")
    return masks


def trainaug(archives: Sequence[Path], work: Path, root: Path) -> Path:
    """VOC's train and all of SBD without VOC's val: the 10,582 names that are known as trainaug."""
    lists = root / VOC12 / "ImageSets" / "Segmentation"
    names = {name.removesuffix(".png") for name in list_folder(root / AUGMENTED) if name.endswith(".png")}
    names = (names | set(read_names(lists / "train.txt"))) - set(read_names(lists / "val.txt"))
    path = work / "trainaug.txt"
    path.write_text("".join(f"{name}\n" for name in sorted(names)), encoding="ascii")
    return path


def folder(folder: str) -> Callable[[Sequence[Path], Path, Path], Path]:
    """One folder or file of the archive."""

    def unpacked(archives: Sequence[Path], work: Path, root: Path) -> Path:
        unpack(archives[0], work, keep=lambda name: name == folder or name.startswith(f"{folder}/"))
        return work / folder

    return unpacked


def names(archives: Sequence[Path], work: Path, root: Path) -> Path:
    wrong = [n for n in read_names(archives[0]) if not re.fullmatch(r"train2014/COCO_train2014_\d{12}\.jpg", n)]
    if wrong:
        raise DamagedArchive(f"{archives[0]}: {wrong[0]} is no image of COCO's train2014")
    return Path(shutil.copy(archives[0], work))


def coco20k(archives: Sequence[Path], work: Path, root: Path) -> Path:
    """Of train2014 only the images that are named: a quarter of the disk."""
    names = set(read_names(root / "coco" / COCO20K_NAMES.name))
    unpack(archives[0], work, keep=names.__contains__)
    return work / "train2014"


def stuff(archives: Sequence[Path], work: Path, root: Path) -> Path:
    unpack(archives[0], work / "stuffthingmaps")
    return work / "stuffthingmaps"


def copied(folder: str) -> Callable[[Sequence[Path], Path, Path], Path]:
    """Files that are no archives, in a folder."""

    def gathered(archives: Sequence[Path], work: Path, root: Path) -> Path:
        (work / folder).mkdir()
        for path in archives:
            shutil.copy(path, work / folder)
        return work / folder

    return gathered


def context(archives: Sequence[Path], work: Path, root: Path) -> Path:
    """Pascal Context's masks as PNG with 59 classes. In trainval/NAME.mat LabelMap holds 459 labels."""
    from scipy.io import loadmat

    unpack(archives[0], work, keep=lambda name: re.fullmatch(r"(\./)?trainval/\w+\.mat", name) is not None)
    masks = work / "masks"
    masks.mkdir()
    for path in Progress(sorted((work / "trainval").glob("*.mat")), desc="masks as PNG", unit="mask"):
        Image.fromarray(fewer_labels(np.asarray(loadmat(path)["LabelMap"], np.int64))).save(masks / f"{path.stem}.png")
    return masks


def context_lists(archives: Sequence[Path], work: Path, root: Path) -> Path:
    """VOC 2010's train and val, as far as Pascal Context has masks."""
    masks, lists = list_folder(root / CONTEXT), work / "SegmentationContext"
    lists.mkdir()
    for split in ("train", "val"):
        names = read_names(root / VOC10 / "ImageSets" / "Main" / f"{split}.txt")
        (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in names if f"{name}.png" in masks))
    return lists


def tiny_imagenet(archives: Sequence[Path], work: Path, root: Path) -> Path:
    """Validation images move from one folder into those of their classes; the test images have no labels."""
    wanted = re.compile(r"tiny-imagenet-200/(train/n\d+/images/\w+\.JPEG|val/.*|wnids\.txt|words\.txt)")
    unpack(archives[0], work, keep=lambda name: wanted.fullmatch(name) is not None)
    folder = work / "tiny-imagenet-200"
    for line in (folder / "val" / "val_annotations.txt").read_text(encoding="utf-8").splitlines():
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if not re.fullmatch(r"n\d+", wnid) or not re.fullmatch(r"\w+\.JPEG", name):
            raise DamagedArchive(f"{archives[0].name}: val_annotations.txt names {name!r} of class {wnid!r}")
        (folder / "val" / wnid).mkdir(exist_ok=True)
        (folder / "val" / "images" / name).rename(folder / "val" / wnid / name)
    (folder / "val" / "images").rmdir()
    return folder


def imagenet_train(archives: Sequence[Path], work: Path, root: Path) -> Path:
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


def imagenet_val(archives: Sequence[Path], work: Path, root: Path) -> Path:
    """Into class folders: line i of the devkit's ground truth is the class of image i, as ILSVRC2012_ID of meta.mat."""
    from scipy.io import loadmat

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
