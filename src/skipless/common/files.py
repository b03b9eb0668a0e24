"""Files that appear whole or not at all, and results for machines and for people."""

import contextlib
import errno
import glob
import itertools
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, bring it to the disk, and rename it to `path`.

    Raises:
        OSError: the disk refuses it; says what and why in words.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(beside)
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        beside.chmod(0o666 & ~mask)  # safetensors makes files that only their owner can read
        os.replace(beside, path)
    except Exception as error:
        if refusal := refused(path, error):
            raise refusal from None
        raise
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def save_tensors(path: Path, state: Any) -> None:
    """torch.save, atomically; raises as `write_atomically` does. (Torch's own writer does not tell why it fails.)"""
    import torch

    def write(beside: Path) -> None:
        with open(beside, "wb") as file:
            torch.save(state, file)

    write_atomically(path, write)


def refused(path: Path, error: BaseException) -> OSError | None:
    """In words, what the disk said that led to this error of writing `path`; None if it said nothing.

    Args:
        error: Python's, torch's (its context is Python's) or safetensors' (its text has the number).
    """
    cause: BaseException | None = error
    while cause is not None:
        number = re.search(r"\(os error (\d+)\)", str(cause))
        code = cause.errno if isinstance(cause, OSError) else int(number[1]) if number else None
        if code in (errno.ENOSPC, errno.EDQUOT):
            return OSError(f"no space left in {path.parent} for {path.name}")
        if code is not None:
            return OSError(f"{path} cannot be written: {os.strerror(code)}")
        cause = cause.__context__ if isinstance(error, RuntimeError) else None
    return None


def append_text(path: Path, text: str) -> None:
    """Append to a text file, or leave it as it is and raise OSError."""
    with open(path, "ab", buffering=0) as file:
        end = file.tell()
        data = text.encode()
        try:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(end)
            raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` at the end of the block, and goes where an error ends it before. Folders
    that killed processes have left of the same `path` go, too.

    Raises OSError where `path` is there already and is no empty folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.unfinished-*"):
        try:
            with _locked(left):
                shutil.rmtree(left)
        except BlockingIOError:  # its process is at work
            pass
        except OSError:  # the disk has no locks
            print(f"{left} was left by a process that was killed, or is at work: delete it if not", file=sys.stderr)
    token = secrets.token_hex(4)
    beside = path.with_name(f".{path.name}.{token}")
    beside.mkdir()
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            stack.enter_context(_locked(beside))
        beside = beside.rename(path.with_name(f".{path.name}.unfinished-{token}"))  # locked before others look for it
        try:
            yield beside
            if path.exists():
                path.rmdir()
            beside.rename(path)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """A lock of the operating system's, which ends with the process; raises OSError where there is none to have."""
    import fcntl

    number = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(number)


def holds_already(folder: Path, record: str, read: Callable[[Path], Any], wanted: dict[str, Any], what: str) -> bool:
    """Whether a folder was filled before by the same settings; False where it is new or empty.

    Args:
        record: file in it that tells the settings, `read` gets them from there.
        wanted: the settings asked for.
        what: the folder holds, for messages.

    Raises ValueError for a file, and for a folder of anything else.
    """
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: {what} are written as a folder; choose another path")
    if not (folder / record).exists():
        if any(folder.iterdir()):
            raise ValueError(f"{folder} holds other files: choose a new or an empty folder")
        return False
    earlier = read(folder / record)
    differing = [
        f"{field} {earlier.get(field)} (asked for: {value})"
        for field, value in wanted.items()
        if earlier.get(field) != value
    ]
    if differing:
        raise ValueError(
            f"{folder} already holds {what} with {', '.join(differing)}: delete it, or choose another folder"
        )
    return True


def new_path(start: Path, ending: str = "") -> Path:
    """The first of START-1, START-2, ... (with an ending) that is not there yet."""
    return next(path for number in itertools.count(1) if not (path := Path(f"{start}-{number}{ending}")).exists())


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically; of names that are no text, as in `printable`."""
    write_atomically(path, lambda beside: beside.write_text(text, encoding="utf-8", errors="backslashreplace"))


def printable(text: object) -> str:
    """A text that can be written and drawn: Linux allows file names that are not UTF-8, and control characters."""
    encoded = str(text).encode(errors="backslashreplace").decode()
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in encoded)


def write_result(out: Path, result: Any, text: str) -> None:
    """Write a result for machines, `out`.json, and for people, `out`.md."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(Path(f"{out}.json"), json.dumps(result, indent=1) + "\n")
    write_text(Path(f"{out}.md"), text)
