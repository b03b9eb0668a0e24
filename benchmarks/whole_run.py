"""A whole run of pretraining: how fast, how good, and whether it goes on after an interruption.

    python benchmarks/whole_run.py --data data/scenes/train --run build/scenes --device cuda
    python benchmarks/whole_run.py --data VOC2012/JPEGImages --run build/voc --interrupt false --device cuda \\
        --recipe configs/vits16_skipless_soap.yaml

`ssl/pretrain.py` is stopped by SIGTERM when it has written its first checkpoint, and resumed to its end.
"""

import json
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from measuring import markdown, on_device, publish

from skipless.common import cli

ROOT = Path(__file__).resolve().parent.parent
SPEEDS = ("images_per_second", "data_share", "model_flops_utilisation")


@dataclass(kw_only=True)
class Settings:
    """A whole run of pretraining."""

    data: Path
    """Folder of images."""
    run: Path
    """The run's folder; one that was begun goes on."""
    recipe: Path = Path("configs/demo.yaml")
    """A recipe of configs/."""
    flags: list[str] = field(default_factory=list)
    """Further flags of ssl/pretrain.py."""
    launch: bool = False
    """Start it by torchrun, with one process."""
    interrupt: bool = True
    """Stop it after its first checkpoint, and resume."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where it runs."""
    out: Path | None = None
    """Where to write OUT.json and OUT.md; by default nowhere."""


def train(settings: Settings) -> list[int]:
    """Exit codes: of the run, and, if it was interrupted, of the one that goes on."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"] * settings.launch
    command = [
        sys.executable, *launcher, ROOT / "ssl" / "pretrain.py", "--config", settings.recipe, "--resume",
        f"--data.path={settings.data}", f"--out={settings.run}", f"--device={settings.device}", *settings.flags,
    ]  # fmt: skip
    process = subprocess.Popen(list(map(str, command)))
    while settings.interrupt and process.poll() is None and not list(settings.run.glob("checkpoints/step-*.pt")):
        time.sleep(0.2)
    if not settings.interrupt:
        return [process.wait()]
    process.send_signal(signal.SIGTERM)
    return [process.wait(), subprocess.run(list(map(str, command))).returncode]


def measure(settings: Settings) -> None:
    """Train, and publish; raises ValueError where the run did not reach its end."""
    device = on_device(settings.device)
    began = time.perf_counter()
    codes = train(settings)
    if codes[-1]:
        raise ValueError(f"ssl/pretrain.py ended with {codes}")
    entries = [json.loads(line) for line in (settings.run / "metrics.jsonl").read_text().splitlines()]
    logged = [entry for entry in entries if "loss" in entry]
    steady = logged[len(logged) // 2 :]
    values = {name: [entry[name] for entry in steady if name in entry] for name in SPEEDS}
    row: dict[str, Any] = {name: statistics.median(of) for name, of in values.items() if of}
    knn = [entry["monitor/knn"][-1] for entry in entries if "monitor/knn" in entry]
    row |= {"knn_untrained": knn[0], "knn_trained": knn[-1]} if knn else {}
    row |= {"last_loss": logged[-1]["loss"], "seconds": time.perf_counter() - began}
    details = {"exit_codes": codes, "flags": settings.flags, **row}
    result = {"task": "benchmark", "protocol": "whole-run", "recipe": str(settings.recipe), "details": details}
    lines = [f"{settings.recipe} {' '.join(settings.flags)} on {{hardware}}.", "", *markdown([row])]
    publish(settings.out, result, lines, device)


main = partial(cli.run, measure, Settings, __doc__)

if __name__ == "__main__":
    main()
