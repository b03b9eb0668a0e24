"""A Vision Transformer, with skip connections or without (arXiv 2510.00345), in plain PyTorch.

This file needs torch and safetensors, nothing else, and lies beside the weights that it reads:

    from modeling_skipless import load

    model = load("FOLDER")
    cls, patches = model(images)  # normalized [B, 3, H, W] -> [B, D] and [B, h, w, D]

Hugging Face's AutoModel.from_pretrained("FOLDER", trust_remote_code=True) gives the same model, as SkiplessModel. With
the package huggingface_hub, load("FOLDER").push_to_hub("you/name") publishes the folder, and
SkiplessViT.from_pretrained("you/name") fetches it.
"""

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

try:
    from huggingface_hub import PyTorchModelHubMixin as HubMixin
except ImportError:  # then without save_pretrained, from_pretrained and push_to_hub

    class HubMixin:  # type: ignore[no-redef]
        pass


CONFIG: dict[str, Any] = {
    "model_type": "skipless",
    "architectures": ["SkiplessModel"],
    "auto_map": {
        "AutoConfig": "modeling_skipless.SkiplessConfig",
        "AutoModel": "modeling_skipless.SkiplessModel",
    },
}
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


class Block(nn.Module):
    """Attention and MLP, each added to its input (residual) or put in its place (skipless)."""

    def __init__(self, a: dict[str, Any]):
        super().__init__()
        dim, hidden, eps = a["dim"], round(a["dim"] * a["mlp_ratio"]), a.get("norm_eps", 1e-6)
        self.residual, self.heads, self.shaped = a["residual"], a["heads"], a.get("shaped", False)
        self.act = ACTIVATIONS[a.get("activation", "gelu")]
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        if a.get("swiglu"):
            self.mlp = nn.ModuleDict({"w12": nn.Linear(dim, 2 * hidden), "w3": nn.Linear(hidden, dim)})
        else:
            self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})
        self.scaled = a["layer_scale"] is not None
        if self.scaled:
            self.ls1, self.ls2 = (nn.ParameterDict({"gamma": nn.Parameter(torch.ones(dim))}) for _ in range(2))

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        q, k, v = self.attn["qkv"](self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        gathered = F.scaled_dot_product_attention(q, k, v)
        if self.shaped:  # maps of I + softmax - 1 / T
            gathered = gathered + v - v.mean(2, keepdim=True)
        branch = self.attn["proj"](gathered.transpose(1, 2).flatten(2))
        branch = branch * self.ls1["gamma"] if self.scaled else branch
        x = x + branch if self.residual else branch
        y = self.norm2(x)
        if "w12" in self.mlp:
            gate, value = self.mlp["w12"](y).chunk(2, dim=-1)
            branch = self.mlp["w3"](F.silu(gate) * value)
        else:
            branch = self.mlp["fc2"](self.act(self.mlp["fc1"](y)))
        branch = branch * self.ls2["gamma"] if self.scaled else branch
        return x + branch if self.residual else branch


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Queries or keys [B, heads, T, d_h], turned by cosines and sines [T, d_h]."""
    first, second = x.chunk(2, dim=-1)
    return x * rotation[0].to(x.dtype) + torch.cat([-second, first], dim=-1) * rotation[1].to(x.dtype)


def bicubic(centers: Tensor, scale: Tensor, n: int, antialias: bool) -> Tensor:
    """Weights [size, n] of n samples for values at `centers`, as F.interpolate has them: a product with these can be
    exported for any size."""
    edge = 0 if antialias else 2  # beyond an edge its sample is repeated; antialiased, what is there has no weight
    places = torch.arange(-edge, n + edge, device=centers.device)
    x = (places + 0.5 - centers[:, None]).abs() / (scale.clamp(min=1) if antialias else 1)
    a = -0.5 if antialias else -0.75
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    weights = torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))
    weights = weights @ F.one_hot(places.clamp(0, n - 1), n).float()
    return weights / weights.sum(1, keepdim=True)


class SkiplessViT(nn.Module, HubMixin):
    """A pre-norm Vision Transformer as the `architecture` in config.json describes it; `pool` is what its head read in
    training: cls, or mean of the patches."""

    folder: Path | None = None  # that it was loaded from

    def __init__(self, architecture: dict[str, Any], pool: str | None = None):
        super().__init__()
        a = self.architecture = architecture
        self.pool = pool
        dim, self.patch, self.registers = a["dim"], a["patch"], a["registers"]
        self.class_token, self.rope_base = a.get("class_token", True), a.get("rope_base")
        eps = a.get("norm_eps", 1e-6)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, self.patch, self.patch)})
        if self.class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        if self.registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, self.registers, dim))
        if self.rope_base is None:
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (a["image_size"] // self.patch) ** 2, dim))
        else:
            self.rope_embed = nn.Module()
            self.rope_embed.register_buffer("periods", self.rope_base ** torch.arange(0, 1, 4 * a["heads"] / dim))
        self.norm_pre = nn.LayerNorm(dim, eps=eps) if a.get("pre_norm") else nn.Identity()
        self.blocks = nn.ModuleList(Block(a) for _ in range(a["depth"]))
        self.norm = nn.LayerNorm(dim, eps=eps)

    def positions(self, h: int, w: int) -> Tensor:
        """Position embeddings [h * w, D], bicubically interpolated where the grid is another than in training."""
        grid, a = self.pos_embed[0, 1:].float(), self.architecture
        n = math.isqrt(grid.shape[0])
        centers = [torch.arange(size, device=grid.device) + 0.5 for size in (h, w)]
        native = (centers[0][-1] + 0.5 == n) & (centers[1][-1] + 0.5 == n)
        scales = [torch.where(native, 1.0, n / (c[-1] + 0.5 + a["position_offset"])) for c in centers]
        rows, columns = (bicubic(s * c, s, n, a["position_antialias"]) for s, c in zip(scales, centers, strict=True))
        grid = rows @ (columns @ grid.unflatten(0, (n, n))).flatten(1)  # columns first, within each row
        return grid.unflatten(1, (w, -1)).flatten(0, 1).to(self.pos_embed.dtype)

    def rotation(self, h: int, w: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, d_h] of rotary positions; class token and registers are not turned."""
        periods = self.rope_embed.get_buffer("periods")
        rows, columns = (2 * (torch.arange(n, device=periods.device) + 0.5) / n - 1 for n in (h, w))
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)
        angles = (2 * math.pi * grid[:, :, None] / periods).flatten(1).tile(2)
        angles = F.pad(angles, (0, 0, int(self.class_token) + self.registers, 0))
        return angles.cos(), angles.sin()

    def tokens(self, images: Tensor) -> Tensor:
        """Normalized [B, 3, H, W] -> [B, T, D] after the final norm: class token, registers, patches, rows first."""
        b, _, height, width = images.shape
        if height % self.patch or width % self.patch:
            raise ValueError(f"images of {height} x {width} pixels cannot be cut into patches of {self.patch}")
        h, w = height // self.patch, width // self.patch
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        rotation = None
        if self.rope_base is None:
            x = x + self.positions(h, w)
        else:
            rotation = self.rotation(h, w)
        if self.registers:
            x = torch.cat([self.register_tokens.expand(b, -1, -1), x], dim=1)
        if self.class_token:
            cls = self.cls_token if self.rope_base is not None else self.cls_token + self.pos_embed[:, :1]
            x = torch.cat([cls.expand(b, -1, -1), x], dim=1)
        x = self.norm_pre(x)
        for block in self.blocks:
            x = block(x, rotation)
        return self.norm(x)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalized [B, 3, H, W] -> class token [B, D] (the mean of the patches where there is none) and patches
        [B, h, w, D] after the final norm."""
        tokens = self.tokens(images)
        patches = tokens[:, int(self.class_token) + self.registers :]
        cls = tokens[:, 0] if self.class_token else patches.mean(1)
        return cls, patches.unflatten(1, (images.shape[2] // self.patch, images.shape[3] // self.patch))

    def _save_pretrained(self, save_directory: Path) -> None:
        """What save_pretrained and push_to_hub write: this file, weights, and what lies beside them."""
        config = {**CONFIG, "architecture": self.architecture, "pool": self.pool}
        (save_directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        metadata = {"format": "pt", "architecture": json.dumps(self.architecture)}
        save_file(tensors, save_directory / "model.safetensors", metadata)
        beside = [self.folder / name for name in ("README.md", "preprocessor_config.json")] if self.folder else []
        for file in (Path(__file__), *beside):
            if file.is_file() and not (save_directory / file.name).exists():
                shutil.copyfile(file, save_directory / file.name)


def load(folder: str | Path = Path(__file__).parent) -> SkiplessViT:
    """The model in a folder, in evaluation mode, on the CPU."""
    config = json.loads(Path(folder, "config.json").read_text())
    model = SkiplessViT(config["architecture"], config.get("pool"))
    model.folder = Path(folder)
    model.load_state_dict(load_file(Path(folder, "model.safetensors")))
    return model.eval()


if sys.modules.get("transformers"):  # as when AutoModel reads this file; importing it takes seconds
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    class SkiplessConfig(PretrainedConfig):
        """See SkiplessViT."""

        model_type = "skipless"

        def __init__(self, architecture: dict[str, Any] | None = None, pool: str | None = None, **more: Any):
            self.architecture, self.pool = architecture, pool
            super().__init__(**more)

    class SkiplessModel(PreTrainedModel):
        """last_hidden_state is `SkiplessViT.tokens`, pooler_output the vector that the head read in training."""

        config_class = SkiplessConfig
        base_model_prefix = "vit"
        main_input_name = "pixel_values"

        def __init__(self, config: Any):
            super().__init__(config)
            self.vit = SkiplessViT(config.architecture)
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            """Nothing: all weights come from the file."""

        def forward(self, pixel_values: Tensor, **unused: Any) -> BaseModelOutputWithPooling:
            """Normalized [B, 3, H, W] -> tokens [B, T, D] and the pooled [B, D]."""
            tokens = self.vit.tokens(pixel_values)
            first = int(self.vit.class_token) + self.vit.registers
            mean = self.config.pool == "mean" or not self.vit.class_token
            pooled = tokens[:, first:].mean(1) if mean else tokens[:, 0]
            return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=pooled)
