"""Any Vision Transformer behind one interface: ours, DINO's, DINOv2's, timm's.

    backbone = load_backbone("runs/photos")          # a run's folder, or a .pt, .pth or .safetensors file, or timm:NAME
    images = pad_to_patch(backbone.normalize(pictures), backbone.patch)
    (last,) = backbone.features(images)              # patches [B, h, w, D] and cls [B, D]
    (keys,) = backbone.features(images, blocks=(-1,), kind="keys")

The architecture is read from the tensors: width, depth, patch, registers, layer scale, native grid. What tensors cannot
tell comes from the family they belong to:

    family                     told by                                   positions at other sizes than the native one
    skipless (ours)            the architecture stored with the file     as stored
    DINOv2 with registers      register tokens                           bicubic, antialiased, to the exact size
    DINOv2                     layer scale, a position for CLS           bicubic, with DINO's scale factor (h + 0.1) / n
    timm                       a classifier, no position for CLS, or     bicubic, antialiased, to the exact size
                               timm:NAME without "dino" in it
    DINO                       none of these                             bicubic, with DINO's scale factor (h + 0.1) / n

Tensors do not tell the number of attention heads either. A .json of the file's name beside it does ({"heads": 12}), or
Hugging Face's config.json; without them the usual number for the width is assumed, which the architecture's name says.

Nothing is unpickled but tensors and plain values.
"""

import argparse
import hashlib
import json
import math
import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from skipless.common.memory import host_memory
from skipless.common.pixels import MEAN, STD
from skipless.common.precision import autocast, describe, has_bf16
from skipless.ssl.model.build import filled_backbone, listed
from skipless.ssl.model.initialization import PRESETS, skipless_init_
from skipless.ssl.model.vit import BlockFeatures, VisionTransformer
from skipless.ssl.run.folder import last_checkpoint

Weights = Literal["teacher", "student"]
FeatureKind = Literal["tokens", "keys", "keys_without_bias", "queries", "values"]
Precision = Literal["fp32", "bf16"]

# Heads of the usual widths; every head of the smaller ones has 64 channels.
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}
MOCO_SMALL = 12  # heads of MoCo v3's ViT-S, 384 wide (arXiv 2104.02057, section 5)

# Position handling, see VisionTransformer: (position_offset, position_antialias).
POSITIONS = {"DINO": (0.1, False), "DINOv2": (0.1, False), "DINOv2 with registers": (0.0, True), "timm": (0.0, True)}

# Tensors that belong to a training objective or a classifier, not to the backbone.
NOT_BACKBONE = ("head.", "head_dist.", "mask_token", "dino_head.", "ibot_head.")
LARGEST_JSON = 2**22  # bytes; a description has hundreds

