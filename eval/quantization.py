"""What few bits cost: weights and activations rounded to integers of 8 and 4 bits, simulated, for any backbone.

    python eval/quantization.py --ckpt runs/skipless --data.root imagenette --out quantization
    python eval/quantization.py --ckpt runs/residual --data.root imagenette --size 112 --pool mean \\
        --segmentation voc12 --segmentation-root VOCdevkit --out quantization

Without skip connections activations stay closer to a Gaussian (low excess kurtosis), so the same number of bits should
cost less: the claim of arXiv 2605.25880, here for one checkpoint. Reported are

1. the error of every linear layer of the blocks by itself: SQNR in dB (10 log10 of signal over error, both squared and
   summed over what the layer puts out), fed with the activations of the unquantized network, and beside it the excess
   kurtosis of these activations;
2. the error that has gathered in the tokens after every block;
3. the drop in k-NN accuracy (eval/knn.py) and, with --segmentation, in mIoU (the protocol `quick` of
   eval/segmentation.py), each with its interval over the same images.

The arithmetic is the simplest that hardware does fast: symmetric, rounded to nearest, one scale for each output channel
of a weight and one for each layer's input, set by the largest magnitude in 64 training images; what is larger is cut.
Products are summed without error. Neighbours, and the heads of segmentation, see features of the same arithmetic as the
images they are asked about, so a drop is what remains after refitting. In a residual model the tokens after a block
contain the skip path, which is never rounded: compare its layers, not its tokens, with a skipless one's. The patch
embedding, norms, softmax and the products in attention stay in floating point, as is usual.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from skipless.common import cli, distributed
from skipless.common.files import write_result
from skipless.common.settings import plain
from skipless.eval.backbones import Backbone, Weights, load_backbone
from skipless.eval.classification import (
    DataSettings,
    Pooling,
    accuracy,
    open_labeled,
    pooled_features,
    vectors,
    warn_of_pool,
)
from skipless.eval.dense.quick import QuickSettings, quick
from skipless.eval.features import default_cache
from skipless.eval.knn import knn_predict
from skipless.eval.metrics import drop_interval, miou_drop_interval, miou_interval, segmentation_scores
from skipless.eval.neighbors import nearest, require_faiss
from skipless.eval.results import keep_other_result, result_of
from skipless.eval.segmentation import DATA
from skipless.ssl.data.loader import loader_workers
from skipless.ssl.data.squares import central_squares
from skipless.ssl.model.statistics import excess_kurtosis

LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
# Bits of weights and of activations.
SCHEMES = {"w8a8": (8, 8), "w4a8": (4, 8), "w4a4": (4, 4)}
CALIBRATION_IMAGES = 64


@dataclass
class Settings:
    """Simulated quantization."""

    ckpt: str
    """Backbone: the folder of a run; a .pt, .pth or .safetensors of ours, DINO, DINOv2 or timm; or timm:NAME."""
    data: DataSettings
    """Labeled images: for the scales, and for k-NN."""
    segmentation: Literal["voc12", "coco-stuff-27", "coco-stuff-171", "ade20k", "scenes"] | None = None
    """A data set of eval/segmentation.py, to measure the drop in mIoU too; by default it is not measured."""
    segmentation_root: str | None = None
    """Its folder."""
    quick: QuickSettings = field(default_factory=QuickSettings)
    """Of the segmentation's protocol."""
    k: int = 20
    """Neighbours that vote."""
    pool: Pooling = "cls"
    """The vector of an image: its CLS token, the mean of its patch tokens, or both side by side."""
    size: int = 224
    """Side in pixels of the central crops."""
    weights: Weights = "teacher"
    """Which half of a training checkpoint that holds a teacher and a student."""
    out: str | None = None
    """Folder for quantization.json and quantization.md; by default nothing is written."""
    cache: str | None = None
    """Folder for features; by default ~/.cache/skipless/features. Safe to delete."""
    seed: int = 0
    """Of the bootstrap and of segmentation heads."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    batch_size: int = 64
    """Images in one forward pass of the backbone. Changes speed and memory alone."""
    workers: int | None = None
    """Processes that read images; by default all cores shared out with a GPU, and none on a CPU, which needs them
    itself."""

    def __post_init__(self) -> None:
        if min(self.k, self.size, self.batch_size) < 1 or (self.workers or 0) < 0 or self.seed < 0:
            raise ValueError("k, size and batch-size must be 1 or more; workers and seed cannot be negative")
        if (self.segmentation is None) != (self.segmentation_root is None):
            raise ValueError("segmentation and segmentation-root belong together: the data set and its folder")


def round_to_bits(x: Tensor, largest: Tensor, bits: int) -> Tensor:
    """What is left of x in integers of so many bits: the nearest multiple of largest / (2^(bits - 1) - 1), clipped.

    Args:
        x: any floating-point tensor.
        largest: the magnitude that the largest integer stands for, broadcast against x; 0 gives 0.
        bits: 2 or more. The integers are -(2^(bits - 1) - 1) ... 2^(bits - 1) - 1: symmetric about 0.

    Example:
        >>> round_to_bits(torch.tensor([0.2, -1.0, 3.0]), torch.tensor(0.7), bits=4)
        tensor([ 0.2000, -0.7000,  0.7000])
    """
    if bits < 2:
        raise ValueError(f"bits is {bits}; it must be at least 2")
    levels = 2 ** (bits - 1) - 1
    step = (largest.to(x.dtype) / levels).clamp_min(torch.finfo(x.dtype).tiny)
    return (x / step).round().clamp(-levels, levels) * step


def sqnr(exact: Tensor, quantized: Tensor) -> float:
    """Signal to quantization noise, 10 log10(|exact|^2 / |exact - quantized|^2) in dB; infinite where there is none."""
    signal, noise = (x.double().square().sum().item() for x in (exact, exact - quantized))
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that are quantized, by name: four a block."""
    found = {name: model.get_submodule(name) for i in range(len(model.blocks)) for name in _names(i)}  # type: ignore[arg-type]
    return {name: layer for name, layer in found.items() if isinstance(layer, nn.Linear)}


