"""What skip connections and initializations do to a network, block by block: measured, as a table and as a figure.

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

import argparse
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from skipless.common.files import write_atomically, write_result
from skipless.common.provenance import provenance
from skipless.datasets.images import open_images
from skipless.datasets.storage.names import dataset_name
from skipless.eval.spectra import TOLERANCE, jacobian_conditioning
from skipless.ssl.data.squares import normalized_squares
from skipless.ssl.model.embedding import images_to_whiten_on, sine_positions_, whiten_patches_
from skipless.ssl.model.initialization import PRESETS, skipless_init_
from skipless.ssl.model.statistics import cheap_conditioning, gradient_norms
from skipless.ssl.model.vit import SIZES, VisionTransformer

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

matplotlib.rcParams["svg.hashsalt"] = "skipless"

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

# Title and axis of every measure, in the order of the table and of the figure's panels.
MEASURES: dict[str, tuple[str, str]] = {
    "attention_condition": ("attention Jacobian: condition number", "log"),
    "attention_small_share": ("attention Jacobian: part below 1 % of the largest", "linear"),
    "attention_smallest": ("attention Jacobian: smallest singular value", "log"),
    "attention_largest": ("attention Jacobian: largest singular value", "log"),
    "mlp_condition": ("MLP Jacobian: condition number", "log"),
    "mlp_small_share": ("MLP Jacobian: part below 1 % of the largest", "linear"),
    "mlp_smallest": ("MLP Jacobian: smallest singular value", "log"),
    "mlp_largest": ("MLP Jacobian: largest singular value", "log"),
    "value_output_condition": ("W_V W_O: condition number", "log"),
    "value_output_smallest": ("W_V W_O: smallest singular value", "log"),
    "value_output_largest": ("W_V W_O: largest singular value", "log"),
    "attention_entropy": ("entropy of attention / ln N", "linear"),
    "diagonal_share": ("attention on the diagonal", "linear"),
    "diagonal_gap": ("logits: diagonal - mean of others", "linear"),
    "diagonal_margin": ("logits: diagonal - largest other", "linear"),
    "kurtosis": ("excess kurtosis of tokens", "asinh"),
    "mean_share": ("mean share of patch tokens", "linear"),
    "effective_rank": ("effective rank of patch tokens", "linear"),
    "parameter_gradient": ("gradient norm, block's parameters", "log"),
    "token_gradient": ("gradient norm, block's input tokens", "log"),
}

LEGEND = "What is measured, and how: docs/conditioning.md."
BOUNDS = (
    "K is the Jacobian of a block's attention or MLP with respect to its normalised input. ≥ and ≤ stand before what "
    "is no more than a bound: two bounds do not tell which is worse."
)

# Okabe and Ito's palette, told apart by the colour-blind as well; markers tell the lines apart in grey.
COLOURS = ("#000000", "#D55E00", "#0072B2", "#E69F00", "#CC79A7", "#009E73", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

Statistics = dict[str, list[float]]


def fresh_models(size: str, images: Tensor, seed: int) -> Iterator[tuple[str, VisionTransformer]]:
    """The models of `ARMS`, of one of `SIZES`, with 16-pixel patches.

    Args:
        images: normalised [B, 3, S, S], S a multiple of 16: what patches are whitened on; the models' image size is S.
    """
    for name, (residual, arguments, whitened) in ARMS.items():
        torch.manual_seed(seed)
        model = VisionTransformer(**SIZES[size], residual=residual, image_size=images.shape[-1], attention="sdpa")
        if arguments is not None:
            skipless_init_(model, **arguments, seed=seed)
        if whitened:
            whiten_patches_(model.patch_embed.proj, images, seed)
            sine_positions_(model)
        yield name, model.eval()


def load_model(path: Path) -> tuple[VisionTransformer, str]:
    """The backbone that a pretraining run exported, and the SHA-256 of its file.

    Args:
        path: the run's folder, or its backbone.safetensors with backbone.json beside it.

    Raises:
        ValueError: no such backbone, a damaged one, or one with NaN or infinite weights.
    """
    weights = path / "backbone.safetensors" if path.is_dir() else path
    about = weights.with_suffix(".json")
    if weights.suffix != ".safetensors" or not weights.is_file() or not about.is_file():
        raise ValueError(
            f"{path} is no backbone of a pretraining run: give the folder of a finished run, or its "
            "backbone.safetensors with backbone.json beside it"
        )
    try:
        model = VisionTransformer(**json.loads(about.read_text())["architecture"], attention="sdpa")
        model.load_state_dict(load_file(weights))
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} cannot be loaded ({reason}): {weights.name} and {about.name} do not fit") from None
    broken = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"{path} has NaN or infinite weights, in {broken[0]} and {len(broken) - 1} more")
    with open(weights, "rb") as file:
        return model.eval(), hashlib.file_digest(file, "sha256").hexdigest()


def trained_models(paths: list[Path]) -> list[tuple[str, VisionTransformer, dict[str, Any]]]:
    """Name, model and origin of each backbone; the names are those of the runs' folders, longer where they are alike.

    Raises:
        ValueError: see `load_model`; or the same run twice.
    """
    folders = [path.resolve() if path.is_dir() else path.resolve().parent for path in paths]
    if len(set(folders)) < len(folders):
        raise ValueError(f"--ckpt names a run twice: {', '.join(map(str, paths))}")
    parts = next(n for n in itertools.count(1) if len({f.parts[-n:] for f in folders}) == len(folders))
    found = []
    for path, folder in zip(paths, folders, strict=True):
        model, sha256 = load_model(path)
        found.append(("/".join(folder.parts[-parts:]), model, {"sha256": sha256}))
    return found


def measure(
    model: VisionTransformer,
    images: Tensor,
    jacobian_images: int,
    seed: int = 0,
    done: Callable[[], object] = lambda: None,
) -> Statistics:
    """Every measure of `MEASURES`, one number a block.

    Args:
        images: normalised, [B, 3, S, S].
        jacobian_images: so many of them, evenly spread, for the Jacobians; 0 leaves Jacobians and gradients out.
        done: called after each block's Jacobians, after the gradients, and after the rest.
    """
    found = cheap_conditioning(model, images)
    done()
    if jacobian_images:
        rows = torch.linspace(0, len(images) - 1, min(jacobian_images, len(images))).round().long()
        found |= gradient_norms(model, images, seed)
        done()
        found |= jacobian_conditioning(model, images[rows], seed=seed, done=done)
    return found


def table(statistics: dict[str, Statistics]) -> str:
    """Markdown: for each measure a line for each model and a column for every second block and the first.

    Lines of K + I, a residual block's Jacobian with its skip, stand below those of K. A bound is written as one.
    """
    depth = max(len(values["mean_share"]) for values in statistics.values())
    blocks = sorted({0, *range(1, depth, 2), depth - 1})
    lines = []
    for measure, (title, _) in MEASURES.items():
        rows = [
            (name + said, values, key)
            for key, said in ((measure, ""), (_with_skip(measure), ": with its skip (K + I)"))
            for name, values in statistics.items()
            if key in values
        ]
        if not rows:
            continue
        lines += [f"### {title[0].upper()}{title[1:]}", ""]
        lines.append("| model | " + " | ".join(f"block {b + 1}" for b in blocks) + " |")
        lines.append("|---|" + "---|" * len(blocks))
        for label, values, key in rows:
            cells = [_cell(values, key, b) if b < len(values[key]) else "" for b in blocks]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _with_skip(measure: str) -> str:
    """The key of the same measure of K + I."""
    branch, _, rest = measure.partition("_")
    return f"{branch}_skip_{rest}"


def _is_bound(values: Statistics, key: str, block: int) -> bool:
    stem, _, end = key.rpartition("_")
    errors = values.get(f"{stem}_smallest_error")
    return end in ("smallest", "condition") and errors is not None and errors[block] > TOLERANCE


def _cell(values: Statistics, key: str, block: int) -> str:
    sign = "" if not _is_bound(values, key, block) else "≥ " if key.endswith("condition") else "≤ "
    return f"{sign}{values[key][block]:.3g}"


def draw(statistics: dict[str, Statistics], title: str, path: Path) -> None:
    """A figure with a panel for each measure and a line for each model over depth; .png, .svg or .pdf.

    Dotted lines are K + I; hollow markers, which no line joins, are bounds.
    """
    panels = [measure for measure in MEASURES if any(measure in values for values in statistics.values())]
    rows, depth = -(-len(panels) // 4), max(len(values["mean_share"]) for values in statistics.values())
    looks = list(zip(statistics, itertools.cycle(COLOURS), itertools.cycle(MARKERS)))
    with plt.rc_context({"font.size": 7, "axes.titlesize": 7, "lines.linewidth": 1.1, "lines.markersize": 3.5}):
        figure, grid = plt.subplots(rows, 4, figsize=(10, 2.0 * rows + 1.1), layout="constrained", squeeze=False)
        for measure, axes in zip(panels, grid.flat, strict=False):
            for name, colour, marker in looks:
                values = statistics[name]
                for key, style in ((measure, "-"), (_with_skip(measure), ":")):
                    if key not in values:
                        continue
                    blocks, heights = np.arange(len(values[key])), np.array(values[key])
                    bound = np.array([_is_bound(values, key, int(block)) for block in blocks])
                    axes.plot(blocks + 1, np.where(bound, np.nan, heights), style, color=colour)
                    for some, face in ((~bound, colour), (bound, "white")):
                        look = {"s": 11, "marker": marker, "linewidths": 0.7, "zorder": 3}
                        axes.scatter(blocks[some] + 1, heights[some], facecolors=face, edgecolors=colour, **look)
            axes.set_title(MEASURES[measure][0])
            axes.set_yscale(MEASURES[measure][1])
            axes.grid(alpha=0.3, linewidth=0.4)
            axes.set_xticks(range(1, 1 + depth, 2))
        for axes in list(grid.flat)[len(panels) :]:
            axes.axis("off")
        for axes in grid[-1]:
            axes.set_xlabel("block")
        handles = [Line2D([], [], color=colour, marker=marker, label=name) for name, colour, marker in looks]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
        said = "\ndotted: with the skip, K + I; hollow: no more than a bound" if "attention_condition" in panels else ""
        figure.suptitle(title + said, fontsize=8)
        kind = path.suffix[1:]
        metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind, {"Software": None})
        write_atomically(path, lambda beside: figure.savefig(beside, format=kind, dpi=200, metadata=metadata))
        plt.close(figure)


def main() -> None:
    """Command line: see the docstring of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="Folder or zip archive of images.")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--size", choices=list(SIZES), help="Fresh models of this size (default: small).")
    which.add_argument("--ckpt", nargs="+", type=Path, help="Folders of pretraining runs, or backbone.safetensors.")
    parser.add_argument("--count", type=int, default=32, help="How many images, evenly spread (default: 32).")
    parser.add_argument("--jacobian-images", type=int, default=1, help="So many of them for Jacobians (default: 1).")
    parser.add_argument("--pixels", type=int, help="Side of the images (default: 224, or a checkpoint's own).")
    parser.add_argument("--cheap", action="store_true", help="Without Jacobians and gradients.")
    parser.add_argument("--seed", type=int, default=0, help="Of fresh weights and of random directions (default: 0).")
    parser.add_argument("--out", type=Path, help="Where to write the results, without ending; by default nowhere.")
    parser.add_argument("--figure", type=Path, help="The figure: .png, .svg or .pdf (default: OUT.png).")
    try:
        report(parser.parse_args())
    except (ValueError, OSError) as error:
        print("error:", error, file=sys.stderr)
        sys.exit(2)


