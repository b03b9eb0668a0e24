"""What several test files share."""

from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, NullGPU, color_pictures, load, tiny_vit, write_voc
from hypothesis import settings
from PIL import Image

# A machine may be as busy as it likes.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(scope="session")
def null_gpu(tmp_path_factory: pytest.TempPathFactory) -> NullGPU:
    """Skips, with the reason, where it cannot be built."""
    builder = load(ROOT / "tests/nullgpu/build.py")
    try:
        return NullGPU(builder.build(tmp_path_factory.mktemp("nullgpu")))
    except builder.Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty noisy pictures in two class folders."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(40):
        folder = root / ("stripes" if i % 2 else "blobs")
        folder.mkdir(exist_ok=True)
        base = rng.integers(0, 255, (6, 1 if i % 2 else 6, 3), dtype=np.uint8)
        Image.fromarray(base).resize((48, 40)).save(folder / f"{i:02}.png")
    return root


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose backbone is a random ViT of two blocks, 24 wide."""
    from skipless.ssl.run.checkpoints import export_backbone

    folder = tmp_path_factory.mktemp("run")
    export_backbone(folder, tiny_vit(registers=2), {})
    return folder


@pytest.fixture(scope="session")
def tiny_ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the weights of a random ViT of two blocks, 192 wide."""
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("ckpt") / "tiny.safetensors"
    save_file(tiny_vit(192, image_size=64).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def tiny_voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VOC's layout, 12 and 4 pictures of 64 x 80: blocks of three colors, each a class, and a void column."""
    return write_voc(tmp_path_factory.mktemp("data") / "VOCdevkit", {"train": 12, "val": 4})


@pytest.fixture(scope="session")
def color_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 pictures to learn from and 9 to classify, in three classes, as arrays and as folders."""
    root = tmp_path_factory.mktemp("colors")
    names = ("blue", "green", "red")
    for split, count in (("train", 30), ("val", 9)):
        images = color_pictures(count, count)
        np.savez(root / f"{split}.npz", images=images, labels=np.arange(count) % 3, classes=names)
        for number, image in enumerate(images):
            path = root / split / names[number % 3] / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for features."""
    return tmp_path_factory.mktemp("cache")
