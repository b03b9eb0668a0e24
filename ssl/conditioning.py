"""What skip connections do to a network, measured on the tokens of real images.

    python ssl/conditioning.py --images imagenette/val --out results/initialization

compares fresh models block by block, residual and skipless, by initialization, and writes results/initialization.json
and .md.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skipless.datasets.images import open_images
from skipless.ssl.crops import center_crop, normalize
from skipless.ssl.initialization import PRESETS, skipless_init_
from skipless.ssl.provenance import provenance, write_result
from skipless.ssl.summarize import dataset_name
from skipless.ssl.vit import SIZES, VisionTransformer

# What is compared: residual or not, and the skipless initialization's arguments (None: ViT's default one).
ARMS: dict[str, tuple[bool, dict[str, Any] | None]] = {
    "residual, default": (True, None),
    "skipless, default": (False, None),
    "skipless, paper-dino (SUO, beta 1)": (False, PRESETS["paper-dino"]),
    "skipless, SUO, beta 4": (False, PRESETS["paper-dino"] | {"beta": 4.0}),
    "skipless, mirrored, beta 1": (False, PRESETS["small"] | {"beta": 1.0}),
    "skipless, small (mirrored, beta 4)": (False, PRESETS["small"]),
}


def mean_share(tokens: Tensor) -> Tensor:
    """How much of the tokens' energy is their image's mean token: 1 when all tokens of an image are the same vector.

    Args:
        tokens: [B, N, D], the patch tokens of B images.

    Returns:
        float64 [B], in [0, 1]: N |mean|^2 / sum |token|^2.
    """
    tokens = tokens.double()
    return tokens.mean(1).square().sum(-1) / tokens.square().sum(-1).mean(1)


def effective_rank(tokens: Tensor) -> Tensor:
    """exp(entropy of the squared singular values, normalised to sum 1) of an image's centred tokens.

    After Roy and Vetterli (EUSIPCO 2007), who take the singular values themselves: squared, they are shares of energy.

    When the mean share is close to 1, what is left after centring is noise, and its rank is that of noise: high, and
    meaningless. Read the two together.

    Args:
        tokens: [B, N, D].

    Returns:
        float64 [B], in [1, min(N - 1, D)].
    """
    tokens = tokens.double()
    centred = tokens - tokens.mean(1, keepdim=True)
    energy = torch.linalg.eigvalsh(centred @ centred.mT).clamp_min(0)  # the squared singular values, in less time
    share = energy / energy.sum(-1, keepdim=True).clamp_min(1e-300)
    return torch.special.entr(share).sum(-1).exp()


@torch.inference_mode()
def token_statistics(model: VisionTransformer, images: Tensor) -> dict[str, list[float]]:
    """Mean share and effective rank of the patch tokens after each block, before the final norm.

    Args:
        images: normalised, [B, 3, H, W].

    Returns:
        {"mean_share": one number a block, "effective_rank": likewise}, averaged over the images.
    """
    blocks = [f.patches.flatten(1, 2) for f in model.features(images, blocks=range(model.depth), norm=False)]
    return {
        "mean_share": [mean_share(tokens).mean().item() for tokens in blocks],
        "effective_rank": [effective_rank(tokens).mean().item() for tokens in blocks],
    }


def compare_initializations(size: str, images: Tensor, seed: int) -> dict[str, dict[str, list[float]]]:
    """`token_statistics` of fresh models of one size with 16-pixel patches, one for each of `ARMS`."""
    found = {}
    for name, (residual, arguments) in ARMS.items():
        torch.manual_seed(seed)
        model = VisionTransformer(**SIZES[size], residual=residual, image_size=images.shape[-1])
        if arguments is not None:
            skipless_init_(model, **arguments, seed=seed)
        found[name] = token_statistics(model.eval(), images)
    return found


def table(statistics: dict[str, dict[str, list[float]]]) -> str:
    """Markdown: mean share over effective rank, a line for each arm, a column for every second block and the first."""
    depth = len(next(iter(statistics.values()))["mean_share"])
    blocks = [0, *range(1, depth, 2)]
    lines = ["| initialization | | " + " | ".join(f"block {b + 1}" for b in blocks) + " |"]
    lines.append("|---|---|" + "---|" * len(blocks))
    for name, values in statistics.items():
        for title, key, digits in (("mean share", "mean_share", 2), ("effective rank", "effective_rank", 1)):
            lines.append(f"| {name} | {title} | " + " | ".join(f"{values[key][b]:.{digits}f}" for b in blocks) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line: see the docstring of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="Folder or zip archive of images.")
    parser.add_argument("--count", type=int, default=64, help="How many of them, evenly spread (default: 64).")
    parser.add_argument("--size", type=int, default=160, help="Side in pixels, a multiple of 16 (default: 160).")
    parser.add_argument("--models", nargs="+", default=["tiny", "small"], choices=list(SIZES), help="ViT sizes.")
    parser.add_argument("--seed", type=int, default=0, help="Of the weights.")
    parser.add_argument("--out", type=Path, help="Where to write the result, without its ending; by default nowhere.")
    arguments = parser.parse_args()
    try:
        source = open_images(arguments.images)
        rows = np.linspace(0, len(source) - 1, min(arguments.count, len(source))).round().astype(int)
        crops = [center_crop(source.read(int(row)), arguments.size, arguments.size) for row in rows]
        images = normalize(torch.from_numpy(np.stack(crops))[None])
        results, text = [], ""
        for size in arguments.models:
            statistics = compare_initializations(size, images, arguments.seed)
            text += f"ViT-{size}, {SIZES[size]['dim']} wide:\n\n{table(statistics)}\n"
            results.append({"architecture": SIZES[size] | {"patch": 16}, "statistics": statistics})
        result = {
            "task": "token statistics at initialization",
            "dataset": dataset_name(arguments.images),
            "images": len(images),
            "image_size": arguments.size,
            "seed": arguments.seed,
            "details": results,
            **provenance("cpu"),
        }
        if arguments.out:
            write_result(arguments.out, result, text)
        print(text, end="")
    except (ValueError, OSError) as error:
        print("error:", error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
