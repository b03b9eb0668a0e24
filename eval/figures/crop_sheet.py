"""A sheet of the views that a network sees of one image."""

import math

import numpy as np

from skipless.common.pixels import resample
from skipless.ssl.data.crops import Crops, multicrop


def sheet(image: np.ndarray, crops: Crops, seed: int) -> np.ndarray:
    """Picture of the views of one image, uint8 [H, W, 3]: four rows, the first four epochs of this seed.

    A row shows the whole image, the two global crops, and the local ones in as many lines as fit beside them.
    """
    gap = 4
    size = max(crops.global_crops_size, crops.local_crops_size if crops.local_crops_number else 0)
    lines = max(1, (size + gap) // (crops.local_crops_size + gap))
    columns = math.ceil(crops.local_crops_number / lines)
    thumbnail = resample(
        image, crops.global_crops_size, max(1, round(crops.global_crops_size * image.shape[1] / image.shape[0]))
    )
    width = thumbnail.shape[1] + 2 * crops.global_crops_size + columns * crops.local_crops_size + (4 + columns) * gap
    canvas = np.full((4 * (size + gap) + gap, width, 3), 255, np.uint8)

    def paste(view: np.ndarray, top: int, left: int) -> int:
        canvas[top : top + view.shape[0], left : left + view.shape[1]] = view
        return left + view.shape[1] + gap

    for epoch in range(4):
        top = gap + epoch * (size + gap)
        views = multicrop(image, crops, np.random.default_rng((seed, epoch, 0)))
        left = gap
        for view in (thumbnail, *views[:2]):
            left = paste(view, top, left)
        for number, view in enumerate(views[2:]):
            line, column = divmod(number, columns)
            paste(view, top + line * (crops.local_crops_size + gap), left + column * (crops.local_crops_size + gap))
    return canvas
