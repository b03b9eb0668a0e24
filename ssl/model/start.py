"""A backbone that starts from somebody's weights: made to fit another patch, another grid, other pixels."""

import contextlib
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipless.common.pixels import MEAN, STD
from skipless.ssl.data.squares import Images
from skipless.ssl.model.build import ModelSettings, build_backbone
from skipless.ssl.model.load import Loaded, load_vit
from skipless.ssl.model.vit import VisionTransformer
from skipless.ssl.run.folder import last_checkpoint

SHAPES = {"dim": "wide", "depth": "blocks", "heads": "heads"}


def start_backbone(
    model: ModelSettings, image_size: int, seed: int, images: Images | None = None, fresh: bool = True
) -> VisionTransformer:
    """The backbone at its start: `build_backbone`, whose arguments these are, with the weights of `model.from_ckpt`.

    Raises:
        ValueError, FileNotFoundError: a checkpoint that cannot be read, or is of another network.
    """
    backbone = build_backbone(model, image_size, seed, images, fresh and model.from_ckpt is None)
    if fresh and model.from_ckpt is not None:
        fill_(backbone, load_vit(model.from_ckpt))
    return backbone


@torch.no_grad()
def fill_(backbone: VisionTransformer, loaded: Loaded) -> VisionTransformer:
    """Give a backbone the weights of another, in place.

    The patch embedding is resampled to the backbone's patch and made for pixels normalized as here, positions are
    interpolated to its grid. A layer scale that the backbone lacks is multiplied into the layer before; registers that
    one of the two lacks are dropped, or stay fresh. All else must fit. Where patch, grid and registers are the same, so
    are the features.

    Raises:
        ValueError: width, depth, heads or MLPs differ, or it computes what the backbone does not.
    """
    require_same(backbone, loaded)
    theirs, ours = dict(loaded.model.state_dict()), backbone.state_dict()
    weight, bias = theirs["patch_embed.proj.weight"], theirs["patch_embed.proj.bias"]
    for channel in range(3):  # (x - m) / s of one normalization out of that of another
        scale = STD[channel] / loaded.std[channel]
        shift = (MEAN[channel] - loaded.mean[channel]) / loaded.std[channel]
        bias = bias + shift * weight[:, channel].sum((1, 2))
        weight = torch.cat([weight[:, :channel], scale * weight[:, channel : channel + 1], weight[:, channel + 1 :]], 1)
    theirs["patch_embed.proj.weight"], theirs["patch_embed.proj.bias"] = resample_patches(weight, backbone.patch), bias
    side = math.isqrt(backbone.pos_embed.shape[1])
    theirs["pos_embed"] = torch.cat([theirs["pos_embed"][:, :1], loaded.model.positions(side, side)[None]], dim=1)
    for block in range(backbone.depth):
        for scale_name, layer in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
            gamma, name = theirs.pop(f"blocks.{block}.{scale_name}.gamma", None), f"blocks.{block}.{layer}"
            own = f"blocks.{block}.{scale_name}.gamma"
            if own in ours:
                theirs[own] = torch.ones_like(ours[own]) if gamma is None else gamma
            elif gamma is not None:
                theirs[f"{name}.weight"] = gamma[:, None] * theirs[f"{name}.weight"]
                theirs[f"{name}.bias"] = gamma * theirs[f"{name}.bias"]
    fitting = {name: x for name, x in theirs.items() if name in ours and x.shape == ours[name].shape}
    backbone.load_state_dict(ours | fitting)
    return backbone


@torch.no_grad()
def start_heads(network: nn.Module, model: ModelSettings, fresh: bool = True) -> list[str]:
    """Give what a network has beside its `backbone` the weights of that of `model.from_ckpt`, where all shapes are the
    same, in place. Of a run's folder it is that of its last checkpoint. What is not trained stays.

    Returns:
        A sentence about each head of the two.
    """
    if model.from_ckpt is None or not fresh:
        return []
    theirs = _heads_there(model.from_ckpt)
    ours = {name: x for name, x in network.named_parameters() if not name.startswith("backbone.")}
    lines = []
    for head in sorted({name.partition(".")[0] for name in theirs | ours} - {"mask_token"}):
        there, here = (
            {name: x for name, x in tensors.items() if name.partition(".")[0] == head} for tensors in (theirs, ours)
        )
        trained = {name: x for name, x in here.items() if x.requires_grad}
        differing = sorted(there.keys() - here.keys()) + [
            name for name, x in trained.items() if name not in there or there[name].shape != x.shape
        ]
        if not there or not here:
            lines.append(
                f"it has no {head}: this run's starts fresh" if here else f"its {head} is dropped: none is here"
            )
        elif differing:
            shapes = [list(x[differing[0]].shape) if differing[0] in x else "none" for x in (there, here)]
            lines.append(f"its {head} is dropped: {differing[0]} is {shapes[0]} there, and {shapes[1]} here")
        else:
            for name, x in trained.items():
                x.copy_(there[name])
            lines.append(f"its {head} is kept")
    return lines


