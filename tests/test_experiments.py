"""The driver of experiments: what it runs, in which order, what it makes of failures, its tables, and the index."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from PIL import Image

from skipless.common import cli

ROOT = helpers.ROOT
run_py = helpers.load(ROOT / "experiments/run.py")
index_py = helpers.load(ROOT / "experiments/index.py")
tables_py = helpers.load(ROOT / "experiments/tables.py")
hypotheses_py = helpers.load(ROOT / "experiments/hypotheses.py")
masked_py = helpers.load(ROOT / "experiments/masked_tokens.py")
# A training of milliseconds: its figure is given by its flags, and the seed adds a hundredth.
FAKE = """
import argparse, json, pathlib, sys
p = argparse.ArgumentParser()
p.add_argument("--quality", type=float); p.add_argument("--optimizer.lr", dest="lr", type=float)
p.add_argument("--seed", type=int); p.add_argument("--out", type=pathlib.Path)
p.add_argument("--resume", action="store_true")
p.add_argument("--broken", action="store_true")
a = p.parse_args()
with open(a.out.parent / "order.txt", "a") as f: f.write(a.out.name + "\\n")
if a.broken: sys.exit("error: this arm cannot work")
value = a.quality - abs(a.lr - 0.2) + a.seed / 100
lines = [{"step": s, "epoch": s, "monitor/knn": [0.0, value * s / 2], "monitor/mean_share": [0.1, a.quality],
          "monitor/effective_rank": [3.0, 2.0]} for s in (0, 1, 2)]
(a.out / "metrics.jsonl").write_text("".join(json.dumps(l) + "\\n" for l in lines))
(a.out / "backbone.json").write_text(json.dumps({"commit": "abc"}))
"""


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    (tmp_path / "fake.py").write_text(FAKE)
    path = tmp_path / "trial.yaml"
    path.write_text(
        json.dumps(
            {
                "command": [str(tmp_path / "fake.py")],
                "arms": {"good": ["--quality=0.5"], "flat one": ["--quality=0.99"], "broken": ["--broken"]},
                "learning_rates": [0.1, 0.2],
                "seeds": [0, 1, 2],
                "metric": "monitor/knn",
            }
        )
    )
    return path


@pytest.fixture
def drive(capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """Runs the driver in this process, with its runs and results beside the experiment's file."""
    before = signal.getsignal(signal.SIGTERM)

    def run(path: Path, *more: str) -> helpers.Done:
        folders = ["--runs", str(path.parent / "runs"), "--out", str(path.parent / "results")]
        status = 0
        try:
            run_py.main([str(path), *more, *folders])
        except SystemExit as end:
            status = int(end.code or 0)
        return helpers.Done(status, *capsys.readouterr())

    yield run
    signal.signal(signal.SIGTERM, before)


def test_learning_rates_first_then_seeds_at_the_best_and_nothing_twice(experiment: Path, drive: Any) -> None:
    done = drive(experiment)
    assert done.returncode == 0, done.stderr
    order = (experiment.parent / "runs" / "trial" / "order.txt").read_text().split()
    sweep = [f"{arm}-lr{lr}-seed0" for lr in ("0.1", "0.2") for arm in ("good", "flat-one", "broken")]
    seeds = [
        f"{arm}-lr{lr}-seed{s}" for s in (1, 2) for arm, lr in (("good", "0.2"), ("flat-one", "0.2"), ("broken", "0.1"))
    ]
    assert order == sweep + seeds
    drive(experiment)
    assert (experiment.parent / "runs" / "trial" / "order.txt").read_text().split() == order

    result = json.loads((experiment.parent / "results" / "trial.json").read_text())
    values = {(r["arm"], r["lr"], r["seed"]): r["value"] for r in result["runs"] if r["value"] is not None}
    assert values[("good", 0.1, 0)] == pytest.approx(0.4)
    assert values[("good", 0.2, 2)] == pytest.approx(0.52)
    table = (experiment.parent / "results" / "trial.md").read_text()
    # Of 0.50, 0.51 and 0.52: mean 51, standard deviation of a sample 1.
    assert "| good | 0.2 | 0.1, 0.2 | 3 | 51.0 ± 1.0 | 51.0 ± 1.0 | 2.0 ± 0.0 | 0.50 ± 0.00 |" in table
    assert "| broken | | 0.1, 0.2 | 0 | | | | |" in table
    assert "failed (exit code 1: error: this arm cannot work)" in table
    assert "| flat one | 0.2 | 0 | 99.0 | done, last block dead |" in table
    assert (experiment.parent / "results" / "trial.svg").read_text().startswith("<?xml")


