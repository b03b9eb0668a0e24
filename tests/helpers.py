"""Helpers of many tests: commands in processes of their own without the seconds that importing torch takes."""

import contextlib
import importlib
import importlib.util
import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DATA = os.environ.get("SKIPLESS_TEST_DATA")  # real images, see CONTRIBUTING.md

# Processes are forked from a server that has imported what commands need and has done nothing else: a process in which
# torch has computed a gradient cannot be forked.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["skipless.ssl.pretrain", "skipless.ssl.supervised", "skipless.eval.report", "faiss"])


@dataclass
class Done:
    """What a command left: as subprocess.CompletedProcess."""

    returncode: int
    stdout: str
    stderr: str


@dataclass
class Running:
    """A command that may still be at work."""

    process: Any
    folder: tempfile.TemporaryDirectory[str]

    def wait(self, timeout: float = 240) -> Done:
        """Wait for its end; kill it and fail where it takes longer than `timeout` seconds."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"still at work after {timeout} s: {self.printed('err')}")
        done = Done(self.process.exitcode, self.printed("out"), self.printed("err"))
        self.folder.cleanup()
        return done

    def printed(self, which: str) -> str:
        """What it has written so far to its standard "out" or "err"."""
        return Path(self.folder.name, which).read_text()


def start(
    module: str, words: Sequence[object] = (), cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> Running:
    """Start `main` of a module, as in start("skipless.ssl.pretrain", ["--out", folder]), or of a script of the
    repository, as in start("experiments/run.py"), in a process of its own."""
    folder = tempfile.TemporaryDirectory()
    arguments = (module, list(map(str, words)), folder.name, str(cwd or os.getcwd()), dict(env or {}))
    for name in ("out", "err"):
        Path(folder.name, name).touch()
    process = _SERVER.Process(target=_main, args=arguments)
    process.start()
    return Running(process, folder)


def run(module: str, words: Sequence[object] = (), timeout: float = 240, **where: Any) -> Done:
    """Run `main` of a module to its end; see `start`."""
    return start(module, words, **where).wait(timeout)


def run_group(module: str, words: Sequence[object], processes: int = 2, **where: Any) -> list[Done]:
    """Run `main` of a module in several processes of one group, as torchrun would; all must succeed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    env |= {"MASTER_PORT": port, **where.pop("env", {})}
    group = [start(module, words, env=env | {"RANK": str(r), "LOCAL_RANK": str(r)}, **where) for r in range(processes)]
    ended = [running.wait() for running in group]
    for done in ended:
        assert done.returncode == 0, done.stderr
    return ended


def load(script: Path) -> ModuleType:
    """A script outside the package as a module; it finds the files beside it, as when Python runs it."""
    spec = importlib.util.spec_from_file_location(f"{script.parent.name}_{script.stem}", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for the types of their fields
    sys.path.insert(0, str(script.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(script.parent))
    return module


def error_line(text: str) -> str:
    """The one line in which a command refused something, without its start `error: `."""
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, text
    assert "Traceback" not in text, text
    return lines[0].removeprefix("error: ")


def _main(module: str, words: list[str], folder: str, cwd: str, env: dict[str, str]) -> None:
    for number, name in ((1, "out"), (2, "err")):
        with open(Path(folder, name), "a") as file:
            os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = [module, *words]
    with contextlib.suppress(ImportError):
        import torch

        torch.set_num_threads(1)
    (load(ROOT / module) if module.endswith(".py") else importlib.import_module(module)).main(words)
