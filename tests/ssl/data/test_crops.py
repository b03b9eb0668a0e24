"""Multi-crop views: each operation against torchvision, the law of their parameters, and the loading of batches."""

import hashlib
import math
import os
from collections import Counter
from contextlib import nullcontext
from itertools import permutations
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers import photo
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import binomtest, chisquare, ks_2samp, kstest
from torch.utils.data import DataLoader
from torchvision.transforms import ColorJitter, GaussianBlur, RandomResizedCrop
from torchvision.transforms import v2 as transforms
from torchvision.transforms.v2 import functional

from skipless.common.pixels import center_crop, crop_box, normalize, resample
from skipless.datasets.images import ImageSource, open_images
from skipless.ssl.data import crops as module
from skipless.ssl.data.crops import CropDataset, Crops, View, apply_view, collate, color_jitter, draw_views, multicrop
from skipless.ssl.data.loader import StepBatches, crop_loader

PLAIN = {"jitter_probability": 0, "gray_probability": 0, "blur_probability": (0, 0, 0), "solarize_probability": 0}


def tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image.copy()).permute(2, 0, 1)


def difference(image: np.ndarray, expected: torch.Tensor | Image.Image) -> int:
    reference = expected.permute(1, 2, 0).numpy() if isinstance(expected, torch.Tensor) else np.asarray(expected)
    assert image.dtype == reference.dtype == np.uint8
    assert image.shape == reference.shape
    return int(np.abs(image.astype(int) - reference).max())


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@given(st.floats(0, 2))
@settings(max_examples=30)
def test_brightness_contrast_and_saturation_are_torchvisions(factor: float) -> None:
    image = photo()
    assert difference(module.adjust_brightness(image, factor), functional.adjust_brightness(tensor(image), factor)) <= 1
    assert difference(module.adjust_contrast(image, factor), functional.adjust_contrast(tensor(image), factor)) <= 2
    assert difference(module.adjust_saturation(image, factor), functional.adjust_saturation(tensor(image), factor)) <= 2


@given(st.floats(-0.5, 0.5))
@settings(max_examples=30)
def test_hue_is_torchvisions_within_the_steps_of_8_bits(turns: float) -> None:
    # A step, 1/256 turn, is 6 levels in the purest colors. The hue is rounded, the shift is rounded, and OpenCV's way
    # back from HSV divides by 255: half a step each, or up to one for the last.
    image = photo()
    expected = functional.adjust_hue(tensor(image), turns).permute(1, 2, 0).numpy()
    error = np.abs(module.adjust_hue(image, turns).astype(int) - expected)
    assert error.mean() <= 1
    assert error.max() <= 12


def test_gray_and_solarize_are_torchvisions() -> None:
    image = photo()
    assert difference(module.gray(image), functional.rgb_to_grayscale(tensor(image), 3)) <= 1
    assert difference(module.gray(image), Image.fromarray(image).convert("L").convert("RGB")) <= 1
    assert difference(module.solarize(image), functional.solarize(tensor(image), 128)) == 0


@pytest.mark.parametrize("sigma", [0.1, 0.4, 1.0, 1.7, 2.0])
def test_blur_is_torchvisions(sigma: float) -> None:
    image = photo()
    blurred = functional.gaussian_blur(tensor(image), [17, 17], [sigma, sigma])
    assert difference(module.gaussian_blur(image, sigma), blurred) <= 2


@given(*[st.integers(1, 150)] * 2, *[st.integers(1, 120)] * 2)
@settings(max_examples=60)
def test_resampling_is_pillows_antialiased_bicubic(height: int, width: int, new_height: int, new_width: int) -> None:
    image = photo(150, 150)[:height, :width]
    expected = Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BICUBIC)
    assert difference(resample(image, new_height, new_width), expected) <= 2


@pytest.mark.parametrize(("height", "width"), [(90, 120), (120, 90), (257, 100), (64, 64), (31, 300)])
@pytest.mark.parametrize(("size", "resize"), [(56, 64), (64, 64), (33, 40)])
def test_center_crop_is_torchvisions(height: int, width: int, size: int, resize: int) -> None:
    image = photo(height, width)
    bicubic = transforms.InterpolationMode.BICUBIC
    reference = transforms.Compose([transforms.Resize(resize, bicubic), transforms.CenterCrop(size)])
    assert difference(center_crop(image, size, resize), reference(Image.fromarray(image))) <= 2


