"""Helpers of many tests: commands in this and in other processes, tiny models and tiny data sets."""

import contextlib
import faulthandler
import importlib
import importlib.util
import io
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
DATA = os.environ.get("SKIPLESS_TEST_DATA")  # real images, see CONTRIBUTING.md

# Processes are forked from a server that has imported what commands need and has done nothing else: a process in which
# torch has computed a gradient cannot be forked.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload([
    "skipless.ssl.pretrain", "skipless.ssl.supervised", "skipless.ssl.distill", "skipless.eval.report", "faiss",
    "torch._dynamo", "torch.distributed.tensor", "torch.distributed.checkpoint", "torch.distributed.fsdp",
])  # fmt: skip


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


def call(main: Callable[[Sequence[str]], object], words: Sequence[object]) -> Done:
    """Run a command in this process, whose signal handlers stay what they were."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main(list(map(str, words)))
    except SystemExit as ending:
        status = int(ending.code or 0)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Done(status, out.getvalue(), err.getvalue())


def start(
    module: str,
    words: Sequence[object] = (),
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    session: bool = False,
) -> Running:
    """Start `main` of a module, as in start("skipless.ssl.pretrain", ["--out", folder]), or of a script of the
    repository, as in start("experiments/run.py"), in a process of its own; in a session of its own, so that it can be
    signaled together with its children, if that is said."""
    folder = tempfile.TemporaryDirectory()
    arguments = (module, list(map(str, words)), folder.name, str(cwd or os.getcwd()), dict(env or {}), session)
    for name in ("out", "err"):
        Path(folder.name, name).touch()
    process = _SERVER.Process(target=_main, args=arguments)
    process.start()
    return Running(process, folder)


def run(module: str, words: Sequence[object] = (), timeout: float = 240, **where: Any) -> Done:
    """Run `main` of a module to its end; see `start`."""
    return start(module, words, **where).wait(timeout)


def start_group(module: str, words: Sequence[object], processes: int = 2, **where: Any) -> list[Running]:
    """Start `main` of a module in several processes of one group, as torchrun would."""
    env = where.pop("env", {})
    return [start(module, words, env=member | env, **where) for member in _group(processes)]


def run_group(
    module: str, words: Sequence[object], processes: int = 2, succeed: bool = True, **where: Any
) -> list[Done]:
    """As `start_group`, and wait for their ends; all must `succeed`."""
    ended = [running.wait() for running in start_group(module, words, processes, **where)]
    if succeed and any(done.returncode for done in ended):
        said = (f"process {rank} ended with {done.returncode}:\n{done.stderr}" for rank, done in enumerate(ended))
        raise AssertionError("\n".join(said))
    return ended


@dataclass
class NullGPU:
    """A GPU that does nothing; see tests/nullgpu/build.py."""

    environment: dict[str, str]

    def run(
        self, commands: Mapping[str, Sequence[str]], folder: Path, processes: int = 1, timeout: float = 400
    ) -> list[dict[str, Any]]:
        """Run commands, as {name: [module, flag, ...]}, one after the other; in several processes of one group, each
        with a GPU, if so many are asked for.

        Returns:
            For each process {name: {"status": exit code, "printed": text, "kernels": launches, ...}}, with all that
            site/nullgpu.py counts. A wait for the device within a step of training ends a command with status 1.
        """
        given = folder / f"{'-'.join(commands)}.json"
        given.write_text(json.dumps(dict(commands)))
        done = [given.with_suffix(f".{rank}.json") for rank in range(processes)]
        self.run_script(Path(__file__).parent / "nullgpu/site/commands.py", processes, timeout, [given], done)
        return [json.loads(path.read_text()) for path in done]

    def run_script(
        self, script: Path, processes: int, timeout: float, words: Sequence[object], own: Sequence[object]
    ) -> None:
        """Run a script to its end, with words for all processes and one of their own for each."""
        env = os.environ | self.environment | {"NULL_GPUS": str(processes), "OMP_NUM_THREADS": "1"}
        groups = _group(processes) if processes > 1 else [{}]
        command = [sys.executable, "-P", str(script), *map(str, words)]
        running = [
            subprocess.Popen([*command, str(last)], env=env | more, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            for last, more in zip(own, groups, strict=True)
        ]
        for process in running:
            try:
                printed, _ = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                for each in running:
                    each.kill()
                raise
            assert process.returncode == 0, f"{process.returncode}: {printed.decode()}"


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


def write_archive(
    path: Path, members: Mapping[str, bytes | tarfile.TarInfo], method: int = zipfile.ZIP_DEFLATED
) -> Path:
    """A .zip, or a tar that is compressed or not, as its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, content in members.items():
                archive.writestr(name, content)  # type: ignore[arg-type]
        return path
    with tarfile.open(path, "w:gz" if path.suffix in (".tgz", ".gz") else "w") as tar:
        for name, content in members.items():
            entry = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo()
            data = b"" if isinstance(content, tarfile.TarInfo) else content
            entry.name, entry.size = name, len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


