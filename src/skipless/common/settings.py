"""Settings as plain values, and the names that they had in earlier versions."""

import dataclasses
import json
import math
import os
import re
import shlex
from pathlib import Path
from typing import Any, get_type_hints

from skipless.common.processes import available_cores

# Settings by other names than today's, which old runs, recipes and command lines use.
OLD_NAMES = {
    "show": "image",
    "wandb": "log_to",
    "crops.global_size": "crops.global_crops_size",
    "crops.global_scale": "crops.global_crops_scale",
    "crops.local_size": "crops.local_crops_size",
    "crops.local_count": "crops.local_crops_number",
    "crops.local_scale": "crops.local_crops_scale",
    "crops.grey_probability": "crops.gray_probability",
    "dino.prototypes": "dino.out_dim",
    "dino.hidden": "dino.hidden_dim",
    "dino.bottleneck": "dino.bottleneck_dim",
    "dino.freeze_last_layer_epochs": "dino.freeze_last_layer",
    "dino.momentum": "dino.momentum_teacher",
    "dino.student_temperature": "dino.student_temp",
    "dino.teacher_temperature": "dino.teacher_temp",
    "dino.warmup_teacher_temperature": "dino.warmup_teacher_temp",
    "dino.warmup_teacher_temperature_epochs": "dino.warmup_teacher_temp_epochs",
    "dino.centre_momentum": "dino.center_momentum",
}
# Settings whose name is a word of Python's own.
KEYWORDS = {"model.from": "model.from_ckpt"}
TODAY = OLD_NAMES | KEYWORDS
# The same for values: (today's name of the setting, old value).
OLD_VALUES: dict[tuple[str, Any], Any] = {
    ("dino.balancing", "centre"): "center",
    ("log_to", True): "wandb",
    ("log_to", False): None,
}
SWITCHES = ("wandb",)  # old names of settings that were true or false, and are not any more
# Settings that came after the first runs and results, with the value that those without them had.
LATER: dict[str, Any] = {
    "model.value_output": True,
    "model.query_key": True,
    "model.depth_scale": 1.0,
    "model.patches": "default",
    "model.positions": "default",
    "shard": False,
    "precision": "fp32",
    "dino.koleo_loss_weight": 0.0,
    "ibot.loss_weight": 0.0,
    "ibot.out_dim": None,
    "ibot.mask_sample_probability": 0.5,
    "ibot.mask_ratio_min_max": [0.1, 0.5],
    "ibot.from_epoch": 0,
    "gram.loss_weight": 0.0,
    "gram.from_epoch": 0,
    "gram.every_epochs": 0,
    "crops.gram_teacher_crops_size": None,
    "extend": None,
    "model.from_ckpt": None,
    "model.shaped": False,
    "data.void": None,
    "data.annotations": None,
    "share": 1,
    "seeds": 1,
    "limit": None,
    "bilateral_solver": False,
}
# Numbers that may be negative: a cosine.
SIGNED = ("tau",)
LARGEST = 10**15
# Settings that name what is written.
MOST_WORKERS = 128  # or 16 a core: each is a process
WRITTEN = ("out", "cache", "figure")


def refuse_nonsense(settings: Any, prefix: str = "") -> None:
    """Raise ValueError for what no setting can mean: numbers that are not finite, negative or beyond `LARGEST`, empty
    texts that are not the default, and addresses as places to write to."""
    for field in dataclasses.fields(settings):
        name, value = f"{prefix}{field.name}", getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            refuse_nonsense(value, f"{name}.")
            continue
        if value == field.default:
            continue
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, int | float) and not (math.isfinite(part) and abs(part) <= LARGEST):
                raise ValueError(f"{name} is {part:g}; give a number that is finite and not beyond {LARGEST:g}")
            if isinstance(part, int | float) and part < 0 and field.name not in SIGNED:
                raise ValueError(f"{name} is {part:g}; it cannot be negative")
            if field.name == "workers" and part and part > (most := max(MOST_WORKERS, 16 * available_cores())):
                raise ValueError(f"{name} is {part}; on this machine's {available_cores()} cores give at most {most}")
            if isinstance(part, str | Path) and not str(part).strip():
                raise ValueError(f"{name} is empty: give it a value, or leave it out")
            if field.name in WRITTEN and isinstance(part, str | Path) and re.match(r"\w+:/", str(part)):
                raise ValueError(f"{name} is {part}, an address: give a path on this machine, and copy what is there")


def refuse_unwritable(settings: Any, prefix: str = "") -> None:
    """Raise ValueError for places to write to that a disk or a folder's permissions do not allow."""
    for field in dataclasses.fields(settings):
        name, value = f"{prefix}{field.name}", getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            refuse_unwritable(value, f"{name}.")
        if field.name not in WRITTEN or not isinstance(value, str | Path):
            continue
        place = Path(value).absolute()
        there = next(path for path in (place, *place.parents) if os.path.exists(path))
        if there.is_file() and there != place:
            raise ValueError(f"{name} is {value}, and {there} is a file: give a path in a folder")
        folder = there.parent if there.is_file() else there
        if not os.access(folder, os.W_OK | os.X_OK):
            disk = os.statvfs(folder).f_flag & os.ST_RDONLY
            why = "is on a disk that is read-only" if disk else "is a folder that this user may not write to"
            raise ValueError(f"{name} is {value}, and {folder} {why}: give another place")


def plain(settings: Any) -> dict[str, Any]:
    """A dataclass of settings as plain dicts, lists and values; without `resume`, which is no property of a run."""
    tree = json.loads(json.dumps(dataclasses.asdict(settings), default=str))
    tree.pop("resume", None)
    return tree


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of settings as one dict with dotted names."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return leaves


def command_line(file: str, settings: dict[str, Any], kind: type) -> str:
    """A command that means these settings, as a shell takes it: a flag for each that is not the default of `kind`."""

    def word(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    usual = flat(json.loads(json.dumps(_defaults(kind), default=str)))
    words = [f"--{name}={word(value)}" for name, value in flat(settings).items() if usual.get(name, ...) != value]
    return shlex.join(["python", file, *words])


def _defaults(kind: type) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
            tree[field.name] = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]
        elif field.default is not dataclasses.MISSING:
            tree[field.name] = field.default
        elif dataclasses.is_dataclass(hints[field.name]):
            tree[field.name] = _defaults(hints[field.name])
    return tree


def renamed(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of settings of any version, under today's names and values."""
    today: dict[str, Any] = {}
    for name, value in tree.items():
        name = TODAY.get(f"{prefix}{name}", f"{prefix}{name}").removeprefix(prefix)
        if isinstance(value, dict):
            today[name] = renamed(value, f"{prefix}{name}.")
        else:
            today[name] = OLD_VALUES.get((f"{prefix}{name}", value), value) if isinstance(value, str | bool) else value
    return today
