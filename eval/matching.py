"""Points of one image found again in another, by the features of their patches.

found = match_points(source, target, points)  # grids [h, w, D]; points in [0, 1] across their images
a, b, alike = mutual_neighbors(source, target)
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def match_points(source: Tensor, target: Tensor, points: Tensor, window: int = 0, temperature: float = 0.05) -> Tensor:
    """Where each point of the source lies in the target.

    The point's feature is interpolated between the patches around it (bilinear), and compared with those of all target
    patches by the cosine. The most similar patch's center is the answer; or, with a window, the mean of the centers
    around it, weighted by a softmax of the cosines (window soft-argmax, as in arXiv 2311.17034).

    Args:
        source, target: features [h, w, D], of any two grids.
        points: [n, 2], x and y as shares of the source's width and height, in [0, 1].
        window: patches along a side of the window, odd; 0: the nearest patch alone.
        temperature: of the softmax.

    Returns:
        [n, 2], x and y as shares of the target's width and height.
    """
    grid = source.permute(2, 0, 1)[None].double()
    asked = F.grid_sample(grid, 2 * points[None, None].to(grid) - 1, padding_mode="border", align_corners=False)[
        0, :, 0
    ]
    h, w = target.shape[:2]
    alike = F.normalize(asked.T, dim=-1) @ F.normalize(target.flatten(0, 1).double(), dim=-1).T  # [n, h w]
    best = alike.argmax(1)
    rows, columns = best // w, best % w
    if not window:
        return torch.stack([(columns + 0.5) / w, (rows + 0.5) / h], 1)
    ys, xs = torch.arange(h, device=target.device), torch.arange(w, device=target.device)
    near = (ys[:, None] - rows[:, None, None]).abs() <= window // 2
    near = near & ((xs - columns[:, None, None]).abs() <= window // 2)  # [n, h, w]
    weights = (alike.unflatten(1, (h, w)) / temperature).masked_fill(~near, -torch.inf).flatten(1).softmax(1)
    weights = weights.unflatten(1, (h, w))
    return torch.stack([(weights.sum(1) @ (xs + 0.5).double()) / w, (weights.sum(2) @ (ys + 0.5).double()) / h], 1)


def mutual_neighbors(source: Tensor, target: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Patches of two grids [h, w, D] that are each other's most similar, best first.

    Returns:
        (row, column) in the source and in the target, int [n, 2] both, and their cosines [n].
    """
    a, b = (F.normalize(grid.flatten(0, 1).double(), dim=-1) for grid in (source, target))
    alike = a @ b.T
    there, back = alike.argmax(1), alike.argmax(0)
    mine = torch.arange(len(a), device=a.device)
    mutual = mine[back[there] == mine]
    order = alike[mutual, there[mutual]].argsort(descending=True, stable=True)
    mutual = mutual[order]
    theirs = there[mutual]
    places = [
        np.stack(np.divmod(patches.cpu().numpy(), grid.shape[1]), 1)
        for patches, grid in ((mutual, source), (theirs, target))
    ]
    return places[0], places[1], alike[mutual, theirs].cpu().numpy()
