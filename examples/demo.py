"""What `make demo` runs: write synthetic scenes, pretrain a small skipless ViT on them, and show what it learned.

    python examples/demo.py [--out demo]

Run again, it continues where it was interrupted; delete the folder to start afresh.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from skipless.datasets.images import open_images
from skipless.datasets.scenes import write_scenes
from skipless.eval.pca import pca_colours
from skipless.ssl.checkpoints import load_run_backbone
from skipless.ssl.crops import center_crop, normalize
from skipless.ssl.pretrain import build_model, parse
from skipless.ssl.vit import VisionTransformer

ROOT = Path(__file__).resolve().parent.parent
PICTURES = 8


def main() -> None:
    """Scenes, training, k-NN table, PCA picture."""
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
    untrained = build_model(settings).backbone.eval()  # the very weights that training started from
    trained, _ = load_run_backbone(run)
    picture = out / "pca.png"
    draw_pca(out / "scenes" / "val", {"untrained": untrained, "trained": trained}, picture)
    print_table(run, settings.monitor.k)
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


@torch.inference_mode()
def draw_pca(folder: Path, backbones: dict[str, VisionTransformer], path: Path) -> None:
    """A sheet: held-out scenes above, and below them the PCA colours of each backbone's last block."""
    scenes = open_images(folder)
    chosen = np.linspace(0, len(scenes) - 1, PICTURES).round().astype(int)
    crops = [center_crop(scenes.read(int(i)), 96, 96) for i in chosen]
    images = normalize(torch.from_numpy(np.stack(crops))[None])
    rows = {"scene": [crop / 255 for crop in crops]}
    for name, backbone in backbones.items():
        rows[name] = list(pca_colours(backbone.features(images)[0].patches.numpy()))
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
