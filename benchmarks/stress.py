"""Everything that can happen to a command, done to miniatures on purpose: what was tried, how often, what was lost.

    python benchmarks/stress.py --out results/analysis/stress      # `make stress`: at most 25 minutes on two cores
    python benchmarks/stress.py --kinds kills bits --share 0.1     # a tenth of two of them

A training run that is killed, signaled, or meets a full disk is resumed, until it ends; its weights, its optimizer's
state and its losses must then be those of an uninterrupted run, to the last bit. An evaluation that is killed is
repeated: the same result. A checkpoint with a flipped bit, a hostile file and settings that nobody means are refused in
a sentence. docs/reliability.md says what is promised.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from faults import Fault, Running, difference, group, left_behind, measured, small_disk, trained
from hostile import HOSTILE
from measuring import markdown, publish
from miniatures import command_lines, write_data

from skipless.__main__ import COMMANDS
from skipless.common import cli

HERE = Path(__file__).resolve().parent
TRAININGS = {
    "adamw": ("pretrain", ["--optimizer.name=adamw"]),
    "soap": ("pretrain", ["--optimizer.name=soap", "--optimizer.precondition_every=3"]),
    "muon, iBOT, a loader process": ("pretrain", ["--optimizer.name=muon", "--ibot.loss_weight=1", "--data.workers=1"]),
    "supervised": ("supervised", []),
    "distillation": ("distill", []),
}
GROUPS = {"two processes": [], "two processes, sharded": ["--shard=true"]}
REPEATED = ("segmentation", "discovery", "retrieval", "clustering", "knn", "linear", "export", "shard", "scenes")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


@dataclass
class Settings:
    """A campaign of faults."""

    kinds: tuple[str, ...] = ()
    """Which; by default all: kills, hostile, torchrun, twice, bits, commands, disk, limit, signals, groups and
    settings."""
    share: float = 1.0
    """Of the tries."""
    minutes: float = 25
    """After so many no further try is begun; what a kind has left of its share goes to those after it."""
    seed: int = 0
    """Of the moments and places."""
    out: Path | None = None
    """Where to write OUT.json and OUT.md; by default nowhere."""


@dataclass
class Training:
    """A run on miniatures, and what it computes without a fault."""

    name: str
    module: str
    words: list[str]
    processes: int = 1
    lock: threading.Lock = field(default_factory=threading.Lock)
    wanted: dict[str, str] | None = None
    folder: Path = Path()
    seconds: float = 0.0
    changes: int = 0

    def start(self, out: Path, fault: Fault | None = None) -> list[Running]:
        """Begin it, or go on, in one process or several."""
        words = [*self.words, f"--out={out}", "--resume"]
        if self.processes > 1:
            return group(self.module, words, out, self.processes)
        return [Running(self.module, words, out, fault)]

    def undisturbed(self, work: Path) -> None:
        """Run it once from its start to its end."""
        with self.lock:
            if self.wanted is not None:
                return
            self.folder = work / f"reference {self.name}"
            count = self.folder.with_suffix(".changes")
            began = time.monotonic()
            for ended in [running.end() for running in self.start(self.folder, Fault(count=count))]:
                if ended.code:
                    raise ValueError(f"{self.name} fails without any fault: {ended.said}")
            self.seconds, self.wanted = time.monotonic() - began, trained(self.folder)
            self.changes = int(count.read_text()) if count.exists() else 0

    def to_its_end(self, out: Path) -> str:
        """Resume it without a fault. Returns what was lost."""
        for ended in [running.end() for running in self.start(out)]:
            if wrong := ended.wrong or (f"exit {ended.code}: {ended.said[-300:]}" if ended.code else ""):
                return f"{self.name}, resumed: {wrong}"
        assert self.wanted is not None
        lost = difference(self.wanted, trained(out)) or left_behind(out)
        return f"{self.name}: {lost}" if lost else ""


Try = Callable[[Path, random.Random], tuple[int, str]]
"""A try in a folder of its own: how many faults it has met, and what was lost."""


def kill(training: Training, work: Path, rng: random.Random) -> tuple[int, str]:
    """Kill a run up to four times, at any moment or at a change of a file, and resume it."""
    training.undisturbed(work.parent)
    out, kills = work / "run", 0
    for _ in range(4):
        at_change = training.processes == 1 and rng.random() < 0.5
        running = training.start(out, Fault(kill_at=rng.randint(1, training.changes)) if at_change else None)
        if not at_change:
            rng.choice(running).signal_after(rng.uniform(0, training.seconds), signal.SIGKILL)
            for process in running if len(running) > 1 else ():  # as torchrun asks the others to end
                process.signal_after(5, signal.SIGTERM)
        ended = [process.end() for process in running]
        kills += any(each.code == -signal.SIGKILL for each in ended)
        if wrong := [each for each in ended if each.code is None]:
            return kills, f"{training.name}: a process goes on for minutes after another was killed: {wrong[0].said}"
        if all(each.code == 0 for each in ended):
            break
    return kills, training.to_its_end(out)


def ask_to_end(training: Training, work: Path, rng: random.Random) -> tuple[int, str]:
    """Send a run one of the signals of schedulers and terminals, and resume it."""
    training.undisturbed(work.parent)
    out, number = work / "run", rng.choice(SIGNALS)
    (running,) = training.start(out)
    running.signal_after(rng.uniform(0.2, 1) * training.seconds, number)
    ended = running.end()
    if ended.wrong or ended.code not in (0, 128 + number, -number):
        return 1, f"{training.name}, {number.name}: {ended.wrong or f'exit {ended.code}: {ended.said[-300:]}'}"
    begun = (out / "settings.yaml").exists()
    said = [line for line in ended.said.splitlines() if line.startswith("interrupted")]
    if not begun and (out.exists() or (number == signal.SIGINT and len(said) != 1)):
        return 1, f"{training.name}, {number.name} before it began: {ended.said[-300:] or 'a folder'}"
    if begun and ended.code and not list((out / "checkpoints").glob("step-*")):
        return 1, f"{training.name}, {number.name}: no checkpoint"
    return int(ended.code != 0), training.to_its_end(out)


def start_twice(training: Training, work: Path, rng: random.Random) -> tuple[int, str]:
    """Start a run while it is at work: one of the two is refused."""
    training.undisturbed(work.parent)
    out = work / "run"
    first = training.start(out)
    first[0].signal_after(rng.uniform(0, training.seconds / 2), 0)
    ended = [process.end() for process in [*first, *training.start(out)]]
    if wrong := [each.wrong or each.said[-300:] for each in ended if each.wrong or each.code not in (0, 2)]:
        return 1, f"{training.name}, twice: {wrong[0]}"
    return 1, training.to_its_end(out)


def limit_files(training: Training, work: Path, rng: random.Random) -> tuple[int, str]:
    """Let a run write no file beyond a size, and resume it without."""
    training.undisturbed(work.parent)
    out = work / "run"
    largest = max(path.stat().st_size for path in training.folder.rglob("*") if path.is_file())
    (running,) = training.start(out, Fault(largest_file=int(rng.uniform(8_000, 1.1 * largest))))
    ended = running.end()
    if wrong := ended.wrong or (f"exit {ended.code}: {ended.said[-300:]}" if ended.code not in (0, 2) else ""):
        return 1, f"{training.name}, ulimit -f: {wrong}"
    return int(ended.code != 0), training.to_its_end(out)


def fill_disk(training: Training, work: Path, rng: random.Random) -> tuple[int, str]:
    """Let a run's disk fill up, or have no place for another file, and resume what is left on another."""
    training.undisturbed(work.parent)
    sizes = [path.stat().st_size for path in training.folder.rglob("*") if path.is_file()]
    kilobytes, files = int(rng.uniform(50, sum(sizes) // 1000)), 0
    if rng.random() < 0.4:
        kilobytes, files = 10**6, rng.randint(2, len(sizes) + 4)  # the disk's root is one, too
    with small_disk(work / "disk", kilobytes, files) as disk:
        (running,) = training.start(disk / "run")
        ended = running.end()
        if (disk / "run").exists():
            shutil.copytree(disk / "run", work / "run", symlinks=True)
    if wrong := ended.wrong or (f"exit {ended.code}: {ended.said[-300:]}" if ended.code not in (0, 2) else ""):
        return 1, f"{training.name}, full disk: {wrong}"
    return int(ended.code != 0), training.to_its_end(work / "run")


def flip_bit(training: Training, work: Path, rng: random.Random) -> tuple[int, str]:
    """Flip one bit of the checkpoint that a run goes on from: it is refused, or was of no meaning."""
    training.undisturbed(work.parent)
    out = shutil.copytree(training.folder, work / "run", symlinks=True)
    older, newest = sorted((out / "checkpoints").glob("step-*.pt"), key=lambda path: int(path.stem[5:]))
    for path in (out / "backbone.json", out / "backbone.safetensors", newest, out / "checkpoints" / "last.pt"):
        path.unlink()
    (out / "checkpoints" / "last.pt").symlink_to(older.name)
    content = bytearray(older.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    older.write_bytes(content)
    (running,) = training.start(out)
    ended = running.end()
    if ended.wrong or ended.code not in (0, 2):
        return 1, f"{training.name}, a flipped bit: {ended.wrong or f'exit {ended.code}: {ended.said[-300:]}'}"
    return 1, training.to_its_end(out) if ended.code == 0 else ""


def repeat(name: str, lines: dict[str, list[str]], work: Path, rng: random.Random) -> tuple[int, str]:
    """Kill an evaluation or a data set's command, and give it once more."""
    module = f"skipless.{COMMANDS[name][0]}"
    here = str(Path(lines[name][-1].partition("=")[2] or lines[name][1]).parent)
    results: list[dict[str, str]] = []
    changes, seconds, kills = 0, 0.0, 0
    for folder in ("undisturbed", "killed"):
        out = work / folder
        out.mkdir()
        words = [word.replace(here, str(out)) for word in lines[name]]
        if folder == "killed":
            at_change = rng.random() < 0.7 and changes > 1
            running = Running(module, words, out, Fault(kill_at=rng.randint(1, changes)) if at_change else None)
            running.signal_after(120 if at_change else rng.uniform(0, seconds), signal.SIGKILL)
            kills = int(running.end().code == -signal.SIGKILL)
            if not kills:  # it had ended before
                return 0, ""
        began = time.monotonic()
        ended = Running(module, words, out, Fault(count=work / "changes")).end()
        changes, seconds = int((work / "changes").read_text()), time.monotonic() - began
        if ended.code and "is there already" not in ended.said:  # killed behind its last change
            return kills, f"{name}: {ended.wrong or ended.said[-300:]}"
        results.append({path: digest for path, digest in measured(out).items() if not path.startswith((".", "cache"))})
    left = [path.name for path in out.rglob(".*.unfinished-*")]
    lost = difference(*results) or (f"left behind: {', '.join(left)}" if left else "")
    return kills, f"{name}: {lost}" if lost else ""


def kill_torchrun(training: Training, work: Path, rng: random.Random) -> tuple[int, str]:
    """Kill torchrun itself: its ranks end, and the job that is sent again finds the run."""
    training.undisturbed(work.parent)
    out = work / "run"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(HERE.parent / "ssl/pretrain.py")]
    command = [sys.executable, *launch, *training.words, f"--out={out}", "--resume", "--epochs=400"]
    with open(work / "log", "w+") as log:
        agent = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
        until = time.monotonic() + 120
        while not (out / "checkpoints").exists() and agent.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        time.sleep(rng.uniform(0, 2))
        ranks = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        agent.kill()
        agent.wait()
        until = time.monotonic() + 90
        while (alive := [rank for rank in ranks if Path(f"/proc/{rank}").exists()]) and time.monotonic() < until:
            time.sleep(0.2)
        for rank in alive:
            os.kill(int(rank), signal.SIGKILL)
        if alive or not ranks:
            log.seek(0)
            return 1, f"torchrun: {len(alive)} of its {len(ranks)} ranks go on after it was killed: {log.read()[-300:]}"
    before = len((out / "metrics.jsonl").read_text().splitlines())
    resumed = training.start(out)  # whose settings are others: refused, with the step that it would go on from
    said = "".join([process.end().said for process in resumed])
    return 1, "" if before and "other settings" in said else f"torchrun: its run is not found again: {said[-300:]}"


def open_hostile(name: str, lines: dict[str, list[str]], data: Path, work: Path, _: random.Random) -> tuple[int, str]:
    """Give a command what somebody made to harm it."""
    command, words = HOSTILE[name](work, data, lines)
    out = work / "out"
    ended = Running(f"skipless.{COMMANDS[command][0]}", [*words, f"--out={out}"], out).end()
    if ended.wrong or ended.code not in (0, 2):
        return 1, f"{name}: {ended.wrong or f'exit {ended.code}: {ended.said[-300:]}'}"
    return 1, f"{name}: code in a file was run" if (work / "harm").exists() else ""


def fuzz_settings(draws: int, work: Path, rng: random.Random) -> tuple[int, str]:
    """Give every command settings that nobody means."""
    words = [f"--draws={draws}", f"--seed={rng.randrange(10**6)}", f"--out={work / 'fuzzing'}"]
    command = [sys.executable, str(HERE / "fuzzing.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if not (work / "fuzzing.json").exists():
        return 0, f"settings: {done.stderr[-500:]}"
    found = json.loads((work / "fuzzing.json").read_text())
    return draws, " ".join(found["findings"])


def campaign(settings: Settings, data: Path) -> dict[str, list[Try]]:
    """All tries, by their kind."""
    lines = command_lines(data, data / "out")
    longer = {"--epochs=2": "--epochs=4"}

    def training(name: str, command: str, more: list[str], processes: int = 1) -> Training:
        words = [longer.get(word, word) for word in lines[command] if not word.startswith("--out=")]
        return Training(name, f"skipless.{COMMANDS[command][0]}", [*words, *more], processes)

    def times(count: float) -> int:
        return max(1, round(count * settings.share))

    def spread(action: Callable[..., tuple[int, str]], over: list[Training], count: int) -> list[Try]:
        return [partial(action, over[number % len(over)]) for number in range(times(count))]

    alone = [training(name, command, more) for name, (command, more) in TRAININGS.items()]
    together = [training(name, "pretrain", more, 2) for name, more in GROUPS.items()]
    repeated = [REPEATED[number % len(REPEATED)] for number in range(times(3 * len(REPEATED)))]
    kinds: dict[str, list[Try]] = {
        "kills": spread(kill, alone, 60),
        "hostile": [partial(open_hostile, name, lines, data) for name in list(HOSTILE)[: times(len(HOSTILE))]],
        "torchrun": spread(kill_torchrun, together, 2),
        "twice": spread(start_twice, alone, 5),
        "bits": spread(flip_bit, alone, 30),
        "commands": [partial(repeat, name, lines) for name in repeated],
        "disk": spread(fill_disk, alone, 15),
        "limit": spread(limit_files, alone, 15),
        "signals": spread(ask_to_end, alone, 30),
        "groups": spread(kill, together, 8),
        "settings": [partial(fuzz_settings, times(2500))] * 2,
    }
    unknown = [name for name in settings.kinds if name not in kinds]
    if unknown:
        raise ValueError(f"there is no kind {unknown[0]}; the kinds are {', '.join(kinds)}")
    return {name: tries for name, tries in kinds.items() if not settings.kinds or name in settings.kinds}


def attempt(tries: list[Try], number: int, work: Path, seed: str, until: float) -> tuple[int, str]:
    """One of the tries, in a folder of its own, unless the time for it is over."""
    if time.monotonic() > until:
        return 0, ""
    work.mkdir()
    try:
        return tries[number](work, random.Random(seed))
    except OSError as error:
        return 0, "" if "needs root" in str(error) else f"{work.name}: {error}"
    finally:
        shutil.rmtree(work, ignore_errors=True)


def stress(settings: Settings) -> None:
    """Try everything, print a table and write it. Raises ValueError where anything was lost."""
    began = time.monotonic()
    rows: list[dict[str, object]] = []
    lost: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_data(root)
        kinds = campaign(settings, root)
        for place, (kind, tries) in enumerate(kinds.items()):
            started = time.monotonic()
            share = 1 if place else 4  # most of the time for kills
            until = started + (60 * settings.minutes - started + began) * share / (len(kinds) - place + share - 1)
            with ThreadPoolExecutor(2) as pool:
                ends = [
                    pool.submit(
                        attempt, tries, number, root / f"{kind}-{number}", f"{settings.seed}{kind}{number}", until
                    )
                    for number in range(len(tries))
                ]
                done = [end.result() for end in ends]
            found = [what for _, what in done if what]
            lost += found
            tried = sum(count for count, _ in done)
            rows.append({"what": kind, "tried": tried, "lost": len(found), "seconds": time.monotonic() - started})
            print(*found, f"{kind}: {tried} tried, {len(found)} lost", sep="\n", file=sys.stderr, flush=True)
    minutes = (time.monotonic() - began) / 60
    table = [*markdown(rows), "", f"{minutes:.1f} minutes; seed {settings.seed}; {{hardware}}.", *lost]
    result = {"task": "stress", "seed": settings.seed, "minutes": minutes, "details": rows, "lost": lost}
    publish(settings.out, result, table, "cpu")
    if lost:
        raise ValueError(f"{len(lost)} tries lost something; they are named above")


main = partial(cli.run, stress, Settings, __doc__)

if __name__ == "__main__":
    main()
