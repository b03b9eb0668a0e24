"""Heads trained as published: recipes against the papers' tables, schedules, loss, resuming, inference."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import make_context, tiny_backbone, write_voc
from PIL import Image
from torch import nn

from skipless.common import cli
from skipless.datasets.labels.masks import VOID, SegmentationSet
from skipless.datasets.labels.voc import voc_segmentation
from skipless.eval.backbones import Backbone, pad_to_patch
from skipless.eval.dense import training
from skipless.eval.dense.augmentation import AugmentationSettings, resize_image, resize_mask, resized_crop, size_within
from skipless.eval.dense.heads import HeadSettings, LinearHeads
from skipless.eval.dense.inference import InferenceSettings, nearest_labels, score_heads
from skipless.eval.dense.training import (
    OptimizerSettings,
    StepKeys,
    TrainingSettings,
    rate,
    read_crop,
    train_and_evaluate,
    train_heads,
)
from skipless.eval.segmentation import Settings, recipe


def published(protocol: str) -> TrainingSettings:
    words = [f"--protocol={protocol}", "--ckpt=x", "--data.name=scenes", "--data.root=x"]
    return cli.parse(Settings, words, recipe=recipe).training


def has(settings: Any, **expected: Any) -> bool:
    found = {name: getattr(settings, name) for name in expected}
    assert found == expected
    return True


MMSEG_AUGMENTATION = {
    "kind": "scale_crop",
    "scale": (2048, 512),
    "ratio": (0.5, 2.0),
    "size": 512,
    "max_class_share": 0.75,
    "flip": 0.5,
    "photometric": True,
}
MMSEG_INFERENCE = {"kind": "windows", "scale": (2048, 512), "window": 512, "stride": 341}


def test_mmseg_is_dinov2s_published_protocol() -> None:
    """Batch norm and 1 x 1 convolution; AdamW 1e-3, weight decay 1e-4; 40k steps of 16, poly 1, warm-up 1,500."""
    found = published("mmseg")
    assert has(found.head, batch_norm=True, dropout=0.0, init_std=0.01)
    assert has(found.augmentation, **MMSEG_AUGMENTATION)
    assert has(found.optimizer, name="adamw", lr=1e-3, weight_decay=1e-4, betas=(0.9, 0.999))
    assert has(found.optimizer, schedule="polynomial", power=1.0, warmup=1500, warmup_start=1e-6)
    assert has(found.optimizer, batch_size=16, iterations=40000, epochs=None)
    assert has(found.inference, **MMSEG_INFERENCE)
    assert found.resize == "opencv"


def test_dinov3_differs_from_it_in_dropout_weight_decay_and_schedule() -> None:
    found = published("dinov3")
    assert has(found.head, batch_norm=True, dropout=0.1, init_std=0.01)
    assert has(found.augmentation, **MMSEG_AUGMENTATION)
    assert has(found.optimizer, name="adamw", lr=1e-3, weight_decay=1e-3, betas=(0.9, 0.999))
    assert has(found.optimizer, schedule="one_cycle", warmup=1500, warmup_start=1e-6)
    assert has(found.optimizer, batch_size=16, iterations=40000, epochs=None)
    assert has(found.inference, **MMSEG_INFERENCE)


def test_neco_is_leoparts_protocol() -> None:
    """A bare 1 x 1 convolution, SGD for 25 epochs of batch 128, x 0.1 at epoch 20, compared at 100 x 100."""
    found = published("neco")
    assert has(found.head, batch_norm=False, dropout=0.0, init_std=None)
    assert has(found.augmentation, kind="resized_crop", size=448, area=(0.8, 1.0), flip=0.5)
    assert has(found.optimizer, name="sgd", lr=0.01, momentum=0.9, weight_decay=1e-4)
    assert has(found.optimizer, schedule="step", drop_epoch=20, drop_factor=0.1)
    assert has(found.optimizer, batch_size=128, iterations=None, epochs=25)
    assert has(found.inference, kind="square", size=448, grid=100)


@pytest.mark.parametrize(
    ("iteration", "expected"),
    [
        (0, 1e-6),
        (750, 0.5000005 * 0.98125),  # half way from 1e-6 to 1; 750 of 40,000 gone
        (1499, (1 - (1 - 1e-6) / 1500) * (1 - 1499 / 40000)),
        (1500, 0.9625),
        (20000, 0.5),
        (39999, 1 / 40000),
    ],
)
def test_polynomial_schedule_by_hand(iteration: int, expected: float) -> None:
    assert rate(published("mmseg").optimizer, iteration, 40000, 91) == pytest.approx(expected, rel=1e-9)


def test_power_of_the_polynomial() -> None:
    assert rate(OptimizerSettings(power=2.0), 30000, 40000, 91) == pytest.approx(1 / 16)


@pytest.mark.parametrize(
    ("iteration", "expected"),
    [
        (0, 1e-6),
        (750, 0.5000005 * 0.98125),  # the warm-up's factor is on a straight line, as in DINOv3
        (1500, (1 + math.cos(math.pi * 1501 / 40000)) / 2),
        (19999, 0.5),
        (29999, (1 - math.sqrt(0.5)) / 2),
        (39999, 0.0),
    ],
)
def test_one_cycle_schedule_by_hand(iteration: int, expected: float) -> None:
    assert rate(published("dinov3").optimizer, iteration, 40000, 91) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_step_schedule_drops_at_epoch_20() -> None:
    """VOC's trainaug has 10,582 images: 82 steps of 128 an epoch."""
    settings = published("neco").optimizer
    rates = [rate(settings, iteration, 25 * 82, 82) for iteration in (0, 1, 1639, 1640, 2049)]
    assert rates == [1.0, 1.0, 1.0, 0.1, 0.1]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> SegmentationSet:
    """Eight pictures of 32 x 48: blocks of three colors, each color a class, and a void column."""
    return voc_segmentation(write_voc(tmp_path_factory.mktemp("VOCdevkit"), {"train": 8}, blocks=(2, 3)), "train")


