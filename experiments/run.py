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

import argparse
import json
import math
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import matplotlib
import yaml

from skipless.common.files import write_result, write_text
from skipless.common.provenance import provenance
from skipless.ssl.model.statistics import DEAD

matplotlib.use("Agg")
import matplotlib.pyplot as plt

matplotlib.rcParams["svg.hashsalt"] = "skipless"

ROOT = Path(__file__).resolve().parent.parent


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
        return self.learning_rates[arm] if isinstance(self.learning_rates, dict) else self.learning_rates


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
        found = self.entries(metric)
        return best(found[-1][metric]) if found and self.failed is None else -math.inf


def best(value: Any) -> float:
    """A number, or the largest of a list of them."""
    return max(value) if isinstance(value, list) else float(value)


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


def check_data(data: str) -> None:
    """Raises ValueError where --data is missing or no folder."""
    if not data or not Path(data).is_dir():
        said = f"{data} is no folder" if data else "this experiment needs images"
        raise ValueError(f"{said}: give the folder that has train and val as --data")


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


def words_of(experiment: Experiment, run: Run, data: str) -> list[str]:
    """The script and all flags of a run but for its folder."""
    words = [word.replace("{data}", data) for word in [*experiment.command, *experiment.arms[run.arm]]]
    return [*words, f"--optimizer.lr={run.lr}", f"--seed={run.seed}"]


def check_same(run: Run, words: list[str]) -> None:
    """Raises ValueError where a run's folder was made by other flags or data."""
    said = run.folder / "command.json"
    if said.exists() and json.loads(said.read_text()) != words:
        raise ValueError(f"{run.folder} was made by other flags or data: delete it, or rename the experiment")


def train(experiment: Experiment, run: Run, data: str, deadline: float) -> bool:
    """Train, or go on training; whether it ended. What fails leaves failed.txt, what is out of time its checkpoint."""
    words = words_of(experiment, run, data)
    run.folder.mkdir(parents=True, exist_ok=True)
    write_text(run.folder / "command.json", json.dumps(words))
    words += [f"--out={run.folder}", "--resume"]
    with open(run.folder / "output.txt", "a") as output:
        # In a session of its own: Ctrl-C reaches it as our SIGTERM, on which it saves a checkpoint.
        process = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
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
                "status": status(run, last),
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
        "settings": {
            "command": experiment.command,
            "arms": experiment.arms,
            "learning_rates": experiment.learning_rates,
        },
        "seeds": experiment.seeds,
        "runs": rows,
        "commits_of_runs": sorted(str(commit) for commit in commits),
        **provenance("cpu"),
    }
    if all(row["value"] is None for row in rows) and (out / f"{experiment.name}.json").exists():
        return table(experiment, rows)
    write_result(out / experiment.name, result, table(experiment, rows))
    draw(experiment, rows, out / f"{experiment.name}.svg")
    return table(experiment, rows)


def status(run: Run, last: dict[str, Any]) -> str:
    """done, running, failed (why), or done with a collapse named."""
    if run.failed is not None:
        return f"failed ({run.failed})"
    if not run.done:
        return "running"
    if last.get("monitor/mean_share", [0.0])[-1] > DEAD:
        return "done, last block dead"
    return "done"


def chosen_rows(experiment: Experiment, rows: list[dict[str, Any]], arm: str) -> list[dict[str, Any]]:
    """Runs of an arm that ended well, with the learning rate that was best with the first seed."""
    ended = [r for r in rows if r["arm"] == arm and r["value"] is not None and r["status"].startswith("done")]
    first = [r for r in ended if r["seed"] == experiment.seeds[0]]
    if not first:
        return []
    lr = max(first, key=lambda r: r["value"])["lr"]
    return [r for r in ended if r["lr"] == lr]


