"""One table and one result file from the logs of finished pretraining runs.

    python eval/summarize.py runs/residual runs/skipless --out results/pretraining/imagenette_cpu

writes imagenette_cpu.json (for machines) and imagenette_cpu.md (for people): what the monitor measured in every block
(k-NN where there were labels, mean share and effective rank) before and after training, on which hardware, in how
much time.
"""

import skipless.common.interruption  # noqa: F401

import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from skipless.common import cli
from skipless.common.files import write_result
from skipless.datasets.storage.names import dataset_name

NAMES = {"knn": "k-NN top-1, %", "mean_share": "mean share", "effective_rank": "effective rank"}


def summarize(runs: list[Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """A result for each finished run: its settings and provenance, and what the monitor measured before and after
    training; and a sentence for each of the others.

    Raises:
        ValueError: none of the folders is a finished run that was monitored.
    """
    results, left_out = [], []
    for run in runs:
        try:
            results.append(_result(run))
        except (ValueError, OSError, KeyError, TypeError, IndexError) as error:
            reason = str(error) if type(error) is ValueError else f"{run} holds damaged files ({error!r})"
            left_out.append(reason)
    if not results:
        raise ValueError("; ".join(left_out) or "give the folder of one run or more")
    return results, left_out


def _result(run: Path) -> dict[str, Any]:
    """The result of one run. Raises ValueError for one that is not finished or was not monitored to its end."""
    if not (run / "backbone.json").exists():
        raise ValueError(f"{run} is no finished pretraining run: it has no backbone.json")
    about = json.loads((run / "backbone.json").read_text())
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = [entry for entry in entries if "monitor/effective_rank" in entry]
    if not measured:
        raise ValueError(f"{run} was not monitored: the monitor was off")
    if measured[-1]["step"] != about["step"]:
        raise ValueError(f"{run} was last measured at step {measured[-1]['step']}, not at its end, {about['step']}")
    labeled = [entry for entry in measured if "monitor/knn" in entry]
    curve = [{"epoch": m["epoch"], "knn": m["monitor/knn"][-1], "best_knn": max(m["monitor/knn"])} for m in labeled]
    states = {
        when: {name: entry[f"monitor/{name}"] for name in NAMES if f"monitor/{name}" in entry}
        for when, entry in (("untrained", measured[0]), ("trained", measured[-1]))
    }
    settings = about.pop("settings")
    path = Path(settings["data"]["path"]).resolve()
    # Names, not places: a result must read the same on every machine.
    settings["data"]["path"], settings["out"] = "/".join(path.parts[-2:]), run.name
    return {
        "task": "pretraining",
        "protocol": f"knn-monitor/{settings['monitor']['k']}-nn-{about['pool']}" if labeled else "monitor/no-labels",
        "dataset": dataset_name(path),
        "metric": "top-1" if labeled else "effective rank",
        "value": states["trained"]["knn" if labeled else "effective_rank"][-1],
        "name": run.name,
        "details": {**states, "curve": curve, "final_loss": [e["loss"] for e in entries if "loss" in e][-1]},
        "settings": settings,
        "seed": settings["seed"],
        **about,
    }


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown: a line for each run, then every block of each."""
    lines = [
        "| run | k-NN untrained | k-NN trained, last block | best block | loss | minutes |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        cells = "| - | - | -"  # of a run without labels
        if "knn" in result["details"]["trained"]:
            before, after = (result["details"][when]["knn"] for when in ("untrained", "trained"))
            best = max(range(len(after)), key=after.__getitem__)
            cells = f"| {100 * before[-1]:.1f} | {100 * after[-1]:.1f} ({100 * (after[-1] - before[-1]):+.1f}) "
            cells += f"| {100 * after[best]:.1f} (block {best + 1})"
        loss, minutes = result["details"]["final_loss"], result["seconds"] / 60
        lines.append(f"| {result['name']} {cells} | {loss:.3f} | {minutes:.1f} |")
    depth = max(len(result["details"]["trained"]["effective_rank"]) for result in results)
    lines += ["", "By block, untrained -> trained:", ""]
    lines += ["| run | | " + " | ".join(str(i + 1) for i in range(depth)) + " |", "|---|---|" + "---|" * depth]
    for result in results:
        for name, title in NAMES.items():
            if name not in result["details"]["trained"]:
                continue
            digits, factor = {"knn": (1, 100), "mean_share": (2, 1), "effective_rank": (1, 1)}[name]
            before, after = (result["details"][when][name] for when in ("untrained", "trained"))
            blocks = [f"{factor * b:.{digits}f} -> {factor * a:.{digits}f}" for b, a in zip(before, after, strict=True)]
            lines.append(f"| {result['name']} | {title} | " + " | ".join(blocks) + " |")
    facts = ("protocol", "hardware", "processes", "seed", "commit")
    lines += ["", "; ".join(f"{fact}: {', '.join(sorted({str(r[fact]) for r in results}))}" for fact in facts) + "."]
    return "\n".join(lines) + "\n"


@dataclass
class Settings:
    """One table from the logs of runs."""

    runs: tuple[str, ...]
    """Folders of runs; those that are not finished are left out, and named."""
    out: str | None = None
    """Where to write the result, without its ending; by default nowhere."""


def write_summary(settings: Settings) -> None:
    """Print the table, and write it and the results where `settings.out` says."""
    results, left_out = summarize([Path(run) for run in settings.runs])
    text = table(results)
    for sentence in left_out:
        print(f"left out: {sentence}", file=sys.stderr)
    if settings.out:
        write_result(Path(settings.out), results, text)
    print(text, end="")


main = partial(cli.run, write_summary, Settings, __doc__, positional=True)

if __name__ == "__main__":
    main()