def _heads_there(ckpt: str) -> dict[str, Tensor]:
    there = load_vit(ckpt)
    last = None if there.heads else last_checkpoint(Path(ckpt).expanduser() / "checkpoints")
    if last is not None:
        with contextlib.suppress(ValueError):  # written in parts, say
            whole = load_vit(last)
            if torch.equal(whole.model.norm.weight, there.model.norm.weight):
                return whole.heads
    return there.heads


def require_same(backbone: VisionTransformer, loaded: Loaded) -> None:
    """Raises ValueError where the networks are too different for the one's weights to go into the other."""
    here, there = backbone.architecture, loaded.model.architecture
    where = f"model.from is {loaded.path}, which"
    if differing := [f"{there[name]} {word}" for name, word in SHAPES.items() if there[name] != here[name]]:
        asked = ", ".join(f"{here[name]} {word}" for name, word in SHAPES.items())
        raise ValueError(
            f"{where} is {' and '.join(differing)}, and the run's model is {asked}: "
            f"give --model.dim {there['dim']} --model.depth {there['depth']} --model.heads {there['heads']}"
        )
    shaped = there.get("shaped", False)
    if shaped != here.get("shaped", False):
        raise ValueError(
            f"{where} has {'' if shaped else 'no '}shaped attention: give --model.shaped {str(shaped).lower()}"
        )
    other: dict[str, Any] = {
        "gated MLPs": there.get("swiglu"),
        "rotary positions": "rope_base" in there,
        "a norm before its blocks": there.get("pre_norm"),
        f"{there.get('activation')} in its MLPs": there.get("activation"),
        f"MLPs {there['mlp_ratio']:g} times its width": round(there["mlp_ratio"] * there["dim"]) != 4 * there["dim"],
    }
    if found := [name for name, there_too in other.items() if there_too]:
        raise ValueError(f"{where} has {found[0]}, and the run's model has not: distill it (ssl/distill.py) instead")


def resample_patches(weight: Tensor, patch: int) -> Tensor:
    """A patch embedding [D, 3, p, p] for patches of another size: the one that says of enlarged patches what `weight`
    says of the patches, and of reduced ones what comes nearest (FlexiViT, arXiv 2212.08013, section 3.4)."""
    old = weight.shape[-1]
    if old == patch:
        return weight
    pixels = torch.eye(old * old, dtype=torch.float64).view(old * old, 1, old, old)
    resized = F.interpolate(pixels, size=(patch, patch), mode="bicubic", antialias=True).flatten(1)  # [p * p, new]
    return (weight.flatten(2).double() @ torch.linalg.pinv(resized).T).view(*weight.shape[:2], patch, patch).float()


def introduce_start(model: ModelSettings) -> list[str]:
    """Sentences about the weights that a run starts from; none where they are fresh."""
    if model.from_ckpt is None:
        return []
    there = load_vit(model.from_ckpt)
    had, kinds = there.model.architecture["residual"], {True: "with skip connections", False: "without them"}
    lines = [f"starts from {there.path} ({there.family}), {kinds[had]}"]
    if had != model.residual:
        lines.append(
            f"WARNING: {there.path} was trained {kinds[had]}, and this model is built {kinds[model.residual]}: its "
            "blocks compute something else with the same weights, so that features start near noise, and the "
            "initialization that makes a skipless model trainable is lost; ssl/distill.py hands on what was learned"
        )
    if there.model.patch != model.patch:
        lines.append(f"its patches of {there.model.patch} pixels are resampled to {model.patch}")
    if there.model.registers != model.registers:
        fate = "fresh" if model.registers else "dropped"
        lines.append(f"it has {there.model.registers} registers, and this model {model.registers}: they are {fate}")
    return lines