def table(experiment: Experiment, rows: list[dict[str, Any]]) -> str:
    """Markdown: the arms at their best learning rate, then every run."""
    lines = [
        f"**{experiment.name}**: {experiment.metric} at the end, of the best block where there are several, in",
        "percent; mean and standard deviation over seeds, at the learning rate that was best with the first one.",
        "",
        "| arm | learning rate | of | seeds | best block | last block | its effective rank | its mean share |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for arm in experiment.arms:
        chosen = chosen_rows(experiment, rows, arm)
        tried = ", ".join(f"{lr:g}" for lr in experiment.rates(arm))
        if not chosen:
            lines.append(f"| {arm} | | {tried} | 0 | | | | |")
            continue
        metric = [r["last"][experiment.metric] for r in chosen]
        last_block = [100 * (m[-1] if isinstance(m, list) else m) for m in metric]
        ranks = [r["last"]["monitor/effective_rank"][-1] for r in chosen if "monitor/effective_rank" in r["last"]]
        shares = [r["last"]["monitor/mean_share"][-1] for r in chosen if "monitor/mean_share" in r["last"]]
        lines.append(
            f"| {arm} | {chosen[0]['lr']:g} | {tried} | {len(chosen)} | {spread([100 * r['value'] for r in chosen])} | "
            f"{spread(last_block)} | {spread(ranks)} | {spread(shares, 2)} |"
        )
    lines += conditioning(experiment, rows)
    lines += ["", "| run | learning rate | seed | value | status |", "|---|---:|---:|---:|---|"]
    for r in rows:
        value = "" if r["value"] is None else f"{100 * r['value']:.1f}"
        lines.append(f"| {r['arm']} | {r['lr']:g} | {r['seed']} | {value} | {r['status']} |")
    return "\n".join(lines) + "\n"


def conditioning(experiment: Experiment, rows: list[dict[str, Any]]) -> list[str]:
    """Lines of a table of conditioning at the start and at the end, where runs logged it (--monitor.conditioning)."""
    columns = {
        "worst condition of W_V W_O": ("value_output_condition", max),
        "attention on the diagonal, mean of blocks": ("diagonal_share", statistics.mean),
        "largest kurtosis": ("kurtosis", max),
        "last block's mean share": ("mean_share", last_of),
        "last block's effective rank": ("effective_rank", last_of),
    }
    lines = []
    for arm in experiment.arms:
        chosen = [
            r
            for r in chosen_rows(experiment, rows, arm)
            if all("monitor/conditioning/kurtosis" in r[when] for when in ("start", "last"))
        ]
        cells = []
        for measure, over_blocks in columns.values():
            ends = [
                statistics.mean(over_blocks(r[when][f"monitor/conditioning/{measure}"]) for r in chosen)
                for when in ("start", "last")
                if chosen
            ]
            cells.append(" -> ".join(f"{value:.3g}" for value in ends))
        if chosen:
            lines.append(f"| {arm} | {' | '.join(cells)} |")
    if not lines:
        return []
    return ["", f"| arm, start -> end | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns), *lines]


def last_of(values: list[float]) -> float:
    """The last one."""
    return values[-1]


def spread(values: list[float], digits: int = 1) -> str:
    """Mean ± standard deviation (of a sample), as far as there are values."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def draw(experiment: Experiment, rows: list[dict[str, Any]], path: Path) -> None:
    """Curves of the metric over the epochs, each arm at its best learning rate: seeds thin, their mean thick. From the
    eleventh arm on colours come again, dashed."""
    figure, axis = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for number, arm in enumerate(experiment.arms):
        colour = plt.get_cmap("tab10")(number % 10)
        chosen = chosen_rows(experiment, rows, arm)
        for r in chosen:
            axis.plot([p["epoch"] for p in r["curve"]], [100 * p["value"] for p in r["curve"]], color=colour, lw=0.6)
        shortest = min((len(r["curve"]) for r in chosen), default=0)
        if shortest:
            x = [p["epoch"] for p in chosen[0]["curve"][:shortest]]
            y = [100 * statistics.mean(r["curve"][i]["value"] for r in chosen) for i in range(shortest)]
            style = "-" if number < 10 else "--"
            axis.plot(x, y, color=colour, ls=style, lw=2, label=f"{arm} ({len(chosen)})")
    axis.set(xlabel="epoch", ylabel=f"{experiment.metric}, best block, %")
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Command line: see the docstring of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path, help="Its file.")
    parser.add_argument("--data", default="", help="What {data} in its command stands for.")
    parser.add_argument("--hours", type=float, default=math.inf, help="Stop after so much time; a run is interrupted.")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="Folder of the runs (default: runs).")
    parser.add_argument("--out", type=Path, help="Folder of the results, by default results/pretraining or supervised.")
    parser.add_argument("--list", action="store_true", help="Say what is done and what is next, and run nothing.")
    arguments = parser.parse_args()
    try:
        experiment = read_experiment(arguments.experiment)
        if any("{data}" in word for word in experiment.command) and not arguments.list:
            check_data(arguments.data)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if arguments.out is None:
        subject = "pretraining" if Path(experiment.command[0]).stem == "pretrain" else "supervised"
        arguments.out = ROOT / "results" / subject
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's; Ctrl-C is the same
    try:
        drive(experiment, arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        sys.exit(130)


def drive(experiment: Experiment, arguments: argparse.Namespace) -> None:
    """Do what is to do, as far as time allows."""
    deadline = time.monotonic() + 3600 * arguments.hours
    folder = (arguments.runs / experiment.name).resolve()
    everything = all_runs(experiment, folder)
    for run in pending(experiment, folder):
        if arguments.list:
            print(f"{run.folder.name}: {status(run, {}) if run.folder.exists() else 'to do'}")
            continue
        check_same(run, words_of(experiment, run, arguments.data))
        if not run.done:
            if time.monotonic() >= deadline:
                break
            print(f"{time.strftime('%H:%M')} {run.folder.name}", flush=True)
            ended = train(experiment, run, arguments.data, deadline)
            collect(experiment, everything, arguments.out)
            if not ended:
                break
    if not arguments.list:
        print(collect(experiment, everything, arguments.out))
        failed = [run for run in everything if run.failed is not None]
        for run in failed:
            print(f"{run.folder} failed: {run.failed} (delete the folder to try again)", file=sys.stderr)
        if failed and not any(run.done and run.failed is None for run in everything):
            sys.exit(1)


if __name__ == "__main__":
    main()