MOST_PATCHES = 2**16  # of one image: a square of 3,584 pixels for patches of 14
TIMM_TOLERANCE = 1e-3  # of the difference to timm's own features, relative to their standard deviation


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen Vision Transformer with what belongs to it."""

    model: VisionTransformer
    path: str
    """Where it came from, as given."""
    family: str
    """"skipless", "DINO", "DINOv2", "DINOv2 with registers" or "timm"."""
    sha256: str
    """Of the checkpoint's file (of the weights, for timm:NAME and untrained ones)."""
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    """Of RGB in [0, 1], which the network expects to be normalized by."""
    arithmetic: str | None = None
    """How the network computes, where that is not in floating point: what its features depend on beside the weights."""
    precision: Precision = "fp32"
    """In which `features` are computed; they come out in float32."""
    pool: str | None = None
    """What the head read in training, "cls" or "mean" (of the patches); None where the checkpoint does not say."""
    assumed_heads: bool = False
    """Whether the number of attention heads is the usual one for the width, for want of anything that tells it."""

    @property
    def described_precision(self) -> str:
        """What `precision` means on the model's device, in a few words."""
        return describe(self.model.pos_embed.device, self.precision == "bf16")

    @property
    def patch(self) -> int:
        """Side of a patch in pixels."""
        return self.model.patch

    @property
    def dim(self) -> int:
        """Channels of a token."""
        return self.model.dim

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self.model.depth

    @property
    def architecture(self) -> str:
        """A name for tables, as in "ViT-S/14, 12 blocks, 384 wide, 4 registers, residual, 6 heads assumed"."""
        model = self.model
        letter = {192: "ViT-Ti", 384: "ViT-S", 768: "ViT-B", 1024: "ViT-L", 1280: "ViT-H", 1408: "ViT-g"}
        registers = f", {model.registers} registers" if model.registers else ""
        kind = "residual" if model.architecture["residual"] else "skipless"
        heads = f", {model.architecture['heads']} heads assumed" if self.assumed_heads else ""
        letters = f"{letter.get(self.dim, 'ViT')}/{self.patch}"
        return f"{letters}, {self.depth} blocks, {self.dim} wide{registers}, {kind}{heads}"

    def fingerprint(self) -> str:
        """sha256 of the architecture, the weights as loaded, the normalization and the arithmetic: what features depend
        on."""
        more = [self.arithmetic] if self.arithmetic else []
        more += [self.described_precision] if self.precision == "bf16" else []
        return _fingerprint(self.model, [self.mean, self.std, *more])

    def to(self, device: torch.device | str, precision: Precision | None = None) -> "Backbone":
        """The same backbone with its weights, float32 as ever, on a device, to compute features in a precision, by
        default the one it had.

        bf16 is taken where the device is fast in it. It rounds what a block hands on to 8 bits: a residual stream is
        kept in float32 beside that, a model without skips has nothing else.
        """
        device = torch.device(device)
        return replace(
            self, model=self.model.to(device), precision=usable_precision(precision or self.precision, device)
        )

    def multiple_below(self, size: int) -> int:
        """The largest multiple of the patch that is no larger than a side in pixels. Raises ValueError where there is
        none."""
        if size < self.patch:
            raise ValueError(f"size is {size}, less than one patch of {self.path}, which has {self.patch} pixels")
        return size // self.patch * self.patch

    def require_room(self, what: object, height: int, width: int) -> None:
        """Raises ValueError for an image whose patches, each of them compared with each, take more memory than there
        is, or hours. (The system would kill the run without a word.)"""
        patches = -(-height // self.patch) * -(-width // self.patch)
        device = self.model.pos_embed.device
        on_gpu = device.type == "cuda"
        memory = torch.cuda.get_device_properties(device).total_memory if on_gpu else host_memory()
        if patches > MOST_PATCHES or 8 * patches**2 > memory:
            raise ValueError(
                f"{what}: {width} x {height} pixels are {patches:,} patches; to compare each with each takes "
                f"{8 * patches**2 / 1e9:.0f} GB of memory: give a smaller --size, or smaller images"
            )

    def normalize(self, images: np.ndarray | Tensor) -> Tensor:
        """uint8 [B, H, W, 3] RGB -> float32 [B, 3, H, W] on the model's device."""
        x = torch.as_tensor(images).to(self.model.pos_embed.device).permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(value, device=x.device)[:, None, None] for value in (self.mean, self.std))
        return (x - mean) / std

    @torch.no_grad()
    def features(
        self, images: Tensor, blocks: Sequence[int] = (-1,), kind: FeatureKind = "tokens", norm: bool = True
    ) -> list[BlockFeatures]:
        """Patch grids and CLS of any blocks, in one pass, without gradients.

        Args:
            images: normalized [B, 3, H, W]; height and width multiples of the patch (see `pad_to_patch`).
            blocks: which blocks, from 0; negative ones count from the end.
            kind: "tokens", the block's output; or the "keys", "queries" or "values" of its attention, heads
                concatenated; or "keys_without_bias": a bias added to all keys leaves attention as it is (softmax), so
                training leaves it arbitrary, and in some checkpoints it dwarfs the rest of the keys.
            norm: apply the final norm to tokens.

        Returns:
            One `BlockFeatures(patches [B, h, w, D], cls [B, D])` for each of `blocks`.

        Raises:
            ValueError: an unknown kind or block, or a size that is no multiple of the patch.
        """
        if kind == "keys_without_bias":
            # In float32: what is left without the bias may be small beside it, too small for 8 bits.
            keys = self.model.features(images, blocks, "keys", norm)
            biases = [self.model.blocks[block % self.depth].attn.qkv.bias.chunk(3)[1] for block in blocks]  # type: ignore[union-attr, operator]
            return [BlockFeatures(k.patches - bias, k.cls - bias) for k, bias in zip(keys, biases, strict=True)]
        bf16 = self.precision == "bf16"
        with autocast(images.device, bf16):
            outputs = self.model.features(images, blocks, kind, norm)
        return [BlockFeatures(o.patches.float(), o.cls.float()) for o in outputs] if bf16 else outputs


