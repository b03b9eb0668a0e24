"""What every evaluation shares: its settings, its start and its end.

context = prepare(settings, "knn")                     # backbone, device, workers, cache, blocks
announce(context, protocol)                            # nothing has been written before, and no result is lost
...                                                    # the evaluation's own mathematics
return finish(context, protocol, images, "top-1", value, details, report)    # writes and prints the result
"""

import json
import time
from collections.abc import Callable, Mapping, Sized
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from skipless.common import distributed
from skipless.common.files import write_result
from skipless.common.provenance import provenance
from skipless.common.settings import LATER, flat, plain
from skipless.eval.backbones import Backbone, Precision, Weights, choose_blocks, load_backbone, untrained
from skipless.eval.features import default_cache
from skipless.eval.figures.pictures import check_out
from skipless.ssl.data.loader import loader_workers

# Settings that change nothing about a figure.
INCIDENTAL = ("out", "figure", "cache", "device", "batch_size", "workers")


@dataclass
class EvaluationSettings:
    """Settings of every evaluation."""

    ckpt: str
    """Backbone: the folder of a run; a .pt, .pth or .safetensors of ours, DINO, DINOv2 or timm; or timm:NAME."""
    _: KW_ONLY
    out: str | None = None
    """Folder for the result: tables (.md), the same for machines (.json), and pictures where there are any. By default
    nothing is written."""
    weights: Weights = "teacher"
    """Which half of a training checkpoint that holds a teacher and a student."""
    seed: int = 0
    """Of all that is random: the bootstrap, and whatever the evaluation draws."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    batch_size: int = 16
    """Images in one forward pass of the backbone. Changes speed and memory alone."""
    workers: int | None = None
    """Processes that read images; by default its share of the cores but two with a GPU, and none on a CPU, which needs
    them itself."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or min(self.workers or 0, self.seed) < 0:
            raise ValueError("batch-size must be 1 or more, workers and seed 0 or more")


@dataclass
class FeatureSettings(EvaluationSettings):
    """Settings of the evaluations that compute features once and keep them."""

    _: KW_ONLY
    blocks: str = "last"
    """Blocks whose features are concatenated: last, last4, or numbers from 1, as in 3,6,9,12. Named in the figure's id
    where they are not the default."""
    every_block: bool = False
    """Measure each block by itself, and report block by block."""
    untrained: bool = False
    """Measure the checkpoint's architecture with random weights: the floor its figure stands on."""
    precision: Precision = "fp32"
    """In which the network computes features: fp32, or bf16 where the device is fast in it. bf16 saves time on a GPU;
    a model without skips feels the rounding. The figure's id then ends in /bf16."""
    cache: str | None = None
    """Folder for features; by default ~/.cache/skipless/features. Safe to delete."""


@dataclass
class SheetSettings:
    """Settings of the evaluations that draw a sheet of pictures."""

    _: KW_ONLY
    figure: str | None = None
    """Another file for the sheet of pictures: .png, .pdf or .svg. With --out there is a .png in any case."""


class Images(Sized, Protocol):
    """A split of a data set."""

    @property
    def name(self) -> str: ...
    @property
    def split(self) -> str: ...


@dataclass(frozen=True, eq=False)
class Context:
    """What an evaluation works with."""

    task: str
    """The name of its result's file."""
    backbone: Backbone
    """On the device, in the precision that is used."""
    choices: list[tuple[int, ...]]
    """Blocks, from 0, that are measured together; the last of the choices is the one that is reported."""
    device: torch.device
    batch_size: int
    """Images in one forward pass."""
    workers: int
    """Processes that read images."""
    cache: Path
    """Folder for features."""
    out: Path | None
    recorded: dict[str, Any]
    """The settings, as the result has them."""
    began: float

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return distributed.rank() == 0

    @property
    def blocks(self) -> list[int]:
        """All blocks that are measured, ascending."""
        return sorted({block for choice in self.choices for block in choice})