def report(arguments: argparse.Namespace) -> None:
    """What the command line does."""
    for flag, least in (("count", 1), ("jacobian_images", 1), ("pixels", 1), ("seed", 0)):
        value = getattr(arguments, flag)
        if value is not None and value < least:
            raise ValueError(f"--{flag.replace('_', '-')} is {value}: it must be at least {least}")
    figure = arguments.figure or (Path(f"{arguments.out}.png") if arguments.out else None)
    if figure and figure.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--figure is {figure}: its name must end in .png, .svg or .pdf")
    source = open_images(arguments.images)
    models: Iterable[tuple[str, VisionTransformer, dict[str, Any]]]
    if arguments.ckpt:
        models = trained_models(arguments.ckpt)
        depths = [model.depth for _, model, _ in models]
        for name, model, _ in models:
            if (arguments.pixels or 0) % model.patch:
                raise ValueError(f"--pixels is {arguments.pixels}: {name} needs a multiple of its patch, {model.patch}")
    else:
        size, pixels = arguments.size or "small", arguments.pixels or 224
        if pixels % 16:
            raise ValueError(f"--pixels is {pixels}: fresh models need a multiple of their patch, 16")
        fresh = fresh_models(size, normalized_squares(source, images_to_whiten_on(pixels, 16), pixels), arguments.seed)
        models = ((name, model, {"initialization": ARMS[name][1], "whitened": ARMS[name][2]}) for name, model in fresh)
        depths = [SIZES[size]["depth"]] * len(ARMS)

    for path in (arguments.out, figure):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)  # now, not after an hour's work

    started = time.time()
    jacobian_images = 0 if arguments.cheap else arguments.jacobian_images
    details: list[dict[str, Any]] = []
    statistics: dict[str, Statistics] = {}
    pictures: dict[int, Tensor] = {}
    with tqdm(total=sum(1 if arguments.cheap else depth + 2 for depth in depths)) as progress:
        for name, model, origin in models:
            progress.set_description(name)
            pixels = arguments.pixels or model.architecture["image_size"]
            if pixels not in pictures:
                pictures[pixels] = normalized_squares(source, arguments.count, pixels)
            statistics[name] = measure(model, pictures[pixels], jacobian_images, arguments.seed, progress.update)
            about = {"name": name, "architecture": model.architecture, "image_size": pixels, **origin}
            details.append(about | {"statistics": statistics[name]})
    images = min(arguments.count, len(source))
    result = {
        "task": "conditioning",
        "dataset": dataset_name(arguments.images),
        "images": images,
        "jacobian_images": min(jacobian_images, images),
        "seed": arguments.seed,
        "seconds": round(time.time() - started, 1),
        "details": details,
        **provenance("cpu"),
    }
    what = "trained models" if arguments.ckpt else f"fresh ViT-{size}"
    few = "without Jacobians" if arguments.cheap else f"Jacobians of {result['jacobian_images']}"
    title = f"{what}; {images} images of {result['dataset']}, {' and '.join(map(str, pictures))} pixels, {few}"
    facts = f"{title}; seed {arguments.seed}; {result['hardware']}; commit {result['commit']}"
    text = f"{LEGEND}{'' if arguments.cheap else ' ' + BOUNDS}\n\n{table(statistics)}\n{facts}.\n"
    print(text, end="")
    if arguments.out:
        write_result(arguments.out, result, text)
    if figure:
        draw(statistics, title, figure)


if __name__ == "__main__":
    main()