def usable_precision(wanted: Precision, device: torch.device) -> Precision:
    """What was asked for, but fp32 on devices that are slow in bf16."""
    return "bf16" if wanted == "bf16" and has_bf16(device) else "fp32"


def pad_to_patch(images: Tensor, patch: int, centered: bool = False) -> Tensor:
    """Zeros around normalized images [B, 3, H, W], up to the next multiple of the patch.

    At the right and at the bottom (LOST, TokenCut), or `centered` with the odd pixel at the right and the bottom
    (DINOv2's segmentation).
    """
    rows, columns = -images.shape[2] % patch, -images.shape[3] % patch
    top, left = (rows // 2, columns // 2) if centered else (0, 0)
    return F.pad(images, (left, columns - left, top, rows - top))


def load_backbone(ckpt: str | Path, weights: Weights = "teacher") -> Backbone:
    """A backbone in evaluation mode, on the CPU, in float32.

    Args:
        ckpt: the folder of a pretraining run; a .pt, .pth or .safetensors file of ours, of DINO or DINOv2 (bare or a
            training checkpoint, prefixes `module.` and `backbone.` or not, blocks in chunks or not) or of timm; or
            `timm:NAME`, which lets timm fetch pretrained weights.
        weights: which half of a training checkpoint that holds both.

    Raises:
        ValueError: the file is damaged, would run code, or is no ViT of these families; it names the tensors.
        FileNotFoundError: there is no such file or folder.

    Examples:
        >>> load_backbone("dino_deitsmall16_pretrain.pth").architecture  # doctest: +SKIP
        'ViT-S/16, 12 blocks, 384 wide, residual, 6 heads assumed'
    """
    if str(ckpt).startswith("timm:"):
        return _load_timm(str(ckpt))
    path = Path(ckpt).expanduser()
    if path.is_dir():
        if not (path / "backbone.safetensors").exists():
            checkpoints = path / "checkpoints" / "last.pt"
            advice = f"give {checkpoints} for its last checkpoint" if checkpoints.exists() else "is it a run's folder?"
            raise FileNotFoundError(f"{path} has no backbone.safetensors, which a finished run leaves: {advice}")
        if weights != "teacher":
            raise ValueError(f"{path} exports its teacher; give {path / 'checkpoints' / 'last.pt'} for its {weights}")
        path = path / "backbone.safetensors"
    if path.name == "last.pt":
        path = last_checkpoint(path.parent) or path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; give a file, the folder of a run, or timm:NAME")
    if path.suffix not in (".pt", ".pth", ".safetensors"):
        raise ValueError(f"{path}: a checkpoint ends in .pt, .pth or .safetensors")
    beside = _description(path.with_suffix(".json"))
    tensors, architecture, pool = _read(path, weights, beside)
    tensors = _rename(tensors)
    _check_names(path, tensors)
    family = "skipless" if architecture else _family(tensors)
    heads = None if architecture else _stated_heads(path, beside)
    assumed = not architecture and heads is None
    architecture = architecture or _read_architecture(path, tensors, family, heads)
    mean, std = _normalization(path)
    return Backbone(
        _build(path, tensors, architecture), str(ckpt), family, _file_sha256(path), mean, std,
        pool=pool if pool in ("cls", "mean") else None, assumed_heads=assumed,
    )  # fmt: skip


def choose_blocks(blocks: str, every_block: bool, backbone: Backbone) -> list[tuple[int, ...]]:
    """Blocks, from 0, that are measured together; the last of these groups is the one that is reported and shown.

    Args:
        blocks: last, last4, or numbers from 1, as in "3,6,9,12".
        every_block: each block by itself instead.

    Raises:
        ValueError: a block that the model does not have, or text that names no blocks.
    """
    depth = backbone.depth
    if every_block:
        if blocks != "last":
            raise ValueError(f"every-block measures each block by itself; leave out blocks {blocks!r}")
        return [(block,) for block in range(depth)]
    if blocks in ("last", "last4"):
        return [tuple(range(depth - (1 if blocks == "last" else min(4, depth)), depth))]
    try:
        numbers = [int(word) for word in blocks.split(",")]
    except ValueError:
        raise ValueError(f"blocks is {blocks!r}; choose last, last4, or numbers from 1 as in 3,6,9,12") from None
    for number in numbers:
        if not 1 <= number <= depth:
            raise ValueError(f"block {number} does not exist: {backbone.path} has blocks 1 to {depth}")
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"blocks is {blocks!r}, which names a block twice")
    return [tuple(number - 1 for number in numbers)]


