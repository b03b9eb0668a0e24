"""Linear segmentation by stage, images a second: features and predictions, against the same written plainly.

    python benchmarks/segmentation.py --ckpt dino.pth --images VOC2012/JPEGImages --out results/speed/segmentation_speed

1. Features: from JPEG files to patch tokens of the last block, squares of --size pixels. The library's extraction into
   a new cache, against one image after the other through Pillow, torchvision's transforms and the network.
2. Predictions: from logits of patches (random, 21 and 150 classes) to the label of every pixel of an image of 500 x 375
   and the confusion matrix, against bilinear interpolation, argmax and NumPy's histogram.

Interleaved: every round takes the same images through both; medians over rounds.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2
from tqdm import tqdm

from skipless.common.files import write_result
from skipless.common.hardware import keep_freed_memory
from skipless.common.pixels import MEAN, STD
from skipless.common.provenance import provenance
from skipless.datasets.images import open_images
from skipless.eval.backbones import Backbone, load_backbone
from skipless.eval.dense.labels import predict
from skipless.eval.features import extract
from skipless.eval.metrics import confusion_matrix


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
    device = backbone.model.pos_embed.device
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


def main() -> None:
    """Command line: see the docstring of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, help="Whatever the evaluations take.")
    parser.add_argument("--images", type=Path, required=True, help="A folder of images, without subfolders.")
    parser.add_argument("--count", type=int, default=16, help="Images a round (default: 16).")
    parser.add_argument("--size", type=int, default=448, help="Side in pixels, a multiple of the patch (default: 448).")
    parser.add_argument("--rounds", type=int, default=5, help="Rounds that count; one more warms up (default: 5).")
    parser.add_argument("--workers", type=int, default=0, help="Processes that read images for the library.")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, help="Where to write OUT.json and OUT.md.")
    arguments = parser.parse_args()
    try:
        backbone = load_backbone(arguments.ckpt).to(arguments.device)
        images = open_images(arguments.images)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if arguments.device == "cpu":
        keep_freed_memory()
    paths = [images.root / images.names[i] for i in range(min(arguments.count, len(images)))]
    torch.manual_seed(0)
    stages: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
        "features": (
            partial(plain_features, backbone, paths, arguments.size),
            partial(our_features, backbone, paths, arguments.size, arguments.workers),
        )
    }
    for classes in (21, 150):
        logits = torch.randn(classes, 28, 28, device=arguments.device)
        mask = torch.randint(0, classes, (375, 500), dtype=torch.uint8, device=arguments.device)

        def repeated(way: Callable[..., None], values: tuple[Any, ...] = (logits, mask, classes)) -> None:
            for _ in paths:
                way(*values)

        stages[f"predictions, {classes} classes"] = (
            partial(repeated, plain_prediction),
            partial(repeated, our_prediction),
        )
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in stages}
    for number in tqdm(range(arguments.rounds + 1), desc="rounds"):
        for name, ways in stages.items():
            for way, times in zip(ways, seconds[name], strict=True):
                began = time.perf_counter()
                way()
                if arguments.device == "cuda":
                    torch.cuda.synchronize()
                if number:
                    times.append(time.perf_counter() - began)
    about = provenance(torch.device(arguments.device))
    lines = [
        f"{backbone.path}, {len(paths)} images, squares of {arguments.size} pixels, on {about['hardware']}; medians of "
        f"{arguments.rounds} rounds.",
        "",
        "| stage | plain, images/s | library, images/s | ratio |",
        "|---|---:|---:|---:|",
    ]
    rows = []
    for name, (plain, ours) in seconds.items():
        ratios = [a / b for a, b in zip(plain, ours, strict=True)]
        row = {
            "stage": name,
            "plain_images_per_second": len(paths) / statistics.median(plain),
            "images_per_second": len(paths) / statistics.median(ours),
            "ratio": statistics.median(ratios),
            "range": [min(ratios), max(ratios)],
        }
        rows.append(row)
        lines.append(
            f"| {name} | {row['plain_images_per_second']:.1f} | {row['images_per_second']:.1f} | "
            f"{row['ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
        )
    text = "\n".join(lines) + "\n"
    if arguments.out:
        write_result(arguments.out, {"task": "benchmark", "protocol": "segmentation", "details": rows, **about}, text)
    print(text)


if __name__ == "__main__":
    main()
