"""What a run says: metrics.jsonl, TensorBoard, W&B, and one progress line."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from skipless.common.files import write_text


class RunLog:
    """Writes metrics where people look for them. On all processes but the first it does nothing.

    A resumed run appends: lines of metrics.jsonl past the step it resumes from are dropped first, so that each step is
    there once.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], start: int, total: int, active: bool, wandb: bool):
        self.active = active
        self.wandb: Any = None
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
        self.file = open(path, "a", buffering=1)  # noqa: SIM115
        self.tensorboard = SummaryWriter(folder / "tensorboard", purge_step=start + 1 if start else None)
        if wandb:
            import wandb as package

            self.wandb = package.init(project="skipless", id=folder.name, dir=folder, config=settings, resume="allow")
        # A bar on a terminal; in a file or a pipe a line now and then, see `progress`.
        self.bar = tqdm(
            total=total, initial=start, unit="step", dynamic_ncols=True, smoothing=0.05, mininterval=0.5, disable=None
        )
        self.start, self.total = start, total
        self.began = self.last_line = time.monotonic()

    def advance(self) -> None:
        """Move the progress bar by one step."""
        if self.active:
            self.bar.update()

    def metrics(self, step: int, epoch: float, values: dict[str, Any]) -> None:
        """Record values at a step: numbers, and lists of numbers by block."""
        if not self.active:
            return
        self.file.write(json.dumps({"step": step, "epoch": round(epoch, 4), **values}) + "\n")
        flat: dict[str, float] = {}
        for name, value in values.items():
            entries = (
                {f"{name}/block_{i}": v for i, v in enumerate(value)} if isinstance(value, list) else {name: value}
            )
            flat |= {key: v for key, v in entries.items() if isinstance(v, int | float)}
        for name, value in flat.items():
            self.tensorboard.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(flat, step=step)

    def has(self, step: int, name: str) -> bool:
        """Whether the run that is resumed recorded a value of this name at this step."""
        return self.active and (step, name) in self.recorded

    def progress(self, step: int, text: str) -> None:
        """The text at the end of the progress line; without a terminal, a line with it every half minute."""
        if not self.active:
            return
        self.bar.set_postfix_str(text)
        now = time.monotonic()
        if self.bar.disable and now - self.last_line > 30:
            self.last_line = now
            minutes = (now - self.began) / (step - self.start) * (self.total - step) / 60
            self.say(f"step {step:,} of {self.total:,}, {minutes:.0f} min left; {text}")

    def say(self, text: str) -> None:
        """A line for people, above the progress bar."""
        if self.active:
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Bring everything to the disk."""
        if self.active:
            self.bar.close()
            self.file.close()
            self.tensorboard.close()
            if self.wandb is not None:
                self.wandb.finish()


def _step(line: str) -> float:
    """A line's step; a line cut short by a crash counts as one from the future."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")
