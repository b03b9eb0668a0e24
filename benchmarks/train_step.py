"""The training step: images a second, memory and model FLOPs utilisation, against DINO's step written plainly.

    python benchmarks/train_step.py --config configs/demo.yaml --out results/speed/train_step_cpu
    python benchmarks/train_step.py --config configs/vits16_skipless_soap.yaml --batch_size 128 --device cuda \\
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

import argparse
import math
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from plain_dino import PlainLoss, plain_clip, plain_logits, plain_update_teacher
from torch import Tensor, nn
from tqdm import tqdm

from skipless.common import cli
from skipless.common.files import write_result
from skipless.common.hardware import keep_freed_memory, peak_flops
from skipless.common.precision import autocast, has_bf16
from skipless.common.provenance import provenance
from skipless.common.settings import plain
from skipless.ssl.config import Settings
from skipless.ssl.dino import DINOLoss, DINOModel, build_dino, make_teacher, update_teacher
from skipless.ssl.model.build import build_backbone
from skipless.ssl.optim.optimizers import make_optimizer, set_rates

COMPILED = ("compiled", "compiled, CUDA graphs")
LR, WEIGHT_DECAY, TEMPERATURE, MOMENTUM = 1e-4, 0.04, 0.04, 0.996


def settings_of(
    config: Path, batch_size: int | None, residual: bool, optimizer: str, size: str | None = None
) -> Settings:
    """A recipe with another model and optimizer; initialization follows the model."""
    words = [f"--config={config}", "--data.path=none", "--out=none", f"--model.residual={str(residual).lower()}"]
    words += [f"--optimizer.name={optimizer}"] + ([f"--batch_size={batch_size}"] if batch_size else [])
    words += [f"--model.size={size}"] if size else []
    words += [f"--model.init={'default' if residual else 'small'}"]
    return cli.parse(Settings, words)


def crops_of(settings: Settings, device: torch.device, seed: int = 0) -> list[Tensor]:
    """Random normalised crops of a batch, globals and locals."""
    generator = torch.Generator().manual_seed(seed)
    crops, batch = settings.crops, settings.batch_size
    shapes = [(2 * batch, crops.global_crops_size)] + (
        [(crops.local_crops_number * batch, crops.local_crops_size)] * bool(crops.local_crops_number)
    )
    return [torch.randn(count, 3, size, size, generator=generator).to(device) for count, size in shapes]


class Step:
    """One case: a student, its teacher and an optimizer; each call is one training step and returns the loss."""

    def __init__(self, settings: Settings, device: torch.device, bf16: bool, way: str, clip_by: Any = "parameter"):
        torch.manual_seed(0)
        backbone = build_backbone(settings.model, settings.crops.global_crops_size, settings.seed)
        self.student: DINOModel = build_dino(backbone, settings.dino, settings.model.pool).to(device)
        self.teacher = make_teacher(self.student)
        self.optimizer = make_optimizer(self.student, settings.optimizer)
        dino = settings.dino
        loss = (dino.out_dim, dino.student_temp, dino.center_momentum)
        self.fast, self.clip_by, self.views = way != "plain", clip_by, 2 + settings.crops.local_crops_number
        self.objective: nn.Module = (DINOLoss(*loss) if self.fast else PlainLoss(*loss)).to(device)
        self.autocast = autocast(device, bf16)
        self.clip = settings.clip_grad
        if way in COMPILED:
            self.student.backbone.attention = self.teacher.backbone.attention = "sdpa"
        self.student_logits, self.teacher_logits = (
            torch.compile(network, dynamic=False) if way == "compiled" else network
            for network in (self.student, self.teacher)
        )
        if way == "compiled, CUDA graphs":
            self.student_logits = torch.compile(self.student, dynamic=False, mode="reduce-overhead")
            self.teacher_logits = torch.compile(self.teacher, dynamic=False, mode="reduce-overhead")

    def __call__(self, crops: list[Tensor]) -> Tensor:
        set_rates(self.optimizer, LR, WEIGHT_DECAY, freeze_last_layer=False)
        torch.compiler.cudagraph_mark_step_begin()  # without effect where there are no CUDA graphs
        with self.autocast:
            with torch.no_grad():
                targets = self.teacher_logits(crops[:1]) if self.fast else plain_logits(self.teacher, crops[:1])
            logits = self.student_logits(crops) if self.fast else plain_logits(self.student, crops)
            found = self.objective(logits, targets, self.views, TEMPERATURE)
        loss = found.loss if self.fast else found
        loss.backward()
        if self.fast:
            nn.utils.clip_grad_norm_(self.student.parameters(), self.clip)
        else:
            plain_clip(self.student, self.clip, self.clip_by)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.fast:
            self.objective.update_center()
            update_teacher(self.teacher, self.student, MOMENTUM)
        else:
            plain_update_teacher(self.teacher, self.student, MOMENTUM)
        return loss.detach()


def loss_curves(settings: Settings, device: torch.device, steps: int) -> dict[str, list[float]]:
    """Losses of both ways from the same weights on the same crops, float32; and of the library in bf16 on a CPU."""
    settings = replace(settings, batch_size=min(settings.batch_size, 32))
    cases = {way: Step(settings, device, False, way, "model") for way in ("library", "plain")}
    if device.type == "cpu" and has_bf16(device):
        cases["bf16 products"] = Step(settings, device, True, "library", "model")
    curves: dict[str, list[float]] = {name: [] for name in cases}
    for step in tqdm(range(steps), desc="loss curves"):
        crops = crops_of(settings, device, seed=step % 8)
        for name, case in cases.items():
            curves[name].append(case(crops).item())
    return curves


def time_cases(arguments: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Seconds of every step of every case, interleaved, and what they amount to."""
    bf16, cuda = has_bf16(device), device.type == "cuda"
    rows = []
    more = COMPILED if cuda else ("bf16 products",) * bf16
    cases = [(r, o, way) for r in (True, False) for o in ("adamw", "soap") for way in ("plain", "library", *more)]
    built = {}
    for residual, optimizer, way in cases:
        settings = settings_of(arguments.config, arguments.batch_size, residual, optimizer, arguments.size)
        built[residual, optimizer, way] = Step(settings, device, bf16 if cuda else way == "bf16 products", way)
    crops = crops_of(settings, device)
    seconds: dict[tuple, list[float]] = {case: [] for case in cases}
    memory: dict[tuple, float] = {}
    failed: set[tuple] = set()
    for number in tqdm(range(arguments.rounds + 1), desc="rounds"):
        for case, step in built.items():
            if case in failed:
                continue
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            for _ in range(arguments.steps):
                began = time.perf_counter()
                try:
                    step(crops)
                except Exception as error:  # a compiler's: the other figures are worth having
                    if case[2] not in COMPILED:
                        raise
                    print(f"{case} failed: {type(error).__name__}: {error}", file=sys.stderr)
                    failed.add(case)
                    break
                if cuda:
                    torch.cuda.synchronize()
                if number:
                    seconds[case].append(time.perf_counter() - began)
            if cuda:
                memory[case] = (torch.cuda.max_memory_allocated() - before) / 2**30
    peak = peak_flops(device)
    for residual, optimizer, way in (case for case in cases if case not in failed):
        times, model = seconds[residual, optimizer, way], built[residual, optimizer, way].student
        # Average over whole periods of the preconditioner, so that every period's slow step counts once.
        mean, median = statistics.mean(times), statistics.median(times)
        row: dict[str, Any] = {
            "model": "residual" if residual else "skipless",
            "optimizer": optimizer,
            "step": way,
            "images_per_second": settings.batch_size / mean,
            "mean_ms": 1000 * mean,
            "median_ms": 1000 * median,
            "slowest_over_median": max(times) / median,
        }
        if cuda:
            flops = settings.batch_size * flops_per_image(model, settings)
            # What a CUDA graph uses is kept for good, and new in none of its steps.
            row |= {"activations_gb": None if way == COMPILED[1] else memory[residual, optimizer, way]}
            row |= {"model_flops_utilisation": flops / mean / peak if peak else None}
        rows.append(row)
    return rows


def flops_per_image(model: DINOModel, settings: Settings) -> float:
    """Of one training step: 2 for every multiplication of the backbones' matrices and attention, thrice for the student
    (forward, and two products backward) on all crops, once for the teacher on the global ones; heads likewise."""
    backbone, crops = model.backbone, settings.crops
    per_token = 2 * sum(p.numel() for p in backbone.blocks.parameters() if p.ndim == 2)

    def of(size: int) -> float:
        tokens = 1 + backbone.registers + (size // backbone.patch) ** 2
        attention = 4 * backbone.depth * backbone.dim * tokens**2
        return tokens * per_token + attention + tokens * 2 * 3 * backbone.patch**2 * backbone.dim

    head = 2 * sum(p.numel() for p in model.head.parameters() if p.ndim == 2)
    student = (
        2 * of(crops.global_crops_size)
        + crops.local_crops_number * of(crops.local_crops_size)
        + (2 + crops.local_crops_number) * head
    )
    return 3 * student + 2 * of(crops.global_crops_size) + 2 * head


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    details = result["details"]
    lines = [
        f"{details['architecture']}, batch {details['batch']}, on {result['hardware']}; {details['rounds']} rounds of "
        f"{details['steps']} steps, interleaved.",
        "",
        "| model | optimizer | step | images/s | mean ms | slowest step / median | times plain | MFU |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    speed = {(r["model"], r["optimizer"], r["step"]): r["images_per_second"] for r in details["cases"]}
    for r in details["cases"]:
        ratio = r["images_per_second"] / speed[r["model"], r["optimizer"], "plain"]
        lines.append(
            f"| {r['model']} | {r['optimizer']} | {r['step']} | {r['images_per_second']:.1f} | {r['mean_ms']:.0f} | "
            f"{r['slowest_over_median']:.2f} | {ratio:.2f} | "
            + (f"{100 * r['model_flops_utilisation']:.1f} % |" if r.get("model_flops_utilisation") else "|")
        )
    mean = {(r["model"], r["optimizer"]): r["mean_ms"] for r in details["cases"] if r["step"] == "library"}
    for model in ("residual", "skipless"):
        lines.append(f"\nSOAP's average step, {model}: {mean[model, 'soap'] / mean[model, 'adamw']:.2f} times AdamW's.")
    if details["curves"]["library"]:
        differences = [f"{value:.1e} ({way})" for way, value in details["largest_difference"].items()]
        lines.append(
            f"\nLosses over {len(details['curves']['library'])} steps differ from the library's in float32 by at most "
            f"{', '.join(differences)}."
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line: see the docstring of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="A recipe of configs/.")
    parser.add_argument("--size", help="tiny, small, base ...; by default the recipe's.")
    parser.add_argument("--batch_size", type=int, help="Images a step; by default the recipe's.")
    parser.add_argument("--rounds", type=int, default=5, help="Rounds that count; one more warms up (default: 5).")
    parser.add_argument("--steps", type=int, default=10, help="Steps of each case a round (default: 10).")
    parser.add_argument("--check", type=int, default=200, help="Steps whose losses are compared (default: 200).")
    parser.add_argument("--threads", type=int, help="Of torch on a CPU.")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, help="Where to write OUT.json and OUT.md.")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if device.type == "cpu":
        keep_freed_memory()
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        settings = settings_of(arguments.config, arguments.batch_size, False, "adamw", arguments.size)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    curves = loss_curves(settings, device, arguments.check)
    exact = curves["library"]
    largest = {
        way: max((abs(a - b) for a, b in zip(exact, curve, strict=True)), default=math.nan)
        for way, curve in curves.items()
        if way != "library"
    }
    backbone = build_backbone(settings.model, settings.crops.global_crops_size, settings.seed)
    details = {
        "architecture": f"{backbone.dim} wide, {backbone.depth} blocks, patch {backbone.patch}",
        "batch": settings.batch_size,
        "rounds": arguments.rounds,
        "steps": arguments.steps,
        "curves": curves,
        "largest_difference": largest,
        "cases": time_cases(arguments, device),
    }
    result = {
        "task": "benchmark",
        "protocol": "train-step",
        "details": details,
        "settings": plain(settings),
        **provenance(device),
    }
    text = table(result)
    if arguments.out:
        write_result(arguments.out, result, text)
    print(text)


if __name__ == "__main__":
    main()
