"""SOAP's step: pytorch_optimizer's implementation against ssl/optim/soap.py, on the shapes of a model's parameters.

    python benchmarks/soap.py --recipe configs/demo.yaml --out results/speed/soap_demo
    python benchmarks/soap.py --model base --device cuda --out results/speed/soap_base

The parameters are those of a named ViT/16, without a head, or of the student of a recipe; gradients are random, and the
same for all. The cases are the library's; ours with all refreshes in the same step, as the library has them; and ours
with the refreshes spread over the steps, as training has it. Cases are interleaved: every round takes one period of the
preconditioner of each case, each step is timed alone, and a case's time is its average step of all rounds but the
first. The first step of all, which finds the eigenbases, is measured apart.
"""

import importlib.metadata
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytorch_optimizer
import torch
from measuring import MeasuringSettings, markdown, on_device, publish, temporary_gb, timed, with_recipe
from steps import build_model
from torch import nn
from tqdm import tqdm

from skipless.common import cli
from skipless.common.hardware import keep_freed_memory
from skipless.ssl.config import Settings as Pretraining
from skipless.ssl.model import vit
from skipless.ssl.optim.optimizers import OptimizerSettings, parameter_groups
from skipless.ssl.optim.soap import SOAP

GRADIENTS = 4  # different ones, in turns


@dataclass(kw_only=True)
class Settings(MeasuringSettings):
    """SOAP's step."""

    model: Literal["tiny", "small", "base"] | None = None
    """A ViT/16 without a head; either this or --recipe."""
    recipe: Path | None = None
    """A recipe of configs/ for pretraining: its student and settings."""
    max_precondition_dim: int | None = None
    """By default the recipe's, or 10,000."""
    threads: int | None = None
    """Of torch on a CPU."""


def model_and_optimizer(settings: Settings) -> tuple[nn.Module, OptimizerSettings]:
    """The model, and the optimizer's settings."""
    if (settings.model is None) == (settings.recipe is None):
        raise ValueError("give either --model or --recipe")
    if settings.recipe is not None:
        recipe = cli.parse(Pretraining, [f"--config={settings.recipe}", "--data.path=none", "--out=none"])
        return build_model(recipe), recipe.optimizer
    return getattr(vit, f"vit_{settings.model}")(), OptimizerSettings()


class Case:
    """An optimizer over copies of a model's parameters; each call is one step and returns its seconds."""

    def __init__(self, groups: list[dict[str, Any]], make: Callable[..., torch.optim.Optimizer], **options: Any):
        copies = [{**g, "params": [nn.Parameter(p.detach().clone()) for p in g["params"]]} for g in groups]
        self.parameters = [p for group in copies for p in group["params"]]
        self.optimizer = make(copies, **options)

    def __call__(self, gradients: list[torch.Tensor]) -> float:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        return timed(self.optimizer.step, gradients[0].device)[1]


def time_cases(cases: dict[str, Case], gradients: list[list[torch.Tensor]], period: int, rounds: int) -> list[dict]:
    """Milliseconds of every case, interleaved; on CUDA the memory that a step needs for a while, too."""
    first = {name: case(gradients[0]) for name, case in cases.items()}
    seconds: dict[str, list[list[float]]] = {name: [] for name in cases}

    def one_period(case: Case) -> list[float]:
        return [case(gradients[step % GRADIENTS]) for step in range(period)]

    for number in tqdm(range(rounds + 1), desc="rounds"):
        for name, case in cases.items():
            times = one_period(case)
            if number:
                seconds[name].append(times)
    rows = []
    for name, case in cases.items():
        # The same step of every period does the same work: its median over the rounds is free of what disturbed one.
        steps = [statistics.median(times) for times in zip(*seconds[name], strict=True)]
        averages = [1000 * statistics.mean(times) for times in seconds[name]]
        memory = temporary_gb(partial(one_period, case), gradients[0][0].device)
        row = {
            "implementation": name,
            "first_ms": 1000 * first[name],
            "mean_ms": statistics.median(averages),
            "mean_ms_of_rounds": averages,
            "median_ms": 1000 * statistics.median(steps),
            "slowest_ms": 1000 * max(steps),
            "slowest_over_median": max(steps) / statistics.median(steps),
            "times_faster": statistics.mean(map(statistics.mean, seconds["pytorch_optimizer"]))
            / statistics.mean(map(statistics.mean, seconds[name])),
        }
        rows.append(row | ({} if memory is None else {"temporary_gb": memory}))
    return rows


def measure(settings: Settings) -> None:
    """Time the three implementations, and publish."""
    device = on_device(settings.device)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if device.type == "cpu":
        keep_freed_memory()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    model, optimizer = model_and_optimizer(settings)
    groups = parameter_groups(model.to(device))
    parameters = [p for group in groups for p in group["params"]]
    gradients = [[torch.randn_like(p) for p in parameters] for _ in range(GRADIENTS)]
    options = {
        "lr": 1e-4,
        "betas": optimizer.betas or (0.95, 0.95),
        "weight_decay": 0.04,
        "precondition_frequency": optimizer.precondition_every,
        "max_precondition_dim": settings.max_precondition_dim or optimizer.max_precondition_dim,
    }
    cases = {
        "pytorch_optimizer": Case(groups, pytorch_optimizer.SOAP, **options),
        "ours, refreshed together": Case(groups, SOAP, spread=False, **options),
        "ours, spread": Case(groups, SOAP, spread=True, **options),
    }
    rows = time_cases(cases, gradients, optimizer.precondition_every, settings.rounds)
    pairs = zip(*(case.parameters for case in list(cases.values())[:2]), strict=True)
    details = {
        "model": str(settings.recipe or f"vit_{settings.model}"),
        "parameters": sum(p.numel() for p in parameters),
        "max_precondition_dim": options["max_precondition_dim"],
        "period": optimizer.precondition_every,
        "rounds": settings.rounds,
        "threads": torch.get_num_threads(),
        "largest_difference": max((a - b).abs().max().item() for a, b in pairs),
        "pytorch_optimizer": importlib.metadata.version("pytorch-optimizer"),
        "cases": rows,
    }
    lines = [
        f"{details['parameters'] / 1e6:.1f} M parameters ({details['model']}), sides up to "
        f"{options['max_precondition_dim']:,}, refreshed every {details['period']} steps, on {{hardware}}, "
        f"{details['threads']} threads; {settings.rounds} rounds of one period, interleaved.",
        "",
        *markdown(rows),
        "",
        f"Largest difference of a parameter after all steps: {details['largest_difference']:.1e}.",
    ]
    publish(settings.out, {"task": "benchmark", "protocol": "soap-step", "details": details}, lines, device)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: see the docstring of this file."""
    cli.run(measure, Settings, __doc__, with_recipe(arguments))


if __name__ == "__main__":
    main()
