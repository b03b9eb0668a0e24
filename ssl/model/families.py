"""The families of Vision Transformers: how each names its tensors, and what its tensors do not tell.

    family                     told by                                   positions at other sizes         key bias
    DINOv3                     periods of rotary positions, storage      rotary: rows and columns run     none (masked)
                               tokens, or no positions (Hugging Face)    from -1 to 1
    MAE, MoCo v3               a decoder, or positions that are sines    bicubic, to the exact size       learned
    DINOv2 with registers      register tokens                           bicubic, antialiased, to the     learned
                                                                         exact size
    DINOv2                     layer scale, a position for CLS           bicubic, with DINO's scale       learned
                                                                         factor (h + 0.1) / n
    DINOv2 (Hugging Face)      the same, under Hugging Face's names      bicubic, to the exact size       learned
    ViT (Hugging Face)         Hugging Face's names (ViT, MAE, MSN)      bicubic, to the exact size       learned
    timm                       a classifier, no position for CLS, or     bicubic, antialiased, to the     learned
                               timm:NAME without "dino" in it            exact size
    DINO                       none of these (DINO, iBOT, MSN, DeiT)     bicubic, with DINO's scale       learned
                                                                         factor (h + 0.1) / n

All images are normalized by ImageNet's mean and standard deviation unless a file beside the checkpoint says otherwise;
DINOv3's models of satellite images have their own. `FAMILIES` is this table for the program.
"""

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from skipless.common.pixels import MEAN, STD
from skipless.ssl.model.build import listed
from skipless.ssl.model.files import Weights

Triple = tuple[float, float, float]


class Family(NamedTuple):
    """What tensors do not tell."""

    position_offset: float = 0.0
    position_antialias: bool = False
    norm_eps: float = 1e-6


FAMILIES = {
    "DINO": Family(position_offset=0.1),
    "DINOv2": Family(position_offset=0.1),
    "DINOv2 with registers": Family(position_antialias=True),
    "DINOv2 (Hugging Face)": Family(),
    "DINOv3": Family(norm_eps=1e-5),
    "MAE, MoCo v3": Family(),
    "ViT (Hugging Face)": Family(norm_eps=1e-12),
    "timm": Family(position_antialias=True),
}
SATELLITES: tuple[Triple, Triple] = ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))  # of DINOv3's model card

# Heads of the usual widths; every head of the smaller ones has 64 channels.
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 20, 1408: 16, 1536: 24, 4096: 32}
HUGE = 16  # heads of ViT-H, 1280 wide, but for DINOv3's ViT-H+, whose periods tell 20
MOCO_SMALL = 12  # heads of MoCo v3's ViT-S, 384 wide (arXiv 2104.02057, section 5)

# Tensors that belong to a training objective or a classifier, not to the backbone.
NOT_BACKBONE = (
    "head.", "head_dist.", "dino_head.", "ibot_head.", "fc.", "classifier.", "pooler.", "decoder", "attn_pool.",
    "mask_token", "masked_embed", "local_cls_norm.", "rope.",
)  # fmt: skip

# What reads a backbone's tokens in training, and what it is called here.
HEADS_BESIDE = {
    "head.": "head.", "dino_head.": "head.", "classifier.": "head.", "patch_head.": "patch_head.",
    "ibot_head.": "patch_head.", "cls_head.": "cls_head.", "attention_pool.": "attention_pool.",
}  # fmt: skip

# The first tensor of a ViT by which it is found behind the prefixes of wrappers, whatever these are.
FIRST = re.compile(r"^(.*?)(patch_embed\.proj|embeddings\.patch_embeddings(\.projection)?)\.weight$")
# Which of several networks in one file: the first word that a prefix has. MoCo evaluates its base encoder.
PREFERRED = {
    "teacher": ("teacher", "base_encoder", "target", "momentum", "ema"),
    "student": ("student", "base_encoder", "online"),
}

