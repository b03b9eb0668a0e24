"""Any Vision Transformer behind one interface: ours, DINO's to DINOv3's, Hugging Face's, timm's.

    backbone = load_backbone("runs/photos")          # a run's folder, or a .pt, .pth or .safetensors file, or timm:NAME
    images = pad_to_patch(backbone.normalize(pictures), backbone.patch)
    (last,) = backbone.features(images)              # patches [B, h, w, D] and cls [B, D]
    (keys,) = backbone.features(images, blocks=(-1,), kind="keys")

What can be given is in `skipless.ssl.model.load`, and how the families differ in `skipless.ssl.model.families`.
"""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from skipless.common.memory import host_memory
from skipless.common.precision import autocast, describe, has_bf16
from skipless.ssl.model.files import Weights
from skipless.ssl.model.initialization import PRESETS, skipless_init_
from skipless.ssl.model.load import Loaded, fingerprint, load_vit
from skipless.ssl.model.vit import BlockFeatures, VisionTransformer

FeatureKind = Literal["tokens", "keys", "keys_without_bias", "queries", "values"]
Precision = Literal["fp32", "bf16"]

MOST_PATCHES = 2**16  # of one image: a square of 3,584 pixels for patches of 14


@dataclass(frozen=True, eq=False)
class Backbone(Loaded):
    """A frozen Vision Transformer with what belongs to it."""

    _: KW_ONLY
    arithmetic: str | None = None
    """How the network computes, where that is not in floating point: what its features depend on beside the weights."""
    precision: Precision = "fp32"
    """In which `features` are computed; they come out in float32."""

    @property
    def described_precision(self) -> str:
        """What `precision` means on the model's device, in a few words."""
        return describe(self.device, self.precision == "bf16")

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.norm.weight.device

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
        return fingerprint(self.model, [self.mean, self.std, *more])

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
        device = self.device
        on_gpu = device.type == "cuda"
        memory = torch.cuda.get_device_properties(device).total_memory if on_gpu else host_memory()
        if patches > MOST_PATCHES or 8 * patches**2 > memory:
            raise ValueError(
                f"{what}: {width} x {height} pixels are {patches:,} patches; to compare each with each takes "
                f"{8 * patches**2 / 1e9:.0f} GB of memory: give a smaller --size, or smaller images"
            )

    def normalize(self, images: np.ndarray | Tensor) -> Tensor:
        """uint8 [B, H, W, 3] RGB -> float32 [B, 3, H, W] on the model's device."""
        pixels, mean, std = (
            torch.as_tensor(values).to(self.device, non_blocking=True) for values in (images, self.mean, self.std)
        )
        x, mean, std = pixels.permute(0, 3, 1, 2).float() / 255, mean[:, None, None], std[:, None, None]
        return (x - mean) / std

    def __call__(self, images: Tensor) -> Tensor:
        """The vector of each normalized image [B, 3, H, W], as the head read it in training: [B, D], the mean of the
        last block's patches or its class token."""
        patches, cls = self.features(images)[0]
        return patches.mean((1, 2)) if self.pool == "mean" else cls

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
    """A backbone in evaluation mode, on the CPU, in float32: `load_vit`, whose arguments and errors these are.

    Examples:
        >>> load_backbone("dino_deitsmall16_pretrain.pth").architecture  # doctest: +SKIP
        'ViT-S/16, 12 blocks, 384 wide, residual, 6 heads assumed'
    """
    loaded = load_vit(ckpt, weights)
    return Backbone(**{field.name: getattr(loaded, field.name) for field in fields(Loaded)})


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
    model = model.eval().requires_grad_(False).to(backbone.device)
    return replace(
        backbone,
        model=model,
        path=f"untrained twin of {backbone.path}",
        sha256=fingerprint(model, "untrained"),
    )
