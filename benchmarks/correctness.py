"""Attention in bf16 on a GPU against float64, in a whole ViT-S/16, forward and backward, residual and skipless.

    python benchmarks/correctness.py --device cuda --out results/speed/correctness_gpu

For every backend that works on the device: the relative error of the tokens, and of the gradient of the first block's
queries, keys and values. One above LIMIT, or none at all, is an error, after the result has been written.
"""

import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from measuring import markdown, on_device, publish
from torch import Tensor

from skipless.common import cli
from skipless.common.precision import autocast
from skipless.ssl.model.attention import Backend, choose_backend
from skipless.ssl.model.initialization import PRESETS, skipless_init_
from skipless.ssl.model.vit import VisionTransformer, vit_small

LIMIT = 0.1  # bf16 rounds at 0.004, and 12 blocks add up


@dataclass(kw_only=True)
class Settings:
    """Attention against float64."""

    device: Literal["cpu", "cuda"] = "cuda"
    """Where it runs."""
    out: Path | None = None
    """Where to write OUT.json and OUT.md; by default nowhere."""


def make(residual: bool, device: torch.device) -> VisionTransformer:
    """A ViT-S/16, initialized for what it is."""
    torch.manual_seed(0)
    model = vit_small(residual=residual)
    return (model if residual else skipless_init_(model, **PRESETS["paper-dino"])).to(device)  # type: ignore[return-value]


def tokens_and_gradient(model: VisionTransformer, images: list[Tensor]) -> tuple[Tensor, Tensor]:
    """All tokens, and the gradient of a weighted mean of them, float64."""
    computed = torch.cat([t.flatten() for t in model(images)]).double()
    weights = torch.randn(computed.shape, generator=torch.Generator().manual_seed(2)).to(computed)
    (computed * weights).mean().backward()
    gradient = model.blocks[0].attn.qkv.weight.grad
    assert gradient is not None
    return computed.detach(), gradient.double()


def errors(residual: bool, backends: list[Backend], device: torch.device) -> dict[str, dict[str, float]]:
    """Of every backend, relative to float64."""
    model = make(residual, device)
    reference = copy.deepcopy(model).double()
    reference.attention = "sdpa"
    torch.manual_seed(1)
    images = [torch.randn(4, 3, 224, 224).to(device), torch.randn(16, 3, 96, 96).to(device)]
    exact = tokens_and_gradient(reference, [crops.double() for crops in images])
    found = {}
    for backend in backends:
        model.attention = backend
        model.zero_grad()
        with autocast(device, True):
            computed = tokens_and_gradient(model, images)
        found[backend] = {
            name: ((a - b).norm() / b.norm()).item()
            for name, a, b in zip(("tokens", "gradient"), computed, exact, strict=True)
        }
    return found


def working(device: torch.device) -> list[Backend]:
    """The backends that run here."""
    found: list[Backend] = []
    for backend in get_args(Backend):
        try:
            found += [backend] if choose_backend(device, backend)[0] == backend else []
        except ValueError:
            continue
    return found


def measure(settings: Settings) -> None:
    """Compare, publish, and raise ValueError where an error is too large."""
    device = on_device(settings.device)
    found = {kind: errors(kind == "residual", working(device), device) for kind in ("residual", "skipless")}
    rows = [{"model": kind, "attention": name, **e} for kind, of in found.items() for name, e in of.items()]
    lines = ["Relative errors in bf16 on {hardware}, against float64.", "", *markdown(rows)]
    publish(settings.out, {"task": "benchmark", "protocol": "correctness", "details": found}, lines, device)
    wrong = [row for row in rows if not (row["tokens"] < LIMIT and row["gradient"] < LIMIT)]
    if wrong:
        raise ValueError(f"attention is wrong: {wrong[0]}")


main = partial(cli.run, measure, Settings, __doc__)

if __name__ == "__main__":
    main()
