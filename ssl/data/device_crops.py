"""The views of ssl/data/crops.py made in batches on the device that trains, which leaves the loader only files to read.

    dataset = DeviceCropDataset(images, Crops(), seed=0, jpegs=decodes_jpegs(device))
    loader = DataLoader(dataset, batch_size=64, sampler=keys, collate_fn=collate_images)
    to_crops = DeviceCrops(dataset, device, torch.bfloat16)
    for batch in loader:
        crops = to_crops(batch)  # [[2 * B, 3, G, G], [L * B, 3, S, S]], normalized

The loader draws what is random, by the same random numbers as CropDataset: a (seed, epoch, index) gives the same views.
JPEGs go to the device as files where its decoder can be trusted with them; what is left is decoded by the loader. Crop,
resize and flip of a whole batch are two products with matrices of Pillow's bicubic weights, and blur two more with
OpenCV's kernels. A view is that of crops.py to 0.04 gray levels on average, and 999 of 1,000 of its values to 2;
with float16, which the products use on CUDA, to 0.12 and 3.

No function here makes the host wait for the work that the device has under way. Decoding on a GPU waits for itself.
"""

import io
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from skipless.common.pixels import MEAN, STD, normalize
from skipless.datasets.images import ImageSource, UnreadableImage
from skipless.datasets.storage.decode import decode
from skipless.ssl.data.crops import Crops, View, apply_view, draw_views, first_readable, smallest_side

CHUNK = {"cpu": 2**25, "cuda": 2**28}  # largest number of values in a tensor of pixels: few launches of large kernels
CONTRAST, SATURATION, HUE = 1, 2, 3  # positions in View.factors


def crops_on_device(crops: Crops, device: torch.device) -> bool:
    """Whether the crops are to be made where the model trains: see `Crops.device`."""
    return crops.device == "device" or (crops.device == "auto" and device.type == "cuda" and makes_same_crops(device))


def where_made(crops: Crops, device: torch.device) -> str:
    """The same in words, for the line about the machine at the start of a run."""
    return f"; crops: made {f'on {device}' if crops_on_device(crops, device) else 'by the loader'}"


@lru_cache(maxsize=8)
def makes_same_crops(device: torch.device) -> bool:
    """Whether the crops that this device makes of a test picture are those of crops.py, to a gray level on average.

    Looked at before `auto` relies on a device: crops that are wrong would train a worse network without an error.
    """
    crops = Crops(global_crops_size=48, local_crops_size=24, local_crops_number=4)
    coarse = np.random.default_rng(0).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    image = cv2.resize(coarse, (160, 120), interpolation=cv2.INTER_CUBIC)
    views = draw_views(crops, image.shape[0], image.shape[1], np.random.default_rng(1))
    parameters = torch.tensor([[as_row(view) for view in views]])
    pixels = torch.from_numpy(image).permute(2, 0, 1).to(device)
    products = torch.float16 if device.type == "cuda" else torch.float32
    made = make_views([pixels], parameters, crops, products=products)
    for views_made, group, size in zip(
        made, (views[:2], views[2:]), (crops.global_crops_size, crops.local_crops_size), strict=True
    ):
        stacked = np.stack([apply_view(image, view, size) for view in group])
        difference = (views_made.cpu() - normalize(torch.from_numpy(stacked)[:, None])).abs()
        if not difference.mean() * 255 * max(STD) < 1:
            return False
    return True


# What the loader's processes do ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class DrawnSample:
    """What DeviceCropDataset gives for one key."""

    data: np.ndarray
    """uint8: the bytes of a JPEG [n], or pixels [H, W, 3]."""
    parameters: np.ndarray
    """float32 [views, 16], see `as_row`."""
    key: tuple[int, int]
    """(epoch, index) asked for."""
    index: int
    """Of the image the views show: not the one asked for where that was unreadable."""
    unreadable: list[str]
    """`path: reason` of images passed over on the way."""


def as_row(view: View) -> tuple[float, ...]:
    """A view as 16 numbers: box, flip, factors, order, gray, sigma, solarize."""
    order = view.order or (0, 1, 2, 3)
    return (*view.box, view.flip, *view.factors, *order, view.gray, view.sigma, view.solarize)


