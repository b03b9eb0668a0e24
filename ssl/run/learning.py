"""Does it learn? In words, from what a run logged."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, with `step` and `epoch` each; none where it is not there yet. A line that is
    just being written is left out."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def verdict(logged: list[dict[str, Any]]) -> list[str]:
    """A line on whether a run has learned since its start; none where too little was logged to say.

    With labels it is the last block's k-NN accuracy that has to rise, by more than a point. Without, it is how well the
    teacher tells images apart: the mutual information of images and prototypes, in nats, which is the entropy of the
    mean distribution less the mean entropy. The loss alone does not say: it may rise while the teacher sharpens.

    Args:
        logged: lines of the run's metrics.
    """
    knn = [100 * line["monitor/knn"][-1] for line in logged if "monitor/knn" in line]
    if len(knn) > 1:
        words = "it learns" if knn[-1] > knn[0] + 1 else "it has not learned yet"
        return [f"{words}: k-NN of the last block is {knn[-1]:.1f} %, and was {knn[0]:.1f} % at the start"]
    steps = [line for line in logged if {"loss", "usage_entropy", "teacher_entropy"} <= line.keys()]
    if len(steps) < 2:
        return []
    first, last = (line["usage_entropy"] - line["teacher_entropy"] for line in (steps[0], steps[-1]))
    words = "it learns, as far as can be told without labels" if last > first else "it has not learned yet"
    told = f"{words}: its teacher tells images apart by {last:.2f} nats, and by {first:.2f} at the start"
    before, after = steps[0]["loss"], steps[-1]["loss"]
    if last > first and after > before:
        told += f"; that its loss rose from {before:.2f} to {after:.2f} is normal then"
    return [told]
