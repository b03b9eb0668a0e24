"""Linear classification: heads against plain loops of SGD, random crops, resuming, several processes, the command."""

import json
import math
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import Evaluation, make_context, run, run_group
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from skipless.common import cli
from skipless.datasets.labels.classes import LabeledSet, arrays
from skipless.eval import linear as module
from skipless.eval import random_crops
from skipless.eval.backbones import Backbone, load_backbone
from skipless.eval.classification import Pooling
from skipless.eval.dense.heads import Heads
from skipless.eval.linear import (
    IDENTIFYING,
    Settings,
    choose_rate,
    hold_out,
    predict,
    protocol_id,
    train_on_crops,
)
from skipless.eval.random_crops import Plan, read_crop, train_on_random_crops

DINO = ["--data.name=arrays", "--protocol=dino", "--epochs=3", "--images-per-step=13", "--learning-rates=[0.1,10]"]


@pytest.fixture
def linear(color_classes: Path, tiny_run: Path, cache: Path, request: pytest.FixtureRequest) -> Evaluation:
    """Three of the 30 images are held out: of 27, in steps of 13, the last step has one."""
    words = [f"--ckpt={tiny_run}", f"--data.root={color_classes}", f"--cache={cache}", "--device=cpu", "--size=32"]
    return Evaluation(module, words, request)


@pytest.fixture
def backbone(tiny_run: Path) -> Backbone:
    return load_backbone(tiny_run)


@pytest.fixture
def train(color_classes: Path) -> LabeledSet:
    return arrays(color_classes, "train").take(np.arange(20))


def chosen(*flags: str) -> Settings:
    return cli.parse(Settings, ["--ckpt=x", "--data.root=x", "--size=32", *flags])


def separable(seed: int, count: int, classes: int = 4) -> tuple[Tensor, np.ndarray]:
    """Groups around corners of a cube in 16 dimensions, whose units differ by six orders of magnitude, and which lie
    far from zero."""
    labels = np.arange(count) % classes
    corners = np.random.default_rng(0).choice([-1, 1], (classes, 16))
    x = corners[labels] + np.random.default_rng(seed).normal(0, 0.3, (count, 16))
    units = 10.0 ** np.linspace(-3, 3, 16)
    return torch.from_numpy((x + 5) * units).float(), labels


def test_heads_separate_what_is_separable() -> None:
    x, labels = separable(1, 200)
    rates = [rate * 4 for rate in Settings.learning_rates]
    (head,) = train_on_crops([x], labels, 4, rates, chosen("--epochs=30"), torch.device("cpu"))
    best, of_rates = choose_rate(head, *separable(2, 40))
    assert len(of_rates) == 8
    assert of_rates[best] == 1.0
    fresh, truth = separable(3, 100)
    np.testing.assert_array_equal(predict(head, fresh)[:, best], truth)


