"""The weights that come with the package."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import DATA
from sklearn.neighbors import KNeighborsClassifier

from skipless.common.pixels import center_crop, normalize
from skipless.datasets.labels.classes import class_folders
from skipless.ssl.model.load import SHIPPED, load_vit
from skipless.ssl.model.vit import VisionTransformer

NAMES = {"tiny": False, "tiny-residual": True}


def test_they_are_few_and_small() -> None:
    assert {file.stem for file in SHIPPED.glob("*.safetensors")} == set(NAMES)
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 10**7


@pytest.mark.parametrize(("name", "residual"), NAMES.items())
def test_they_load_by_name(name: str, residual: bool) -> None:
    loaded = load_vit(f"skipless:{name}")
    assert (loaded.family, loaded.pool, loaded.model.architecture["residual"]) == ("skipless", "mean", residual)
    assert next(loaded.model.parameters()).dtype == torch.float32
    (tokens,) = loaded.model([torch.randn(1, 3, 224, 224)])
    assert tokens.shape == (1, 257, 128)
    assert tokens.isfinite().all()


@pytest.mark.skipif(not DATA, reason="SKIPLESS_TEST_DATA is not set")
@pytest.mark.parametrize("name", NAMES)
def test_they_have_learned_to_tell_classes(name: str) -> None:
    """20-NN with the mean of the patches, on 240 and 120 photographs, beside fresh weights of the same shape."""
    trained = load_vit(f"skipless:{name}").model
    torch.manual_seed(0)
    fresh = VisionTransformer(**trained.architecture)
    accuracy = {}
    for model in (trained, fresh):
        vectors, labels = [], []
        for split, count in (("train", 240), ("val", 120)):
            images = class_folders(Path(DATA or "", "imagenette128"), split)
            rows = np.linspace(0, len(images) - 1, count).round().astype(int)
            some = images.take(rows)
            squares = [center_crop(some.read(i), 112, 112) for i in range(count)]
            pixels = normalize(torch.from_numpy(np.stack(squares))[None])
            with torch.no_grad():
                tokens = torch.cat([model([part])[0] for part in pixels.split(50)])
            vectors.append(torch.nn.functional.normalize(tokens[:, 1:].mean(1), dim=-1).numpy())
            labels.append(some.labels)
        nearest = KNeighborsClassifier(20).fit(vectors[0], labels[0])
        accuracy[model] = nearest.score(vectors[1], labels[1])
    assert accuracy[trained] > accuracy[fresh] + 0.1
