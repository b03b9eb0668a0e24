"""A few images by their patches, again and again while a network trains: colors by PCA, and token statistics."""

from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from skipless.common.pca import align, component_colors, pca_components
from skipless.common.pixels import normalize
from skipless.datasets.images import read_image
from skipless.ssl.data.squares import Images, central_squares
from skipless.ssl.model.statistics import effective_rank, mean_share
from skipless.ssl.model.vit import VisionTransformer

Sheets = dict[str, np.ndarray]
"""Pictures by name, uint8 [H, W, 3], as they are written to NAME-STEP.png."""


class Pictures:
    """Draws the same images whenever it is called, in colors that stay what they were.

    Args:
        images: `count` of them are drawn, evenly spread; size: of their central squares in pixels.
        folder: where earlier pictures lie; the newest one's colors are taken up.
    """

    def __init__(self, images: Images, count: int, size: int, folder: Path, device: torch.device):
        self.squares = central_squares(images, count, size)
        self.folder, self.device = folder, device

    @torch.no_grad()
    def __call__(
        self, backbone: VisionTransformer, autocast: AbstractContextManager[Any]
    ) -> tuple[dict[str, list[float]], Sheets]:
        """Mean share and effective rank of the patch tokens of every block, before the final norm, and pictures, side
        by side: "pca", the last block's patches after the final norm, one color for each, and the first time "images".

        There is no "pca" where the images have fewer than three patches together, and nothing where features are not
        finite.
        """
        fed = normalize(self.squares[None].to(self.device))
        with autocast:
            blocks = backbone.features(fed, blocks=range(backbone.depth), norm=False)
        patches = [block.patches.flatten(1, 2).float() for block in blocks]
        if not all(tokens.isfinite().all() for tokens in patches):
            return {}, {}
        statistics = {
            "mean_share": [mean_share(tokens).mean().item() for tokens in patches],
            "effective_rank": [effective_rank(tokens).mean().item() for tokens in patches],
        }
        sheets = {} if any(self.folder.glob("images-*.png")) else {"images": np.hstack(list(self.squares.numpy()))}
        with suppress(ValueError):
            components = pca_components(list(backbone.norm(blocks[-1].patches.float()).cpu().numpy()))
            earlier = self._earlier(components[0].shape[0])
            colors = component_colors(align(components, earlier) if earlier else components)
            side = self.squares.shape[1] // components[0].shape[0]
            tiles = [(255 * tile).round().astype(np.uint8).repeat(side, 0).repeat(side, 1) for tile in colors]
            sheets["pca"] = np.hstack(tiles)
        return statistics, sheets

    def _earlier(self, grid: int) -> list[np.ndarray]:
        """The colors of the newest picture, float64 [grid, grid, 3] for each image; none where there is no such one."""
        newest = max(self.folder.glob("pca-*.png"), key=lambda path: path.stat().st_mtime_ns, default=None)
        count, size = self.squares.shape[:2]
        sheet = read_image(newest) if newest else None
        if sheet is None or sheet.shape != (size, count * size, 3):
            return []
        centers = sheet[size // grid // 2 :: size // grid, size // grid // 2 :: size // grid]
        return [tile.astype(np.float64) for tile in np.hsplit(centers, count)]
