"""Views made in batches: each operation against torchvision and Pillow, the whole against the views made one by one."""

import io
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers import photo
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional

from skipless.common.pixels import MEAN, STD, normalize
from skipless.datasets.images import ImageSource, open_images
from skipless.datasets.storage.decode import decode
from skipless.ssl.data import crops as one_by_one
from skipless.ssl.data import device_crops
from skipless.ssl.data.crops import CropDataset, Crops, View, apply_view, collate, draw_views, multicrop
from skipless.ssl.data.device_crops import (
    DeviceCropDataset,
    DeviceCrops,
    as_row,
    collate_images,
    crops_on_device,
    decode_jpegs,
    decodes_jpegs,
    device_jpeg_size,
    make_views,
)

CPU = torch.device("cpu")
SMALL = Crops(global_crops_size=24, local_crops_size=12, local_crops_number=3)
UNCHANGED = (1.0, 1.0, 1.0, 0.0)


def tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image.copy()).permute(2, 0, 1)


def gray_levels(crops: Tensor) -> Tensor:
    """Undo the normalization: [N, 3, S, S], still of floats."""
    return 255 * (crops * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None])


def make(
    images: list[np.ndarray], views: list[list[View]], crops: Crops, products: torch.dtype = torch.float32
) -> list[np.ndarray]:
    """Views of a batch in gray levels: float64 [views, B, S, S, 3] by size."""
    parameters = torch.tensor([[as_row(view) for view in row] for row in views])
    made = make_views([tensor(image) for image in images], parameters, crops, products=products)
    levels = [gray_levels(group).unflatten(0, (-1, len(images))).permute(0, 1, 3, 4, 2) for group in made]
    for group in levels:
        torch.testing.assert_close(group, group.round(), atol=1e-3, rtol=0)  # whole numbers, as 8 bits are
        assert group.min() > -1e-3
        assert group.max() < 255.001
    return [group.round().double().numpy() for group in levels]


def make_one(image: np.ndarray, view: View, size: int) -> np.ndarray:
    """One view in gray levels, [S, S, 3]; beside it another, in a batch with a larger image."""
    other = View((3, 4, 50, 60), True, (0.7, 1.3, 0.8, -0.1), (2, 3, 1, 0), True, 1.3, True)
    images = [photo(100, 150, seed=1), image]
    return make(images, [[other, other], [other, view]], Crops(global_crops_size=size, local_crops_number=0))[0][1, 1]


def whole(image: np.ndarray, **changes: object) -> View:
    """The view that shows the whole image and changes nothing but what it is told."""
    unchanged = View((0, 0, *image.shape[:2]), False, UNCHANGED, (), False, 0.0, False)
    return unchanged._replace(**changes)


@given(st.data(), *[st.integers(1, 90)] * 2, st.integers(1, 64), st.booleans())
@settings(max_examples=60)
def test_crop_resize_and_flip_are_pillows(data: st.DataObject, rows: int, columns: int, size: int, flip: bool) -> None:
    top, left = data.draw(st.integers(0, 90 - rows)), data.draw(st.integers(0, 120 - columns))
    cut = Image.fromarray(photo()[top : top + rows, left : left + columns])
    # In two steps, since some versions of Pillow go through the rows first where that is less work.
    expected = cut.resize((size, rows), Image.Resampling.BICUBIC).resize((size, size), Image.Resampling.BICUBIC)
    made = make_one(photo(), whole(photo(), box=(top, left, rows, columns), flip=flip), size)
    error = np.abs(made - np.array(expected)[:, :: -1 if flip else 1])
    # Its weights are rounded to 22 bits: a half before the second pass may go either way, and weighs up to 1.25 there.
    assert error.max() <= 2
    assert error.mean() <= 0.34
    if min(rows, columns, size) >= 20:
        # Halfway between two pixels weights are multiples of 1/16, and one value in 16 is a half exactly, in each pass.
        halfway = any((2 * i + 1) * side % (2 * size) == 0 for side in (rows, columns) for i in range(size))
        assert error.mean() <= (1 / 16 if halfway else 0.01)


SQUARE = photo(64, 64)


def colors(position: int, factor: float) -> np.ndarray:
    """The square with one of its color factors changed."""
    factors = (*UNCHANGED[:position], factor, *UNCHANGED[position + 1 :])
    return make_one(SQUARE, whole(SQUARE, factors=factors, order=(2, 0, 3, 1)), 64)


def as_float(image: np.ndarray) -> Tensor:
    return tensor(image).double() / 255


