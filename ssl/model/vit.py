"""The Vision Transformer, with skip connections or without: one class, one switch.

    residual                              skipless (arXiv 2510.00345)
    x <- x + attention(norm1(x))          x <- attention(norm1(x))
    x <- x + mlp(norm2(x))                x <- mlp(norm2(x))

Nothing else differs, so both have the same parameters under the same names (DINO's and timm's). A skipless model is
trainable only from the initialization in `skipless.ssl.model.initialization`.

Crops of different sizes go through every token-wise layer as one packed sequence [T, D]; attention alone knows where
one crop ends and the next begins.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from skipless.common.precision import for_checkpoint
from skipless.ssl.model.attention import Backend, Groups, attention, centered

Kind = Literal["tokens", "keys", "queries", "values"]
Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]
Rotation = tuple[Tensor, Tensor]  # cosines and sines [T, d_h] of packed tokens

# dim, depth, heads of the usual sizes: DeiT (tiny), ViT (small to huge), Zhai et al. 2022 (giant).
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"dim": 192, "depth": 12, "heads": 3},
    "small": {"dim": 384, "depth": 12, "heads": 6},
    "base": {"dim": 768, "depth": 12, "heads": 12},
    "large": {"dim": 1024, "depth": 24, "heads": 16},
    "huge": {"dim": 1280, "depth": 32, "heads": 16},
    "giant": {"dim": 1408, "depth": 40, "heads": 16, "mlp_ratio": 48 / 11},
}


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # CLIP's
}
# What VisionTransformer does where nothing else is said; the architecture that a file states names these only where
# they are others.
USUAL: dict[str, Any] = {
    "swiglu": False, "rope_base": None, "norm_eps": 1e-6, "activation": "gelu", "class_token": True, "pre_norm": False,
    "shaped": False,
}  # fmt: skip


class BlockFeatures(NamedTuple):
    """What one block says about a batch of images."""

    patches: Tensor  # [B, h, w, D]
    cls: Tensor  # [B, D]


class PatchEmbed(nn.Module):
    def __init__(self, dim: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, h * w, D], rows first.

        On CUDA as a product, which is what it is: cuDNN's convolution may round to TF32 where float32 is promised.
        """
        if not images.is_cuda:
            return self.proj(images).flatten(2).transpose(1, 2)
        (b, c, height, width), p = images.shape, self.proj.stride[0]
        patches = images.view(b, c, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
        return F.linear(patches.reshape(b, -1, c * p * p), self.proj.weight.flatten(1), self.proj.bias)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, shaped: bool = False):
        super().__init__()
        self.num_heads, self.shaped = heads, shaped
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [T, heads, d_h] of packed tokens [T, D]."""
        q, k, v = self.qkv(x).unflatten(1, (3, self.num_heads, -1)).unbind(1)
        return q, k, v

    def forward(self, x: Tensor, groups: Groups, backend: Backend, rotation: Rotation | None = None) -> Tensor:
        q, k, v = self.split(x)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        gathered = attention(q, k, v, groups, backend)
        return self.proj(gathered + centered(v, groups) if self.shaped else gathered)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Queries or keys [T, heads, d_h], turned by their positions (arXiv 2104.09864): channels i and d_h / 2 + i."""
    cos, sin = (angles[:, None].to(x.dtype) for angles in rotation)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, activation: Activation = "gelu"):
        super().__init__()
        self.act = ACTIVATIONS[activation]
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class SwiGLU(nn.Module):
    """The gated MLP of DINOv2's ViT-g and of DINOv3's larger ones (arXiv 2002.05202), under DINOv2's names."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    def __init__(self, dim: int, init: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float,
        residual: bool,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        swiglu: bool = False,
        norm_eps: float = 1e-6,
        activation: Activation = "gelu",
        shaped: bool = False,
    ):
        super().__init__()
        self.residual = residual
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, heads, shaped)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        hidden = round(dim * mlp_ratio)
        self.mlp = SwiGLU(dim, hidden) if swiglu else Mlp(dim, hidden, activation)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)

    def forward(self, x: Tensor, groups: Groups, backend: Backend, rotation: Rotation | None = None) -> Tensor:
        x = self.attend(x, groups, backend, rotation)
        return self._join(x, self.ls2(self.mlp(self.norm2(x))), groups)

    def attend(self, x: Tensor, groups: Groups, backend: Backend, rotation: Rotation | None = None) -> Tensor:
        """The first half of a block, [T, D] -> [T, D]: what its MLP gets, before `norm2`."""
        return self._join(x, self.ls1(self.attn(self.norm1(x), groups, backend, rotation)), groups)

    def _join(self, x: Tensor, branch: Tensor, groups: Groups) -> Tensor:
        """The one difference between the two kinds of models."""
        return x + self._drop(branch, groups) if self.residual else branch

    def _drop(self, x: Tensor, groups: Groups) -> Tensor:
        """Stochastic depth (arXiv 1603.09382): a whole crop's branch is dropped, the others are scaled up."""
        if not self.training or self.drop_path == 0:
            return x
        keep = 1 - self.drop_path
        masks = [x.new_empty(b, 1).bernoulli_(keep).expand(b, length).flatten() for b, length in groups]
        return x * (torch.cat(masks) / keep)[:, None]


