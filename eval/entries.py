"""What an interrupted evaluation had measured: files of one JSON object a line, the first of which says of what.

known = read_entries(path, identity)         # of an earlier run, by index
append_entries(path, identity, [{"index": 3, ...}])
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read_entries(path: Path, identity: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Entries of an interrupted run by their "index", but for a last line that was cut off.

    Raises:
        ValueError: the file is damaged, or its first line is not `identity`.
    """
    *lines, _ = path.read_bytes().split(b"\n")
    if not lines:
        return {}
    try:
        head, *entries = map(json.loads, lines)
        by_index = {entry["index"]: entry for entry in entries}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged: delete it, and the same command starts without it") from None
    if head != identity:
        raise ValueError(f"{path} is of a run with other settings, weights or data: delete it, or give another --out")
    return by_index


def append_entries(path: Path, identity: dict[str, Any], entries: Sequence[dict[str, Any]]) -> None:
    """Add entries to a file, in the place of a last line that was cut off."""
    with open(path, "ab+") as file:
        end = file.seek(0, 2)
        file.seek(max(0, end - 1))
        if file.read() != b"\n":
            file.seek(0)
            end = file.truncate(file.read().rfind(b"\n") + 1)
        lines = entries if end else [identity, *entries]
        file.writelines(json.dumps(line).encode() + b"\n" for line in lines)
