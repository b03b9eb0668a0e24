"""What `make demo` runs: write synthetic scenes, pretrain a small skipless ViT on them, and show what it learned: two
tables, a PCA picture, and a page to open in a browser.

    python examples/demo.py [--out demo]

Run again, it continues where it was interrupted; delete the folder to start afresh.
"""

import contextlib
import io
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from skipless.common import cli
from skipless.common.pca import pca_colors
from skipless.common.pixels import center_crop
from skipless.common.progress import duration
from skipless.datasets.images import open_images
from skipless.datasets.synthetic.dataset import write_scenes
from skipless.datasets.synthetic.moving import write_moving_scenes
from skipless.eval.backbones import Backbone, load_backbone
from skipless.eval.report import DiscoveryData, SegmentationData, VideoData, make_report
from skipless.eval.report import Settings as ReportSettings
from skipless.ssl.config import Settings as Pretraining
from skipless.ssl.model.build import build_backbone
from skipless.ssl.run.checkpoints import export_backbone

ROOT = Path(__file__).resolve().parent.parent
PICTURES = 8


@dataclass
class Settings:
    """The demo."""

    out: Path = Path("demo")
    """Folder for everything the demo writes."""


def demo(settings: Settings) -> None:
    """Scenes, training, tables, PCA picture, page."""
    out = settings.out
    began = time.perf_counter()

    print(f"1/3 synthetic scenes -> {out / 'scenes'}", flush=True)
    write_scenes(out / "scenes", train=3000, val=600, size=96)

    print("\n2/3 pretraining a skipless ViT with DINO; no label is used", flush=True)
    run = out / "run"
    words = [f"--config={ROOT / 'configs/demo.yaml'}", f"--data.path={out / 'scenes/train'}", f"--out={run}"]
    if not (run / "backbone.json").exists():
        command = [sys.executable, str(ROOT / "ssl" / "pretrain.py"), *words, "--resume"]
        # In a session of its own: Ctrl-C reaches it as our SIGTERM, on which it saves a checkpoint.
        process = subprocess.Popen(command, start_new_session=True)
        try:
            status = process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            sys.exit("interrupted: the same command continues")
        if status:
            sys.exit("interrupted: the same command continues" if status > 128 else status)

    print("\n3/3 what it learned, on held-out scenes", flush=True)
    recipe = cli.parse(Pretraining, words)
    recipe.resume = False  # from the start
    torch.manual_seed(recipe.seed)
    # The very weights that training started from.
    (out / "untrained").mkdir(exist_ok=True)
    images = open_images(out / "scenes" / "train")
    start = build_backbone(recipe.model, recipe.crops.global_crops_size, recipe.seed, images)
    export_backbone(out / "untrained", start, {})
    backbones = {name: load_backbone(folder) for name, folder in (("untrained", out / "untrained"), ("trained", run))}
    picture = out / "pca.png"
    draw_pca(out / "scenes" / "val", backbones, picture)
    page = make_page(out, run)
    print_knn(run, recipe.monitor.k)
    print_dense(out)
    print(f"PCA picture: {picture}\npage:        {page}   (open it in a browser)")
    print(f"backbone:    {run / 'backbone.safetensors'}\nmetrics:     {run / 'metrics.jsonl'}")
    print(f"\n{duration(time.perf_counter() - began)} in all. Next, on your own images (any folder):\n")
    print("    python ssl/pretrain.py --config configs/imagenette_cpu.yaml --data.path FOLDER --out runs/mine")


def print_knn(run: Path, k: int) -> None:
    """k-NN accuracy of the blocks before and after training, from the run's log."""
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = [entry for entry in entries if "monitor/knn" in entry]
    before, after = measured[0], measured[-1]
    print(f"\n{k}-NN accuracy on 600 held-out scenes of 10 classes (chance: 10 %)\n")
    print(f"{'':22}{'untrained':>10}{'trained':>10}")
    for name, choose in (("last block", lambda knn: knn[-1]), ("best block", max)):
        print(f"{name:22}{100 * choose(before['monitor/knn']):9.1f}%{100 * choose(after['monitor/knn']):9.1f}%")
    print()


def make_page(out: Path, run: Path) -> Path:
    """Measure both backbones as the evaluations do, and write the page that compares them."""
    write_moving_scenes(out / "videos", size=96)
    settings = ReportSettings(
        ckpt=(str(out / "untrained"), str(run)),
        names=("untrained", "trained"),
        out=str(out / "report"),
        images=str(out / "scenes" / "val"),
        size=96,
        tasks=("segmentation", "tokencut", "video"),
        segmentation=SegmentationData(name="scenes", root=str(out / "scenes"), size=96, max_images=300),
        discovery=DiscoveryData(name="scenes", root=str(out / "scenes")),
        video=VideoData(root=str(out / "videos"), size=96),
        cache=str(out / "features"),
        batch_size=64,
    )
    with contextlib.redirect_stdout(io.StringIO()):  # its table is printed below, in fewer words
        return make_report(settings)


def print_dense(out: Path) -> None:
    """What patch features are good for, before and after training."""
    print(f"Patch features of the same scenes, last block\n\n{'':34}{'untrained':>10}{'trained':>10}")
    for title, file in (
        ("linear segmentation, mIoU", "segmentation/segmentation.json"),
        ("object discovery, CorLoc", "tokencut/discovery.json"),
        ("objects in moving scenes, J&F", "video/video.json"),
    ):
        results = [
            json.loads((out / "report" / "results" / name / file).read_text()) for name in ("untrained", "trained")
        ]
        before, after = (100 * result["value"] for result in results)
        print(f"{title:34}{before:9.1f}%{after:9.1f}%   {results[0]['protocol']}")
    print()


@torch.inference_mode()
def draw_pca(folder: Path, backbones: dict[str, Backbone], path: Path) -> None:
    """A sheet: held-out scenes above, and below them the PCA colors of each backbone's last block."""
    scenes = open_images(folder)
    chosen = np.linspace(0, len(scenes) - 1, PICTURES).round().astype(int)
    crops = [center_crop(scenes.read(int(i)), 96, 96) for i in chosen]
    rows = {"scene": [crop / 255 for crop in crops]}
    for name, backbone in backbones.items():
        (last,) = backbone.features(backbone.normalize(np.stack(crops)))
        rows[name] = list(pca_colors(last.patches.numpy()))
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


main = partial(cli.run, demo, Settings, __doc__)

if __name__ == "__main__":
    main()
