"""Conditioning: what skip connections and initializations do to a network, block by block.

    python eval/conditioning.py --size small --images imagenette/val --out results/analysis/conditioning_vits
    python eval/conditioning.py --ckpt runs/residual runs/skipless --images imagenette/val --out conditioning

compares fresh models of one size, residual and skipless, by initialization; or trained ones, given as folders of
pretraining runs or as their backbone.safetensors. It prints a table and writes OUT.json (for machines), OUT.md (for
people) and OUT.png. What each measure means is in docs/conditioning.md, how it is computed in ssl/model/statistics.py
and eval/spectra.py.

Jacobians take time: for one image of 224 pixels, minutes a model. --cheap leaves them and the gradients out. The
smallest singular value of an attention Jacobian, and so the condition number, comes out exactly for images of a few
patches (--pixels 64 with a ViT-S), and often only as a bound for larger ones.
"""

import skipless.common.interruption  # noqa: F401

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from skipless.common import cli
from skipless.common.files import write_result
from skipless.common.progress import Progress
from skipless.common.provenance import provenance
from skipless.datasets.images import ImageSource, open_images
from skipless.datasets.storage.names import dataset_name
from skipless.eval.backbones import load_backbone
from skipless.eval.figures.conditioning import BOUNDS, LEGEND, Statistics, draw_conditioning, table
from skipless.eval.figures.pictures import check_out
from skipless.eval.spectra import jacobian_conditioning
from skipless.ssl.data.squares import normalized_squares
from skipless.ssl.model.embedding import images_to_whiten_on, sine_positions_, whiten_patches_
from skipless.ssl.model.initialization import PRESETS, skipless_init_
from skipless.ssl.model.statistics import cheap_conditioning, gradient_norms
from skipless.ssl.model.vit import SIZES, VisionTransformer

PATCH = 16  # of fresh models

# What is compared: residual or not, the skipless initialization's arguments (None: ViT's default one), and whether
# patches are whitened and positions sines, as with the library's default, `small`.
ARMS: dict[str, tuple[bool, dict[str, Any] | None, bool]] = {
    "residual, default": (True, None, False),
    "skipless, default": (False, None, False),
    "skipless, paper-dino (SUO, beta 1)": (False, PRESETS["paper-dino"], False),
    "skipless, SUO, beta 4": (False, PRESETS["paper-dino"] | {"beta": 4.0}, False),
    "skipless, mirrored, beta 1": (False, PRESETS["small"] | {"beta": 1.0}, False),
    "skipless, mirrored, beta 4": (False, PRESETS["small"], False),
    "skipless, small (the same, whitened)": (False, PRESETS["small"], True),
}


