"""The training step: images a second, memory and model FLOPs utilization, against DINO's step written plainly.

    python benchmarks/train_step.py --recipe configs/demo.yaml --out results/speed/train_step_cpu
    python benchmarks/train_step.py --recipe configs/vits16_skipless_soap.yaml --batch_size 128 --device cuda \\
        --out results/speed/train_step_vits16

Model, crops, head and batch are those of a recipe; data are random and on the device already. The cases are residual
and skipless, AdamW and SOAP, each stepped in several ways: plainly (`plain_dino.py`), by the library, and by the
library compiled, without and with CUDA graphs (on CUDA), or with the products of linear layers in bf16 (on a CPU whose
processor is fast at that). On CUDA all is in bf16 by autocast, on a CPU else in float32. Cases are interleaved: every
round takes --steps steps of each case, all of them are timed one by one, and images a second are those of the average
step of all rounds but the first, so that the slow steps of SOAP count: with --steps a multiple of 10, each period of
its preconditioner once. Beside it the slowest step against the median.

Before it, --check steps (200 by default) of both ways, skipless with AdamW, from the same weights on the same crops of
at most 32 images, in float32 with the same clipping: the losses must agree, and the result holds both curves; on a CPU
with bf16 also the curve with these products.
"""

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from measuring import MeasuringSettings, markdown, on_device, publish, temporary_gb, timed, with_recipe
from steps import COMPILED, Step, build_model, flops_per_image, random_crops, read_recipe
from torch import Tensor
from tqdm import tqdm

from skipless.common import cli
from skipless.common.hardware import keep_freed_memory, peak_flops
from skipless.common.precision import has_bf16
from skipless.common.settings import plain
from skipless.ssl.config import Settings as Pretraining


@dataclass(kw_only=True)
class Settings(MeasuringSettings):
    """The training step."""

    recipe: Path
    """A recipe of configs/."""
    size: str | None = None
    """tiny, small, base ...; by default the recipe's."""
    batch_size: int | None = None
    """Images a step; by default the recipe's."""
    steps: int = 10
    """Steps of each case a round."""
    optimizers: tuple[Literal["adamw", "soap", "muon"], ...] = ("adamw", "soap")
    """Which; a GPU's time may be limited."""
    check: int = 200
    """Steps whose losses are compared."""
    threads: int | None = None
    """Of torch on a CPU."""


def loss_curves(recipe: Pretraining, device: torch.device, steps: int) -> dict[str, list[float]]:
    """Losses of both ways from the same weights on the same crops, float32; and of the library in bf16 on a CPU."""
    recipe = replace(recipe, batch_size=min(recipe.batch_size, 32))
    cases = {way: Step(recipe, device, False, way, "model") for way in ("library", "plain")}
    if device.type == "cpu" and has_bf16(device):
        cases["bf16 products"] = Step(recipe, device, True, "library", "model")
    curves: dict[str, list[float]] = {name: [] for name in cases}
    for step in tqdm(range(steps), desc="loss curves"):
        crops = random_crops(recipe, device, seed=step % 8)
        for name, case in cases.items():
            curves[name].append(case(crops).item())
    return curves


class Case:
    """A way of stepping a model with an optimizer, and the seconds of its steps. A compiler may fail: it is left out
    from then on, as the other figures are worth having."""

    def __init__(self, settings: Settings, device: torch.device, residual: bool, optimizer: str, way: str):
        self.residual, self.optimizer, self.way, self.device = residual, optimizer, way, device
        recipe = read_recipe(settings.recipe, settings.batch_size, residual, optimizer, settings.size)
        bf16 = has_bf16(device) if device.type == "cuda" else way == "bf16 products"
        self.step = Step(recipe, device, bf16, way)
        self.seconds: list[float] = []
        self.failed = False

    def steps(self, crops: list[Tensor], count: int) -> list[float]:
        """Seconds of each of `count` steps."""
        if self.failed:
            return []
        try:
            return [timed(partial(self.step, crops), self.device)[1] for _ in range(count)]
        except Exception as error:
            if self.way not in COMPILED:
                raise
            print(f"{self.way} failed: {type(error).__name__}: {error}", file=sys.stderr)
            self.failed = True
            return []

    def row(self, recipe: Pretraining, crops: list[Tensor]) -> dict[str, Any]:
        """What the seconds amount to."""
        # Average over whole periods of the preconditioner, so that every period's slow step counts once.
        mean, median = statistics.mean(self.seconds), statistics.median(self.seconds)
        row: dict[str, Any] = {
            "model": "residual" if self.residual else "skipless",
            "optimizer": self.optimizer,
            "step": self.way,
            "images_per_second": recipe.batch_size / mean,
            "mean_ms": 1000 * mean,
            "median_ms": 1000 * median,
            "slowest_over_median": max(self.seconds) / median,
        }
        if self.device.type == "cuda":
            flops, peak = recipe.batch_size * flops_per_image(self.step.student, recipe), peak_flops(self.device)
            # What a CUDA graph uses is kept for good, and new in none of its steps.
            memory = None if self.way == COMPILED[1] else temporary_gb(partial(self.step, crops), self.device)
            row |= {"activations_gb": memory, "model_flops_utilisation": flops / mean / peak if peak else None}
        return row