def test_center_crop_refuses_more_than_there_is() -> None:
    with pytest.raises(ValueError, match="cannot cut 65 pixels out of a short side of 64"):
        center_crop(photo(), 65, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_normalize_is_torchvisions_view_by_view(dtype: torch.dtype) -> None:
    views = torch.randint(0, 256, (3, 2, 5, 7, 3), dtype=torch.uint8)
    before = views.clone()
    result = normalize(views, dtype)
    assert result.dtype == dtype
    assert torch.equal(views, before)
    for view in range(3):
        for item in range(2):
            pixels = functional.to_dtype(views[view, item].permute(2, 0, 1), torch.float64, scale=True)
            expected = functional.normalize(pixels, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
            tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(result[view * 2 + item].double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 200)])
@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4)])
def test_boxes_follow_the_law_of_torchvision(height: int, width: int, scale: tuple[float, float]) -> None:
    count = 2000
    torch.manual_seed(0)
    blank = torch.empty(3, height, width)
    expected = np.array([RandomResizedCrop.get_params(blank, list(scale), [3 / 4, 4 / 3]) for _ in range(count)])
    ours = np.array([crop_box(height, width, scale, rng(1, number)) for number in range(count)])
    for statistic in (
        lambda box: box[:, 0],
        lambda box: box[:, 1],
        lambda box: box[:, 2] * box[:, 3],
        lambda box: box[:, 3] / box[:, 2],
    ):
        assert ks_2samp(statistic(ours), statistic(expected)).pvalue > 1e-3


@pytest.mark.parametrize(("height", "width"), [(10, 400), (400, 10), (1, 7), (9, 1), (3, 50)])
def test_long_images_fall_back_to_torchvisions_central_crop(height: int, width: int) -> None:
    expected = RandomResizedCrop.get_params(torch.empty(3, height, width), [0.99, 1.0], [3 / 4, 4 / 3])
    assert crop_box(height, width, (0.99, 1.0), rng(0)) == tuple(expected)


@given(st.integers(1, 300), st.integers(1, 300), st.floats(0.01, 1), st.integers(0, 9))
def test_boxes_lie_inside(height: int, width: int, low: float, seed: int) -> None:
    top, left, rows, columns = crop_box(height, width, (low, 1.0), rng(seed))
    assert top >= 0
    assert left >= 0
    assert rows > 0
    assert columns > 0
    assert top + rows <= height
    assert left + columns <= width


def as_text(view: View) -> str:
    """A view's parameters to nine digits."""
    factors = " ".join(f"{factor:.9f}" for factor in view.factors)
    return f"{view.box} {view.flip:d} {factors} {view.order} {view.gray:d} {view.sigma:.9f} {view.solarize:d}"


def test_a_seed_keeps_its_views() -> None:
    """Recorded when the views were drawn and made in one go: runs of then can be continued and compared."""
    assert [as_text(view) for view in draw_views(Crops(local_crops_number=2), 90, 120, rng(0, 1, 2))] == [
        "(11, 10, 78, 70) 1 1.075603693 1.156197398 1.066986442 0.035042305 (1, 3, 0, 2) 0 1.335450512 0",
        "(5, 32, 60, 76) 1 1.157238245 1.070093535 1.165980195 -0.043602502 (2, 1, 0, 3) 0 1.506117035 0",
        "(35, 44, 52, 60) 0 0.681643980 1.348569250 0.945722645 0.053785371 (1, 0, 2, 3) 0 0.605711601 0",
        "(39, 42, 40, 43) 1 0.984600039 0.883574189 1.187018678 -0.000173622 (0, 2, 1, 3) 0 0.000000000 0",
    ]
    digest = hashlib.sha256()
    for number in range(50):
        for view in draw_views(Crops(), 90 + number, 120, rng(3, 1, number)):
            digest.update(as_text(view).encode())
    assert digest.hexdigest() == "d7bd24affaf3f4e7c5da3b73fa240de560bd40a3674628f70d6bac68156177af"
    # Of the pixels their means: versions of OpenCV may round otherwise.
    views = multicrop(photo(), Crops(global_crops_size=40, local_crops_size=20, local_crops_number=2), rng(0, 1, 2))
    means = [(152.12, 164.9, 119.58), (154.78, 187.79, 136.39), (55.68, 111.24, 68.68), (121.84, 154.08, 81.09)]
    np.testing.assert_allclose([view.mean((0, 1)) for view in views], means, atol=0.7)


