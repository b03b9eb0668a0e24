"""Images a second from JPEG files to the views that a network sees, stage by stage, against torchvision.

    python benchmarks/loader.py --images VOC2012/JPEGImages --out results/speed/loader
    python benchmarks/loader.py --images imagenet/val --device cuda --workers 16 --out results/speed/loader_gpu

DINO's multi-crop, 2 x 224 and 8 x 96 pixels. Measured in one process on one thread, interleaved: every round takes the
same images through every pipeline in turn, and the figures are medians over rounds.

- ours: reading, decoding and cutting of skipless, from a folder, a zip archive and tar shards; and its stages;
- torchvision: the same augmentation written plainly with torchvision.transforms.v2 on Pillow images, as its
  documentation shows it, GaussianBlur included (13 pixels wide, which is 3 standard deviations of the largest);
- torchvision, Pillow's blur: the same, with Pillow's GaussianBlur in its place, as facebookresearch/dino has it, which
  is faster.

torchvision's pipelines end with normalized float tensors; ours ends with bytes, and turning these into normalized
floats, which training leaves to its device, is timed as a stage of its own and counted in the ratio.

With --device cuda nothing of that: what is measured is a whole loader with --workers processes whose crops are made on
the GPU, JPEGs decoded by the processes and by the GPU in turn, from files to views, without a training step. First it
compares the GPU's views of a batch with those of a CPU.
"""

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import cv2
import numpy as np
import torch
from measuring import MeasuringSettings, interleaved, markdown, on_device, publish, ratio
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from tqdm import tqdm

from skipless.common import cli
from skipless.common.hardware import keep_freed_memory
from skipless.common.pixels import MEAN, STD, normalize
from skipless.datasets.images import ImageSource, open_images
from skipless.datasets.storage.packing import write_shards
from skipless.ssl.data import crops as ours
from skipless.ssl.data.device_crops import DeviceCropDataset, DeviceCrops, collate_images, decodes_jpegs, make_views

STAGES = ("resample", "color_jitter", "gray", "gaussian_blur", "solarize")


@dataclass(kw_only=True)
class Settings(MeasuringSettings):
    """Images a second of the loader."""

    images: Path
    """Folder of JPEGs, of about 500 x 375 pixels."""
    count: int = 100
    """How many of them, evenly spread."""
    workers: int = 16
    """With cuda: processes of the loader."""
    batch_size: int = 128
    """With cuda: images of a batch."""


