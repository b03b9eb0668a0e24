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

torchvision's pipelines end with normalised float tensors; ours ends with bytes, and turning these into normalised
floats, which training leaves to its device, is timed as a stage of its own and counted in the ratio.

With --device cuda nothing of that: what is measured is a whole loader with --workers processes whose crops are made on
the GPU, JPEGs decoded by the processes and by the GPU in turn, from files to views, without a training step. First it
compares the GPU's views of a batch with those of a CPU.
"""

import argparse
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import cv2
import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from tqdm import tqdm

from skipless.common.files import write_result
from skipless.common.hardware import keep_freed_memory
from skipless.common.provenance import provenance
from skipless.datasets.images import ImageSource, open_images
from skipless.datasets.storage.packing import write_shards
from skipless.ssl.data import crops as ours
from skipless.ssl.data.device_crops import DeviceCropDataset, DeviceCrops, collate_images, decodes_jpegs, make_views

STAGES = ("resample", "color_jitter", "grey", "gaussian_blur", "solarize")


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
                v2.Normalize(ours.MEAN, ours.STD),
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


def our_round(source: ImageSource, crops: ours.Crops, epoch: int) -> float:
    """Seconds for all images of a source, bytes to uint8 views."""
    dataset = ours.CropDataset(source, crops, seed=0)
    began = time.perf_counter()
    for index in range(len(source)):
        dataset[epoch, index]
    return time.perf_counter() - began


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
            ours.normalize(batch[name])
        seconds["normalize"] = seconds.get("normalize", 0.0) + clock() - began
    # `source.read` reads once more before it decodes.
    return seconds | {"decode": seconds["decode"] - seconds["read"], "draws, flips, copies": rest}


def measure(images: Path, count: int, rounds: int) -> dict[str, Any]:
    """Medians over rounds, in images a second."""
    crops = ours.Crops()
    baselines = {
        "torchvision": torchvision_views(v2.GaussianBlur(13, (0.1, 2.0)), crops),
        "torchvision, Pillow's blur": torchvision_views(v2.Lambda(pillow_blur), crops),
    }
    everything = open_images(images)
    rows = np.linspace(0, len(everything) - 1, min(count, len(everything))).round().astype(int)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work, "folder")
        folder.mkdir()
        for row in rows:
            (folder / f"{row:08}.jpg").write_bytes(everything.read_bytes(int(row)))
        with ZipFile(Path(work, "images.zip"), "w") as archive:
            for path in sorted(folder.iterdir()):
                archive.write(path, path.name)
        write_shards(open_images(folder), Path(work, "shards"), workers=1)
        sources = {name: open_images(Path(work, name)) for name in ("folder", "images.zip", "shards")}
        sizes = [everything.read(int(row)).shape[:2] for row in rows]
        by_pipeline: dict[str, list[float]] = {}
        by_stage: dict[str, list[float]] = {}
        for number in tqdm(range(rounds + 1), desc="rounds"):  # the first warms up, and does not count
            found = {}
            for name, views in baselines.items():
                began = time.perf_counter()
                for path in sorted(folder.iterdir()):
                    with Image.open(path) as opened:
                        views(opened.convert("RGB"))
                found[name] = time.perf_counter() - began
            for name, source in sources.items():
                found[f"ours, {name}"] = our_round(source, crops, number)
            stages = stages_round(sources["folder"], crops, number)
            for name, seconds in (found | {"normalize": stages["normalize"]}).items() if number else ():
                by_pipeline.setdefault(name, []).append(seconds / len(rows))
            for name, seconds in stages.items() if number else ():
                by_stage.setdefault(name, []).append(seconds / len(rows))
        shutil.rmtree(folder)
    floats = by_pipeline.pop("normalize")
    with_floats = [a + b for a, b in zip(by_pipeline["ours, folder"], floats, strict=True)]
    ratios = {
        name: [slow / fast for slow, fast in zip(by_pipeline[name], with_floats, strict=True)] for name in baselines
    }
    return {
        "images": len(rows),
        "median_size": [int(statistics.median(side)) for side in zip(*sizes, strict=True)],
        "rounds": rounds,
        "images_per_second": {name: 1 / statistics.median(values) for name, values in by_pipeline.items()}
        | {"ours, folder, floats too": 1 / statistics.median(with_floats)},
        "times_as_fast": {
            name: {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}
            for name, values in ratios.items()
        },
        "milliseconds_by_stage": {name: 1000 * statistics.median(values) for name, values in by_stage.items()},
    }


def measure_on_gpu(images: Path, count: int, rounds: int, workers: int, batch_size: int) -> dict[str, Any]:
    """Images a second from files to views on the GPU, medians over rounds, and how far the views are from a CPU's."""
    crops, device = ours.Crops(), torch.device("cuda")
    source = open_images(images)
    keys = [[(0, i % len(source)) for i in range(first, first + batch_size)] for first in range(0, count, batch_size)]
    cases = {"decoded by the loader": False, "decoded by the GPU": True}
    if not decodes_jpegs(device):
        del cases["decoded by the GPU"]

    def loader(jpegs: bool) -> tuple[DataLoader[Any], DeviceCrops]:
        dataset = DeviceCropDataset(source, crops, 0, jpegs)
        batches = DataLoader(
            dataset, batch_sampler=keys, num_workers=workers, collate_fn=collate_images, pin_memory=True
        )
        return batches, DeviceCrops(dataset, device, torch.bfloat16)

    batch = collate_images([DeviceCropDataset(source, crops, 0, False)[key] for key in keys[0]])
    images_on_gpu = DeviceCrops(DeviceCropDataset(source, crops, 0, False), device, torch.float32).decode(batch)
    differences = [
        255 * 0.225 * (ours_.cpu() - theirs).abs().flatten()
        for ours_, theirs in zip(
            make_views(images_on_gpu, batch["parameters"], crops, torch.float32, torch.float16),
            make_views([image.cpu() for image in images_on_gpu], batch["parameters"], crops),
            strict=True,
        )
    ]
    by_case: dict[str, list[float]] = {}
    for number in tqdm(range(rounds + 1), desc="rounds"):
        for name, jpegs in cases.items():
            batches, to_crops = loader(jpegs)
            began, seen = 0.0, 0
            for position, batch in enumerate(batches):
                to_crops(batch)
                if position == len(keys) // 4:  # workers have started
                    torch.cuda.synchronize()
                    began, seen = time.perf_counter(), 0
                seen += batch_size
            torch.cuda.synchronize()
            if number:
                by_case.setdefault(name, []).append((seen - batch_size) / (time.perf_counter() - began))
    return {
        "images": count,
        "rounds": rounds,
        "workers": workers,
        "batch": batch_size,
        "images_per_second": {name: statistics.median(values) for name, values in by_case.items()},
        "grey_levels_from_cpu": {
            "mean": statistics.mean(d.mean().item() for d in differences),
            "largest": max(d.max().item() for d in differences),
        },
    }