class DeviceCropDataset(Dataset[DrawnSample]):
    """CropDataset without the crops: images as files or pixels, and what is drawn for their views.

    `jpegs`: leave JPEGs undecoded where `device_jpeg_size` allows it. Raises ValueError as CropDataset does.
    """

    def __init__(self, images: ImageSource, crops: Crops, seed: int, jpegs: bool) -> None:
        self.images, self.crops, self.seed, self.jpegs = images, crops, seed, jpegs
        self.min_side = smallest_side(crops)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> DrawnSample:
        cv2.setNumThreads(0)  # as CropDataset does
        return self.sample((int(key[0]), int(key[1])), self.jpegs)

    def sample(self, key: tuple[int, int], jpegs: bool) -> DrawnSample:
        """The sample of a key; with its pixels, whatever its file is, where `jpegs` is false."""

        def read(position: int) -> tuple[np.ndarray, tuple[int, int]]:
            data = self.images.read_bytes(position)
            size = device_jpeg_size(data, self.min_side) if jpegs else None
            if size is not None:
                return np.frombuffer(data, np.uint8), size
            try:
                pixels = decode(data, self.min_side)
            except ValueError as error:
                raise UnreadableImage(self.images.place(position), str(error)) from error
            return pixels, pixels.shape[:2]

        (data, size), index, unreadable = first_readable(self.images, key[1], read)
        views = draw_views(self.crops, *size, np.random.default_rng((self.seed, *key)))
        return DrawnSample(data, np.array([as_row(view) for view in views], np.float32), key, index, unreadable)


def device_jpeg_size(data: bytes, min_side: int) -> tuple[int, int] | None:
    """Height and width of a JPEG that a GPU's decoder shows as `decode(data, min_side)` does, but for small differences
    of the decoders; None for what the loader should decode.

    That is every other format, other than three components of YCbCr in 8 bits, an EXIF orientation, a file that does
    not end as JPEGs do (`decode` says whether it is truncated), and a photograph so large that `decode` halves it: so
    both ways draw crops of the same size, and one large image makes no large batch.
    """
    if not data.startswith(b"\xff\xd8") or not data[-1024:].rstrip(b"\0").endswith(b"\xff\xd9"):
        return None
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as header:
            width, height = header.size
            names = [layer[0] for layer in header.layer]  # type: ignore[attr-defined]
            plain = (
                header.mode == "RGB"
                and header.info.get("adobe_transform", 1) == 1
                and names != list(b"RGB")
                and header.getexif().get(0x0112, 1) == 1
            )
    except Exception:  # whatever is wrong with it, `decode` says
        return None
    halved = 0 < min_side <= min(height, width) // 2
    return (height, width) if plain and not halved else None


def collate_images(samples: Sequence[DrawnSample]) -> dict[str, Any]:
    """Samples of a batch.

    Returns {"data": uint8 [n], the `data` of all samples one after the other (one tensor, since each one that a process
    hands over holds a file open), "shapes": list of their shapes, "parameters": float32 [B, views, 16], "keys": list of
    (epoch, index), "index": int64 [B], "unreadable": list of `path: reason`}.
    """
    return {
        "data": torch.from_numpy(np.concatenate([sample.data.ravel() for sample in samples])),
        "shapes": [list(sample.data.shape) for sample in samples],
        "parameters": torch.from_numpy(np.stack([sample.parameters for sample in samples])),
        "keys": [list(sample.key) for sample in samples],
        "index": torch.tensor([sample.index for sample in samples], dtype=torch.int64),
        "unreadable": [line for sample in samples for line in sample.unreadable],
    }


# What the training process does ---------------------------------------------------------------------------------------


def decode_jpegs(files: list[Tensor], device: torch.device, stream: torch.cuda.Stream | None) -> list[Tensor | None]:
    """Files, uint8 [n] on the CPU, as uint8 [3, H, W] on the device; None for those its decoder refuses.

    `stream`: of a CUDA device, used for nothing else; None on a CPU.
    """
    if stream is None:
        return _decode_halving(files, device)
    # nvJPEG writes at once, even into memory that earlier work of the calling stream still reads (torchvision's pull
    # request 9606). Memory of a stream of its own has no such readers: those of other streams are recorded, and it is
    # handed out again only when they are done.
    with torch.cuda.stream(stream):
        images = _decode_halving(files, device)
    reader = torch.cuda.current_stream(device)
    reader.wait_stream(stream)
    for image in images:
        if image is not None:
            image.record_stream(reader)
    return images