def test_list_runs_nothing(experiment: Path, drive: Any) -> None:
    done = drive(experiment, "--list")
    assert done.stdout.splitlines()[0] == "good-lr0.1-seed0: to do"
    assert not (experiment.parent / "runs").exists()
    assert not (experiment.parent / "results").exists()


def test_a_failed_run_counts_for_nothing_and_other_flags_are_found_out(experiment: Path, drive: Any) -> None:
    drive(experiment)
    runs = experiment.parent / "runs" / "trial"
    # Had it not failed, the first rate would be the better one.
    (runs / "good-lr0.1-seed0" / "failed.txt").write_text("exit code 1: out of memory\n")
    log = runs / "good-lr0.1-seed0" / "metrics.jsonl"
    log.write_text(log.read_text().replace("0.4", "0.9"))
    drive(experiment)
    assert "| good | 0.2 | 0.1, 0.2 | 3 | 51.0 ± 1.0 |" in (experiment.parent / "results" / "trial.md").read_text()

    content = json.loads(experiment.read_text())
    content["arms"]["good"] = ["--quality=0.6"]
    experiment.write_text(json.dumps(content))
    done = drive(experiment)
    assert done.returncode == 2
    assert "good-lr0.1-seed0 was made by other flags or data" in done.stderr


TWINS = "{command: [x], arms: {a +1: [], a -1: []}, learning_rates: [0.1], seeds: [0], metric: m}"
WORDS = "{command: [x], arms: {a: []}, learning_rates: [1e-3], seeds: [0], metric: m}"
EMPTY = "{command: [x], arms: {a: []}, learning_rates: [0.1], seeds: [], metric: m}"


