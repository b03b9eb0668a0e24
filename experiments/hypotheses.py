"""What lets attention learn without skip connections? Small changes, each tried on both kinds of models in minutes.

    python experiments/hypotheses.py --data imagenette128 --teacher weights/vit_small_patch14_saliency.safetensors
    python experiments/hypotheses.py --data imagenette128 --teacher dinov2.pth --only base "3 free heads" --seeds 0 1 2

A trial is a short distillation: 12 blocks of 96 channels learn the patch tokens of a frozen teacher, from photographs
of 112 pixels, 32 a step, for an epoch. What counts is the loss on 512 photographs that were held out. A trial changes
one thing; most are departures from the paper, and none of them is a setting of the package. Each leaves a file in
RUNS, so what is done is not done again, and the table with its curves is written anew after each.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tables import plt
from torch import Tensor, nn

from skipless.common import cli
from skipless.common.files import write_result, write_text
from skipless.common.pixels import normalize
from skipless.common.progress import Progress
from skipless.common.provenance import provenance
from skipless.datasets.images import open_images
from skipless.ssl.data.squares import central_squares
from skipless.ssl.model.build import ModelSettings, build_backbone
from skipless.ssl.model.initialization import mirrored_matrices, query_key_matrices
from skipless.ssl.model.teacher import Teacher, TeacherSettings
from skipless.ssl.model.vit import Attention, Block, VisionTransformer
from skipless.ssl.objectives.distillation import DistillationSettings, Student
from skipless.ssl.optim.optimizers import OptimizerSettings, make_optimizer, set_rates
from skipless.ssl.optim.schedules import Schedule

SIZE, PATCH, DIM, DEPTH, HEADS, BATCH = 112, 14, 96, 12, 3, 32
HELD_OUT = 512


@dataclass
class Settings:
    """The command line."""

    data: Path
    """Folder with train/ and val/, each with images."""
    teacher: str
    """A Vision Transformer as the evaluations take it."""
    only: tuple[str, ...] = ()
    """Trials to run; by default all."""
    kinds: tuple[str, ...] = ("skipless", "residual")
    """Which of the two models."""
    seeds: tuple[int, ...] = (0,)
    """Of weights and of the order of images."""
    runs: Path = Path("runs/hypotheses")
    """What trials leave, and the teacher's features."""
    out: Path = Path("results/analysis/hypotheses")
    """OUT.json, OUT.md and OUT.png."""


# The changes ----------------------------------------------------------------------------------------------------------


class OpenAttention(Attention):
    """Attention with more value channels than the token has, and with a trained preference of each head for the token
    itself: logits + own_h on the diagonal."""

    def __init__(self, dim: int, heads: int, channels: int, own: Tensor | None = None):
        nn.Module.__init__(self)
        self.num_heads, inner = heads, heads * channels
        self.qkv, self.proj = nn.Linear(dim, 3 * inner), nn.Linear(inner, dim)
        for layer in (self.qkv, self.proj):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.own = None if own is None else nn.Parameter(own)

    def forward(self, x: Tensor, groups: Any, backend: Any, rotation: Any = None) -> Tensor:
        ((batch, length),) = groups
        q, k, v = (y.unflatten(0, (batch, length)).transpose(1, 2) for y in self.split(x))
        bias = None if self.own is None else self.own[:, None, None] * torch.eye(length)
        return self.proj(F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(0, 1).flatten(1))


class ShapedAttention(OpenAttention):
    """own v + mixed softmax(q k^T) v - even mean(v), three trained numbers a head (arXiv 2311.01906, equation 6): where
    all three are 1 and queries and keys near 0, the identity, though queries and keys have a gradient."""

    def __init__(self, dim: int, heads: int, channels: int, start: Sequence[float]):
        super().__init__(dim, heads, channels)
        self.shares = nn.Parameter(torch.tensor(start)[:, None].repeat(1, heads))

    def forward(self, x: Tensor, groups: Any, backend: Any, rotation: Any = None) -> Tensor:
        ((batch, length),) = groups
        q, k, v = (y.unflatten(0, (batch, length)).transpose(1, 2) for y in self.split(x))
        own, mixed, even = self.shares[:, :, None, None].unbind()
        out = own * v + mixed * F.scaled_dot_product_attention(q, k, v) - even * v.mean(2, keepdim=True)
        return self.proj(out.transpose(1, 2).flatten(0, 1).flatten(1))


