"""Labels carried from frame to frame of a video by the similarity of patches.

Source: DINO (arXiv 2104.14294, section 4.2.2), and the code it released for DAVIS 2017, after Jabri et al. (arXiv
2006.14613).
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

CHUNK = 2**22  # cosines that are held at once


@dataclass
class PropagationSettings:
    """How labels are carried on."""

    last_frames: int = 7
    """Frames that labels come from, beside the first of the video: those right before."""
    neighborhood: int = 12
    """Labels come from patches at most so many rows and columns away; 0 for anywhere."""
    topk: int = 5
    """Patches that labels come from: the most similar ones of all these frames together."""
    temperature: float = 0.1
    """Of the softmax over their cosines."""

    def __post_init__(self) -> None:
        if min(self.last_frames, self.neighborhood) < 0 or self.topk < 1 or not 0 < self.temperature < np.inf:
            raise ValueError("last_frames and neighborhood must be 0 or more, topk 1 or more, temperature above 0")


def propagate(query: Tensor, sources: Tensor, labels: Tensor, settings: PropagationSettings) -> Tensor:
    """Labels of a frame: for each patch, those of its most similar patches near its place in other frames, weighted by
    the softmax of cosine / temperature. Of patches as similar as the last of the top k, all count.

    Cosines are computed for a few rows of patches at a time, with the rows that are near them.

    Args:
        query: unit features [h, w, D].
        sources: those of n frames, [n, h, w, D].
        labels: shares of the classes in their patches, [n, h, w, C].

    Returns:
        [h, w, C].
    """
    n, h, w, dim = sources.shape
    radius = settings.neighborhood or max(h, w)
    ys, xs = (torch.arange(side, device=query.device) for side in (h, w))
    near_columns = (xs[:, None] - xs).abs() <= radius
    rows = max(1, CHUNK // (n * w * w * min(h, 2 * radius + 1)))
    found = []
    for own in ys.split(rows):
        first, last = int(max(0, own[0] - radius)), int(min(h, own[-1] + radius + 1))
        keys = sources[:, first:last].reshape(-1, dim)
        near_rows = (own[:, None] - ys[first:last]).abs() <= radius
        far = ~(near_rows[:, None, :, None] & near_columns[None, :, None, :])  # [rows, w, last - first, w]
        alike = (query[own].reshape(-1, dim) @ keys.T).view(len(own) * w, n, -1)
        alike = alike.masked_fill(far.reshape(len(own) * w, 1, -1), -torch.inf).flatten(1)
        least = alike.topk(min(settings.topk, alike.shape[1])).values[:, -1:]
        weights = (alike.masked_fill(alike < least, -torch.inf) / settings.temperature).softmax(1)
        found.append(weights @ labels[:, first:last].flatten(0, 2))
    return torch.cat(found).view(h, w, -1)


def follow(grids: Iterable[Tensor], first_mask: np.ndarray, settings: PropagationSettings) -> Iterator[Tensor]:
    """Labels of every frame after the first, as shares [h, w, 1 + objects].

    Args:
        grids: features [h, w, D] of the frames, one after the other.
        first_mask: uint8 [H, W] of the first frame, 0 for the background. Resized to patches by the nearest pixel.
    """
    recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=settings.last_frames)
    start: tuple[Tensor, Tensor] | None = None
    for grid in grids:
        unit = F.normalize(grid, dim=-1)
        if start is None:
            small = np.array(
                Image.fromarray(first_mask).resize((grid.shape[1], grid.shape[0]), Image.Resampling.NEAREST)
            )
            start = unit, F.one_hot(torch.from_numpy(small).long(), int(first_mask.max()) + 1).to(unit)
            continue
        features, labels = zip(start, *recent, strict=True)
        found = propagate(unit, torch.stack(features), torch.stack(labels), settings)
        recent.append((unit, found))
        yield found


def pixel_mask(shares: Tensor, patch: int, height: int, width: int) -> np.ndarray:
    """The object that each pixel belongs to, uint8 [height, width].

    Shares [h, w, C] are resized bilinearly to pixels of the frame as the network saw it; there those of each class are
    stretched to 0..1, the largest wins, and the map is resized by the nearest pixel, all as DINO does.
    """
    maps = F.interpolate(shares.permute(2, 0, 1)[None], scale_factor=patch, mode="bilinear", align_corners=False)[0]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    # A class that has the same share everywhere keeps it: nothing, or all of the frame.
    maps = torch.where(high > low, (maps - low) / (high - low), maps)
    labels = maps.argmax(0).to(torch.uint8).cpu().numpy()
    return np.array(Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST))
