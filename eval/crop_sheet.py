"""A picture of the views a network sees of one image: the crops of ssl/data/crops.py, drawn.

python eval/crop_sheet.py --show photo.jpg --out sheet.png --crops.global_crops_size 224 --seed 0
"""

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from skipless.common.pixels import resample
from skipless.datasets.images import read_image
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


def show(image: Path, crops: Crops, out: Path = Path("crops.png"), seed: int = 0) -> None:
    """Write a sheet of the views a network sees of one image.

    Args:
        image: The image file: JPEG, PNG, WebP or BMP.
        crops: The augmentation.
        out: Where to write the sheet: .png or .jpg.
        seed: Another number shows other views.
    """
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ValueError(f"--out is {out}: the name of the sheet must end in .png or .jpg")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out is {out}: there is no folder {out.parent}")
    if seed < 0:
        raise ValueError(f"--seed is {seed}: it must be 0 or more")
    picture = sheet(read_image(image), crops, seed)
    data = cv2.imencode(out.suffix, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1].tobytes()
    partial = out.with_name(out.name + ".partial")
    partial.write_bytes(data)
    os.replace(partial, out)
    print(
        f"{out}: {picture.shape[1]} x {picture.shape[0]} pixels; a row: the image, 2 global, "
        f"{crops.local_crops_number} local"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(description="Write a sheet of the multi-crop views a network sees of one image.")
    parser.add_argument(
        "--image", "--show", type=Path, required=True, help="The image file: JPEG, PNG, WebP or BMP.", metavar="FILE"
    )
    parser.add_function_arguments(show, skip={"image"})
    settings = parser.parse_args(arguments)
    try:
        show(**parser.instantiate(settings).as_dict())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
