"""Writes a recipe for your images, your machine and the time you give.

    python ssl/recipe.py --data photos --budget 30m --out photos.yaml
    python ssl/pretrain.py --config photos.yaml --out runs/photos

The speed is measured: twenty steps of the real training run, which are then thrown away. What was chosen, and why,
stands at the top of the file, and everything in it can be changed. It is made of configs/imagenette_cpu.yaml on a CPU
and of configs/vits16_skipless_soap.yaml on a GPU; for their own images and hours it gives what they say.
"""

import skipless.common.interruption  # noqa: F401

import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from skipless.common import cli, distributed
from skipless.common.files import write_text
from skipless.common.progress import rate
from skipless.datasets.images import open_images

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
TRAINING = 0.9  # share of a run's time; the rest is start, monitor and checkpoints
STEPS = 20  # of the measurement: two lines of the log
PATIENCE = 600  # seconds
FEWEST_IMAGES, FEWEST_STEPS, MOST_EPOCHS = 32, 300, 800


@dataclass(kw_only=True)
class Settings:
    """What the recipe is for."""

    data: str
    """Images, as --data.path of pretraining takes them."""
    budget: str
    """How long the run may take on this machine: 90s, 30m, 8h or 2d."""
    out: str
    """File to write, ending in .yaml; it must not exist yet."""
    residual: bool = False
    """A usual ViT, with skip connections, from the same embedding."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


def write_recipe(settings: Settings) -> Path:
    """Measure, choose, and write the recipe; its path.

    Raises:
        ValueError: a budget that is no time, too few images, or a training run that does not start.
        FileExistsError, FileNotFoundError: the file is there; the images are not.
    """
    seconds = seconds_of(settings.budget)
    out = Path(settings.out)
    if out.suffix not in (".yaml", ".yml"):
        raise ValueError(f"out is {settings.out}; a recipe ends in .yaml")
    if out.exists():
        raise FileExistsError(f"{out} is there already; give another --out, or remove it")
    images = open_images(settings.data)
    if len(images) < FEWEST_IMAGES:
        raise ValueError(
            f"{settings.data} has {len(images)} images; there is nothing to learn from fewer than {FEWEST_IMAGES}"
        )
    cuda = distributed.start(settings.device).type == "cuda"
    base = "vits16_skipless_soap" if cuda else "imagenette_cpu"
    recipe = yaml.safe_load((CONFIGS / f"{base}.yaml").read_text())
    recipe |= {"device": settings.device, "data": {"path": settings.data}}
    del recipe["out"]
    recipe["model"]["pool"] = "mean"
    if settings.residual:
        recipe["model"] |= {"residual": True, "init": "default", "patches": "whitened", "positions": "sines"}
    recipe["batch_size"] = batch_for(len(images), recipe["batch_size"])
    recipe["accumulate"] = max(1, recipe["batch_size"] // 128) if cuda else 1
    print(f"{len(images):,} images of {images.origin}; measuring {STEPS} steps of {recipe['batch_size']} images")
    speed = measure(recipe)
    reasons = choose(recipe, len(images), TRAINING * seconds * speed)
    lines = [
        f"A recipe for {len(images):,} images in {settings.budget}, from configs/{base}.yaml.",
        "",
        f"  python ssl/pretrain.py --config {out} --out runs/{out.stem}",
        "",
        f"- {rate(speed)} images/s were measured, in steps of {recipe['batch_size']} images;",
        *(f"- {reason};" for reason in reasons),
        f"- everything else is as in configs/{base}.yaml, whose head says why.",
    ]
    print("\n".join(lines[2:]))
    head = "\n".join(f"# {line}".rstrip() for line in lines)
    write_text(out, f"{head}\n{yaml.safe_dump(recipe, sort_keys=False)}")
    print(f"wrote {out}")
    return out


def seconds_of(budget: str) -> float:
    """Seconds of 90s, 30m, 8h or 2d.

    Examples:
        >>> seconds_of("1.5h")
        5400.0
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", budget.strip())
    if match is None or not float(match[1]):
        raise ValueError(f"budget is {budget!r}; give a time as 90s, 30m, 8h or 2d")
    return float(match[1]) * UNITS[match[2]]