@given(st.floats(0, 2))
@settings(max_examples=30)
def test_brightness_contrast_and_saturation_are_torchvisions(factor: float) -> None:
    # Of images of floats, where torchvision does not truncate. Ours is rounded, half a level; and so is the mean of
    # contrast's gray picture, less than half a level.
    changes = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
    for position, change in enumerate(changes):
        expected = 255 * change(as_float(SQUARE), factor).permute(1, 2, 0).numpy()
        assert np.abs(colors(position, factor) - expected).max() <= 1


@given(st.floats(-0.5, 0.5))
@settings(max_examples=30)
def test_hue_is_opencvs_and_torchvisions_within_the_steps_of_8_bits(turns: float) -> None:
    made = colors(3, turns)
    assert np.abs(made - one_by_one.adjust_hue(SQUARE, turns)).max() <= 1
    # A step, 1/256 turn, is 6 levels in the purest colors; hue, shift and the way back are each off by half of one or
    # (the last) a whole one.
    error = np.abs(made - 255 * functional.adjust_hue(as_float(SQUARE), turns).permute(1, 2, 0).numpy())
    assert error.mean() <= 1
    assert error.max() <= 12


def test_gray_and_solarize_are_torchvisions() -> None:
    gray = make_one(SQUARE, whole(SQUARE, gray=True), 64)
    assert np.abs(gray - functional.rgb_to_grayscale(tensor(SQUARE), 3).permute(1, 2, 0).numpy()).max() <= 1
    solarized = make_one(SQUARE, whole(SQUARE, solarize=True), 64)
    assert np.array_equal(solarized, functional.solarize(tensor(SQUARE), 128).permute(1, 2, 0).numpy())


@given(st.floats(0.1, 2.0), st.sampled_from([64, 9, 5, 2, 1]))
@settings(max_examples=40)
def test_blur_is_opencvs_and_torchvisions(sigma: float, size: int) -> None:
    square = np.ascontiguousarray(SQUARE[:size, :size])
    made = make_one(square, whole(square, sigma=sigma), size)
    error = np.abs(made - cv2.GaussianBlur(square, (0, 0), sigma))
    assert error.max() <= 1
    assert error.mean() <= 0.001
    if size == 64:
        # Its own kernel is as wide as it is told; ours has multiples of 1/256.
        side = round(6 * sigma + 1) | 1
        expected = 255 * functional.gaussian_blur(as_float(square), [side, side], [sigma, sigma])
        assert np.abs(made - expected.permute(1, 2, 0).numpy()).max() <= 2


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 3, 1)])
def test_every_image_has_its_own_factors_and_its_own_order(order: tuple[int, ...]) -> None:
    factors = (1.3, 0.7, 1.2, 0.25)
    changes = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation,
               functional.adjust_hue)  # fmt: skip
    expected = tensor(SQUARE)
    for operation in order:
        expected = changes[operation](expected, factors[operation])
    made = make_one(SQUARE, whole(SQUARE, factors=factors, order=order), 64)
    error = np.abs(made - expected.permute(1, 2, 0).numpy())
    assert error.mean() < 2


def test_half_precision_holds_pixels_and_kernels() -> None:
    """What CUDA multiplies: identity is exact, blur too; resizing is within a level of float32's in each pass."""
    images = [SQUARE, photo(64, 64, seed=2)]
    same, blurred = whole(SQUARE), whole(SQUARE, sigma=1.4)
    half = make(images, [[same, blurred]] * 2, Crops(global_crops_size=64, local_crops_number=0), torch.float16)[0]
    assert np.array_equal(half[0], np.stack(images))
    assert np.abs(half[1] - np.stack([cv2.GaussianBlur(image, (0, 0), 1.4) for image in images])).max() <= 1
    single, half = (make(images, [[same, same]] * 2, Crops(global_crops_size=23, local_crops_number=0), dtype)[0]
                    for dtype in (torch.float32, torch.float16))  # fmt: skip
    assert 0 < np.abs(single - half).mean() < 0.15
    assert np.abs(single - half).max() <= 2


def both_ways(
    images: list[np.ndarray], crops: Crops, products: torch.dtype = torch.float32, seed: int = 0
) -> np.ndarray:
    """Differences in gray levels between the views made here and those of `multicrop`, of the same random numbers."""
    drawn = [
        draw_views(crops, *image.shape[:2], np.random.default_rng((seed, number)))
        for number, image in enumerate(images)
    ]
    expected = [multicrop(image, crops, np.random.default_rng((seed, n))) for n, image in enumerate(images)]
    differences = []
    for group, first in zip(make(images, drawn, crops, products), (0, 2), strict=False):
        for view, made in enumerate(group):
            differences += [np.abs(made[n] - expected[n][first + view]).ravel() for n in range(len(images))]
    return np.concatenate(differences)


