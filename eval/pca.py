"""PCA pictures: the three main directions of patch features as red, green and blue.

The first thing to look at in a self-supervised model: with good features, objects come out in colours of their own.

    python eval/pca.py --ckpt runs/photos --images photos --out pca.png              # 8 of the images, evenly spread
    python eval/pca.py --ckpt runs/photos --images photos --blocks 3,6,9,12 --out blocks.pdf
    python eval/pca.py --compare runs/residual runs/skipless --images photos --out compare.svg
    python eval/pca.py --ckpt runs/photos --images photos --foreground pca --style dinov3 --out objects.png

Rows are images; columns are blocks of the checkpoint, or checkpoints. One PCA serves all images of a column, so that a
colour means the same in all of them (--per-image fits one to each). The same features give the same colours on every
run and machine, in whatever order the images come: each component is turned so that it is skewed to the right.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import matplotlib
import numpy as np
import torch
from scipy.linalg import orthogonal_procrustes
from sklearn.decomposition import PCA
from tqdm import tqdm

from skipless.common import cli, distributed
from skipless.datasets.labels.masks import read_values
from skipless.eval.backbones import Weights, choose_blocks, load_backbone
from skipless.eval.figures.pictures import check_out, patch_features, pick_images, save_figure

matplotlib.use("Agg")
import matplotlib.pyplot as plt

matplotlib.rcParams["svg.hashsalt"] = "skipless"

Foreground = Literal["none", "pca", "mask"]
Style = Literal["dinov2", "dinov3"]


@dataclass
class Settings:
    """PCA pictures."""

    ckpt: str | None = None
    """Backbone: the folder of a run; a .pt, .pth or .safetensors of ours, DINO, DINOv2 or timm; or timm:NAME."""
    images: str = ""
    """A folder or zip archive of images, or one image file."""
    out: str = "pca.png"
    """The figure: .png, .pdf or .svg."""
    compare: tuple[str, ...] = ()
    """Two backbones in place of ckpt; the components of the second are rotated to match those of the first."""
    blocks: str = "last"
    """Blocks to show: last, last4, or numbers from 1, as in 3,6,9,12."""
    count: int = 8
    """At most so many images, evenly spread over the folder."""
    size: int = 448
    """Short side in pixels that images are resized to; both sides are rounded to multiples of the patch."""
    foreground: Foreground = "none"
    """none colours all patches. pca splits them by the first component, at Otsu's threshold: the background is the side
    that holds more of the images' borders. mask takes it from `masks`. The foreground gets a PCA of its own, and the
    background is black."""
    masks: str | None = None
    """foreground mask: folder of masks NAME.png, 8-bit grey or palette, not 0 where the foreground is."""
    style: Style = "dinov2"
    """dinov2: each component scaled from its 1st to its 99th percentile. dinov3: whitened, sigmoid(2 x)."""
    per_image: bool = False
    """A PCA for each image; by default one for all, so that a colour means the same in all of them."""
    smooth: float = 0.0
    """Standard deviation, in patches, of a Gaussian blur of the three components; 0 for none."""
    upsample: bool = False
    """Resize components to the image bicubically, for soft pictures, and not patches as squares."""
    weights: Weights = "teacher"
    """Which half of a training checkpoint that holds a teacher and a student."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


