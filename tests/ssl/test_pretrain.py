"""The training command as a user runs it: its equivalences, its endings, and its errors."""

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
import typing
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import ROOT, Done, Running, call, error_line, logged, run_group, start, start_group
from PIL import Image

from skipless.common import cli
from skipless.datasets import images
from skipless.datasets.images import open_images
from skipless.ssl import pretrain, supervised
from skipless.ssl.config import Settings
from skipless.ssl.data.loader import StepBatches
from skipless.ssl.data.squares import normalized_squares
from skipless.ssl.dino import update_teacher
from skipless.ssl.model import build
from skipless.ssl.model.build import build_backbone, embedding_of
from skipless.ssl.model.embedding import sine_positions_, whiten_patches_
from skipless.ssl.model.initialization import PRESETS, choose_beta
from skipless.ssl.model.vit import VisionTransformer
from skipless.ssl.optim.optimizers import set_rates
from skipless.ssl.run.checkpoints import load_run_backbone
from skipless.ssl.run.folder import whole_checkpoints

COMMAND = "skipless.ssl.pretrain"
SMALL = [
    "--model.dim=32", "--model.depth=2", "--model.heads=2", "--model.patch=8", "--crops.global_crops_size=32",
    "--crops.local_crops_size=16", "--crops.local_crops_number=2", "--dino.out_dim=32", "--dino.hidden_dim=32",
    "--dino.bottleneck_dim=16", "--dino.freeze_last_layer=0.5", "--optimizer.warmup_epochs=1",
    "--optimizer.lr=0.02", "--batch_size=8", "--epochs=4", "--log_every=1", "--monitor.every_epochs=0",
    "--device=cpu", "--data.workers=0", "--precision=fp32",
]  # fmt: skip
ONE_EPOCH = ["--epochs=1", "--optimizer.warmup_epochs=0"]


def words(images: Path, out: Path, *more: object) -> list[object]:
    return ["--data.path", images, "--out", out, *SMALL, *more]


def run(images: Path, out: Path, *more: object) -> Done:
    return call(pretrain.main, words(images, out, *more))


def train(images: Path, out: Path, *more: object) -> str:
    """What a run says that must succeed."""
    done = run(images, out, *more)
    assert done.returncode == 0, done.stderr
    return done.stderr


def losses(folder: Path) -> list[float]:
    return logged(folder, "loss")


def last(folder: Path) -> dict[str, typing.Any]:
    return torch.load(folder / "checkpoints" / "last.pt", weights_only=True)


def assert_same_weights(folder: Path, other: Path) -> None:
    a, b = last(folder), last(other)
    for part in {"student", "teacher", "objective", "ibot"} & a.keys():
        for name, tensor in a[part].items():
            assert torch.equal(tensor, b[part][name]), (part, name)