def attentions(model: VisionTransformer) -> Iterator[tuple[Block, Attention]]:
    """The attention of every block."""
    for block in model.blocks:
        assert isinstance(block, Block)
        yield block, block.attn


@torch.no_grad()
def more_heads(model: VisionTransformer, free: int, strength: float = 1.0, diagonal: bool = False) -> None:
    """Add `free` heads of as many channels to every block, which begin with ViT's usual queries and keys (uniform
    attention) or as diagonal as the others, and with values and outputs that start `strength` times ViT's usual."""
    generator = torch.Generator().manual_seed(1)
    channels = DIM // HEADS
    for block, old in attentions(model):
        new = OpenAttention(DIM, HEADS + free, channels)
        inner = (HEADS + free) * channels
        for part in range(3):
            new.qkv.weight[part * inner : part * inner + DIM] = old.qkv.weight[part * DIM : (part + 1) * DIM]
            new.qkv.bias[part * inner : part * inner + DIM] = old.qkv.bias[part * DIM : (part + 1) * DIM]
        new.qkv.weight[2 * inner + DIM :] *= strength
        new.proj.weight[:, DIM:] *= strength
        new.proj.weight[:, :DIM], new.proj.bias[:] = old.proj.weight, old.proj.bias
        if diagonal:
            w_q, w_k = query_key_matrices(DIM, HEADS, 1.8, 4.0, generator)
            new.qkv.weight[DIM:inner], new.qkv.weight[inner + DIM : 2 * inner] = w_q.T, w_k.T
        block.attn = new