def pca_components(features: list[np.ndarray], weights: list[np.ndarray] | None = None) -> list[np.ndarray]:
    """The three main components of patches by a PCA over all images together.

    The sign of a principal component is arbitrary, and colours would flip from run to run; here each component is
    turned so that its distribution is skewed to the right (as in CAPI, arXiv 2502.08769), or where it is symmetric, so
    that its largest loading is positive.

    Args:
        features: for each image [h, w, D], D >= 3; finite.
        weights: for each image bool [h, w]: patches that the PCA is fitted to; by default all.

    Returns:
        For each image float64 [h, w, 3]: scores, largest variance first.

    Raises:
        ValueError: features that are not finite, of another shape, or fewer than three patches to fit to.
    """
    for f in features:
        if f.ndim != 3 or f.shape[-1] < 3 or not np.isfinite(f).all():
            raise ValueError(f"features of shape {f.shape} must be finite and [h, w, D] with D >= 3")
    flat = [f.reshape(-1, f.shape[-1]).astype(np.float64) for f in features]
    chosen = flat if weights is None else [x[w.ravel()] for x, w in zip(flat, weights, strict=True)]
    fitted = np.concatenate(chosen)
    if len(fitted) < 3:
        raise ValueError(f"a PCA of three components needs three patches or more, and there are {len(fitted)}")
    pca = PCA(3, svd_solver="covariance_eigh").fit(fitted)
    scores = pca.transform(fitted)
    skewness = (scores**3).mean(0) / np.maximum(scores.std(0), 1e-12) ** 3
    largest = pca.components_[np.arange(3), np.abs(pca.components_).argmax(1)]
    signs = np.where(np.where(np.abs(skewness) > 1e-6, skewness, largest) < 0, -1, 1)
    return [(pca.transform(x) * signs).reshape(*f.shape[:2], 3) for x, f in zip(flat, features, strict=True)]


def foreground_masks(features: list[np.ndarray]) -> list[np.ndarray]:
    """Foreground by the first component of a PCA over all images together (DINOv2, arXiv 2304.07193, section 7.5).

    The component is split at Otsu's threshold. The foreground is the side that holds the smaller share of the patches
    at the images' borders, so it does not depend on the component's sign.

    Returns:
        For each image bool [h, w].
    """
    first = [c[..., 0] for c in pca_components(features)]
    values = np.concatenate([c.ravel() for c in first])
    low, high = values.min(), values.max()
    levels = ((values - low) / max(high - low, 1e-12) * 255).round().astype(np.uint8)
    level, _ = cv2.threshold(levels[None], 0, 255, cv2.THRESH_OTSU)
    threshold = low + (level + 0.5) / 255 * (high - low)
    above = [c > threshold for c in first]
    border = np.concatenate([np.concatenate([m[0], m[-1], m[1:-1, 0], m[1:-1, -1]]) for m in above])
    return [~m for m in above] if border.mean() > np.mean(np.concatenate([m.ravel() for m in above])) else above


def align(components: list[np.ndarray], reference: list[np.ndarray]) -> list[np.ndarray]:
    """Components rotated (and mirrored) to match those of another model on the same images: orthogonal Procrustes.

    Args:
        components, reference: for each image [h, w, 3]; grids may differ between the two.

    Returns:
        As `components`, scaled to the reference's size.
    """
    pairs = zip(components, reference, strict=True)
    resized = [cv2.resize(c, r.shape[1::-1], interpolation=cv2.INTER_AREA) for c, r in pairs]
    ours, theirs = (np.concatenate([x.reshape(-1, 3) for x in part]) for part in (resized, reference))
    ours, theirs = ours - ours.mean(0), theirs - theirs.mean(0)
    rotation, _ = orthogonal_procrustes(ours, theirs)
    scale = np.linalg.norm(theirs) / max(float(np.linalg.norm(ours)), 1e-12)
    return [scale * (c @ rotation) for c in components]


def colours_of(
    components: list[np.ndarray],
    style: Style = "dinov2",
    masks: list[np.ndarray] | None = None,
    percentile: float = 1.0,
) -> list[np.ndarray]:
    """Components as colours; black outside of the masks.

    Args:
        components: for each image [h, w, 3].
        style: "dinov2" scales each component from a percentile to its counterpart at the top, and clips; "dinov3"
            whitens and takes sigmoid(2 x).
        masks: for each image bool [h, w]; scaling looks at patches inside alone.

    Returns:
        For each image float64 [h, w, 3] in [0, 1].
    """
    masks = masks or [np.ones(c.shape[:2], bool) for c in components]
    inside = np.concatenate([c[m] for c, m in zip(components, masks, strict=True)])
    if style == "dinov2":
        low, high = np.percentile(inside, [percentile, 100 - percentile], axis=0)
        scaled = [((c - low) / np.maximum(high - low, 1e-12)).clip(0, 1) for c in components]
    else:
        mean, std = inside.mean(0), np.maximum(inside.std(0), 1e-12)
        scaled = [1 / (1 + np.exp(-2 * (c - mean) / std)) for c in components]
    return [s * m[..., None] for s, m in zip(scaled, masks, strict=True)]