def _require_consistent(a: dict[str, Any]) -> None:
    """Raises ValueError for arguments of VisionTransformer that contradict each other."""
    for name in ("dim", "depth", "heads", "patch"):
        if a[name] < 1:
            raise ValueError(f"{name} is {a[name]}; it must be at least 1")
    dim, heads, rope_base = a["dim"], a["heads"], a["rope_base"]
    if dim % heads:
        raise ValueError(f"dim {dim} is not divisible by heads {heads}; every head needs dim / heads channels")
    if a["image_size"] < a["patch"] or a["image_size"] % a["patch"]:
        raise ValueError(f"image_size {a['image_size']} is not a multiple of patch {a['patch']}")
    if rope_base is not None and (rope_base <= 0 or dim // heads % 4):
        raise ValueError(
            f"rope_base is {rope_base:g}, with {dim // heads} channels a head; it must be positive, and they a "
            "multiple of 4"
        )
    if a["activation"] not in ACTIVATIONS:
        raise ValueError(f"activation is {a['activation']!r}; choose {', '.join(ACTIVATIONS)}")
    if not 0 <= a["drop_path"] < 1:
        raise ValueError(f"drop_path is {a['drop_path']}; it must be in [0, 1)")
    if not a["residual"] and (a["layer_scale"] is not None or a["drop_path"] > 0):
        raise ValueError(
            "layer_scale and drop_path act on the branch beside a skip connection, and residual=False has none; "
            f"layer_scale is {a['layer_scale']} and drop_path {a['drop_path']:g}: leave them out"
        )


class VisionTransformer(nn.Module):
    """A pre-norm Vision Transformer (arXiv 2010.11929), residual or skipless.

    Args:
        dim, depth, heads: width of a token, number of blocks, attention heads per block.
        patch: side of a patch in pixels.
        residual: with skip connections (True) or without (False).
        registers: register tokens (arXiv 2309.16588), placed after CLS and without positions, as in DINOv2.
        layer_scale: initial value of DINOv2's per-channel branch scale; None for none. Residual models only.
        drop_path: rate of stochastic depth in the last block, growing linearly from 0. Residual models only.
        mlp_ratio: hidden width of the MLP over `dim`.
        image_size: side in pixels of the square grid whose positions are parameters. Other sizes get interpolated
            positions: bicubic, not antialiased, with DINO's scale factor ((h + 0.1) / n, (w + 0.1) / n) used as given.
        position_offset, position_antialias: 0.1 and False are DINO's way, and that of DINOv2 without registers;
            0.0 and True that of DINOv2 with registers, which interpolates to the exact size.
        attention: "auto", "xformers", "varlen" or "sdpa", see `skipless.ssl.model.attention`.
        checkpoint_activations: recompute each block in the backward pass: a third more time, much less memory.
        swiglu: gated MLPs of SiLU (DINOv2's ViT-g), with `mlp_ratio` the width of the gate over `dim`.
        rope_base: longest period of rotary positions, in units of half the image's side, as DINOv3's are: rows and
            columns run from -1 to 1 each, whatever the size. They take the place of position embeddings.
        norm_eps: epsilon of every LayerNorm.
        activation: of the MLPs; quick_gelu is CLIP's.
        class_token: without one (SigLIP), the mean of the patches stands for CLS in `features`; there is no training.
        pre_norm: a LayerNorm before the first block (CLIP).
        shaped: the map of every attention head is I + softmax - 1 / tokens in place of softmax (shaped attention,
            arXiv 2306.17759 and 2311.01906, with its three numbers held at 1). No weights are added.

    Raises:
        ValueError: a setting that contradicts another one, naming both.

    Examples:
        >>> model = VisionTransformer(dim=64, depth=2, heads=2, patch=8, residual=False, image_size=32)
        >>> [x.shape for x in model([torch.rand(2, 3, 32, 32), torch.rand(4, 3, 16, 16)])]
        [torch.Size([2, 17, 64]), torch.Size([4, 5, 64])]
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        patch: int = 16,
        residual: bool = True,
        registers: int = 0,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        mlp_ratio: float = 4.0,
        image_size: int = 224,
        position_offset: float = 0.1,
        position_antialias: bool = False,
        attention: Backend = "auto",
        checkpoint_activations: bool = False,
        swiglu: bool = False,
        rope_base: float | None = None,
        norm_eps: float = 1e-6,
        activation: Activation = "gelu",
        class_token: bool = True,
        pre_norm: bool = False,
        shaped: bool = False,
    ):
        super().__init__()
        self.architecture: dict[str, Any] = {
            "dim": dim, "depth": depth, "heads": heads, "patch": patch, "residual": residual, "registers": registers,
            "layer_scale": layer_scale, "drop_path": drop_path, "mlp_ratio": mlp_ratio, "image_size": image_size,
            "position_offset": position_offset, "position_antialias": position_antialias,
        }  # fmt: skip
        more = {
            "swiglu": swiglu, "rope_base": rope_base, "norm_eps": norm_eps, "activation": activation,
            "class_token": class_token, "pre_norm": pre_norm, "shaped": shaped,
        }  # fmt: skip
        _require_consistent(self.architecture | more)
        self.architecture |= {name: value for name, value in more.items() if value != USUAL[name]}
        self.dim, self.depth, self.patch, self.registers = dim, depth, patch, registers
        self.embed_dim = dim  # as timm and DINO call it
        self.class_token = class_token
        self.position_offset, self.position_antialias = position_offset, position_antialias
        self.attention: Backend = attention
        self.checkpoint_activations = checkpoint_activations

        self.patch_embed = PatchEmbed(dim, patch)
        if class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        if rope_base is None:
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image_size // patch) ** 2, dim))
        else:
            exponents = torch.arange(0, 1, 4 * heads / dim)
            self.rope_embed = nn.Module()
            self.rope_embed.register_buffer("periods", rope_base**exponents)  # [d_h / 4]; DINOv3's name
        if registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, registers, dim))
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.norm_pre = nn.LayerNorm(dim, eps=norm_eps) if pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(dim, heads, mlp_ratio, residual, layer_scale, rate, swiglu, norm_eps, activation, shaped)
            for rate in rates
        )
        self.norm = nn.LayerNorm(dim, eps=norm_eps)

        self._initialize_()

    def _initialize_(self) -> None:
        for name, parameter in self.named_parameters():  # as in DINO; torch's own default for the patch embedding
            if name.endswith(("cls_token", "pos_embed", "register_tokens")) or (
                parameter.ndim == 2 and not name.startswith("patch_embed")
            ):
                nn.init.trunc_normal_(parameter, std=0.02)
            elif name.startswith("blocks") and name.endswith("bias"):
                nn.init.zeros_(parameter)

    def positions(self, h: int, w: int) -> Tensor:
        """Position embeddings [h * w, D] of an h x w grid of patches, rows first; see `image_size` in the class."""
        patches = self.pos_embed[0, 1:]
        n = round(patches.shape[0] ** 0.5)
        if (h, w) == (n, n):
            return patches
        grid = patches.unflatten(0, (n, n)).permute(2, 0, 1)[None].float()
        size: dict[str, Any] = {"size": (h, w)}
        if self.position_offset:
            size = {"scale_factor": ((h + self.position_offset) / n, (w + self.position_offset) / n)}
        grid = F.interpolate(grid, mode="bicubic", antialias=self.position_antialias, **size)
        return grid[0].flatten(1).T.to(patches.dtype)

    @property
    def prefix(self) -> int:
        """Tokens before those of the patches: CLS and registers."""
        return int(self.class_token) + self.registers

    def rotation(self, sizes: Sequence[tuple[int, int, int]]) -> Rotation | None:
        """Cosines and sines [T, d_h] for the packed tokens of batches (B, h, w); None without rotary positions.

        DINOv3 (arXiv 2508.10104): angles 2 pi x / period of a patch's center (y, x), each in (-1, 1); CLS and registers
        are not turned.
        """
        if "rope_base" not in self.architecture:
            return None
        periods: Tensor = self.rope_embed.get_buffer("periods")
        angles = []
        for batch, h, w in sizes:
            rows, columns = (2 * (torch.arange(n, device=periods.device) + 0.5) / n - 1 for n in (h, w))
            grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1).float()
            own = (2 * math.pi * grid[:, :, None] / periods.float()).flatten(1).tile(2)  # [h * w, d_h]
            angles.append(F.pad(own, (0, 0, self.prefix, 0)).tile(batch, 1))
        packed = torch.cat(angles)
        return packed.cos(), packed.sin()

    def embed(self, images: Tensor, hidden: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """What the first block gets: [B, 3, H, W] -> tokens [B, 1 + R + h * w, D]: CLS, registers, patches.

        Args:
            hidden: bool [B, h * w] and a token [1, 1, D], which takes the place of those patches, before positions are
                added (as in DINOv2).

        Raises:
            ValueError: a height or width that is no multiple of the patch.
        """
        b, _, height, width = images.shape
        if height % self.patch or width % self.patch or not height or not width:
            raise ValueError(
                f"images of {height} x {width} pixels cannot be cut into patches of {self.patch}; pad first"
            )
        patches = self.patch_embed(images)
        if hidden is not None:
            patches = torch.where(hidden[0][..., None], hidden[1], patches)
        rotary = "rope_base" in self.architecture
        tokens = [patches if rotary else patches + self.positions(height // self.patch, width // self.patch)]
        if self.registers:
            tokens.insert(0, self.register_tokens.expand(b, -1, -1))
        if self.class_token:
            cls = self.cls_token if rotary else self.cls_token + self.pos_embed[:, :1]
            tokens.insert(0, cls.expand(b, -1, -1))
        return self.norm_pre(torch.cat([t.to(patches.dtype) for t in tokens], dim=1))

    def flops(self, height: int, width: int) -> float:
        """Floating-point operations of the forward pass of one image: matrix products only, an addition is one."""
        patches = (height // self.patch) * (width // self.patch)
        tokens = self.prefix + patches
        weights = sum(p.numel() for p in self.blocks.parameters() if p.ndim == 2)
        attention = 4 * tokens**2 * self.dim * self.depth
        return 2 * weights * tokens + attention + 2 * 3 * self.patch**2 * self.dim * patches

    @overload
    def forward(self, crops: Tensor) -> Tensor: ...

    @overload
    def forward(self, crops: Sequence[Tensor], hidden: tuple[Tensor, Tensor] | None = None) -> list[Tensor]: ...

    def forward(
        self, crops: Tensor | Sequence[Tensor], hidden: tuple[Tensor, Tensor] | None = None
    ) -> Tensor | list[Tensor]:
        """Tokens of a list of batches, one for each crop size, in one pass; or of one batch.

        Args:
            crops: tensors [B_i, 3, H_i, W_i], or one; height and width multiples of the patch.
            hidden: patches of the first batch that a token stands in for, see `embed`.

        Returns:
            Tensors [B_i, 1 + R + N_i, D] after the final norm, or one; token 0 is CLS, the last N_i are patches, rows
            first.
        """
        if isinstance(crops, Tensor):
            return self([crops], hidden)[0]
        embedded = [self.embed(crops[0], hidden), *(self.embed(images) for images in crops[1:])]
        groups = tuple((t.shape[0], t.shape[1]) for t in embedded)
        rotation = self.rotation([(len(c), c.shape[2] // self.patch, c.shape[3] // self.patch) for c in crops])
        x = torch.cat([t.flatten(0, 1) for t in embedded])
        again: dict[str, Any] = {} if x.is_cuda else {"context_fn": for_checkpoint}
        for block in self.blocks:
            if self.checkpoint_activations and self.training:
                x = checkpoint(block, x, groups, self.attention, rotation, use_reentrant=False, **again)
            else:
                x = block(x, groups, self.attention, rotation)
        x = self.norm(x)
        split = x.split([b * length for b, length in groups])
        return [t.unflatten(0, group) for t, group in zip(split, groups, strict=True)]

    def features(
        self, images: Tensor, blocks: Sequence[int] = (-1,), kind: Kind = "tokens", norm: bool = True
    ) -> list[BlockFeatures]:
        """Patch grids and CLS of any blocks, in one pass.

        Args:
            images: [B, 3, H, W], height and width multiples of the patch.
            blocks: which blocks, from 0; negative ones count from the end.
            kind: the block's output tokens, or the keys, queries or values (heads concatenated) of its attention,
                before rotary positions turn them.
            norm: apply the model's final norm to output tokens (it never applies to keys, queries and values).

        Returns:
            One `BlockFeatures(patches [B, h, w, D], cls [B, D])` for each entry of `blocks`, in that order.

        Raises:
            ValueError: an unknown kind, or a block that the model does not have.
        """
        if kind not in ("tokens", "keys", "queries", "values"):
            raise ValueError(f"kind is {kind!r}; choose tokens, keys, queries or values")
        for wanted in blocks:
            if not -self.depth <= wanted < self.depth:
                raise ValueError(f"block {wanted} does not exist: this model has blocks 0 to {self.depth - 1}")
        numbers = [number % self.depth for number in blocks]
        grid = (images.shape[2] // self.patch, images.shape[3] // self.patch)
        features: dict[int, BlockFeatures] = {}
        walk = zip(range(max(numbers, default=-1) + 1), self.walk(self.embed(images), grid), strict=False)
        for number, (block, before, after) in walk:
            if number not in numbers:
                continue
            if kind == "tokens":
                tokens = self.norm(after) if norm else after
            else:
                q, k, v = block.attn.split(block.norm1(before).flatten(0, 1))
                tokens = {"queries": q, "keys": k, "values": v}[kind].flatten(1).view_as(before)
            patches = tokens[:, self.prefix :]
            cls = tokens[:, 0] if self.class_token else patches.mean(1)
            features[number] = BlockFeatures(patches.unflatten(1, grid), cls)
        return [features[number] for number in numbers]

    def forward_features(self, images: Tensor) -> Tensor:
        """timm's name for the tokens after the final norm: [B, 3, H, W] -> [B, 1 + R + N, D]."""
        return self(images)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Any, ...]:
        """Patches of several blocks as DINOv2's models give them; `features` says the same in other shapes.

        Args:
            x: images [B, 3, H, W].
            n: the last n blocks, or the numbers of blocks, from 0.
            reshape: patches as [B, D, h, w] instead of [B, h * w, D].
            return_class_token: each as a pair with its CLS token [B, D].
            norm: apply the final norm.
        """
        blocks = range(self.depth - n, self.depth) if isinstance(n, int) else n
        layers = []
        for features in self.features(x, list(blocks), norm=norm):
            patches = features.patches.permute(0, 3, 1, 2) if reshape else features.patches.flatten(1, 2)
            layers.append((patches.contiguous(), features.cls) if return_class_token else patches.contiguous())
        return tuple(layers)

    def walk(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Iterator[tuple[Block, Tensor, Tensor]]:
        """The blocks in order, each computed when it is asked for.

        Args:
            tokens: [B, N, D], as `embed` gives them.
            grid: rows and columns of patches among them; rotary positions need it.

        Yields:
            The block, and the tokens [B, N, D] that enter and leave it.
        """
        groups = ((tokens.shape[0], tokens.shape[1]),)
        if grid is None and "rope_base" in self.architecture:
            raise ValueError("rotary positions, as DINOv3 has them, are not supported by this measure")
        rotation = self.rotation([(tokens.shape[0], *grid)]) if grid else None
        for block in self.blocks:
            assert isinstance(block, Block)
            before, tokens = (
                tokens,
                block(tokens.flatten(0, 1), groups, self.attention, rotation).unflatten(0, groups[0]),
            )
            yield block, before, tokens


def vit_tiny(patch: int = 16, residual: bool = True, **kwargs: Any) -> VisionTransformer:
    """ViT-Ti: 192 wide, 12 blocks, 3 heads, 5.5 M parameters."""
    return VisionTransformer(**(SIZES["tiny"] | {"patch": patch, "residual": residual} | kwargs))


def vit_small(patch: int = 16, residual: bool = True, **kwargs: Any) -> VisionTransformer:
    """ViT-S: 384 wide, 12 blocks, 6 heads, 22 M parameters."""
    return VisionTransformer(**(SIZES["small"] | {"patch": patch, "residual": residual} | kwargs))


def vit_base(patch: int = 16, residual: bool = True, **kwargs: Any) -> VisionTransformer:
    """ViT-B: 768 wide, 12 blocks, 12 heads, 86 M parameters."""
    return VisionTransformer(**(SIZES["base"] | {"patch": patch, "residual": residual} | kwargs))


def vit_large(patch: int = 16, residual: bool = True, **kwargs: Any) -> VisionTransformer:
    """ViT-L: 1,024 wide, 24 blocks, 16 heads, 303 M parameters."""
    return VisionTransformer(**(SIZES["large"] | {"patch": patch, "residual": residual} | kwargs))


def vit_huge(patch: int = 16, residual: bool = True, **kwargs: Any) -> VisionTransformer:
    """ViT-H: 1,280 wide, 32 blocks, 16 heads, 631 M parameters."""
    return VisionTransformer(**(SIZES["huge"] | {"patch": patch, "residual": residual} | kwargs))


def vit_giant(patch: int = 16, residual: bool = True, **kwargs: Any) -> VisionTransformer:
    """ViT-g: 1,408 wide, 40 blocks, 16 heads, MLP ratio 48 / 11, 1.0 G parameters (arXiv 2106.04560)."""
    return VisionTransformer(**(SIZES["giant"] | {"patch": patch, "residual": residual} | kwargs))
