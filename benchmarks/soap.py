"""SOAP's step: pytorch_optimizer's implementation against ssl/optim/soap.py, on the shapes of a model's parameters.

    python benchmarks/soap.py --config configs/demo.yaml --out results/speed/soap_demo
    python benchmarks/soap.py --model base --device cuda --out results/speed/soap_base

The parameters are those of a named ViT/16, without a head, or of the student of a recipe; gradients are random, and the
same for all. The cases are the library's; ours with all refreshes in the same step, as the library has them; and ours
with the refreshes spread over the steps, as training has it. Cases are interleaved: every round takes one period of the
preconditioner of each case, each step is timed alone, and a case's time is its average step of all rounds but the
first. The first step of all, which finds the eigenbases, is measured apart.
"""

import argparse
import importlib.metadata
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_optimizer
import torch
from torch import nn
from tqdm import tqdm

from skipless.common import cli
from skipless.common.files import write_result
from skipless.common.hardware import keep_freed_memory
from skipless.common.provenance import provenance
from skipless.ssl.config import Settings
from skipless.ssl.dino import build_dino
from skipless.ssl.model import vit
from skipless.ssl.model.build import build_backbone
from skipless.ssl.optim.optimizers import OptimizerSettings, parameter_groups
from skipless.ssl.optim.soap import SOAP

GRADIENTS = 4  # different ones, in turns


def model_of(arguments: argparse.Namespace) -> tuple[nn.Module, OptimizerSettings]:
    """The model, and the optimizer's settings."""
    if arguments.config:
        settings = cli.parse(Settings, [f"--config={arguments.config}", "--data.path=none", "--out=none"])
        backbone = build_backbone(settings.model, settings.crops.global_crops_size, settings.seed)
        return build_dino(backbone, settings.dino, settings.model.pool), settings.optimizer
    return {"tiny": vit.vit_tiny, "small": vit.vit_small, "base": vit.vit_base}[arguments.model](), OptimizerSettings()


class Case:
    """An optimizer over copies of a model's parameters; each call is one step and returns its seconds."""

    def __init__(self, groups: list[dict[str, Any]], make: Callable[..., torch.optim.Optimizer], **options: Any):
        copies = [{**g, "params": [nn.Parameter(p.detach().clone()) for p in g["params"]]} for g in groups]
        self.parameters = [p for group in copies for p in group["params"]]
        self.optimizer = make(copies, **options)
        self.cuda = self.parameters[0].is_cuda

    def __call__(self, gradients: list[torch.Tensor]) -> float:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        if self.cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        self.optimizer.step()
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began


def time_cases(cases: dict[str, Case], gradients: list[list[torch.Tensor]], period: int, rounds: int) -> list[dict]:
    """Milliseconds of every case, interleaved; on CUDA the memory that a step needs for a while, too."""
    first = {name: case(gradients[0]) for name, case in cases.items()}
    seconds: dict[str, list[list[float]]] = {name: [] for name in cases}
    memory = dict.fromkeys(cases, 0)
    for number in tqdm(range(rounds + 1), desc="rounds"):
        for name, case in cases.items():
            if case.cuda:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            times = [case(gradients[step % GRADIENTS]) for step in range(period)]
            if case.cuda:
                memory[name] = torch.cuda.max_memory_allocated() - before
            if number:
                seconds[name].append(times)
    rows = []
    for name, case in cases.items():
        # The same step of every period does the same work: its median over the rounds is free of what disturbed one.
        steps = [statistics.median(times) for times in zip(*seconds[name], strict=True)]
        averages = [1000 * statistics.mean(times) for times in seconds[name]]
        row = {
            "implementation": name,
            "first_ms": 1000 * first[name],
            "mean_ms": statistics.median(averages),
            "mean_ms_of_rounds": averages,
            "median_ms": 1000 * statistics.median(steps),
            "slowest_ms": 1000 * max(steps),
            "slowest_over_median": max(steps) / statistics.median(steps),
        }
        rows.append(row | ({"temporary_gb": memory[name] / 2**30} if case.cuda else {}))
    return rows


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    details = result["details"]
    lines = [
        f"{details['parameters'] / 1e6:.1f} M parameters ({details['model']}), sides up to "
        f"{details['max_precondition_dim']:,}, refreshed every {details['period']} steps, on {result['hardware']}, "
        f"{details['threads']} threads; {details['rounds']} rounds of one period, interleaved.",
        "",
        "| implementation | mean ms | range of rounds | median step ms | slowest step ms | slowest / median | "
        "first step ms | times faster |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in details["cases"]:
        rounds = r["mean_ms_of_rounds"]
        lines.append(
            f"| {r['implementation']} | {r['mean_ms']:.1f} | {min(rounds):.1f} to {max(rounds):.1f} | "
            f"{r['median_ms']:.1f} | {r['slowest_ms']:.1f} | {r['slowest_over_median']:.2f} | {r['first_ms']:.0f} | "
            f"{details['cases'][0]['mean_ms'] / r['mean_ms']:.2f} |"
        )
    lines.append(f"\nLargest difference of a parameter after all steps: {details['largest_difference']:.1e}.")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line: see the docstring of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", choices=["tiny", "small", "base"], help="A ViT/16 without a head.")
    which.add_argument("--config", type=Path, help="A recipe of configs/ for pretraining: its student and settings.")
    parser.add_argument("--max_precondition_dim", type=int, help="By default the recipe's, or 10,000.")
    parser.add_argument("--rounds", type=int, default=5, help="Rounds that count; one more warms up (default: 5).")
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
    torch.manual_seed(0)
    try:
        model, settings = model_of(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    groups = parameter_groups(model.to(device))
    parameters = [p for group in groups for p in group["params"]]
    gradients = [[torch.randn_like(p) for p in parameters] for _ in range(GRADIENTS)]
    options = {
        "lr": 1e-4,
        "betas": settings.betas or (0.95, 0.95),
        "weight_decay": 0.04,
        "precondition_frequency": settings.precondition_every,
        "max_precondition_dim": arguments.max_precondition_dim or settings.max_precondition_dim,
    }
    cases = {
        "pytorch_optimizer": Case(groups, pytorch_optimizer.SOAP, **options),
        "ours, refreshed together": Case(groups, SOAP, spread=False, **options),
        "ours, spread": Case(groups, SOAP, spread=True, **options),
    }
    rows = time_cases(cases, gradients, settings.precondition_every, arguments.rounds)
    pairs = zip(*(case.parameters for case in list(cases.values())[:2]), strict=True)
    details = {
        "model": str(arguments.config) if arguments.config else f"vit_{arguments.model}",
        "parameters": sum(p.numel() for p in parameters),
        "max_precondition_dim": options["max_precondition_dim"],
        "period": settings.precondition_every,
        "rounds": arguments.rounds,
        "threads": torch.get_num_threads(),
        "largest_difference": max((a - b).abs().max().item() for a, b in pairs),
        "pytorch_optimizer": importlib.metadata.version("pytorch-optimizer"),
        "cases": rows,
    }
    result = {"task": "benchmark", "protocol": "soap-step", "details": details, **provenance(device)}
    text = table(result)
    if arguments.out:
        write_result(arguments.out, result, text)
    print(text)


if __name__ == "__main__":
    main()