def _decode_halving(files: list[Tensor], device: torch.device) -> list[Tensor | None]:
    """In halves where that fails, since one file fails all; but no file is to blame for a lack of memory."""
    if not files:
        return []
    with warnings.catch_warnings():
        # torchvision hands its decoders over to TorchCodec. Once they are gone, `decodes_jpegs` says no, and the loader
        # decodes.
        warnings.filterwarnings("ignore", message=".*superseded", category=DeprecationWarning)
        from torchvision.io import ImageReadMode, decode_jpeg  # takes a second to import

        try:
            return list(decode_jpeg(files, ImageReadMode.RGB, device=device))
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower():
                raise ValueError(
                    f"{device} has no memory left to decode {len(files)} JPEGs; lower batch_size, raise accumulate, or "
                    "leave decoding to the loader (crops.device auto)"
                ) from error
    if len(files) == 1:
        return [None]
    half = len(files) // 2
    return _decode_halving(files[:half], device) + _decode_halving(files[half:], device)


def decodes_jpegs(device: torch.device) -> bool:
    """Whether torchvision decodes JPEGs on this device: not every build has nvJPEG."""
    if device.type not in ("cpu", "cuda"):
        return False
    file = torch.from_numpy(cv2.imencode(".jpg", np.full((16, 16, 3), 200, np.uint8))[1].ravel())
    try:
        image = decode_jpegs([file], device, torch.cuda.Stream(device) if device.type == "cuda" else None)[0]
    except ImportError:
        return False
    return image is not None and abs(image.float().mean().item() - 200) < 2


class DeviceCrops:
    """Makes the crops of batches of a DeviceCropDataset, on a GPU on a stream of its own: beside the step before.

    Args:
        dataset: The batches' own, for images that turn out unreadable.
        device: Where the crops are made.
        dtype: Of the crops.
    """

    def __init__(self, dataset: DeviceCropDataset, device: torch.device, dtype: torch.dtype) -> None:
        self.dataset, self.device, self.dtype = dataset, device, dtype
        # Before what the caller queued for the step: small kernels, which fill what the large ones leave idle.
        self.stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self.decoder = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: dict[str, Any]) -> list[Tensor]:
        """Normalized crops [views * B, 3, S, S], globals first, locals second if there are any.

        On a GPU the caller's stream waits for them, and they wait for nothing of the caller's. Where a JPEG turns out
        unreadable, the batch's index, parameters and unreadable change.
        """
        if self.stream is None:
            return make_views(self.decode(batch), batch["parameters"], self.dataset.crops, self.dtype)
        with torch.cuda.stream(self.stream):
            images = self.decode(batch)
            made = make_views(images, batch["parameters"], self.dataset.crops, self.dtype, torch.float16)
        reader = torch.cuda.current_stream(self.device)
        reader.wait_stream(self.stream)
        for crops in made:
            crops.record_stream(reader)
        return made

    def decode(self, batch: dict[str, Any]) -> list[Tensor]:
        """The batch's images, uint8 [3, H, W], on the device."""
        shapes, data = batch["shapes"], batch["data"]
        if all(len(shape) == 3 for shape in shapes):
            data = data.to(self.device, non_blocking=True)  # one copy for all
        pieces = [
            piece.view(shape) for piece, shape in zip(data.split([math.prod(s) for s in shapes]), shapes, strict=True)
        ]
        jpegs = [number for number, piece in enumerate(pieces) if piece.ndim == 1]
        files = decode_jpegs([pieces[number] for number in jpegs], self.device, self.decoder)
        decoded = dict(zip(jpegs, files, strict=True))
        images = []
        for number, piece in enumerate(pieces):
            image = decoded.get(number)
            if image is None:
                if number in decoded:  # damaged: as CropDataset sees it
                    sample = self.dataset.sample(tuple(batch["keys"][number]), jpegs=False)
                    piece = torch.from_numpy(sample.data)
                    batch["parameters"][number] = torch.from_numpy(sample.parameters)
                    batch["index"][number] = sample.index
                    batch["unreadable"] += sample.unreadable
                image = piece.to(self.device, non_blocking=True).permute(2, 0, 1)
            images.append(image)
        return images


