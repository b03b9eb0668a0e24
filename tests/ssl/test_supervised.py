"""The supervised command as a user runs it, and its parts against hand calculations."""

import multiprocessing
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import call, error_line, logged, run_group, start
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from skipless.common import cli
from skipless.common.pixels import MEAN, STD
from skipless.datasets.labels.classes import arrays
from skipless.eval.backbones import load_backbone
from skipless.ssl.data.augmentation import Augmentation, TrainingImages, collate, mixing, prepare
from skipless.ssl.model.classifier import AttentionPool, Classifier, gather_into_cls_
from skipless.ssl.model.initialization import PRESETS, skipless_init_
from skipless.ssl.model.vit import Block, VisionTransformer
from skipless.ssl.run.checkpoints import load_run_backbone
from skipless.ssl.run.run import Run
from skipless.ssl.supervised import Settings, build_classifier, main, validate

ROOT = Path(__file__).parent.parent.parent
COLORS = np.array([[220, 40, 40], [40, 220, 40], [40, 40, 220]])
SMALL = [
    "--data.name=arrays", "--model.dim=32", "--model.depth=2", "--model.heads=2", "--model.patch=8",
    "--augmentation.size=16", "--optimizer.lr=0.05", "--optimizer.warmup_epochs=1", "--batch_size=8", "--epochs=3",
    "--log_every=1", "--device=cpu", "--data.workers=0", "--precision=fp32",
]  # fmt: skip
PLAIN = [f"--augmentation.{name}=0" for name in ("randaugment", "erasing", "mixup", "cutmix", "label_smoothing")]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 and 24 pictures in three colors, a class each."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, count in (("train", 32), ("val", 24)):
        labels = np.arange(count) % 3
        images = COLORS[labels][:, None, None] + rng.integers(-35, 36, (count, 18, 18, 3))
        np.savez(root / f"{split}.npz", images=images.astype(np.uint8), labels=labels)
    return root


def words(photos: Path, out: Path, *more: object) -> list[object]:
    return ["--data.root", photos, "--out", out, *SMALL, *more]


def fit(photos: Path, out: Path, *more: object) -> None:
    done = call(main, words(photos, out, *more))
    assert done.returncode == 0, done.stderr


def state(folder: Path) -> dict:
    return torch.load(folder / "checkpoints" / "last.pt", weights_only=True)


@pytest.mark.parametrize(
    "arm",
    [
        ["--model.residual=true", "--optimizer.name=adamw", "--model.pool=cls"],
        ["--model.init=small", "--optimizer.name=soap", "--model.pool=mean"],
        ["--model.init=paper-supervised", "--optimizer.name=muon", "--model.pool=attention"],
        ["--model.init=small", "--optimizer.name=muon", "--model.pool=gathering-cls"],
    ],
)
def test_colors_are_learned_and_the_run_leaves_what_evaluation_needs(
    photos: Path, tmp_path: Path, arm: list[str]
) -> None:
    out = tmp_path / "run"
    fit(photos, out, *PLAIN, "--epochs=8", *arm)
    assert logged(out, "val/top1")[-1] == 1.0
    assert len(logged(out, "val/top1")) == 8
    assert len(logged(out, "loss")) == 32
    assert list((out / "tensorboard").iterdir())
    backbone, about = load_run_backbone(out)
    assert about["validation"]["top1"] == 1.0
    assert about["validation"]["images"] == 24
    assert about["pool"] == ("cls" if "cls" in arm[-1] else "mean")
    assert yaml.safe_load((out / "settings.yaml").read_text()) == about["settings"]
    trained = state(out)["student"]
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, trained[f"backbone.{name}"])
    for path, weights in ((out, "teacher"), (out / "checkpoints" / "last.pt", "student")):
        evaluated = load_backbone(str(path), weights).model  # type: ignore[arg-type]
        assert torch.equal(evaluated.pos_embed, backbone.pos_embed)


