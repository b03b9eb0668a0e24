"""What the benchmarks share: clocks, interleaved rounds, ratios, tables, and results that say where they come from."""

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from tqdm import tqdm

from skipless.common.files import write_result
from skipless.common.provenance import provenance

T = TypeVar("T")


@dataclass(kw_only=True)
class MeasuringSettings:
    """Settings of every benchmark."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where it runs."""
    rounds: int = 5
    """Rounds that count; one more warms up."""
    out: Path | None = None
    """Where to write OUT.json and OUT.md; by default nowhere."""


def on_device(name: str) -> torch.device:
    """The device of that name. Raises ValueError where it is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but torch finds no CUDA here: use cpu")
    return torch.device(name)


def timed(work: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """What `work` returns, and the seconds it took, the device's included."""
    synchronize(device)
    began = time.perf_counter()
    result = work()
    synchronize(device)
    return result, time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU has still to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(ways: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every way in every round; each round runs all of them in turn, and one more round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in tqdm(range(rounds + 1), desc="rounds"):
        for name, way in ways.items():
            _, elapsed = timed(way, device)
            if number:
                seconds[name].append(elapsed)
    return seconds


def temporary_gb(work: Callable[[], object], device: torch.device) -> float | None:
    """Memory in GiB that `work` needs on a GPU beside what is there; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**30


def ratio(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """How many times as fast, over rounds that ran side by side: the median, and the range."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def markdown(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a table of rows with the same keys; a list is shown by its smallest and largest value."""
    words = [isinstance(value, str) for value in rows[0].values()]
    cells = [" | ".join(map(_cell, row.values())) for row in rows]
    head = " | ".join(rows[0]).replace("_", " ")
    return [f"| {head} |", f"|{'|'.join('---' if word else '---:' for word in words)}|", *(f"| {c} |" for c in cells)]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, list):
        return f"{_cell(min(value))} to {_cell(max(value))}"
    return "" if value is None else str(value)


def publish(out: Path | None, result: dict[str, Any], lines: Sequence[str], device: torch.device | str) -> None:
    """Add machine, versions and commit to a result, print it, and write it where `out` says. In its lines for people
    {hardware} stands for the machine."""
    about = provenance(device)
    text = "\n".join([*lines, ""]).replace("{hardware}", about["hardware"])
    if out is not None:
        write_result(out, {**result, **about}, text)
    print(text)


def with_recipe(arguments: Sequence[str] | None) -> list[str]:
    """A command line whose --config names the recipe of a training, as in earlier versions: that is --recipe now."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return [word.replace("--config", "--recipe", 1) if word.split("=")[0] == "--config" else word for word in words]