@pytest.fixture(scope="module")
def reference(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, one micro-batch, 20 steps, uninterrupted."""
    out = tmp_path_factory.mktemp("runs") / "reference"
    train(photos, out)
    return out


@pytest.fixture
def copied(reference: Path, tmp_path: Path) -> Path:
    return shutil.copytree(reference, tmp_path / "run", symlinks=True)


def back_to_step_15(run: Path) -> Path:
    """The run as if it had been killed after its third epoch; its last checkpoint."""
    for name in ("backbone.json", "backbone.safetensors", "checkpoints/step-20.pt", "checkpoints/last.pt"):
        (run / name).unlink()
    (run / "checkpoints" / "last.pt").symlink_to("step-15.pt")
    return run / "checkpoints" / "step-15.pt"


def test_a_run_leaves_what_evaluation_needs(reference: Path) -> None:
    assert len(losses(reference)) == 20
    settings = yaml.safe_load((reference / "settings.yaml").read_text())
    assert settings["model"]["dim"] == 32
    assert settings["model"]["residual"] is False
    backbone, about = load_run_backbone(reference)
    assert about["architecture"]["residual"] is False
    state = last(reference)
    assert state["step"] == 20
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, state["teacher"][f"backbone.{name}"])
    assert not torch.equal(state["teacher"]["backbone.pos_embed"], state["student"]["backbone.pos_embed"])
    assert sorted(p.name for p in (reference / "checkpoints").iterdir()) == ["last.pt", "step-15.pt", "step-20.pt"]
    assert list((reference / "tensorboard").iterdir())


@pytest.mark.parametrize(("processes", "accumulate"), [(2, 1), (1, 4), (2, 2)])
def test_processes_and_micro_batches_do_not_change_the_loss_curve(
    photos: Path, reference: Path, tmp_path: Path, processes: int, accumulate: int
) -> None:
    out = tmp_path / "run"
    run_group(COMMAND, words(photos, out, f"--accumulate={accumulate}"), processes)
    np.testing.assert_allclose(losses(out), losses(reference), atol=1e-4, rtol=0)
    # AdamW and clipping hide the gradient's scale from the loss curve.
    np.testing.assert_allclose(logged(out, "gradient_norm"), logged(reference, "gradient_norm"), rtol=1e-2)


PATCHES = ["--ibot.loss_weight=1", "--ibot.mask_ratio_min_max=[0.2,0.6]"]


@pytest.fixture(scope="module")
def with_masks(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference with iBOT, from its second epoch on."""
    out = tmp_path_factory.mktemp("runs") / "masks"
    train(photos, out, *PATCHES, "--ibot.from_epoch=1", "--ibot.out_dim=24")
    return out


@pytest.mark.parametrize(("processes", "accumulate"), [(2, 1), (1, 4)])
def test_processes_and_micro_batches_do_not_change_the_masked_loss(
    photos: Path, with_masks: Path, reference: Path, tmp_path: Path, processes: int, accumulate: int
) -> None:
    out = tmp_path / "run"
    more = ["--ibot.from_epoch=1", "--ibot.out_dim=24", f"--accumulate={accumulate}"]
    run_group(COMMAND, words(photos, out, *PATCHES, *more), processes)
    for name in ("loss", "ibot"):
        np.testing.assert_allclose(logged(out, name), logged(with_masks, name), atol=1e-4, rtol=0, err_msg=name)
    np.testing.assert_allclose(logged(out, "gradient_norm"), logged(with_masks, "gradient_norm"), rtol=1e-2)
    assert np.flatnonzero(logged(with_masks, "ibot")).min() >= 5
    assert len(np.flatnonzero(logged(with_masks, "ibot"))) > 10


def test_koleo_knows_a_micro_batch_of_a_process(photos: Path, tmp_path: Path) -> None:
    """So two processes are two micro-batches, and not one."""
    more = ["--dino.koleo_loss_weight=0.1", *ONE_EPOCH]
    train(photos, tmp_path / "one", *more)
    train(photos, tmp_path / "micro", *more, "--accumulate=2")
    run_group(COMMAND, words(photos, tmp_path / "two", *more))
    one, micro, two = (logged(tmp_path / name, "koleo") for name in ("one", "micro", "two"))
    np.testing.assert_allclose(two, micro, atol=1e-4)
    assert np.all(np.array(one) > np.array(micro))  # neighbors are nearer


GRAM = ["--gram.loss_weight=2", "--crops.gram_teacher_crops_size=48", "--ibot.loss_weight=1"]


def test_a_finished_run_is_extended_with_larger_crops_and_gram(photos: Path, tmp_path: Path) -> None:
    """And the extension is the same killed and resumed, on two processes, with crops made on the device."""
    base, out = tmp_path / "base", tmp_path / "longer"
    train(photos, base, "--ibot.loss_weight=1", *ONE_EPOCH)
    more = ["--extend", base, "--crops.global_crops_size=40", *GRAM, "--epochs=2", "--dino.freeze_last_layer=0"]
    said = train(photos, out, *more)
    assert f"goes on from {base} for 2 more epochs" in said
    assert "learning rate up to 0.000625 in 1 epochs" in said  # 0.02 * 8 / 256
    first, then = last(base)["teacher"], load_run_backbone(out)[0]
    assert then.architecture["image_size"] == 32
    state = torch.load(out / "checkpoints" / "step-5.pt", weights_only=True)
    for name, tensor in state["gram"].items():  # the teacher that the run began with
        assert torch.equal(tensor, first[name.replace("teacher.", "backbone.", 1)]), name
    assert min(logged(out, "gram")) > 0
    assert logged(out, "lr")[:2] == [0, pytest.approx(0.000625 / 4)]

    killed = shutil.copytree(out, tmp_path / "killed", symlinks=True)
    for name in ("backbone.json", "backbone.safetensors", "checkpoints/step-10.pt", "checkpoints/last.pt"):
        (killed / name).unlink()
    (killed / "checkpoints" / "last.pt").symlink_to("step-5.pt")
    assert "from step 5" in train(photos, killed, *more, "--resume")
    assert_same_weights(killed, out)
    run_group(COMMAND, words(photos, tmp_path / "two", *more, "--crops.device=device"))
    np.testing.assert_allclose(logged(tmp_path / "two", "gram"), logged(out, "gram"), rtol=0.1)
    np.testing.assert_allclose(logged(tmp_path / "two", "loss"), logged(out, "loss"), atol=0.05)

    for wrong, part in (
        (["--extend", tmp_path / "none"], "which has no backbone.json"),
        (["--extend", base, "--ibot.loss_weight=0"], "the mask token"),
        (["--extend", base, "--ibot.loss_weight=1", "--dino.out_dim=16"], "out_dim is 32 there and 16 here"),
        (["--extend", base, "--ibot.loss_weight=1", "--model.dim=64"], "another architecture: dim is 32 there"),
    ):
        done = run(photos, tmp_path / "refused", *wrong)
        assert part in error_line(done.stderr)
        assert not (tmp_path / "refused").exists()


def test_two_processes_balance_and_measure_as_one(photos: Path, tmp_path: Path) -> None:
    """Sinkhorn-Knopp over the whole batch, and the k-NN monitor over all images."""
    more = ["--dino.balancing=sinkhorn", *PATCHES, "--monitor.every_epochs=1", "--precision=bf16", *ONE_EPOCH]
    one, two = tmp_path / "1", tmp_path / "2"
    train(photos, one, *more)
    run_group(COMMAND, words(photos, two, *more))
    np.testing.assert_allclose(losses(two), losses(one), atol=2e-2, rtol=0)  # bf16
    assert len(logged(two, "monitor/knn")) == len(logged(one, "monitor/knn")) == 2
    np.testing.assert_allclose(logged(two, "monitor/knn")[0], logged(one, "monitor/knn")[0], atol=1e-6)


def test_crops_made_where_the_model_trains_are_the_same_crops(photos: Path, reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    said = train(photos, out, "--crops.device=device", "--data.workers=1", "--precision=bf16")
    assert "crops: made on cpu" in said
    np.testing.assert_allclose(losses(out), losses(reference), atol=0.05, rtol=0)
    assert all(0 < share < 1 for share in logged(out, "data_share"))


def wait_for_losses(command: Running, out: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and command.process.exitcode is None:
        if (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text().count('"loss"') >= count:
            return
        time.sleep(0.002)


@pytest.mark.parametrize(
    "more",
    [
        ["--optimizer.name=adamw", "--model.residual=true", "--model.drop_path=0.3"],
        ["--optimizer.name=soap", "--ibot.loss_weight=1", "--dino.koleo_loss_weight=0.1"],
    ],
)
def test_killed_and_resumed_run_is_bit_identical(photos: Path, tmp_path: Path, more: list[str]) -> None:
    more = [*more, "--precision=bf16"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(photos, whole, *more)
    command = start(COMMAND, words(photos, killed, *more))
    wait_for_losses(command, killed, int(np.random.default_rng().integers(6, 15)))
    command.process.kill()
    assert command.wait().returncode == -signal.SIGKILL, "the run ended before it could be killed"
    assert "from step" in train(photos, killed, *more, "--resume")
    assert_same_weights(killed, whole)
    assert losses(killed) == losses(whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_signal_to_the_whole_job_saves_and_ends_cleanly(
    photos: Path, reference: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """As a scheduler does it: every process of the job gets the signal, loader workers too."""
    out = tmp_path / "run"
    command = start(COMMAND, words(photos, out, "--data.workers=1"), session=True)
    wait_for_losses(command, out, 1)
    os.killpg(command.process.pid, number)
    done = command.wait()
    assert done.returncode == 128 + number, done.stderr
    assert "interrupted after step" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (out / "backbone.json").exists()
    train(photos, out, "--resume")
    np.testing.assert_allclose(losses(out), losses(reference), atol=1e-6)


def test_ctrl_c_twice_ends_at_once(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def press_twice(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it
    monkeypatch.setattr(pretrain, "update_teacher", press_twice)
    done = run(photos, tmp_path / "run")
    signal.signal(signal.SIGINT, before)
    assert done.returncode == 130
    assert "interrupted: " in done.stderr
    assert not (tmp_path / "run/checkpoints").exists()


def test_weights_that_an_update_ruined_are_neither_saved_nor_exported(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the last step, after whose update no loss is computed any more."""

    def ruin(teacher: torch.nn.Module, student: typing.Any, momentum: float) -> None:
        if len(losses(tmp_path / "run")) == 19:
            student.backbone.norm.weight.data[0] = float("nan")

    monkeypatch.setattr(pretrain, "update_teacher", ruin)
    done = run(photos, tmp_path / "run")
    assert done.returncode == 2
    assert "stopped at step 20: weights are NaN" in error_line(done.stderr)
    assert last(tmp_path / "run")["step"] == 15
    assert not (tmp_path / "run/backbone.safetensors").exists()


def after_steps(count: int, monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Let something happen in the middle of a step of training."""
    steps, update = itertools.count(1), pretrain.update_teacher

    def acting(*arguments: typing.Any) -> None:
        update(*arguments)
        if next(steps) == count:
            act()

    monkeypatch.setattr(pretrain, "update_teacher", acting)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EFBIG])
def test_a_disk_that_refuses_a_checkpoint(
    photos: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Full, read-only now, or `ulimit -f`: a sentence, the last checkpoint whole, nothing beside it; it can go on."""
    out, limits = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)

    def refusing(_: int) -> typing.NoReturn:
        raise OSError(code, os.strerror(code))

    refuse = (
        partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100_000, limits[1]))
        if code == errno.EFBIG
        else partial(monkeypatch.setattr, os, "fsync", refusing)
    )
    with monkeypatch.context() as patch:
        after_steps(7, patch, refuse)
        done = run(photos, out)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.undo()
    checkpoints = out / "checkpoints"
    said = {
        errno.ENOSPC: f"no space left in {checkpoints} for step-10.pt",
        errno.EROFS: f"{checkpoints / 'step-10.pt'} cannot be written: Read-only file system",
        errno.EFBIG: f"{checkpoints / 'step-10.pt'} cannot be written: File too large",
    }[code]
    assert done.returncode == 2
    assert error_line(done.stderr) == f"stopped at step 10: {said}; the last checkpoint is step 5"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["last.pt", "step-5.pt"]
    (out / ".metrics.jsonl.123").touch()  # of a process that was killed while it wrote
    (checkpoints / ".step-10.pt.123").touch()
    (out / "pictures").mkdir()
    (out / "pictures/.pca-5.png.123").touch()
    train(photos, out, "--resume")
    assert_same_weights(out, reference)
    assert [path.name for path in out.rglob(".*")] == [".lock"]


def test_logs_that_cannot_be_written_do_not_end_training(
    photos: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For some steps metrics.jsonl is on a full disk, and nobody reads what is said (`2>&1 | head`)."""
    metrics, aside = tmp_path / "run/metrics.jsonl", tmp_path / "run/aside"
    read, write = os.pipe()
    os.close(read)

    def main(words: Sequence[str]) -> None:
        after_steps(7, monkeypatch, lambda: (metrics.rename(aside), metrics.symlink_to("/dev/full")))
        after_steps(14, monkeypatch, lambda: aside.rename(metrics))
        with contextlib.redirect_stderr(os.fdopen(write, "w")):
            pretrain.main(words)

    assert call(main, words(photos, tmp_path / "run")).returncode == 0
    assert losses(tmp_path / "run") == losses(reference)


ORPHAN = """
import os, time
from skipless.common import distributed
if not os.fork():
    distributed.start("cpu")
    print(os.getpid(), flush=True)
    time.sleep(60)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process of its parent's death")
def test_processes_end_with_their_launcher() -> None:
    command, env = [sys.executable, "-P", "-c", ORPHAN], os.environ | {"TORCHELASTIC_RUN_ID": "1"}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        child = int(launcher.stdout.readline())
        launcher.kill()
        assert launcher.stdout.read() == ""  # ends when the child has closed its side, too
    assert child != launcher.pid


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_others_with_a_sentence(photos: Path, tmp_path: Path, killed: int) -> None:
    """Two processes without a launcher that would end one for the other."""
    group = start_group(COMMAND, words(photos, tmp_path / "run", "--epochs=4000"))
    wait_for_losses(group[1 - killed], tmp_path / "run", 6)
    group[killed].process.kill()
    done = group[1 - killed].wait(60)
    assert done.returncode == 2
    assert "another process of this job has ended" in done.stderr
    assert "Traceback" not in done.stderr
    assert whole_checkpoints(tmp_path / "run/checkpoints")


def test_collapse_is_called_so_while_it_trains(photos: Path, tmp_path: Path) -> None:
    """A teacher this hot is uniform: the loss cannot leave ln K, and the run says so once, with a remedy."""
    said = train(photos, tmp_path / "run", "--dino.teacher_temp=50")
    assert said.count("WARNING at step") == 1
    assert "the teacher is uniform and the loss sits at ln K = 3.47" in said
    assert "--dino.teacher_temp" in said


def test_a_divergence_is_named_and_the_checkpoint_before_it_outlives_it(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From step 12 on the learning rate is 10; the gradient is finite, and a thousandth of what it was."""

    def leap(optimizer: typing.Any, lr: float, weight_decay: float, freeze: bool) -> None:
        set_rates(optimizer, 10.0 if len(losses(tmp_path / "run")) > 10 else lr, weight_decay, freeze)

    monkeypatch.setattr(pretrain, "set_rates", leap)
    said = train(photos, tmp_path / "run")
    named = re.findall(r"WARNING at step (\d+): the (.*) is .*--optimizer.lr.*of step 10, from before, is kept", said)
    assert named == [("13", "gradient's norm"), ("14", "loss")]
    kept = [path.name for path in whole_checkpoints(tmp_path / "run/checkpoints")]
    assert kept == ["step-10.pt", "step-15.pt", "step-20.pt"]


@pytest.mark.parametrize(
    ("whose", "part", "words", "within"),
    [
        ("teacher", "backbone.norm", "the teacher says the same of all images", 5),
        ("student", "backbone.blocks.0.mlp.fc2", "block 1 of 2 is dead", 10),
    ],
    ids=["collapse", "dead block"],
)
def test_collapse_and_dead_blocks_are_named_within_some_log_lines(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whose: str, part: str, words: str, within: int
) -> None:
    """From step 7 on, the second after the warm-up, a part gives the same whatever the image."""

    def cut(teacher: torch.nn.Module, student: torch.nn.Module, momentum: float) -> None:
        update_teacher(teacher, student, momentum)
        if len(losses(tmp_path / "run")) >= 5:
            torch.nn.init.zeros_({"teacher": teacher, "student": student}[whose].get_parameter(f"{part}.weight"))

    monkeypatch.setattr(pretrain, "update_teacher", cut)
    said = train(photos, tmp_path / "run")
    (step,) = re.findall(rf"WARNING at step (\d+): {words}.*--optimizer.lr", said)
    assert int(step) <= 6 + within


def test_monitor_measures_every_block_before_and_after(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(photos, out, *ONE_EPOCH, "--monitor.every_epochs=1")
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    measured = {entry["step"]: entry for entry in entries if "monitor/knn" in entry}
    assert sorted(measured) == [0, 5]
    for name, lowest, highest in (("knn", 0, 1), ("mean_share", 0, 1), ("effective_rank", 1, 16)):
        values = measured[5][f"monitor/{name}"]
        assert len(values) == 2
        assert all(lowest <= value <= highest for value in values)


def test_monitor_logs_the_conditioning_of_images_without_labels(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(photos / "blobs", out, "--epochs=2", "--monitor.every_epochs=2", "--monitor.conditioning=true",
          "--model.residual=false", "--model.c=2")  # fmt: skip
    before, after = logged(out, "monitor/conditioning/value_output_condition")
    # W_V W_O starts as c^2 = 4 times an orthogonal matrix, and does not stay one.
    np.testing.assert_allclose(before, [1, 1], rtol=1e-3)
    assert min(after) > 1.00003
    np.testing.assert_allclose(logged(out, "monitor/conditioning/value_output_largest")[0], [4, 4], rtol=1e-3)
    assert len(logged(out, "monitor/conditioning/kurtosis")) == 2
    assert not logged(out, "monitor/knn")


@pytest.mark.parametrize("usual", [True, False])
def test_beta_is_chosen_on_the_images_and_a_resumed_run_keeps_it(photos: Path, tmp_path: Path, usual: bool) -> None:
    out, more = tmp_path / "run", ["--model.beta=auto", "--model.residual=false", *ONE_EPOCH]
    more += ["--model.patches=default", "--model.positions=default"] * usual
    first, _ = run_group(COMMAND, words(photos, out, *more))
    beta = yaml.safe_load((out / "settings.yaml").read_text())["model"]["beta"]
    torch.manual_seed(0)
    model = VisionTransformer(32, 2, 2, patch=8, residual=False, image_size=32)
    squares = normalized_squares(open_images(photos), 32, 32)
    if not usual:
        whiten_patches_(model.patch_embed.proj, normalized_squares(open_images(photos), 512, 32))
        sine_positions_(model)
    assert beta == choose_beta(model, squares, PRESETS["small"])
    assert f"model.beta is {beta:g}: chosen on 32 of the images" in first.stderr
    assert last(out)["settings"]["model"]["beta"] == beta
    assert f"model.beta is {beta:g}: as in the run so far" in train(photos, out, *more, "--resume")


TWIN = "--model.residual=true"


def small_start(kind: type, *more: str) -> tuple[str, str]:
    root = "--data.path=x" if kind is Settings else "--data.root=x"
    return embedding_of(cli.parse(kind, [root, "--out=x", *more]).model)


@pytest.mark.parametrize("kind", [Settings, supervised.Settings])
def test_a_residual_twin_has_the_embedding_of_small_and_named_initializations_have_the_usual_one(kind: type) -> None:
    usual, ours = ("default", "default"), ("whitened", "sines")
    assert small_start(kind) == small_start(kind, "--model.init=small") == small_start(kind, TWIN) == ours
    for more in (["--model.init=paper-dino"], ["--model.init=default"], [TWIN, "--model.init=default"]):
        assert small_start(kind, *more) == usual
    assert small_start(kind, TWIN, "--model.init=default", "--model.patches=whitened") == ("whitened", "default")
    assert small_start(kind, "--model.positions=default") == ("whitened", "default")
    for path in (ROOT / "configs").glob("*.yaml"):
        if ("supervised" in path.name) == (kind is not Settings) and "distill" not in path.name:
            twin = usual if path.name == "demo.yaml" else ours  # which names its embedding
            small = path.name in ("imagenette_cpu.yaml", "one_gpu.yaml", "supervised_small.yaml")
            assert small_start(kind, f"--config={path}") == (ours if small else usual), path
            assert small_start(kind, f"--config={path}", "--model.init=null", TWIN) == twin, path


def test_a_small_skipless_model_starts_from_whitened_patches_and_sines(photos: Path, tmp_path: Path) -> None:
    still = ["--optimizer.lr=1e-12", "--optimizer.min_lr=0", "--optimizer.weight_decay=0"]
    train(photos, tmp_path / "out", *still, "--optimizer.weight_decay_end=0", "--model.residual=false", *ONE_EPOCH)
    model = VisionTransformer(32, 2, 2, patch=8, residual=False, image_size=32)
    whiten_patches_(model.patch_embed.proj, normalized_squares(open_images(photos), 40, 32))
    sine_positions_(model)
    trained = load_run_backbone(tmp_path / "out")[0].state_dict()
    torch.testing.assert_close(trained["patch_embed.proj.weight"], model.patch_embed.proj.weight.detach())
    torch.testing.assert_close(trained["patch_embed.proj.bias"], model.patch_embed.proj.bias.detach())
    torch.testing.assert_close(trained["pos_embed"][:, 1:], model.pos_embed[:, 1:].detach())


def test_a_resumed_run_is_neither_initialized_nor_are_patches_whitened(
    photos: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = cli.parse(Settings, [str(word) for word in words(photos, copied)]).model
    with pytest.raises(ValueError, match="none of 0 images"):
        build_backbone(model, 32, 0, images=[])  # type: ignore[arg-type]

    monkeypatch.setattr(build, "skipless_init_", None)
    with pytest.raises(TypeError):
        build_backbone(model, 32, 0)
    monkeypatch.setattr(build, "normalized_squares", None)
    train(photos, copied, "--resume")


def test_unreadable_images_are_listed_and_too_many_stop_the_run(photos: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    broken = sorted(data.rglob("*.png"))[3]
    broken.write_bytes(b"no picture")
    (data / "phone.heic").touch()
    said = train(data, tmp_path / "a", "--data.max_unreadable=0.1")
    assert "left out, as these kinds are not read: 1 .heic" in said
    assert f"1 of 40 images could not be read: {tmp_path / 'a' / 'unreadable.txt'} lists them" in said
    assert broken.name in (tmp_path / "a" / "unreadable.txt").read_text()
    strict = run(data, tmp_path / "b")
    assert strict.returncode == 2
    assert broken.name in error_line(strict.stderr)
    assert "data.max_unreadable (0.01)" in strict.stderr
    assert 0 < last(tmp_path / "b")["step"] <= 5
    shutil.copy(photos / broken.relative_to(data), broken)
    train(data, tmp_path / "b", "--resume")


@pytest.mark.parametrize("returns", [True, False])
def test_a_run_whose_images_are_gone_waits_for_them_and_then_saves(
    photos: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, returns: bool
) -> None:
    data, away, out = tmp_path / "data", tmp_path / "away", tmp_path / "run"
    shutil.copytree(photos, data)
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if returns and len(pauses) == 3:
            away.rename(data)

    monkeypatch.setattr(images, "time", types.SimpleNamespace(sleep=sleep))
    after_steps(7, monkeypatch, lambda: data.rename(away))
    done = run(data, out)
    if not returns:
        assert done.returncode == 2
        said = error_line(done.stderr)
        assert said.startswith(f"the images in {data} have been gone for 30 seconds: look whether its disk is there")
        assert said.endswith("step 7 is saved: go on with --resume")
        assert 30 <= sum(pauses) < 31
        away.rename(data)
        train(data, out, "--resume")
    assert_same_weights(out, reference)


def test_a_killed_loader_process_is_named(photos: Path, tmp_path: Path) -> None:
    command = start(COMMAND, words(photos, tmp_path / "run", "--data.workers=1", "--epochs=400"))
    wait_for_losses(command, tmp_path / "run", 1)
    loader = subprocess.run(["pgrep", "-P", str(command.process.pid)], capture_output=True, text=True, check=True)
    os.kill(int(loader.stdout.split()[-1]), signal.SIGKILL)
    done = command.wait()
    assert done.returncode == 2
    assert error_line(done.stderr).startswith("a process that loads images was killed, most likely for want of memory")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--optimzer.lr=1"], ["optimzer"]),
        (["--optimizer.lr=fast"], ["optimizer.lr", "fast"]),
        (["--data.path=/nowhere/photos"], ["/nowhere/photos", "no such folder"]),
        (["--data.path={empty}"], ["{empty}", "no image found"]),
        (["--crops.local_crops_size=20"], ["crops.local_crops_size is 20", "model.patch 8", "16 or 24"]),
        (["--crops.global_crops_size=60"], ["crops.global_crops_size is 60", "56 or 64"]),
        (["--monitor.every_epochs=1", "--monitor.size=20"], ["monitor.size is 20", "16 or 24"]),
        (["--batch_size=64"], ["40 images", "batch_size"]),
        (["--accumulate=3"], ["batch_size 8", "3 micro-batches"]),
        (["--model.drop_path=0.1"], ["drop_path", "residual=False"]),
        (["--model.attention=xformers"], ["xformers", "CUDA"]),
        (["--compile=true"], ["compile is true", "CPU"]),
        (["--ibot.loss_weight=-1"], ["ibot.loss_weight is -1", "0 or more"]),
        (["--ibot.loss_weight=1", "--ibot.from_epoch=4"], ["ibot.from_epoch is 4", "4 epochs"]),
        (["--dino.koleo_loss_weight=1", "--accumulate=8"], ["dino.koleo_loss_weight", "no neighbors"]),
        (["--config={empty}/none.yaml"], ["none.yaml"]),
        (["--epochs=0"], ["epochs is 0"]),
        (["--dino.freeze_last_layer=4"], ["dino.freeze_last_layer is 4", "4 epochs"]),
        (["--dino.out_dim=0"], ["dino.out_dim is 0"]),
        (["--out={photos}"], ["{photos}", "folder of its own"]),
        (["--clip_grad=-1"], ["clip_grad is -1", "cannot be negative"]),
        (["--optimizer.warmup_epochs=4"], ["optimizer.warmup_epochs is 4", "4 epochs"]),
        (["--model.init=default", "--model.beta=2"], ["model.beta", "model.init"]),
        (["--model.residual=true", "--model.init=small", "--model.beta=auto"], ["model.beta", "model.residual"]),
        (["--model.beta=high"], ["model.beta", "high"]),
        (["--model.residual=false", "--model.query_key=false", "--model.beta=2"], ["model.beta", "model.query_key"]),
        (["--model.depth=292540"], ["model.depth is 292,540", "1,000"]),
        (["--model.depth_scale=0"], ["model.depth_scale is 0", "positive"]),
        (["--out={reference}"], ["already holds a run", "--resume"]),
        (["--out={reference}", "--resume", "--model.dim=64"], ["another architecture", "dim is 32 there and 64 here"]),
        (["--out={reference}", "--resume", "--epochs=9"], ["other settings", "epochs is 4 there and 9 here"]),
        (["--out={reference}", "--resume", "--data.path={fewer}"], ["is of a run on 40 images", "has 39"]),
        (
            ["--out={reference}", "--resume", "--model.beta=auto"],
            ["is of a run that named no model.beta; leave it out"],
        ),
    ],
)
def test_bad_input_ends_with_one_sentence_and_exit_code_2(
    photos: Path, reference: Path, tmp_path: Path, arguments: list[str], parts: list[str]
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"empty": tmp_path / "empty", "reference": reference, "photos": photos, "fewer": tmp_path / "photos"}
    if "fewer" in str(arguments):
        sorted(shutil.copytree(photos, places["fewer"]).rglob("*.png"))[0].unlink()
    before = {path: path.stat().st_mtime_ns for path in reference.rglob("*")}
    done = run(photos, tmp_path / "out", *(argument.format(**places) for argument in arguments))
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for part in parts:
        assert part.format(**places) in error_line(done.stderr)
    assert not (tmp_path / "out").exists()
    assert {path: path.stat().st_mtime_ns for path in reference.rglob("*")} == before


# As the first version called them.
OLD_NAMES = {
    "crops": {
        "global_crops_size": "global_size", "global_crops_scale": "global_scale", "local_crops_size": "local_size",
        "local_crops_number": "local_count", "local_crops_scale": "local_scale", "gray_probability": "grey_probability",
    },
    "dino": {
        "out_dim": "prototypes", "hidden_dim": "hidden", "bottleneck_dim": "bottleneck",
        "freeze_last_layer": "freeze_last_layer_epochs", "momentum_teacher": "momentum",
        "student_temp": "student_temperature", "teacher_temp": "teacher_temperature",
        "warmup_teacher_temp": "warmup_teacher_temperature",
        "warmup_teacher_temp_epochs": "warmup_teacher_temperature_epochs", "center_momentum": "centre_momentum",
    },
}  # fmt: skip


def test_a_run_of_the_first_version_is_resumed_with_its_own_flags(photos: Path, reference: Path, copied: Path) -> None:
    path = back_to_step_15(copied)
    state = torch.load(path, weights_only=True)
    for group, names in OLD_NAMES.items():
        settings = state["settings"][group]
        state["settings"][group] = {names.get(name, name): value for name, value in settings.items()}
    assert state["settings"]["dino"]["balancing"] == "center"
    state["settings"]["dino"]["balancing"] = "centre"
    state["settings"]["precision"] = "auto"  # it left the choice to every start
    assert list(state["objective"]) == ["center"]
    state["objective"] = {"centre": state["objective"]["center"]}
    torch.save(state, path)
    (copied / "settings.yaml").write_text(yaml.safe_dump(state["settings"]))
    flags = " ".join(SMALL)
    for group, names in OLD_NAMES.items():
        for name, old in names.items():
            flags = flags.replace(f"--{group}.{name}=", f"--{group}.{old}=")
    assert flags.count("_size=") == 3
    done = call(pretrain.main, ["--data.path", photos, "--out", copied, *flags.split(), "--resume"])
    assert done.returncode == 0, done.stderr
    assert "from step 15" in done.stderr
    assert_same_weights(copied, reference)
    assert losses(copied) == losses(reference)


def test_a_run_of_before_a_setting_existed_is_resumed(photos: Path, copied: Path) -> None:
    path = copied / "checkpoints" / "step-20.pt"
    state = torch.load(path, weights_only=True)
    for name in ("value_output", "query_key", "depth_scale", "patches", "positions"):
        del state["settings"]["model"][name]
    torch.save(state, path)
    (copied / "settings.yaml").write_text(yaml.safe_dump(state["settings"]))
    train(photos, copied, "--resume")
    other = run(photos, copied, "--model.depth_scale=2", "--resume")
    assert other.returncode == 2
    assert "depth_scale is 1.0 there and 2.0 here" in other.stderr
    today = run(photos, copied, "--model.patches=whitened", "--resume")
    assert today.returncode == 2
    assert "patches is 'default' there and 'whitened' here" in today.stderr


def test_measurement_that_was_due_is_made_up_for(photos: Path, copied: Path) -> None:
    """A run that was killed after its last checkpoint still ends with the monitor's last word."""
    (copied / "backbone.json").unlink()
    for _ in range(2):
        train(photos, copied, "--monitor.every_epochs=1", "--resume")
        assert len(logged(copied, "monitor/knn")) == 1
    assert (copied / "backbone.json").exists()


def test_foreign_val_folder_is_left_alone(photos: Path, tmp_path: Path) -> None:
    """ImageNet's validation images lie flat beside train; nobody asked for them."""
    shutil.copytree(photos, tmp_path / "train")
    (tmp_path / "val").mkdir()
    shutil.copy(next(photos.rglob("*.png")), tmp_path / "val" / "flat.png")
    assert "every tenth image" in train(tmp_path / "train", tmp_path / "run", *ONE_EPOCH, "--monitor.every_epochs=1")


def test_damaged_checkpoint_is_named(photos: Path, copied: Path) -> None:
    target = copied / "checkpoints" / "step-20.pt"
    target.write_bytes(target.read_bytes()[:1000])
    done = run(photos, copied, "--resume")
    assert done.returncode == 2
    assert "last.pt cannot be read as a checkpoint" in error_line(done.stderr)


def test_a_folder_copied_without_links_is_still_a_run(photos: Path, copied: Path, reference: Path) -> None:
    back_to_step_15(copied)
    (copied / "checkpoints" / "last.pt").unlink()
    (copied / ".metrics.jsonl.4242").write_text("left by a process that was killed")
    lines = (copied / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copied / "metrics.jsonl").write_text("".join(lines[:12]))
    assert "already holds a run" in error_line(run(photos, copied).stderr)
    said = train(photos, copied, "--resume")
    assert "last.pt is missing: goes on from step-15.pt" in said
    assert re.search(r"metrics.jsonl has no lines of steps \d+ to 15", said)
    assert not (copied / ".metrics.jsonl.4242").exists()
    assert_same_weights(copied, reference)


def test_other_images_and_a_starving_class_token_are_said(photos: Path, tmp_path: Path) -> None:
    images = shutil.copytree(photos, tmp_path / "images")
    said = train(images, tmp_path / "run", *ONE_EPOCH, "--model.pool=cls")
    assert "without skip connections a class token hardly sees the patches" in said
    assert "learns better with --optimizer.name soap" in said
    again = ["--model.pool=cls", "--resume"]
    assert "other images" not in train(images, tmp_path / "run", *ONE_EPOCH, *again)
    for path in images.rglob("*.png"):
        Image.open(path).resize((40, 40)).save(path)
    assert "other images than before, by their content" in train(images, tmp_path / "run", *ONE_EPOCH, *again)
    path.rename(path.with_name("other.png"))
    assert "other images than before, by their names" in train(images, tmp_path / "run", *ONE_EPOCH, *again)


def test_tasks_of_srun_without_torchrun_are_refused(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    assert "srun started 2 tasks" in error_line(run(photos, tmp_path / "run").stderr)
    assert not (tmp_path / "run").exists()


def field_names(kind: type, prefix: str = "") -> list[str]:
    hints = typing.get_type_hints(kind)
    names: list[str] = []
    for field in dataclasses.fields(kind):
        inner = hints[field.name]
        group = dataclasses.is_dataclass(inner)
        names += field_names(typing.cast(type, inner), f"{prefix}{field.name}.") if group else [prefix + field.name]
    return names


@pytest.mark.parametrize("kind", [Settings, supervised.Settings])
def test_help_explains_every_setting(kind: type, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.parse(kind, ["--help-all"])
    options = re.split(r"\n  (?=--)", capsys.readouterr().out)
    assert len(field_names(kind)) > 50
    for name in field_names(kind):
        option = next((o for o in options if o.startswith((f"--{name} ", f"--{name}\n"))), "")
        explanation = re.sub(r"\((required|type|default).*", "", option, flags=re.S).split(maxsplit=2)[-1]
        assert len(explanation.split()) >= 4, f"--{name} is not explained"


def test_steps_draw_the_same_images_from_any_start() -> None:
    def keys(start: int) -> list[list[tuple[int, int]]]:
        return list(StepBatches(images=10, batch=4, accumulate=2, seed=3, start=start, total=5))

    whole = keys(0)
    assert keys(3) == whole[6:]
    assert [len(micro) for micro in whole] == [2] * 10
    assert [micro[0][0] for micro in whole] == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    first_epoch = [index for micro in whole[:4] for _, index in micro]
    assert len(set(first_epoch)) == 8
    assert first_epoch != [index for micro in whole[4:8] for _, index in micro]


# Three groups of two processes, one after the other, forked before torch has done anything; each ends as Python does.
ENDING = """
import os, sys
from skipless.common import cli, distributed
import torch, torch._dynamo  # which DistributedDataParallel would import in each of them
from torch import nn

def work():
    distributed.start("cpu")
    model = nn.parallel.DistributedDataParallel(nn.Linear(64, 8))
    for _ in range(30):
        model(torch.randn(8, 64)).sum().backward()
        distributed.any_process(False)
    distributed.gather_objects(3)

for group in range(3):
    children = []
    for rank in range(2):
        children.append(os.fork())
        if not children[-1]:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
                           "MASTER_PORT": sys.argv[1 + group]}
            cli.guard(work)
            sys.exit()
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
"""


def test_processes_of_a_group_end_well(free_ports: list[str]) -> None:
    """Three times, since one that does not wait for the other's last exchange is aborted now and then only."""
    subprocess.run([sys.executable, "-P", "-c", ENDING, *free_ports], check=True, timeout=120)


@pytest.fixture
def free_ports() -> list[str]:
    import socket

    sockets = [socket.socket() for _ in range(3)]
    for each in sockets:
        each.bind(("localhost", 0))
    ports = [str(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports
