"""The index of all results, results/README.md, made from the files themselves.

    python experiments/index.py

A line for each result: what was measured, its figure, the protocol, seeds, minutes and hardware, and a link to its
table. A test holds the index against what this command writes now.
"""

import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tables import chosen_rows, spread

from skipless.common import cli
from skipless.common.files import write_text

ROOT = Path(__file__).resolve().parent.parent
Result = dict[str, Any]

SUBJECTS = {
    "pretraining": "DINO without labels",
    "supervised": "Classifiers",
    "dense": "Segmentation and object discovery with frozen features",
    "classification": "k-NN and linear classification with frozen features",
    "analysis": "Initialization, conditioning, quantization, and a language model",
    "speed": "Speed, memory and scaling",
}


@dataclass
class Settings:
    """The index."""

    results: Path = ROOT / "results"
    """Folder of the results; its README.md is written."""


def percent(value: float, unit: str) -> str:
    """0.254, "mIoU" -> "25.4 % mIoU"."""
    return f"{100 * value:.1f} % {unit}"


def soap(result: Result) -> str:
    """How much faster our SOAP is than the other implementation."""
    first, *_, last = (case["mean_ms"] for case in result["details"]["cases"])
    return f"{last:.0f} ms a step, {first / last:.2f} times as fast as pytorch_optimizer's"


def train_step(result: Result) -> str:
    """Images a second of the skipless model with SOAP, and of the plain step."""
    cases = {
        case["step"]: case["images_per_second"]
        for case in result["details"]["cases"]
        if (case["model"], case["optimizer"]) == ("skipless", "soap")
    }
    return f"skipless with SOAP: {cases['library']:.1f} images/s, written plainly {cases['plain']:.1f}"


def discovery(result: Result) -> str:
    """The speedup of TokenCut's solver at the largest graph."""
    row = result["steps"][-1]
    return f"{row['patches']:,.0f} patches: solver {row['speedup of the solver']:.0f} times as fast as dense SciPy's"


def loader(result: Result) -> str:
    """Images a second from files to views."""
    speed = result["details"]["images_per_second"]["ours, folder, floats too"]
    return (
        f"{speed:.0f} images/s, {result['details']['times_as_fast']['torchvision']['median']:.1f} times torchvision's"
    )


def start_up(result: Result) -> str:
    """Seconds to the first batch of a folder."""
    seconds = statistics.median(result["start_up"]["folder"]["first batch"])
    return f"{result['settings']['images']:,} images: first batch after {seconds:.1f} s"


def profile(result: Result) -> str:
    """Milliseconds of a step, and the stage that takes most of them."""
    seconds = result["details"]["seconds_by_stage"]
    longest = max(seconds, key=seconds.__getitem__)
    total = sum(seconds.values())
    return f"{1000 * total:.0f} ms a step, {100 * seconds[longest] / total:.0f} % in {longest}"


def roofline(result: Result) -> str:
    """The least milliseconds of a step, by optimizer, in the last way that was computed."""
    last = {f"{case['model']} {case['optimizer']}": case["ms"] for case in result["details"]}
    return ", ".join(f"{case} {ms:.0f} ms" for case, ms in last.items())


def shares(result: Result) -> list[float]:
    """Of masked tokens in the last block of each model, what depends on other patches."""
    return [row["hidden"][-1] for row in result["details"]]


def language_model(result: Result) -> str:
    """The best skipless and the best residual arm."""
    best = {
        kind: min(arm["end"]["bits_per_byte"] for arm in result["arms"] if arm["arm"].startswith(kind))
        for kind in ("residual", "skipless")
    }
    return f"{best['residual']:.2f} bits a byte residual, {best['skipless']:.2f} skipless"