@contextlib.contextmanager
def serving(handler: Callable[..., BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a web server of this machine, which answers through `handler`."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def logged(folder: Path, name: str) -> list[Any]:
    """All values of a metric in a run's metrics.jsonl."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [entry[name] for entry in map(json.loads, lines) if name in entry]


def error_line(text: str) -> str:
    """The one line in which a command refused something, without its start `error: `."""
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, text
    assert "Traceback" not in text, text
    return lines[0].removeprefix("error: ")


def refusal(main: Callable[[list[str]], None], words: Sequence[object], capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence with which a command refuses, in this process; before it there may be progress bars."""
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, words)))
    assert ended.value.code == 2
    return error_line(capsys.readouterr().err)


@dataclass
class Evaluation:
    """An evaluation's module and the words that it always gets; of words that are added, the last win."""

    module: Any
    words: list[str]
    request: pytest.FixtureRequest

    def line(self, *more: object) -> list[str]:
        """All words."""
        return [*self.words, *map(str, more)]

    @property
    def task(self) -> str:
        """Its name."""
        return str(self.module.__name__).rpartition(".")[2]

    def run(self, *more: object) -> None:
        """As a user runs it."""
        self.module.main(self.line(*more))

    def written(self, out: Path, *more: object) -> dict[str, Any]:
        """The result, from its file; without anything that JSON lacks."""

        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is not JSON")

        self.run("--out", out, *more)
        result: dict[str, Any] = json.loads((out / f"{self.task}.json").read_text(), parse_constant=refuse)
        return result

    def measure(self, *more: object) -> dict[str, Any]:
        """The result."""
        from skipless.common import cli

        recipe = getattr(self.module, "recipe", None)
        result: dict[str, Any] = self.module.evaluate(cli.parse(self.module.Settings, self.line(*more), recipe=recipe))
        return result

    def refused(self, *more: object) -> str:
        """The sentence with which it refuses."""
        return refusal(self.module.main, self.line(*more), self.request.getfixturevalue("capsys"))


def tiny_vit(dim: int = 24, depth: int = 2, image_size: int = 32, **options: Any) -> Any:
    """A random VisionTransformer, always the same: patches of 8 pixels, heads of 12 or 64 channels."""
    import torch

    from skipless.ssl.model.vit import VisionTransformer

    torch.manual_seed(0)
    heads = dim // 64 if dim % 64 == 0 else dim // 12
    return VisionTransformer(dim, depth, heads, patch=8, image_size=image_size, **options)


