"""The training command as a user runs it: its equivalences, its endings, and its errors."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from skipless.common import cli
from skipless.datasets.images import open_images
from skipless.ssl import supervised
from skipless.ssl.config import embedding_of
from skipless.ssl.data.loader import StepBatches
from skipless.ssl.data.squares import normalized_squares
from skipless.ssl.model.embedding import sine_positions_, whiten_patches_
from skipless.ssl.model.initialization import PRESETS, choose_beta
from skipless.ssl.model.vit import VisionTransformer
from skipless.ssl.pretrain import Settings, build_model
from skipless.ssl.run.checkpoints import load_run_backbone
from skipless.ssl.run.job import whiten

ROOT = Path(__file__).parent.parent.parent
SMALL = [
    "--model.dim=32", "--model.depth=2", "--model.heads=2", "--model.patch=8", "--crops.global_crops_size=32",
    "--crops.local_crops_size=16", "--crops.local_crops_number=2", "--dino.out_dim=32", "--dino.hidden_dim=32",
    "--dino.bottleneck_dim=16", "--dino.freeze_last_layer=0.5", "--optimizer.warmup_epochs=1",
    "--optimizer.lr=0.02", "--batch_size=8", "--epochs=4", "--log_every=1", "--monitor.every_epochs=0",
    "--device=cpu", "--data.workers=0", "--precision=fp32",
]  # fmt: skip


def run(*arguments: object, processes: int = 1, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launcher, ROOT / "ssl" / "pretrain.py", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=timeout, env=environment)


def logged(folder: Path, name: str) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [entry[name] for entry in map(json.loads, lines) if name in entry]


def losses(folder: Path) -> list[float]:
    return logged(folder, "loss")


@pytest.fixture(scope="session")
def reference(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, one micro-batch, 20 steps, uninterrupted."""
    out = tmp_path_factory.mktemp("runs") / "reference"
    result = run("--data.path", photos, "--out", out, *SMALL)
    assert result.returncode == 0, result.stderr
    return out


def test_a_run_leaves_what_evaluation_needs(reference: Path) -> None:
    assert len(losses(reference)) == 20
    settings = yaml.safe_load((reference / "settings.yaml").read_text())
    assert settings["model"]["dim"] == 32
    assert settings["model"]["residual"] is False
    backbone, about = load_run_backbone(reference)
    assert about["architecture"]["residual"] is False
    state = torch.load(reference / "checkpoints" / "last.pt", weights_only=True)
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
    result = run("--data.path", photos, "--out", out, *SMALL, f"--accumulate={accumulate}", processes=processes)
    assert result.returncode == 0, result.stderr
    np.testing.assert_allclose(losses(out), losses(reference), atol=1e-4, rtol=0)
    # AdamW and clipping hide the gradient's scale from the loss curve.
    np.testing.assert_allclose(logged(out, "gradient_norm"), logged(reference, "gradient_norm"), rtol=1e-2)


def test_two_processes_balance_and_measure_as_one(photos: Path, tmp_path: Path) -> None:
    """Sinkhorn-Knopp over the whole batch, and the k-NN monitor over all images."""
    more = ["--dino.balancing=sinkhorn", "--monitor.every_epochs=2", "--precision=bf16"]
    for processes in (1, 2):
        result = run("--data.path", photos, "--out", tmp_path / str(processes), *SMALL, *more, processes=processes)
        assert result.returncode == 0, result.stderr
    one, two = tmp_path / "1", tmp_path / "2"
    np.testing.assert_allclose(losses(two)[:5], losses(one)[:5], atol=2e-2, rtol=0)  # bf16
    assert len(logged(two, "monitor/knn")) == len(logged(one, "monitor/knn")) == 3
    np.testing.assert_allclose(logged(two, "monitor/knn")[0], logged(one, "monitor/knn")[0], atol=1e-6)