def time_cases(settings: Settings, recipe: Pretraining, device: torch.device) -> list[dict[str, Any]]:
    """Seconds of every step of every case, interleaved, and what they amount to."""
    more = COMPILED if device.type == "cuda" else ("bf16 products",) * has_bf16(device)
    cases = [
        Case(settings, device, residual, optimizer, way)
        for residual in (True, False)
        for optimizer in settings.optimizers
        for way in ("plain", "library", *more)
    ]
    crops = random_crops(recipe, device)
    for number in tqdm(range(settings.rounds + 1), desc="rounds"):
        for case in cases:
            times = case.steps(crops, settings.steps)
            if number:
                case.seconds += times
    return [case.row(recipe, crops) for case in cases if not case.failed]


def table(details: dict[str, Any]) -> list[str]:
    """The result in Markdown."""
    cases = {(case["model"], case["optimizer"], case["step"]): case for case in details["cases"]}
    rows = []
    for (model, optimizer, _), case in cases.items():
        faster = case["images_per_second"] / cases[model, optimizer, "plain"]["images_per_second"]
        rows.append({**case, "times_plain": faster})
    lines = [
        f"{details['architecture']}, batch {details['batch']}, on {{hardware}}; {details['rounds']} rounds of "
        f"{details['steps']} steps, interleaved.",
        "",
        *markdown(rows),
    ]
    for model in ("residual", "skipless") if {"adamw", "soap"} <= {optimizer for _, optimizer, _ in cases} else ():
        times = cases[model, "soap", "library"]["mean_ms"] / cases[model, "adamw", "library"]["mean_ms"]
        lines += ["", f"SOAP's average step, {model}: {times:.2f} times AdamW's."]
    if details["curves"]["library"]:
        differences = [f"{value:.1e} ({way})" for way, value in details["largest_difference"].items()]
        lines += ["", f"Losses differ from the library's in float32 by at most {', '.join(differences)}."]
    return lines


def measure(settings: Settings) -> None:
    """Compare the losses, time all cases, and publish."""
    device = on_device(settings.device)
    recipe = read_recipe(settings.recipe, settings.batch_size, False, "adamw", settings.size)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if device.type == "cpu":
        keep_freed_memory()
    torch.backends.cuda.matmul.allow_tf32 = False
    curves = loss_curves(recipe, device, settings.check)
    exact = curves["library"]
    largest = {
        way: max((abs(a - b) for a, b in zip(exact, curve, strict=True)), default=math.nan)
        for way, curve in curves.items()
        if way != "library"
    }
    cases = time_cases(settings, recipe, device)
    backbone = build_model(recipe).backbone
    details = {
        "architecture": f"{backbone.dim} wide, {backbone.depth} blocks, patch {backbone.patch}",
        "batch": recipe.batch_size,
        "rounds": settings.rounds,
        "steps": settings.steps,
        "curves": curves,
        "largest_difference": largest,
        "cases": cases,
    }
    result = {"task": "benchmark", "protocol": "train-step", "details": details, "settings": plain(recipe)}
    publish(settings.out, result, table(details), device)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: see the docstring of this file."""
    cli.run(measure, Settings, __doc__, with_recipe(arguments))


if __name__ == "__main__":
    main()