def pillow_blur(image: Image.Image) -> Image.Image:
    """DINO's own blur."""
    return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def torchvision_views(blur: Callable[..., Any], crops: ours.Crops) -> Callable[[Image.Image], list[torch.Tensor]]:
    """The ten views as float32 [3, S, S], by torchvision.transforms.v2."""

    def view(size: int, scale: tuple[float, float], blurred: float, solarized: float = 0.0) -> v2.Transform:
        brightness, contrast, saturation, hue = crops.color_jitter
        return v2.Compose(
            [
                v2.RandomResizedCrop(size, scale, interpolation=v2.InterpolationMode.BICUBIC),
                v2.RandomHorizontalFlip(),
                v2.RandomApply([v2.ColorJitter(brightness, contrast, saturation, hue)], crops.jitter_probability),
                v2.RandomGrayscale(crops.gray_probability),
                v2.RandomApply([blur], blurred),
                *([v2.RandomSolarize(128, solarized)] if solarized else []),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )

    first, second, local = crops.blur_probability
    views = [
        view(crops.global_crops_size, crops.global_crops_scale, first),
        view(crops.global_crops_size, crops.global_crops_scale, second, crops.solarize_probability),
        *[view(crops.local_crops_size, crops.local_crops_scale, local)] * crops.local_crops_number,
    ]
    return lambda image: [cut(image) for cut in views]


@contextmanager
def stage_times(seconds: dict[str, float]) -> Iterator[None]:
    """Within it, the time spent in each of STAGES is added up."""
    originals = {name: getattr(ours, name) for name in STAGES}

    def timed(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            began = time.perf_counter()
            result = originals[name](*arguments)
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began
            return result

        return call

    for name in STAGES:
        setattr(ours, name, timed(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(ours, name, original)


def torchvision_round(folder: Path, views: Callable[[Image.Image], list[torch.Tensor]]) -> None:
    """All images of a folder, files to floats."""
    for path in sorted(folder.iterdir()):
        with Image.open(path) as opened:
            views(opened.convert("RGB"))


def our_round(source: ImageSource, crops: ours.Crops) -> None:
    """All images of a source, bytes to uint8 views."""
    dataset = ours.CropDataset(source, crops, seed=0)
    for index in range(len(source)):
        dataset[0, index]


def stages_round(source: ImageSource, crops: ours.Crops, epoch: int, batch_size: int = 32) -> dict[str, float]:
    """Seconds for all images by stage: read, decode, each transform, flip and copies, collate, normalize."""
    seconds = {name: 0.0 for name in ("read", "decode", *STAGES)}
    min_side, clock = ours.CropDataset(source, crops, seed=0).min_side, time.perf_counter
    rest = 0.0
    for first in range(0, len(source), batch_size):
        samples = []
        for index in range(first, min(first + batch_size, len(source))):
            began = clock()
            source.read_bytes(index)
            seconds["read"] += clock() - began
            began = clock()
            image = source.read(index, min_side)
            seconds["decode"] += clock() - began
            began, inside = clock(), sum(seconds[name] for name in STAGES)
            with stage_times(seconds):
                views = ours.multicrop(image, crops, np.random.default_rng((0, epoch, index)))
            rest += clock() - began - (sum(seconds[name] for name in STAGES) - inside)
            samples.append(ours.Sample(views, index, []))
        began = clock()
        batch = ours.collate(samples)
        seconds["collate"] = seconds.get("collate", 0.0) + clock() - began
        began = clock()
        for name in ("global", "local"):
            normalize(batch[name])
        seconds["normalize"] = seconds.get("normalize", 0.0) + clock() - began
    # `source.read` reads once more before it decodes.
    return seconds | {"decode": seconds["decode"] - seconds["read"], "draws, flips, copies": rest}


def copies(images: ImageSource, rows: Sequence[int], work: Path) -> dict[str, ImageSource]:
    """Some of the images in a folder, a zip archive and tar shards."""
    folder = work / "folder"
    folder.mkdir()
    for row in rows:
        (folder / f"{row:08}.jpg").write_bytes(images.read_bytes(int(row)))
    with ZipFile(work / "images.zip", "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, path.name)
    write_shards(open_images(folder), work / "shards", workers=1)
    return {name: open_images(work / name) for name in ("folder", "images.zip", "shards")}


def on_cpu(settings: Settings) -> dict[str, Any]:
    """Medians over rounds, in images a second."""
    crops, device = ours.Crops(), torch.device("cpu")
    everything = open_images(settings.images)
    count = min(settings.count, len(everything))
    rows = np.linspace(0, len(everything) - 1, count).round().astype(int)
    sizes = [everything.read(int(row)).shape[:2] for row in rows]
    blurs = {"torchvision": v2.GaussianBlur(13, (0.1, 2.0)), "torchvision, Pillow's blur": v2.Lambda(pillow_blur)}
    by_stage: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as work:
        sources = copies(everything, rows, Path(work))
        ways: dict[str, Callable[[], object]] = {
            name: partial(torchvision_round, Path(work, "folder"), torchvision_views(blur, crops))
            for name, blur in blurs.items()
        }
        ways |= {f"ours, {name}": partial(our_round, source, crops) for name, source in sources.items()}
        ways["stages"] = lambda: by_stage.append(stages_round(sources["folder"], crops, 0))
        seconds = interleaved(ways, settings.rounds, device)
    del seconds["stages"], by_stage[0]  # the first round warms up
    with_floats = [a + stages["normalize"] for a, stages in zip(seconds["ours, folder"], by_stage, strict=True)]
    speed = {name: count / statistics.median(times) for name, times in seconds.items()}
    return {
        "images": count,
        "median_size": [int(statistics.median(side)) for side in zip(*sizes, strict=True)],
        "rounds": settings.rounds,
        "images_per_second": speed | {"ours, folder, floats too": count / statistics.median(with_floats)},
        "times_as_fast": {name: ratio(seconds[name], with_floats) for name in blurs},
        "milliseconds_by_stage": {
            name: 1000 * statistics.median(stages[name] for stages in by_stage) / count for name in by_stage[0]
        },
    }


def distance_from_cpu(source: ImageSource, keys: list[tuple[int, int]], crops: ours.Crops) -> dict[str, float]:
    """How far the GPU's views of a batch are from a CPU's, in gray levels."""
    dataset = DeviceCropDataset(source, crops, 0, False)
    batch = collate_images([dataset[key] for key in keys])
    images = DeviceCrops(dataset, torch.device("cuda"), torch.float32).decode(batch)
    differences = [
        255 * 0.225 * (gpu.cpu() - cpu).abs().flatten()
        for gpu, cpu in zip(
            make_views(images, batch["parameters"], crops, torch.float32, torch.float16),
            make_views([image.cpu() for image in images], batch["parameters"], crops),
            strict=True,
        )
    ]
    return {
        "mean": statistics.mean(d.mean().item() for d in differences),
        "largest": max(d.max().item() for d in differences),
    }


def on_gpu(settings: Settings) -> dict[str, Any]:
    """Images a second from files to views on the GPU, medians over rounds, and how far the views are from a CPU's."""
    crops, device, size = ours.Crops(), torch.device("cuda"), settings.batch_size
    count = max(settings.count, 100 * size)
    source = open_images(settings.images)
    keys = [[(0, i % len(source)) for i in range(first, first + size)] for first in range(0, count, size)]
    cases = {"decoded by the loader": False} | ({"decoded by the GPU": True} if decodes_jpegs(device) else {})
    by_case: dict[str, list[float]] = {name: [] for name in cases}
    for number in tqdm(range(settings.rounds + 1), desc="rounds"):
        for name, jpegs in cases.items():
            dataset = DeviceCropDataset(source, crops, 0, jpegs)
            batches: DataLoader[Any] = DataLoader(
                dataset, batch_sampler=keys, num_workers=settings.workers, collate_fn=collate_images, pin_memory=True
            )
            to_crops = DeviceCrops(dataset, device, torch.bfloat16)
            began = 0.0
            for position, batch in enumerate(batches):
                to_crops(batch)
                if position == len(keys) // 4:  # workers have started
                    torch.cuda.synchronize()
                    began = time.perf_counter()
            torch.cuda.synchronize()
            if number:
                seen = size * (len(keys) - 1 - len(keys) // 4)
                by_case[name].append(seen / (time.perf_counter() - began))
    return {
        "images": count,
        "rounds": settings.rounds,
        "workers": settings.workers,
        "batch": size,
        "images_per_second": {name: statistics.median(values) for name, values in by_case.items()},
        "gray_levels_from_cpu": distance_from_cpu(source, keys[0], crops),
    }


def gpu_table(details: dict[str, Any]) -> list[str]:
    """The result of `on_gpu` in Markdown."""
    distance = details["gray_levels_from_cpu"]
    return [
        f"2 x 224 and 8 x 96 pixels from {details['images']:,} JPEGs, batches of {details['batch']}, "
        f"{details['workers']} loader processes, medians of {details['rounds']} rounds, {{hardware}}.",
        "",
        *figures("JPEGs", "images/s", details["images_per_second"]),
        "",
        f"Views are {distance['mean']:.2f} gray levels from a CPU's on average, {distance['largest']:.0f} at most.",
    ]


def table(details: dict[str, Any]) -> list[str]:
    """The result of `on_cpu` in Markdown."""
    return [
        f"2 x 224 and 8 x 96 pixels from {details['images']} JPEGs of about {details['median_size'][1]} x "
        f"{details['median_size'][0]}, one thread, medians of {details['rounds']} rounds, {{hardware}}.",
        "",
        *figures("pipeline", "images/s", details["images_per_second"]),
        "",
        *(
            "Ours, with floats, is {median:.1f} times as fast as {} ({lowest:.1f} to {highest:.1f}).".format(name, **r)
            for name, r in details["times_as_fast"].items()
        ),
        "",
        *figures("stage", "ms an image", details["milliseconds_by_stage"]),
    ]


def figures(head: str, unit: str, values: dict[str, float]) -> list[str]:
    """A table of two columns."""
    return markdown([{head: name, unit: value} for name, value in values.items()])


def measure(settings: Settings) -> None:
    """Measure where --device says, and publish."""
    device = on_device(settings.device)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    keep_freed_memory()  # as training on a CPU does; both sides have it
    details = on_gpu(settings) if device.type == "cuda" else on_cpu(settings)
    result = {"task": "benchmark", "protocol": "loader/2x224+8x96", "details": details}
    publish(settings.out, result, gpu_table(details) if device.type == "cuda" else table(details), device)


main = partial(cli.run, measure, Settings, __doc__)

if __name__ == "__main__":
    main()
