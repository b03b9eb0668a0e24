"""Where the time of a training step goes, and what limits it.

    python benchmarks/step_profile.py --config configs/demo.yaml --out results/speed/profile_demo
    python benchmarks/step_profile.py --config configs/vits16_skipless_soap.yaml --batch_size 128 --device cuda \\
        --out results/speed/profile_vits16

Two tables: the stages of the step, timed one by one (medians), and its operations by kind, from torch's profiler.
Below them the floating-point operations of the step (matrix products alone) and an estimate of the bytes it must move,
against what this machine reaches at either in a large product and a large copy, measured in the same run. The bytes
are an estimate: caches and fused kernels can go below it.

The bytes: a block writes and reads 16 values of the model's width for each token forward (norms 2, queries, keys and
values 3, attention 1, projection 1, MLP 4 + 4 + 1), twice that backward, and AdamW and the moving average go through 14
values for each parameter.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from train_step import LR, MOMENTUM, TEMPERATURE, WEIGHT_DECAY, Step, crops_of, flops_per_image, settings_of

from skipless.common.files import write_result
from skipless.common.hardware import keep_freed_memory
from skipless.common.precision import has_bf16
from skipless.common.provenance import provenance
from skipless.common.settings import plain
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


def stages(step: Step, crops: list[torch.Tensor], rounds: int, wait: Callable[[], None]) -> dict[str, float]:
    """Median seconds of each stage."""
    seconds: dict[str, list[float]] = {}

    def clock(name: str, work: Callable[..., Any], *arguments: Any) -> Any:
        wait()
        began = time.perf_counter()
        result = work(*arguments)
        wait()
        seconds.setdefault(name, []).append(time.perf_counter() - began)
        return result

    for _ in range(rounds + 2):
        set_rates(step.optimizer, LR, WEIGHT_DECAY, freeze_last_layer=False)
        with step.autocast:
            with torch.no_grad():
                targets = clock("teacher, forward", step.teacher, crops[:1])
            tokens = clock("student's backbone, forward", step.student.backbone, crops)
            pooled = torch.cat([t[:, 1:].mean(1) for t in tokens])
            logits = clock("student's head, forward", step.student.head, pooled)
            found = clock("loss", step.objective, logits, targets, step.views, TEMPERATURE)
        clock("backward", found.loss.backward)
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
    found: dict[str, float] = {}
    for event in profile.key_averages():
        if cuda and event.device_type != torch.autograd.DeviceType.CPU:
            continue  # a kernel, whose time its operation has already
        microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
        kind = next((k for k, parts in KINDS.items() if any(part in event.key for part in parts)), "the rest")
        found[kind] = found.get(kind, 0.0) + microseconds / 3e6
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def peaks(device: torch.device, bf16: bool, wait: Callable[[], None]) -> tuple[float, float]:
    """FLOP/s of a large product in the step's precision, bytes/s of a large copy."""
    side = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if bf16 else torch.float32
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    source = torch.zeros(2**26 * (16 if device.type == "cuda" else 1), device=device)
    target = torch.empty_like(source)

    def best_of(work: Callable[[], Any]) -> float:
        times = []
        for _ in range(7):
            wait()
            began = time.perf_counter()
            work()
            wait()
            times.append(time.perf_counter() - began)
        return min(times)

    return 2 * side**3 / best_of(lambda: a @ b), 2 * 4 * source.numel() / best_of(lambda: target.copy_(source))


def main() -> None:
    """Command line: see the docstring of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="A recipe of configs/.")
    parser.add_argument("--batch_size", type=int, help="Images a step; by default the recipe's.")
    parser.add_argument("--residual", action="store_true", help="With skip connections.")
    parser.add_argument("--optimizer", default="adamw", choices=["adamw", "soap", "muon"])
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=10, help="Steps whose stages are timed (default: 10).")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, help="Where to write OUT.json and OUT.md.")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    try:
        settings = settings_of(arguments.config, arguments.batch_size, arguments.residual, arguments.optimizer)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if device.type == "cpu":
        keep_freed_memory()
    bf16 = arguments.precision == "bf16" or (arguments.precision == "auto" and has_bf16(device))
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    step, crops = Step(settings, device, bf16, "library"), crops_of(settings, device)
    of_stages = stages(step, crops, arguments.rounds, wait)
    of_kinds = operations(step, crops, device)
    flops_peak, bytes_peak = peaks(device, bf16, wait)

    backbone = step.student.backbone
    flops = settings.batch_size * flops_per_image(step.student, settings)
    counts = {
        size: 1 + (size // backbone.patch) ** 2
        for size in (settings.crops.global_crops_size, settings.crops.local_crops_size)
    }
    globals_, locals_ = (counts[size] for size in (settings.crops.global_crops_size, settings.crops.local_crops_size))
    tokens = settings.batch_size * (
        2 * globals_ * 4 / 3 + settings.crops.local_crops_number * locals_
    )  # teacher: forward only
    width = 2 if bf16 and device.type == "cuda" else 4
    moved = tokens * backbone.dim * backbone.depth * 2 * 16 * 3 * width
    moved += 14 * 4 * sum(p.numel() for p in step.student.parameters())
    total = sum(of_stages.values())
    limits = {
        "flops": flops,
        "flops_per_second_measured": flops_peak,
        "seconds_by_flops": flops / flops_peak,
        "bytes": moved,
        "bytes_per_second_measured": bytes_peak,
        "seconds_by_bytes": moved / bytes_peak,
    }
    about = provenance(device)
    kind = "residual" if arguments.residual else "skipless"
    numbers = "bf16" if bf16 and width == 2 else "float32, products of linear layers in bf16" if bf16 else "float32"
    lines = [
        f"{kind}, {backbone.dim} wide, {backbone.depth} blocks, batch {settings.batch_size}, {arguments.optimizer}, "
        f"{numbers}, on {about['hardware']}: {1000 * total:.0f} ms a step.",
        "",
        "| stage | ms | share |",
        "|---|---:|---:|",
        *[f"| {name} | {1000 * s:.1f} | {100 * s / total:.0f} % |" for name, s in of_stages.items()],
        "",
        "| kind of operation | ms | share |",
        "|---|---:|---:|",
        *[f"| {name} | {1000 * s:.1f} | {100 * s / sum(of_kinds.values()):.0f} % |" for name, s in of_kinds.items()],
        "",
        f"{flops / 1e9:.0f} GFLOP a step; a large product reaches {flops_peak / 1e9:.0f} GFLOP/s here: "
        f"{1000 * limits['seconds_by_flops']:.0f} ms, {100 * limits['seconds_by_flops'] / total:.0f} % of the step.",
        f"About {moved / 1e9:.1f} GB to move; a large copy reaches {bytes_peak / 1e9:.0f} GB/s: "
        f"{1000 * limits['seconds_by_bytes']:.0f} ms, {100 * limits['seconds_by_bytes'] / total:.0f} % of the step.",
    ]
    text = "\n".join(lines) + "\n"
    details = {"seconds_by_stage": of_stages, "seconds_by_kind": of_kinds, "limits": limits}
    if arguments.out:
        result = {"task": "benchmark", "protocol": "step-profile", "details": details, "settings": plain(settings)}
        write_result(arguments.out, {**result, **about}, text)
    print(text)


if __name__ == "__main__":
    main()