def make_views(
    images: Sequence[Tensor],
    parameters: Tensor,
    crops: Crops,
    dtype: torch.dtype = torch.float32,
    products: torch.dtype = torch.float32,
) -> list[Tensor]:
    """All views of a batch, normalized, as `normalize` gives them.

    Args:
        images: uint8 [3, H, W], each of its own size, all on one device, where the views are made.
        parameters: float32 [B, views, 16], on the CPU, rows of `as_row` for images of these sizes.
        dtype: Of the result.
        products: Of the matrix products. float16 holds pixels and blur kernels exactly, and weights of the resizing
            within 1/4096 of their size: at most a quarter of a gray level, before rounding.

    Returns `dtype` [2 * B, 3, G, G] and, where there are local crops, [L * B, 3, S, S], view by view; with
    `gram_teacher_crops_size`, the global crops of that size at the end.
    """
    on_device = parameters.to(images[0].device, non_blocking=True)
    groups = [(crops.global_crops_size, slice(0, 2)), (crops.local_crops_size, slice(2, None))][: crops.sizes]
    if crops.gram_teacher_crops_size:
        groups.append((crops.gram_teacher_crops_size, slice(0, 2)))
    made: list[list[Tensor]] = [[] for _ in groups]
    most = CHUNK.get(images[0].device.type, CHUNK["cpu"])
    for rows in _chunks([(image.shape[1], image.shape[2]) for image in images], crops, most):
        canvas = make_canvas(images[rows], products)
        for number, ((size, views), parts) in enumerate(zip(groups, made, strict=True)):
            scale = size / crops.global_crops_size if number == crops.sizes else 1  # of the blur
            drawn = on_device[rows, views].transpose(0, 1)
            pixels = resample(canvas, drawn, size)
            table, host = drawn.flatten(0, 1), parameters[rows, views].transpose(0, 1).flatten(0, 1)
            pixels = color_jitter(pixels, table, torch.bincount(hue_slot(host), minlength=5).tolist())
            pixels = torch.where(_as_pixels(table[:, 13]) > 0, luma(pixels).add_(0.5).floor_()[:, :, None], pixels)
            pixels = gaussian_blur(pixels, scale * table[:, 14], scale * crops.blur_sigma[1], products)
            inverted = (_as_pixels(table[:, 15]) > 0) & (pixels >= 128)
            pixels = torch.where(inverted, 255 - pixels, pixels)
            parts.append(standardize(pixels.transpose(1, 2), dtype).unflatten(0, drawn.shape[:2]))
    return [(parts[0] if len(parts) == 1 else torch.cat(parts, 1)).flatten(0, 1) for parts in made]


def _chunks(sizes: Sequence[tuple[int, int]], crops: Crops, most: int) -> Iterator[slice]:
    """Neighboring images whose canvas and views have at most `most` values each; at least one image."""
    largest = max(crops.global_crops_size, crops.gram_teacher_crops_size or 0)
    views = max(2 * largest**2, crops.local_crops_number * crops.local_crops_size**2)
    first = height = width = 0
    for number, (rows, columns) in enumerate(sizes):
        height, width = max(height, rows), max(width, columns)
        if number > first and (number + 1 - first) * 3 * max(height * width, views) > most:
            yield slice(first, number)
            first, height, width = number, rows, columns
    yield slice(first, len(sizes))


def _as_pixels(values: Tensor) -> Tensor:
    """[N] -> [N, 1, 1, 1]"""
    return values[:, None, None, None]


# Pixels are [N, rows, 3, columns] below: matrices of 3 * columns to multiply from the left, and of 3 * rows to multiply
# from the right, with no transposition between the two. Their values are whole numbers from 0 to 255.


