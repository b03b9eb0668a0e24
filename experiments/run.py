"""Run an experiment: many trainings that differ in a flag or two, their learning rates, seeds, table and curves.

    python experiments/run.py experiments/dino_two_cores.yaml --data imagenette128 --hours 3
    python experiments/run.py experiments/dino_two_cores.yaml --data imagenette128 --list

An experiment is a file: a command, its arms (more flags), the learning rates that each arm may choose from, and seeds.
Every arm first runs with each learning rate and the first seed; the one with the best metric is then repeated with the
other seeds. Runs are done one after the other, round the arms, and each in runs/EXPERIMENT/ARM-lrRATE-seedSEED. The
same command goes on where it was stopped, by --hours, Ctrl-C or a crash of the machine, in the middle of a run too.
After every run EXPERIMENT.json, .md and .svg are written anew, from the logs of all there are, in results/pretraining/
or results/supervised/, after the command that the experiment runs. A run that failed or collapsed stays in the table,
and says so; delete its folder to try it again.
"""

import json
import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from tables import best, draw, learning_rates, table

from skipless.common import cli
from skipless.common.files import write_result, write_text
from skipless.common.provenance import provenance
from skipless.ssl.model.statistics import DEAD

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Settings:
    """The command line."""

    experiment: Path
    """Its file."""
    data: str = ""
    """What {data} in its command stands for."""
    hours: float = math.inf
    """Stop after so much time; a run is interrupted."""
    runs: Path = Path("runs")
    """Folder of the runs."""
    out: Path | None = None
    """Folder of the results, by default results/pretraining or results/supervised."""
    list: bool = False
    """Say what is done and what is next, and run nothing."""


@dataclass(frozen=True)
class Experiment:
    """The content of an experiment's file."""

    name: str
    """Its file's name."""
    command: list[str]
    """Script and flags of all runs; {data} stands for --data."""
    arms: dict[str, list[str]]
    """More flags, by arm."""
    learning_rates: list[float] | dict[str, list[float]]
    """Those to choose from, by arm or for all."""
    seeds: list[int]
    metric: str
    """Name in metrics.jsonl of the figure that learning rates are chosen by, higher being better: a number, or a list
    over the blocks, whose best counts."""

    def rates(self, arm: str) -> list[float]:
        """Learning rates of an arm."""
        return learning_rates(asdict(self), arm)


@dataclass(frozen=True)
class Run:
    """One training."""

    arm: str
    lr: float
    seed: int
    folder: Path

    @property
    def done(self) -> bool:
        """Whether it ended, well or not."""
        return (self.folder / "backbone.json").exists() or self.failed is not None

    @property
    def failed(self) -> str | None:
        """Why it failed; None where it did not."""
        path = self.folder / "failed.txt"
        return path.read_text().strip() if path.exists() else None

    def entries(self, metric: str) -> list[dict[str, Any]]:
        """Lines of its log that hold a metric."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [entry for entry in map(json.loads, lines) if metric in entry]

    def value(self, metric: str) -> float:
        """The metric at the end, of the best block; minus infinity where there is none."""
        entries = self.entries(metric)
        return best(entries[-1][metric]) if entries and self.failed is None else -math.inf

    def status(self, last: dict[str, Any]) -> str:
        """done, running, failed (why), or done with a collapse named; `last` is the last line of its log."""
        if self.failed is not None:
            return f"failed ({self.failed})"
        if not self.done:
            return "running"
        if last.get("monitor/mean_share", [0.0])[-1] > DEAD:
            return "done, last block dead"
        return "done"


def read_experiment(path: Path) -> Experiment:
    """Raises ValueError, naming the field, where the file is no experiment."""
    try:
        content = yaml.safe_load(path.read_text())
        known = [field.name for field in fields(Experiment)][1:]
        if not isinstance(content, dict) or set(content) != set(known):
            raise TypeError(f"its fields have to be {', '.join(known)}")
        experiment = Experiment(path.stem, **content)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such experiment") from None
    except (TypeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is no experiment: {' '.join(str(error).split())}") from None
    if not experiment.seeds or not experiment.arms:
        raise ValueError(f"{path}: seeds and arms must name one or more")
    if len({folder_name(arm) for arm in experiment.arms}) < len(experiment.arms):
        raise ValueError(f"{path}: arms: two of their names would give one folder")
    for arm in experiment.arms:
        if not experiment.rates(arm) or not all(isinstance(lr, float) for lr in experiment.rates(arm)):
            raise ValueError(f"{path}: learning_rates must be numbers with a point, as in 1.0e-3")
    return experiment


def one_run(runs: Path, arm: str, lr: float, seed: int) -> Run:
    """A run with its folder."""
    return Run(arm, lr, seed, runs / f"{folder_name(arm)}-lr{lr:g}-seed{seed}")


def folder_name(arm: str) -> str:
    """An arm's name as a part of a folder's."""
    return re.sub(r"[^\w.]+", "-", arm)


def all_runs(experiment: Experiment, runs: Path) -> list[Run]:
    """Every run that there could be, in one order."""
    return [
        one_run(runs, arm, lr, seed)
        for seed in experiment.seeds
        for arm in experiment.arms
        for lr in experiment.rates(arm)
    ]


def pending(experiment: Experiment, runs: Path) -> Iterator[Run]:
    """Runs in the order in which they are done: learning rates first, then seeds at the best of them."""
    first, *others = experiment.seeds
    for position in range(max(len(experiment.rates(arm)) for arm in experiment.arms)):
        for arm in experiment.arms:
            for lr in experiment.rates(arm)[position : position + 1]:
                yield one_run(runs, arm, lr, first)
    for seed in others:
        for arm in experiment.arms:
            swept = [one_run(runs, arm, lr, first) for lr in experiment.rates(arm)]
            chosen = max(swept, key=lambda one: one.value(experiment.metric))
            yield one_run(runs, arm, chosen.lr, seed)


def command_line(experiment: Experiment, run: Run, data: str) -> list[str]:
    """The script and all flags of a run but for its folder."""
    words = [word.replace("{data}", data) for word in [*experiment.command, *experiment.arms[run.arm]]]
    return [*words, f"--optimizer.lr={run.lr}", f"--seed={run.seed}"]


def check_same(run: Run, words: list[str]) -> None:
    """Raises ValueError where a run's folder was made by other flags or data."""
    file = run.folder / "command.json"
    if file.exists() and json.loads(file.read_text()) != words:
        raise ValueError(f"{run.folder} was made by other flags or data: delete it, or rename the experiment")