@pytest.mark.parametrize(("optimizer", "stop"), [("adamw", 5), ("soap", 4), ("muon", 7)])
def test_interrupted_and_resumed_runs_are_bit_identical(
    photos: Path, tmp_path: Path, optimizer: str, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped by a signal within an epoch, or at its end, before its validation; and killed after a checkpoint."""
    everything_random = ["--model.residual=true", "--model.drop_path=0.3", "--augmentation.erasing=0.5"]
    more = [f"--optimizer.name={optimizer}", *everything_random, "--keep=9", "--precision=bf16"]
    whole, stopped, killed = tmp_path / "whole", tmp_path / "stopped", tmp_path / "killed"
    fit(photos, whole, *more)

    steps = iter(range(1, 13))
    with monkeypatch.context() as patch:
        patch.setattr(Run, "interrupted", lambda _: next(steps) == stop)
        assert call(main, words(photos, stopped, *more)).returncode == 128  # and the number of the signal
    assert state(stopped)["step"] == stop
    assert not (stopped / "backbone.json").exists()

    shutil.copytree(whole, killed, symlinks=True)
    (killed / "backbone.json").unlink()
    for step in (8, 12):
        (killed / "checkpoints" / f"step-{step}.pt").unlink()
    (killed / "checkpoints" / "last.pt").unlink()
    (killed / "checkpoints" / "last.pt").symlink_to("step-4.pt")

    for out in (stopped, killed):
        fit(photos, out, *more, "--resume")
        for name, tensor in state(whole)["student"].items():
            assert torch.equal(tensor, state(out)["student"][name]), (out.name, name)
        for name in ("loss", "gradient_norm", "val/top1", "val/loss"):
            assert logged(out, name) == logged(whole, name)
        assert (out / "backbone.json").exists()


def test_processes_and_micro_batches_do_not_change_the_curves(photos: Path, tmp_path: Path) -> None:
    """Mixing aside, which pairs the images of a micro-batch."""
    more = ["--augmentation.mixup=0", "--augmentation.cutmix=0", "--optimizer.name=muon", "--optimizer.lr=0.01"]
    one, two = tmp_path / "one", tmp_path / "two"
    fit(photos, one, *more)
    run_group("skipless.ssl.supervised", words(photos, two, *more, "--accumulate=2"))
    assert len(logged(two, "loss")) == 12
    np.testing.assert_allclose(logged(two, "loss"), logged(one, "loss"), atol=1e-4, rtol=0)
    # Optimizers hide the gradient's scale from the losses.
    np.testing.assert_allclose(logged(two, "gradient_norm"), logged(one, "gradient_norm"), rtol=1e-2)
    np.testing.assert_allclose(logged(two, "val/loss"), logged(one, "val/loss"), atol=1e-4, rtol=0)
    assert logged(two, "val/top1") == pytest.approx(logged(one, "val/top1"))


def test_signal_to_the_whole_job_saves_and_ends_cleanly(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = start("skipless.ssl.supervised", words(photos, out, "--epochs=500", "--data.workers=1"), session=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not ((out / "metrics.jsonl").exists() and logged(out, "loss")):
        time.sleep(0.01)
    os.killpg(command.process.pid, signal.SIGTERM)
    done = command.wait()
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "interrupted after step" in done.stderr
    assert "Traceback" not in done.stderr
    assert state(out)["step"] == len(logged(out, "loss"))


@given(seed=st.integers(0, 2**32), kind=st.sampled_from(["mixup", "cutmix"]))
def test_mixed_labels_are_in_the_proportion_of_the_mixed_pixels(seed: int, kind: str) -> None:
    """Image i is all i, of class i: the mean of a mixed image is what its label must expect."""
    augmentation = Augmentation(mixup=float(kind == "mixup"), cutmix=float(kind == "cutmix"))
    mix = mixing(augmentation, classes=6)
    assert mix is not None
    numbers = torch.arange(6)
    torch.manual_seed(seed)
    images, targets = mix(numbers.float()[:, None, None, None].expand(-1, 3, 8, 8).contiguous(), numbers)
    assert targets.shape == (6, 6)
    torch.testing.assert_close(targets.sum(1), torch.ones(6))
    assert targets.min() >= 0
    torch.testing.assert_close(images.mean((1, 2, 3)), targets @ numbers.float())


def test_each_batch_is_mixed_in_one_way_or_not_at_all() -> None:
    assert mixing(Augmentation(mixup=0, cutmix=0), 3) is None
    mix = mixing(Augmentation(), 2)
    assert mix is not None
    torch.manual_seed(0)
    cut = 0
    for _ in range(200):
        images, _ = mix(torch.tensor([0.0, 1.0])[:, None, None, None].repeat(1, 3, 8, 8), torch.arange(2))
        cut += bool(torch.isin(images, torch.tensor([0.0, 1.0])).all())
    assert 60 < cut < 140


def view(images: TrainingImages, epoch: int, index: int) -> torch.Tensor:
    """What the network gets, [3, S, S]."""
    return prepare(collate([images[(epoch, index)]]), torch.device("cpu"))[0][0]


def test_augmentation_depends_on_seed_epoch_and_index_alone(photos: Path) -> None:
    images = arrays(photos, "train")
    augmented = TrainingImages(images, Augmentation(size=16), seed=3)
    before = torch.get_rng_state()
    first = [view(augmented, 1, index) for index in (0, 5, 7)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    again = [view(TrainingImages(images, Augmentation(size=16), seed=3), 1, index) for index in (7, 5, 0)][::-1]
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], view(augmented, 2, 0))
    assert not torch.equal(first[0], view(TrainingImages(images, Augmentation(size=16), seed=4), 1, 0))
    batch = collate([augmented[(1, index)] for index in (0, 5, 7)])
    together, labels = prepare(batch, torch.device("cpu"))
    assert labels.tolist() == [0, 2, 1]
    assert torch.equal(together, torch.stack(first))
    assert batch[0].dtype == torch.uint8


def test_without_augmentation_images_are_normalized_and_half_are_flipped(photos: Path) -> None:
    images = arrays(photos, "train")
    nothing = Augmentation(size=18, scale=(1.0, 1.0), randaugment=0, erasing=0)
    augmented = TrainingImages(images, nothing, seed=0)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    flipped = same = 0
    for index in range(32):
        expected = (torch.from_numpy(images.read(index)).permute(2, 0, 1) / 255 - mean) / std
        found = view(augmented, 0, index)
        same += torch.allclose(found, expected, atol=1e-5)
        flipped += torch.allclose(found, expected.flip(2), atol=1e-5)
    # The ratio varies too, so only crops that came out square are whole images.
    assert same + flipped >= 2
    assert min(same, flipped) >= 1


def test_erasing_puts_noise_into_a_rectangle(photos: Path) -> None:
    def of(erasing: float) -> TrainingImages:
        return TrainingImages(arrays(photos, "train"), Augmentation(size=48, randaugment=0, erasing=erasing), seed=0)

    shares = []
    for index in range(20):
        changed = (view(of(1.0), 0, index) != view(of(0.0), 0, index)).all(0)
        rows, columns = changed.any(1), changed.any(0)
        assert changed.sum() == rows.sum() * columns.sum()
        shares.append(changed.float().mean().item())
    assert 0.015 < min(shares) < 0.1
    assert 0.2 < max(shares) < 0.34


def test_randaugment_acts_on_three_quarters_of_the_images(photos: Path) -> None:
    """Two operations, each with probability 1/2; a few of them change nothing."""

    def of(strength: float) -> TrainingImages:
        return TrainingImages(arrays(photos, "train"), Augmentation(size=16, randaugment=strength, erasing=0), seed=0)

    changed = [
        not torch.equal(view(of(9), epoch, index), view(of(0), epoch, index))
        for epoch in range(8)
        for index in range(32)
    ]
    assert 0.6 < np.mean(changed) < 0.82


def test_attention_pool_by_hand() -> None:
    torch.manual_seed(0)
    pool = AttentionPool(dim=4, heads=2)
    tokens = torch.randn(3, 5, 4)
    w_q, w_k, w_v = pool.attention.in_proj_weight.chunk(3)
    torch.nn.init.normal_(pool.attention.in_proj_bias)
    b_q, b_k, b_v = pool.attention.in_proj_bias.chunk(3)
    query = pool.query[0, 0] @ w_q.T + b_q
    keys, values = tokens @ w_k.T + b_k, tokens @ w_v.T + b_v
    heads = []
    for channels in (slice(0, 2), slice(2, 4)):
        weights = (keys[:, :, channels] @ query[channels] / 2**0.5).softmax(dim=1)
        heads.append((weights[:, :, None] * values[:, :, channels]).sum(1))
    expected = torch.cat(heads, dim=1) @ pool.attention.out_proj.weight.T + pool.attention.out_proj.bias
    torch.testing.assert_close(pool(tokens), expected)


def small_backbone() -> VisionTransformer:
    torch.manual_seed(0)
    backbone = VisionTransformer(32, 4, 2, patch=8, residual=False, image_size=32)
    return skipless_init_(backbone, **PRESETS["small"])  # type: ignore[return-value]


def attention_of_block_0(backbone: VisionTransformer, images: Tensor) -> Tensor:
    """[B, heads, tokens, tokens]"""
    block = backbone.blocks[0]
    assert isinstance(block, Block)
    tokens = backbone.embed(images)
    q, k, _ = block.attn.split(block.norm1(tokens.flatten(0, 1)))
    q, k = (x.unflatten(0, tokens.shape[:2]).transpose(1, 2) for x in (q, k))
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)


@torch.no_grad()
def test_gathering_class_token_starts_with_the_mean_of_the_patches() -> None:
    images = torch.randn(6, 3, 32, 32)
    starved, gathering = small_backbone(), gather_into_cls_(small_backbone())
    changed = [
        name for name, tensor in gathering.state_dict().items() if not torch.equal(tensor, starved.state_dict()[name])
    ]
    assert changed == ["blocks.0.attn.qkv.weight"]
    # 17 tokens: before, the class token attends to itself, then to all alike; patches hardly change.
    before, after = attention_of_block_0(starved, images), attention_of_block_0(gathering, images)
    assert before[:, :, 0, 0].min() > 0.9
    torch.testing.assert_close(after[:, :, 0], torch.full((6, 2, 17), 1 / 17))
    patches_before, patches_after = (a[:, :, 1:, 1:].diagonal(dim1=2, dim2=3).mean() for a in (before, after))
    assert (patches_before - patches_after).abs() < 0.02

    def between_images(backbone: VisionTransformer) -> float:
        """Share of the class tokens' square that tells images apart."""
        cls = backbone([images])[0][:, 0]
        return ((cls - cls.mean(0)).square().sum() / cls.square().sum()).item()

    assert between_images(starved) < 0.1
    assert between_images(gathering) > 0.5


@torch.no_grad()
@pytest.mark.parametrize(("pool", "own"), [("cls", 0.9), ("gathering-cls", 1 / 5)])
def test_settings_choose_the_class_token(pool: str, own: float) -> None:
    settings = cli.parse(Settings, ["--data.root=x", "--out=y", *SMALL, "--model.init=small", f"--model.pool={pool}"])
    backbone = build_classifier(settings, classes=3).backbone
    attended = attention_of_block_0(backbone, torch.randn(4, 3, 16, 16))[:, :, 0, 0]
    assert (attended > own - 1e-5).all()
    assert pool == "cls" or (attended < own + 1e-5).all()


def test_what_the_classifier_reads() -> None:
    images = torch.randn(2, 3, 32, 32)
    backbone = small_backbone()
    (tokens,) = backbone([images])
    for pool, vector in (("cls", tokens[:, 0]), ("gathering-cls", tokens[:, 0]), ("mean", tokens[:, 1:].mean(1))):
        classifier = Classifier(backbone, 5, pool)  # type: ignore[arg-type]
        torch.testing.assert_close(classifier(images), vector @ classifier.head.weight.T)
    classifier = Classifier(backbone, 5, "attention")
    vector = classifier.attention_pool(tokens[:, 1:])
    torch.testing.assert_close(classifier(images), vector @ classifier.head.weight.T)


def test_validation_counts_by_hand(tmp_path: Path) -> None:
    """A classifier that ignores its image and ranks the classes 6, 5, ..., 0."""
    labels = np.array([6, 6, 6, 5, 4, 3, 2, 1, 0, 0])
    np.savez(tmp_path / "val.npz", images=np.zeros((10, 16, 16, 3), np.uint8), labels=labels)
    classifier = Classifier(VisionTransformer(32, 1, 2, patch=8, image_size=16), 7, "mean")
    logits = torch.arange(7.0)
    with torch.no_grad():
        classifier.head.weight.zero_()
        classifier.head.bias.copy_(logits)
    found = validate(classifier, arrays(tmp_path, "val"), size=16)
    assert found["top1"] == pytest.approx(0.3)
    assert found["top5"] == pytest.approx(0.7)
    assert found["loss"] == pytest.approx(np.log(np.exp(np.arange(7)).sum()) - labels.mean())


def test_validation_drops_no_paths(photos: Path) -> None:
    classifier = Classifier(VisionTransformer(32, 2, 2, patch=8, image_size=16, drop_path=0.9), 3, "mean")
    images = arrays(photos, "val")
    assert validate(classifier, images, size=16)["loss"] == validate(classifier, images, size=16)["loss"]
    assert classifier.training


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--optimzer.lr=1"], ["optimzer"]),
        (["--optimizer.name=sgd"], ["optimizer.name", "sgd"]),
        (["--data.root=/nowhere/photos"], ["/nowhere/photos", "no such file"]),
        (["--data.name=folder"], ["{photos}/train", "no such split"]),
        (["--data.root={other}"], ["same classes", "3"]),
        (["--augmentation.size=20"], ["augmentation.size is 20", "model.patch 8", "16 or 24"]),
        (["--augmentation.randaugment=11"], ["augmentation.randaugment is 11", "[0, 10]"]),
        (["--augmentation.mixup=-1"], ["augmentation.mixup is -1"]),
        (["--batch_size=64"], ["32 images", "batch_size"]),
        (["--accumulate=3"], ["batch_size 8", "3 micro-batches"]),
        (["--model.drop_path=0.1"], ["drop_path", "residual=False"]),
        (["--model.pool=max"], ["model.pool", "max"]),
        (["--model.pool=gathering-cls", "--model.shaped"], ["gathering-cls", "use mean"]),
        (["--model.shaped", "--model.beta=2"], ["model.beta has no effect with model.shaped"]),
        (["--model.init=default", "--model.beta=2"], ["model.beta", "model.init"]),
        (["--optimizer.warmup_epochs=3"], ["optimizer.warmup_epochs is 3", "3 epochs"]),
        (["--validate_every_epochs=0"], ["validate_every_epochs is 0"]),
        (["--seed=-1"], ["seed is -1"]),
        (["--out={photos}"], ["{photos}", "folder of its own"]),
        (["--out={run}"], ["already holds a run", "--resume"]),
        (["--out={run}", "--resume", "--model.dim=64"], ["another architecture", "dim is 32 there and 64 here"]),
        (["--out={run}", "--resume", "--model.pool=cls"], ["other settings", "model.pool is 'mean' there"]),
        (["--out={run}", "--resume", "--data.root={fewer}"], ["a run on 32 images", "has 24"]),
    ],
)
def test_bad_input_ends_with_one_sentence_and_exit_code_2(
    photos: Path,
    finished: Path,
    tmp_path: Path,
    arguments: list[str],
    parts: list[str],
) -> None:
    other, fewer = tmp_path / "other", tmp_path / "fewer"
    for folder, count, classes in ((other, 32, 4), (fewer, 24, 3)):
        folder.mkdir()
        np.savez(folder / "train.npz", images=np.zeros((count, 16, 16, 3), np.uint8), labels=np.arange(count) % classes)
        shutil.copy(photos / "val.npz", folder)
    places = {"photos": photos, "run": finished, "other": other, "fewer": fewer}
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    done = call(main, words(photos, tmp_path / "out", *(argument.format(**places) for argument in arguments)))
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for part in parts:
        assert part.format(**places) in error_line(done.stderr)
    assert not (tmp_path / "out").exists()
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


@pytest.fixture(scope="module")
def finished(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "finished"
    fit(photos, out, "--epochs=3")
    return out


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named_and_loader_workers_end(tmp_path: Path, workers: int) -> None:
    for split in ("train", "val"):
        for i in range(8):
            path = tmp_path / split / ("even", "odd")[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((16, 16), 50).convert("RGB").save(path)
    broken = tmp_path / "train" / "odd" / "3.png"
    broken.write_bytes(broken.read_bytes()[:40])
    done = call(main, words(tmp_path, tmp_path / "out", "--data.name=folder", f"--data.workers={workers}"))
    assert done.returncode == 2
    assert not multiprocessing.active_children()
    assert error_line(done.stderr).startswith(f"{broken}: ")
    assert error_line(done.stderr).endswith("repair or remove it")


def test_a_loss_that_is_not_finite_stops_the_run(photos: Path, tmp_path: Path) -> None:
    done = call(main, words(photos, tmp_path / "run", "--optimizer.lr=1e15", "--clip_grad=0"))
    assert done.returncode == 2
    assert re.match(r"stopped at step \d+: the loss is", error_line(done.stderr))
