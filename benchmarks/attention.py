"""Attention over packed crops, forward and backward: the library's backends against softmax(Q K^T) V written out.

    python benchmarks/attention.py --out results/speed/attention_cpu
    python benchmarks/attention.py --device cuda --batch 64 --out results/speed/attention_gpu

The sequences are those of DINO's crops of --batch images, 2 x 224 and 8 x 96 pixels in patches of 16 (197 and 37
tokens), with the heads of ViT-S (6 of 64 channels). First every way is checked against the plain one in float64,
gradients included; then they are timed, interleaved, medians of --rounds. float32 on a CPU, bf16 on CUDA, where
xformers takes all sequences in one call. Beside the time what it amounts to in floating-point operations (matrix
products alone; the backward pass counts two and a half forward passes, as it computes the attention map again).
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from skipless.common.files import write_result
from skipless.common.hardware import peak_flops
from skipless.common.provenance import provenance
from skipless.ssl.model.attention import Groups, attention, choose_backend

HEADS, CHANNELS = 6, 64
Way = Callable[[Tensor, Tensor, Tensor, Groups], Tensor]


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
    found: dict[str, Way] = {"plain": plain, "sdpa": lambda q, k, v, groups: attention(q, k, v, groups, "sdpa")}
    if choose_backend(device)[0] == "xformers":
        found["xformers"] = lambda q, k, v, groups: attention(q, k, v, groups, "xformers")
    return found


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


def main() -> None:
    """Command line: see the docstring of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="Images (default: 8).")
    parser.add_argument("--rounds", type=int, default=7, help="Rounds that count; one more warms up (default: 7).")
    parser.add_argument("--calls", type=int, default=3, help="Calls of each way a round (default: 3).")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, help="Where to write OUT.json and OUT.md.")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("error: --device is cuda, but torch finds no CUDA here; use cpu", file=sys.stderr)
        sys.exit(2)
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    groups: Groups = ((2 * arguments.batch, 197), (8 * arguments.batch, 37))
    few: Groups = ((4, 197), (16, 37))
    compared = ways(device)

    exact = output_and_gradients(plain, few, device, torch.float64)
    errors = {}
    for name, way in compared.items():
        found = output_and_gradients(way, few, device, dtype)
        errors[name] = max(((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True))

    q, k, v, weights = inputs(groups, device, dtype)
    seconds: dict[str, list[float]] = {name: [] for name in compared}
    memory: dict[str, float] = {}
    for number in tqdm(range(arguments.rounds + 1), desc="rounds"):
        for name, way in compared.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            began = time.perf_counter()
            for _ in range(arguments.calls):
                torch.autograd.grad(way(q, k, v, groups), (q, k, v), weights)
            if device.type == "cuda":
                torch.cuda.synchronize()
                memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
            if number:
                seconds[name].append((time.perf_counter() - began) / arguments.calls)
    operations = 3.5 * sum(4 * batch * length**2 * HEADS * CHANNELS for batch, length in groups)
    peak = peak_flops(device)
    rows: list[dict[str, Any]] = []
    for name, times in seconds.items():
        median = statistics.median(times)
        ratios = [a / b for a, b in zip(seconds["plain"], times, strict=True)]
        rows.append(
            {
                "way": name,
                "ms": 1000 * median,
                "times_plain": statistics.median(ratios),
                "times_plain_range": [min(ratios), max(ratios)],
                "gflops_per_second": operations / median / 1e9,
                "share_of_peak": operations / median / peak if peak else None,
                "memory_gb": memory.get(name),
                "relative_error": errors[name],
            }
        )
    about = provenance(device)
    kind = str(dtype).removeprefix("torch.")
    lines = [
        f"{groups[0][0]} sequences of 197 and {groups[1][0]} of 37 tokens, 6 heads of 64 channels, {kind}, forward and "
        f"backward, on {about['hardware']}; medians of {arguments.rounds} rounds.",
        "",
        "| attention | ms | speed, times plain | GFLOP/s | error against float64 |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        low, high = row["times_plain_range"]
        lines.append(
            f"| {row['way']} | {row['ms']:.1f} | {row['times_plain']:.2f} ({low:.2f} to {high:.2f}) | "
            f"{row['gflops_per_second']:.0f} | {row['relative_error']:.1e} |"
        )
    text = "\n".join(lines) + "\n"
    result = {"task": "benchmark", "protocol": "attention", "groups": groups, "dtype": kind, "details": rows, **about}
    if arguments.out:
        write_result(arguments.out, result, text)
    print(text)


if __name__ == "__main__":
    main()
