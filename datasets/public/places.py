"""Where a command finds data that was not told: where datasets/prepare.py puts them, else synthetic scenes."""

import os
from collections.abc import Iterable
from pathlib import Path

from skipless.datasets.synthetic.dataset import RECORD, write_scenes

DATA = Path("data")  # the folder of datasets/prepare.py and datasets/scenes.py, too
SCENES = DATA / "scenes"


def first_there(places: Iterable[str]) -> str | None:
    """The first of some places in `DATA` that is there."""
    return next((place for place in places if (DATA / place).exists()), None)


def scenes_instead(name: str) -> Path:
    """The folder of synthetic scenes, written where it is missing (2,000 to learn from, 200 to measure); says that
    they stand in for photographs, of which datasets/prepare.py has the set `name`."""
    say(f"data: synthetic scenes in {SCENES}; for photographs: python datasets/prepare.py {name}")
    if not (SCENES / RECORD).exists():
        write_scenes(SCENES, train=2000, val=200)
    return SCENES


def say(line: str) -> None:
    """Print a line, in the first of the processes that a launcher started: before they have met."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)