def choose_block(block: str, every_block: bool, backbone: Backbone) -> list[int]:
    """As `choose_blocks`, where a block can only be looked at by itself: last, or a number from 1."""
    groups = choose_blocks(block, every_block, backbone)
    if any(len(group) > 1 for group in groups):
        raise ValueError(f"block is {block!r}; choose one: last, or a number from 1 to {backbone.depth}")
    return [group[0] for group in groups]


def untrained(backbone: Backbone, seed: int = 0) -> Backbone:
    """The same architecture with fresh random weights: the floor that a checkpoint's figures stand on.

    Weights as DINO's before training; skipless models get the `small` initialization in their blocks. Patches are never
    whitened here, and positions never sines, whatever the checkpoint started from.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VisionTransformer(**backbone.model.architecture, attention="sdpa")
    if not backbone.model.architecture["residual"]:
        skipless_init_(model, **PRESETS["small"], seed=seed)
    model = model.eval().requires_grad_(False).to(backbone.model.pos_embed.device)
    return replace(
        backbone,
        model=model,
        path=f"untrained twin of {backbone.path}",
        sha256=_fingerprint(model, "untrained"),
    )


def _read(
    path: Path, weights: Weights, beside: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any] | None, str | None]:
    """Tensors by name; the architecture where the file (or its .json neighbor, `beside`) says it, for then it is ours;
    and what the head read."""
    _require_no_page(path)
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
                stored = (file.metadata() or {}).get("architecture", "")
            if stored.startswith("{"):
                beside = {**beside, "architecture": json.loads(stored)}
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged or no safetensors file ({error}); fetch or export it again") from None
        return tensors, _stored_architecture(beside), beside.get("pool")
    try:
        # DINO's checkpoints hold their command line as a Namespace, a bag of plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        content = f"Python objects beside tensors ({code[1]})" if code else "more than tensors and plain values"
        raise ValueError(
            f"{path} holds {content}, and loading it could run code: "
            "if you trust it, open it yourself and save its state_dict as .safetensors"
        ) from None
    except Exception as error:
        raise ValueError(
            f"{path} is damaged or no file of torch.save ({_first_line(error)}); fetch or export it again"
        ) from None
    settings = content.get("settings") if isinstance(content, dict) else None
    model = settings.get("model") if isinstance(settings, dict) else None
    pool = model.get("pool") if isinstance(model, dict) else beside.get("pool")
    return _choose(path, content, weights), _stored_architecture(content), pool


def _require_no_page(path: Path) -> None:
    """Raises ValueError for what is often found under a checkpoint's name, and is something else."""
    with open(path, "rb") as file:
        start = file.read(512).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a pointer of Git LFS and not the file itself: fetch it with git lfs pull")
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError(f"{path} is a web page and no checkpoint, as a wrong link gives: download the file itself")


def _description(path: Path) -> dict[str, Any]:
    """What a .json beside a checkpoint says; {} without one. Raises ValueError for a damaged one."""
    try:
        if not path.is_file():
            return {}
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); export the backbone again, or move it away") from None
    return content if isinstance(content, dict) else {}


