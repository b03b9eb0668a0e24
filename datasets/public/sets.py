"""The public data sets that `datasets/prepare.py` brings: of which archives they are made, and how much there must be.

Each data set is a few parts, each with the archives it is made of, a function that builds it, and one that counts what
is there. Layouts are those of the readers in `datasets/labels/`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from skipless.datasets.labels.ade20k import ade20k
from skipless.datasets.labels.cityscapes import cityscapes
from skipless.datasets.labels.classes import class_folders
from skipless.datasets.labels.coco import coco20k, coco_boxes, coco_stuff
from skipless.datasets.labels.context import pascal_context
from skipless.datasets.labels.counts import BOX_COUNTS, COUNTS
from skipless.datasets.labels.pairs import spair
from skipless.datasets.labels.saliency import saliency_masks
from skipless.datasets.labels.videos import davis
from skipless.datasets.labels.voc import voc_boxes, voc_segmentation
from skipless.datasets.public import archives, builders, counters
from skipless.datasets.public.downloads import Archive


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


_COCO_TERMS = "https://cocodataset.org/#termsofuse"
IMAGENET_TERMS = "https://www.image-net.org/download.php"
_VOC_TERMS = "http://host.robots.ox.ac.uk/pascal/VOC"  # "Database Rights" of each year
_SBD_TERMS = "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/"

_PRETRAIN = "python ssl/pretrain.py --config configs/imagenette_cpu.yaml --data.path {root}"


def _counts(name: str, *splits: str) -> dict[str, int]:
    return {split: COUNTS[name, split] for split in splits}


def _annotations(name: str, archive: Archive, disk: float) -> Part:
    file = f"annotations/instances_{name}.json"
    return Part(f"coco/{file}", (archive,), disk, builders.folder(file), counters.file, {"annotations": 1})


def _open_classes(name: str) -> Callable[[Path], object]:
    return lambda root: [class_folders(root / name, split) for split in ("train", "val")]


def _open_voc12(root: Path) -> object:
    masks = [voc_segmentation(root / "VOCdevkit", split) for split in ("train", "val", "trainaug")]
    return masks, voc_boxes(root / "VOCdevkit", "trainval", 2012)


# fmt: off
_VAL2017 = Part(
    "coco/val2017", (archives.COCO_VAL2017,), 0.83e9, builders.folder("val2017"), counters.images("val2017"),
    _counts("coco", "val2017"),
)

DATA_SETS = {
    "voc07": DataSet(
        f"{_VOC_TERMS}/voc2007/",
        (
            Part(
                "VOCdevkit/VOC2007", (archives.VOC07_TRAINVAL, archives.VOC07_TEST), 1.0e9, builders.voc(2007),
                counters.voc(trainval="Main", test="Main"), _counts("voc07", "trainval", "test"),
            ),
        ),
        lambda root: [voc_boxes(root / "VOCdevkit", split, 2007) for split in ("trainval", "test")],
        "python eval/discovery.py --method tokencut --ckpt RUN --data.name voc07 --data.root {root}/VOCdevkit",
    ),
    "voc12": DataSet(
        f"{_VOC_TERMS}/voc2012/ and {_SBD_TERMS}",
        (
            Part(
                builders.VOC12, (archives.VOC12_TRAINVAL,), 2.1e9, builders.voc(2012),
                counters.voc(train="Segmentation", val="Segmentation", trainval="Main"),
                _counts("voc12", "train", "val") | {"trainval": BOX_COUNTS["voc12", "trainval"]},
            ),
            Part(
                builders.AUGMENTED, (archives.SBD,), 0.15e9, builders.augmented, counters.images("masks", ".png"),
                {"masks": 11355},  # 8,498 of SBD's train and 2,857 of its val
            ),
            Part(
                builders.TRAINAUG, (), 0.2e6, builders.trainaug, counters.names("trainaug"),
                _counts("voc12", "trainaug"),
            ),
        ),
        _open_voc12,
        "python eval/segmentation.py --protocol quick --ckpt RUN --data.name voc12 --data.root {root}/VOCdevkit",
    ),
    "coco20k": DataSet(
        _COCO_TERMS,
        (
            Part(
                f"coco/{archives.COCO20K_NAMES.name}", (archives.COCO20K_NAMES,), 0.9e6, builders.names,
                counters.names("names"), {"names": COUNTS["coco20k", "train2014"]},
            ),
            Part(
                "coco/train2014", (archives.COCO_TRAIN2014,), 3.3e9, builders.coco20k, counters.coco20k,
                _counts("coco20k", "train2014"),
            ),
            _annotations("train2014", archives.COCO_BOXES2014, 0.34e9),
        ),
        lambda root: coco20k(root / "coco", root / "coco" / archives.COCO20K_NAMES.name),
        "python eval/discovery.py --method tokencut --ckpt RUN --data.name coco20k --data.root {root}/coco "
        "--data.names {root}/coco/coco_20k_filenames.txt",
    ),
    "coco-val2017": DataSet(
        _COCO_TERMS,
        (_VAL2017, _annotations("val2017", archives.COCO_BOXES2017, 0.02e9)),
        lambda root: coco_boxes(root / "coco/annotations/instances_val2017.json", root / "coco/val2017"),
        "python eval/discovery.py --method maskcut --ckpt RUN --data.name coco --data.root {root}/coco",
    ),
    "coco-stuff": DataSet(
        f"{_COCO_TERMS} and https://github.com/nightrome/cocostuff#licensing",
        (
            Part(
                "coco/train2017", (archives.COCO_TRAIN2017,), 19.6e9, builders.folder("train2017"),
                counters.images("train2017"), _counts("coco", "train2017"),
            ),
            _VAL2017,
            Part(
                "coco/stuffthingmaps", (archives.COCO_STUFF_MAPS,), 1.0e9, builders.stuff, counters.stuff,
                _counts("coco-stuff-27", "train", "val"),
            ),
        ),
        lambda root: [coco_stuff(root / "coco", "train", 27), coco_stuff(root / "coco", "val", 171)],
        "python eval/clustering.py --ckpt RUN --data.name coco-stuff-27 --data.root {root}/coco",
    ),
    "ade20k": DataSet(
        "https://groups.csail.mit.edu/vision/datasets/ADE20K/terms/",
        (
            Part(
                "ADEChallengeData2016", (archives.ADE20K,), 1.1e9, builders.folder("ADEChallengeData2016"),
                counters.ade20k, _counts("ade20k", "train", "val"),
            ),
        ),
        lambda root: [ade20k(root, "train"), ade20k(root, "val")],
        "python eval/segmentation.py --protocol quick --ckpt RUN --data.name ade20k --data.root "
        "{root}/ADEChallengeData2016",
    ),
    "cityscapes": DataSet(
        "https://www.cityscapes-dataset.com/",
        tuple(
            Part(
                f"cityscapes/{folder}", (archive,), disk, builders.folder(folder), counters.cities(ending),
                _counts("cityscapes", "train", "val"),
            )
            for folder, archive, disk, ending in (
                ("leftImg8bit", archives.CITYSCAPES_IMAGES, 11.7e9, "_leftImg8bit.png"),
                ("gtFine", archives.CITYSCAPES_MASKS, 0.4e9, "_gtFine_labelIds.png"),
            )
        ),
        lambda root: [cityscapes(root / "cityscapes", split) for split in ("train", "val")],
        "python eval/segmentation.py --protocol quick --ckpt RUN --data.name cityscapes --data.root {root}/cityscapes",
    ),
    "pascal-context": DataSet(
        f"{_VOC_TERMS}/voc2010/ and https://cs.stanford.edu/~roozbeh/pascal-context/",
        (
            Part(
                builders.VOC10, (archives.VOC10_TRAINVAL,), 1.4e9, builders.voc(2010),
                counters.voc(train="Main", val="Main"), {"train": 4998, "val": 5105},
            ),
            Part(
                builders.CONTEXT, (archives.PASCAL_CONTEXT,), 0.1e9, builders.context,
                counters.images("masks", ".png"), {"masks": 10_103},
            ),
            Part(
                f"{builders.VOC10}/ImageSets/SegmentationContext", (), 0.2e6, builders.context_lists,
                counters.lists("train", "val"), _counts("pascal-context-59", "train", "val"),
            ),
        ),
        lambda root: [pascal_context(root / "VOCdevkit", split) for split in ("train", "val")],
        "python eval/segmentation.py --protocol quick --ckpt RUN --data.name pascal-context-59 --data.root "
        "{root}/VOCdevkit",
    ),
    "davis17": DataSet(
        "https://davischallenge.org/davis2017/code.html",
        (
            Part(
                "DAVIS", (archives.DAVIS17,), 0.87e9, builders.folder("DAVIS"), counters.davis,
                _counts("davis17", "train", "val"),
            ),
        ),
        lambda root: [davis(root / "DAVIS", split) for split in ("train", "val")],
        "python eval/video.py --ckpt RUN --data.root {root}/DAVIS",
    ),
    "nyuv2": DataSet(
        "https://cs.nyu.edu/~fergus/datasets/nyu_depth_v2.html",
        (
            Part(
                "NYUv2", (archives.NYUV2_LABELED, archives.NYUV2_SPLITS), 2.98e9, builders.copied("NYUv2"),
                counters.nyuv2, _counts("nyuv2", "train", "test"),
            ),
        ),
        lambda root: None,  # its reader needs h5py, which may be installed later
        "python eval/depth.py --ckpt RUN --data.root {root}/NYUv2",
    ),
    "spair": DataSet(
        "https://cvlab.postech.ac.kr/research/SPair-71k/",
        (
            Part(
                "SPair-71k", (archives.SPAIR,), 0.7e9, builders.folder("SPair-71k"), counters.pairs,
                _counts("spair", "test"),
            ),
        ),
        lambda root: spair(root / "SPair-71k"),
        "python eval/correspondence.py --ckpt RUN --data.root {root}/SPair-71k",
    ),
    "ecssd": DataSet(
        "https://www.cse.cuhk.edu.hk/leojia/projects/hsaliency/dataset.html",
        (
            Part(
                "ECSSD/images", (archives.ECSSD_IMAGES,), 0.07e9, builders.folder("images"),
                counters.images("images"), {"images": 1000},
            ),
            Part(
                "ECSSD/ground_truth_mask", (archives.ECSSD_MASKS,), 0.005e9, builders.folder("ground_truth_mask"),
                counters.images("masks", ".png"), {"masks": 1000},
            ),
        ),
        lambda root: saliency_masks(root / "ECSSD", "ecssd"),
        "python eval/saliency.py --ckpt RUN --data.name ecssd --data.root {root}/ECSSD",
    ),
    "duts-te": DataSet(
        "http://saliencydetection.net/duts/",
        (
            Part(
                "DUTS-TE", (archives.DUTS_TE,), 0.16e9, builders.folder("DUTS-TE"),
                counters.salient("DUTS-TE-Image", "DUTS-TE-Mask"), _counts("duts-te", "all"),
            ),
        ),
        lambda root: saliency_masks(root / "DUTS-TE", "duts-te"),
        "python eval/saliency.py --ckpt RUN --data.name duts-te --data.root {root}/DUTS-TE",
    ),
    "imagenette": DataSet(
        f"https://github.com/fastai/imagenette and, for the photographs, {IMAGENET_TERMS}",
        (
            Part(
                "imagenette", (archives.IMAGENETTE,), 0.38e9, builders.folder("imagenette2-320"),
                counters.classes("train", "val"), {"train": 9469, "val": 3925},
            ),
        ),
        _open_classes("imagenette"),
        f"{_PRETRAIN}/imagenette/train --out runs/imagenette",
    ),
    "tiny-imagenet": DataSet(
        IMAGENET_TERMS,
        (
            Part(
                "tiny-imagenet", (archives.TINY_IMAGENET,), 0.5e9, builders.tiny_imagenet,
                counters.classes("train", "val"), {"train": 100_000, "val": 10_000},
            ),
        ),
        _open_classes("tiny-imagenet"),
        f"{_PRETRAIN}/tiny-imagenet/train --out runs/tiny-imagenet",
    ),
    "imagenet": DataSet(
        IMAGENET_TERMS,
        (
            # The smaller one first: a damaged devkit is found in minutes.
            Part(
                "imagenet/val", (archives.IMAGENET_VAL, archives.IMAGENET_DEVKIT), 6.9e9, builders.imagenet_val,
                counters.classes("val"), {"val": 50_000},
            ),
            Part(
                "imagenet/train", (archives.IMAGENET_TRAIN,), 151e9, builders.imagenet_train, counters.classes("train"),
                {"train": 1_281_167},
            ),
        ),
        _open_classes("imagenet"),
        "torchrun --nproc-per-node 8 ssl/pretrain.py --config configs/vits16_skipless_soap.yaml --data.path "
        "{root}/imagenet/train --out runs/imagenet",
    ),
}
