"""TokenCut step by step against dense SciPy, the memory of a long loop, and on a GPU the speed of the whole.

    python benchmarks/discovery.py --ckpt dino.pth --images VOC2007/JPEGImages --out results/speed/discovery_speed

1. Seconds an image for features, graph, solver and components at about 600, 1,200 and 3,000 patches, and for the dense
   generalized eigenproblem of the published code on the same graph. Interleaved: every image goes through every step
   and every size in turn; medians. Beside them, how often mask and box are those of the dense solution.
2. Resident memory of a loop (features, LOST and TokenCut) over images at their original size, every 50 images.
3. Masks and boxes of LOST and TokenCut against plain loops and dense SciPy (discovery_reference.py), for the same
   images; where they differ, the image with its eigengap.
4. With --device cuda also images per second of the whole of TokenCut, features included: a ViT-S/16 of random weights,
   batches of 512 x 384 pixels (500 x 375, padded). The image's mean is subtracted from its keys, since those of random
   weights are all alike and would make a complete graph, which costs nothing to solve.
"""

import os
import platform
import resource
import runpy
import statistics
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from measuring import markdown, on_device, publish, ratio, timed
from torch import Tensor
from tqdm import tqdm

from skipless.common import cli
from skipless.datasets.images import ImageSource, open_images
from skipless.eval.backbones import Backbone, load_backbone, pad_to_patch
from skipless.eval.objects.localization import (
    EPS,
    bounding_box,
    component,
    lost,
    second_eigenvectors,
    similarity_graph,
    tokencut,
)
from skipless.ssl.model.vit import vit_small

ROOT = Path(__file__).resolve().parent.parent
TAU = 0.2
STEPS = ("features", "graph", "solver", "components", "dense SciPy solver")

reference = SimpleNamespace(**runpy.run_path(str(ROOT / "tests/eval/objects/discovery_reference.py")))


@dataclass
class Settings:
    """Object discovery, step by step."""

    ckpt: str
    """Trained backbone, as in the evaluations."""
    images: Path
    """Folder of photographs."""
    out: Path = Path("results/speed/discovery_speed")
    """Result, .json and .md."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where it runs."""
    patches: tuple[int, ...] = (600, 1200, 3000)
    """Sizes of graphs."""
    repeats: int = 7
    """Images for each size, at least 1."""
    memory_images: int = 300
    """Length of the loop; 0 leaves it out."""
    agreement_images: int = 300
    """Compared to the references; 0 leaves it out."""
    batch: int = 32
    """Batch of the whole on a GPU."""


def resized(picture: np.ndarray, patches: int, patch: int) -> np.ndarray:
    """The picture with about as many patches, its proportions kept."""
    height, width = picture.shape[:2]
    scale = patch * (patches / (height * width)) ** 0.5
    size = (max(patch, round(width * scale)), max(patch, round(height * scale)))
    return cv2.resize(picture, size, interpolation=cv2.INTER_CUBIC)


def keys_of(backbone: Backbone, picture: np.ndarray) -> Tensor:
    """Keys [1, h, w, D] of the last block, without their bias."""
    images = pad_to_patch(backbone.normalize(picture[None]), backbone.patch)
    return backbone.features(images, kind="keys_without_bias")[0].patches


def one_image(backbone: Backbone, picture: np.ndarray, device: torch.device) -> dict[str, Any]:
    """TokenCut in its steps, and the dense solution of the same graph."""
    seconds: dict[str, float] = {}
    keys, seconds["features"] = timed(lambda: keys_of(backbone, picture), device)
    shape = tuple(keys.shape[1:3])
    flat = keys.flatten(1, 2).double()
    similar, seconds["graph"] = timed(lambda: similarity_graph(F.normalize(flat, dim=-1), TAU), device)
    (solution,), seconds["solver"] = timed(lambda: second_eigenvectors(similar), device)
    x = solution[0]
    # Only now, so that the solver finds the caches as in TokenCut; and anew, as a dense fallback overwrites the graph.
    weights = np.where(similarity_graph(F.normalize(flat, dim=-1), TAU)[0].cpu().numpy() > 0, 1.0, EPS)

    def components() -> None:
        seed = int(np.argmax(np.abs(x)))
        side = x > x.mean()
        bounding_box(component((side if side[seed] else ~side).reshape(shape), seed))

    _, seconds["components"] = timed(components, device)
    (vector, eigengap), seconds["dense SciPy solver"] = timed(lambda: reference.dense_solve(weights), device)
    expected = reference.tokencut_of(vector, eigengap, shape)
    (whole,) = tokencut(keys, TAU)
    return {
        "patches": shape[0] * shape[1],
        "seconds": seconds,
        "same mask": bool((whole.mask == expected.mask).all()),
        "same box": whole.box == expected.box,
        "fallback": whole.fallback,
        "edges": whole.edges,
        "eigengap": eigengap,
    }