def gpu_table(result: dict[str, Any]) -> str:
    """The result of `measure_on_gpu` in Markdown."""
    found = result["details"]
    lines = [
        f"2 x 224 and 8 x 96 pixels from {found['images']:,} JPEGs, batches of {found['batch']}, {found['workers']} "
        f"loader processes, medians of {found['rounds']} rounds, {result['hardware']}.",
        "",
        "| JPEGs | images/s |",
        "|---|---:|",
        *(f"| {name} | {value:.0f} |" for name, value in found["images_per_second"].items()),
        "",
        f"Views differ from a CPU's by {found['grey_levels_from_cpu']['mean']:.2f} grey levels on average, "
        f"{found['grey_levels_from_cpu']['largest']:.0f} at most.",
    ]
    return "\n".join(lines) + "\n"


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    found = result["details"]
    lines = [
        f"2 x 224 and 8 x 96 pixels from {found['images']} JPEGs of about {found['median_size'][1]} x "
        f"{found['median_size'][0]}, one thread, medians of {found['rounds']} rounds, {result['hardware']}.",
        "",
        "| pipeline | images/s |",
        "|---|---:|",
        *(f"| {name} | {value:.1f} |" for name, value in found["images_per_second"].items()),
        "",
        *(
            f"Ours, with floats, is {ratio['median']:.1f} times as fast as {name} ({ratio['lowest']:.1f} to "
            f"{ratio['highest']:.1f})."
            for name, ratio in found["times_as_fast"].items()
        ),
        "",
        "| stage | ms an image |",
        "|---|---:|",
        *(f"| {name} | {value:.2f} |" for name, value in found["milliseconds_by_stage"].items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line: see the docstring of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="Folder of JPEGs, of about 500 x 375 pixels.")
    parser.add_argument("--count", type=int, default=100, help="How many of them, evenly spread (default: 100).")
    parser.add_argument("--rounds", type=int, default=5, help="Rounds that count; one more warms up (default: 5).")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="Where crops are made.")
    parser.add_argument("--workers", type=int, default=16, help="With cuda: processes of the loader (default: 16).")
    parser.add_argument("--batch_size", type=int, default=128, help="With cuda: images of a batch (default: 128).")
    parser.add_argument("--out", type=Path, help="Where to write OUT.json and OUT.md.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    keep_freed_memory()  # as training on a CPU does; both sides have it
    cuda = arguments.device == "cuda"
    try:
        if cuda:
            count = max(arguments.count, 100 * arguments.batch_size)
            details = measure_on_gpu(arguments.images, count, arguments.rounds, arguments.workers, arguments.batch_size)
        else:
            details = measure(arguments.images, arguments.count, arguments.rounds)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    about = provenance(arguments.device)
    result = {"task": "benchmark", "protocol": "loader/2x224+8x96", "details": details, **about}
    text = gpu_table(result) if cuda else table(result)
    if arguments.out:
        write_result(arguments.out, result, text)
    print(text)


if __name__ == "__main__":
    main()