def _names(block: int) -> list[str]:
    return [f"blocks.{block}.{layer}" for layer in LAYERS]


@contextmanager
def inputs_seen(model: nn.Module, look: Callable[[str, Tensor], object]) -> Iterator[None]:
    """Within it, `look(name, input [T, D])` is called before each of the linear layers runs."""
    handles = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: (look(name, inputs[0]), None)[1])
        for name, layer in linear_layers(model).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def largest_inputs(backbone: Backbone, images: Tensor, batch_size: int = 16) -> dict[str, Tensor]:
    """Largest magnitude at the input of each linear layer over some images [B, 3, S, S], scalars by name."""
    found: dict[str, Tensor] = {}

    def look(name: str, x: Tensor) -> None:
        found[name] = torch.maximum(found.get(name, x.new_zeros(())), x.abs().amax())

    with inputs_seen(backbone.model, look):
        for batch in images.split(batch_size):
            backbone.features(batch)
    return found


@torch.no_grad()
def quantize(backbone: Backbone, weight_bits: int, activation_bits: int, largest: dict[str, Tensor]) -> Backbone:
    """A copy whose linear layers compute with rounded weights and inputs; the original is left as it is.

    Args:
        largest: magnitudes at the layers' inputs, from `largest_inputs`.
    """
    model = copy.deepcopy(backbone.model)
    for name, layer in linear_layers(model).items():
        layer.weight.copy_(round_to_bits(layer.weight, layer.weight.abs().amax(1, keepdim=True), weight_bits))

        def round_input(_: nn.Module, inputs: tuple[Tensor], limit: Tensor = largest[name]) -> tuple[Tensor]:
            return (round_to_bits(inputs[0], limit, activation_bits),)

        layer.register_forward_pre_hook(round_input)
    # To six digits: a GPU that rounds otherwise tomorrow is to find today's features.
    scales = {name: f"{value.item():.6g}" for name, value in largest.items()}
    return replace(backbone, model=model, arithmetic=f"{weight_bits} {activation_bits} {scales}")


