"""Where the time of a training step goes, and what limits it.

    python benchmarks/step_profile.py --recipe configs/demo.yaml --out results/speed/profile_demo
    python benchmarks/step_profile.py --recipe configs/vits16_skipless_soap.yaml --batch_size 128 --device cuda \\
        --out results/speed/profile_vits16

Two tables: the stages of the step, timed one by one (medians), and its operations by kind, from torch's profiler.
Below them the floating-point operations of the step (matrix products alone) and an estimate of the bytes it must move,
against what this machine reaches at either in a large product and a large copy, measured in the same run. The bytes
are an estimate: caches and fused kernels can go below it.

The bytes: a block writes and reads 16 values of the model's width for each token forward (norms 2, queries, keys and
values 3, attention 1, projection 1, MLP 4 + 4 + 1), twice that backward, and AdamW and the moving average go through 14
values for each parameter.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from measuring import MeasuringSettings, markdown, on_device, publish, timed, with_recipe
from steps import LR, MOMENTUM, TEMPERATURE, WEIGHT_DECAY, Step, flops_per_image, random_crops, read_recipe
from torch import nn

from skipless.common import cli
from skipless.common.hardware import keep_freed_memory
from skipless.common.precision import has_bf16
from skipless.common.settings import plain
from skipless.ssl.config import Settings as Pretraining
from skipless.ssl.dino import update_teacher
from skipless.ssl.optim.optimizers import set_rates

# Kinds of operations by parts of their names, the first that fits.
KINDS = {
    "attention": ("scaled_dot_product", "fmha", "flash", "efficient_attention", "cudnn_attention"),
    "products of linear layers": ("addmm", "aten::mm", "mkldnn_linear", "aten::linear", "aten::bmm"),
    "patch embedding": ("convolution",),
    "GELU": ("gelu",),
    "LayerNorm": ("layer_norm",),
    "optimizer, clipping, teacher's average": ("foreach", "fused", "lerp", "Optimizer", "linalg", "addcdiv", "addcmul"),
    "copies": ("copy_", "aten::cat", "aten::stack", "aten::fill_", "aten::clone"),
    "softmax, sums": ("softmax", "logsumexp", "aten::exp", "aten::sum", "aten::mean"),
}


@dataclass(kw_only=True)
class Settings(MeasuringSettings):
    """Where the time of a training step goes."""

    recipe: Path
    """A recipe of configs/."""
    batch_size: int | None = None
    """Images a step; by default the recipe's."""
    residual: bool = False
    """With skip connections."""
    optimizer: Literal["adamw", "soap", "muon"] = "adamw"
    """What steps."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the products."""
    rounds: int = 10
    """Steps whose stages are timed."""


def stages(step: Step, crops: list[torch.Tensor], rounds: int) -> dict[str, float]:
    """Median seconds of each stage."""
    seconds: dict[str, list[float]] = {}

    def clock(name: str, work: Callable[..., Any], *arguments: Any) -> Any:
        result, elapsed = timed(partial(work, *arguments), crops[0].device)
        seconds.setdefault(name, []).append(elapsed)
        return result

    for _ in range(rounds + 2):
        set_rates(step.optimizer, LR, WEIGHT_DECAY, freeze_last_layer=False)
        with step.autocast:
            with torch.no_grad():
                targets = clock("teacher, forward", step.teacher, crops[:1]).logits
            tokens = clock("student's backbone, forward", step.student.backbone, crops)
            pooled = torch.cat([t[:, 1:].mean(1) for t in tokens])
            logits = clock("student's head, forward", step.student.head, pooled)
            result = clock("loss", step.objective, logits, targets, step.views, TEMPERATURE)
        clock("backward", result.loss.backward)
        clock("clipping", nn.utils.clip_grad_norm_, step.student.parameters(), step.clip)
        clock("optimizer", step.optimizer.step)
        step.optimizer.zero_grad(set_to_none=True)
        step.objective.update_center()
        clock("teacher's average", update_teacher, step.teacher, step.student, MOMENTUM)
    return {name: statistics.median(times[2:]) for name, times in seconds.items()}


