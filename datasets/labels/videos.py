"""Videos whose objects are marked in the first frame: DAVIS 2017 (arXiv 1704.00675), or folders of one's own.

val = davis("data/DAVIS", "val")
val.videos[0].read_frame(3)  # uint8 [H, W, 3]
val.videos[0].read_mask(0)   # uint8 [H, W], 0 background, 1, 2, ... the objects
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from skipless.datasets.images import UnreadableImage
from skipless.datasets.labels.masks import VOID, list_folder, read_names, read_stored, read_values, require_files
from skipless.datasets.storage.names import EXTENSIONS


@dataclass(frozen=True, eq=False)
class Video:
    """Frames of one size, and masks of some of them."""

    name: str
    frames: tuple[Path, ...]
    masks: tuple[Path | None, ...]
    """Of each frame; the first is there."""
    size: tuple[int, int]
    """Height and width in pixels."""
    objects: int
    """The largest value in the first mask."""

    def read_frame(self, index: int) -> np.ndarray:
        """uint8 [H, W, 3]. Raises UnreadableImage, a ValueError, also for a frame of another size than the first
        mask."""
        frame = read_stored(self.frames[index])
        _require_size(self.frames[index], frame, self.size)
        return frame

    def read_mask(self, index: int) -> np.ndarray:
        """uint8 [H, W]: 0 for the background and what is void, 1, 2, ... for the objects.

        Raises UnreadableImage, a ValueError, also for a mask of another size than the first.
        """
        path = self.masks[index]
        assert path is not None
        values = read_values(path)
        _require_size(path, values, self.size)
        return np.where(values == VOID, 0, values)


@dataclass(frozen=True, eq=False)
class VideoSet:
    """Videos of a split."""

    name: str
    split: str
    videos: tuple[Video, ...]

    def __len__(self) -> int:
        return len(self.videos)


def davis(root: str | Path, split: str = "val") -> VideoSet:
    """A split of DAVIS 2017: ImageSets/2017/SPLIT.txt, and JPEGImages/480p/NAME/00000.jpg and
    Annotations/480p/NAME/00000.png and so on below `root`.

    Raises FileNotFoundError for a missing list, frame or mask, ValueError for a first mask without an object.
    """
    root = Path(root).expanduser()
    listed = root / f"ImageSets/2017/{split}.txt"
    names = read_names(listed)
    if outside := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{listed}: {outside[0]} is no name of a folder")
    return VideoSet("davis17", split, tuple(_numbered(root, name) for name in names))


def video_folders(root: str | Path) -> VideoSet:
    """Videos of one's own: images/NAME/*.jpg (or another format) in the order of names, and masks/NAME/FRAME.png, at
    least of the first frame; all of them as one split, under the folder's name.

    Raises FileNotFoundError for a missing folder or first mask, ValueError for one without an object, or for a mask
    that belongs to no frame.
    """
    root = Path(root).expanduser()
    names = sorted(name for name in list_folder(root / "images") if (root / "images" / name).is_dir())
    if not names:
        raise FileNotFoundError(f"{root / 'images'}: no folders there; each must hold the frames of a video")
    videos = []
    for name in names:
        folder, marked = root / "images" / name, root / "masks" / name
        frames = sorted(folder / file for file in list_folder(folder) if file.lower().endswith(EXTENSIONS))
        masks = {Path(file).stem: marked / file for file in list_folder(marked) if file.endswith(".png")}
        if unknown := sorted(masks.keys() - {frame.stem for frame in frames}):
            raise ValueError(f"{masks[unknown[0]]}: a mask without its frame in {folder}")
        if not frames:
            raise FileNotFoundError(f"{folder}: no frames there")
        require_files([masks.get(frames[0].stem, marked / f"{frames[0].stem}.png")], "mask of a first frame")
        videos.append(_video(name, frames, [masks.get(frame.stem) for frame in frames]))
    return VideoSet(root.resolve().name, "all", tuple(videos))


def _numbered(root: Path, name: str) -> Video:
    """A video of DAVIS, whose frames are numbered from 0 without a gap."""
    pictures, marked = root / "JPEGImages/480p" / name, root / "Annotations/480p" / name
    files = [*list_folder(pictures), *list_folder(marked)]
    count = 1 + max((int(Path(file).stem) for file in files if Path(file).stem.isdecimal()), default=0)
    frames, masks = ([folder / f"{i:05}.{kind}" for i in range(count)] for folder, kind in
                     ((pictures, "jpg"), (marked, "png")))  # fmt: skip
    require_files(frames, "frame")
    require_files(masks, "mask")
    return _video(name, frames, masks)


def _video(name: str, frames: Sequence[Path], masks: Sequence[Path | None]) -> Video:
    assert masks[0] is not None
    first = read_values(masks[0])
    objects = int(first[first != VOID].max(initial=0))
    if not objects:
        raise ValueError(
            f"{masks[0]}: no object in this mask of a first frame; 0 is the background, 1, 2, ... are objects, "
            f"and {VOID} is void"
        )
    return Video(name, tuple(frames), tuple(masks), (first.shape[0], first.shape[1]), objects)


def _require_size(path: Path, pixels: np.ndarray, size: tuple[int, int]) -> None:
    if pixels.shape[:2] != size:
        raise UnreadableImage(
            path,
            f"has {pixels.shape[1]} x {pixels.shape[0]} pixels, and the mask of the video's first frame "
            f"{size[1]} x {size[0]}; all must have one size",
        )
