"""Does the skipless initialization carry over to language? A small decoder-only model on Python's own standard library.

    python examples/language_model.py --steps 150 --out results/analysis/language_model    # about an hour on two cores

Nothing is downloaded: the text is the source code of the interpreter's standard library, byte by byte; every twentieth
file is held out. Residual and skipless models of one size learn to predict the next byte, with each initialization and
optimizer in --arms and --optimizers, and the table says how many bits a byte costs on the held-out files. A skipless
block is the vision model's: its attention sees the past alone, and nothing else differs.
"""

import math
import sysconfig
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from skipless.common import cli
from skipless.common.files import write_result
from skipless.common.provenance import provenance
from skipless.ssl.model.initialization import PRESETS, skipless_init_
from skipless.ssl.model.statistics import effective_rank, mean_share
from skipless.ssl.model.vit import Mlp
from skipless.ssl.optim.optimizers import OptimizerSettings, make_optimizer, set_rates
from skipless.ssl.optim.schedules import cosine

# Residual or not, and the skipless initialization's arguments (None: the usual one, normal with deviation 0.02).
ARMS: dict[str, tuple[bool, dict[str, Any] | None]] = {
    "residual": (True, None),
    "skipless default": (False, None),
    "skipless paper": (False, PRESETS["paper-dino"]),
    "skipless small": (False, PRESETS["small"]),
    "skipless small, beta 12": (False, PRESETS["small"] | {"beta": 12.0}),
}
BYTES = 256
Arm = Literal["residual", "skipless default", "skipless paper", "skipless small", "skipless small, beta 12"]
Optimizer = Literal["adamw", "soap"]


@dataclass
class Settings:
    """The language models. Raises ValueError for values that do not go together."""

    arms: tuple[Arm, ...] = get_args(Arm)
    """Models to train."""
    optimizers: tuple[Optimizer, ...] = ("adamw", "soap")
    """One run each."""
    dim: int = 128
    """Width."""
    depth: int = 8
    """Blocks."""
    heads: int = 4
    """Attention heads."""
    context: int = 128
    """Bytes that a prediction can look back on."""
    batch: int = 32
    """Pieces of text a step."""
    steps: int = 600
    """Optimizer steps."""
    bytes: int = 4_000_000
    """Text, at most."""
    lr_adamw: float = 1e-3
    """Peak learning rate of AdamW."""
    lr_soap: float = 3e-3
    """Peak learning rate of SOAP."""
    seed: int = 0
    """Of weights and batches."""
    out: Path = Path("runs/language_model")
    """Result, .json and .md."""

    def __post_init__(self) -> None:
        for name in ("dim", "depth", "heads", "context", "batch", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}: it must be 1 or more")
        for name in ("lr_adamw", "lr_soap"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be positive")
        if self.seed < 0:
            raise ValueError(f"--seed is {self.seed}: it must be 0 or more")
        if self.dim % self.heads:
            raise ValueError(f"--dim {self.dim} is not divisible by --heads {self.heads}")


class CausalAttention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, residual: bool):
        super().__init__()
        self.residual = residual
        self.norm1, self.attn = nn.LayerNorm(dim), CausalAttention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim), Mlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        if not self.residual:
            return self.mlp(self.norm2(self.attn(self.norm1(x))))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class LanguageModel(nn.Module):
    """Predicts the next byte from those before it."""

    def __init__(self, dim: int, depth: int, heads: int, context: int, residual: bool):
        super().__init__()
        self.embed = nn.Embedding(BYTES, dim)
        self.positions = nn.Parameter(torch.zeros(context, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, residual) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, BYTES)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.trunc_normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def tokens(self, text: Tensor) -> Tensor:
        """Bytes [B, N] -> what the last block makes of them, [B, N, D]."""
        x = self.embed(text) + self.positions[: text.shape[1]]
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, text: Tensor) -> Tensor:
        """Bytes [B, N] -> logits [B, N, 256] of the bytes that follow."""
        return self.head(self.norm(self.tokens(text)))


