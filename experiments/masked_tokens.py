"""What a masked token knows of the other patches, block by block: of fresh models, or of trained ones.

    python experiments/masked_tokens.py --images imagenette128/val --out results/analysis/masked_tokens
    python experiments/masked_tokens.py --images imagenette128/val --ckpt runs/skipless runs/residual --out masked

A masked token is the same vector in every image but for what attention brings to it. So all that differs between the
images in its output depends on other patches: the share is the variance over images over the mean square, of the token
as the head reads it, after the final norm. Visible tokens vary with their own patch too. A model whose tokens are all
the same vector (mean share 1) has a large share, and nothing in it that tells patches apart.

Fresh models start from whitened patches and sines; `own head`: one attention head of each block keeps ViT's usual
queries and keys, and so attends to all tokens alike. OUT.json and .md have the table.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skipless.common import cli
from skipless.common.files import write_result
from skipless.common.provenance import provenance
from skipless.datasets.images import open_images
from skipless.datasets.storage.names import dataset_name
from skipless.eval.backbones import load_backbone
from skipless.ssl.data.masks import draw_mask
from skipless.ssl.data.squares import normalized_squares
from skipless.ssl.model.embedding import images_to_whiten_on, sine_positions_, whiten_patches_
from skipless.ssl.model.initialization import PRESETS, skipless_init_
from skipless.ssl.model.statistics import token_statistics
from skipless.ssl.model.vit import SIZES, Block, VisionTransformer

SMALL = PRESETS["small"]
# What is compared: arguments of the skipless initialization (None: a residual model), and whether a head keeps its own.
ARMS: dict[str, tuple[dict[str, Any] | None, bool]] = {
    "residual": (None, False),
    "skipless, paper-dino (beta 1)": (PRESETS["paper-dino"], False),
    **{f"skipless, small, beta {beta:g}": (SMALL | {"beta": beta}, False) for beta in (0.5, 1.0, 2.0, 4.0, 8.0)},
    "skipless, small, beta 4, own head": (SMALL, True),
}


@dataclass
class Settings:
    """Dependence of masked tokens on other patches."""

    images: str
    """A folder or zip archive of images."""
    ckpt: tuple[str, ...] = ()
    """Trained models, as folders of pretraining runs; by default fresh ones are compared."""
    dim: int = 96
    """Width of fresh models, by default those of configs/imagenette_cpu.yaml; 384, with 6 heads: ViT-S."""
    heads: int = 3
    """Their attention heads."""
    patch: int = 8
    """Their patches' side in pixels."""
    pixels: int = 48
    """Side of the images."""
    count: int = 64
    """How many images."""
    masks: int = 8
    """How many masks of 30 % of the patches, each on all images."""
    seed: int = 0
    """Of weights and masks."""
    out: Path = Path("results/analysis/masked_tokens")
    """OUT.json and .md."""


def fresh_models(settings: Settings, images: Any) -> Iterator[tuple[str, VisionTransformer]]:
    """The models of `ARMS`."""
    whiten_on = normalized_squares(images, images_to_whiten_on(settings.pixels, settings.patch), settings.pixels)
    for name, (arguments, own_head) in ARMS.items():
        torch.manual_seed(settings.seed)
        depth = SIZES["small"]["depth"]
        model = VisionTransformer(
            settings.dim, depth, settings.heads, settings.patch, arguments is None, image_size=settings.pixels
        )
        usual = [block.attn.qkv.weight.detach().clone() for block in model.blocks]  # type: ignore[union-attr]
        if arguments is not None:
            skipless_init_(model, **arguments, seed=settings.seed)
        if own_head:
            keep_own_heads_(model, usual)
        sine_positions_(model)
        whiten_patches_(model.patch_embed.proj, whiten_on, settings.seed)
        yield name, model.eval()


@torch.no_grad()
def keep_own_heads_(model: VisionTransformer, usual: Sequence[Tensor]) -> None:
    """Give queries and keys of each block's first head the weights that they had before the skipless initialization."""
    rows = model.dim // model.architecture["heads"]
    for block, weight in zip(model.blocks, usual, strict=True):
        assert isinstance(block, Block)
        for start in (0, model.dim):  # of queries and of keys
            block.attn.qkv.weight[start : start + rows] = weight[start : start + rows]


@torch.inference_mode()
def dependence(model: VisionTransformer, images: Tensor, masks: Tensor) -> dict[str, list[float]]:
    """Shares of tokens' mean square that vary over images, by block.

    Args:
        images: normalized [B, 3, H, W]; masks: bool [M, h * w], each for all images; the mask token is 0.

    Returns:
        {"hidden": of the tokens of masked patches, "visible": of those of all others}, each in [0, 1].
    """
    token = torch.zeros(1, 1, model.dim)
    varying, square = torch.zeros(2, 2, model.depth)  # [of what, block]
    for mask in masks:
        for number, (_, _, after) in enumerate(model.walk(model.embed(images, (mask.expand(len(images), -1), token)))):
            tokens = model.norm(after)[:, 1 + model.registers :]
            for kind, chosen in enumerate((mask, ~mask)):
                varying[kind, number] += tokens[:, chosen].var(0).sum()
                square[kind, number] += tokens[:, chosen].square().mean(0).sum()
    return dict(zip(("hidden", "visible"), (varying / square).tolist(), strict=True))


def measure(settings: Settings) -> None:
    """Measure, and write the table."""
    images = open_images(settings.images)
    squares = normalized_squares(images, settings.count, settings.pixels)
    if settings.ckpt:
        models: Any = ((Path(path).name, load_backbone(path).model) for path in settings.ckpt)
    else:
        models = fresh_models(settings, images)
    rng = np.random.default_rng(settings.seed)
    rows = []
    for name, model in models:
        side = settings.pixels // model.patch
        masks = np.stack([draw_mask(side, side, round(0.3 * side**2), rng) for _ in range(settings.masks)])
        shares = dependence(model, squares, torch.from_numpy(masks).flatten(1))
        rows.append({"name": name, **shares, "mean_share": token_statistics(model, squares)["mean_share"]})
        print(f"{name}: {rows[-1]['hidden'][-1]:.4f}", flush=True)
    result = {
        "task": "masked tokens",
        "dataset": dataset_name(Path(settings.images)),
        "images": len(squares),
        "seed": settings.seed,
        "settings": {name: str(value) for name, value in vars(settings).items() if name not in ("out", "images")},
        "details": rows,
        **provenance("cpu"),
    }
    blocks = range(0, len(rows[0]["hidden"]), 3)
    lines = [
        "Share of a token's mean square that differs between images, after the final norm, %: of a masked token all of",
        f"it depends on other patches. {len(squares)} images of {result['dataset']}, {settings.pixels} pixels, "
        f"{settings.masks} masks of 30 %; on {result['hardware']}.",
        "",
        f"| | {' | '.join(f'masked, block {number + 1}' for number in blocks)} | masked, last | visible, last "
        "| mean share, last |",
        f"|---|{'---:|' * (len(blocks) + 3)}",
    ]
    for row in rows:
        cells = [
            *(row["hidden"][number] for number in blocks),
            *(row[kind][-1] for kind in ("hidden", "visible", "mean_share")),
        ]
        lines.append(f"| {row['name']} | {' | '.join(f'{100 * cell:.1f}' for cell in cells)} |")
    write_result(settings.out, result, "\n".join(lines) + "\n")
    print("\n".join(lines))


main = partial(cli.run, measure, Settings, __doc__)

if __name__ == "__main__":
    main()