@pytest.mark.parametrize(("products", "mean", "rare"), [(torch.float32, 0.1, 2), (torch.float16, 0.2, 3)])
def test_both_ways_see_the_same_views(products: torch.dtype, mean: float, rare: int) -> None:
    # torch resizes by 16-bit weights and OpenCV saturates colors by 10-bit ones: a few per cent of the values are a
    # level off, which later operations carry on; the steps of the hue make two or more of one, rarely.
    images = [photo(50 + 7 * number, 130 - 11 * number, seed=number) for number in range(8)]
    error = both_ways(images, Crops(global_crops_size=64, local_crops_size=32, local_crops_number=4), products)
    assert error.mean() < mean
    assert np.quantile(error, 0.999) <= rare
    assert error.max() <= 12


@given(st.lists(st.tuples(*[st.integers(1, 70)] * 2), min_size=1, max_size=3), st.integers(1, 40), st.integers(1, 20),
       st.integers(0, 3), st.integers(0, 99))  # fmt: skip
@settings(max_examples=40)
def test_any_images_give_the_same_views(
    sizes: list[tuple[int, int]], global_crops_size: int, local_crops_size: int, local_crops_number: int, seed: int
) -> None:
    images = [photo(height, width, seed=number) for number, (height, width) in enumerate(sizes)]
    error = both_ways(
        images,
        Crops(global_crops_size, local_crops_size=local_crops_size, local_crops_number=local_crops_number),
        seed=seed,
    )
    assert error.mean() <= 1  # of a few pixels; an even image may be a level off everywhere
    assert error.max() <= 20
    if error.size > 10_000:
        assert error.mean() < 0.3


@pytest.mark.parametrize("sizes", [(1, 1), (1, 400), (300, 2), (5, 7)])
def test_extreme_shapes_give_the_same_views(sizes: tuple[int, int]) -> None:
    error = both_ways([photo(*sizes), photo(40, 50)], SMALL)
    assert error.mean() < 0.3
    assert error.max() <= 12


def test_chunks_do_not_change_the_views(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [tensor(photo(30 + 9 * number, 80 - 8 * number, seed=number)) for number in range(6)]
    drawn = [draw_views(SMALL, *image.shape[1:], np.random.default_rng(n)) for n, image in enumerate(images)]
    parameters = torch.tensor([[as_row(view) for view in views] for views in drawn])
    together = make_views(images, parameters, SMALL)
    most = 3 * 60 * 72 * 2
    monkeypatch.setitem(device_crops.CHUNK, "cpu", most)
    assert len(list(device_crops._chunks([image.shape[1:] for image in images], SMALL, most))) == 3
    for group, parts in zip(together, make_views(images, parameters, SMALL), strict=True):
        assert torch.equal(group, parts)
    narrow = make_views(images, parameters, SMALL, torch.bfloat16)
    assert all(torch.equal(group.bfloat16(), half) for group, half in zip(together, narrow, strict=True))


def test_nothing_waits_for_the_device() -> None:
    """Tensors of the meta device have no values: whoever asks for one, or for a shape that depends on one, fails."""
    drawn = [draw_views(SMALL, 40, 50, np.random.default_rng(number)) for number in range(4)]
    parameters = torch.tensor([[as_row(view) for view in views] for views in drawn])
    made = make_views([torch.empty(3, 40, 50, dtype=torch.uint8, device="meta")] * 4, parameters, SMALL)
    assert [tuple(group.shape) for group in made] == [(8, 3, 24, 24), (12, 3, 12, 12)]


def jpeg(image: np.ndarray | Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, "JPEG", quality=95, **options)
    return file.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def damaged(file: bytes) -> bytes:
    """Whole to the eye, but of a Huffman table that says of itself that it is impossible."""
    table = file.index(b"\xff\xc4")
    return file[: table + 5] + b"\xff" * 16 + file[table + 21 :]


def without_adobe(file: bytes) -> bytes:
    """Without the segment that says how colors are stored: the components' names say it too."""
    start = file.index(b"\xff\xee")
    return file[:start] + file[start + 16 :]


GRAY, CMYK = Image.fromarray(photo()).convert("L"), Image.fromarray(photo()).convert("CMYK")


@pytest.mark.parametrize(
    ("file", "left_to_the_device"),
    [
        (jpeg(photo()), True),
        (jpeg(photo(), progressive=True), True),
        (jpeg(photo(), subsampling=0), True),
        (jpeg(photo()) + bytes(7), True),
        (jpeg(photo(), exif=turned(1)), True),
        (jpeg(photo(), exif=turned(6)), False),
        (jpeg(photo(), keep_rgb=True), False),
        (without_adobe(jpeg(photo(), keep_rgb=True)), False),
        (jpeg(GRAY), False),
        (jpeg(CMYK), False),
        (jpeg(photo())[:-20], False),
        (jpeg(photo())[:100] + b"\xff\xd9", False),
        (jpeg(photo(240, 200)), False),
        (cv2.imencode(".png", photo())[1].tobytes(), False),
        (b"", False),
        (b"\xff\xd8\xff\xd9", False),
    ],
)
def test_the_device_decodes_what_its_decoder_can_be_trusted_with(file: bytes, left_to_the_device: bool) -> None:
    assert device_jpeg_size(file, min_side=100) == ((90, 120) if left_to_the_device else None)
    if left_to_the_device:
        image = decode_jpegs([torch.frombuffer(bytearray(file), dtype=torch.uint8)], CPU, None)[0]
        assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - decode(file)).mean() < 0.5