@torch.no_grad()
def own_preference(
    model: VisionTransformer, share: float | Sequence[float], usual: bool = True, trained: bool = True
) -> None:
    """The diagonal by a number of each head, trained or not, so that a token begins with `share` of its own attention
    (one share, or one a head); queries and keys begin as ViT's usual ones, or stay as they are."""
    shares = torch.tensor(share).expand(HEADS)
    own = (shares / (1 - shares) * (SIZE // PATCH) ** 2).log()
    for block, old in attentions(model):
        new = OpenAttention(DIM, HEADS, DIM // HEADS, own.clone())
        if not trained:
            new.own = nn.Parameter(own.clone(), requires_grad=False)
        new.proj.load_state_dict(old.proj.state_dict())
        start = 2 * DIM if usual else 0
        new.qkv.weight[start:], new.qkv.bias[start:] = old.qkv.weight[start:], old.qkv.bias[start:]
        block.attn = new


@torch.no_grad()
def shaped(model: VisionTransformer, own: float, mixed: float, even: float, trained: bool = True) -> None:
    """Shaped attention; queries and keys begin as ViT's usual ones."""
    for block, old in attentions(model):
        new = ShapedAttention(DIM, HEADS, DIM // HEADS, (own, mixed, even))
        new.shares.requires_grad_(trained)
        new.proj.load_state_dict(old.proj.state_dict())
        new.qkv.weight[2 * DIM :] = old.qkv.weight[2 * DIM :]
        block.attn = new


@torch.no_grad()
def betas_by_head(model: VisionTransformer, betas: Sequence[float]) -> None:
    """Queries and keys whose attention starts more or less diagonal, head by head."""
    generator = torch.Generator().manual_seed(1)
    channels = DIM // HEADS
    for _, attention in attentions(model):
        for head, beta in enumerate(betas):
            rows = slice(head * channels, (head + 1) * channels)
            w_q, w_k = query_key_matrices(DIM, HEADS, 1.8, beta, generator)
            attention.qkv.weight[:DIM][rows] = w_q.T[rows]
            attention.qkv.weight[DIM : 2 * DIM][rows] = w_k.T[rows]


def narrow_mlps(model: VisionTransformer, hidden: int, mirrored: bool) -> None:
    """MLPs of `hidden` channels, so that a block with more heads has no more weights than one without."""
    generator = torch.Generator().manual_seed(2)
    for block, _ in attentions(model):
        mlp = block.mlp
        mlp.fc1, mlp.fc2 = nn.Linear(DIM, hidden), nn.Linear(hidden, DIM)
        for layer in (mlp.fc1, mlp.fc2):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        if mirrored:
            first, second = mirrored_matrices(DIM, hidden, generator)
            with torch.no_grad():
                mlp.fc1.weight.copy_(first.T)
                mlp.fc2.weight.copy_(second.T)


class HalfResidual(Block):
    """A block with a skip connection around its attention, or around its MLP, alone."""

    around: str

    def forward(self, x: Tensor, groups: Any, backend: Any, rotation: Any = None) -> Tensor:
        mixed = self.attn(self.norm1(x), groups, backend, rotation)
        x = x + mixed if self.around == "attention" else mixed
        said = self.mlp(self.norm2(x))
        return x + said if self.around == "mlp" else said


@torch.no_grad()
def half_residual(model: VisionTransformer, around: str) -> None:
    """A skip connection around one half of each block, whose weights begin as ViT's usual ones."""
    for block, attention in attentions(model):
        block.__class__ = HalfResidual
        assert isinstance(block, HalfResidual)
        block.around = around
        for layer in (attention if around == "attention" else block.mlp).children():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)


def gradient(parameter: Tensor) -> Tensor:
    """Its gradient, to be changed."""
    assert parameter.grad is not None
    return parameter.grad


def freeze_first_heads(student: Student) -> None:
    """Keep the heads that begin diagonal as they began."""
    for _, attention in attentions(student.backbone):
        inner = attention.proj.in_features
        for part in range(3):
            gradient(attention.qkv.weight)[part * inner : part * inner + DIM] = 0
            gradient(attention.qkv.bias)[part * inner : part * inner + DIM] = 0
        gradient(attention.proj.weight)[:, :DIM] = 0


def freeze_values(student: Student) -> None:
    """Keep values and outputs as they began."""
    for _, attention in attentions(student.backbone):
        gradient(attention.qkv.weight)[2 * DIM :] = 0
        gradient(attention.proj.weight)[:] = 0


@torch.no_grad()
def keep_orthogonal(student: Student) -> None:
    """Put values and outputs back on the nearest multiple of an orthogonal matrix."""
    for _, attention in attentions(student.backbone):
        for weight in (attention.qkv.weight[2 * DIM :], attention.proj.weight):
            u, s, v_t = torch.linalg.svd(weight)
            weight.copy_(s.mean() * u @ v_t)


@dataclass(frozen=True)
class Trial:
    """What a trial changes."""

    build: Callable[[VisionTransformer], Any] = lambda model: None
    """Done to the network at its start."""
    after: Callable[[Student], Any] | None = None
    """Done after every step."""
    before: Callable[[Student], Any] | None = None
    """Done to gradients before every step."""
    model: tuple[tuple[str, Any], ...] = ()
    """Other settings of the network."""
    optimizer: tuple[tuple[str, Any], ...] = ()
    """Other settings of the optimizer; `times` multiplies the learning rate."""
    epochs: int = 1
    kinds: tuple[str, ...] = ("skipless", "residual")
    """Models it can be tried on."""
    what: str = ""
    """In words, for the table."""


SKIPLESS = ("skipless",)


def all_trials() -> dict[str, Trial]:
    """Every trial, by name."""
    return {
        "base": Trial(what="as configs/distill_cpu.yaml, both kinds"),
        "base, lr x 0.5": Trial(optimizer=(("times", 0.5),)),
        "base, lr x 2": Trial(optimizer=(("times", 2.0),)),
        "own preference 0.5": Trial(partial(own_preference, share=0.5)),
        "own preference 0.9": Trial(partial(own_preference, share=0.9)),
        "own preference 0.99": Trial(partial(own_preference, share=0.99)),
        "own preference beside beta": Trial(partial(own_preference, share=0.5, usual=False), kinds=SKIPLESS),
        "own preference 0.9, not trained": Trial(partial(own_preference, share=0.9, trained=False)),
        "own preference 0.99, 0.9, 0.5 by head": Trial(partial(own_preference, share=(0.99, 0.9, 0.5))),
        "own preference 0.9, lr x 0.5": Trial(partial(own_preference, share=0.9), optimizer=(("times", 0.5),)),
        "own preference 0.9, lr x 2": Trial(partial(own_preference, share=0.9), optimizer=(("times", 2.0),)),
        "own preference 0.9, SUO": Trial(partial(own_preference, share=0.9), model=(("mlp", "suo"),), kinds=SKIPLESS),
        "own preference 0.9, c = 1": Trial(partial(own_preference, share=0.9), model=(("c", 1.0),), kinds=SKIPLESS),
        "own preference 0.9, 2 epochs": Trial(partial(own_preference, share=0.9), epochs=2),
        "identity x 0.9 + attention x 0.1": Trial(partial(shaped, own=0.9, mixed=0.1, even=0.0)),
        "identity x 0.5 + attention x 0.5": Trial(partial(shaped, own=0.5, mixed=0.5, even=0.0)),
        "identity + attention": Trial(partial(shaped, own=1.0, mixed=1.0, even=0.0)),
        "identity + attention - uniform": Trial(partial(shaped, own=1.0, mixed=1.0, even=1.0)),
        "identity + attention - uniform, not trained": Trial(
            partial(shaped, own=1.0, mixed=1.0, even=1.0, trained=False)
        ),
        "identity + (attention - uniform) x 3": Trial(partial(shaped, own=1.0, mixed=3.0, even=3.0)),
        "identity + attention - uniform, values frozen": Trial(
            partial(shaped, own=1.0, mixed=1.0, even=1.0), before=freeze_values, kinds=SKIPLESS
        ),
        "own preference 0.9, values frozen": Trial(
            partial(own_preference, share=0.9), before=freeze_values, kinds=SKIPLESS
        ),
        "1 free head": Trial(partial(more_heads, free=1)),
        "3 free heads": Trial(partial(more_heads, free=3)),
        "3 free heads, x 3": Trial(partial(more_heads, free=3, strength=3.0)),
        "3 more diagonal heads": Trial(partial(more_heads, free=3, diagonal=True), kinds=SKIPLESS),
        "3 free heads, MLP of 2": Trial(free_heads_for_free),
        "beta by head 8, 4, 1": Trial(partial(betas_by_head, betas=(8.0, 4.0, 1.0)), kinds=SKIPLESS),
        "beta by head 8, 8, 0.3": Trial(partial(betas_by_head, betas=(8.0, 8.0, 0.3)), kinds=SKIPLESS),
        "later blocks mix more": Trial(model=(("depth_scale", 0.4),), kinds=SKIPLESS),
        "orthogonal values and outputs": Trial(after=keep_orthogonal, kinds=SKIPLESS),
        "skip around attention alone": Trial(partial(half_residual, around="attention"), kinds=SKIPLESS),
        "skip around MLPs alone": Trial(partial(half_residual, around="mlp"), kinds=SKIPLESS),
        "3 free heads, the others frozen": Trial(
            partial(more_heads, free=3), before=freeze_first_heads, kinds=SKIPLESS
        ),
        "2 epochs": Trial(epochs=2),
        "2 epochs, 3 free heads": Trial(partial(more_heads, free=3), epochs=2),
    }


def free_heads_for_free(model: VisionTransformer) -> None:
    """Three free heads, paid for by MLPs of half the width."""
    more_heads(model, 3)
    narrow_mlps(model, 2 * DIM, not model.architecture["residual"])


# A trial --------------------------------------------------------------------------------------------------------------


@dataclass
class Data:
    """Photographs, uint8 [N, 112, 112, 3], and the teacher's tokens of them, [N, 1 + 16 x 16 or fewer, D]."""

    squares: Tensor
    tokens: Tensor

    def batch(self, student: Student, rows: Tensor, flipped: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Normalized images [B, 3, 112, 112] and their targets."""
        squares = torch.where(flipped[:, None, None, None], self.squares[rows].flip(2), self.squares[rows])
        boxes = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0]).repeat(len(rows), 1)
        boxes[:, 4] = flipped
        return normalize(squares[None]), student.targets(self.tokens[rows], boxes, SIZE // PATCH)


def look(settings: Settings, split: str, count: int) -> Data:
    """Squares and features of a split, kept in a file of the runs' folder."""
    kept = settings.runs / f"{split}.npz"
    if not kept.exists():
        images = open_images(str(settings.data / split))
        teacher = Teacher(TeacherSettings(settings.teacher, 2 * SIZE), SIZE // PATCH)
        large = central_squares(images, min(count, len(images)), 2 * SIZE)
        parts = Progress(large.split(64), desc=f"teacher's features of {split}", unit_scale=64, unit="image")
        tokens = torch.cat([pooled(teacher(part)) for part in parts])
        squares = central_squares(images, min(count, len(images)), SIZE)
        settings.runs.mkdir(parents=True, exist_ok=True)
        np.savez(kept, squares=squares.numpy(), tokens=tokens.half().numpy())
    with np.load(kept) as arrays:
        return Data(torch.from_numpy(arrays["squares"]), torch.from_numpy(arrays["tokens"]))


def pooled(tokens: Tensor) -> Tensor:
    """Tokens [B, 1 + 4 N, D] of a grid twice as fine as the student's, patches averaged two by two."""
    side = math.isqrt(tokens.shape[1] - 1)
    grid = tokens[:, 1:].transpose(1, 2).unflatten(2, (side, side))
    return torch.cat([tokens[:, :1], F.avg_pool2d(grid, 2).flatten(2).transpose(1, 2)], dim=1)


def train(trial: Trial, kind: str, seed: int, train_data: Data, held_out: Data, images: Any) -> dict[str, Any]:
    """One trial; its curve, and the loss on what was held out."""
    changes = dict(trial.optimizer)
    lr = {"skipless": 1.6e-2, "residual": 3.2e-2}[kind] * changes.pop("times", 1.0)
    optimizer_settings = replace(
        OptimizerSettings(name="soap", lr=lr, warmup_epochs=0.1, weight_decay=0.05, weight_decay_end=0.05),
        betas=(0.8, 0.9), max_precondition_dim=512, **changes,
    )  # fmt: skip
    model = ModelSettings(
        dim=DIM, depth=DEPTH, heads=HEADS, patch=PATCH, residual=kind == "residual", patches="whitened",
        positions="sines", **dict(trial.model),
    )  # fmt: skip
    torch.manual_seed(seed)
    backbone = build_backbone(model, SIZE, seed, images)
    trial.build(backbone)
    student = Student(backbone, train_data.tokens.shape[2], DistillationSettings(), "mean")
    student.standardize(train_data.tokens[:: max(1, len(train_data.tokens) // 256)])
    optimizer = make_optimizer(student, optimizer_settings)
    schedule = Schedule(optimizer_settings, trial.epochs, BATCH, len(train_data.squares))
    rng = torch.Generator().manual_seed(seed)
    began, losses = time.perf_counter(), []
    for epoch in range(trial.epochs):
        order = torch.randperm(len(train_data.squares), generator=rng)
        for step, rows in enumerate(order.split(BATCH)[: schedule.steps_per_epoch]):
            now = schedule.at(epoch * schedule.steps_per_epoch + step)
            set_rates(optimizer, now.lr, now.weight_decay, freeze_last_layer=False)
            views, targets = train_data.batch(student, rows, torch.rand(len(rows), generator=rng) < 0.5)
            loss, _ = student.loss(student(views), targets)
            loss.backward()
            if trial.before:
                trial.before(student)
            nn.utils.clip_grad_norm_(student.parameters(), 3.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if trial.after:
                trial.after(student)
    return {
        "held_out": evaluate(student, held_out),
        "last_20": float(np.mean(losses[-20:])),
        "curve": [round(float(np.mean(part)), 4) for part in np.array_split(losses, len(losses) // 10)],
        "parameters": sum(p.numel() for p in backbone.parameters()),
        "seconds": round(time.perf_counter() - began, 1),
    }


@torch.inference_mode()
def evaluate(student: Student, data: Data) -> float:
    """The mean loss on photographs that were held out."""
    losses = []
    for rows in torch.arange(len(data.squares)).split(64):
        views, targets = data.batch(student, rows, torch.zeros(len(rows), dtype=torch.bool))
        losses.append(student.loss(student(views), targets)[0].item() * len(rows))
    return sum(losses) / len(data.squares)


# All of them ----------------------------------------------------------------------------------------------------------


def run(settings: Settings) -> None:
    """Run the trials that are not done yet, and write the table after each."""
    trials = all_trials()
    if unknown := [name for name in settings.only if name not in trials]:
        raise ValueError(f"--only: there is no trial {unknown[0]!r}; choose from {', '.join(map(repr, trials))}")
    if wrong := [kind for kind in settings.kinds if kind not in ("skipless", "residual")]:
        raise ValueError(f"--kinds: there is no kind {wrong[0]!r}; choose skipless and residual")
    train_data, held_out = look(settings, "train", 10**9), look(settings, "val", HELD_OUT)
    images = open_images(str(settings.data / "train"))
    for seed in settings.seeds:
        for name in settings.only or trials:
            for kind in (kind for kind in trials[name].kinds if kind in settings.kinds):
                file = settings.runs / f"{name.replace(' ', '_')}-{kind}-seed{seed}.json"
                if not file.exists():
                    done = train(trials[name], kind, seed, train_data, held_out, images)
                    row = {"trial": name, "kind": kind, "seed": seed, **done, **provenance("cpu")}
                    write_text(file, json.dumps(row))
                    print(f"{name}, {kind}, seed {seed}: {done['held_out']:.4f}", flush=True)
                collect(settings, trials)


def collect(settings: Settings, trials: dict[str, Trial]) -> None:
    """Write the result of all trials there are."""
    rows = [json.loads(path.read_text()) for path in sorted(settings.runs.glob("*-seed*.json"))]
    rows.sort(key=lambda row: (list(trials).index(row["trial"]), row["kind"], row["seed"]))
    result = {"task": "hypotheses", "dataset": settings.data.name, "seeds": list(settings.seeds), "details": rows}
    write_result(settings.out, {**result, **provenance("cpu")}, table(rows))
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    colors = dict(zip(dict.fromkeys(row["trial"] for row in rows), plt.get_cmap("tab20").colors, strict=False))
    for kind, ax in zip(("skipless", "residual"), axes, strict=True):
        for row in (row for row in rows if row["kind"] == kind and row["seed"] == rows[0]["seed"]):
            steps = 10 * np.arange(1, 1 + len(row["curve"]))
            ax.plot(steps, row["curve"], color=colors[row["trial"]], label=row["trial"], linewidth=1)
        ax.set(title=kind, xlabel="step", ylim=(0.25, 0.45))
    axes[0].set_ylabel("training loss")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    figure.savefig(settings.out.with_suffix(".png"), dpi=150)
    plt.close(figure)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line for each change, with the mean over its seeds."""
    lines = [
        f"Loss on {HELD_OUT} photographs held out, after short distillations (12 blocks of 96 channels, batches of 32,",
        "one epoch of imagenette unless said); mean and, in brackets, its seeds. Lower is better.",
        "",
        "| change | skipless | residual |",
        "|---|---:|---:|",
    ]
    for name in dict.fromkeys(row["trial"] for row in rows):
        cells = []
        for kind in ("skipless", "residual"):
            values = [row["held_out"] for row in rows if (row["trial"], row["kind"]) == (name, kind)]
            cells.append(f"{np.mean(values):.4f} ({len(values)})" if values else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


main = partial(cli.run, run, Settings, __doc__)

if __name__ == "__main__":
    main()