def standard_library(limit: int) -> tuple[Tensor, Tensor]:
    """Source code for training and for validation, uint8, `limit` bytes together at most."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in root.rglob("*.py") if not {"site-packages", "test", "tests"} & set(path.parts))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for number, path in enumerate(files):
        parts[number % 20 == 19].append(path.read_bytes())
    train, val = (torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8) for part in parts)
    return train[: limit * 19 // 20], val[: min(limit // 20, 65536)]


@torch.no_grad()
def bits_per_byte(model: nn.Module, text: Tensor, context: int) -> float:
    """Mean cost of a byte on a text that is cut into pieces of `context`."""
    pieces = text[: (len(text) - 1) // context * context + 1].long()
    inputs, targets = pieces[:-1].view(-1, context), pieces[1:].view(-1, context)
    losses = [
        F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum").item()
        for x, y in zip(inputs.split(64), targets.split(64), strict=True)
    ]
    return sum(losses) / targets.numel() / math.log(2)


@torch.no_grad()
def last_block(model: LanguageModel, text: Tensor, context: int) -> dict[str, float]:
    """Mean share and effective rank of the last block's tokens (see skipless.ssl.model.statistics)."""
    tokens = model.tokens(text[: 32 * context].long().view(32, context))
    return {"mean_share": float(mean_share(tokens).mean()), "effective_rank": float(effective_rank(tokens).mean())}


def train_arm(arm: Arm, optimizer_name: Optimizer, train: Tensor, val: Tensor, settings: Settings) -> dict[str, Any]:
    """Train one model and measure it before, on the way and after."""
    residual, initialization = ARMS[arm]
    torch.manual_seed(settings.seed)
    model = LanguageModel(settings.dim, settings.depth, settings.heads, settings.context, residual)
    if initialization is not None:
        skipless_init_(model, **initialization, seed=settings.seed)
    peak = {"adamw": settings.lr_adamw, "soap": settings.lr_soap}[optimizer_name]
    optimizer = make_optimizer(model, OptimizerSettings(name=optimizer_name, lr=peak, max_precondition_dim=1024))
    rng = np.random.default_rng(settings.seed)
    began = time.perf_counter()
    start = {"bits_per_byte": bits_per_byte(model, val, settings.context), **last_block(model, val, settings.context)}
    curve = []
    warmup = settings.steps // 20
    with tqdm(range(1, settings.steps + 1), desc=f"{arm}, {optimizer_name}", unit="step") as progress:
        for step in progress:
            first = torch.from_numpy(rng.integers(0, len(train) - settings.context - 1, settings.batch))
            pieces = train[first[:, None] + torch.arange(settings.context + 1)].long()
            loss = F.cross_entropy(model(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            set_rates(optimizer, cosine(step - 1, settings.steps, peak, 0.0, warmup), 0.04, False)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step % max(settings.steps // 8, 1) == 0 or step == settings.steps:
                curve.append({"step": step, "bits_per_byte": bits_per_byte(model, val, settings.context)})
                progress.set_postfix(bits=f"{curve[-1]['bits_per_byte']:.3f}")
    return {
        "arm": arm,
        "optimizer": optimizer_name,
        "lr": peak,
        "start": start,
        "end": {**curve[-1], **last_block(model, val, settings.context)},
        "curve": curve,
        "seconds": round(time.perf_counter() - began, 1),
    }


def table(arms: list[dict[str, Any]]) -> str:
    """Markdown: a line for each arm."""
    lines = [
        "| model | optimizer | bits a byte | at the start | mean share, start -> end | effective rank, start -> end |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for a in arms:
        start, end = a["start"], a["end"]
        lines.append(
            f"| {a['arm']} | {a['optimizer']} | {end['bits_per_byte']:.3f} | {start['bits_per_byte']:.2f} | "
            f"{start['mean_share']:.2f} -> {end['mean_share']:.2f} | "
            f"{start['effective_rank']:.1f} -> {end['effective_rank']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def compare(settings: Settings) -> None:
    """Train all arms with all optimizers, and write the table after every one."""
    train, val = standard_library(settings.bytes)
    if len(val) < 33 * settings.context:
        raise ValueError(f"--bytes {settings.bytes} leaves too little text to validate on: give more")
    print(f"{len(train):,} bytes to train on, {len(val):,} to validate; a byte of them costs 8 bits uncompressed")
    began = time.perf_counter()
    arms: list[dict[str, Any]] = []
    for optimizer in settings.optimizers:
        for arm in settings.arms:
            arms.append(train_arm(arm, optimizer, train, val, settings))
            result = {
                "task": "language model",
                "protocol": "stdlib-bytes",
                "metric": "bits per byte",
                "arms": arms,
                "settings": {name: value for name, value in asdict(settings).items() if name != "out"},
                "seed": settings.seed,
                "seconds": round(time.perf_counter() - began, 1),
                **provenance("cpu"),
            }
            # After every arm, so that an interruption costs one arm.
            write_result(settings.out, result, table(arms))
    print("\n" + table(arms))


main = partial(cli.run, compare, Settings, __doc__)

if __name__ == "__main__":
    main()