def test_one_bad_file_fails_alone() -> None:
    whole, bad = (torch.frombuffer(bytearray(f), dtype=torch.uint8) for f in (jpeg(photo()), damaged(jpeg(photo()))))
    decoded = decode_jpegs([whole, whole, bad, whole, bad], CPU, None)
    assert [image is None for image in decoded] == [False, False, True, False, True]
    assert decode_jpegs([], CPU, None) == []
    assert decodes_jpegs(CPU)
    assert not decodes_jpegs(torch.device("meta"))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), RuntimeError("nvjpegDecode: out of memory")])
def test_no_file_is_to_blame_for_a_lack_of_memory(error: RuntimeError, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode_jpeg(*_args: object, **_keywords: object) -> None:
        raise error

    monkeypatch.setattr("torchvision.io.decode_jpeg", decode_jpeg)
    with pytest.raises(ValueError, match=r"cpu has no memory left to decode 2 JPEGs; lower batch_size"):
        decode_jpegs([torch.zeros(9, dtype=torch.uint8)] * 2, CPU, None)


@pytest.fixture
def source(tmp_path: Path) -> ImageSource:
    """Images of all kinds, of which 2, 3 (at once) and 5 (once it is decoded) turn out unreadable."""
    files = [
        jpeg(photo(40, 50)), jpeg(photo(50, 40, seed=1), exif=turned(6)), b"", jpeg(photo())[:-200],
        jpeg(GRAY), damaged(jpeg(photo(seed=2))), jpeg(photo(300, 400, seed=3)), jpeg(photo(60, 60), progressive=True),
    ]  # fmt: skip
    for number, file in enumerate(files):
        (tmp_path / f"{number}.jpg").write_bytes(file)
    Image.fromarray(photo(33, 44)).save(tmp_path / "8.png")
    return open_images(tmp_path)


@pytest.mark.parametrize("jpegs", [True, False])
def test_batches_are_those_of_the_loader(source: ImageSource, jpegs: bool) -> None:
    keys = [(1, index) for index in range(9)] + [(2, index) for index in (5, 0, 2)]
    by_loader = DataLoader(CropDataset(source, SMALL, 7), batch_size=4, sampler=keys, collate_fn=collate)
    dataset = DeviceCropDataset(source, SMALL, 7, jpegs)
    assert len(dataset) == 9
    drawn = DataLoader(dataset, batch_size=4, sampler=keys, collate_fn=collate_images, num_workers=1)
    to_crops = DeviceCrops(dataset, CPU, torch.float32)
    kinds = []
    for expected, batch in zip(by_loader, drawn, strict=True):
        kinds += [len(shape) for shape in batch["shapes"]]
        crops = to_crops(batch)
        assert torch.equal(batch["index"], expected["index"])
        assert sorted(batch["unreadable"]) == sorted(expected["unreadable"])
        for made, name in zip(crops, ("global", "local"), strict=True):
            error = (gray_levels(made) - gray_levels(normalize(expected[name]))).abs()
            assert error.mean() < 0.5
            assert error.max() <= 12
    # Files of 0, 5 and 7; 300 x 400 pixels are halved to three times the smallest side and more.
    left = {0, 5, 7}
    seen = [index if index not in (2, 3) else 4 for _, index in keys]
    assert kinds == [1 if jpegs and index in left else 3 for index in seen]


def test_a_photograph_is_left_to_the_device_unless_it_is_halved(source: ImageSource) -> None:
    dataset = DeviceCropDataset(source, Crops(global_crops_size=200, local_crops_number=0), 0, jpegs=True)
    assert dataset.min_side == 317
    assert dataset[0, 6].data.ndim == 1
    assert np.array_equal(dataset.sample((0, 6), jpegs=False).data, source.read(6))
    assert dataset[0, 6].parameters.shape == (2, 16)


def test_the_test_picture_tells_right_crops_from_wrong_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    device_crops.makes_same_crops.cache_clear()
    assert device_crops.makes_same_crops(CPU)
    device_crops.makes_same_crops.cache_clear()
    monkeypatch.setattr(device_crops, "gaussian_blur", lambda pixels, *_: pixels)
    assert not device_crops.makes_same_crops(CPU)
    device_crops.makes_same_crops.cache_clear()


def test_auto_is_the_device_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(device_crops, "makes_same_crops", lambda device: True)
    assert [crops_on_device(Crops(device=choice), cuda) for choice in ("auto", "cpu", "device")] == [True, False, True]
    assert [crops_on_device(Crops(device=choice), CPU) for choice in ("auto", "cpu", "device")] == [False, False, True]


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@needs_cuda
def test_a_gpu_makes_the_same_views_and_waits_for_nothing() -> None:
    crops = Crops(global_crops_size=64, local_crops_size=32, local_crops_number=4)
    images = [photo(50 + 7 * number, 130 - 11 * number, seed=number) for number in range(8)]
    drawn = [draw_views(crops, *image.shape[:2], np.random.default_rng((1, n))) for n, image in enumerate(images)]
    parameters = torch.tensor([[as_row(view) for view in views] for views in drawn]).pin_memory()
    on_gpu = [tensor(image).cuda() for image in images]
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = make_views(on_gpu, parameters, crops, torch.float32, torch.float16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for group, first, size in zip(made, (0, 2), (64, 32), strict=True):
        levels = gray_levels(group.cpu()).unflatten(0, (-1, 8)).permute(0, 1, 3, 4, 2).numpy()
        views = range(first, first + len(levels))
        expected = [[apply_view(i, d[view], size) for i, d in zip(images, drawn, strict=True)] for view in views]
        error = np.abs(levels - np.array(expected, np.float64))
        assert error.mean() < 0.2
        assert np.quantile(error, 0.999) <= 3.01


@needs_cuda
def test_a_gpu_decodes_into_memory_that_nobody_reads() -> None:
    device = torch.device("cuda", 0)
    stream = torch.cuda.Stream(device)
    files = [torch.frombuffer(bytearray(jpeg(photo(400, 500, seed=n))), dtype=torch.uint8) for n in range(16)]
    expected = decode_jpegs(files, CPU, None)
    busy = torch.randn(8192, 8192, device=device)
    for _ in range(10):
        for _ in range(10):
            busy = torch.nn.functional.normalize(busy @ busy)
        images = decode_jpegs(files, device, stream)
        sums = [image.sum(dtype=torch.int64) for image in images]  # read behind the work above, then given back
        held = [image.cpu() for image in images[:2]]
        del images
        again = decode_jpegs(files[::-1], device, stream)
        assert [int(s) for s in sums[:2]] == [int(image.sum(dtype=torch.int64)) for image in held]
        for image, by_cpu in zip(again[::-1], expected, strict=True):
            assert (image.cpu().int() - by_cpu.int()).abs().float().mean() < 3
        assert [int(s) for s in sums] == [int(image.sum(dtype=torch.int64)) for image in again[::-1]]


@pytest.mark.skipif("SKIPLESS_TEST_DATA" not in os.environ, reason="SKIPLESS_TEST_DATA names no folder of real images")
def test_both_ways_see_the_same_views_of_real_photographs() -> None:
    source = open_images(Path(os.environ["SKIPLESS_TEST_DATA"]) / "imagenette128" / "val")
    images = [source.read(index) for index in range(0, len(source), len(source) // 16)]
    error = both_ways(images, Crops(global_crops_size=96, local_crops_size=48, local_crops_number=4))
    assert error.mean() < 0.1
    assert np.quantile(error, 0.999) <= 2
