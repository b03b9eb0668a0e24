"""Sharded training: the curve, teacher and export of an unsharded run, and checkpoints for any number of processes."""

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, call, error_line, load, logged, run_group
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader

from skipless.eval.backbones import load_backbone
from skipless.ssl import pretrain
from skipless.ssl.run.checkpoints import load_run_backbone
from skipless.ssl.run.parallel import clip_grad_norm

scaling = load(ROOT / "benchmarks" / "scaling.py")
SMALL = [
    "--model.dim=32", "--model.depth=2", "--model.heads=2", "--model.patch=8", "--model.registers=2",
    "--crops.global_crops_size=32", "--crops.local_crops_size=16", "--crops.local_crops_number=2", "--dino.out_dim=33",
    "--dino.hidden_dim=32", "--dino.bottleneck_dim=16", "--dino.momentum_teacher=0.9", "--dino.freeze_last_layer=0.5",
    "--optimizer.warmup_epochs=1", "--optimizer.lr=0.02", "--batch_size=8", "--epochs=2", "--log_every=1",
    "--ibot.loss_weight=1", "--gram.loss_weight=2",
    "--monitor.every_epochs=1", "--monitor.conditioning=true", "--device=cpu", "--data.workers=0", "--precision=fp32",
]  # fmt: skip

UNWATCHED = ["--monitor.every_epochs=0", "--monitor.conditioning=false"]
COMMAND = "skipless.ssl.pretrain"


def words(images: Path, out: Path, *more: object) -> list[object]:
    return ["--data.path", images, "--out", out, *SMALL, *more]