def test_crops_made_where_the_model_trains_are_the_same_crops(photos: Path, reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = run(
        "--data.path", photos, "--out", out, *SMALL, "--crops.device=device", "--data.workers=1", "--precision=bf16"
    )
    assert result.returncode == 0, result.stderr
    assert "crops: made on cpu" in result.stderr
    np.testing.assert_allclose(losses(out), losses(reference), atol=0.05, rtol=0)
    assert all(0 < share < 1 for share in logged(out, "data_share"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.pt", weights_only=True)


@pytest.mark.parametrize("optimizer", ["adamw", "soap"])
def test_killed_and_resumed_run_is_bit_identical(photos: Path, tmp_path: Path, optimizer: str) -> None:
    settings = [*SMALL, f"--optimizer.name={optimizer}", "--precision=bf16"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run("--data.path", photos, "--out", whole, *settings).returncode == 0
    command = [sys.executable, ROOT / "ssl" / "pretrain.py", "--data.path", photos, "--out", killed, *settings]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    kill_after = int(np.random.default_rng().integers(6, 15))
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if (killed / "metrics.jsonl").exists() and len(losses_so_far(killed)) >= kill_after:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    result = run("--data.path", photos, "--out", killed, *settings, "--resume")
    assert result.returncode == 0, result.stderr
    a, b = weights(whole), weights(killed)
    for part in ("student", "teacher", "objective"):
        for name, tensor in a[part].items():
            assert torch.equal(tensor, b[part][name]), (part, name, kill_after)
    assert losses(killed) == losses(whole)


def losses_so_far(folder: Path) -> list[str]:
    return [line for line in (folder / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_to_the_whole_job_saves_and_ends_cleanly(
    photos: Path, reference: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """As a scheduler does it: every process of the job gets the signal, loader workers too."""
    out = tmp_path / "run"
    arguments = ["--data.path", photos, "--out", out, *SMALL, "--data.workers=1"]
    process = subprocess.Popen(
        list(map(str, [sys.executable, ROOT / "ssl" / "pretrain.py", *arguments])),
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not ((out / "metrics.jsonl").exists() and losses_so_far(out)):
        time.sleep(0.002)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "interrupted after step" in errors
    assert "Traceback" not in errors
    assert not (out / "backbone.json").exists()
    assert run(*arguments, "--resume").returncode == 0
    np.testing.assert_allclose(losses(out), losses(reference), atol=1e-6)


def test_collapse_is_called_so_while_it_trains(photos: Path, reference: Path, tmp_path: Path) -> None:
    """A teacher this hot is uniform: the loss cannot leave ln K, and the run says so once, with a remedy."""
    hot = ["--dino.teacher_temp=50"]
    result = run("--data.path", photos, "--out", tmp_path / "run", *SMALL, *hot)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("WARNING at step") == 1
    assert "the teacher is uniform and the loss sits at ln K = 3.47" in result.stderr
    assert "--dino.teacher_temp" in result.stderr


def test_monitor_measures_every_block_before_and_after(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = run(
        "--data.path",
        photos,
        "--out",
        out,
        *SMALL,
        "--epochs=1",
        "--monitor.every_epochs=1",
        "--optimizer.warmup_epochs=0",
    )
    assert result.returncode == 0, result.stderr
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    measured = {entry["step"]: entry for entry in entries if "monitor/knn" in entry}
    assert sorted(measured) == [0, 5]
    for name, lowest, highest in (("knn", 0, 1), ("mean_share", 0, 1), ("effective_rank", 1, 16)):
        values = measured[5][f"monitor/{name}"]
        assert len(values) == 2
        assert all(lowest <= value <= highest for value in values)


def test_monitor_logs_the_conditioning_of_images_without_labels(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = run(*SMALL, f"--data.path={photos / 'blobs'}", f"--out={out}", "--epochs=2", "--monitor.every_epochs=2",
               "--monitor.conditioning=true", "--model.residual=false", "--model.c=2")  # fmt: skip
    assert done.returncode == 0, done.stderr
    start, end = logged(out, "monitor/conditioning/value_output_condition")
    # W_V W_O starts as c^2 = 4 times an orthogonal matrix, and does not stay one.
    np.testing.assert_allclose(start, [1, 1], rtol=1e-3)
    assert min(end) > 1.00003
    np.testing.assert_allclose(logged(out, "monitor/conditioning/value_output_largest")[0], [4, 4], rtol=1e-3)
    assert len(logged(out, "monitor/conditioning/kurtosis")) == 2
    assert not logged(out, "monitor/knn")


@pytest.mark.parametrize("usual", [True, False])
def test_beta_is_chosen_on_the_images_and_a_resumed_run_keeps_it(photos: Path, tmp_path: Path, usual: bool) -> None:
    out, common = tmp_path / "run", [*SMALL, f"--data.path={photos}", "--model.beta=auto", "--model.residual=false"]
    common += ["--model.patches=default", "--model.positions=default"] * usual
    done = run(*common, f"--out={out}", processes=2)
    assert done.returncode == 0, done.stderr
    beta = yaml.safe_load((out / "settings.yaml").read_text())["model"]["beta"]
    torch.manual_seed(0)
    model = VisionTransformer(32, 2, 2, patch=8, residual=False, image_size=32)
    squares = normalized_squares(open_images(photos), 32, 32)
    if not usual:
        whiten_patches_(model.patch_embed.proj, normalized_squares(open_images(photos), 512, 32))
        sine_positions_(model)
    assert beta == choose_beta(model, squares, PRESETS["small"])
    assert f"model.beta is {beta:g}: chosen on 32 of the images" in done.stdout + done.stderr
    state = torch.load(out / "checkpoints" / "last.pt", weights_only=True)
    assert state["settings"]["model"]["beta"] == beta
    resumed = run(*common, f"--out={out}", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert f"model.beta is {beta:g}: as in the run so far" in resumed.stdout + resumed.stderr


def test_a_run_without_a_beta_is_not_resumed_with_a_chosen_one(photos: Path, tmp_path: Path) -> None:
    common = [*SMALL, f"--data.path={photos}", f"--out={tmp_path / 'run'}", "--model.residual=false"]
    assert run(*common).returncode == 0
    resumed = run(*common, "--resume", "--model.beta=auto")
    assert resumed.returncode == 2
    assert "is of a run that named no model.beta; leave it out" in resumed.stderr


@pytest.mark.parametrize("kind", [Settings, supervised.Settings])
def test_small_has_an_embedding_of_its_own_and_all_others_have_the_usual_one(kind: type) -> None:
    def start_of(*words: str) -> tuple[str, str]:
        root = "--data.path=x" if kind is Settings else "--data.root=x"
        return embedding_of(cli.parse(kind, [root, "--out=x", *words]).model)

    usual, ours = ("default", "default"), ("whitened", "sines")
    assert start_of() == start_of("--model.init=small") == ours
    for words in (["--model.residual=true"], ["--model.init=paper-dino"], ["--model.init=default"]):
        assert start_of(*words) == usual
    assert start_of("--model.residual=true", "--model.patches=whitened") == ("whitened", "default")
    assert start_of("--model.positions=default") == ("whitened", "default")
    for path in (ROOT / "configs").glob("*.yaml"):
        if ("supervised" in path.name) == (kind is not Settings):
            small = path.name in ("imagenette_cpu.yaml", "one_gpu.yaml", "supervised_small.yaml")
            assert start_of(f"--config={path}") == (ours if small else usual), path
            assert start_of(f"--config={path}", "--model.init=null", "--model.residual=true") == usual, path


def test_a_small_skipless_model_starts_from_whitened_patches_and_sines(photos: Path, tmp_path: Path) -> None:
    still = ["--optimizer.lr=1e-12", "--optimizer.min_lr=0", "--optimizer.weight_decay=0"]
    still += ["--optimizer.weight_decay_end=0", "--model.residual=false"]
    done = run("--data.path", photos, "--out", tmp_path / "out", *SMALL, *still)
    assert done.returncode == 0, done.stderr
    model = VisionTransformer(32, 2, 2, patch=8, residual=False, image_size=32)
    whiten_patches_(model.patch_embed.proj, normalized_squares(open_images(photos), 40, 32))
    sine_positions_(model)
    trained = load_run_backbone(tmp_path / "out")[0].state_dict()
    torch.testing.assert_close(trained["patch_embed.proj.weight"], model.patch_embed.proj.weight.detach())
    torch.testing.assert_close(trained["patch_embed.proj.bias"], model.patch_embed.proj.bias.detach())
    torch.testing.assert_close(trained["pos_embed"][:, 1:], model.pos_embed[:, 1:].detach())


def test_a_resumed_run_reads_no_images_to_whiten_patches(reference: Path) -> None:
    words = [*SMALL, "--data.path=x", f"--out={reference}"]
    backbone = build_model(cli.parse(Settings, words)).backbone
    before = backbone.patch_embed.proj.weight.clone()
    whiten(backbone, cli.parse(Settings, [*words, "--resume"]), [], 32)  # type: ignore[arg-type]
    assert torch.equal(backbone.patch_embed.proj.weight, before)
    with pytest.raises(ValueError, match="none of 0 images"):
        whiten(backbone, cli.parse(Settings, words), [], 32)  # type: ignore[arg-type]


def test_unreadable_images_are_listed_and_too_many_stop_the_run(photos: Path, tmp_path: Path) -> None:
    import shutil

    data = tmp_path / "data"
    shutil.copytree(photos, data)
    broken = sorted(data.rglob("*.png"))[3]
    broken.write_bytes(b"no picture")
    tolerant = run("--data.path", data, "--out", tmp_path / "a", *SMALL, "--data.max_unreadable=0.1")
    assert tolerant.returncode == 0, tolerant.stderr
    assert broken.name in (tmp_path / "a" / "unreadable.txt").read_text()
    strict = run("--data.path", data, "--out", tmp_path / "b", *SMALL)
    assert strict.returncode == 2
    assert broken.name in strict.stderr
    assert "data.max_unreadable (0.01)" in strict.stderr
    assert "Traceback" not in strict.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--optimzer.lr=1"], ["optimzer"]),
        (["--optimizer.lr=fast"], ["optimizer.lr", "fast"]),
        (["--data.path=/nowhere/photos"], ["/nowhere/photos", "no such folder"]),
        (["--data.path={empty}"], ["{empty}", "no image found"]),
        (["--crops.local_crops_size=20"], ["crops.local_crops_size is 20", "model.patch 8", "16 or 24"]),
        (["--crops.global_crops_size=60"], ["crops.global_crops_size is 60", "56 or 64"]),
        (["--batch_size=64"], ["40 images", "batch_size"]),
        (["--accumulate=3"], ["batch_size 8", "3 micro-batches"]),
        (["--model.drop_path=0.1"], ["drop_path", "residual=False"]),
        (["--model.attention=xformers"], ["xformers", "CUDA"]),
        (["--compile=true"], ["compile is true", "CPU"]),
        (["--config={empty}/none.yaml"], ["none.yaml"]),
        (["--epochs=0"], ["epochs is 0"]),
        (["--dino.freeze_last_layer=4"], ["dino.freeze_last_layer is 4", "4 epochs"]),
        (["--out={photos}"], ["{photos}", "folder of its own"]),
        (["--clip_grad=-1"], ["clip_grad is -1", "0 for no clipping"]),
        (["--optimizer.warmup_epochs=4"], ["optimizer.warmup_epochs is 4", "4 epochs"]),
        (["--model.init=default", "--model.beta=2"], ["model.beta", "model.init"]),
        (["--model.residual=true", "--model.init=small", "--model.beta=auto"], ["model.beta", "model.residual"]),
        (["--model.beta=high"], ["model.beta", "high"]),
        (["--model.residual=false", "--model.query_key=false", "--model.beta=2"], ["model.beta", "model.query_key"]),
        (["--model.depth_scale=0"], ["model.depth_scale is 0", "positive"]),
        (["--out={reference}"], ["already holds a run", "--resume"]),
        (["--out={reference}", "--resume", "--model.dim=64"], ["another architecture", "dim is 32 there and 64 here"]),
        (["--out={reference}", "--resume", "--epochs=9"], ["other settings", "epochs is 4 there and 9 here"]),
    ],
)
def test_bad_input_ends_with_one_sentence_and_exit_code_2(
    photos: Path, reference: Path, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    places = {"empty": empty, "reference": reference, "photos": photos}
    before = {path: path.stat().st_mtime_ns for path in reference.rglob("*")}
    result = run("--data.path", photos, "--out", tmp_path / "out", *SMALL, *(a.format(**places) for a in arguments))
    assert result.returncode == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word.format(**places) in lines[0]
    assert not (tmp_path / "out").exists()
    assert {path: path.stat().st_mtime_ns for path in reference.rglob("*")} == before


def test_a_run_of_before_a_setting_existed_is_resumed(photos: Path, reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(reference, out)
    path = out / "checkpoints" / "last.pt"
    state = torch.load(path, weights_only=True)
    for name in ("value_output", "query_key", "depth_scale", "patches", "positions"):
        del state["settings"]["model"][name]
    path.unlink()
    torch.save(state, path)
    common = [*SMALL, f"--data.path={photos}", f"--out={out}", "--resume"]
    theirs = ["--model.patches=default", "--model.positions=default"]
    done = run(*common, *theirs)
    assert done.returncode == 0, done.stderr
    other = run(*common, *theirs, "--model.depth_scale=2")
    assert other.returncode == 2
    assert "depth_scale is 1.0 there and 2.0 here" in other.stderr
    today = run(*common)
    assert today.returncode == 2
    assert "patches is 'default' there and 'whitened' here" in today.stderr


def test_other_images_are_not_resumed_on(photos: Path, reference: Path, tmp_path: Path) -> None:
    import shutil

    fewer, out = tmp_path / "photos", tmp_path / "run"
    shutil.copytree(photos, fewer)
    sorted(fewer.rglob("*.png"))[0].unlink()
    shutil.copytree(reference, out, symlinks=True)
    result = run("--data.path", fewer, "--out", out, *SMALL, "--resume")
    assert result.returncode == 2
    assert "is of a run on 40 images" in result.stderr


def test_measurement_that_was_due_is_made_up_for(photos: Path, reference: Path, tmp_path: Path) -> None:
    """A run that was killed after its last checkpoint still ends with the monitor's last word."""
    import shutil

    out = tmp_path / "run"
    shutil.copytree(reference, out, symlinks=True)
    (out / "backbone.json").unlink()
    for _ in range(2):
        result = run("--data.path", photos, "--out", out, *SMALL, "--monitor.every_epochs=1", "--resume")
        assert result.returncode == 0, result.stderr
        assert len(logged(out, "monitor/knn")) == 1
    assert (out / "backbone.json").exists()


def test_foreign_val_folder_is_left_alone(photos: Path, tmp_path: Path) -> None:
    """ImageNet's validation images lie flat beside train; nobody asked for them."""
    import shutil

    shutil.copytree(photos, tmp_path / "train")
    (tmp_path / "val").mkdir()
    shutil.copy(next(photos.rglob("*.png")), tmp_path / "val" / "flat.png")
    arguments = [
        "--data.path",
        tmp_path / "train",
        "--out",
        tmp_path / "run",
        *SMALL,
        "--epochs=1",
        "--optimizer.warmup_epochs=0",
    ]
    result = run(*arguments, "--monitor.every_epochs=1")
    assert result.returncode == 0, result.stderr
    assert "every tenth image" in result.stderr


def test_damaged_checkpoint_is_named(photos: Path, reference: Path, tmp_path: Path) -> None:
    import shutil

    out = tmp_path / "run"
    shutil.copytree(reference, out, symlinks=True)
    target = out / "checkpoints" / "step-20.pt"
    target.write_bytes(target.read_bytes()[:1000])
    result = run("--data.path", photos, "--out", out, *SMALL, "--resume")
    assert result.returncode == 2
    assert "last.pt cannot be read as a checkpoint" in result.stderr
    assert "Traceback" not in result.stderr


def test_help_explains_every_setting() -> None:
    import dataclasses
    import typing

    from skipless.ssl.pretrain import Settings

    text = run("--help").stdout

    def fields(kind: type, prefix: str = "") -> list[str]:
        names: list[str] = []
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            inner = hints[field.name]
            if dataclasses.is_dataclass(inner):
                names += fields(typing.cast(type, inner), f"{prefix}{field.name}.")
            else:
                names.append(prefix + field.name)
        return names

    names = fields(Settings)
    assert len(names) > 60
    options = re.split(r"\n  (?=--)", text)
    for name in names:
        option = next((o for o in options if o.startswith(f"--{name} ") or o.startswith(f"--{name}\n")), "")
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


ENDING = """
import torch
from torch import nn
from skipless.common import distributed
from skipless.ssl.run.job import run_command

def work():
    distributed.start("cpu")
    model = nn.parallel.DistributedDataParallel(nn.Linear(64, 8))
    for _ in range(30):
        model(torch.randn(8, 64)).sum().backward()
        distributed.any_process(False)
    distributed.gather_objects(3)

run_command(work)
"""


def test_processes_of_a_group_end_well(run_two: Callable[[list[object]], list[tuple[str, str]]]) -> None:
    """Three times, since one that does not wait for the other's last exchange is aborted now and then only."""
    for _ in range(3):
        run_two([sys.executable, "-c", ENDING])