def _stated_heads(path: Path, beside: dict[str, Any]) -> int | None:
    """Attention heads by the .json beside the file, or by a config.json as Hugging Face has it."""
    heads = beside.get("heads")
    if heads is None and (config := path.with_name("config.json")).is_file():
        heads = _description(config).get("num_attention_heads")
    if heads is not None and not (isinstance(heads, int) and heads > 0):
        raise ValueError(f"{path.with_suffix('.json')}: heads is {heads!r}; give the number of attention heads")
    return heads


def _stored_architecture(content: Any) -> dict[str, Any] | None:
    """The architecture that our files state; other projects' state none, or no more than a name."""
    architecture = content.get("architecture") if isinstance(content, dict) else None
    return architecture if isinstance(architecture, dict) else None


def _choose(path: Path, content: Any, weights: Weights) -> dict[str, Tensor]:
    """The state dict in a file: at its top, or where training scripts put it."""
    if isinstance(content, dict):
        both = [key for key in ("teacher", "student") if isinstance(content.get(key), dict)]
        if both and weights not in both:
            raise ValueError(f"{path} holds no {weights}, only a {both[0]}; ask for that")
        for key in (weights, "state_dict", "model"):
            if isinstance(content.get(key), dict):
                content = content[key]
                break
        tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        if tensors:
            return tensors
    raise ValueError(f"{path} holds no tensors: looked at its top and under teacher, student, state_dict and model")


def _rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINO's and timm's common names: without prefixes of wrappers, chunks of blocks, heads and classifiers."""
    for prefix in ("module.", "_orig_mod."):
        tensors = {name.removeprefix(prefix): t for name, t in tensors.items()}
    for prefix in ("backbone.", "base_encoder."):  # the second is MoCo's
        if any(name.startswith(prefix) for name in tensors):
            # Beside a backbone lie heads, which are not wanted.
            tensors = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    tensors = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name): t for name, t in tensors.items()}
    if "reg_token" in tensors:  # timm's name
        tensors["register_tokens"] = tensors.pop("reg_token")
    return tensors


def _has_cls_position(tensors: dict[str, Tensor]) -> bool:
    return math.isqrt(tensors["pos_embed"].shape[1]) ** 2 != tensors["pos_embed"].shape[1]


def _family(tensors: dict[str, Tensor]) -> str:
    if "register_tokens" in tensors:
        return "DINOv2 with registers"
    if "pos_embed" in tensors and not _has_cls_position(tensors):
        return "timm"
    if "blocks.0.ls1.gamma" in tensors:
        return "DINOv2"
    return "timm" if "head.weight" in tensors else "DINO"


def _check_names(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """Raises ValueError where a tensor that tells the architecture is missing or misshapen."""
    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight")
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise ValueError(
            f"{path} is not a ViT under DINO's, DINOv2's or timm's names: it lacks {listed(missing)}, "
            f"and has {listed(list(tensors))}"
        )
    if any(".mlp.w12." in name for name in tensors):
        raise ValueError(f"{path} has SwiGLU MLPs (mlp.w12, as DINOv2's ViT-g), which are not supported; use a ViT-L")
    if "blocks.0.mlp.fc1.weight" not in tensors:
        raise ValueError(f"{path} has no blocks.0.mlp.fc1.weight: its blocks are not those of a plain ViT")
    embed = tensors["patch_embed.proj.weight"]
    if embed.ndim != 4 or embed.shape[1] != 3 or embed.shape[2] != embed.shape[3]:
        raise ValueError(f"{path}: patch_embed.proj.weight is {list(embed.shape)}, not [D, 3, patch, patch]")
    for name in ("cls_token", "pos_embed", "register_tokens"):
        if name in tensors and tensors[name].ndim != 3:
            raise ValueError(f"{path}: {name} is {list(tensors[name].shape)}, not [1, tokens, D]")


def _read_architecture(
    path: str | Path, tensors: dict[str, Tensor], family: str, heads: int | None = None
) -> dict[str, Any]:
    """Arguments of VisionTransformer, from shapes."""
    dim = tensors["cls_token"].shape[-1]
    patch = tensors["patch_embed.proj.weight"].shape[-1]
    if heads is None and dim not in HEADS:
        raise ValueError(
            f"{path} is {dim} wide, and the number of attention heads cannot be read from tensors; for a backbone of "
            "this project keep backbone.json beside it, or give the run's folder; for another, a file "
            f'{Path(path).with_suffix(".json").name} with {{"heads": N}} beside it'
        )
    if heads is None:
        heads = MOCO_SMALL if dim == 384 and _has_sine_positions(tensors["pos_embed"]) else HEADS[dim]
    side = math.isqrt(tensors["pos_embed"].shape[1])
    offset, antialias = POSITIONS[family]
    blocks = {int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))}
    return {
        "dim": dim,
        "depth": 1 + max(blocks),
        "heads": heads,
        "patch": patch,
        "registers": tensors["register_tokens"].shape[1] if "register_tokens" in tensors else 0,
        "layer_scale": 1.0 if "blocks.0.ls1.gamma" in tensors else None,
        "mlp_ratio": tensors["blocks.0.mlp.fc1.weight"].shape[0] / dim,
        "image_size": side * patch,
        "position_offset": offset,
        "position_antialias": antialias,
    }


def _has_sine_positions(positions: Tensor) -> bool:
    """Whether positions [1, 1 + N, D] are fixed sines and cosines, of D / 4 frequencies each, and none for CLS, as
    MoCo v3's alone among the families here."""
    sines, cosines = positions[0, 1:].float().chunk(4, dim=-1)[:2]
    of_cls = positions[0, 0].abs().max() if _has_cls_position({"pos_embed": positions}) else 1
    return bool(of_cls == 0 and torch.allclose(sines**2 + cosines**2, torch.ones(()), atol=1e-3))


