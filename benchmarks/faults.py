"""Commands in processes that meet a fault, a kill at a chosen moment or a limit of size; and what they leave."""

import contextlib
import hashlib
import importlib
import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from skipless.common import interruption

# Forked from a server that has imported what commands need and has done nothing else: starting one takes no seconds.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["skipless.ssl.pretrain", "skipless.ssl.distill", "skipless.eval.report", "faiss"])
CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink")  # of files, as Python tells them


@dataclass
class Fault:
    """What a process meets. By default nothing."""

    kill_at: int | None = None
    """SIGKILL at so many changes of files below the folder that it writes to."""
    largest_file: int | None = None
    """Bytes, as by `ulimit -f`."""
    count: Path | None = None
    """File for the number of changes that it made."""


@dataclass
class Ended:
    """How a command ended."""

    code: int | None
    """As its process told; None where it had to be ended."""
    said: str
    """Its standard output and error."""

    @property
    def wrong(self) -> str:
        """What no ending may be: a hang, a traceback, or an error without its sentence."""
        if self.code is None:
            return "hangs"
        if "Traceback" in self.said:
            return f"traceback: {self.said.strip().splitlines()[-1]}"
        refused = [line for line in self.said.splitlines() if line.startswith("error")]
        return f"exit {self.code}: {self.said[-300:]}" if self.code == 2 and not refused else ""


class Running:
    """A command that is at work, as the module of the package that has its `main`, and its words."""

    def __init__(
        self, module: str, words: Sequence[str], out: Path, fault: Fault | None = None, env: Mapping[str, str] = {}
    ):
        self.log = out.with_name(f"{out.name}.{time.monotonic_ns()}.log")
        self.log.touch()
        arguments = (module, list(words), str(out), str(self.log), fault or Fault(), dict(env))
        self.process: Any = SERVER.Process(target=_main, args=arguments)
        self.process.start()

    def end(self, seconds: float = 120) -> Ended:
        """Wait for it; kill it where it takes longer."""
        self.process.join(seconds)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            self.process.join()
        said = self.log.read_text(errors="replace")
        self.log.unlink()
        return Ended(code, said)

    def signal_after(self, seconds: float, number: int) -> None:
        """Send it a signal, unless it has ended before."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            os.kill(self.process.pid, number)


def group(module: str, words: Sequence[str], out: Path, processes: int) -> list[Running]:
    """A command in several processes of one group, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    ranks = [env | {"MASTER_PORT": port, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    return [Running(module, words, out, env=rank) for rank in ranks]


def _main(module: str, words: list[str], out: str, log: str, fault: Fault, env: dict[str, str]) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, interruption.end)  # as scripts do, also where the campaign is in the background
    with open(log, "a") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))
    multiprocessing.set_start_method(None, force=True)  # for loader workers, as in any other process
    os.environ.update(env)
    torch.set_num_threads(1)
    if fault.largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.largest_file, fault.largest_file))
    changes = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal changes
        if event not in CHANGES or not str(arguments[0]).startswith(out):
            return
        if event == "open" and not set(str(arguments[1] or "w")) & set("wax+"):
            return
        changes += 1
        if changes == fault.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    sys.argv = [module, *words]
    try:
        importlib.import_module(module).main(words)
    finally:
        if fault.count:
            fault.count.write_text(str(changes))


def trained(run: Path) -> dict[str, str]:
    """What a finished run has computed: a digest of every part of its last checkpoint and of its backbone, and its
    losses by step."""
    parts = {"backbone": _digest(load_file(run / "backbone.safetensors"))}
    state = torch.load(run / "checkpoints" / "last.pt", map_location="cpu", weights_only=True)
    parts |= {name: _digest(part) for name, part in state.items() if name not in ("seconds", "settings", "spared")}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    parts["losses"] = _digest([(line["step"], line["loss"]) for line in lines if "loss" in line])
    return parts


def measured(out: Path) -> dict[str, str]:
    """What a command has left: a digest of every file, of results without what differs by the clock."""
    found = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        if path.suffix == ".md" or path.name.startswith("."):
            continue
        if path.suffix == ".json":
            result = json.loads(path.read_text())
            for name in ("seconds", "settings") if isinstance(result, dict) else ():
                result.pop(name, None)
            found[str(path.relative_to(out))] = _digest(result)
        else:
            found[str(path.relative_to(out))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def difference(wanted: Mapping[str, str], got: Mapping[str, str]) -> str:
    """Names of what differs; empty where all is the same to the last bit."""
    differing = sorted(name for name in {*wanted, *got} if wanted.get(name) != got.get(name))
    return f"differs in {', '.join(differing)}" if differing else ""


def left_behind(folder: Path) -> str:
    """Unfinished files and folders that nobody will remove."""
    kept = (".lock", ".last.pt", ".metadata")  # the last is the index of a sharded checkpoint
    left = [path.name for path in folder.rglob(".*") if path.name not in kept]
    return f"left behind: {', '.join(left)}" if left else ""


def _digest(value: Any) -> str:
    hashed = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, torch.Tensor):
            hashed.update(f"{part.dtype}{tuple(part.shape)}".encode())
            hashed.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(part, Mapping):
            for key in sorted(part, key=str):
                add(key)
                add(part[key])
        elif isinstance(part, list | tuple):
            for each in part:
                add(each)
        else:
            hashed.update(repr(part).encode())

    add(value)
    return hashed.hexdigest()


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int, files: int) -> Iterator[Path]:
    """A file system of that size and for so many files, 0 for any number, at `folder`, in memory; raises OSError where
    this user may not mount one."""
    folder.mkdir()
    command = f"mount -t tmpfs -o size={kilobytes}k,nr_inodes={files} tmpfs '{folder}' 2>/dev/null"
    if os.system(command):
        raise OSError("mounting a file system needs root")
    try:
        yield folder
    finally:
        os.system(f"umount '{folder}'")