def pca_colours(features: np.ndarray, percentile: float = 1.0) -> np.ndarray:
    """Colours of the patches of images of one size: `pca_components` and `colours_of` in one.

    Args:
        features: [B, h, w, D], at least 3 patches and D >= 3.

    Returns:
        float64 [B, h, w, 3] in [0, 1].

    Raises:
        ValueError: features that are not finite, or of another shape.
    """
    if features.ndim != 4:
        raise ValueError(f"features of shape {features.shape} must be finite and [B, h, w, D] with D >= 3")
    return np.stack(colours_of(pca_components(list(features)), percentile=percentile))


@dataclass(frozen=True)
class Column:
    """One column of the figure: the patch features of all images, each [h, w, D], by one block of one backbone."""

    title: str
    features: list[np.ndarray]


def draw_pca(settings: Settings) -> Path:
    """Draw the figure that `settings` ask for, and return its path.

    Raises:
        ValueError, FileNotFoundError: a checkpoint, images or settings that cannot be used.
    """
    device = distributed.start(settings.device)
    out = check_out(settings.out)
    check(settings)
    pictures = read_pictures(settings)
    columns = make_columns(settings, [picture.pixels for picture in pictures], device)
    components: list[list[np.ndarray]] = []  # [column][image]
    masks: list[list[np.ndarray]] = []
    for column in columns:
        fitted: list[np.ndarray] = []
        inside: list[np.ndarray] = []
        for group in _groups(settings, len(pictures)):
            features = [column.features[i] for i in group]
            found = [np.ones(f.shape[:2], bool) for f in features]
            if settings.foreground == "pca":
                found = foreground_masks(features)
            elif settings.foreground == "mask":
                found = [pictures[i].mask_at(f.shape[0], f.shape[1]) for i, f in zip(group, features, strict=True)]
            if sum(int(m.sum()) for m in found) < 3:
                raise ValueError(f"{column.title}: fewer than three patches are foreground; use --foreground none")
            fitted += pca_components(features, found)
            inside += found
        components.append(fitted)
        masks.append(inside)
    if settings.compare:
        components[1:] = [align(of_column, components[0]) for of_column in components[1:]]
    figure(settings, pictures, [column.title for column in columns], components, masks, out)
    return out


def check(settings: Settings) -> None:
    """Raises ValueError for settings that contradict each other."""
    if settings.compare and len(settings.compare) != 2:
        raise ValueError("compare needs two backbones: --compare A B")
    if (settings.ckpt is None) != bool(settings.compare):
        raise ValueError("give either --ckpt CKPT or --compare A B")
    if not settings.images:
        raise ValueError("give --images: a folder or zip archive of images, or one image file")
    if settings.count < 1 or settings.size < 1 or settings.smooth < 0:
        raise ValueError("count and size must be 1 or more, and smooth not negative")
    if (settings.foreground == "mask") != (settings.masks is not None):
        raise ValueError("foreground mask and masks FOLDER belong together: give both or neither")
    if settings.compare and settings.per_image:
        raise ValueError("compare aligns one PCA of all images with another; leave out per-image")


@dataclass(frozen=True, eq=False)
class Picture:
    """An image to show, and its mask where masks were given."""

    name: str
    pixels: np.ndarray
    """uint8 [H, W, 3]"""
    mask: np.ndarray | None
    """uint8 of any size, not 0 where the foreground is"""

    def mask_at(self, h: int, w: int) -> np.ndarray:
        """The mask on a grid of patches: bool [h, w]."""
        assert self.mask is not None
        return cv2.resize((self.mask > 0).astype(np.float32), (w, h), interpolation=cv2.INTER_AREA) > 0.5