def _build(path: str | Path, tensors: dict[str, Tensor], architecture: dict[str, Any]) -> VisionTransformer:
    """The model with its weights; an error that names what is out of place."""
    tensors = {name: t for name, t in tensors.items() if not name.startswith(NOT_BACKBONE)}
    if "pos_embed" in tensors and not _has_cls_position(tensors):
        # CLS has no position of its own: the token holds it.
        tensors["pos_embed"] = F.pad(tensors["pos_embed"], (0, 0, 1, 0))
    # Batches of one size need no packing, and torch's attention runs everywhere in float32.
    try:
        return filled_backbone(architecture, tensors, "sdpa").requires_grad_(False)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None


def _load_timm(name: str) -> Backbone:
    try:
        import timm
    except ImportError:
        raise ValueError(f"{name} needs the package timm: pip install timm") from None
    try:
        reference: Any = timm.create_model(name.removeprefix("timm:"), pretrained=True, num_classes=0).eval()
    except Exception as error:  # unknown name, no network, no such weights: each library below has its own class
        raise ValueError(
            f"{name}: timm cannot make this model with pretrained weights ({_first_line(error)})"
        ) from None
    tensors = _rename(reference.state_dict())
    _check_names(name, tensors)
    family = _family(tensors) if "dino" in name else "timm"
    heads = next((m.num_heads for m in reference.modules() if hasattr(m, "num_heads")), None)
    model = _build(name, tensors, _read_architecture(name, tensors, family, heads))
    # An activation or a norm's epsilon leaves no trace in the tensors, so the outcome is compared.
    size = model.architecture["image_size"]
    probe = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, features = reference.forward_features(probe), model([probe])[0]
    # Written so that NaN fails.
    same_shape = features.shape == expected.shape
    if not (same_shape and (features - expected).abs().max() <= TIMM_TOLERANCE * expected.std()):
        raise ValueError(f"{name} computes other features than a plain ViT with its weights; it is not supported")
    cfg = reference.pretrained_cfg
    return Backbone(model, name, family, _fingerprint(model, "timm"), tuple(cfg["mean"]), tuple(cfg["std"]))


def _normalization(path: Path) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """ImageNet's, which DINO, DINOv2 and this project use, unless a config.json beside it, as timm's have, differs."""
    config = path.with_name("config.json")
    try:
        stored = json.loads(config.read_text())["pretrained_cfg"]
        mean, std = (tuple(float(x) for x in stored[key]) for key in ("mean", "std"))
        return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return MEAN, STD


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fingerprint(model: VisionTransformer, more: Any) -> str:
    digest = hashlib.sha256(json.dumps([model.architecture, more], sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
