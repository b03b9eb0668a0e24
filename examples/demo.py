"""What `make demo` runs: write synthetic scenes, pretrain a small skipless ViT on them, and show what it learned.

    python examples/demo.py [--out demo]

Run again, it continues where it was interrupted; delete the folder to start afresh.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from skipless.datasets.images import open_images
from skipless.datasets.scenes import write_scenes
from skipless.datasets.voc import scenes_boxes, scenes_segmentation
from skipless.eval.backbones import Backbone, load_backbone
from skipless.eval.localization import box_in_pixels, tokencut
from skipless.eval.metrics import corloc, segmentation_scores
from skipless.eval.pca import pca_colours
from skipless.eval.segmentation_quick import QuickSettings, quick
from skipless.ssl.crops import center_crop
from skipless.ssl.pretrain import build_model, parse

ROOT = Path(__file__).resolve().parent.parent
PICTURES = 8


def main() -> None:
    """Scenes, training, k-NN and segmentation tables, PCA picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="Folder for everything the demo writes.")
    out: Path = parser.parse_args().out
    began = time.perf_counter()

    print(f"1/3 synthetic scenes -> {out / 'scenes'}", flush=True)
    write_scenes(out / "scenes", train=3000, val=600, size=96)

    print("\n2/3 pretraining a skipless ViT with DINO; no label is used", flush=True)
    run = out / "run"
    arguments = [
        f"--config={ROOT / 'configs' / 'demo.yaml'}",
        f"--data.path={out / 'scenes' / 'train'}",
        f"--out={run}",
    ]
    if not (run / "backbone.json").exists():
        command = [sys.executable, str(ROOT / "ssl" / "pretrain.py"), *arguments, "--resume"]
        status = subprocess.run(command).returncode
        if status:
            sys.exit(status)
        if not (run / "backbone.json").exists():
            sys.exit("interrupted: the same command continues")

    print("\n3/3 what it learned, on held-out scenes", flush=True)
    settings = parse(arguments)
    torch.manual_seed(settings.seed)
    trained = load_backbone(run)
    # The very weights that training started from.
    backbones = {"untrained": replace(trained, model=build_model(settings).backbone.eval()), "trained": trained}
    picture = out / "pca.png"
    draw_pca(out / "scenes" / "val", backbones, picture)
    measured = {name: [segment(out, backbone), localize(out, backbone)] for name, backbone in backbones.items()}
    print_table(run, settings.monitor.k)
    print_dense(measured)
    print(f"PCA picture: {picture}\nbackbone:    {run / 'backbone.safetensors'}\nmetrics:     {run / 'metrics.jsonl'}")
    print(f"\n{(time.perf_counter() - began) / 60:.1f} minutes in all. Next, on your own images (any folder):\n")
    print("    python ssl/pretrain.py --config configs/imagenette_cpu.yaml --data.path FOLDER --out runs/mine")


def print_table(run: Path, k: int) -> None:
    """k-NN accuracy of the blocks before and after training, from the run's log."""
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = [entry for entry in entries if "monitor/knn" in entry]
    before, after = measured[0], measured[-1]
    print(f"\n{k}-NN accuracy on 600 held-out scenes of 10 classes (chance: 10 %)\n")
    print(f"{'':22}{'untrained':>10}{'trained':>10}")
    for name, choose in (("last block", lambda knn: knn[-1]), ("best block", max)):
        print(f"{name:22}{100 * choose(before['monitor/knn']):9.1f}%{100 * choose(after['monitor/knn']):9.1f}%")
    print()


def segment(out: Path, backbone: Backbone) -> float:
    """mIoU of a linear layer on the last block's features, as `eval/segmentation.py --protocol quick` measures it."""
    train, val = (scenes_segmentation(out / "scenes", split) for split in ("train", "val"))
    settings = QuickSettings(size=96, max_images=1000)
    last = backbone.depth - 1
    outcome = quick(
        backbone, train, val, [(last,)], settings, out / "features", seed=0, batch_size=64, workers=0, shown=()
    )
    return segmentation_scores(outcome.confusions[0]).miou


def localize(out: Path, backbone: Backbone) -> float:
    """CorLoc of TokenCut on the last block's keys, as `eval/discovery.py` measures it."""
    images = scenes_boxes(out / "scenes", "val")
    boxes: list[tuple[int, int, int, int]] = []
    for first in range(0, len(images), 100):
        pictures = np.stack([images.read_image(i) for i in range(first, min(first + 100, len(images)))])
        (last,) = backbone.features(backbone.normalize(pictures), kind="keys")
        boxes += [box_in_pixels(found.box, backbone.patch, 96, 96) for found in tokencut(last.patches)]
    return float(corloc(np.array(boxes, float), list(images.boxes)).mean())


def print_dense(measured: dict[str, list[float]]) -> None:
    """What patch features are good for, before and after training."""
    print(f"Patch features of the same scenes, last block\n\n{'':34}{'untrained':>10}{'trained':>10}")
    names = ("linear segmentation, mIoU", "object discovery, CorLoc")
    for name, before, after in zip(names, measured["untrained"], measured["trained"], strict=True):
        print(f"{name:34}{100 * before:9.1f}%{100 * after:9.1f}%")
    print("(protocols: scenes-linear/quick with 1,000 training scenes, scenes-tokencut)\n")


@torch.inference_mode()
def draw_pca(folder: Path, backbones: dict[str, Backbone], path: Path) -> None:
    """A sheet: held-out scenes above, and below them the PCA colours of each backbone's last block."""
    scenes = open_images(folder)
    chosen = np.linspace(0, len(scenes) - 1, PICTURES).round().astype(int)
    crops = [center_crop(scenes.read(int(i)), 96, 96) for i in chosen]
    rows = {"scene": [crop / 255 for crop in crops]}
    for name, backbone in backbones.items():
        (last,) = backbone.features(backbone.normalize(np.stack(crops)))
        rows[name] = list(pca_colours(last.patches.numpy()))
    figure, axes = plt.subplots(len(rows), PICTURES, figsize=(1.3 * PICTURES, 1.35 * len(rows)), squeeze=False)
    for (name, pictures), line in zip(rows.items(), axes, strict=True):
        line[0].set_ylabel(name)
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
