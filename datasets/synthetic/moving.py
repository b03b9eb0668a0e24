"""Synthetic videos in the layout of DAVIS 2017: two objects that move across a scene, with exact masks."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from skipless.common.files import whole_folder
from skipless.datasets.labels.voc import voc_palette
from skipless.datasets.synthetic.drawing import MIN_SIZE, render_scene


def moving_scene(
    rng: np.random.Generator, frames: int, size: int = 128
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Frames uint8 [T, S, S, 3] and masks uint8 [T, S, S]: 1 and 2 for the objects, of which the second is in front.

    Raises ValueError for a size below 32.
    """
    images = np.repeat(render_scene(rng, size).image[None], frames, 0)
    masks = np.zeros(images.shape[:3], np.uint8)
    side = max(size // 2, MIN_SIZE)
    for number in (1, 2):
        scene = render_scene(rng, side)
        shape = scene.instance_mask == 1
        start, end = rng.uniform(0, size - side, (2, 2))
        for image, mask, share in zip(images, masks, np.linspace(0, 1, frames), strict=True):
            y, x = (start + share * (end - start)).round().astype(int)
            image[y : y + side, x : x + side][shape] = scene.image[shape]
            mask[y : y + side, x : x + side][shape] = number
    return images, masks


def write_moving_scenes(root: Path, videos: int = 4, frames: int = 12, size: int = 128, seed: int = 0) -> None:
    """Write videos to `root` as the split val of DAVIS 2017 lies there, whole or not at all; one that is there already
    is left as it is."""
    if root.exists():
        return
    names = [f"scene-{number}" for number in range(videos)]
    with whole_folder(root) as folder:
        for number, name in enumerate(names):
            images, masks = moving_scene(np.random.default_rng((seed, number)), frames, size)
            for kind in ("JPEGImages", "Annotations"):
                (folder / kind / "480p" / name).mkdir(parents=True)
            for place, (image, mask) in enumerate(zip(images, masks, strict=True)):
                Image.fromarray(image).save(folder / f"JPEGImages/480p/{name}/{place:05}.jpg", quality=92)
                picture = Image.fromarray(mask)
                picture.putpalette(voc_palette().ravel().tolist())
                picture.save(folder / f"Annotations/480p/{name}/{place:05}.png")
        lists = folder / "ImageSets/2017"
        lists.mkdir(parents=True)
        (lists / "val.txt").write_text("".join(f"{name}\n" for name in names))