def prepare(settings: EvaluationSettings, task: str) -> Context:
    """Load the backbone onto the device, and work out what the settings leave open.

    Raises:
        ValueError, FileNotFoundError: a checkpoint, device or blocks that cannot be used.
    """
    device = distributed.start(settings.device)
    began = time.perf_counter()
    recorded = plain(settings)
    if recorded.get("figure"):
        check_out(recorded["figure"], "figure")
    backbone = load_backbone(settings.ckpt, settings.weights)
    # Not every evaluation has all of the flags below.
    if recorded.get("untrained"):
        backbone = untrained(backbone, settings.seed)
    backbone = backbone.to(device, recorded.get("precision"))
    if "precision" in recorded:
        recorded["precision"] = backbone.precision
    if recorded.get("pool") == "auto":
        recorded["pool"] = backbone.pool or "cls"
    blocks, every_block = recorded.get("blocks", "last"), recorded.get("every_block", False)
    if every_block and blocks == getattr(type(settings), "blocks", None):
        blocks = "last"
    return Context(
        task=task,
        backbone=backbone,
        choices=choose_blocks(blocks, every_block, backbone),
        device=device,
        batch_size=settings.batch_size,
        workers=loader_workers(settings.workers, device),
        cache=Path(recorded.get("cache") or default_cache()).expanduser(),
        out=Path(settings.out).expanduser() if settings.out else None,
        recorded=recorded,
        began=began,
    )


def announce(context: Context, protocol: str, *lines: str) -> None:
    """Print what is going to be measured, and more lines.

    Raises:
        ValueError: the folder of the result holds another one.
    """
    if context.out:
        keep_other_result(context.out / f"{context.task}.json", context.recorded)
    if context.first:
        backbone = context.backbone
        on = f"on {context.device}, {backbone.described_precision}"
        print(f"{protocol}: {backbone.architecture} ({backbone.path}) {on}", *lines, sep="\n", flush=True)


def finish(
    context: Context,
    protocol: str,
    images: Images,
    metric: str | None,
    value: float | None,
    details: dict[str, Any],
    report: Callable[[dict[str, Any]], str],
    files: Mapping[str, Callable[[Path], object]] | None = None,
    official: int | None = None,
) -> dict[str, Any]:
    """Write the result where `out` asks for it, print it, and return it.

    Args:
        protocol: the figure's id; features in bf16 are named in it.
        images: what was measured.
        metric, value: the figure, as a fraction; None where there was nothing to compare with.
        details: whatever else was measured.
        report: the result in Markdown.
        files: functions that write further files, by the files' names.
        official: images of the whole split, where that is known.
    """
    backbone, about = context.backbone, ("path", "sha256", "architecture", "family", "mean", "std", "pool")
    if backbone.precision == "bf16":
        published, changed, _ = protocol.partition(" (changed)")
        protocol = f"{published}/bf16{changed}"
    result = {
        "task": context.task,
        "protocol": protocol,
        "dataset": images.name,
        "split": images.split,
        "images": len(images),
        "official_images": official,
        "metric": metric,
        "value": value,
        "details": details,
        "checkpoint": {name: getattr(backbone, name) for name in about},
        "precision": backbone.described_precision,
        "settings": context.recorded,
        "seed": context.recorded["seed"],
        "seconds": round(time.perf_counter() - context.began, 1),
        "processes": distributed.world_size(),
        **provenance(context.device),
    }
    if context.first:
        text = report(result)
        files = files or {}
        if context.out:
            context.out.mkdir(parents=True, exist_ok=True)
            write_result(context.out / context.task, result, text)  # before drawing, which may fail
            for name, write in files.items():
                write(context.out / name)
        if figure := context.recorded.get("figure"):
            files[f"{context.task}.png"](Path(figure).expanduser())
        print("\n" + text, end="")
        if context.out:
            names = ", ".join([f"{context.task}.md", *files])
            print(f"\nwritten: {context.out / context.task}.json, {names}")
        if figure:
            print(f"\nwritten: {figure}")
    return result


def name_blocks(choice: tuple[int, ...]) -> str:
    """Blocks as they stand in a figure's id."""
    return "blocks-" + "-".join(str(block + 1) for block in choice)


def keep_other_result(path: Path, settings: dict[str, Any]) -> None:
    """Raises ValueError where `path` holds the result of a run with other settings, which would be lost."""
    try:
        old = json.loads(path.read_text())
        differing = differing_settings(old["settings"], settings)
    except FileNotFoundError:
        return
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f"{path} is no result of this command: give another --out") from None
    if differing:
        raise ValueError(
            f"{path} holds another result ({old.get('protocol')} of {old.get('checkpoint', {}).get('path')}), which "
            f"differs in {', '.join(differing)}: give another --out, or delete it"
        )


def differing_settings(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Names of the settings that make two results different ones, those of a group under the group's name."""
    old, new, absent = LATER | flat(old), LATER | flat(new), object()
    names = [name for name in dict.fromkeys([*old, *new]) if name not in INCIDENTAL]
    differing = [name for name in names if old.get(name, absent) != new.get(name, absent)]
    return list(dict.fromkeys(name.partition(".")[0] for name in differing))
