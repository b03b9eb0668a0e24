"""A run's folder: its lock, its last checkpoint when links are lost, and checkpoints with a flipped bit."""

import errno
import fcntl
import os
import socket
import time
from pathlib import Path

import pytest
import torch
from helpers import start

from skipless.ssl.run.checkpoints import load_checkpoint, save_checkpoint
from skipless.ssl.run.folder import in_place_of_last, last_checkpoint, lock_folder


def save(folder: Path, *steps: int, keep: int = 2) -> None:
    for step in steps:
        save_checkpoint(folder, step, {"step": step, "student": {"w": torch.full((1000,), 1.0)}, "settings": {}}, keep)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def step_of(folder: Path) -> int:
    path = last_checkpoint(folder)
    assert path is not None
    return int(load_checkpoint(path)["step"])


@pytest.mark.parametrize("kind", ["missing", "dangling", "a text that names nothing"])
def test_without_a_last_the_newest_whole_checkpoint_is_taken_and_said(tmp_path: Path, kind: str) -> None:
    save(tmp_path, 9, 10)
    (tmp_path / "step-11.pt").write_bytes((tmp_path / "step-10.pt").read_bytes()[:3000])  # copied by half
    (tmp_path / "step-best.pt").write_text("the user's own")
    last = tmp_path / "last.pt"
    last.unlink()
    if kind == "dangling":
        last.symlink_to("step-12.pt")
    elif kind != "missing":
        last.write_text("step-12.pt\n")
    assert step_of(tmp_path) == 10
    path = last_checkpoint(tmp_path)
    assert path is not None
    assert "goes on from step-10.pt" in in_place_of_last(path)[0]


def test_where_links_fail_a_text_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    save(tmp_path, 1, 2, 3)
    assert names(tmp_path) == ["last.pt", "step-2.pt", "step-3.pt"]
    assert not (tmp_path / "last.pt").is_symlink()
    assert step_of(tmp_path) == 3
    (tmp_path / "last.pt").write_text("step-2.pt\n")
    path = last_checkpoint(tmp_path)
    assert path is not None
    assert (step_of(tmp_path), in_place_of_last(path)) == (2, [])


def test_a_last_that_is_a_copy_is_used(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    (tmp_path / "last.pt").unlink()
    (tmp_path / "last.pt").write_bytes((tmp_path / "step-1.pt").read_bytes())
    assert step_of(tmp_path) == 1


def test_what_was_just_saved_is_never_deleted(tmp_path: Path) -> None:
    save(tmp_path, 50, 60)
    (tmp_path / "step-best.pt").write_text("the user's own")
    save(tmp_path, 10, 20, 30)
    assert names(tmp_path) == ["last.pt", "step-20.pt", "step-30.pt", "step-50.pt", "step-60.pt", "step-best.pt"]
    assert step_of(tmp_path) == 30


def test_a_flipped_bit_is_refused_and_the_checkpoint_before_named(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    path = tmp_path / "step-2.pt"
    content = bytearray(path.read_bytes())
    at = content.index(torch.full((1000,), 1.0).numpy().tobytes())
    content[at + 2001] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"checksum.* wrong.*delete step-2\.pt to go on from step-1\.pt"):
        load_checkpoint(tmp_path / "last.pt")
    path.unlink()
    assert step_of(tmp_path) == 1


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    script = tmp_path / "holder.py"
    script.write_text(
        "import pathlib, time\nfrom skipless.ssl.run.folder import lock_folder\n\n"
        f"def main(words):\n    lock = lock_folder(pathlib.Path({str(tmp_path)!r}))\n    time.sleep(200)\n"
    )
    first = start(str(script))
    while not (tmp_path / ".lock").exists() or not (tmp_path / ".lock").read_text():
        time.sleep(0.02)
    with pytest.raises(ValueError, match=f"in use by process {first.process.pid} on {socket.gethostname()}"):
        lock_folder(tmp_path)
    first.process.kill()
    first.process.join()
    lock_folder(tmp_path).close()
    assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"


@pytest.mark.parametrize(("process", "host", "taken"), [(1, "", True), (2**22 + 1, "", False), (1, "elsewhere", False)])
def test_on_a_disk_without_locks_the_process_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, process: int, host: str, taken: bool
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    (tmp_path / ".lock").write_text(f"process {process} on {host or socket.gethostname()}")
    if taken:
        with pytest.raises(ValueError, match="in use by process 1 on"):
            lock_folder(tmp_path)
    else:
        lock_folder(tmp_path).close()
