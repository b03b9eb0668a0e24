"""Every command on miniatures: synthetic scenes and a ViT of two blocks, seconds on a CPU."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from skipless.datasets.synthetic.dataset import write_scenes
from skipless.datasets.synthetic.moving import write_moving_scenes
from skipless.ssl.model.vit import VisionTransformer

MODEL = ["--model.dim=24", "--model.depth=2", "--model.heads=2", "--model.patch=8"]
TRAINING = [
    *MODEL, "--batch_size=8", "--epochs=2", "--optimizer.warmup_epochs=1", "--log_every=1", "--data.workers=0",
    "--device=cpu", "--precision=fp32",
]  # fmt: skip
PRETRAINING = [
    *TRAINING, "--crops.global_crops_size=32", "--crops.local_crops_size=16", "--crops.local_crops_number=2",
    "--dino.out_dim=32", "--dino.hidden_dim=32", "--dino.bottleneck_dim=16",
]  # fmt: skip


PAIR = {"imname": "a.jpg", "imsize": [32, 32, 3], "bndbox": [2, 2, 30, 30], "kps": [[4, 5], [20, 30]]}


def write_data(folder: Path) -> None:
    """Leave FOLDER/scenes, in VOC's layout and as class folders, FOLDER/pairs, in SPair-71k's, FOLDER/videos, in
    DAVIS's, FOLDER/rooms, images and depths, and FOLDER/vit.safetensors, a random ViT."""
    write_scenes(folder / "scenes", train=24, val=12, size=32, workers=1)
    photo = next((folder / "scenes/train").rglob("*.jpg"))
    for place in ("pairs/JPEGImages/cat", "pairs/PairAnnotation/test"):
        (folder / place).mkdir(parents=True)
    shutil.copy(photo, folder / "pairs/JPEGImages/cat/a.jpg")
    names = {f"{side}_{name}": value for side in ("src", "trg") for name, value in PAIR.items()}
    (folder / "pairs/PairAnnotation/test/1.json").write_text(json.dumps({"category": "cat", **names}))
    for place in ("images", "depth"):
        (folder / "rooms" / place).mkdir(parents=True)
    for number in range(4):
        shutil.copy(photo, folder / f"rooms/images/{number}.jpg")
        np.save(folder / f"rooms/depth/{number}.npy", np.full((32, 32), 1.0 + number))
    write_moving_scenes(folder / "videos", videos=2, frames=4, size=32)
    torch.manual_seed(0)
    model = VisionTransformer(24, 2, 2, patch=8, image_size=32)
    weights = folder / "vit.safetensors"
    save_file(model.state_dict(), weights, {"architecture": json.dumps(model.architecture)})


def command_lines(folder: Path, out: Path) -> dict[str, list[str]]:
    """The words of every command of `skipless`, by its name, on what `write_data` left in `folder`; what they write is
    in `out`. In this order, for `summarize` reads what `pretrain` has left."""
    scenes, weights = folder / "scenes", folder / "vit.safetensors"
    train = scenes / "train"
    pictures_of_voc = scenes / "VOCdevkit/VOC2012/JPEGImages"  # more than in train/
    model = [f"--ckpt={weights}", "--device=cpu"]
    cached = [*model, f"--cache={out / 'cache'}"]
    classes = [*cached, f"--data.root={scenes}", "--size=32", "--pool=mean"]
    dense = [*cached, "--data.name=scenes", f"--data.root={scenes}"]
    pictures = [*model, "--size=32"]
    picture = f"--image={next(itertools.chain(train.rglob('*.jpg'), ['nothing.jpg']))}"
    lines = {
        "pretrain": [f"--data.path={train}", "--monitor.every_epochs=1", "--monitor.k=3", *PRETRAINING],
        "recipe": [f"--data={pictures_of_voc}", "--budget=1m", "--device=cpu", f"--out={out / 'recipe.yaml'}"],
        "distill": [f"--data.path={train}", f"--teacher.ckpt={weights}", "--views.size=32", *TRAINING],
        "supervised": [f"--data.root={scenes}", "--augmentation.size=32", *TRAINING],
        "report": [
            *cached, "--count=2", "--classification.size=32", "--classification.pool=mean", "--segmentation.size=32",
            f"--classification.root={scenes}", "--segmentation.name=scenes", f"--segmentation.root={scenes}",
            "--discovery.name=scenes", f"--discovery.root={scenes}", f"--correspondence.root={folder / 'pairs'}",
            "--saliency.name=saliency", f"--saliency.root={scenes / 'VOCdevkit/VOC2012'}",
            f"--video.root={folder / 'videos'}", "--depth.name=depth", f"--depth.root={folder / 'rooms'}",
        ],
        "segmentation": [*dense, "--protocol=quick", "--quick.size=32", "--quick.epochs=1"],
        "discovery": [*model, "--data.name=scenes", f"--data.root={scenes}"],
        "saliency": [*model, "--data.name=saliency", f"--data.root={scenes / 'VOCdevkit/VOC2012'}"],
        "retrieval": [*dense, "--size=32"],
        "clustering": [*dense, "--size=32", "--seeds=1"],
        "knn": [*classes, "--k=3"],
        "linear": [*classes, "--epochs=1"],
        "quantization": [*classes, "--k=3"],
        "conditioning": [f"--images={train}", "--size=tiny", "--pixels=32", "--count=2", "--cheap"],
        "embed": [str(train), *cached, "--size=32", f"--out={out / 'vectors.npz'}"],
        "pca": [*pictures, f"--images={train}", "--count=2", f"--out={out / 'pca.png'}"],
        "attention-maps": [*pictures, picture.replace("image", "images", 1), f"--out={out / 'attention.png'}"],
        "similarity": [*pictures, picture, f"--out={out / 'similarity.png'}"],
        "match": [*2 * [picture.removeprefix("--image=")], *pictures, f"--out={out / 'match.png'}"],
        "correspondence": [*pictures, f"--data.root={folder / 'pairs'}"],
        "video": [*pictures, f"--data.root={folder / 'videos'}"],
        "depth": [*cached, "--data.name=depth", f"--data.root={folder / 'rooms'}", "--size=32", "--head.epochs=1"],
        "crop-sheet": [picture, f"--out={out / 'crops.png'}"],
        "watch": [str(out / "pretrain"), "--once"],
        "summarize": [str(out / "pretrain"), f"--out={out / 'summary'}"],
        "prepare": ["voc07", f"--root={out / 'prepared'}", "--dry-run"],
        "export": [f"--ckpt={weights}", "--to=safetensors"],
        "cache": [f"--cache={out / 'cache'}"],
        "shard": [str(train), str(out / "shards"), "--workers=1"],
        "scenes": ["--train=10", "--val=10", "--size=32", "--workers=1"],
    }  # fmt: skip
    for name, words in lines.items():
        placed = ("watch", "summarize", "shard", "prepare", "cache")
        if name not in placed and not any(word.startswith("--out") for word in words):
            words.append(f"--out={out / name}")
    return lines
