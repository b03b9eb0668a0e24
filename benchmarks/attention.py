"""Attention over packed crops, forward and backward: the library's backends against softmax(Q K^T) V written out.

    python benchmarks/attention.py --out results/speed/attention_cpu
    python benchmarks/attention.py --device cuda --batch 64 --out results/speed/attention_gpu

The sequences are those of DINO's crops of --batch images, 2 x 224 and 8 x 96 pixels in patches of 16 (197 and 37
tokens), with the heads of ViT-S (6 of 64 channels). First every way is checked against the plain one in float64,
gradients included; then they are timed, interleaved, medians of --rounds. float32 on a CPU, bf16 on CUDA, where
xformers takes all sequences in one call. Beside the time what it amounts to in floating-point operations (matrix
products alone; the backward pass counts two and a half forward passes, as it computes the attention map again).
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from measuring import MeasuringSettings, interleaved, markdown, on_device, publish, ratio, temporary_gb
from torch import Tensor

from skipless.common import cli
from skipless.common.hardware import peak_flops
from skipless.ssl.model.attention import Groups, attention, choose_backend

HEADS, CHANNELS = 6, 64
Way = Callable[[Tensor, Tensor, Tensor, Groups], Tensor]


@dataclass(kw_only=True)
class Settings(MeasuringSettings):
    """Attention over packed crops."""

    batch: int = 8
    """Images."""
    rounds: int = 7
    """Rounds that count; one more warms up."""
    calls: int = 3
    """Calls of each way a round."""


def plain(q: Tensor, k: Tensor, v: Tensor, groups: Groups) -> Tensor:
    """One crop size after the other, with the attention maps in memory."""
    outputs = []
    sizes = [batch * length for batch, length in groups]
    for (batch, length), *qkv in zip(groups, q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        query, key, value = (x.unflatten(0, (batch, length)).transpose(1, 2) for x in qkv)
        weights = (query @ key.transpose(-2, -1) * CHANNELS**-0.5).softmax(dim=-1)
        outputs.append((weights @ value).transpose(1, 2).flatten(0, 1).flatten(1))
    return torch.cat(outputs)


def ways(device: torch.device) -> dict[str, Way]:
    """What can run on the device, by name; the plain way is the first."""
    compared: dict[str, Way] = {"plain": plain, "sdpa": lambda q, k, v, groups: attention(q, k, v, groups, "sdpa")}
    if choose_backend(device)[0] == "xformers":
        compared["xformers"] = lambda q, k, v, groups: attention(q, k, v, groups, "xformers")
    return compared


def inputs(groups: Groups, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values [T, heads, channels], and weights of the output, all random."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(batch * length for batch, length in groups)
    qkv = torch.randn(3, tokens, HEADS, CHANNELS, generator=generator)
    weights = torch.randn(tokens, HEADS * CHANNELS, generator=generator)
    return [*(x.to(device, dtype).requires_grad_() for x in qkv), weights.to(device, dtype)]


def output_and_gradients(way: Way, groups: Groups, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Of one call, in float64."""
    q, k, v, weights = inputs(groups, device, dtype)
    output = way(q, k, v, groups)
    gradients = torch.autograd.grad(output, (q, k, v), weights)
    return [x.double() for x in (output, *gradients)]


def measure(settings: Settings) -> None:
    """Check every way, time them, and publish."""
    device = on_device(settings.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    groups: Groups = ((2 * settings.batch, 197), (8 * settings.batch, 37))
    few: Groups = ((4, 197), (16, 37))
    compared = ways(device)

    exact = output_and_gradients(plain, few, device, torch.float64)
    errors = {}
    for name, way in compared.items():
        computed = output_and_gradients(way, few, device, dtype)
        errors[name] = max(((a - b).norm() / b.norm()).item() for a, b in zip(computed, exact, strict=True))

    q, k, v, weights = inputs(groups, device, dtype)

    def step(way: Way) -> None:
        for _ in range(settings.calls):
            torch.autograd.grad(way(q, k, v, groups), (q, k, v), weights)

    steps = {name: partial(step, way) for name, way in compared.items()}
    seconds = interleaved(steps, settings.rounds, device)
    operations = 3.5 * sum(4 * batch * length**2 * HEADS * CHANNELS for batch, length in groups)
    peak = peak_flops(device)
    rows = []
    for name, times in seconds.items():
        median, speedup = statistics.median(times) / settings.calls, ratio(seconds["plain"], times)
        rows.append(
            {
                "way": name,
                "ms": 1000 * median,
                "times_plain": speedup["median"],
                "times_plain_range": [speedup["lowest"], speedup["highest"]],
                "gflops_per_second": operations / median / 1e9,
                "share_of_peak": operations / median / peak if peak else None,
                "memory_gb": temporary_gb(steps[name], device),
                "relative_error": errors[name],
            }
        )
    kind = str(dtype).removeprefix("torch.")
    result = {"task": "benchmark", "protocol": "attention", "groups": groups, "dtype": kind, "details": rows}
    lines = [
        f"{groups[0][0]} sequences of 197 and {groups[1][0]} of 37 tokens, 6 heads of 64 channels, {kind}, forward and "
        f"backward, on {{hardware}}; medians of {settings.rounds} rounds.",
        "",
        *markdown(rows),
    ]
    publish(settings.out, result, lines, device)


main = partial(cli.run, measure, Settings, __doc__)

if __name__ == "__main__":
    main()
