"""The backbone of a run: its settings, and the model that they describe at its start."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from skipless.common import distributed
from skipless.ssl.data.squares import Images, normalized_squares
from skipless.ssl.dino import Pool
from skipless.ssl.model.attention import Backend
from skipless.ssl.model.embedding import images_to_whiten_on, sine_positions_, whiten_patches_
from skipless.ssl.model.initialization import PRESETS, MlpInit, skipless_init_
from skipless.ssl.model.vit import SIZES, VisionTransformer


@dataclass
class ModelSettings:
    """The backbone. `size` gives dim, depth and heads; each can be set on its own too."""

    size: Literal["tiny", "small", "base", "large", "huge", "giant"] = "small"
    """ViT-Ti, S, B, L, H or g."""
    dim: int | None = None
    """Width of a token; by default that of `size`."""
    depth: int | None = None
    """Number of blocks; by default that of `size`."""
    heads: int | None = None
    """Attention heads; by default those of `size`. 64 channels a head are usual, 32 do for narrow models."""
    patch: int = 16
    """Side of a patch in pixels. Half the patch: four times the tokens, finer features, four times the time."""
    residual: bool = False
    """With skip connections (true) or without (false). The embedding stays the same, unless `init` is default."""
    from_ckpt: str | None = None
    """--model.from CKPT: start from the weights of another backbone of this width, depth and heads: a run, or what the
    evaluations take. Its patches are resampled, its positions interpolated, a head that fits is kept. A run that is
    resumed does not read it again."""
    init: Literal["default", "paper-dino", "paper-supervised", "small"] | None = None
    """Initialization; by default `small` without skip connections, and with them ViT's usual one with the embedding of
    `small`. `default` is ViT's usual one with the usual embedding. `small` is for narrow models and small budgets,
    `paper-dino` is arXiv 2510.00345's for ViT-S on ImageNet."""
    alpha: float | None = None
    """Noise in the query-key product, instead of the initialization's own."""
    beta: float | Literal["auto"] | None = None
    """Identity in the query-key product, instead of the initialization's own: larger is more diagonal attention. `auto`
    takes the smallest with which the fresh model keeps nine tenths of its patch tokens' effective rank, measured on 32
    of the images; the number is what the run's settings then hold."""
    c: float | None = None
    """Scale of the value and output matrices, instead of the initialization's own."""
    mlp: MlpInit | Literal["default"] | None = None
    """suo or mirrored MLP layers, or ViT's usual ones (default), instead of the initialization's own."""
    value_output: bool = True
    """Initialize value and output matrices; false leaves them as ViT's usual ones, to see what that part is worth."""
    query_key: bool = True
    """Initialize query and key matrices; false leaves them as ViT's usual ones."""
    depth_scale: float = 1.0
    """How many times larger the last block's attention logits start than the first one's, growing geometrically."""
    patches: Literal["default", "whitened"] | None = None
    """Initialization of the patch embedding: torch's usual one (default), or one that makes the images' patches
    uncorrelated and of equal variance, measured on some hundred of them (whitened): tokens that differ from the start.
    Where it is not given: whitened with the initialization `small` or where none is named, default with all others."""
    positions: Literal["default", "sines"] | None = None
    """Initialization of the positions: ViT's usual noise, next to nothing (default), or sines and cosines of row and
    column, of a size that counts beside whitened patches. Learned in both. Where it is not given: sines with `small` or
    where none is named, default with all others."""
    pool: Pool = "mean"
    """What the DINO head reads: `mean` of the patch tokens, or the class token `cls` (DINO's). Without skip connections
    use mean: near-identity attention starves a class token, and the loss would stay at ln K."""
    registers: int = 0
    """Register tokens; 4 in DINOv2."""
    shaped: bool = False
    """Attention maps of I + softmax - 1 / tokens (arXiv 2306.17759, 2311.01906) in place of softmax: they begin as the
    identity and yet learn, so that a skipless model's attention does. A departure from arXiv 2510.00345."""
    layer_scale: float | None = None
    """Initial scale of each branch (DINOv2: 1e-5). Residual models only."""
    drop_path: float = 0.0
    """Stochastic depth; DINO uses 0.1. Residual models only."""
    attention: Backend = "auto"
    """auto takes the first that works: on CUDA xformers, then torch's varlen attention; SDPA elsewhere."""
    checkpoint_activations: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""


def initialization_of(model: ModelSettings) -> str:
    """Name of the initialization: "default" for ViT's usual one, or one of `PRESETS`."""
    return model.init or ("default" if model.residual else "small")