def train(run: Run, words: list[str], deadline: float) -> bool:
    """Train, or go on training; whether it ended. What fails leaves failed.txt, what is out of time its checkpoint."""
    run.folder.mkdir(parents=True, exist_ok=True)
    write_text(run.folder / "command.json", json.dumps(words))
    with open(run.folder / "output.txt", "a") as output:
        # In a session of its own: Ctrl-C reaches it as our SIGTERM, on which it saves a checkpoint.
        process = subprocess.Popen(
            [sys.executable, *words, f"--out={run.folder}", "--resume"],
            cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(max(1.0, deadline - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as why:
            process.terminate()
            process.wait()
            if isinstance(why, KeyboardInterrupt):
                raise
            return False
    if code or not (run.folder / "backbone.json").exists():
        lines = (run.folder / "output.txt").read_text().strip().splitlines()
        write_text(run.folder / "failed.txt", f"exit code {code}: {lines[-1] if lines else 'no output'}\n")
    return True


def collect(experiment: Experiment, runs: list[Run], out: Path) -> str:
    """Write the results of all runs there are: for machines, as a table (which is returned), as curves. Where none has
    any, older results stay."""
    rows = []
    for run in runs:
        entries = run.entries(experiment.metric)
        if not entries and run.failed is None:
            continue
        last = entries[-1] if entries else {}
        rows.append(
            {
                "arm": run.arm,
                "lr": run.lr,
                "seed": run.seed,
                "status": run.status(last),
                "value": best(last[experiment.metric]) if last else None,
                "last": last,
                "start": entries[0] if entries else {},
                "curve": [{"epoch": e.get("epoch"), "value": best(e[experiment.metric])} for e in entries],
            }
        )
    commits = {
        json.loads((run.folder / "backbone.json").read_text()).get("commit")
        for run in runs
        if run.done and run.failed is None
    }
    result = {
        "task": "experiment",
        "protocol": experiment.name,
        "metric": experiment.metric,
        "settings": {name: getattr(experiment, name) for name in ("command", "arms", "learning_rates")},
        "seeds": experiment.seeds,
        "runs": rows,
        "commits_of_runs": sorted(str(commit) for commit in commits),
        **provenance("cpu"),
    }
    text = table(result)
    if any(row["value"] is not None for row in rows) or not (out / f"{experiment.name}.json").exists():
        write_result(out / experiment.name, result, text)
        draw(result, out / f"{experiment.name}.svg")
    return text


def drive(settings: Settings) -> None:
    """Do what is to do, as far as time allows."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's; Ctrl-C is the same
    experiment = read_experiment(settings.experiment)
    folder = (settings.runs / experiment.name).resolve()
    if settings.list:
        for run in pending(experiment, folder):
            print(f"{run.folder.name}: {run.status({}) if run.folder.exists() else 'to do'}")
        return
    if any("{data}" in word for word in experiment.command) and not (settings.data and Path(settings.data).is_dir()):
        reason = f"{settings.data} is no folder" if settings.data else "this experiment needs images"
        raise ValueError(f"{reason}: give the folder that has train and val as --data")
    subject = "supervised" if Path(experiment.command[0]).stem == "supervised" else "pretraining"
    out = settings.out or ROOT / "results" / subject
    deadline = time.monotonic() + 3600 * settings.hours
    everything = all_runs(experiment, folder)
    for run in pending(experiment, folder):
        words = command_line(experiment, run, settings.data)
        check_same(run, words)
        if run.done:
            continue
        if time.monotonic() >= deadline:
            break
        print(f"{time.strftime('%H:%M')} {run.folder.name}", flush=True)
        ended = train(run, words, deadline)
        collect(experiment, everything, out)
        if not ended:
            break
    print(collect(experiment, everything, out))
    failed = [run for run in everything if run.failed is not None]
    for run in failed:
        print(f"{run.folder} failed: {run.failed} (delete the folder to try again)", file=sys.stderr)
    if failed and not any(run.done and run.failed is None for run in everything):
        sys.exit(1)


main = partial(cli.run, drive, Settings, __doc__, positional=True)

if __name__ == "__main__":
    main()