def assert_same_run(folder: Path, reference: Path) -> None:
    """Within what float32 leaves open: losses, gradient norms, and the teacher."""
    for name in ("loss", "teacher_entropy", "gradient_norm"):
        expected = logged(reference, name)
        assert len(expected) == 10
        np.testing.assert_allclose(logged(folder, name), expected, rtol=1e-4, atol=1e-5, err_msg=name)
    expected_tensors = load_file(reference / "backbone.safetensors")
    tensors = load_file(folder / "backbone.safetensors")
    assert tensors.keys() == expected_tensors.keys()
    for name, tensor in tensors.items():
        if name.endswith("qkv.bias"):  # the gradient of a key's bias is 0 but for rounding, which AdamW scales up
            tensor.chunk(3)[1].zero_()
            expected_tensors[name].chunk(3)[1].zero_()
        torch.testing.assert_close(tensor, expected_tensors[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.fixture(scope="session")
def runs(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps each: in one process and unsharded, and sharded over two, with one micro-batch a step and with two."""
    root = tmp_path_factory.mktemp("runs")
    assert call(pretrain.main, words(photos, root / "plain")).returncode == 0
    run_group(COMMAND, words(photos, root / "sharded", "--shard=true"))
    micro = ["--shard=true", "--accumulate=2", "--model.checkpoint_activations=true"]
    run_group(COMMAND, words(photos, root / "micro", *micro))
    return root


@pytest.fixture
def halfway(runs: Path, tmp_path: Path) -> Path:
    """The sharded run as if it had been killed just after its fifth step, while it wrote."""
    folder = tmp_path / "halfway"
    shutil.copytree(runs / "sharded", folder, symlinks=True)
    for name in ("backbone.json", "backbone.safetensors"):
        (folder / name).unlink()
    (folder / "checkpoints" / "step-10").rename(folder / "checkpoints" / ".step-10")
    (folder / "checkpoints" / "last.pt").unlink()
    (folder / "checkpoints" / "last.pt").symlink_to("step-5/state.pt")
    return folder


@pytest.mark.parametrize("name", ["sharded", "micro"])
def test_sharded_run_equals_unsharded(runs: Path, name: str) -> None:
    assert min(logged(runs / "plain", "gradient_norm")) > 3  # clip_grad: every step is clipped
    assert_same_run(runs / name, runs / "plain")


def test_monitor_sees_the_same_teacher(runs: Path) -> None:
    for name in ("monitor/knn", "monitor/effective_rank", "monitor/conditioning/kurtosis"):
        expected = logged(runs / "plain", name)
        assert len(expected) == 3
        np.testing.assert_allclose(logged(runs / "sharded", name), expected, rtol=1e-3, err_msg=name)


def test_checkpoint_is_a_whole_folder_with_the_teachers_backbone(runs: Path) -> None:
    checkpoints = runs / "sharded" / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["last.pt", "step-10", "step-5"]
    assert torch.load(checkpoints / "last.pt", weights_only=True)["step"] == 10
    last = load_run_backbone(checkpoints / "step-10")[0].state_dict()
    final, about = load_run_backbone(runs / "sharded")
    assert about["processes"] == 2
    for name, tensor in final.state_dict().items():
        assert torch.equal(tensor, last[name])
    assert load_backbone(checkpoints / "step-5").model.depth == 2


def test_each_process_holds_half_of_everything(runs: Path) -> None:
    index = FileSystemReader(runs / "sharded" / "checkpoints" / "step-10").read_metadata().state_dict_metadata
    for part in ("student.backbone.pos_embed", "teacher.backbone.cls_token", "optimizer.0.exp_avg"):
        assert part in index
    for name, tensor in index.items():
        if tensor.size:  # the optimizer counts its steps in scalars
            assert len(tensor.chunks) == 2, name
            assert all(0.45 < chunk.sizes.numel() / tensor.size.numel() < 0.55 for chunk in tensor.chunks), name


def test_resumed_on_any_number_of_processes(photos: Path, runs: Path, halfway: Path) -> None:
    folders = {n: shutil.copytree(halfway, halfway.with_name(f"on-{n}"), symlinks=True) for n in (2, 4)}
    for processes, folder in folders.items():
        first, *_ = run_group(COMMAND, words(photos, folder, "--shard=true", "--resume", *UNWATCHED), processes)
        assert "from step 5" in first.stderr
    for folder in folders.values():
        assert_same_run(folder, runs / "plain")
        assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["last.pt", "step-10", "step-5"]
    uninterrupted = load_file(runs / "sharded" / "backbone.safetensors")
    for name, tensor in load_file(folders[2] / "backbone.safetensors").items():
        assert torch.equal(tensor, uninterrupted[name]), name


@pytest.mark.parametrize("name", ["soap", "muon"])
def test_optimizers_of_whole_matrices(photos: Path, tmp_path: Path, name: str) -> None:
    """As an unsharded run, and the same bits once more when it is resumed on as many processes. The turns of SOAP's
    bases depend on the number of processes, so its curve is compared with all of them refreshed in every step."""
    optimizer = [f"--optimizer.name={name}", "--optimizer.lr=0.005", *UNWATCHED]
    every, stopped = "--optimizer.precondition_every", tmp_path / "stopped"
    assert call(pretrain.main, words(photos, tmp_path / "plain", *optimizer, f"{every}=1")).returncode == 0
    run_group(COMMAND, words(photos, stopped, *optimizer, f"{every}=4", "--shard=true"))
    sharded = stopped
    if name == "soap":
        sharded = tmp_path / "sharded"
        run_group(COMMAND, words(photos, sharded, *optimizer, f"{every}=1", "--shard=true"))
    expected = logged(tmp_path / "plain", "loss")
    np.testing.assert_allclose(logged(sharded, "loss"), expected, rtol=1e-3)
    whole = load_file(stopped / "backbone.safetensors")

    for file in ("backbone.json", "backbone.safetensors", "checkpoints/last.pt"):
        (stopped / file).unlink()
    (stopped / "checkpoints" / "last.pt").symlink_to("step-5/state.pt")
    shutil.rmtree(stopped / "checkpoints" / "step-10")
    again = shutil.copytree(stopped, tmp_path / "again", symlinks=True)
    for processes, folder in ((2, again), (1, stopped)):
        resumed = words(photos, folder, *optimizer, f"{every}=4", "--shard=true", "--resume")
        assert "from step 5" in run_group(COMMAND, resumed, processes)[0].stderr
    for tensor_name, tensor in load_file(again / "backbone.safetensors").items():
        assert torch.equal(tensor, whole[tensor_name]), tensor_name
    np.testing.assert_allclose(logged(stopped, "loss"), expected, rtol=1e-2)


def refused(images: Path, out: Path, *more: object) -> str:
    """The sentence with which a group of one process refuses a sharded run."""
    (done,) = run_group(COMMAND, words(images, out, "--shard=true", *more), processes=1, succeed=False)
    assert done.returncode == 2
    return error_line(done.stderr)


def test_sharded_and_plain_checkpoints_are_not_mixed(photos: Path, runs: Path, halfway: Path) -> None:
    plain = call(pretrain.main, words(photos, halfway, "--resume"))
    assert "shard is True there and False here" in error_line(plain.stderr)
    assert "shard is False there and True here" in refused(photos, runs / "plain", "--resume")


def test_bad_settings_end_with_one_sentence(photos: Path, tmp_path: Path) -> None:
    alone = call(pretrain.main, words(photos, tmp_path / "run", "--shard=true"))
    assert "shard is true, but no launcher has started the processes" in error_line(alone.stderr)
    assert not (tmp_path / "run").exists()


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("owned",)


def test_damaged_or_malicious_checkpoint_is_named(photos: Path, halfway: Path) -> None:
    broken = {name: shutil.copytree(halfway, halfway.with_name(name), symlinks=True) for name in ("bad", "no", "half")}
    (broken["bad"] / "checkpoints" / "step-5" / ".metadata").write_bytes(pickle.dumps(Malicious()))
    (broken["no"] / "checkpoints" / "step-5" / ".metadata").unlink()
    (broken["half"] / "checkpoints" / "step-5" / "__1_0.distcp").unlink()
    errors = {name: refused(photos, folder, "--resume") for name, folder in broken.items()}
    assert all("step-5 cannot be read as a sharded checkpoint (" in error for error in errors.values())
    assert "its index refers to posix.mkdir" in errors["bad"]
    assert not Path("owned").exists()


def test_scaling_by_hand() -> None:
    """A ViT-S has 12 blocks of 12 D^2 + 13 D parameters, D = 384; ten crops have 690 tokens."""
    small = scaling.count("small")
    assert small.blocks == 12 * (12 * 384**2 + 13 * 384) == 21_293_568
    # Token and positions (198 D), patch embedding (768 D + D), norm (2 D).
    assert small.backbone == small.blocks + 384 * (198 + 769 + 2)
    # Layers of 384 -> 2048 -> 2048 -> 256 with biases, prototypes and their lengths.
    assert small.head == 384 * 2048 + 2048 + 2048**2 + 2048 + 2048 * 256 + 256 + 65536 * 257
    assert small.activations == 690 * 384 * 36 * 12 + 40 * 65536
    # The fused matrix of queries, keys and values: two moments, two square matrices for each side. A bias has none.
    assert scaling.soap_state((1152, 384)) == 8 * 1152 * 384 + 8 * (1152**2 + 384**2)
    assert scaling.soap_state((1152,)) == 8 * 1152
    # Two matrices of 4 x 2, one for each GPU, and half of a bias.
    assert scaling.sharded_soap([(4, 2), (4, 2), (6,)], 2) == {
        "state": 8 * 8 + 8 * (4**2 + 2**2) + 8 * 3,
        "during_a_step": 16 * 8,
        "sent": 4 * (2 * 8 + 8) // 2,  # half of it stays at home
        "gpus_without_a_matrix": 0,
    }
    parameters = small.backbone + small.head
    assert scaling.memory_ddp(small) == 22 * parameters
    rest = parameters - small.blocks
    assert scaling.memory_fsdp(small, 8, 1) == pytest.approx(2.5 * parameters + 10 * small.blocks / 12 + 12 * rest)
    assert scaling.sent_ddp(small, 8) == 7 * parameters
    assert scaling.sent_fsdp(small, 8, 1) == pytest.approx(7 / 8 * (6 * small.blocks + 8 * rest + 4 * parameters))
    assert (scaling.seconds(900e9, 8), scaling.seconds(900e9, 64)) == (2, 2.25)


def test_tables_of_the_page_are_the_scripts() -> None:
    page = (ROOT / "docs" / "scaling.md").read_text().splitlines()
    models = scaling.compute()["models"]
    rows = [*scaling.memory_table(models), *scaling.step_table(models)]
    assert len(rows) == 20
    assert not [row for row in rows if row not in page]


@pytest.mark.parametrize("limit", [1.0, 100.0])
def test_clipping_without_shards_is_torchs(limit: float) -> None:
    """Gradients (3, 4) and 12 have the norm 13."""
    first, second = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(()))
    first.grad, second.grad = torch.tensor([3.0, 4.0]), torch.tensor(12.0)
    assert clip_grad_norm([first, second], limit).item() == pytest.approx(13)
    assert first.grad[1].item() == pytest.approx(4 * min(1, limit / 13))
