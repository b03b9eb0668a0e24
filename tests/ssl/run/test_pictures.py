"""PCA pictures of a few images while a network trains."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from skipless.datasets.images import open_images
from skipless.ssl.run.pictures import Pictures

SCORES = torch.from_numpy(np.random.default_rng(0).exponential(size=(3, 8, 8, 3))).float()
SCORES -= SCORES.mean((0, 1, 2))


def network(scales: list[float]) -> Any:
    """Its patches of any images are three independent scores, at such scales, in three of five channels."""
    patches = torch.cat([SCORES * torch.tensor(scales), torch.ones(3, 8, 8, 2)], -1)
    return SimpleNamespace(
        depth=1, norm=lambda tokens: tokens, features=lambda *_, **__: [SimpleNamespace(patches=patches)]
    )


def test_colors_stay_what_they_were(tmp_path: Path) -> None:
    images = np.random.default_rng(1).integers(0, 255, (5, 40, 32, 3), dtype=np.uint8)
    source: Any = type("Source", (), {"__len__": lambda _: 5, "read": lambda _, row: images[row]})()
    draw = Pictures(source, 3, 32, tmp_path, torch.device("cpu"))
    _, sheets = draw(network([5, 3, 1]), nullcontext())
    np.testing.assert_array_equal(sheets["images"], np.hstack([images[row, 4:36] for row in (0, 2, 4)]))
    assert sheets["pca"].shape == (32, 96, 3)
    first = sheets["pca"][::4, ::4].astype(int)
    for channel, scores in enumerate(SCORES.permute(3, 1, 0, 2).reshape(3, 8, 24).numpy()):  # side by side
        low, high = np.percentile(scores, [1, 99])
        expected = 255 * ((scores - low) / (high - low)).clip(0, 1)
        assert np.abs(first[..., channel] - expected).mean() < 10  # the scores are not quite uncorrelated

    reordered = draw(network([1, 3, 5]), nullcontext())[1]["pca"][::4, ::4].astype(int)
    assert np.abs(reordered - first[..., ::-1]).mean() < 20  # the main component is red
    Image.fromarray(sheets["pca"]).save(tmp_path / "pca-0.png")
    again = draw(network([1, 3, 5]), nullcontext())[1]["pca"][::4, ::4].astype(int)
    assert np.abs(again - first).mean() < 20
    assert np.abs(again - reordered).mean() > 30


def test_features_that_are_not_finite_leave_nothing(tmp_path: Path, photos: Path) -> None:
    draw = Pictures(open_images(photos), 3, 32, tmp_path, torch.device("cpu"))
    assert draw(network([float("nan"), 1, 1]), nullcontext()) == ({}, {})
