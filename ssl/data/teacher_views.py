"""What student and teacher see of an image in distillation, and the teacher's features kept on disk."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from skipless.common import distributed
from skipless.common.files import write_atomically
from skipless.common.pixels import center_crop, crop_box, resample
from skipless.common.progress import Progress
from skipless.datasets.images import ImageSource, UnreadableImage
from skipless.ssl.data.crops import color_jitter, draw_jitter, first_readable
from skipless.ssl.data.loader import leave_signals_to_main
from skipless.ssl.model.teacher import Teacher

IMAGES_PER_FILE = 256


@dataclass
class Views:
    """The student's view of an image: a crop of its central square, maybe flipped, maybe in other colors."""

    size: int = 224
    """Side of the view in pixels; a multiple of the student's patch size."""
    scale: tuple[float, float] = (0.35, 1.0)
    """Range of its area, as a share of the square's; (1, 1) is all of it."""
    jitter_probability: float = 0.0
    """Share of the views whose colors change, as DINO's do. The teacher sees them as they were."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"views.size is {self.size}; it must be at least 1 pixel")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"views.scale is {self.scale}; it must be two rising shares of the area in (0, 1]")
        if not 0 <= self.jitter_probability <= 1:
            raise ValueError(f"views.jitter_probability is {self.jitter_probability:g}; it must be in [0, 1]")


class TeacherFeatures:
    """A teacher's features of the central square of every image of a source, in files of 256 images.

    Args:
        folder: where they are kept for any teacher and images, each in a folder of its own: its name is made of the
            teacher's weights, the size it sees, and the images' names. Images exchanged under the same names are not
            noticed: delete the folder then.
        bf16: whether the teacher runs in bf16.
    """

    def __init__(self, folder: Path, teacher: Teacher, images: ImageSource, bf16: bool):
        self.images, self.teacher = images, teacher
        digest = hashlib.sha256(json.dumps([teacher.sha256, teacher.size, bf16, images.origin, len(images)]).encode())
        for name in images.names:
            digest.update(name.encode(errors="surrogateescape") + b"\0")
        self.folder = folder / digest.hexdigest()[:16]

    @property
    def gigabytes(self) -> float:
        """What all of them take."""
        return len(self.images) * (1 + self.teacher.side**2) * self.teacher.model.dim * 2 / 1e9

    def __getitem__(self, index: int) -> np.ndarray:
        """Of one image: CLS and patches, float16 [1 + side * side, D]; zeros where it could not be read."""
        return np.load(self._path(index // IMAGES_PER_FILE), mmap_mode="r")[index % IMAGES_PER_FILE]

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06}.npy"

    def compute(self, autocast: AbstractContextManager[Any], device: torch.device, workers: int) -> None:
        """Compute those that are not there; what is stopped goes on where it was. All processes must call it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        files = range(distributed.rank(), -(-len(self.images) // IMAGES_PER_FILE), distributed.world_size())
        missing = [number for number in files if not self._path(number).exists()]
        squares = CentralSquares(self.images, self.teacher.size)
        bar = Progress(
            missing, desc="teacher's features", unit_scale=IMAGES_PER_FILE, unit="image", active=bool(missing)
        )
        for number in bar:
            first = number * IMAGES_PER_FILE
            part = Subset(squares, range(first, min(first + IMAGES_PER_FILE, len(self.images))))
            features = []
            for batch in DataLoader(part, 32, num_workers=workers, worker_init_fn=leave_signals_to_main):
                with autocast:
                    features.append(self.teacher(batch.to(device)).half().cpu())
            array = torch.cat(features).numpy()

            def write(path: Path, array: np.ndarray = array) -> None:
                with open(path, "wb") as file:
                    np.save(file, array)

            write_atomically(self._path(number), write)
        distributed.gather_objects(None)  # until all processes are here


class CentralSquares(Dataset[Tensor]):
    """The central square of every image, uint8 [size, size, 3]; black where it cannot be read."""

    def __init__(self, images: ImageSource, size: int):
        self.images, self.size = images, size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        try:
            return torch.from_numpy(center_crop(self.images.read(index, self.size), self.size, self.size))
        except UnreadableImage:
            return torch.zeros(self.size, self.size, 3, dtype=torch.uint8)


class StudentViews(Dataset[dict[str, Any]]):
    """The student's view, and what the teacher says or sees of it, for keys (epoch, index).

    What comes out depends on (seed, epoch, index) alone. In place of an unreadable image comes the next readable one.

    Args:
        features: the teacher's; None where it is to see the view itself, in `teacher_size` pixels.
    """

    def __init__(
        self, images: ImageSource, views: Views, seed: int, teacher_size: int, features: TeacherFeatures | None = None
    ):
        self.images, self.views, self.seed = images, views, seed
        self.teacher_size, self.features = teacher_size, features

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """`view` uint8 [S, S, 3]; `teacher`: its features float16 [1 + N, D], or the view that it sees, uint8 [T, T,
        3]; `box` float32 [5]: where in the teacher's square the view lies (top, left, height and width, in [0, 1]), and
        1 if it is flipped; `unreadable`: `path: reason` of images passed over."""
        cv2.setNumThreads(0)  # workers share the cores
        epoch, index = int(key[0]), int(key[1])
        rng = np.random.default_rng((self.seed, epoch, index))
        size, smallest = self.views.size, max(self.views.size, self.teacher_size)
        image, position, unreadable = first_readable(self.images, index, lambda i: self.images.read(i, smallest))
        side = min(image.shape[:2])
        top, left = ((length - side) // 2 for length in image.shape[:2])
        square = image[top : top + side, left : left + side]
        y, x, height, width = crop_box(side, side, self.views.scale, rng)
        flip = rng.random() < 0.5
        crop = square[y : y + height, x : x + width]
        crop = np.ascontiguousarray(crop[:, ::-1]) if flip else crop
        view = resample(crop, size, size)
        if self.features is None:
            teacher: np.ndarray = resample(crop, self.teacher_size, self.teacher_size)
            box = (0.0, 0.0, 1.0, 1.0, 0.0)
        else:
            teacher = np.array(self.features[position])
            box = (y / side, x / side, height / side, width / side, float(flip))
        if rng.random() < self.views.jitter_probability:
            view = color_jitter(view, *draw_jitter((0.4, 0.4, 0.2, 0.1), rng))
        return {"view": view, "teacher": teacher, "box": np.array(box, np.float32), "unreadable": unreadable}


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Arrays stacked to tensors [B, ...], lists of lines joined."""
    batch: dict[str, Any] = {
        name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in ("view", "teacher", "box")
    }
    return batch | {"unreadable": [line for sample in samples for line in sample["unreadable"]]}
