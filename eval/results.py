"""What every evaluation leaves: a result for machines, which is never written over another one."""

import json
from pathlib import Path
from typing import Any

import torch

from skipless.common import distributed
from skipless.common.provenance import provenance
from skipless.eval.backbones import Backbone

# Settings that change nothing about a figure.
INCIDENTAL = ("out", "cache", "device", "batch_size", "workers")
# Settings that came after the first results, with the value that results without them had.
LATER = {"precision": "fp32"}


def result_of(
    task: str,
    protocol: str,
    dataset: str,
    split: str,
    images: int,
    metric: str | None,
    value: float | None,
    details: dict[str, Any],
    backbone: Backbone,
    recorded: dict[str, Any],
    seed: int,
    seconds: float,
    device: torch.device,
    official: int | None = None,
) -> dict[str, Any]:
    """The content of a result file.

    Args:
        protocol: the figure's id; features in bf16 are named in it.
        metric, value: the figure, as a fraction; None where there was nothing to compare with.
        details: whatever else was found.
        recorded: the settings, with the precision that was used.
        official: images of the whole split, where that is known.
    """
    if backbone.precision == "bf16":
        published, changed, _ = protocol.partition(" (changed)")
        protocol = f"{published}/bf16{changed}"
    about = ("path", "sha256", "architecture", "family", "mean", "std")
    return {
        "task": task,
        "protocol": protocol,
        "dataset": dataset,
        "split": split,
        "images": images,
        "official_images": official,
        "metric": metric,
        "value": value,
        "details": details,
        "checkpoint": {name: getattr(backbone, name) for name in about},
        "precision": backbone.described_precision,
        "settings": recorded,
        "seed": seed,
        "seconds": round(seconds, 1),
        "processes": distributed.world_size(),
        **provenance(device),
    }


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


def differing_settings(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Names of the settings that make two results different ones, those of a group under the group's name."""
    theirs, ours, absent = LATER | theirs, LATER | ours, object()
    names = [name for name in dict.fromkeys([*theirs, *ours]) if name not in INCIDENTAL]
    return [name for name in names if theirs.get(name, absent) != ours.get(name, absent)]