@dataclass
class Settings:
    """Conditioning, block by block."""

    images: str
    """A folder or zip archive of images."""
    ckpt: tuple[str, ...] = ()
    """Trained models to compare: folders of pretraining runs, or their backbone.safetensors."""
    size: Literal["tiny", "small", "base", "large", "huge", "giant"] | None = None
    """Fresh models of this size instead; by default small."""
    count: int = 32
    """How many images, evenly spread."""
    jacobian_images: int = 1
    """So many of them for Jacobians."""
    pixels: int | None = None
    """Side of the images; by default 224, or a checkpoint's own."""
    cheap: bool = False
    """Without Jacobians and gradients."""
    seed: int = 0
    """Of fresh weights and of random directions."""
    out: str | None = None
    """Where to write the results, without ending; by default nowhere."""
    figure: str | None = None
    """The figure: .png, .svg or .pdf; by default OUT.png."""

    def __post_init__(self) -> None:
        for name, least in (("count", 1), ("jacobian_images", 1), ("pixels", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be at least {least}")
        if self.ckpt and self.size:
            raise ValueError("--ckpt compares trained models, and --size fresh ones: give one of them")
        if not self.ckpt and (self.pixels or PATCH) % PATCH:
            raise ValueError(f"--pixels is {self.pixels}: fresh models need a multiple of their patch, {PATCH}")


@dataclass
class Candidate:
    """A model to compare."""

    name: str
    model: VisionTransformer
    origin: dict[str, Any]
    """How it was initialized, or the SHA-256 of its file."""


def fresh_models(size: str, images: Tensor, seed: int) -> Iterator[Candidate]:
    """The models of `ARMS`, of one of `SIZES`, with 16-pixel patches.

    Args:
        images: normalized [B, 3, S, S], S a multiple of 16: what patches are whitened on; the models' image size is S.
    """
    for name, (residual, arguments, whitened) in ARMS.items():
        torch.manual_seed(seed)
        model = VisionTransformer(**SIZES[size], residual=residual, image_size=images.shape[-1], attention="sdpa")
        if arguments is not None:
            skipless_init_(model, **arguments, seed=seed)
        if whitened:
            whiten_patches_(model.patch_embed.proj, images, seed)
            sine_positions_(model)
        yield Candidate(name, model.eval(), {"initialization": arguments, "whitened": whitened})


def trained_models(paths: Sequence[str]) -> list[Candidate]:
    """The backbones of runs; their names are those of the runs' folders, longer where they are alike.

    Raises:
        ValueError, FileNotFoundError: see `load_backbone`; another project's checkpoint; or the same run twice.
    """
    folders = [path.resolve() if path.is_dir() else path.resolve().parent for path in map(Path, paths)]
    if len(set(folders)) < len(folders):
        raise ValueError(f"--ckpt names a run twice: {', '.join(paths)}")
    parts = next(n for n in itertools.count(1) if len({f.parts[-n:] for f in folders}) == len(folders))
    candidates = []
    for path, folder in zip(paths, folders, strict=True):
        backbone = load_backbone(path)
        if backbone.family != "skipless":
            raise ValueError(f"{path} is no backbone of a pretraining run: give the folder of a finished run")
        candidates.append(Candidate("/".join(folder.parts[-parts:]), backbone.model, {"sha256": backbone.sha256}))
    return candidates


def measure(
    model: VisionTransformer,
    images: Tensor,
    jacobian_images: int,
    seed: int = 0,
    done: Callable[[], object] = lambda: None,
) -> Statistics:
    """Every measure of `MEASURES`, one number a block.

    Args:
        images: normalized, [B, 3, S, S].
        jacobian_images: so many of them, evenly spread, for the Jacobians; 0 leaves Jacobians and gradients out.
        done: called after each block's Jacobians, after the gradients, and after the rest.
    """
    statistics = cheap_conditioning(model, images)
    done()
    if jacobian_images:
        rows = torch.linspace(0, len(images) - 1, min(jacobian_images, len(images))).round().long()
        statistics |= gradient_norms(model, images, seed)
        done()
        statistics |= jacobian_conditioning(model, images[rows], seed=seed, done=done)
    return statistics


def choose_models(settings: Settings, source: ImageSource) -> tuple[Iterable[Candidate], list[int], str]:
    """The models to compare, their depths, and words for what they are."""
    if settings.ckpt:
        trained = trained_models(settings.ckpt)
        for candidate in trained:
            if (settings.pixels or 0) % candidate.model.patch:
                raise ValueError(
                    f"--pixels is {settings.pixels}: {candidate.name} needs a multiple of its patch, "
                    f"{candidate.model.patch}"
                )
        return trained, [candidate.model.depth for candidate in trained], "trained models"
    size, pixels = settings.size or "small", settings.pixels or 224
    images = normalized_squares(source, images_to_whiten_on(pixels, PATCH), pixels)
    return fresh_models(size, images, settings.seed), [SIZES[size]["depth"]] * len(ARMS), f"fresh ViT-{size}"


def compare(settings: Settings) -> None:
    """Measure the models, print the table, and write what `settings` ask for.

    Raises:
        ValueError, FileNotFoundError: images or checkpoints that cannot be used.
    """
    figure = check_out(settings.figure or f"{settings.out}.png") if settings.figure or settings.out else None
    source = open_images(settings.images)
    candidates, depths, kind = choose_models(settings, source)
    for path in (figure, settings.out):
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)  # now, not after an hour's work
    started = time.time()
    jacobian_images = 0 if settings.cheap else settings.jacobian_images
    details: list[dict[str, Any]] = []
    statistics: dict[str, Statistics] = {}
    images: dict[int, Tensor] = {}
    with Progress(desc="conditioning", total=sum(1 if settings.cheap else depth + 2 for depth in depths)) as progress:
        for candidate in candidates:
            name, model = candidate.name, candidate.model
            progress.set_description(name)
            pixels = settings.pixels or model.architecture["image_size"]
            if pixels not in images:
                images[pixels] = normalized_squares(source, settings.count, pixels)
            statistics[name] = measure(model, images[pixels], jacobian_images, settings.seed, progress.update)
            about = {"name": name, "architecture": model.architecture, "image_size": pixels, **candidate.origin}
            details.append(about | {"statistics": statistics[name]})
    count = min(settings.count, len(source))
    result = {
        "task": "conditioning",
        "dataset": dataset_name(Path(settings.images)),
        "images": count,
        "jacobian_images": min(jacobian_images, count),
        "seed": settings.seed,
        "seconds": round(time.time() - started, 1),
        "details": details,
        **provenance("cpu"),
    }
    jacobians = "without Jacobians" if settings.cheap else f"Jacobians of {result['jacobian_images']}"
    title = f"{kind}; {count} images of {result['dataset']}, {' and '.join(map(str, images))} pixels, {jacobians}"
    facts = f"{title}; seed {settings.seed}; {result['hardware']}; commit {result['commit']}"
    text = f"{LEGEND}{'' if settings.cheap else ' ' + BOUNDS}\n\n{table(statistics)}\n{facts}.\n"
    print(text, end="")
    if settings.out:
        write_result(Path(settings.out), result, text)
    if figure:
        draw_conditioning(statistics, title, figure)


main = partial(cli.run, compare, Settings, __doc__)

if __name__ == "__main__":
    main()
