"""Linear segmentation by stage, images a second: features and predictions, against the same written plainly.

    python benchmarks/segmentation.py --ckpt dino.pth --images VOC2012/JPEGImages --out results/speed/segmentation_speed

1. Features: from JPEG files to patch tokens of the last block, squares of --size pixels. The library's extraction into
   a new cache, against one image after the other through Pillow, torchvision's transforms and the network.
2. Predictions: from logits of patches (random, 21 and 150 classes) to the label of every pixel of an image of 500 x 375
   and the confusion matrix, against bilinear interpolation, argmax and NumPy's histogram.

Interleaved: every round takes the same images through both; medians over rounds.
"""

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measuring import MeasuringSettings, interleaved, markdown, on_device, publish, ratio
from PIL import Image
from torchvision.transforms import v2

from skipless.common import cli
from skipless.common.hardware import keep_freed_memory
from skipless.common.pixels import MEAN, STD
from skipless.datasets.images import open_images
from skipless.eval.backbones import Backbone, load_backbone
from skipless.eval.dense.labels import predict
from skipless.eval.features import extract
from skipless.eval.metrics import confusion_matrix


@dataclass(kw_only=True)
class Settings(MeasuringSettings):
    """Linear segmentation by stage."""

    ckpt: str
    """Whatever the evaluations take."""
    images: Path
    """A folder of images, without subfolders."""
    count: int = 16
    """Images a round."""
    size: int = 448
    """Side in pixels, a multiple of the patch."""
    workers: int = 0
    """Processes that read images for the library."""


def plain_features(backbone: Backbone, paths: list[Path], size: int) -> None:
    """One image after the other."""
    transform = v2.Compose(
        [
            v2.Resize((size, size), interpolation=v2.InterpolationMode.BICUBIC),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    device = backbone.device
    for path in paths:
        with torch.inference_mode(), Image.open(path) as image:
            pixels = transform(image.convert("RGB"))[None].to(device)
            backbone.features(pixels, [backbone.depth - 1])[0].patches.half().cpu()


def our_features(backbone: Backbone, paths: list[Path], size: int, workers: int) -> None:
    """Into a cache that is not there yet. `paths` are the first images of their folder."""
    with tempfile.TemporaryDirectory() as cache:
        read = open_images(paths[0].parent).read
        extract(backbone, paths, read, size, [backbone.depth - 1], Path(cache), workers=workers)


def plain_prediction(logits: torch.Tensor, mask: torch.Tensor, classes: int) -> None:
    """As evaluations usually have it."""
    upsampled = F.interpolate(logits[None], mask.shape, mode="bilinear", align_corners=False)
    labels, truth = upsampled[0].argmax(0).cpu().numpy(), mask.cpu().numpy()
    counted = truth < classes
    np.bincount(classes * truth[counted].astype(int) + labels[counted], minlength=classes**2)


def our_prediction(logits: torch.Tensor, mask: torch.Tensor, classes: int) -> None:
    """As the evaluation does it."""
    confusion_matrix(mask, predict(logits, mask.shape), classes)


def measure(settings: Settings) -> None:
    """Time both stages, and publish."""
    device = on_device(settings.device)
    backbone = load_backbone(settings.ckpt).to(device)
    images = open_images(settings.images)
    if device.type == "cpu":
        keep_freed_memory()
    paths = [images.root / images.names[i] for i in range(min(settings.count, len(images)))]
    torch.manual_seed(0)
    ways: dict[str, Callable[[], None]] = {
        "features, plain": partial(plain_features, backbone, paths, settings.size),
        "features": partial(our_features, backbone, paths, settings.size, settings.workers),
    }

    def repeated(way: Callable[..., None], *values: Any) -> None:
        for _ in paths:
            way(*values)

    for classes in (21, 150):
        logits = torch.randn(classes, 28, 28, device=device)
        mask = torch.randint(0, classes, (375, 500), dtype=torch.uint8, device=device)
        stage = f"predictions, {classes} classes"
        ways[f"{stage}, plain"] = partial(repeated, plain_prediction, logits, mask, classes)
        ways[stage] = partial(repeated, our_prediction, logits, mask, classes)
    seconds = interleaved(ways, settings.rounds, device)
    rows = []
    for stage in (name for name in ways if f"{name}, plain" in ways):
        speedup = ratio(seconds[f"{stage}, plain"], seconds[stage])
        rows.append(
            {
                "stage": stage,
                "plain_images_per_second": len(paths) / statistics.median(seconds[f"{stage}, plain"]),
                "images_per_second": len(paths) / statistics.median(seconds[stage]),
                "ratio": speedup["median"],
                "range": [speedup["lowest"], speedup["highest"]],
            }
        )
    lines = [
        f"{backbone.path}, {len(paths)} images, squares of {settings.size} pixels, on {{hardware}}; medians of "
        f"{settings.rounds} rounds.",
        "",
        *markdown(rows),
    ]
    publish(settings.out, {"task": "benchmark", "protocol": "segmentation", "details": rows}, lines, device)


main = partial(cli.run, measure, Settings, __doc__)

if __name__ == "__main__":
    main()
