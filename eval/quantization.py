"""What few bits cost: weights and activations rounded to integers of 8 and 4 bits, simulated, for any backbone.

    python eval/quantization.py --ckpt runs/skipless --data.root imagenette --out quantization
    python eval/quantization.py --ckpt runs/residual --data.root imagenette --size 112 \\
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
Products are summed without error. Neighbors, and the heads of segmentation, see features of the same arithmetic as the
images they are asked about, so a drop is what remains after refitting. In a residual model the tokens after a block
contain the skip path, which is never rounded: compare its layers, not its tokens, with a skipless one's. The patch
embedding, norms, softmax and the products in attention stay in floating point, as is usual.
"""

import skipless.common.interruption  # noqa: F401

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from skipless.common import cli
from skipless.common.progress import Progress, duration
from skipless.datasets.labels.classes import LabeledData, LabeledSet, open_splits
from skipless.eval.backbones import Backbone
from skipless.eval.classification import (
    Pooling,
    accuracy,
    pooled_features,
    vectors,
    warnings,
)
from skipless.eval.dense.data import DATA, DataName
from skipless.eval.dense.outcome import Outcome
from skipless.eval.dense.quick import QuickSettings, quick
from skipless.eval.evaluation import Context, EvaluationSettings, announce, finish, prepare
from skipless.eval.metrics import drop_interval, miou_drop_interval, miou_interval, segmentation_scores
from skipless.eval.neighbors import knn_predict, nearest
from skipless.ssl.data.squares import central_squares
from skipless.ssl.model.statistics import excess_kurtosis

LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
# Bits of weights and of activations.
SCHEMES = {"w8a8": (8, 8), "w4a8": (4, 8), "w4a4": (4, 4)}
CALIBRATION_IMAGES = 64


@dataclass
class Settings(EvaluationSettings):
    """Simulated quantization."""

    data: LabeledData
    """Labeled images: for the scales, and for k-NN."""
    segmentation: DataName | None = None
    """A data set of eval/segmentation.py, to measure the drop in mIoU too; by default it is not measured."""
    segmentation_root: str | None = None
    """Its folder."""
    quick: QuickSettings = field(default_factory=QuickSettings)
    """Of the segmentation's protocol."""
    k: int = 20
    """Neighbors that vote."""
    pool: Pooling = "auto"
    """The vector of an image: its CLS token, the mean of its patch tokens, or both side by side; auto is what the head
    read in training, where the checkpoint says it, and else cls. The figure's id names what is not cls."""
    size: int = 224
    """Side in pixels of the central crops."""
    _: KW_ONLY
    batch_size: int = 64
    """Images in one forward pass of the backbone. Changes speed and memory alone."""
    cache: str | None = None
    """Folder for features; by default ~/.cache/skipless/features. Safe to delete."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.k, self.size) < 1:
            raise ValueError("k and size must be 1 or more")
        if (self.segmentation is None) != (self.segmentation_root is None):
            raise ValueError("segmentation and segmentation-root belong together: the data set and its folder")


def round_to_bits(x: Tensor, largest: Tensor, bits: int) -> Tensor:
    """What is left of x in integers of so many bits: the nearest multiple of largest / (2^(bits - 1) - 1), clipped.

    Args:
        x: any floating-point tensor.
        largest: the magnitude that the largest integer stands for, broadcast against x; 0 gives 0.
        bits: 2 or more. The integers are -(2^(bits - 1) - 1) ... 2^(bits - 1) - 1: symmetric about 0.

    Examples:
        >>> round_to_bits(torch.tensor([0.2, -1.0, 3.0]), torch.tensor(0.7), bits=4)
        tensor([ 0.2000, -0.7000,  0.7000])
    """
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
    layers: dict[str, nn.Linear] = {}
    for block in range(len(model.blocks)):  # type: ignore[arg-type]
        layers |= {name: model.get_submodule(name) for name in _names(block)}  # type: ignore[misc]
    return layers


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
    """Largest magnitude at the input of each linear layer over images [B, 3, S, S], scalars by name."""
    largest: dict[str, Tensor] = {}

    def look(name: str, x: Tensor) -> None:
        largest[name] = torch.maximum(largest.get(name, x.new_zeros(())), x.abs().amax())

    with inputs_seen(backbone.model, look):
        for batch in images.split(batch_size):
            backbone.features(batch)
    return largest


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
        images: normalized [B, 3, S, S]; others than those of `largest`, or the error looks smaller than it is.

    Returns:
        "layers": for each block {layer: SQNR in dB by scheme, in the order of `SCHEMES`; "kurtosis LAYER": of its
        input}; "blocks": for each block {"sqnr": of all tokens after it, by scheme; "kurtosis": of these tokens}.
        Kurtosis is that of an image, averaged over the images.
    """
    inputs: dict[str, Tensor] = {}
    with inputs_seen(backbone.model, lambda name, x: inputs.__setitem__(name, x.clone())):
        exact = _tokens(backbone, images)
    layers_by_name = linear_layers(backbone.model)
    layers: list[dict[str, Any]] = []
    for block in range(backbone.depth):
        row: dict[str, Any] = {}
        for short, name in zip(LAYERS, _names(block), strict=True):
            x, weight = inputs[name], layers_by_name[name].weight
            wide = weight.abs().amax(1, keepdim=True)
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
    blocks = backbone.features(images, blocks=range(backbone.depth), norm=False)
    return [torch.cat([block.cls[:, None], block.patches.flatten(1, 2)], dim=1) for block in blocks]