# Hugging Face's names, and others', as ours.
NAMES = [
    (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.", ""),
    (r"^(model\.|encoder\.)?layers?\.(\d+)\.", r"blocks.\2."),
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # in chunks
    (r"^layernorm\.", "norm."),
    (r"^fc_norm\.", "norm."),
    (r"^(storage_tokens|reg_token)$", "register_tokens"),
    (r"\.attention\.(attention\.)?(q_proj|query)\.", ".attn.q."),
    (r"\.attention\.(attention\.)?(k_proj|key)\.", ".attn.k."),
    (r"\.attention\.(attention\.)?(v_proj|value)\.", ".attn.v."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.attn\.([qkv])_proj\.", r".attn.\1."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.gamma_([12])$", r".ls\1.gamma"),
    (r"\.mlp\.(weights_in)\.", ".mlp.w12."),
    (r"\.mlp\.(weights_out)\.", ".mlp.w3."),
    (r"\.mlp\.(gate_proj|fc1_g)\.", ".mlp.w1."),
    (r"\.mlp\.(up_proj|fc1_x)\.", ".mlp.w2."),
    (r"\.mlp\.down_proj\.", ".mlp.w3."),
]

# What files look like that are no plain ViT, and what to do.
LOOKS = [
    (r"lora_[AB]", "an adapter without its network (LoRA)", "merge it into the network, and save that"),
    (r"(^|\.)layers\.\d+\.blocks\.\d", "a Swin Transformer", "only plain ViTs have one grid of tokens in all blocks"),
    (r"relative_position_", "BEiT or data2vec, which add a relative position bias to attention",
     "no family here has one; take a DINOv2, MAE or timm: checkpoint"),
    (r"vision_model\.|visual\.transformer\.|visual\.conv1|embeddings\.patch_embedding\.",
     "a vision tower of CLIP or SigLIP",
     "give timm's name of it, as in timm:vit_base_patch16_clip_224.openai or timm:vit_base_patch16_siglip_224"),
    (r"dist_token|distillation_token", "a distilled DeiT, which has a second class token",
     "take one without, as timm:deit_small_patch16_224.fb_in1k"),
    (r"patch_embed\.proj\.\d", "a ViT whose patches go through several convolutions, as MoCo v3's vit_conv",
     "take one whose patch embedding is one layer"),
    (r"(^|\.)(stages|downsample_layers|layer1\.0\.conv1|conv1)\.", "a convolutional network",
     "only ViTs are supported"),
    (r"q_norm\.|k_norm\.", "a ViT with normalized queries and keys", "no family here has them"),
]  # fmt: skip

# What wrappers of torch put into names, at any place.
WRAPS = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
# Parts of towers of CLIP and SigLIP: these differ in the activation, which leaves no trace in tensors.
TOWERS = re.compile(r"(^|\.)(norm_pre|attn_pool)\.")


def canonical(path: str | Path, tensors: dict[str, Tensor], weights: Weights = "teacher") -> dict[str, Tensor]:
    """The backbone's tensors under DINO's and timm's common names, without wrappers, heads and decoders.

    Separate queries, keys and values become one matrix, as do the two halves of a gated MLP; key biases that are
    masked or absent become zeros, which changes nothing.

    Args:
        path: for messages; weights: which half of a file that holds a teacher and a student.

    Raises:
        ValueError: it is no plain ViT: what it looks like, what it lacks, and what to do.
    """
    tensors = {WRAPS.sub("", name): tensor for name, tensor in tensors.items()}
    prefix = _wrapper(tensors, weights)
    names = {name: name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
    _refuse_others(path, list(names.values()))
    renamed = {}
    for name, short in names.items():
        for pattern, new in NAMES:
            short = re.sub(pattern, new, short)
        if short == "register_tokens" and not tensors[name].shape[1]:  # Hugging Face's DINOv3 without registers
            continue
        if not short.startswith(NOT_BACKBONE):
            renamed[short] = tensors[name]
    for block in sorted({match[0] for name in renamed if (match := re.match(r"blocks\.\d+\.", name))}):
        _join(renamed, block)
    if "patch_embed.proj.weight" in renamed and "patch_embed.proj.bias" not in renamed:  # CLIP
        embed = renamed["patch_embed.proj.weight"]
        renamed["patch_embed.proj.bias"] = embed.new_zeros(embed.shape[0])
    if "rope_embed.periods" in renamed:
        renamed.pop("pos_embed", None)
    elif "pos_embed" in renamed and renamed["pos_embed"].ndim == 3 and not _has_cls_position(renamed):
        # CLS has no position of its own: the token holds it.
        renamed["pos_embed"] = F.pad(renamed["pos_embed"], (0, 0, 1, 0))
    _require_known_positions(path, set(names.values()), renamed)
    _check(path, renamed)
    return renamed


def heads_beside(tensors: dict[str, Tensor], weights: Weights = "teacher") -> dict[str, Tensor]:
    """What lies beside or around the backbone and reads its tokens, under the names that it has in our runs; the
    arguments are those of `canonical`."""
    prefix = _wrapper({WRAPS.sub("", name): tensor for name, tensor in tensors.items()}, weights)
    found: dict[str, Tensor] = {}
    for around in (prefix, re.sub(r"\w+\.$", "", prefix)):
        for name, tensor in tensors.items():
            short = WRAPS.sub("", name).removeprefix(around)
            for theirs, ours in HEADS_BESIDE.items():
                if short.startswith(theirs):
                    found[ours + short.removeprefix(theirs)] = tensor
        if found:
            break
    parts = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
    for old, new in parts.items():  # torch's weight norm of then and now
        found = {name.replace(f"last_layer.{old}", f"last_layer.{new}"): tensor for name, tensor in found.items()}
    return found


def _require_known_positions(path: str | Path, names: set[str], tensors: dict[str, Tensor]) -> None:
    """Raises ValueError for rotary positions that leave no trace, by what else timm's networks that have them lack."""
    learned, gated = "pos_embed" in tensors, "blocks.0.mlp.w12.weight" in tensors
    if learned and gated and names & {"blocks.0.attn.q_bias", "blocks.0.mlp.fc1_g.weight"}:
        raise ValueError(f"{path} looks like EVA-02, with learned and rotary positions: no family here has both")
    plain = not learned and "rope_embed.periods" not in tensors and "blocks.0.attn.qkv.weight" in names
    if plain and "blocks.0.ls1.gamma" in tensors and not {"cls_token", "register_tokens"} <= tensors.keys():
        raise ValueError(f"{path} looks like a ViT with rotary positions of its own: only DINOv3's are known")


def _wrapper(tensors: dict[str, Tensor], weights: Weights) -> str:
    """The prefix behind which the backbone lies."""
    found = dict.fromkeys(match[1] for name in tensors if (match := FIRST.match(name)))
    prefixes = sorted(found, key=len)
    for word in PREFERRED[weights]:
        for prefix in prefixes:
            if word in prefix:
                return prefix
    return prefixes[0] if prefixes else ""


def _refuse_others(path: str | Path, names: list[str]) -> None:
    for pattern, looks, advice in LOOKS:
        if any(re.search(pattern, name) for name in names):
            raise ValueError(f"{path} looks like {looks}: {advice}")


def _join(tensors: dict[str, Tensor], block: str) -> None:
    """One block's parts put together, in place."""
    attention, mlp = f"{block}attn.", f"{block}mlp."
    if f"{attention}q.weight" in tensors:
        parts = [tensors.pop(f"{attention}{part}.weight", None) for part in "qkv"]
        if all(part is not None for part in parts):
            tensors[f"{attention}qkv.weight"] = torch.cat([part for part in parts if part is not None])
    weight, mask = tensors.get(f"{attention}qkv.weight"), tensors.pop(f"{attention}qkv.bias_mask", None)
    if weight is not None and f"{attention}qkv.bias" not in tensors:
        zeros = weight.new_zeros(weight.shape[0] // 3)
        biases = [[tensors.pop(name, None) for name in (f"{attention}{p}.bias", f"{attention}{p}_bias")] for p in "qkv"]
        tensors[f"{attention}qkv.bias"] = torch.cat([next((b for b in two if b is not None), zeros) for two in biases])
    elif mask is not None:
        bias = tensors[f"{attention}qkv.bias"]
        # Masked entries are never trained, and may be NaN.
        keys = torch.arange(len(bias)) * 3 // len(bias) == 1
        tensors[f"{attention}qkv.bias"] = torch.where(keys.to(bias.device), torch.zeros_like(bias), bias)
    for kind in ("weight", "bias"):
        gate, up = tensors.pop(f"{mlp}w1.{kind}", None), tensors.pop(f"{mlp}w2.{kind}", None)
        if gate is not None and up is not None:
            tensors[f"{mlp}w12.{kind}"] = torch.cat([gate, up])
            if f"{mlp}fc2.{kind}" in tensors:  # timm
                tensors[f"{mlp}w3.{kind}"] = tensors.pop(f"{mlp}fc2.{kind}")
        elif up is not None:  # Hugging Face's DINOv3 without gates
            tensors[f"{mlp}fc1.{kind}"] = up
            tensors[f"{mlp}fc2.{kind}"] = tensors.pop(f"{mlp}w3.{kind}")
    first, second = (tensors.get(f"{mlp}{name}.weight") for name in ("fc1", "fc2"))
    if first is not None and second is not None and first.shape[0] == 2 * second.shape[1]:  # timm's gated MLP
        for kind in ("weight", "bias"):
            tensors[f"{mlp}w12.{kind}"] = tensors.pop(f"{mlp}fc1.{kind}")
            tensors[f"{mlp}w3.{kind}"] = tensors.pop(f"{mlp}fc2.{kind}")


def _has_cls_position(tensors: dict[str, Tensor]) -> bool:
    return math.isqrt(tensors["pos_embed"].shape[1]) ** 2 != tensors["pos_embed"].shape[1]


def _check(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """Raises ValueError where a tensor that tells the architecture is missing or misshapen."""
    needed = ["patch_embed.proj.weight", "blocks.0.norm1.weight"]
    # Without positions it can only be DINOv3; without CLS, SigLIP.
    if "register_tokens" not in tensors and "rope_embed.periods" not in tensors and "blocks.0.ls1.gamma" not in tensors:
        needed = ["pos_embed", *needed]
    if missing := [name for name in needed if name not in tensors]:
        raise ValueError(
            f"{path} is not a ViT under DINO's, DINOv2's, DINOv3's, Hugging Face's or timm's names: it lacks "
            f"{listed(missing)}, and has {listed(list(tensors)) or 'heads alone'}; if timm has it, give timm:NAME"
        )
    if not any(f"blocks.0.mlp.{name}.weight" in tensors for name in ("fc1", "w12")):
        raise ValueError(f"{path} has no blocks.0.mlp.fc1.weight: its blocks are not those of a plain ViT")
    if integers := [name for name, x in tensors.items() if name.endswith("weight") and not x.is_floating_point()]:
        raise ValueError(f"{path} is quantized, in {listed(integers)}: give the file that it was made from")
    embed = tensors["patch_embed.proj.weight"]
    if embed.ndim == 5:
        raise ValueError(f"{path} looks like a network for videos (V-JEPA, VideoMAE): only those for images are known")
    if embed.ndim != 4 or embed.shape[1] != 3 or embed.shape[2] != embed.shape[3]:
        raise ValueError(f"{path}: patch_embed.proj.weight is {list(embed.shape)}, not [D, 3, patch, patch]")
    for name in ("cls_token", "pos_embed", "register_tokens"):
        if name in tensors and tensors[name].ndim != 3:
            raise ValueError(f"{path}: {name} is {list(tensors[name].shape)}, not [1, tokens, D]")


def family_of(names: set[str], tensors: dict[str, Tensor]) -> str:
    """A name in `FAMILIES`.

    Args:
        names: the tensors' names as they stand in the file; tensors: as `canonical` gives them.
    """
    hugging_face = any("embeddings.patch_embeddings" in name for name in names)
    if "pos_embed" not in tensors:
        return "DINOv3"
    if (any("decoder" in name for name in names) and not hugging_face) or _has_sine_positions(tensors["pos_embed"]):
        return "ViT (Hugging Face)" if hugging_face else "MAE, MoCo v3"
    if "register_tokens" in tensors:
        return "DINOv2 with registers"
    if hugging_face:
        return "DINOv2 (Hugging Face)" if "blocks.0.ls1.gamma" in tensors else "ViT (Hugging Face)"
    if "cls_token" not in tensors or not tensors["pos_embed"][:, 0].any():
        return "timm"
    if "blocks.0.ls1.gamma" in tensors:
        return "DINOv2"
    return "timm" if any(name.endswith("head.weight") for name in names) else "DINO"


def _has_sine_positions(positions: Tensor) -> bool:
    """Whether positions [1, 1 + N, D] are fixed sines and cosines, of D / 4 frequencies each, and none for CLS, as
    MAE's and MoCo v3's alone among the families here."""
    sines, cosines = positions[0, 1:].float().chunk(4, dim=-1)[:2]
    same = sines.shape == cosines.shape
    of_cls = positions[0, 0].abs().max() if len(positions[0]) > 1 else 1
    return bool(same and of_cls == 0 and torch.allclose(sines**2 + cosines**2, torch.ones(()), atol=1e-3))


def architecture_of(
    path: str | Path, tensors: dict[str, Tensor], family: str, about: dict[str, Any]
) -> tuple[dict[str, Any], bool]:
    """Arguments of VisionTransformer, from shapes, and whether the number of heads is assumed.

    Args:
        tensors: as `canonical` gives them; family: as `family_of` gives it.
        about: what is said beside the tensors: `heads`, `norm_eps`, `activation`, `rope_base`.

    Raises:
        ValueError: nothing tells the number of heads.
    """
    dim, patch = tensors["patch_embed.proj.weight"].shape[0], tensors["patch_embed.proj.weight"].shape[-1]
    periods, heads = tensors.get("rope_embed.periods"), about.get("heads")
    if periods is not None and heads is None:
        heads = dim // (4 * len(periods))
    assumed = heads is None
    if heads is None and dim not in HEADS:
        raise ValueError(
            f"{path} is {dim} wide, and the number of attention heads cannot be read from tensors; for a backbone of "
            "this project keep backbone.json beside it, or give the run's folder; for another, a file "
            f'{Path(path).with_suffix(".json").name} with {{"heads": N}} beside it'
        )
    if heads is None:
        heads = HEADS[dim] if family == "DINOv3" or dim != 1280 else HUGE
        if dim == 384 and family == "MAE, MoCo v3":
            heads = MOCO_SMALL
    positions = tensors.get("pos_embed")
    side = 224 // patch if positions is None else math.isqrt(positions.shape[1])
    kind = FAMILIES[family]
    swiglu = "blocks.0.mlp.w12.weight" in tensors
    hidden = tensors["blocks.0.mlp.w3.weight"].shape[1] if swiglu else tensors["blocks.0.mlp.fc1.weight"].shape[0]
    architecture: dict[str, Any] = {
        "dim": dim,
        "depth": 1 + max(int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))),
        "heads": heads,
        "patch": patch,
        "registers": tensors["register_tokens"].shape[1] if "register_tokens" in tensors else 0,
        "layer_scale": 1.0 if "blocks.0.ls1.gamma" in tensors else None,
        "mlp_ratio": hidden / dim,
        "image_size": max(side, 1) * patch,
        "position_offset": kind.position_offset,
        "position_antialias": kind.position_antialias,
        "norm_eps": about.get("norm_eps") or kind.norm_eps,
        "swiglu": swiglu,
        "activation": about.get("activation") or "gelu",
        "class_token": "cls_token" in tensors,
        "pre_norm": "norm_pre.weight" in tensors,
    }
    if positions is None:
        base = float(about.get("rope_base") or 100.0)
        architecture["rope_base"] = base
        if periods is None:
            tensors["rope_embed.periods"] = base ** torch.arange(0, 1, 4 * heads / dim)
    return architecture, assumed


def normalization(path: Path, about: dict[str, Any]) -> tuple[Triple, Triple]:
    """Mean and standard deviation of RGB in [0, 1] that a network expects: ImageNet's, unless a file beside it differs.

    Args:
        path: of the checkpoint, whose name tells DINOv3's models of satellite images; about: see `beside`.
    """
    try:
        mean, std = (tuple(float(x) for x in about[key]) for key in ("mean", "std"))
        return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])
    except (ValueError, KeyError, TypeError, IndexError):
        return SATELLITES if "sat493m" in path.name else (MEAN, STD)