def compare(backbone: Backbone, images: ImageSource, settings: Settings, device: torch.device) -> list[dict[str, Any]]:
    """One row for each number of patches; images spread over the folder, one a repeat."""
    measured: dict[int, list[dict[str, Any]]] = {size: [] for size in settings.patches}
    for repeat in range(settings.repeats + 1):
        picture = images.read(repeat * len(images) // (settings.repeats + 1))
        for size in settings.patches:
            result = one_image(backbone, resized(picture, size, backbone.patch), device)
            if repeat:  # the first round warms up
                measured[size].append(result)
    rows = []
    for results in measured.values():
        seconds = {step: [r["seconds"][step] for r in results] for step in STEPS}
        medians = {step: statistics.median(times) for step, times in seconds.items()}
        speedup = ratio(seconds["dense SciPy solver"], seconds["solver"])
        rows.append(
            {
                "patches": statistics.median(r["patches"] for r in results),
                "images": len(results),
                "seconds": medians,
                "spread": {step: [min(times), max(times)] for step, times in seconds.items()},
                "speedup of the solver": medians["dense SciPy solver"] / medians["solver"],
                "spread of the speedup": [speedup["lowest"], speedup["highest"]],
                "same masks": statistics.mean(r["same mask"] for r in results),
                "same boxes": statistics.mean(r["same box"] for r in results),
                "fallbacks": sum(r["fallback"] for r in results),
                "share of edges": statistics.median(r["edges"] for r in results),
                "smallest eigengap": min(r["eigengap"] for r in results),
            }
        )
    return rows


def resident_mb() -> float:
    """Resident memory of this process; its peak so far where the system does not tell."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if platform.system() == "Darwin" else 2**10)


def memory_of_a_loop(backbone: Backbone, images: ImageSource, count: int, device: torch.device) -> dict[str, Any]:
    """Resident megabytes after every 50 images, and on a GPU those allocated there."""
    done, resident, allocated = [], [], []
    began = time.perf_counter()
    for i in range(count):
        keys = keys_of(backbone, images.read(i % len(images)))
        lost(keys)
        tokencut(keys, TAU)
        if (i + 1) % 50 == 0 or i + 1 == count:
            done.append(i + 1)
            resident.append(resident_mb())
            if device.type == "cuda":
                allocated.append(torch.cuda.memory_allocated(device) / 2**20)
    return {
        "images": done,
        "resident_mb": resident,
        "allocated_on_gpu_mb": allocated,
        "seconds_per_image": (time.perf_counter() - began) / count,
    }


def agreement(backbone: Backbone, images: ImageSource, count: int) -> dict[str, Any]:
    """How often LOST and TokenCut give the masks and boxes of the references, at the images' original size."""
    equal = {"lost masks": 0, "lost boxes": 0, "tokencut masks": 0, "tokencut boxes": 0}
    exceptions, smallest = [], float("inf")
    for i in tqdm(range(count), desc="agreement", unit="image"):
        keys = keys_of(backbone, images.read(i))
        exact = keys[0].double().cpu().numpy()
        cut = reference.tokencut(exact, TAU)
        smallest = min(smallest, cut.eigengap)
        pairs = {"lost": (lost(keys)[0], reference.lost(exact)), "tokencut": (tokencut(keys, TAU)[0], cut)}
        for method, (ours, expected) in pairs.items():
            same_mask, same_box = bool((ours.mask == expected.mask).all()), ours.box == expected.box
            equal[f"{method} masks"] += same_mask
            equal[f"{method} boxes"] += same_box
            if not (same_mask and same_box):
                exceptions.append({"image": images.names[i], "method": method, "eigengap": cut.eigengap})
    return {"images": count, "equal": equal, "exceptions": exceptions, "smallest_eigengap": smallest}


@torch.inference_mode()
def whole_on_gpu(device: torch.device, batch: int, repeats: int) -> dict[str, Any]:
    """Images per second from uint8 pixels to masks and boxes."""
    torch.manual_seed(0)
    backbone = Backbone(vit_small().eval(), "random weights", "skipless", "").to(device)
    # Blocks of color, so that patches differ as they do in photographs.
    coarse = torch.rand(batch, 3, 6, 8)
    pictures = (F.interpolate(coarse, (375, 500), mode="nearest").permute(0, 2, 3, 1) * 255).byte()

    def work() -> tuple[float, float]:
        images = pad_to_patch(backbone.normalize(pictures), backbone.patch)
        (last,) = backbone.features(images, kind="keys")
        keys = last.patches - last.patches.mean((1, 2), keepdim=True)
        objects = tokencut(keys, TAU)
        return statistics.mean(o.edges for o in objects), statistics.mean(o.degenerate for o in objects)

    seconds = []
    for repeat in range(repeats + 1):
        (edges, degenerate), elapsed = timed(work, device)
        if repeat:
            seconds.append(elapsed)
    return {
        "batch": batch,
        "images_per_second": batch / statistics.median(seconds),
        "spread": [batch / max(seconds), batch / min(seconds)],
        "share of edges": edges,
        "degenerate": degenerate,
    }


def table(result: dict[str, Any]) -> list[str]:
    """The result for people, in Markdown."""
    settings = result["settings"]
    shown = ("speedup of the solver", "spread of the speedup", "same masks", "same boxes", "fallbacks")
    rows = [
        {"patches": row["patches"], **row["seconds"], **{name: row[name] for name in shown}} for row in result["steps"]
    ]
    lines = [
        "# TokenCut: seconds an image",
        "",
        f"{{hardware}}; {settings['threads']} threads of PyTorch; {result['checkpoint']}, device {settings['device']}. "
        f"Medians of {settings['repeats']} images, interleaved.",
        "",
        *markdown(rows),
    ]
    memory, agreed, whole = result["memory"], result["agreement"], result["whole_on_gpu"]
    if memory is not None:
        pairs = zip(memory["images"], memory["resident_mb"], strict=True)
        resident = ", ".join(f"{mb:.0f} MB after {count}" for count, mb in pairs)
        lines += ["", f"Resident memory of a loop over images at their original size (LOST and TokenCut): {resident}."]
    if agreed is not None:
        counts = ", ".join(f"{name} {number}" for name, number in agreed["equal"].items())
        lines += [
            "",
            f"Equal to plain loops and dense SciPy, of {agreed['images']} images at their original size: {counts}; "
            f"smallest eigengap {agreed['smallest_eigengap']:.3g}.",
            *(f"- {e['method']} differs on {e['image']}, eigengap {e['eigengap']:.3g}" for e in agreed["exceptions"]),
        ]
    if whole is not None:
        lines += [
            "",
            f"Whole of TokenCut, features by a ViT-S/16 included, 512 x 384 pixels, batches of {whole['batch']}: "
            f"{whole['images_per_second']:.0f} images a second.",
        ]
    return lines


def measure(settings: Settings) -> None:
    """Measure all parts, and publish."""
    if settings.repeats < 1:
        raise ValueError(f"--repeats is {settings.repeats}: choose 1 or more.")
    device = on_device(settings.device)
    images = open_images(settings.images)
    backbone = load_backbone(settings.ckpt).to(device)
    began = time.perf_counter()
    kept = {name: value for name, value in asdict(settings).items() if name not in ("ckpt", "images", "out")}
    result: dict[str, Any] = {
        "task": "discovery speed",
        "checkpoint": f"{Path(settings.ckpt).name} ({backbone.architecture})",
        "settings": {**kept, "threads": torch.get_num_threads(), "tau": TAU},
        "whole_on_gpu": whole_on_gpu(device, settings.batch, settings.repeats) if device.type == "cuda" else None,
    }
    with torch.inference_mode():
        # First, while nothing that a dense solver needed is still held by the allocator.
        loop = settings.memory_images
        result["memory"] = memory_of_a_loop(backbone, images, loop, device) if loop else None
        compared = min(settings.agreement_images, len(images))
        result["agreement"] = agreement(backbone, images, compared) if compared else None
        result["steps"] = compare(backbone, images, settings, device)
    result["seconds"] = time.perf_counter() - began
    publish(settings.out, result, table(result), device)


main = partial(cli.run, measure, Settings, __doc__)

if __name__ == "__main__":
    main()