def make_canvas(images: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Images, uint8 [3, H, W], in the corner of a black canvas, [B, rows, 3, columns]; sides are multiples of 8, which
    the products of GPUs want."""
    height, width = (-(-max(image.shape[axis] for image in images) // 8) * 8 for axis in (1, 2))
    canvas = images[0].new_zeros((len(images), height, 3, width), dtype=dtype)
    for target, image in zip(canvas, images, strict=True):
        target[: image.shape[1], :, : image.shape[2]] = image.transpose(0, 1)
    return canvas


def resample(canvas: Tensor, parameters: Tensor, size: int) -> Tensor:
    """The boxes of `parameters` [V, B, 16], resized and flipped: float32 [V * B, size, 3, size].

    As Pillow does it: columns first, and whole numbers between the passes, halves rounded up. The weights of all views
    are made at once, and rounded at once is what the products give: ten views take few more launches than one.
    """
    count, height, _, width = canvas.shape
    top, left, rows, columns, flip = parameters.flatten(0, 1)[:, :5].unbind(1)
    horizontal = bicubic_weights(left, columns, flip, size, width).to(canvas.dtype)
    vertical = bicubic_weights(top, rows, torch.zeros_like(flip), size, height).to(canvas.dtype)
    narrow = canvas.new_empty(len(parameters), count, height * 3, size)
    for view, weights in zip(narrow, horizontal.unflatten(0, (-1, count)), strict=True):
        torch.bmm(canvas.view(count, height * 3, width), weights.mT, out=view)  # the canvas is never repeated
    narrow.add_(0.5).floor_().clamp_(0, 255)
    small = torch.bmm(vertical, narrow.view(-1, height, 3 * size)).add_(0.5).floor_().clamp_(0, 255)
    return small.view(-1, size, 3, size).float()


def bicubic_weights(start: Tensor, length: Tensor, flip: Tensor, size: int, extent: int) -> Tensor:
    """Weights of `extent` pixels in each of `size` pixels that show `length` pixels from `start` on, backwards where
    `flip` is 1: float32 [B, size, extent] for [B] each.

    Pillow's bicubic filter (a = -0.5), stretched where it shrinks, cut at the box, its sum 1.
    """
    start, length, flip = (values[:, None, None] for values in (start, length, flip))
    scale = length / size
    target = torch.arange(size, device=start.device)[:, None]
    target = torch.where(flip > 0, size - 1 - target, target)
    source = torch.arange(extent, device=start.device) - start
    x = ((source + 0.5 - (target + 0.5) * scale) / scale.clamp(min=1)).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0)) * ((source >= 0) & (source < length))
    return weights / weights.sum(2, keepdim=True)


def standardize(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """`normalize` for pixels of 0 to 255, [N, 3, H, W] of any dtype and strides; the result is contiguous."""
    normalized = torch.empty(pixels.shape, dtype=dtype, device=pixels.device)
    # Channel by channel, with Python numbers: a tensor of constants would have to be copied to the device.
    for channel, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
        wide = pixels[:, channel].to(torch.promote_types(dtype, torch.float32))
        normalized[:, channel] = wide.sub(255 * mean).div_(255 * std)
    return normalized


def luma(pixels: Tensor) -> Tensor:
    """Of ITU-R BT.601, [N, S, S], by OpenCV's weights: exact in float32, not rounded."""
    red, green, blue = pixels.unbind(2)
    return (9798 * red + 19235 * green + 3735 * blue) / 2**15


def hue_slot(parameters: Tensor) -> Tensor:
    """Which of the four color operations, from 0 on, shifts the hue, of parameters [N, 16]; 4 where none does."""
    slot = (parameters[:, 9:13] == HUE).to(torch.uint8).argmax(1)
    return torch.where(hue_steps(parameters) == 0, 4, slot)


def hue_steps(parameters: Tensor) -> Tensor:
    """Shift of the hue in steps of 1/256 turn, 0 to 255."""
    return (parameters[:, 8] * 256).round().remainder(256)


def color_jitter(pixels: Tensor, parameters: Tensor, hue_counts: list[int]) -> Tensor:
    """Change brightness, contrast, saturation and hue, in each image by its own factors and in its own order.

    `hue_counts`: how many images have which `hue_slot`. The host must know it, and would have to wait for the device's.
    """
    shifting = hue_slot(parameters).argsort(stable=True).split(hue_counts)
    steps = hue_steps(parameters)
    for slot in range(4):
        # Brightness, contrast and saturation are one blend of the image, its luma and its mean luma.
        operation = parameters[:, 9 + slot].long()
        factor = parameters[:, 5:9].gather(1, operation[:, None])[:, 0]
        factor = torch.where(operation == HUE, 1, factor)
        gray = luma(pixels)
        shift = torch.where(operation == CONTRAST, 1 - factor, 0) * (gray + 0.5).floor_().mean((1, 2))
        gray *= torch.where(operation == SATURATION, 1 - factor, 0)[:, None, None]
        gray += shift[:, None, None]
        pixels = torch.addcmul(gray[:, :, None], pixels, _as_pixels(factor)).round_().clamp_(0, 255)
        if hue_counts[slot]:
            rows = shifting[slot]
            pixels.index_copy_(0, rows, shift_hue(pixels.index_select(0, rows), steps.index_select(0, rows)))
    return pixels


def shift_hue(pixels: Tensor, steps: Tensor) -> Tensor:
    """Shift the hue by `steps` [N] of 1/256 turn, by way of OpenCV's HSV in 8 bits."""
    red, green, blue = pixels.unbind(2)
    value = pixels.amax(2)
    spread = value - pixels.amin(2)
    sixths = torch.where(
        value == red, green - blue, torch.where(value == green, blue - red + 2 * spread, red - green + 4 * spread)
    )
    # Fixed-point numbers of 12 bits after the point, exact in float32.
    hue = (sixths * (256 * 4096 / 6 / spread.clamp(min=1)).round_() / 4096 + 0.5).floor_()
    saturation = (spread * (255 * 4096 / value.clamp(min=1)).round_() / 4096 + 0.5).floor_() / 255
    # OpenCV takes 255 steps for a turn on the way back.
    sixths = (hue + steps[:, None, None]).remainder_(256) * (6 / 255)
    offsets = 5 - 2 * torch.arange(3, device=pixels.device)[:, None]  # of red, green and blue
    k = (sixths[:, :, None] + offsets).remainder_(6)
    ramps = torch.minimum(k, 4 - k).clamp_(0, 1)
    return (value[:, :, None] * (1 - saturation[:, :, None] * ramps)).round_().clamp_(0, 255)


def gaussian_blur(pixels: Tensor, sigma: Tensor, largest: float, products: torch.dtype) -> Tensor:
    """Blur by standard deviations [N] of at most `largest` pixels; 0 leaves an image as it is.

    OpenCV's blur of 8 bits: cut at three standard deviations, mirrored at the border but for the outermost pixel, the
    kernel in multiples of 1/256, each of which takes over the rounding error of those further out.
    """
    size = pixels.shape[1]
    reach = _kernel_side(torch.tensor(largest)).int().item() // 2
    # From the outermost pixel to the center.
    distance = torch.arange(reach, -1, -1, device=pixels.device)
    weights = torch.exp(-0.5 * (distance / sigma.clamp(min=1e-3)[:, None]) ** 2)
    weights *= 2 * distance + 1 <= _kernel_side(sigma)[:, None]
    weights /= 2 * weights.sum(1, keepdim=True) - weights[:, -1:]
    half = (256 * weights[:, :-1].cumsum(1)).round_().diff(dim=1, prepend=torch.zeros_like(sigma)[:, None]) / 256
    kernel = torch.cat([half, 1 - 2 * half.sum(1, keepdim=True), half.flip(1)], 1)

    position = torch.arange(size, device=pixels.device)
    source = position + torch.arange(-reach, reach + 1, device=pixels.device)[:, None]
    period = max(2 * size - 2, 1)
    source = source.remainder_(period)
    source = torch.minimum(source, period - source) if size > 1 else torch.zeros_like(source)
    taps = (source[:, :, None] == position).float().flatten(1)  # [2 * reach + 1, size * size]
    band = (kernel @ taps).to(products).view(-1, size, size)
    wide = pixels.to(products).view(-1, size * 3, size) @ band.mT
    return (band @ wide.view(-1, size, 3 * size)).float().add_(0.5).floor_().clamp_(0, 255).view(pixels.shape)


def _kernel_side(sigma: Tensor) -> Tensor:
    """Pixels of OpenCV's kernel of this standard deviation: odd, about six standard deviations and one."""
    side = (6 * sigma + 1).round()
    return side + (1 - side.remainder(2))
