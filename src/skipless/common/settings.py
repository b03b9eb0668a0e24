"""Settings as plain values, and the names that they had in earlier versions."""

import dataclasses
import json
from typing import Any

# Settings by other names than today's, which old runs, recipes and command lines use.
OLD_NAMES = {
    "show": "image",
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
# The same for values: (today's name of the setting, old value).
OLD_VALUES: dict[tuple[str, Any], Any] = {("dino.balancing", "centre"): "center"}
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
    "data.void": None,
    "data.annotations": None,
}


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


def renamed(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of settings of any version, under today's names and values."""
    today: dict[str, Any] = {}
    for name, value in tree.items():
        name = OLD_NAMES.get(f"{prefix}{name}", f"{prefix}{name}").removeprefix(prefix)
        if isinstance(value, dict):
            today[name] = renamed(value, f"{prefix}{name}.")
        else:
            today[name] = OLD_VALUES.get((f"{prefix}{name}", value), value) if isinstance(value, str) else value
    return today