@pytest.mark.parametrize("content", ["command: [x]", "a: [", None, TWINS, WORDS, EMPTY])
def test_a_file_that_is_no_experiment(tmp_path: Path, content: str | None, drive: Any) -> None:
    path = tmp_path / "x.yaml"
    if content is not None:
        path.write_text(content)
    done = drive(path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_without_its_images_or_a_run_that_works_nothing_is_replaced(experiment: Path, drive: Any) -> None:
    content = json.loads(experiment.read_text())
    content["command"] += ["--data={data}/train"]
    experiment.write_text(json.dumps(content))
    for more, message in (([], "this experiment needs images"), (["--data", "no/where"], "no/where is no folder")):
        done = drive(experiment, *more)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert message in done.stderr
        assert not (experiment.parent / "runs").exists()

    content |= {"command": [str(experiment.parent / "fake.py")], "arms": {"broken": ["--broken"]}}
    experiment.write_text(json.dumps(content))
    result = experiment.parent / "results" / "trial.json"
    result.parent.mkdir()
    result.write_text("{}")
    done = drive(experiment)
    assert done.returncode == 1
    assert "broken-lr0.1-seed0 failed: exit code 1" in done.stderr
    assert result.read_text() == "{}"


FLAGS = """--model.dim=32 --model.depth=2 --model.heads=2 --model.patch=8 --crops.global_crops_size=16 --device=cpu
    --crops.local_crops_size=8 --crops.local_crops_number=1 --dino.out_dim=32 --dino.hidden_dim=32 --epochs=3000
    --dino.bottleneck_dim=16 --optimizer.name=adamw --batch_size=8"""


def test_interrupted_a_real_run_leaves_a_checkpoint_and_is_taken_up_again(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for i in range(16):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(photos / f"{i}.png")
    content: dict[str, Any] = {
        "command": ["ssl/pretrain.py", "--data.path", "{data}", *FLAGS.split()],
        "arms": {"one": []},
        "learning_rates": [0.001],
        "seeds": [0],
        "metric": "loss",
    }
    path = tmp_path / "real.yaml"
    path.write_text(json.dumps(content))
    words = [path, "--data", photos, "--runs", tmp_path / "runs", "--out", tmp_path / "results"]
    folder = tmp_path / "runs" / "real" / "one-lr0.001-seed0"
    log, steps = folder / "metrics.jsonl", []
    for _ in range(2):
        before = len(log.read_text().splitlines()) if log.exists() else 0
        running = helpers.start("experiments/run.py", words)
        until = time.monotonic() + 120
        while not log.exists() or len(log.read_text().splitlines()) < before + 2:
            assert time.monotonic() < until
            time.sleep(0.1)
        os.kill(running.process.pid, signal.SIGTERM)
        done = running.wait(60)
        assert done.returncode == 130
        assert done.stderr.startswith("interrupted: the same command goes on")
        assert not (folder / "failed.txt").exists()
        steps.append(torch.load(folder / "checkpoints" / "last.pt", weights_only=True)["step"])
    assert 0 < steps[0] < steps[1]


def test_published_experiments_name_flags_that_exist_and_go_together() -> None:
    from skipless.ssl import distill, pretrain, supervised
    from skipless.ssl.config import check

    kinds = {
        "ssl/pretrain.py": pretrain.Settings,
        "ssl/supervised.py": supervised.Settings,
        "ssl/distill.py": distill.Settings,
    }
    for path in sorted((ROOT / "experiments").glob("*.yaml")):
        experiment = run_py.read_experiment(path)
        script, *words = experiment.command
        for more in experiment.arms.values():
            settings = cli.parse(kinds[script], [*(word.replace("{data}", "x") for word in [*words, *more]), "--out=x"])
            check(settings, 10**6, "data", Path("x"), torch.device("cpu"))


def test_conditioning_at_the_start_and_at_the_end_is_tabulated(experiment: Path, drive: Any) -> None:
    conditioning = """
lines = [l | {f"monitor/conditioning/{name}": [2.0, l["step"] + 1] for name in ("value_output_condition",
         "diagonal_share", "kurtosis", "mean_share", "effective_rank")} for l in lines]
(a.out"""
    fake = experiment.parent / "fake.py"
    fake.write_text(FAKE.replace("\n(a.out", conditioning, 1))
    done = drive(experiment)
    assert done.returncode == 0, done.stderr
    table = (experiment.parent / "results" / "trial.md").read_text()
    # Two blocks, 2 and 1 at the start, 2 and 3 at the end: the worst, the mean, or the last of them.
    assert "| good | 2 -> 3 | 1.5 -> 2.5 | 2 -> 3 | 1 -> 3 | 1 -> 3 |" in table
    assert "| broken | 2" not in table


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "results").glob("*/*.svg")))
def test_published_table_is_what_its_result_gives(name: str) -> None:
    (path,) = (ROOT / "results").glob(f"*/{name}.json")
    assert tables_py.table(json.loads(path.read_text())) == path.with_suffix(".md").read_text()


def test_published_table_of_hypotheses_is_what_its_result_gives() -> None:
    path = ROOT / "results/analysis/hypotheses.json"
    assert hypotheses_py.table(json.loads(path.read_text())["details"]) == path.with_suffix(".md").read_text()


def test_index_of_results_is_what_the_command_writes_and_names_them_all() -> None:
    index = (ROOT / "results/README.md").read_text()
    assert index == index_py.index(ROOT / "results"), "run `python experiments/index.py`"
    for path in (ROOT / "results").rglob("*.json"):
        assert f"]({path.with_suffix('.md').relative_to(ROOT / 'results')})" in index


def test_a_masked_token_depends_on_other_patches_through_attention_alone() -> None:
    images, mask = torch.randn(6, 3, 32, 32), torch.arange(16)[None] < 5
    model = helpers.tiny_vit()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.proj.weight.normal_()
    attending = masked_py.dependence(model, images, mask)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.proj.weight.zero_()
    alone = masked_py.dependence(model, images, mask)
    assert max(alone["hidden"]) < 1e-6 < 0.01 < min(attending["hidden"])
    with torch.no_grad():
        tokens = model([images])[0][:, 1:][:, ~mask[0]].double().numpy()
    by_hand = tokens.var(axis=0, ddof=1).sum() / (tokens**2).mean(axis=0).sum()
    assert alone["visible"][-1] == pytest.approx(by_hand, rel=1e-3)