@pytest.fixture(scope="module")
def drawn() -> list[list[View]]:
    """2,000 images' views, two global ones and three local ones."""
    return [draw_views(Crops(local_crops_number=3), 375, 500, rng(8, number)) for number in range(2000)]


def test_color_factors_follow_the_law_of_torchvision(drawn: list[list[View]]) -> None:
    torch.manual_seed(0)
    strengths = [(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]
    expected = [ColorJitter.get_params(*strengths) for _ in range(2000)]
    for views in zip(*drawn, strict=True):
        ours = [view for view in views if view.order]
        assert binomtest(len(ours), 2000, 0.8).pvalue > 1e-3
        for position in range(4):
            factors = [view.factors[position] for view in ours]
            assert ks_2samp(factors, [float(their[1 + position]) for their in expected]).pvalue > 1e-3
        orders = Counter(view.order for view in ours)
        assert set(orders) == set(permutations(range(4)))
        assert chisquare(list(orders.values())).pvalue > 1e-3
        assert all(view.factors == (1, 1, 1, 0) for view in views if not view.order)


def test_strengths_above_one_do_not_turn_negative() -> None:
    jitters = [module.draw_jitter((1.5, 0, 0, 0), rng(3, number)) for number in range(1500)]
    assert kstest([factors[0] for factors, _ in jitters], "uniform", (0, 2.5)).pvalue > 1e-3


def test_blur_follows_the_law_of_torchvision(drawn: list[list[View]]) -> None:
    torch.manual_seed(0)
    expected = [GaussianBlur.get_params(0.1, 2.0) for _ in range(2000)]
    for number, probability in enumerate([1.0, 0.1, 0.5, 0.5, 0.5]):
        sigmas = [views[number].sigma for views in drawn if views[number].sigma]
        assert binomtest(len(sigmas), 2000, probability).pvalue > 1e-3
        assert ks_2samp(sigmas, expected).pvalue > 1e-3


def test_the_other_operations_have_their_probabilities(drawn: list[list[View]]) -> None:
    for number, solarized in enumerate([0.0, 0.2, 0.0, 0.0, 0.0]):
        views = [views[number] for views in drawn]
        for count, probability in (
            (sum(view.flip for view in views), 0.5),
            (sum(view.gray for view in views), 0.2),
            (sum(view.solarize for view in views), solarized),
        ):
            assert binomtest(count, 2000, probability).pvalue > 1e-3


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)])
def test_colors_change_in_the_order_asked_for(order: tuple[int, ...]) -> None:
    factors = (1.3, 0.7, 1.2, 0.25)
    changes = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation,
               functional.adjust_hue)  # fmt: skip
    expected = tensor(photo())
    for operation in order:
        expected = changes[operation](expected, factors[operation])
    error = np.abs(color_jitter(photo(), factors, order).astype(int) - expected.permute(1, 2, 0).numpy())
    assert error.mean() < 2  # hue's steps; another order is 5 and more off
    assert color_jitter(photo(), (1, 1, 1, 0), order).tobytes() == photo().tobytes()
    assert color_jitter(photo(), factors, ()).tobytes() == photo().tobytes()


def test_a_view_is_its_operations_one_after_the_other() -> None:
    view = View((10, 20, 50, 60), True, (1.0, 1.0, 1.0, 0.0), (), True, 1.0, True)
    pixels = tensor(photo())
    pixels = functional.resized_crop(pixels, 10, 20, 50, 60, [32, 32], transforms.InterpolationMode.BICUBIC)
    pixels = functional.rgb_to_grayscale(functional.horizontal_flip(pixels), 3)
    pixels = functional.solarize(functional.gaussian_blur(pixels, [9, 9], [1.0, 1.0]), 128)
    assert difference(apply_view(photo(), view, 32), pixels) <= 3


def test_a_whole_view_is_the_image_or_its_mirror_image() -> None:
    image = photo(16, 16)
    crops = Crops(
        global_crops_size=16,
        global_crops_scale=(1, 1),
        local_crops_size=16,
        local_crops_scale=(1, 1),
        local_crops_number=2,
        **PLAIN,
    )
    flipped = 0
    for number in range(150):
        for view in multicrop(image, crops, rng(5, number)):
            flipped += np.array_equal(view, image[:, ::-1])
            assert np.array_equal(view, image) or np.array_equal(view, image[:, ::-1])
    assert binomtest(flipped, 600, 0.5).pvalue > 1e-3