def embedding_of(model: ModelSettings) -> tuple[Literal["default", "whitened"], Literal["default", "sines"]]:
    """How patch embedding and positions start; where the settings do not say, as the initialization has it. Where they
    name none either, a residual model has the embedding of the skipless one: it differs in its skips alone."""
    small = model.init in (None, "small")
    return model.patches or ("whitened" if small else "default"), model.positions or ("sines" if small else "default")


def changed_initialization(model: ModelSettings) -> dict[str, Any]:
    """What the settings change of their initialization, as arguments of `skipless_init_`."""
    changes = {name: value for name in ("alpha", "beta", "c", "mlp") if (value := getattr(model, name)) is not None}
    if model.mlp == "default":
        changes["mlp"] = None
    if model.depth_scale != 1:
        changes["depth_scale"] = model.depth_scale
    return changes | {name: False for name in ("value_output", "query_key") if not getattr(model, name)}


def initialization_arguments(model: ModelSettings) -> dict[str, Any]:
    """Arguments of `skipless_init_`: those of the preset, and what the settings change of them."""
    return PRESETS[initialization_of(model)] | changed_initialization(model)


def build_backbone(
    model: ModelSettings, image_size: int, seed: int, images: Images | None = None, fresh: bool = True
) -> VisionTransformer:
    """The backbone at its start, initialized as the settings say.

    Draws from torch's global random state; skipless initialization and whitening draw from `seed`.

    Args:
        image_size: side of the images that the grid of positions fits, in pixels.
        images: those to train on, if patches are to be whitened where the settings say so: some hundred, evenly spread,
            are looked at. Only the first process does, from which the others get their weights before training.
        fresh: False where a checkpoint's weights will take the place of these: what takes time is left out.

    Raises:
        ValueError: none of the images can be read, or all their patches are the same.
    """
    overrides = {name: getattr(model, name) for name in ("dim", "depth", "heads") if getattr(model, name) is not None}
    backbone = VisionTransformer(
        **(SIZES[model.size] | overrides),
        patch=model.patch,
        residual=model.residual,
        registers=model.registers,
        layer_scale=model.layer_scale,
        drop_path=model.drop_path,
        image_size=image_size,
        attention=model.attention,
        checkpoint_activations=model.checkpoint_activations,
        shaped=model.shaped,
    )
    if fresh and initialization_of(model) != "default":
        skipless_init_(backbone, **initialization_arguments(model), seed=seed)
    patches, positions = embedding_of(model)
    if positions == "sines":
        sine_positions_(backbone)
    if fresh and patches == "whitened" and images is not None and distributed.rank() == 0:
        squares = normalized_squares(images, images_to_whiten_on(image_size, model.patch), image_size)
        whiten_patches_(backbone.patch_embed.proj, squares, seed)
    return backbone


def filled_backbone(
    architecture: dict[str, Any], tensors: dict[str, Tensor], attention: Backend = "auto"
) -> VisionTransformer:
    """A backbone with its weights, in evaluation mode and float32, from what a file says of it.

    Args:
        architecture: arguments of VisionTransformer; tensors: its state dict.

    Raises:
        ValueError: one of the two is not as it should be; the sentence lacks its subject, the file.
    """
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    # Without memory at first: what a file says may be anything.
    try:
        if architecture.get("depth") != depth:
            raise ValueError(f"depth is {architecture.get('depth')!r}, and there are tensors of {depth} blocks")
        if odd := [name for name, x in architecture.items() if isinstance(x, float) and not math.isfinite(x)]:
            raise ValueError(f"{odd[0]} is {architecture[odd[0]]}")
        with torch.device("meta"):
            backbone = VisionTransformer(**architecture, attention=attention)
    except (TypeError, ValueError, RuntimeError, ArithmeticError, AttributeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"has an architecture that this version cannot build: {reason}") from None
    expected = backbone.state_dict()
    complaints = []
    if missing := sorted(set(expected) - set(tensors)):
        complaints.append(f"it lacks {listed(missing)}")
    if unexpected := sorted(set(tensors) - set(expected)):
        complaints.append(f"it has {listed(unexpected)}, which a plain ViT has not")
    if misshapen := [
        f"{name} is {list(tensors[name].shape)} and not {list(expected[name].shape)}"
        for name in sorted(set(tensors) & set(expected))
        if tensors[name].shape != expected[name].shape
    ]:
        complaints.append(listed(misshapen))
    if complaints:
        raise ValueError(f"cannot be loaded as a ViT: {'; '.join(complaints)}")
    broken = [name for name in expected if not tensors[name].isfinite().all()]
    if broken:
        raise ValueError(f"has NaN or infinite weights, in {listed(broken)}")
    backbone.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return backbone.eval()


def listed(names: list[str], count: int = 4) -> str:
    """The first of the names, and how many more there are."""
    rest = len(names) - count
    return ", ".join(names[:count]) + (f" and {rest} more" if rest > 0 else "")
