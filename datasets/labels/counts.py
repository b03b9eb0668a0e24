"""How many images the splits of public data sets have, so that a figure on a part of one says so."""

COUNTS = {
    ("voc07", "trainval"): 5011,
    ("voc07", "test"): 4952,
    ("voc12", "train"): 1464,
    ("voc12", "val"): 1449,
    ("voc12", "trainaug"): 10582,
    ("coco20k", "train2014"): 19817,
    ("coco", "val2017"): 5000,
    ("coco", "train2017"): 118287,
    ("coco-stuff-27", "train"): 118287,
    ("coco-stuff-27", "val"): 5000,
    ("coco-stuff-171", "train"): 118287,
    ("coco-stuff-171", "val"): 5000,
    ("ade20k", "train"): 20210,
    ("ade20k", "val"): 2000,
    ("cityscapes", "train"): 2975,
    ("cityscapes", "val"): 500,
    ("pascal-context-59", "train"): 4998,
    ("pascal-context-59", "val"): 5105,
    ("spair", "test"): 12234,
    ("nyuv2", "train"): 795,
    ("nyuv2", "test"): 654,
    ("davis17", "train"): 60,
    ("davis17", "val"): 30,
    ("ecssd", "all"): 1000,
    ("duts-te", "all"): 5019,
    ("dut-omron", "all"): 5168,
}
"""Images by data set and split, from the authors' own descriptions; of VOC 2012 the lists for segmentation."""

BOX_COUNTS = COUNTS | {("voc12", "train"): 5717, ("voc12", "val"): 5823, ("voc12", "trainval"): 11540}
"""The same with VOC 2012's lists for boxes."""


def describe_split(name: str, split: str, images: int, official: int | None = None) -> str:
    """As in "voc12 val, 1,449 images" or, for a part, "voc12 val SUBSET, 180 of 1,449 images".

    Args:
        official: the split's true size; by default that of `COUNTS`, if it is there.

    Examples:
        >>> describe_split("voc12", "val", 180)
        'voc12 val SUBSET, 180 of 1,449 images'
    """
    official = official or COUNTS.get((name, split))
    if official and images < official:
        return f"{name} {split} SUBSET, {images:,} of {official:,} images"
    return f"{name} {split}, {images:,} images"