@given(
    st.integers(1, 80),
    st.integers(1, 80),
    st.integers(1, 40),
    st.integers(1, 24),
    st.integers(0, 3),
    st.integers(0, 99),
)
@settings(max_examples=60)
def test_any_image_gives_views_of_the_sizes_asked_for(
    height: int, width: int, global_crops_size: int, local_crops_size: int, local_crops_number: int, seed: int
) -> None:
    image = photo(80, 80)[:height, :width]
    before = image.copy()
    crops = Crops(
        global_crops_size=global_crops_size, local_crops_size=local_crops_size, local_crops_number=local_crops_number
    )
    views = multicrop(image, crops, rng(seed))
    assert [view.shape for view in views] == [
        (side, side, 3) for side in [global_crops_size] * 2 + [local_crops_size] * local_crops_number
    ]
    assert all(view.dtype == np.uint8 for view in views)
    assert np.array_equal(image, before)
    for view, again in zip(views, multicrop(image, crops, rng(seed)), strict=True):
        assert np.array_equal(view, again)


def test_read_only_images_are_fine() -> None:
    image = photo(16, 16)
    image.flags.writeable = False
    crops = Crops(global_crops_size=16, global_crops_scale=(1, 1), local_crops_number=0, **PLAIN)
    views = multicrop(image, crops, rng(0))
    views[0][:] = 0
    assert image.any()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("global_crops_size", 0),
        ("local_crops_size", -1),
        ("local_crops_number", -1),
        ("global_crops_scale", (0.0, 1.0)),
        ("global_crops_scale", (0.5, 1.1)),
        ("local_crops_scale", (0.4, 0.1)),
        ("local_crops_scale", (math.nan, 0.4)),
        ("color_jitter", (0.4, -0.1, 0.2, 0.1)),
        ("color_jitter", (0.4, 0.4, 0.2, 0.6)),
        ("jitter_probability", 1.2),
        ("gray_probability", -0.1),
        ("blur_probability", (1.0, 0.1, 1.5)),
        ("blur_sigma", (2.0, 0.1)),
        ("blur_sigma", (0.0, 2.0)),
        ("solarize_probability", math.nan),
    ],
)
def test_settings_out_of_range_are_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"crops\.{field} is .*: ") as caught:
        Crops(**{field: value})
    assert "\n" not in str(caught.value)


SMALL = Crops(global_crops_size=24, local_crops_size=12, local_crops_number=3)


@pytest.fixture
def source(tmp_path: Path) -> ImageSource:
    """Eight images, two of which (2 and 3) cannot be read."""
    for number in range(8):
        Image.fromarray(np.roll(photo(40, 50), 5 * number, axis=1)).save(tmp_path / f"{number}.jpg", quality=95)
    (tmp_path / "2.jpg").write_bytes(b"")
    (tmp_path / "3.jpg").write_bytes((tmp_path / "4.jpg").read_bytes()[:-200])
    return open_images(tmp_path)


