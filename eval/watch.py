"""A page that shows how training goes: curves, whether it learns in words, PCA pictures of a few images.

    python eval/watch.py runs/photos
    python eval/watch.py runs/skipless runs/residual --once

writes runs/photos/watch.html, one file that needs no server and no network, and writes it anew until the run ends, or
Ctrl-C. A browser that shows it reads it again by itself. Several runs share their axes; the page is in the first's
folder. The pictures are those that the monitor leaves (`--monitor.pictures`).
"""

import skipless.common.interruption  # noqa: F401

import base64
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from markupsafe import Markup

from skipless.common import cli
from skipless.common.files import printable, write_text
from skipless.common.progress import duration
from skipless.eval.page.parts import MARKERS, Line, colors_of, draw_lines, rendered
from skipless.ssl.run.learning import read_metrics, verdict

# Title, name in metrics.jsonl and factor of every plot. Of lists over the blocks, the last block's value is shown.
PLOTS = (
    ("loss", "loss", 1),
    ("k-NN accuracy of the last block, %", "monitor/knn", 100),
    ("top-1 accuracy on the validation images, %", "val/top1", 100),
    ("cosine similarity to the teacher", "cosine", 1),
    ("entropy of the teacher's answers, nats", "teacher_entropy", 1),
    ("entropy of their mean: prototypes in use, nats", "usage_entropy", 1),
    ("effective rank of an image's patches, last block", "monitor/effective_rank", 1),
    ("learning rate", "lr", 1),
)
POINTS, MARKED = 300, 30  # of a line, at most; and so that each has a marker
MEASUREMENTS = 12  # that pictures are shown of, evenly spread


@dataclass
class Settings:
    """A page that shows how training goes."""

    runs: tuple[str, ...]
    """Folders of runs."""
    every: int = 10
    """Seconds between two pages."""
    once: bool = False
    """Write one page, and end."""

    def __post_init__(self) -> None:
        if not self.runs or self.every < 1:
            raise ValueError("give the folder of one run or more, and 1 or more seconds as --every")


def watch(settings: Settings) -> Path:
    """Write the page until all runs have ended, and return its path.

    Raises:
        ValueError: a folder is none of a run.
    """
    folders = [Path(run) for run in settings.runs]
    for folder in folders:
        if not (folder / "settings.yaml").exists():
            raise ValueError(f"{folder} is no run that has begun: it has no settings.yaml")
    page = folders[0] / "watch.html"
    print(f"open {page} in a browser" + ("" if settings.once else "; Ctrl-C ends its renewal, not the run"), flush=True)
    with suppress(KeyboardInterrupt):
        while not (settings.once or all(map(finished, folders))):
            write_text(page, page_of(folders, settings.every))
            time.sleep(settings.every)
    write_text(page, page_of(folders, None))
    return page


def finished(run: Path) -> bool:
    """Whether a run has come to its end."""
    return (run / "backbone.json").exists()


def page_of(folders: list[Path], every: int | None) -> str:
    """The page as it is now; it reads itself again after `every` seconds."""
    folders = list({folder.resolve(): folder for folder in folders}.values())
    names = [folder.resolve().name for folder in folders]
    if len({*names}) < len(names):
        names = [str(folder) for folder in folders]
    colors = colors_of(map(printable, names))
    logs = {name: read_metrics(folder / "metrics.jsonl") for name, folder in zip(colors, folders, strict=True)}
    plots = []
    for title, metric, factor in PLOTS:
        if lines := {name: line for name, log in logs.items() if (line := line_of(log, metric, factor))}:
            markers = MARKERS if max(len(line.x) for line in lines.values()) <= MARKED else ""
            plots.append({"title": title, "svg": Markup(draw_lines(lines, "epoch", "", colors, markers))})
    runs = [
        {
            "name": name,
            "state": state(folder, logs[name]),
            "verdict": verdict(logs[name]),
            "pictures": pictures(folder, logs[name]),
        }
        for name, folder in zip(colors, folders, strict=True)
    ]
    date = time.strftime("%Y-%m-%d %H:%M:%S")
    return rendered("watch.html", colors=colors, plots=plots, runs=runs, every=every, date=date)


def line_of(log: list[dict[str, Any]], metric: str, factor: float) -> Line | None:
    """A metric over the epochs, means of neighbors where there are too many; None where it was not logged."""
    points = [(entry["epoch"], entry[metric]) for entry in log if entry.get(metric) is not None]
    if not points:
        return None
    values = np.array([(epoch, factor * (value[-1] if isinstance(value, list) else value)) for epoch, value in points])
    means = np.array([part.mean(0) for part in np.array_split(values, min(POINTS, len(points)))])
    return Line(means[:, 0].tolist(), means[:, 1].tolist())


def state(run: Path, log: list[dict[str, Any]]) -> str:
    """How far a run is, in words."""
    if finished(run):
        return "finished"
    if not log:
        return "nothing is logged yet"
    epochs = yaml.safe_load((run / "settings.yaml").read_text())["epochs"]
    ago = duration(time.time() - (run / "metrics.jsonl").stat().st_mtime)
    return f"epoch {log[-1]['epoch']:.1f} of {epochs}, {ago} ago"


def pictures(run: Path, log: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The images, and below them what the monitor drew of them, the newest first."""
    epochs = {entry["step"]: entry["epoch"] for entry in log}
    drawn = {step: path for path in run.glob("pictures/pca-*.png") if (step := step_of(path)) in epochs}
    shown = np.unique(np.linspace(0, len(drawn) - 1, min(len(drawn), MEASUREMENTS)).round().astype(int))[::-1]
    images = sorted(run.glob("pictures/images-*.png"), key=step_of)[-1:]
    steps = sorted(drawn)
    titled = [("images", path) for path in images]
    titled += [(f"epoch {epochs[steps[row]]:g}", drawn[steps[row]]) for row in shown]
    return [{"title": title, "source": data_url(path)} for title, path in titled]


def step_of(picture: Path) -> int:
    """The step of a picture, from its name; -1 where it is no name of ours."""
    match = re.search(r"-(\d+)\.png$", picture.name)
    return int(match[1]) if match else -1


def data_url(picture: Path) -> str:
    """A PNG file as a data URL."""
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()


main = partial(cli.run, watch, Settings, __doc__, positional=True)

if __name__ == "__main__":
    main()