def sines(dim: int, side: int) -> Any:
    """MoCo v3's positions [1, 1 + side * side, D], fixed: four quarters of sin and cos of the row and of the column, at
    frequencies 10000^-(i / (D / 4)); CLS has zeros."""
    import torch

    places = torch.arange(side * side)
    frequencies = 10000.0 ** -(torch.arange(dim // 4) / (dim // 4))
    angles = [axis[:, None] * frequencies for axis in (places // side, places % side)]
    quarters = torch.cat([f(x) for x in angles for f in (torch.sin, torch.cos)], dim=1)
    return torch.cat([torch.zeros(1, dim), quarters])[None]


def make_objective(**settings: Any) -> Any:
    """The objective of such settings, for a `tiny_vit`, two local crops and four steps an epoch, on the CPU."""
    import torch

    from skipless.ssl.config import DataSettings, Settings
    from skipless.ssl.data.crops import Crops
    from skipless.ssl.objectives.objective import Objective

    cfg = Settings(out="", data=DataSettings(""), crops=Crops(local_crops_number=2), **settings)
    return Objective(cfg, tiny_vit(), 4, torch.device("cpu"))


def tiny_backbone() -> Any:
    """The `Backbone` of a `tiny_vit`."""
    from skipless.eval.backbones import Backbone

    model = tiny_vit(attention="sdpa")
    return Backbone(model.eval().requires_grad_(False), "tiny", "skipless", "0")


def make_context(backbone: Any, choices: Sequence[tuple[int, ...]], out: Path | None = None, **changes: Any) -> Any:
    """What `prepare` gives an evaluation, on the CPU."""
    import torch

    from skipless.eval.evaluation import Context

    context = {"task": "test", "device": torch.device("cpu"), "batch_size": 16, "workers": 0, "cache": Path("cache")}
    context |= {"recorded": {"seed": 0, "every_block": False, "blocks": "last"}, "began": 0.0, **changes}
    return Context(backbone=backbone, choices=list(choices), out=out, **context)


# Red, green and blue: every class is a color, which any network tells apart.
COLORS = np.array([(30, 30, 200), (210, 40, 40), (40, 200, 60)], np.uint8)


def write_voc(root: Path, splits: Mapping[str, int], blocks: tuple[int, int] = (4, 5), void: bool = True) -> Path:
    """PASCAL VOC's layout: pictures of blocks of 16 pixels in three colors, each a class, and a column of void."""
    folder = root / "VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, count in splits.items():
        names = [f"{split}{index:02}" for index in range(count)]
        for name in names:
            labels = np.kron(rng.integers(0, 3, blocks), np.ones((16, 16))).astype(np.uint8)
            Image.fromarray(COLORS[labels]).save(folder / f"JPEGImages/{name}.jpg", quality=95, subsampling=0)
            if void:
                labels[:, 5] = 255
            Image.fromarray(labels).save(folder / f"SegmentationClass/{name}.png")
        (folder / f"ImageSets/Segmentation/{split}.txt").write_text("".join(f"{name}\n" for name in names))
    return root


def few_of_voc(root: Path, splits: Mapping[str, int]) -> Path:
    """So many real photographs of each split of PASCAL VOC 2012, in the layout of its authors; needs `DATA`."""
    source, folder = Path(DATA or "", "VOCdevkit/VOC2012"), root / "VOC2012"
    (folder / "ImageSets/Segmentation").mkdir(parents=True)
    for name in ("JPEGImages", "SegmentationClass"):
        (folder / name).symlink_to((source / name).resolve())
    for split, count in splits.items():
        names = (source / f"ImageSets/Segmentation/{split}.txt").read_text().split()
        (folder / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names[:count]) + "\n")
    return root


def color_pictures(count: int, seed: int) -> np.ndarray:
    """uint8 [N, 20, 28, 3], noise around the color of the class i modulo 3."""
    noise = np.random.default_rng(seed).normal(0, 60, (count, 20, 28, 3))
    colors = np.array([(190, 90, 90), (90, 190, 90), (90, 90, 190)])[np.arange(count) % 3]
    return np.clip(colors[:, None, None] + noise, 0, 255).astype(np.uint8)


def photo(height: int = 90, width: int = 120, seed: int = 0) -> np.ndarray:
    """An image with colors of every kind, from smooth to noisy: uint8 [H, W, 3]."""
    import cv2

    rng = np.random.default_rng(seed)
    layers = [
        cv2.resize(rng.integers(0, 256, (side, side, 3), dtype=np.uint8), (width, height)).astype(np.float32)
        for side in (3, 9, 40)
    ]
    mixed = layers[0] * 0.6 + layers[1] * 0.3 + layers[2] * 0.3
    return cv2.normalize(mixed, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)


def _group(processes: int) -> list[dict[str, str]]:
    """What torchrun would tell each process of a group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    return [env | {"MASTER_PORT": port, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(processes)]


def _main(module: str, words: list[str], folder: str, cwd: str, env: dict[str, str], session: bool) -> None:
    if session:
        os.setsid()
    for number, name in ((1, "out"), (2, "err")):
        with open(Path(folder, name), "a") as file:
            os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))
    faulthandler.enable()  # what kills a process says where it was
    for number in (signal.SIGINT, signal.SIGHUP):  # which tests in the background would make it ignore
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    multiprocessing.set_start_method(None, force=True)  # for loader workers, as in any other process
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = [module, *words]
    with contextlib.suppress(ImportError):
        import torch

        torch.set_num_threads(1)
    (load(ROOT / module) if module.endswith(".py") else importlib.import_module(module)).main(words)