def test_a_full_dev_shm_is_an_error_instead_of_a_wait_without_end(
    source: ImageSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory(shm)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    order = StepBatches(8, 4, 1, 0, 0, 2)
    for workers in (0, 1):
        loader, _ = crop_loader(source, SMALL, order, workers, torch.device("cpu"))
        with pytest.raises(RuntimeError, match="shared memory") if workers else nullcontext():
            assert len(list(loader)) == 2


def batches(source: ImageSource, keys: list[tuple[int, int]], workers: int, seed: int = 0) -> list[dict]:
    dataset = CropDataset(source, SMALL, seed)
    return list(DataLoader(dataset, batch_size=4, sampler=keys, collate_fn=collate, num_workers=workers))


def test_batches_do_not_depend_on_the_workers(source: ImageSource) -> None:
    keys = [(0, index) for index in range(8)] + [(1, index) for index in (5, 0, 2, 7)]
    alone, shared = batches(source, keys, 0), batches(source, keys, 2)
    assert len(alone) == len(shared) == 3
    for one, other in zip(alone, shared, strict=True):
        assert one["global"].shape == (2, 4, 24, 24, 3)
        assert one["local"].shape == (3, 4, 12, 12, 3)
        assert one["global"].dtype == one["local"].dtype == torch.uint8
        assert one["index"].dtype == torch.int64
        for name in ("global", "local", "index"):
            assert torch.equal(one[name], other[name])
        assert one["unreadable"] == other["unreadable"]


def test_views_depend_on_seed_epoch_and_index(source: ImageSource) -> None:
    def first(seed: int, epoch: int, index: int) -> bytes:
        return b"".join(view.tobytes() for view in CropDataset(source, SMALL, seed)[epoch, index].views)

    different = {first(seed, epoch, index) for seed in (0, 1) for epoch in (0, 1) for index in (0, 1)}
    assert len(different) == 8
    assert first(1, 0, 1) == first(1, 0, 1)


def test_unreadable_images_are_replaced_and_reported(source: ImageSource) -> None:
    dataset = CropDataset(source, SMALL, 0)
    sample = dataset[0, 2]
    assert sample.index == 4
    assert [Path(line.split(": ")[0]).name for line in sample.unreadable] == ["2.jpg", "3.jpg"]
    assert "empty" in sample.unreadable[0]
    assert "truncated" in sample.unreadable[1]
    # the next readable image, seen with the random numbers of the key asked for
    for view, expected in zip(sample.views, multicrop(source.read(4), SMALL, rng(0, 0, 2)), strict=True):
        assert np.array_equal(view, expected)
    batch = collate([dataset[0, 1], sample])
    assert batch["index"].tolist() == [1, 4]
    assert batch["unreadable"] == sample.unreadable


def test_the_search_for_a_readable_image_wraps_and_ends(source: ImageSource) -> None:
    for name in ("5", "6", "7", "4"):
        (source.root / f"{name}.jpg").write_bytes(b"")
    assert CropDataset(source, SMALL, 0)[0, 4].index == 0
    for name in ("0", "1"):
        (source.root / f"{name}.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"8 images in a row cannot be read, the first of them .*6\.jpg: the file is"):
        CropDataset(source, SMALL, 0)[0, 6]


def test_large_photographs_are_decoded_smaller_but_never_enlarged(tmp_path: Path) -> None:
    Image.fromarray(photo(800, 1000)).save(tmp_path / "a.jpg")
    source = open_images(tmp_path)
    dataset = CropDataset(source, SMALL, 0)
    # 24 / sqrt(0.4) = 37.9; 12 / sqrt(0.05) = 53.7
    assert dataset.min_side == 54
    assert source.read(0, dataset.min_side).shape == (100, 125, 3)
    for view, expected in zip(dataset[0, 0].views, multicrop(source.read(0, 54), SMALL, rng(0, 0, 0)), strict=True):
        assert np.array_equal(view, expected)
    assert CropDataset(source, Crops(global_crops_size=24, local_crops_number=0), 0).min_side == 38


def test_batches_are_view_major(tmp_path: Path) -> None:
    colors = [(200, 10, 10), (10, 200, 10), (10, 10, 200)]
    for number, color in enumerate(colors):
        Image.new("RGB", (20, 30), color).save(tmp_path / f"{number}.png")
    dataset = CropDataset(
        open_images(tmp_path), Crops(global_crops_size=8, local_crops_size=4, local_crops_number=2, **PLAIN), 0
    )
    batch = collate([dataset[0, index] for index in range(3)])
    for name in ("global", "local"):
        for view in batch[name]:
            assert [item[0, 0].tolist() for item in view] == [list(color) for color in colors]
    assert collate([CropDataset(dataset.images, Crops(local_crops_number=0), 0)[0, 0]])["local"] is None
    assert len(dataset) == 3


def test_loading_leaves_the_other_cores_alone(source: ImageSource) -> None:
    cv2.setNumThreads(4)
    CropDataset(source, SMALL, 0)[0, 0]
    assert cv2.getNumThreads() == 1


@pytest.mark.skipif("SKIPLESS_TEST_DATA" not in os.environ, reason="SKIPLESS_TEST_DATA names no folder of real images")
def test_operations_agree_with_torchvision_on_real_photographs() -> None:
    source = open_images(os.environ["SKIPLESS_TEST_DATA"])
    for index in range(0, len(source), max(1, len(source) // 20)):
        image = source.read(index)
        pixels = tensor(image)
        assert difference(module.adjust_saturation(image, 1.4), functional.adjust_saturation(pixels, 1.4)) <= 2
        assert difference(module.adjust_contrast(image, 0.6), functional.adjust_contrast(pixels, 0.6)) <= 2
        assert difference(module.adjust_hue(image, 0.06), functional.adjust_hue(pixels, 0.06)) <= 12
        assert (
            difference(resample(image, 96, 96), Image.fromarray(image).resize((96, 96), Image.Resampling.BICUBIC)) <= 2
        )
