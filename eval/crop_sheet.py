"""A picture of the views a network sees of one image: the crops of ssl/data/crops.py, drawn.

python eval/crop_sheet.py --image photo.jpg --out sheet.png --crops.global_crops_size 224 --seed 0
python eval/crop_sheet.py --image photo.jpg --config configs/vits16_skipless_soap.yaml    # the crops of a recipe
"""

import skipless.common.interruption  # noqa: F401

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import cv2

from skipless.common import cli
from skipless.common.files import write_atomically
from skipless.datasets.images import read_image
from skipless.eval.figures.crop_sheet import sheet
from skipless.ssl.data.crops import Crops


@dataclass
class Settings:
    """A sheet of crops."""

    image: str
    """The image file: JPEG, PNG, WebP or BMP."""
    crops: Crops = field(default_factory=Crops)
    """The augmentation."""
    out: str = "crops.png"
    """Where to write the sheet: .png or .jpg."""
    seed: int = 0
    """Another number shows other views."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"--seed is {self.seed}: it must be 0 or more")


def show(settings: Settings) -> None:
    """Write a sheet of the views a network sees of one image.

    Raises:
        ValueError, FileNotFoundError: an image that cannot be read, or a name that cannot be written.
    """
    out = Path(settings.out)
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ValueError(f"--out is {out}: the name of the sheet must end in .png or .jpg")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out is {out}: there is no folder {out.parent}")
    picture = sheet(read_image(Path(settings.image)), settings.crops, settings.seed)
    data = cv2.imencode(out.suffix, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1].tobytes()
    write_atomically(out, lambda beside: beside.write_bytes(data))
    height, width, _ = picture.shape
    views = f"2 global, {settings.crops.local_crops_number} local"
    print(f"{out}: {width} x {height} pixels; a row: the image, {views}")


main = partial(cli.run, show, Settings, __doc__, part="crops")

if __name__ == "__main__":
    main()