def read_pictures(settings: Settings) -> list[Picture]:
    """The images to show."""
    found = pick_images(settings.images, settings.count)
    masks: list[np.ndarray | None] = [None] * len(found)
    if settings.masks:
        folder = Path(settings.masks).expanduser()
        masks = [read_values(folder / f"{Path(name).stem}.png") for name, _ in found]
    return [Picture(name, pixels, mask) for (name, pixels), mask in zip(found, masks, strict=True)]


def make_columns(settings: Settings, pictures: list[np.ndarray], device: torch.device) -> list[Column]:
    """Blocks of the one checkpoint, or one block of both."""
    columns = []
    for ckpt in settings.compare or (settings.ckpt or "",):
        backbone = load_backbone(ckpt, settings.weights).to(device)
        (blocks,) = choose_blocks(settings.blocks, False, backbone)
        if settings.compare and len(blocks) > 1:
            raise ValueError("compare shows one block of each; give one number to --blocks, or leave it out")
        name = Path(ckpt).stem if settings.compare else "block"
        bar = tqdm(pictures, desc=Path(ckpt).name, unit="image", disable=len(pictures) * backbone.depth < 50)
        of_images = [patch_features(backbone, picture, settings.size, blocks) for picture in bar]
        for position, block in enumerate(blocks):
            title = name if settings.compare and settings.blocks == "last" else f"{name} {block + 1}"
            columns.append(Column(title, [features[position] for features in of_images]))
    return columns


def _groups(settings: Settings, count: int) -> list[list[int]]:
    """Images that share a PCA."""
    return [[i] for i in range(count)] if settings.per_image else [list(range(count))]


def figure(
    settings: Settings,
    pictures: list[Picture],
    titles: list[str],
    components: list[list[np.ndarray]],
    masks: list[list[np.ndarray]],
    out: Path,
) -> None:
    """Write the figure: images in the first column, then one column of colours for each of `titles`."""
    shapes = [picture.pixels.shape[:2] for picture in pictures]
    heights = [h / w for h, w in shapes]
    side = 2.0
    shape = (len(pictures), 1 + len(titles))
    sheet, axes = plt.subplots(
        *shape,
        figsize=(side * shape[1], side * sum(heights) + 0.3),
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
        layout="constrained",
    )
    for axis in axes.flat:
        axis.axis("off")
    for row, picture in enumerate(pictures):
        axes[row, 0].imshow(picture.pixels)
    for number, (title, of_column, inside) in enumerate(zip(titles, components, masks, strict=True), 1):
        axes[0, number].set_title(title, fontsize=8)
        smoothed = [cv2.GaussianBlur(c, (0, 0), settings.smooth) if settings.smooth else c for c in of_column]
        shown = list(inside)
        if settings.upsample:
            sizes = [(w, h) for h, w in shapes]
            smoothed = [cv2.resize(c, s, interpolation=cv2.INTER_CUBIC) for c, s in zip(smoothed, sizes, strict=True)]
            shown = [
                cv2.resize(m.astype(np.float32), s, interpolation=cv2.INTER_CUBIC) > 0.5
                for m, s in zip(inside, sizes, strict=True)
            ]
        for group in _groups(settings, len(pictures)):
            drawn = colours_of([smoothed[i] for i in group], settings.style, [shown[i] for i in group])
            for i, colours in zip(group, drawn, strict=True):
                extent = (0, shapes[i][1], shapes[i][0], 0)
                axes[i, number].imshow(colours, interpolation="nearest", extent=extent)
    save_figure(sheet, out)
    plt.close(sheet)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""

    def draw(settings: Settings) -> None:
        print(f"written: {draw_pca(settings)}")

    cli.run(draw, Settings, __doc__, arguments)


if __name__ == "__main__":
    main()