@torch.no_grad()
def layer_errors(
    backbone: Backbone, images: Tensor, largest: dict[str, Tensor]
) -> dict[str, list[dict[str, float | list[float]]]]:
    """Error of each layer by itself, and what has gathered after each block.

    Args:
        images: normalised [B, 3, S, S]; others than those of `largest`, or the error looks smaller than it is.

    Returns:
        "layers": for each block {layer: SQNR in dB by scheme, in the order of `SCHEMES`; "kurtosis LAYER": of its
        input}; "blocks": for each block {"sqnr": of all tokens after it, by scheme; "kurtosis": of these tokens}.
        Kurtosis is that of an image, averaged over the images.
    """
    inputs: dict[str, Tensor] = {}
    with inputs_seen(backbone.model, lambda name, x: inputs.__setitem__(name, x.clone())):
        exact = _tokens(backbone, images)
    layers: list[dict[str, Any]] = []
    for block in range(backbone.depth):
        row: dict[str, Any] = {}
        for short, name in zip(LAYERS, _names(block), strict=True):
            layer, x = backbone.model.get_submodule(name), inputs[name]
            assert isinstance(layer, nn.Linear)
            weight, wide = layer.weight, layer.weight.abs().amax(1, keepdim=True)
            # The bias is added without error and is no signal that the multiplication has to carry.
            row[short] = [
                sqnr(x @ weight.T, round_to_bits(x, largest[name], a) @ round_to_bits(weight, wide, w).T)
                for w, a in SCHEMES.values()
            ]
            row[f"kurtosis {short}"] = excess_kurtosis(x.unflatten(0, (len(images), -1))).mean().item()
        layers.append(row)
    by_scheme = [_tokens(quantize(backbone, w, a, largest), images) for w, a in SCHEMES.values()]
    blocks: list[dict[str, Any]] = [
        {
            "sqnr": [sqnr(tokens, quantized[block]) for quantized in by_scheme],
            "kurtosis": excess_kurtosis(tokens).mean().item(),
        }
        for block, tokens in enumerate(exact)
    ]
    return {"layers": layers, "blocks": blocks}


def _tokens(backbone: Backbone, images: Tensor) -> list[Tensor]:
    """CLS and patch tokens after each block, before the final norm, [B, 1 + N, D]."""
    found = backbone.features(images, blocks=range(backbone.depth), norm=False)
    return [torch.cat([f.cls[:, None], f.patches.flatten(1, 2)], dim=1) for f in found]


class Segmented(NamedTuple):
    """One evaluation by segmentation: mIoU, and `image_counts` of every image."""

    miou: float
    counts: np.ndarray