def operations(step: Step, crops: list[torch.Tensor], device: torch.device) -> dict[str, float]:
    """Seconds of a step by kind of operation, largest first."""
    cuda = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(3):
            step(crops)
    seconds: dict[str, float] = {}
    for event in profile.key_averages():
        if cuda and event.device_type != torch.autograd.DeviceType.CPU:
            continue  # a kernel, whose time its operation has already
        microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
        kind = next((k for k, parts in KINDS.items() if any(part in event.key for part in parts)), "the rest")
        seconds[kind] = seconds.get(kind, 0.0) + microseconds / 3e6
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def peaks(device: torch.device, bf16: bool) -> tuple[float, float]:
    """FLOP/s of a large product in the step's precision, bytes/s of a large copy."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, side, side, device=device).to(torch.bfloat16 if bf16 else torch.float32)
    source = torch.zeros(2**26 * (16 if device.type == "cuda" else 1), device=device)
    target = torch.empty_like(source)
    product = min(timed(lambda: a @ b, device)[1] for _ in range(7))
    copy = min(timed(lambda: target.copy_(source), device)[1] for _ in range(7))
    return 2 * side**3 / product, 2 * 4 * source.numel() / copy


def bytes_moved(step: Step, recipe: Pretraining, width: int) -> float:
    """Of one step, see the head of this file; `width`: bytes of a value."""
    backbone, crops = step.student.backbone, recipe.crops
    large, small = (1 + (side // backbone.patch) ** 2 for side in (crops.global_crops_size, crops.local_crops_size))
    # The teacher goes forward only: a third of what the student takes.
    tokens = recipe.batch_size * (2 * large * 4 / 3 + crops.local_crops_number * small)
    parameters = sum(p.numel() for p in step.student.parameters())
    return tokens * backbone.dim * backbone.depth * 2 * 16 * 3 * width + 14 * 4 * parameters


def shares(head: str, seconds: dict[str, float]) -> list[str]:
    """A table of seconds by name, with their share of all."""
    total = sum(seconds.values())
    return markdown([{head: name, "ms": 1000 * s, "share, %": 100 * s / total} for name, s in seconds.items()])


def measure(settings: Settings) -> None:
    """Profile the step, and publish."""
    device = on_device(settings.device)
    recipe = read_recipe(settings.recipe, settings.batch_size, settings.residual, settings.optimizer)
    if device.type == "cpu":
        keep_freed_memory()
    bf16 = settings.precision == "bf16" or (settings.precision == "auto" and has_bf16(device))
    step, crops = Step(recipe, device, bf16, "library"), random_crops(recipe, device)
    by_stage = stages(step, crops, settings.rounds)
    by_kind = operations(step, crops, device)
    flops_peak, bytes_peak = peaks(device, bf16)

    width = 2 if bf16 and device.type == "cuda" else 4
    flops, moved = recipe.batch_size * flops_per_image(step.student, recipe), bytes_moved(step, recipe, width)
    total, by_flops, by_bytes = sum(by_stage.values()), flops / flops_peak, moved / bytes_peak
    limits = {
        "flops": flops,
        "flops_per_second_measured": flops_peak,
        "seconds_by_flops": by_flops,
        "bytes": moved,
        "bytes_per_second_measured": bytes_peak,
        "seconds_by_bytes": by_bytes,
    }
    backbone, kind = step.student.backbone, "residual" if settings.residual else "skipless"
    numbers = "bf16" if width == 2 else "float32, products of linear layers in bf16" if bf16 else "float32"
    lines = [
        f"{kind}, {backbone.dim} wide, {backbone.depth} blocks, batch {recipe.batch_size}, {settings.optimizer}, "
        f"{numbers}, on {{hardware}}: {1000 * total:.0f} ms a step.",
        "",
        *shares("stage", by_stage),
        "",
        *shares("kind of operation", by_kind),
        "",
        f"{flops / 1e9:.0f} GFLOP a step; a large product reaches {flops_peak / 1e9:.0f} GFLOP/s here: "
        f"{1000 * by_flops:.0f} ms, {100 * by_flops / total:.0f} % of the step.",
        f"About {moved / 1e9:.1f} GB to move; a large copy reaches {bytes_peak / 1e9:.0f} GB/s: "
        f"{1000 * by_bytes:.0f} ms, {100 * by_bytes / total:.0f} % of the step.",
    ]
    details = {"seconds_by_stage": by_stage, "seconds_by_kind": by_kind, "limits": limits}
    result = {"task": "benchmark", "protocol": "step-profile", "details": details, "settings": plain(recipe)}
    publish(settings.out, result, lines, device)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: see the docstring of this file."""
    cli.run(measure, Settings, __doc__, with_recipe(arguments))


if __name__ == "__main__":
    main()