# What is measured and its figure, by protocol or task, for results that hold no single value.
SPECIAL: dict[str, tuple[str, Callable[[Result], str]]] = {
    "attention": (
        "Attention, forward and backward",
        lambda r: f"{r['details'][-1]['way']} {r['details'][-1]['times_plain']:.1f} times as fast as written plainly",
    ),
    "discovery speed": ("TokenCut by step", discovery),
    "correctness": (
        "Attention in bf16 against float64",
        lambda r: (
            f"tokens differ by at most {max(e['tokens'] for of in r['details'].values() for e in of.values()):.1e}"
        ),
    ),
    "cuda": ("All that only a GPU can show", lambda r: f"{len(r['parts'])} parts"),
    "whole-run": ("A whole run", lambda r: f"{r['details']['images_per_second']:.0f} images/s"),
    "roofline": ("Roofline of the training step, computed", roofline),
    "loader/2x224+8x96": ("From JPEG files to crops, one thread", loader),
    "step-profile": ("Where the time of a training step goes", profile),
    "scaling": ("Memory and communication of large runs", lambda r: "computed, not measured"),
    "segmentation": (
        "Linear segmentation by stage",
        lambda r: "; ".join(f"{row['stage']} {row['ratio']:.1f}" for row in r["details"]) + " times as fast as plain",
    ),
    "hypotheses": (
        "Trials of what lets attention learn without skips",
        lambda r: (
            f"{len({row['trial'] for row in r['details']})} changes; loss without skips "
            f"{min(row['held_out'] for row in r['details'] if row['kind'] == 'skipless'):.3f} to "
            f"{max(row['held_out'] for row in r['details'] if row['kind'] == 'skipless'):.3f}"
        ),
    ),
    "stress": (
        "Kills, full disks, flipped bits, hostile files, absurd settings",
        lambda r: f"{sum(row['tried'] for row in r['details']):,} tries, {len(r['lost'])} lost",
    ),
    "fuzzing": (
        "Settings that nobody means, given to every command",
        lambda r: (
            f"{sum(row[end] for row in r['details'] for end in ('refused', 'accepted', 'findings')):,} draws, "
            f"{len(r['findings'])} findings"
        ),
    ),
    "soap-step": ("SOAP's step alone", soap),
    "start-up and memory": ("Start and memory of many small images", start_up),
    "train-step": ("The training step", train_step),
    "stdlib-bytes": ("A decoder on Python's standard library", language_model),
    "masked tokens": (
        "What masked tokens know of other patches",
        lambda r: (
            f"{100 * min(shares(r)):.1f} to {100 * max(shares(r)):.1f} % of the last block's, {len(shares(r))} models"
        ),
    ),
    "conditioning": (
        "Condition, rank and attention of every block",
        lambda r: f"{len(r['details'])} model{'s' * (len(r['details']) > 1)}, a table each",
    ),
}


def experiment(result: Result) -> tuple[str, str]:
    """What was compared, and the best arm."""
    arms = {arm: [row["value"] for row in chosen_rows(result, arm)] for arm in result["settings"]["arms"]}
    arms = {arm: values for arm, values in arms.items() if values}
    best = max(arms, key=lambda arm: statistics.mean(arms[arm]))
    unit = {"monitor/knn": "20-NN of the best block", "val/top1": "top-1"}[result["metric"]]
    return (
        f"{len(arms)} arms, {len(result['runs'])} runs",
        f"best: {best}, {spread([100 * value for value in arms[best]])} % {unit}",
    )


def summary(result: Result) -> tuple[str, str]:
    """(what was measured, its figure)."""
    if result["task"] == "experiment":
        return experiment(result)
    if "value" not in result:
        what, figure = SPECIAL[result.get("protocol", result["task"])]
        return what, figure(result)
    if result["task"] == "pretraining":
        return f"{result['name']} on {result['dataset']}", percent(result["value"], f"{result['metric']}, last block")
    model = result["checkpoint"]["path"].removeprefix("runs/").replace("data/weights/", "").removesuffix(".safetensors")
    images, official = result["images"], result["official_images"]
    part = f"{images:,} images" if official in (None, images) else f"SUBSET, {images:,} of {official:,} images"
    return f"{model}; {result['dataset']} {result['split']}, {part}", percent(result["value"], result["metric"])


def lines(folder: Path) -> Iterator[str]:
    """A line of the table for every result below a folder."""
    for path in sorted(folder.rglob("*.json")):
        content = json.loads(path.read_text())
        page = path.with_suffix(".md").relative_to(folder.parent).as_posix()
        name = path.stem if path.parent == folder else path.parent.relative_to(folder).as_posix()
        for result in content if isinstance(content, list) else [content]:
            what, figure = summary(result)
            seeds = ", ".join(map(str, result["seeds"] if "seeds" in result else [result.get("seed", "")]))
            minutes = f"{result['seconds'] / 60:.1f}" if "seconds" in result else ""
            protocol = result.get("protocol", result["task"])
            cells = (f"[{name}]({page})", what, figure, protocol, seeds, minutes, result["hardware"])
            yield f"| {' | '.join(cells)} |"


def index(results: Path) -> str:
    """The index in Markdown."""
    text = [
        "# Results",
        "",
        "Written by `python experiments/index.py`. Each name leads to the full table. The .json beside it has every",
        "figure, with settings, versions, commit. Minutes are those of the measurement, or of pretraining where that",
        'is the result. A protocol with "(changed)" departs from the published one, as its table says. A SUBSET is',
        "a part of a data set: its figure cannot be compared with published ones.",
    ]
    for subject, title in SUBJECTS.items():
        text += ["", f"## {title}", "", "| result | what | figure | protocol | seeds | minutes | hardware |"]
        text += ["|---|---|---|---|---|---:|---|", *lines(results / subject)]
    return "\n".join(text) + "\n"


def write_index(settings: Settings) -> None:
    """Write the index beside the results."""
    write_text(settings.results / "README.md", index(settings.results))
    print(settings.results / "README.md")


main = partial(cli.run, write_index, Settings, __doc__)

if __name__ == "__main__":
    main()