def evaluate(settings: Settings) -> dict[str, Any]:
    """Measure as `settings` say, write what `settings.out` asks for, and return the result.

    Raises:
        ValueError, FileNotFoundError: a checkpoint, data or settings that cannot be used, or no faiss.
    """
    device = distributed.start(settings.device)
    began = time.perf_counter()
    require_faiss()
    backbone = load_backbone(settings.ckpt, settings.weights).to(device)
    warn_of_pool(backbone, settings.pool)
    workers = loader_workers(settings.workers, device)
    train, val = open_labeled(settings.data)
    if settings.k > len(train):
        raise ValueError(f"k is {settings.k}, and {train.name} {train.split} has {len(train):,} images: give fewer")
    masks = []
    if settings.segmentation is not None and settings.segmentation_root is not None:
        masks = [DATA[settings.segmentation](settings.segmentation_root, split) for split in ("train", "val")]
    recorded = plain(settings)
    out = Path(settings.out) if settings.out else None
    if out:
        keep_other_result(out / "quantization.json", recorded)
    cache = Path(settings.cache).expanduser() if settings.cache else default_cache()

    size = max(settings.size // backbone.patch, 1) * backbone.patch
    largest = largest_inputs(backbone, backbone.normalize(central_squares(train, CALIBRATION_IMAGES, size)))
    details: dict[str, Any] = layer_errors(backbone, backbone.normalize(central_squares(val, 16, size)), largest)
    arithmetics = {"float": backbone}
    arithmetics |= {name: quantize(backbone, w, a, largest) for name, (w, a) in SCHEMES.items()}

    hits: dict[str, np.ndarray] = {}
    found_by: dict[str, Segmented] = {}
    for name, quantized in tqdm(arithmetics.items(), desc="arithmetics", disable=distributed.rank() > 0):
        bank, queries = (
            pooled_features(quantized, images, settings.size, [-1], cache, settings.batch_size, workers)
            for images in (train, val)
        )
        last = (backbone.depth - 1,)
        similarities, rows = nearest(
            vectors(bank, last, settings.pool).numpy(),
            vectors(queries, last, settings.pool).numpy(),
            settings.k,
            device,
        )
        hits[name] = knn_predict(similarities, train.labels[rows], len(train.classes)) == val.labels
        if masks:
            outcome = quick(
                quantized, masks[0], masks[1], [last], settings.quick, cache, settings.seed, 16, workers, []
            )
            found_by[name] = Segmented(segmentation_scores(outcome.confusions[0]).miou, outcome.counts[0].cpu().numpy())
    details["knn"] = {
        name: accuracy(hit, settings.seed)
        | {"drop": float(hits["float"].mean() - hit.mean())}
        | {"drop_interval_95": drop_interval(hits["float"], hit, settings.seed)}
        for name, hit in hits.items()
    }
    details["segmentation"] = {
        name: {"miou": found.miou, "interval_95": miou_interval(found.counts, settings.seed)}
        | {"drop": found_by["float"].miou - found.miou}
        | {"drop_interval_95": miou_drop_interval(found_by["float"].counts, found.counts, settings.seed)}
        for name, found in found_by.items()
    }
    details = finite(details)
    details |= {"train_images": len(train), "classes": len(val.classes), "schemes": list(SCHEMES)}
    if masks:
        details["segmentation_images"] = [len(images) for images in masks]
    protocol = f"{val.name}-quantization/{settings.k}-nn-{settings.pool}"
    protocol += f"/{settings.size}px" if settings.size != 224 else ""
    result = result_of(
        "quantization", protocol, val.name, val.split, len(val),
        "top-1 w8a8", details["knn"]["w8a8"]["top1"], details, backbone, recorded, settings.seed,
        time.perf_counter() - began, device,
    )  # fmt: skip
    if distributed.rank() == 0:
        text = report(result)
        if out:
            write_result(out / "quantization", result, text)
        print("\n" + text, end="")
        if out:
            print(f"\nwritten: {out / 'quantization.json'}, quantization.md")
    return result


def finite(value: Any) -> Any:
    """The same tree with None for what JSON has no number for: infinite and undefined ones, of layers that are zero."""
    if isinstance(value, dict):
        return {name: finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def report(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    details, names = result["details"], [name.upper() for name in result["details"]["schemes"]]
    lines = [
        f"**{result['protocol']}** {result['checkpoint']['architecture']} ({result['checkpoint']['path']}); "
        f"{result['dataset']} {result['split']}, {result['images']:,} images, by {details['train_images']:,}; seed "
        f"{result['seed']}; {result['seconds'] / 60:.1f} minutes on {result['hardware']}.",
        "",
        "W4A8: weights in 4 bits, activations in 8. A drop is in points, with its 95 % interval over the same images.",
        "",
        "| | float | " + " | ".join(names) + " |",
        "|---|---:|" + "---:|" * len(names),
    ]
    for title, by_name, figure in (
        (f"{result['settings']['k']}-NN top-1, %", details["knn"], "top1"),
        ("mIoU, %", details["segmentation"], "miou"),
    ):
        if by_name:
            whole, *rest = by_name.values()
            cells = [f"{100 * entry[figure]:.1f} ({_drop(entry)})" for entry in rest]
            lines.append(f"| {title} | {100 * whole[figure]:.1f} | " + " | ".join(cells) + " |")
    layer_names = [layer.split(".")[1] for layer in LAYERS]
    lines += [
        "",
        f"SQNR in dB ({' / '.join(names)}) of each layer by itself, and of the tokens after the block; in brackets the",
        "excess kurtosis of the layer's input, and of the tokens.",
        "",
        f"| block | {' | '.join(layer_names)} | tokens |",
        "|---:|" + "---:|" * (len(LAYERS) + 1),
    ]
    for number, (layers, block) in enumerate(zip(details["layers"], details["blocks"], strict=True)):
        cells = [f"{_decibels(layers[name])} ({_number(layers[f'kurtosis {name}'])})" for name in LAYERS]
        cells.append(f"{_decibels(block['sqnr'])} ({_number(block['kurtosis'])})")
        lines.append(f"| {number + 1} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _drop(entry: dict[str, Any]) -> str:
    low, high = entry["drop_interval_95"]
    return f"{-100 * entry['drop']:+.1f}, {-100 * high:+.1f} to {-100 * low:+.1f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _decibels(values: list[float | None]) -> str:
    return " / ".join("-" if value is None else f"{value:.0f}" for value in values)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    cli.run(evaluate, Settings, __doc__, arguments)


if __name__ == "__main__":
    main()