def plain_sgd(batches: list[tuple[Tensor, Tensor]], peak: float, classes: int) -> tuple[Tensor, Tensor]:
    """Weights [D, C] and biases [C] after a step on each of the batches, with the cosine written out."""
    weight = torch.zeros(batches[0][0].shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.SGD([weight, bias], lr=peak, momentum=0.9)
    for step, (x, y) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = peak * (1 + math.cos(math.pi * step / len(batches))) / 2
        optimizer.zero_grad()
        F.cross_entropy(x @ weight + bias, y).backward()
        optimizer.step()
    return weight.detach(), bias.detach()


def rows_of_steps(count: int, per_step: int, epochs: int, seed: int) -> list[np.ndarray]:
    orders = [np.random.default_rng((seed, epoch)).permutation(count) for epoch in range(epochs)]
    return [order[first : first + per_step] for order in orders for first in range(0, count, per_step)]


@pytest.mark.parametrize("peak", [0.01, 0.3])
def test_heads_are_those_of_a_plain_loop_on_standardized_vectors(peak: float) -> None:
    """Two epochs in steps of 16 of 40; another choice of blocks and other rates beside it change nothing."""
    x, labels = separable(1, 40)
    standard = torch.from_numpy(StandardScaler().fit_transform(x.double().numpy())).float()
    y = torch.from_numpy(labels)
    batches = [(standard[rows], y[rows]) for rows in rows_of_steps(40, 16, 2, seed=5)]
    weight, bias = plain_sgd(batches, peak, 4)
    settings = chosen("--epochs=2", "--images-per-step=16", "--seed=5")
    heads = train_on_crops([x[:, :3], x], labels, 4, [1.0, peak, 0.1], settings, torch.device("cpu"))
    torch.testing.assert_close(heads[1].weights[1].data, weight, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(heads[1].biases[1].data, bias, atol=1e-5, rtol=1e-4)
    assert heads[0].weights[1].shape == (3, 4)
    # And they are applied to vectors as they come.
    fresh, _ = separable(2, 30)
    scaled = (fresh - x.mean(0)) / x.std(0, correction=0)
    torch.testing.assert_close(heads[1](fresh)[:, 1].detach(), scaled @ weight + bias, atol=1e-3, rtol=1e-3)


def test_a_channel_that_never_changes_does_no_harm() -> None:
    x, labels = separable(1, 60)
    x[:, 3] = 7.3
    (head,) = train_on_crops([x], labels, 4, [0.1], chosen("--epochs=20"), torch.device("cpu"))
    assert all(parameter.isfinite().all() for parameter in head.parameters())
    fresh, truth = separable(2, 40)
    fresh[:, 3] = 7.31
    np.testing.assert_array_equal(predict(head, fresh)[:, 0], truth)


def test_every_tenth_image_is_held_out() -> None:
    assert [rows.tolist() for rows in hold_out(2)] == [[1], [0]]
    assert hold_out(9)[1].tolist() == [0]
    assert hold_out(10)[1].tolist() == [9]
    assert hold_out(39)[1].tolist() == [9, 19, 29]


@given(st.one_of(st.integers(2, 300), st.integers(90_000, 200_000)))
@settings(max_examples=10)
def test_held_out_images_are_evenly_spread_and_not_trained_on(count: int) -> None:
    kept, held_out = hold_out(count)
    assert len(held_out) == min(max(count // 10, 1), 10_000)
    both = np.concatenate([kept, held_out])
    assert len(both) == count
    assert len(np.unique(both)) == count
    steps = np.diff(held_out)
    assert len(steps) == 0 or steps.max() - steps.min() <= 10


def test_the_first_of_the_best_rates_is_chosen() -> None:
    """Three heads on one number: always class 0; class 1 above zero; class 1 above -100."""
    head = Heads(torch.zeros(1), torch.ones(1), 4, 2)
    for number, (slope, offset) in enumerate([(0.0, -1.0), (1.0, 0.0), (2.0, 0.0), (1.0, 100.0)]):
        head.weights[number].data[0, 1] = slope
        head.biases[number].data[1] = offset
    x = torch.tensor([[1.0], [-1.0], [2.0], [-3.0]])
    best, of_rates = choose_rate(head, x, np.array([1, 0, 1, 0]))
    assert (best, of_rates) == (1, [0.5, 1.0, 1.0, 0.5])
    assert choose_rate(head, x, np.array([1, 1, 1, 1]))[0] == 3


@pytest.mark.parametrize("protocol", ["cached", "dino"])
def test_the_rate_is_chosen_without_the_images_that_count(
    linear: Evaluation, color_classes: Path, tmp_path: Path, protocol: str
) -> None:
    """Other labels there change the figure and nothing else."""
    flags = [*DINO, f"--protocol={protocol}"]
    with np.load(color_classes / "val.npz") as file:
        np.savez(tmp_path / "val.npz", **{**file, "labels": (file["labels"] + 1) % 3})
    (tmp_path / "train.npz").symlink_to(color_classes / "train.npz")
    one, other = (linear.measure(*flags, *more)["details"] for more in ([], ["--data.root", tmp_path]))
    assert one["held_out_images"] == 3
    assert one["held_out_top1"] == other["held_out_top1"]
    assert one["learning_rate"] == other["learning_rate"] == [0.1, 10][int(np.argmax(one["held_out_top1"]))]
    assert one["top1"] > 0.6
    assert other["top1"] < 0.4


def ramps(count: int) -> LabeledSet:
    """Pictures of 100 x 150 whose red grows to the right and whose green grows downwards."""
    image = np.zeros((100, 150, 3), np.uint8)
    image[..., 0], image[..., 1] = np.arange(150), np.arange(100)[:, None]
    places = [Path(str(number)) for number in range(count)]
    return LabeledSet("ramps", "train", np.arange(count) % 3, ("a", "b", "c"), places, lambda _: image, "ramps")


def test_crops_depend_on_seed_epoch_and_image() -> None:
    images = ramps(5)

    def crop(seed: int, epoch: int, index: int) -> bytes:
        view, label = read_crop(images, 24, seed, (epoch, index))
        assert (view.shape, view.dtype, label) == ((24, 24, 3), np.uint8, index % 3)
        return view.tobytes()

    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert [crop(*key) for key in keys] == [crop(*key) for key in keys]
    assert len({crop(*key) for key in keys}) == 4


def test_crops_are_those_of_imagenet_training() -> None:
    """torchvision's RandomResizedCrop, as the colors of the edges tell: 8 to 100 % of the image, sides in proportions
    of 3:4 to 4:3; and half of them mirrored."""
    areas, ratios, mirrored = [], [], []
    images = ramps(400)
    for index in range(400):
        view = read_crop(images, 24, 0, (0, index))[0].astype(float)
        mirrored.append(view[0, 0, 0] > view[0, -1, 0])
        width, height = (np.ptp(view[..., channel]) * 24 / 23 for channel in (0, 1))
        areas.append(width * height / 15000)
        ratios.append(width / height)
    torch.manual_seed(0)
    canvas = torch.empty(3, 100, 150)
    sides = [RandomResizedCrop.get_params(canvas, [0.08, 1.0], [3 / 4, 4 / 3])[2:] for _ in range(2000)]
    for ours, expected in (
        (areas, [height * width / 15000 for height, width in sides]),
        (ratios, [width / height for height, width in sides]),
    ):
        shares = [0.01, 0.25, 0.5, 0.75, 0.99]
        np.testing.assert_allclose(np.quantile(ours, shares), np.quantile(expected, shares), atol=0.05)
    assert 0.43 < np.mean(mirrored) < 0.57


def train_heads(
    backbone: Backbone,
    train: LabeledSet,
    choices: Sequence[tuple[int, ...]],
    rates: Sequence[float],
    plan: Plan,
    out: Path | None = None,
    **context: Any,
) -> list[Heads]:
    return train_on_random_crops(make_context(backbone, choices, out, **context), train, rates, plan, repr(plan))


def counted(images: LabeledSet, stop_after: int = 10**9) -> tuple[LabeledSet, list[int]]:
    """The same images, and the list of those that were read; reading is interrupted after some of them."""
    seen: list[int] = []

    def read(index: int) -> np.ndarray:
        if len(seen) == stop_after:
            raise KeyboardInterrupt
        seen.append(index)
        return images.read(index)

    return replace(images, read=read), seen


SHORT = Plan(images_per_step=13, epochs=3, size=32, pool="cls", seed=0)


def test_unreadable_image_ends_training_with_its_name(backbone: Backbone, train: LabeledSet) -> None:
    def read(index: int) -> np.ndarray:
        if index == 7:
            raise ValueError("some/place.jpg: truncated JPEG")
        return train.read(index)

    with pytest.raises(ValueError, match=r"^some/place\.jpg: truncated JPEG$"):
        train_heads(backbone, replace(train, read=read), [(1,)], [0.1], SHORT)


@pytest.mark.parametrize("pool", ["cls", "both"])
def test_training_on_random_crops_is_a_plain_loop(backbone: Backbone, train: LabeledSet, pool: Pooling) -> None:
    """Two epochs in steps of 8 of 20, each in passes of 3: the gradient is that of the whole step."""
    heads = train_heads(backbone, train, [(0,), (1, 0)], [9.0, 0.5], Plan(8, 2, 32, pool, 4), batch_size=3)
    batches = []
    for step, rows in enumerate(rows_of_steps(20, 8, 2, seed=4)):
        views = [read_crop(train, 32, 4, (step // 3, int(row)))[0] for row in rows]
        features = backbone.features(backbone.normalize(np.stack(views)), (1, 0))
        parts = [f.cls for f in features] + [f.patches.flatten(1, 2).mean(1) for f in features if pool == "both"]
        batches.append((torch.cat(parts, dim=1), torch.from_numpy(train.labels[rows])))
    weight, bias = plain_sgd(batches, 0.5, 3)
    torch.testing.assert_close(heads[1].weights[1].data, weight, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(heads[1].biases[1].data, bias, atol=1e-4, rtol=1e-3)
    assert heads[1](batches[0][0]).shape == (8, 2, 3)
    assert bias.abs().max() > 1e-3


def weights_of(heads: list[Heads]) -> list[dict[str, Tensor]]:
    return [head.state_dict() for head in heads]


@pytest.mark.parametrize("after", [10, 20, 53])
def test_interrupted_training_goes_on_after_the_last_whole_epoch(
    backbone: Backbone, train: LabeledSet, tmp_path: Path, after: int
) -> None:
    """Bit for bit the heads that it would have left."""
    choices, rates, saved = [(1,), (0, 1)], [0.1, 3.0], tmp_path / "out" / "head.pt"
    whole = weights_of(train_heads(backbone, train, choices, rates, SHORT))
    with pytest.raises(KeyboardInterrupt):
        train_heads(backbone, counted(train, after)[0], choices, rates, SHORT, saved.parent)
    done = torch.load(saved, weights_only=True)["epoch"] if saved.exists() else 0
    assert done == after // 20
    for left in (60 - 20 * done, 0):
        images, seen = counted(train)
        again = train_heads(backbone, images, choices, rates, SHORT, saved.parent)
        assert len(seen) == left
        torch.testing.assert_close(weights_of(again), whole, rtol=0, atol=0)


def test_saved_heads_are_for_the_same_run_only(backbone: Backbone, train: LabeledSet, tmp_path: Path) -> None:
    plan = SHORT._replace(epochs=1)

    def go(images: LabeledSet = train, net: Backbone = backbone, plan: Plan = plan, **context: Any) -> list[Heads]:
        return train_heads(net, images, [(1,)], [0.1, 10], plan, tmp_path, **context)

    whole = weights_of(go())
    # What changes speed alone may be changed.
    torch.testing.assert_close(weights_of(go(batch_size=2, workers=1)), whole, rtol=0, atol=0)
    other = load_backbone(backbone.path)
    other.model.norm.bias.add_(0.5)
    for changed in (
        lambda: go(plan=plan._replace(seed=1)),
        lambda: go(plan=plan._replace(epochs=2)),
        lambda: go(net=other),
        lambda: go(train.take(np.arange(19))),
        lambda: go(replace(train, identity="others")),
        lambda: go(replace(train, labels=train.labels[::-1].copy())),
    ):
        with pytest.raises(ValueError, match=r"head\.pt is of a run with other settings, weights or images: delete it"):
            changed()
    saved = tmp_path / "head.pt"
    for content in (saved.read_bytes()[:400], b"", b"no file of torch"):
        saved.write_bytes(content)
        with pytest.raises(ValueError, match=r"head\.pt is damaged"):
            go()


def test_the_name_of_a_run_holds_all_settings_but_those_of_speed_and_place() -> None:
    """As the first version had them, so that its heads are still known."""
    speed = {"out", "cache", "device", "precision", "batch_size", "workers"}
    assert {*IDENTIFYING} == {field.name for field in fields(Settings)} - speed


def test_two_processes_train_the_heads_of_one(linear: Evaluation, tmp_path: Path) -> None:
    """Also where the last step has an image for one of them alone."""
    flags = [*DINO, "--epochs=1", "--batch-size=4", "--out"]
    run_group("skipless.eval.linear", linear.line(*flags, tmp_path / "two"))
    one, two = linear.measure(*flags, tmp_path / "one"), json.loads((tmp_path / "two" / "linear.json").read_text())
    assert (two["processes"], one["processes"]) == (2, 1)
    assert {**two["details"], "interval_95": None} == {**one["details"], "interval_95": None}
    heads = [torch.load(tmp_path / name / "head.pt", weights_only=True)["heads"] for name in ("one", "two")]
    assert heads[0][0]["weights.1"].abs().max() > 0.01
    torch.testing.assert_close(*heads, rtol=1e-3, atol=1e-4)


def test_command_leaves_a_result_and_a_table(linear: Evaluation, color_classes: Path, tmp_path: Path) -> None:
    """Started from another folder, with relative paths, on class folders."""
    (tmp_path / "colors").symlink_to(color_classes)
    flags = ["--data.root=colors", "--cache=cache", "--out=out", "--epochs=20", "--images-per-step=13"]
    done = run("skipless.eval.linear", linear.line(*flags, "--learning-rates", "[0.01,0.1]"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["linear.json", "linear.md"]

    result = json.loads((tmp_path / "out" / "linear.json").read_text())
    name = color_classes.name
    assert (result["dataset"], result["protocol"]) == (name, f"{name}-linear/cached/32px (changed)")
    assert result["settings"]["learning_rates"] == [0.01, 0.1]
    details = result["details"]
    assert (details["train_images"], details["classes"], details["blocks"]) == (30, 3, [1, 2])
    assert details["held_out_images"] == 3
    assert details["learning_rate"] in (0.01, 0.1)
    assert len(details["held_out_top1"]) == 2
    assert result["value"] == details["top1"] > 0.6

    table = (tmp_path / "out" / "linear.md").read_text()
    assert table.startswith(f"**{name}-linear/cached/32px (changed)** {100 * result['value']:.1f} % top-1 (95 % ")
    assert f"3 of the training images were held out and chose the learning rate {details['learning_rate']:g}:" in table
    assert f"| 0.1 | {100 * details['held_out_top1'][1]:.1f} |" in table
    assert table.strip() in done.stdout


def test_dino_keeps_its_heads_and_does_not_train_again(
    linear: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*DINO, "--out", tmp_path / "out"]
    linear.run(*flags)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["head.pt", "linear.json", "linear.md"]
    groups = torch.load(tmp_path / "out" / "head.pt", weights_only=True)["optimizer"]["param_groups"]
    assert [group["peak"] for group in groups] == pytest.approx([0.1 * 13 / 256, 10 * 13 / 256])
    before = json.loads((tmp_path / "out" / "linear.json").read_text())
    assert before["protocol"].endswith("-linear/dino/32px (changed)")
    monkeypatch.setattr(random_crops, "add_gradients", None)
    linear.run(*flags, "--batch-size=5")
    again = json.loads((tmp_path / "out" / "linear.json").read_text())
    assert again["details"] == before["details"]
    with pytest.raises(TypeError):
        linear.run(*flags, "--out", tmp_path / "other")


def test_same_seed_same_figures_and_another_seed_another_order() -> None:
    one, same, other = (
        train_on_crops(
            [separable(1, 40)[0]], separable(1, 40)[1], 4, [0.1],
            chosen("--epochs=1", "--images-per-step=8", f"--seed={seed}"), torch.device("cpu"),
        )
        for seed in (3, 3, 4)
    )  # fmt: skip
    torch.testing.assert_close(weights_of(one), weights_of(same), rtol=0, atol=0)
    assert not torch.equal(one[0].weights[0], other[0].weights[0])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "imagenet-linear/cached"),
        (["--protocol=dino", "--batch-size=7", "--workers=3", "--seed=2"], "imagenet-linear/dino"),
        (["--pool=both", "--blocks=last"], "imagenet-linear/cached/both/blocks-6"),
        (["--every-block"], "imagenet-linear/cached/blocks-6"),
        (["--protocol=dino", "--size=112"], "imagenet-linear/dino/112px"),
        (["--epochs=10"], "imagenet-linear/cached (changed)"),
        (["--images-per-step=256"], "imagenet-linear/cached (changed)"),
        (["--protocol=dino", "--learning-rates=[0.001]"], "imagenet-linear/dino (changed)"),
    ],
)
def test_every_departure_from_the_protocol_is_named(flags: list[str], expected: str) -> None:
    settings = cli.parse(Settings, ["--ckpt=x", "--data.root=x", "--pool=cls", *flags])
    blocks = (2, 3, 4, 5) if settings.blocks == "last4" and not settings.every_block else (5,)
    assert protocol_id(settings, "imagenet", blocks) == expected


def test_defaults_are_the_published_ones() -> None:
    """DINO's: CLS of the last four blocks, 100 epochs, 1,024 images a step, 0.001 for 256 among the rates."""
    settings = cli.parse(Settings, ["--ckpt=x", "--data.root=x", "--protocol=dino"])
    assert (settings.blocks, settings.pool, settings.size) == ("last4", "auto", 224)
    assert (settings.epochs, settings.images_per_step) == (100, 1024)
    assert 1e-3 in settings.learning_rates
    optimizer = random_crops.sgd([Heads(torch.zeros(2), torch.ones(2), 1, 2)], [0.004])
    (group,) = optimizer.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]) == (0.004, 0.9, 0.0, False)


def test_one_training_image_is_too_few(linear: Evaluation, tmp_path: Path) -> None:
    for split in ("train", "val"):
        np.savez(tmp_path / f"{split}.npz", images=np.zeros((1, 20, 20, 3), np.uint8), labels=[0])
    last = linear.refused("--data.root", tmp_path, "--data.name=arrays")
    assert "train has one image; two or more are needed, one of them held out" in last


def test_what_is_wrong_with_the_images_that_count_shows_before_training(
    linear: Evaluation, color_classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random_crops, "add_gradients", None)
    (tmp_path / "train").symlink_to(color_classes / "train")
    for name in ("blue", "green", "red"):
        (tmp_path / "val" / name).mkdir(parents=True)
        (tmp_path / "val" / name / "1.png").write_bytes(b"no image")
    flags = [*DINO, "--data.name=folder", "--data.root", tmp_path, "--out", tmp_path / "out"]
    last = linear.refused(*flags)
    assert "val/blue/1.png: the content is not that of" in last
    assert not (tmp_path / "out").exists()
