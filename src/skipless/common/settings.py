"""Settings as plain values: what files of settings, checkpoints and results hold."""

import dataclasses
import json
from typing import Any


def plain(settings: Any) -> dict[str, Any]:
    """A dataclass of settings as plain dicts, lists and values; without `resume`, which is no property of a run."""
    tree = json.loads(json.dumps(dataclasses.asdict(settings)))
    tree.pop("resume", None)
    return tree


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of settings as one dict with dotted names."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
