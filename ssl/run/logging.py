"""What a run says: metrics.jsonl, TensorBoard, another tracker if wanted, and one progress line."""

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from skipless.common.files import append_text, write_atomically, write_text
from skipless.common.progress import duration
from skipless.ssl.run.trackers import Tracker, TrackerName

# Groups of tags in TensorBoard and other trackers; what is in none, and in no group by its name, is of "train".
GROUPS = {
    "schedule": ("lr", "weight_decay", "momentum", "teacher_temperature"),
    "speed": ("images_per_second", "data_share", "memory_gb", "model_flops_utilisation"),
}


class RunLog:
    """Writes metrics where people look for them. On all processes but the first it does nothing.

    A resumed run appends: lines of metrics.jsonl past the step it resumes from are dropped first, so that each step is
    there once. Training does not end where a log cannot be written: that is said once, and lines of metrics.jsonl are
    written when it can be.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        start: int,
        total: int,
        active: bool,
        tracker: TrackerName | None = None,
    ):
        self.active = active
        self.remarks: list[str] = []
        if not active:
            return
        path = folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if start and _step(line) <= start]
        logged = max(map(_step, kept), default=0)
        if start and logged < start:  # a line is written before every checkpoint
            self.remarks.append(f"{path} has no lines of steps {logged:,.0f} to {start:,}: they are lost")
        write_text(path, "".join(line + "\n" for line in kept))
        self.recorded = {(_step(line), name) for line in kept for name in json.loads(line)}
        self.path, self.unwritten, self.failed = path, "", set[str]()
        threading.excepthook = _report
        self.tensorboard = SummaryWriter(folder / "tensorboard", purge_step=start + 1 if start else None)
        self.tracker = Tracker(tracker, folder, settings, start > 0) if tracker else None
        # A bar on a terminal; in a file or a pipe a line now and then, see `progress`.
        self.bar = tqdm(
            total=total, initial=start, unit="step", dynamic_ncols=True, smoothing=0.05, mininterval=0.5, disable=None
        )
        self.total = total
        self.last_line = time.monotonic()
        self.warm: tuple[int, float] | None = None  # step and time from which on speed says how long the rest takes

    def advance(self) -> None:
        """Move the progress bar by one step."""
        if self.active:
            self._on_screen(self.bar.update)

    def metrics(self, step: int, epoch: float, values: dict[str, Any]) -> None:
        """Record values at a step: numbers, and lists of numbers by block."""
        if not self.active:
            return
        self.unwritten += json.dumps({"step": step, "epoch": round(epoch, 4), **values}) + "\n"
        self._unless_refused("metrics.jsonl", self._write_lines)
        flat: dict[str, float] = {}
        for name, value in values.items():
            entries = (
                {f"{name}/block_{i}": v for i, v in enumerate(value)}
                if isinstance(value, list)
                else {grouped(name): value}
            )
            flat |= {key: v for key, v in entries.items() if isinstance(v, int | float)}
        self._unless_refused("tensorboard", lambda: self._add_scalars(flat, step))
        if tracker := self.tracker:
            self._unless_refused(tracker.name, lambda: tracker.metrics(flat, step))

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Keep pictures of a step, uint8 [H, W, 3] by name, in the run's folder, too."""
        if not self.active:
            return
        for name, picture in pictures.items():
            self._unless_refused("pictures", partial(self._draw, name, step, picture))

    def _draw(self, name: str, step: int, picture: np.ndarray) -> None:
        path = self.path.parent / "pictures" / f"{name}-{step}.png"
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, lambda beside: Image.fromarray(picture).save(beside, format="png"))
        self.tensorboard.add_image(f"pictures/{name}", picture, step, dataformats="HWC")
        if self.tracker:
            self.tracker.picture(f"pictures/{name}", picture, step)

    def _write_lines(self) -> None:
        append_text(self.path, self.unwritten)
        self.unwritten = ""

    def _add_scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.tensorboard.add_scalar(name, value, step)

    def _unless_refused(self, name: str, write: Callable[[], object]) -> None:
        try:
            write()
        except Exception as error:
            if name not in self.failed:
                self.failed.add(name)
                self.say(f"{name} cannot be written ({error}): training goes on")

    def has(self, step: int, name: str) -> bool:
        """Whether the run that is resumed recorded a value of this name at this step."""
        return self.active and (step, name) in self.recorded

    def progress(self, step: int, text: str) -> None:
        """The text at the end of the progress line; without a terminal, a line with it every half minute."""
        if not self.active:
            return
        self._on_screen(lambda: self.bar.set_postfix_str(text))
        now = time.monotonic()
        warm_step, since = self.warm = self.warm or (step, now)  # the first steps compile, and start workers
        if self.bar.disable and step < self.total and now - self.last_line > 30:
            self.last_line = now
            left = (now - since) / max(1, step - warm_step) * (self.total - step)
            said = f", {duration(left)} left" if step > warm_step else ""
            self.say(f"step {step:,} of {self.total:,}{said}; {text}")

    def say(self, text: str) -> None:
        """A line for people, above the progress bar."""
        if self.active:
            self._on_screen(lambda: tqdm.write(text, file=sys.stderr))

    def _on_screen(self, write: Callable[[], object]) -> None:
        """To a terminal that may be closed, a pipe that nobody reads, or a file on a full disk."""
        with contextlib.suppress(OSError, ValueError):
            write()

    def close(self) -> None:
        """Bring everything to the disk."""
        if self.active:
            self._on_screen(self.bar.close)
            self._unless_refused("metrics.jsonl", self._write_lines)
            self._unless_refused("tensorboard", self.tensorboard.close)
            if self.tracker:
                self._unless_refused(self.tracker.name, self.tracker.close)


def grouped(name: str) -> str:
    """A metric's tag: `train/loss`, `schedule/lr`, `monitor/knn`."""
    group = next((group for group, names in GROUPS.items() if name in names), "train")
    return name if "/" in name else f"{group}/{name}"


def _report(failure: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread hands its errors on to `add_scalar`: they need not be printed, too."""
    if "tensorboard" not in type(failure.thread).__module__:
        threading.__excepthook__(failure)


def _step(line: str) -> float:
    """A line's step; a line cut short by a crash counts as one from the future."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")