def tiny_settings(**optimizer: Any) -> TrainingSettings:
    """mmseg's with everything a sixteenth, and a dozen steps."""
    chosen = {"iterations": 12, "warmup": 3, "batch_size": 4} | optimizer
    return TrainingSettings(
        HeadSettings(dropout=0.1),
        AugmentationSettings(size=32, scale=(128, 32)),
        OptimizerSettings(**chosen),
        InferenceSettings(scale=(128, 32), window=32, stride=21),
    )


def trained(
    data: SegmentationSet, settings: TrainingSettings, seed: int = 0, out: Path | None = None
) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    heads = LinearHeads(24, 21, [(1,), (0, 1)], settings.head)
    train_heads(make_context(tiny_backbone(), heads.choices, out), heads, data, settings, seed)
    return heads.state_dict()


def test_same_seed_same_head_and_another_seed_another(data: SegmentationSet) -> None:
    one, same, other = (trained(data, tiny_settings(), seed) for seed in (3, 3, 4))
    torch.testing.assert_close(one, same, rtol=0, atol=0)
    assert not torch.equal(one["heads.0.2.weight"], other["heads.0.2.weight"])


def test_interrupted_training_goes_on_where_it_stopped(
    data: SegmentationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in step 8 by a damaged image; the last saved state is that after step 5."""
    monkeypatch.setattr(training, "SAVE_EVERY", 5)
    settings = tiny_settings()
    whole = trained(data, settings)
    collate, calls = training.collate, []

    def stopping(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return collate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "collate", stopping)
        with pytest.raises(KeyboardInterrupt):
            trained(data, settings, out=tmp_path)
    assert torch.load(tmp_path / "unfinished.pt", weights_only=True)["iteration"] == 5
    calls.clear()
    monkeypatch.setattr(training, "collate", lambda *arguments: (calls.append(1), collate(*arguments))[1])
    torch.testing.assert_close(trained(data, settings, out=tmp_path), whole, rtol=0, atol=0)
    assert len(calls) == 7


def test_unfinished_state_is_for_the_same_evaluation_only(
    data: SegmentationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY", 6)
    trained(data, tiny_settings(), out=tmp_path)
    fewer = dataclasses.replace(data, names=data.names[:7], images=data.images[:7], masks=data.masks[:7])
    for changed, of in ((tiny_settings(lr=0.1), data), (tiny_settings(), fewer)):
        with pytest.raises(ValueError, match=r"unfinished\.pt is of a run with other settings"):
            trained(of, changed, out=tmp_path)
    (tmp_path / "unfinished.pt").write_bytes((tmp_path / "unfinished.pt").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"unfinished\.pt is damaged"):
        trained(data, tiny_settings(), out=tmp_path)


def test_finished_evaluation_leaves_the_heads_alone(data: SegmentationSet, tmp_path: Path) -> None:
    choices = [(1,), (0, 1)]
    context = make_context(tiny_backbone(), choices, tmp_path, batch_size=3)
    outcome = train_and_evaluate(context, data, data, tiny_settings(), 0, [2])
    assert [path.name for path in tmp_path.iterdir()] == ["head.pt"]
    torch.testing.assert_close(torch.load(tmp_path / "head.pt", weights_only=True), trained(data, tiny_settings()))
    # 8 images of 32 x 48, a void column each, scored at their own size.
    assert outcome.confusions.sum((1, 2)).tolist() == [8 * 32 * 47] * 2
    assert outcome.predictions[2].shape == (32, 48)


def test_training_takes_the_means_over_labeled_pixels_of_the_batch(data: SegmentationSet) -> None:
    """One step of plain SGD from zero: bias gets lr * (share of its class among labeled pixels - 1/21), and the
    square protocol compares on its raster."""
    settings = TrainingSettings(
        HeadSettings(batch_norm=False),
        AugmentationSettings(kind="resized_crop", size=32, area=(1.0, 1.0), flip=0.0),
        OptimizerSettings(
            name="sgd", lr=1.0, weight_decay=0.0, momentum=0.0, schedule="step", iterations=None, epochs=1, batch_size=8
        ),
        InferenceSettings(kind="square", size=32, grid=16),
        "pillow",
    )
    heads = LinearHeads(24, 21, [(1,)], settings.head)
    for parameter in heads.parameters():
        nn.init.zeros_(parameter)
    assert train_heads(make_context(tiny_backbone(), heads.choices), heads, data, settings, 0) == 1
    # Rasters by torch's nearest from 32 x 32, which shows every second pixel; the crops are known from their seeds.
    counts = np.zeros(256)
    order = np.random.default_rng((0, 0)).permutation(8)
    for position, index in enumerate(order):
        _, mask = resized_crop(*data.read(int(index)), np.random.default_rng((0, 0, position)), 32, (1.0, 1.0), 0.0)
        counts += np.bincount(mask[::2, ::2].ravel(), minlength=256)
    share = counts[:21] / counts[:21].sum()
    bias = heads.state_dict()["heads.0.2.bias"]
    np.testing.assert_allclose(bias, share - 1 / 21, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"warmup": 12}, "warmup is 12 of 12 iterations"),
        ({"iterations": None, "epochs": 2, "warmup": 4}, "warmup is 4 of 4 iterations"),
        ({"iterations": None, "epochs": 2, "batch_size": 9}, "batch_size is 9, and there are 8 training images"),
        ({"iterations": None}, "either iterations or epochs"),
        ({"epochs": 3}, "either iterations or epochs"),
        ({"iterations": 0, "schedule": "step"}, "iterations is 0"),
        ({"iterations": None, "epochs": -1}, "epochs is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_lengths_that_make_no_sense_are_refused(data: SegmentationSet, changed: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        trained(data, tiny_settings(**changed))


def test_settings_out_of_range_are_refused_before_hours_of_training() -> None:
    with pytest.raises(ValueError, match="stride is 513"):
        InferenceSettings(stride=513)
    with pytest.raises(ValueError, match=r"training\.inference: .* 1 or more"):
        InferenceSettings(kind="square", grid=0)
    with pytest.raises(ValueError, match="ratio must rise"):
        AugmentationSettings(ratio=(2.0, 0.5))
    with pytest.raises(ValueError, match="two rising shares"):
        AugmentationSettings(area=(0.8, 1.2))


def test_diverging_head_and_broken_features_are_told_apart(data: SegmentationSet) -> None:
    with pytest.raises(ValueError, match=r"loss is (nan|inf) at iteration 12: lower training\.optimizer\.lr"):
        trained(data, tiny_settings(lr=1e38))
    broken = tiny_backbone()
    with torch.no_grad():
        broken.model.blocks[1].mlp.fc2.bias.fill_(1e30)  # type: ignore[union-attr, operator]
    heads = LinearHeads(24, 21, [(1,)], HeadSettings())
    with pytest.raises(ValueError, match="features of tiny are NaN or infinite"):
        train_heads(make_context(broken, heads.choices), heads, data, tiny_settings(), 0)
    with pytest.raises(ValueError, match=r"\.jpg: features of tiny are NaN or infinite"):
        score_heads(make_context(broken, heads.choices), heads, data, tiny_settings().inference, "opencv")


# 10 x 128 pixels, 32 x 51, 51 x 32, 32 x 32 and 32 x 48 after they are resized, for windows of 32.
SIZES = [(8, 100), (20, 32), (32, 20), (40, 40), (32, 48), (32, 48), (16, 16)]


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> SegmentationSet:
    """Pictures of many sizes, one of them lower than a window."""
    root = tmp_path_factory.mktemp("sizes") / "VOCdevkit"
    folder = root / "VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(1)
    for index, size in enumerate(SIZES):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"JPEGImages/{index}.jpg")
        labels = rng.integers(0, 21, size).astype(np.uint8)
        labels[:, 2] = VOID
        Image.fromarray(labels).save(folder / f"SegmentationClass/{index}.png")
    (folder / "ImageSets/Segmentation/val.txt").write_text("".join(f"{index}\n" for index in range(len(SIZES))))
    return voc_segmentation(root, "val")


@torch.no_grad()
def plainly(
    heads: LinearHeads, backbone: Backbone, data: SegmentationSet, settings: TrainingSettings
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Confusion matrices [choices, C, C] and the last choice's predictions, image by image and window by window, as
    mmsegmentation's slide inference has it."""
    inference, classes = settings.inference, len(data.classes)
    confusions, predictions = np.zeros((len(heads.choices), classes, classes), int), []
    for index in range(len(data)):
        image, mask = data.read(index)
        if inference.kind == "windows":
            image = resize_image(image, *size_within(*mask.shape, *inference.scale), settings.resize)
            size, stride = inference.window, inference.stride
        else:
            image = resize_image(image, inference.size, inference.size, settings.resize)
            size = stride = inference.size
        pixels = backbone.normalize(image[None])
        height, width = image.shape[:2]
        total, count = [0.0] * len(heads.choices), torch.zeros(height, width)
        for row in range(max(height - size + stride - 1, 0) // stride + 1):
            for column in range(max(width - size + stride - 1, 0) // stride + 1):
                bottom, right = min(row * stride + size, height), min(column * stride + size, width)
                top, left = max(bottom - size, 0), max(right - size, 0)
                crop = pad_to_patch(pixels[:, :, top:bottom, left:right], backbone.patch, centered=True)
                found = backbone.features(crop, (0, 1))
                maps = heads({block: f.patches.permute(0, 3, 1, 2) for block, f in enumerate(found)})
                around = (left, width - right, top, height - bottom)
                shape = (inference.grid,) * 2 if inference.kind == "square" else (bottom - top, right - left)
                for number, of_choice in enumerate(maps):
                    resized = F.interpolate(of_choice, shape, mode="bilinear", align_corners=False)
                    total[number] = total[number] + (resized if inference.kind == "square" else F.pad(resized, around))
                count += F.pad(torch.ones(bottom - top, right - left), around)
        if inference.kind == "square":
            mask = resize_mask(mask, size, size)[:: size // inference.grid, :: size // inference.grid]
        for number, of_choice in enumerate(total):
            assert isinstance(of_choice, torch.Tensor)
            mean = of_choice if inference.kind == "square" else of_choice / count
            prediction = F.interpolate(mean, mask.shape, mode="bilinear", align_corners=False)[0].argmax(0).numpy()
            np.add.at(confusions[number], (mask[mask < classes], prediction[mask < classes]), 1)
        predictions.append(prediction)
    return confusions, predictions


@pytest.mark.parametrize("kind", ["windows", "square"])
def test_images_that_are_evaluated_together_are_evaluated_as_one_by_one(sizes: SegmentationSet, kind: Any) -> None:
    inference = InferenceSettings(kind, (128, 32), 32, 21, size=32, grid=16)
    settings = dataclasses.replace(tiny_settings(), inference=inference)
    backbone = tiny_backbone()
    torch.manual_seed(1)
    heads = LinearHeads(24, 21, [(0,), (1,), (0, 1)], HeadSettings(init_std=1.0)).eval()
    expected, expected_predictions = plainly(heads, backbone, sizes, settings)
    assert np.count_nonzero(expected.sum(1)) > 30  # more than one class is predicted
    passes: list[tuple[int, ...]] = []
    backbone.model.patch_embed.register_forward_pre_hook(lambda _, inputs: passes.append(tuple(inputs[0].shape)))
    for batch_size in (1, 3, 100):
        passes.clear()
        context = make_context(backbone, heads.choices, batch_size=batch_size)
        outcome = score_heads(context, heads, sizes, inference, "opencv", [0, 4])
        np.testing.assert_array_equal(outcome.confusions, expected)
        for index in (0, 4):
            np.testing.assert_array_equal(outcome.predictions[index], expected_predictions[index])
        # `image_counts`: pixels that are right, predicted and true, of every image.
        np.testing.assert_array_equal(outcome.counts[-1, :, 0].sum(0), expected[-1].diagonal())
        assert max(count for count, *_ in passes) <= batch_size
    # 10 x 128 pixels are 6 windows, 16 x 32 with what pads them; the others are 2 + 2 + 1 + 2 + 2 + 1 of 32 x 32.
    assert sorted(passes) == ([(6, 3, 16, 32), (10, 3, 32, 32)] if kind == "windows" else [(7, 3, 32, 32)])


def test_labels_meet_logits_by_torchs_nearest() -> None:
    """Leopart's way: new pixel i takes old pixel floor(i * old / new)."""
    labels = torch.tensor([[[7, 8, 9, VOID, 1]]])
    assert nearest_labels(labels, (1, 3)).tolist() == [[[7, 8, VOID]]]
    found = nearest_labels(torch.tensor([[[1, 2], [3, VOID]]]), (4, 4))
    assert found.tolist() == [[[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, VOID, VOID], [3, 3, VOID, VOID]]]
    assert found.dtype == torch.int64


def test_unreadable_image_is_named(data: SegmentationSet, tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    path.write_bytes(data.images[0].read_bytes()[:300])
    damaged = dataclasses.replace(data, images=(path, *data.images[1:]))
    with pytest.raises(ValueError, match=r"cut\.jpg"):
        trained(damaged, tiny_settings())


def test_augmentation_depends_on_seed_step_and_place(data: SegmentationSet) -> None:
    def crop(seed: int, *key: int) -> bytes:
        return read_crop(data, tiny_settings(), seed, (*key, 0))[0].tobytes()

    assert crop(0, 0, 0) == crop(0, 0, 0)
    assert len({crop(0, 0, 0), crop(1, 0, 0), crop(0, 1, 0), crop(0, 0, 1)}) == 4


def test_padding_is_zero_after_normalization() -> None:
    """A white pixel beside padding, which is stored as black: (1 - mean) / std by hand for ImageNet's red."""
    image = np.array([[[255, 255, 255], [0, 0, 0]]], np.uint8)
    labels, inside = np.array([[3, VOID]], np.uint8), np.array([[True, False]])
    images, masks = training.collate([(image, labels, inside)], tiny_backbone())
    assert images.shape == (1, 3, 1, 2)
    assert float(images[0, 0, 0, 0]) == pytest.approx((1 - 0.485) / 0.229, rel=1e-5)
    assert not images[..., 1].any()
    assert masks.tolist() == [[[3, VOID]]]


def test_every_step_draws_the_same_images_whoever_starts_it() -> None:
    """Two steps of 4 of 10 images by epochs, and what is left dropped; by iterations, nothing is."""

    def keys(by_epochs: bool, start: int = 0) -> list[list[tuple[int, int, int]]]:
        return list(StepKeys(10, 4, by_epochs, 1, start, 5))

    for by_epochs in (True, False):
        assert keys(by_epochs, 3) == keys(by_epochs)[3:]
        assert [[key[:2] for key in batch] for batch in keys(by_epochs)] == [
            [(iteration, position) for position in range(4)] for iteration in range(5)
        ]
    images = [[key[2] for key in batch] for batch in keys(True)]
    assert len({*images[0], *images[1]}) == len({*images[2], *images[3]}) == 8
    flat = [key[2] for batch in keys(False) for key in batch]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]