def power_below(number: float) -> int:
    """The largest power of two that is not above a number of at least 1."""
    return 1 << (int(number).bit_length() - 1)


def batch_for(images: int, usual: int) -> int:
    """The usual batch, or, of few images, a power of two that leaves at least eight steps an epoch."""
    return min(usual, power_below(images / 8))


def choose(recipe: dict[str, Any], images: int, seen: float) -> list[str]:
    """Set in the recipe what depends on the number of images and on how many of them the run can look at.

    Returns:
        What was chosen, and why.
    """
    affordable = int(seen / images)
    epochs = recipe["epochs"] = min(max(1, affordable), MOST_EPOCHS)
    steps = epochs * (images // recipe["batch_size"])
    dino, optimizer = recipe["dino"], recipe["optimizer"]
    dino["out_dim"] = min(65536, max(256, power_below(images / 8)))
    dino["momentum_teacher"] = 0.99 if steps < 10_000 else 0.996
    dino["freeze_last_layer"] = round(min(1.0, epochs / 28), 3)
    if "warmup_teacher_temp_epochs" in dino:
        dino["warmup_teacher_temp_epochs"] = epochs // 10
    optimizer["warmup_epochs"] = round(min(10.0, epochs / 14), 3)
    recipe["monitor"]["every_epochs"] = max(1, round(epochs / 10))
    recipe["save_every_epochs"] = max(1, epochs // 20)
    reasons = [f"{epochs} epochs, {steps:,} steps: what the time allows"]
    if affordable < 1:
        reasons = [f"1 epoch, {steps:,} steps: more than the time allows, which is for {seen:,.0f} images"]
    if affordable > MOST_EPOCHS:
        reasons = [f"{epochs} epochs, {steps:,} steps: the time allows {affordable:,}, but more are never trained"]
    if steps < FEWEST_STEPS:
        reasons.append(f"so few steps teach little: {FEWEST_STEPS} and more are worth a look")
    reasons.append(f"{dino['out_dim']:,} prototypes: about one for eight images, so that all are used")
    reasons.append(f"teacher's momentum from {dino['momentum_teacher']:g}: a slower one would hardly leave its start")
    return reasons


def measure(recipe: dict[str, Any]) -> float:
    """Images a second of a training run with these settings.

    Raises:
        ValueError: it does not start, or takes minutes for a few steps.
    """
    with tempfile.TemporaryDirectory() as folder:
        file, run = Path(folder) / "recipe.yaml", Path(folder) / "run"
        # So many epochs that the schedule does not end before the measurement does.
        trial = recipe | {"epochs": STEPS, "log_every": STEPS // 2, "monitor": {"every_epochs": 0}, "out": str(run)}
        file.write_text(yaml.safe_dump(trial))
        command = [sys.executable, "-m", "skipless.ssl.pretrain", "--config", str(file)]
        with open(Path(folder) / "output.txt", "w+") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
            deadline = time.monotonic() + PATIENCE
            try:
                while process.poll() is None and time.monotonic() < deadline and len(speeds(run)) < 2:
                    time.sleep(0.2)
            finally:
                process.kill()
                process.wait()
            if len(speeds(run)) < 2:
                output.seek(0)
                said = output.read().strip().splitlines() or ["it is too slow"]
                raise ValueError(f"training does not get through {STEPS} steps: {said[-1]}")
        return speeds(run)[1]  # the first steps are slower: soap's first bases


def speeds(run: Path) -> list[float]:
    """Images a second in each line of a run's log so far."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [row["images_per_second"] for row in rows if "images_per_second" in row]


main = partial(cli.run, write_recipe, Settings, __doc__)

if __name__ == "__main__":
    main()
