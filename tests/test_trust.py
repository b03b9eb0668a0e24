"""What a user trusts every command with."""

import json
import os
import subprocess
import sys
import weakref
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import ROOT, call, error_line, run

from skipless.__main__ import COMMANDS
from skipless.common import cli


def test_no_command_opens_a_socket_unless_a_url_is_named(tmp_path: Path) -> None:
    done = run("tests/processes/offline.py", [tmp_path, tmp_path / "ended.json"])
    assert done.returncode == 0, done.stderr
    ended = json.loads((tmp_path / "ended.json").read_text())
    assert "is blocked" in ended.pop("pretrain from a URL")
    assert ended.keys() == COMMANDS.keys()
    assert {name: error for name, error in ended.items() if error} == {}


def test_settings_that_nobody_means_are_refused_in_a_sentence() -> None:
    """A short part of the campaign: `make stress` has 5,000 draws."""
    done = run("benchmarks/fuzzing.py", ["--draws=100"])
    assert done.returncode == 0, done.stderr


def test_a_short_part_of_the_campaign_loses_nothing() -> None:
    """`make stress` has all of it."""
    words = ["--share=0.01", "--kinds", "kills", "signals", "bits", "disk", "limit"]
    command = [sys.executable, ROOT / "benchmarks" / "stress.py", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@dataclass
class Group:
    tau: float = -0.5


@dataclass
class Settings:
    out: str = "here"
    images: str = ""
    lr: tuple[float, ...] = (0.1,)
    count: int = 1
    figure: Path | None = None
    workers: int | None = None
    group: Group = field(default_factory=Group)


def accept(_: Settings) -> None:
    """A command that does nothing."""


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--lr", "0.1", ".nan"], "lr is nan; give a number that is finite"),
        (["--group.tau=-1e400"], "group.tau is -inf; give a number that is finite"),
        (["--count=4178527887543384272717488521216"], "not beyond 1e+15"),
        (["--count=-3"], "count is -3; it cannot be negative"),
        (["--workers=100000"], "workers is 100000; on this machine's "),
        (["--out="], "out is empty: give it a value, or leave it out"),
        (["--figure="], "figure is empty: give it a value, or leave it out"),
        (["--out=s3://bucket/folder"], "out is s3://bucket/folder, an address"),
        (["--count", "a" * 9000], f"count is '{'a' * 70}"),
    ],
)
def test_nonsense_is_named(words: list[str], sentence: str) -> None:
    line = error_line(call(partial(cli.run, accept, Settings, None), words).stderr)
    assert sentence in line
    assert len(line) < 300


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [(0, "here is a folder that this user may not write to"), (os.ST_RDONLY, "here is on a disk that is read-only")],
)
@pytest.mark.parametrize("place", ["", "/a/b.png"])
def test_a_place_that_cannot_be_written_is_named_first(
    flag: int, sentence: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write anywhere, so tests ask for the answer that others get."""
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != tmp_path / "here")
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=flag))
    line = error_line(call(partial(cli.run, accept, Settings, None), [f"--figure={tmp_path}/here{place}"]).stderr)
    assert line == f"figure is {tmp_path}/here{place}, and {tmp_path}/{sentence}: give another place"


def test_a_place_below_a_file_is_named_first(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    line = error_line(call(partial(cli.run, accept, Settings, None), [f"--out={tmp_path}/file/run"]).stderr)
    assert line == f"out is {tmp_path}/file/run, and {tmp_path}/file is a file: give a path in a folder"


def test_what_may_be_negative_or_empty_is_taken() -> None:
    assert cli.parse(Settings, ["--group.tau=-0.2", "--images="]) == Settings(group=Group(-0.2))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "there is not enough memory: lower"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
            "you tried to allocate 314572800 bytes. Error code 12"),
            "(314572800 bytes more were wanted)",
        ),
        (
            RuntimeError(
                "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
                "RuntimeError: unable to allocate shared memory(shm) for file </torch_9>: No space left (28)"
            ),
            "/dev/shm is full",
        ),
        (
            RuntimeError(
                "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers "
                "are out of shared memory. Please try to raise your shared memory limit."
            ),
            "--ipc=host",
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has"), "(20.00 MiB more were wanted)"),
    ],
)  # fmt: skip
def test_too_little_memory_is_a_sentence(error: Exception, said: str) -> None:
    def fail(_: Settings) -> None:
        raise error

    assert said in error_line(call(partial(cli.run, fail, Settings, None), []).stderr)


def test_what_filled_the_memory_is_let_go_before_the_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref[Group]] = []

    def fail(_: Settings) -> None:
        filling = Group()
        held.append(weakref.ref(filling))
        raise MemoryError

    monkeypatch.setattr(cli, "sentence", lambda _: str(held[0]()))
    assert error_line(call(partial(cli.run, fail, Settings, None), []).stderr) == "None"
