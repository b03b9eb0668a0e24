"""What pretraining does that was not told: data, recipe and folder, with a sentence on each."""

import os
from pathlib import Path

import torch

from skipless.common.files import new_path
from skipless.datasets.public.places import DATA, first_there, say, scenes_instead
from skipless.ssl.run.folder import RUNS

CONFIGS = Path(__file__).resolve().parent.parent.parent / "configs"
PHOTOGRAPHS = (
    "imagenet/train", "coco/train2017", "coco/train2014", "tiny-imagenet/train", "imagenette/train",
    "VOCdevkit/VOC2012/JPEGImages", "VOCdevkit/VOC2007/JPEGImages", "coco/val2017",
)  # fmt: skip
"""Folders in `DATA`, the most images first."""


def fill(missing: list[str], words: list[str]) -> list[str]:
    """Words for data.path and out where they are missing; with data.path, and without any --config, a recipe that suits
    the data and the machine. See `cli.run`."""
    added: list[str] = []
    if "data.path" in missing:
        there = first_there(PHOTOGRAPHS)
        if there:
            say(f"data: {DATA / there}")
        images = DATA / there if there else scenes_instead("imagenette") / "train"
        if not any(word.startswith("--config=") for word in words):
            names, epochs = _recipe(bool(there), torch.cuda.is_available() and "--device=cpu" not in words)
            added += [f"--config={CONFIGS / name}" for name in names] + ([f"--epochs={epochs}"] if epochs else [])
            say(f"recipe: {', '.join(f'configs/{name}' for name in names)}{f', {epochs} epochs' if epochs else ''}")
        added.append(f"--data.path={images}")
    if ("out" in missing or added) and "--resume=true" not in words:
        added.append(f"--out={new_path(RUNS / 'pretrain')}")
    return added


def _recipe(photographs: bool, gpu: bool) -> tuple[list[str], int | None]:
    """Files in `CONFIGS`, and epochs in place of theirs."""
    if not photographs:
        return ["demo.yaml"], 4  # minutes on two cores
    if not gpu:
        return ["imagenette_cpu.yaml"], None
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    return ["vits16_skipless_soap.yaml", *(["one_gpu.yaml"] if alone else [])], None