def evaluate(settings: Settings) -> dict[str, Any]:
    """Measure as `settings` say, write what `settings.out` asks for, and return the result.

    Raises:
        ValueError, FileNotFoundError: a checkpoint, data or settings that cannot be used.
    """
    context = prepare(settings, "quantization")
    backbone = context.backbone
    size = backbone.multiple_below(settings.size)
    settings = replace(settings, pool=context.recorded["pool"], size=size)
    train, val = open_splits(settings.data)
    if settings.k > len(train):
        raise ValueError(f"k is {settings.k}, and {train.name} {train.split} has {len(train):,} images: give fewer")
    masks = []
    if settings.segmentation is not None and settings.segmentation_root is not None:
        masks = [DATA[settings.segmentation](settings.segmentation_root, split) for split in ("train", "val")]
    protocol = f"{val.name}-quantization/{settings.k}-nn-{settings.pool}"
    protocol += f"/{settings.size}px" if settings.size != 224 else ""
    announce(context, protocol, *warnings(backbone, settings.pool, train, val))

    largest = largest_inputs(backbone, backbone.normalize(central_squares(train, CALIBRATION_IMAGES, size)))
    details: dict[str, Any] = layer_errors(backbone, backbone.normalize(central_squares(val, 16, size)), largest)
    contexts = {"float": context}
    for name, (w, a) in SCHEMES.items():
        contexts[name] = replace(context, backbone=quantize(backbone, w, a, largest))
    hits: dict[str, np.ndarray] = {}
    segmented: dict[str, Outcome] = {}
    for name, quantized in Progress(contexts.items(), desc="arithmetics", active=context.first):
        hits[name] = knn_hits(quantized, train, val, settings)
        if masks:
            few = replace(quantized, batch_size=16)
            segmented[name] = quick(few, masks[0], masks[1], settings.quick, settings.seed)
    details |= {"knn": knn_drops(hits, settings.seed), "segmentation": miou_drops(segmented, settings.seed)}
    details = finite(details)
    details |= {"train_images": len(train), "classes": len(val.classes), "schemes": list(SCHEMES)}
    if masks:
        details["segmentation_images"] = [len(images) for images in masks]
    return finish(context, protocol, val, "top-1 w8a8", details["knn"]["w8a8"]["top1"], details, report)


def knn_hits(context: Context, train: LabeledSet, val: LabeledSet, settings: Settings) -> np.ndarray:
    """Which images the last block's nearest neighbors classify rightly, bool [N]."""
    bank, queries = (
        vectors(pooled_features(context, images, settings.size), context.choices[-1], settings.pool).numpy()
        for images in (train, val)
    )
    similarities, rows = nearest(bank, queries, settings.k, context.device)
    return knn_predict(similarities, train.labels[rows], len(train.classes)) == val.labels


def knn_drops(hits: dict[str, np.ndarray], seed: int) -> dict[str, dict[str, Any]]:
    """Accuracy by arithmetic, and its drop below that of "float"."""
    return {
        name: accuracy(hit, seed)
        | {"drop": float(hits["float"].mean() - hit.mean())}
        | {"drop_interval_95": drop_interval(hits["float"], hit, seed)}
        for name, hit in hits.items()
    }


def miou_drops(outcomes: dict[str, Outcome], seed: int) -> dict[str, dict[str, Any]]:
    """mIoU by arithmetic, and its drop below that of "float"."""
    mious = {name: segmentation_scores(outcome.confusions[0]).miou for name, outcome in outcomes.items()}
    counts = {name: outcome.counts[0].cpu().numpy() for name, outcome in outcomes.items()}
    return {
        name: {"miou": miou, "interval_95": miou_interval(counts[name], seed)}
        | {"drop": mious["float"] - miou}
        | {"drop_interval_95": miou_drop_interval(counts["float"], counts[name], seed)}
        for name, miou in mious.items()
    }


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
        f"{result['seed']}; {duration(result['seconds'])} on {result['hardware']}.",
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


main = partial(cli.run, evaluate, Settings, __doc__)

if __name__ == "__main__":
    main()
