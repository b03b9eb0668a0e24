"""A run's folder: which process writes into it, and which checkpoint is its last."""

import os
import re
import socket
import zipfile
from pathlib import Path
from typing import IO

from skipless.common.files import write_text

RUNS = Path("runs")  # where commands write that are not told where
POINTER_BYTES = 200  # a last.pt as small as this is no checkpoint, but the name of one


def lock_folder(folder: Path) -> IO[str]:
    """Make this process the one that writes into a run's folder, until the file returned is closed or the process dies.

    The lock is the operating system's, and so holds over all machines whose shared disk has locks. Where the disk has
    none, the process that is named in the file is looked for on this machine.

    Raises:
        ValueError: another process writes there; it is named.
    """
    import fcntl

    file = open(folder / ".lock", "a+")  # noqa: SIM115
    file.seek(0)
    holder = file.read().strip()
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        taken = False
    except (BlockingIOError, PermissionError):
        taken = True
    except OSError:
        taken = _runs_here(holder)
    if taken:
        file.close()
        raise ValueError(
            f"{folder} is in use by {holder or 'another process'}, which holds {folder / '.lock'}: wait for it, end it "
            "or give another --out"
        )
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def _runs_here(holder: str) -> bool:
    """Whether a process, as named in a lock's file, is another one of this machine that is still alive."""
    match = re.fullmatch(r"process (\d+) on (.*)", holder)
    if match is None or match[2] != socket.gethostname() or int(match[1]) == os.getpid():
        return False
    try:
        os.kill(int(match[1]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def whole_checkpoints(checkpoints: Path) -> list[Path]:
    """step-N.pt and folders step-N that are whole, by their steps. Others, as a step-best.pt, are the user's own."""
    found = {int(m[1]): p for p in checkpoints.glob("step-*") if (m := re.fullmatch(r"step-(\d+)(\.pt)?", p.name))}
    ordered = [found[step] for step in sorted(found)]
    return [path for path in ordered if zipfile.is_zipfile(path / "state.pt" if path.is_dir() else path)]


def last_checkpoint(checkpoints: Path) -> Path | None:
    """The file to go on from: what last.pt names, or the newest whole checkpoint where it names none; None without any.

    A last.pt is a link, a text with a name where the disk has no links, or a copy, as `cp -L` makes it.
    """
    whole = whole_checkpoints(checkpoints)
    newest = (whole[-1] / "state.pt" if whole[-1].is_dir() else whole[-1]) if whole else None
    return _named(checkpoints, newest) or newest


def _named(checkpoints: Path, newest: Path | None) -> Path | None:
    """The file that last.pt is, or names."""
    last = checkpoints / "last.pt"
    if not last.is_file():
        return None
    if not last.is_symlink() and last.stat().st_size <= POINTER_BYTES:
        name = last.read_text(errors="replace").strip()
        return checkpoints / name if name and (checkpoints / name).is_file() else None
    if not last.is_symlink() and newest and newest.name == "state.pt":  # a copy, which lacks the parts beside it
        return None
    return last


def point_last_at(checkpoints: Path, name: str) -> None:
    """Make last.pt a link to `name` in the same folder, atomically; a text with the name where links are impossible."""
    link = checkpoints / ".last.pt"
    link.unlink(missing_ok=True)
    try:
        link.symlink_to(name)
    except OSError:
        write_text(checkpoints / "last.pt", name + "\n")
    else:
        os.replace(link, checkpoints / "last.pt")


def in_place_of_last(checkpoint: Path) -> list[str]:
    """A sentence where a run goes on from a checkpoint that no last.pt names."""
    inside = checkpoint.parent if checkpoint.name == "state.pt" else checkpoint
    last = inside.with_name("last.pt")
    if checkpoint.name == "last.pt" or _named(last.parent, checkpoint):
        return []
    wrong = "names no checkpoint" if last.is_symlink() or last.exists() else "is missing"
    return [f"{last} {wrong}: goes on from {inside.name}, the newest whole checkpoint"]


def last_in_words(checkpoints: Path) -> str:
    """What a run that has ended can go on from."""
    path = last_checkpoint(checkpoints)
    if path is None:
        return "there is no checkpoint yet"
    path = path.resolve()
    return f"the last checkpoint is {(path.parent if path.name == 'state.pt' else path).stem.replace('-', ' ')}"


def older_beside(checkpoint: Path) -> str:
    """What can be done about a damaged checkpoint; empty where none is beside it."""
    path = checkpoint.resolve()
    path = path.parent if path.name == "state.pt" else path
    others = [other.name for other in whole_checkpoints(path.parent) if other.name != path.name]
    return f"; delete {path.name} to go on from {others[-1]}, which is beside it" if others else ""


def newest_run() -> Path | None:
    """The folder in `RUNS` of the training run that was finished last."""
    exports = [(path.stat().st_mtime_ns, path.parent) for path in RUNS.glob("*/backbone.safetensors")]
    return max(exports)[1] if exports else None
