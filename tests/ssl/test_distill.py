"""The distillation command as a user runs it."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import call, logged, refusal, run_group

from skipless.ssl.distill import main
from skipless.ssl.model.vit import VisionTransformer
from skipless.ssl.monitor import measure_blocks
from skipless.ssl.run.checkpoints import load_run_backbone
from skipless.ssl.run.run import Run

SMALL = [
    "--model.dim=32", "--model.depth=2", "--model.heads=2", "--model.patch=8", "--views.size=16", "--batch_size=8",
    "--epochs=3", "--optimizer.warmup_epochs=0.2", "--optimizer.lr=0.05", "--log_every=1", "--device=cpu",
    "--data.workers=0", "--precision=fp32", "--monitor.every_epochs=3",
]  # fmt: skip


@pytest.fixture
def words(photos: Path, tiny_run: Path) -> Any:
    """The words of a run into a folder, and more of them."""
    return lambda out, *more: ["--data.path", photos, "--teacher.ckpt", tiny_run, "--out", out, *SMALL, *more]


def fit(words: list[object]) -> str:
    done = call(main, words)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_monitor_sees_the_student_as_evaluations_do(
    words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def look(model: VisionTransformer, *rest: Any) -> Any:
        seen.append(model.training)
        return measure_blocks(model, *rest)

    monkeypatch.setattr("skipless.ssl.monitor.measure_blocks", look)
    fit(words(tmp_path / "run", "--model.residual=true", "--model.drop_path=0.1"))
    assert seen == [False, False]


def state(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.pt", weights_only=True)


@pytest.mark.parametrize(
    "arm",
    [
        ["--model.residual=true", "--distillation.loss=cosine", "--distillation.cls_loss_weight=0.5"],
        ["--teacher.size=32", "--views.jitter_probability=0.5", "--distillation.cls_loss_weight=0.5"],
        ["--teacher.size=32", "--teacher.cache=CACHE"],
    ],
)
def test_student_learns_and_leaves_what_evaluation_needs(words: Any, tmp_path: Path, arm: list[str]) -> None:
    out = tmp_path / "run"
    more = [word.replace("CACHE", str(tmp_path / "cache")) for word in arm]
    printed = fit(words(out, "--epochs=8", *more))
    assert "teacher: " in printed
    loss, cosine = logged(out, "loss"), logged(out, "cosine")
    assert len(loss) == 40
    assert np.mean(loss[-5:]) < 0.8 * np.mean(loss[:5])
    assert np.mean(cosine[-5:]) > np.mean(cosine[:5]) + 0.2
    assert len(logged(out, "monitor/knn")) >= 2
    backbone, about = load_run_backbone(out)
    assert about["pool"] == "mean"
    trained = state(out)["student"]
    assert all(torch.equal(x, trained[f"backbone.{name}"]) for name, x in backbone.state_dict().items())


@pytest.mark.parametrize("cached", [False, True])
def test_interrupted_and_resumed_runs_are_bit_identical(
    words: Any, tmp_path: Path, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--teacher.cache", tmp_path / "features"] if cached else []
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    fit(words(whole, *more))
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "features").rglob("*.npy")}
    steps = iter(range(1, 16))
    with monkeypatch.context() as patch:
        patch.setattr(Run, "interrupted", lambda _: next(steps) == 7)
        assert call(main, words(stopped, *more)).returncode == 128  # and the number of the signal
    assert state(stopped)["step"] == 7
    fit(words(stopped, *more, "--resume"))
    for name, tensor in state(whole)["student"].items():
        assert torch.equal(tensor, state(stopped)["student"][name]), name
    assert logged(stopped, "loss") == logged(whole, "loss")
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "features").rglob("*.npy")}
    assert bool(files) == cached


def test_processes_and_micro_batches_do_not_change_the_curves(words: Any, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    more = ["--optimizer.name=adamw", "--optimizer.lr=0.01", "--teacher.cache", tmp_path / "features"]
    fit(words(one, *more))
    shutil.rmtree(tmp_path / "features")
    run_group("skipless.ssl.distill", words(two, *more, "--accumulate=2"))
    assert len(logged(two, "loss")) == 15
    np.testing.assert_allclose(logged(two, "loss"), logged(one, "loss"), atol=1e-4, rtol=0)
    np.testing.assert_allclose(logged(two, "gradient_norm"), logged(one, "gradient_norm"), rtol=1e-2)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--teacher.size=20"], "teacher.size is 20, which is no multiple of the teacher's patch 8; use 16 or 24"),
        (["--teacher.ckpt=nowhere.pth"], "nowhere.pth"),
        (["--views.size=20"], "views.size is 20"),
        (["--views.scale=[0.9,0.1]"], "views.scale is (0.9, 0.1)"),
        (["--distillation.head_speed=0"], "distillation.head_speed is 0"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    words: Any, tmp_path: Path, more: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in refusal(main, words(tmp_path / "run", *more), capsys)
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_resumed_with_another_teacher(
    words: Any, tmp_path: Path, tiny_ckpt: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    fit(words(out, "--epochs=1"))
    said = refusal(main, words(out, "--epochs=1", "--teacher.ckpt", tiny_ckpt, "--resume"), capsys)
    assert "other teacher" in said
