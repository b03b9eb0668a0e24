"""Every setting of a pretraining run, and what it means."""

from dataclasses import dataclass, field
from typing import Any, Literal

from skipless.ssl.data.crops import Crops
from skipless.ssl.dino import Pool
from skipless.ssl.model.attention import Backend
from skipless.ssl.model.initialization import MlpInit
from skipless.ssl.monitor import MonitorSettings
from skipless.ssl.optim.optimizers import OptimizerSettings


@dataclass
class DataSettings:
    """Where the images are."""

    path: str
    """Folder of images (searched in all its subfolders; no labels needed), a zip archive of images, tar shards (their
    folder, the URL of what datasets/shard.py wrote, or a pattern as in data/{000000..000146}.tar), or hf:NAME:SPLIT for
    a data set of Hugging Face. Folders right below it are taken as classes by the monitor, never by training."""
    workers: int | None = None
    """Processes per training process that load and crop images; by default all cores shared out on a GPU machine, none
    on a CPU, where training needs the cores itself."""
    max_unreadable: float = 0.01
    """Share of unreadable images above which the run stops and names them; below, they are skipped and listed in
    unreadable.txt."""


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
    """With skip connections (true) or without (false)."""
    init: Literal["default", "paper-dino", "paper-supervised", "small"] | None = None
    """Initialization; by default `small` without skip connections and `default` (ViT's usual one) with them. `small` is
    for narrow models and small budgets, `paper-dino` is arXiv 2510.00345's for ViT-S on ImageNet."""
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
    Where it is not given: whitened with the initialization `small`, default with all others."""
    positions: Literal["default", "sines"] | None = None
    """Initialization of the positions: ViT's usual noise, next to nothing (default), or sines and cosines of row and
    column, of a size that counts beside whitened patches. Learned in both. Where it is not given: sines with `small`,
    default with all others."""
    pool: Pool = "mean"
    """What the DINO head reads: `mean` of the patch tokens, or the class token `cls` (DINO's). Without skip connections
    use mean: near-identity attention starves a class token, and the loss would stay at ln K."""
    registers: int = 0
    """Register tokens; 4 in DINOv2."""
    layer_scale: float | None = None
    """Initial scale of each branch (DINOv2: 1e-5). Residual models only."""
    drop_path: float = 0.0
    """Stochastic depth; DINO uses 0.1. Residual models only."""
    attention: Backend = "auto"
    """auto takes xformers on CUDA where it is installed, torch's SDPA elsewhere."""
    checkpoint_activations: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""


@dataclass
class DINOSettings:
    """Head, teacher and loss."""

    out_dim: int = 65536
    """Outputs of the head, K. 65,536 for ImageNet; 1,024 to 4,096 for some thousand images."""
    hidden_dim: int = 2048
    """Width of the head's hidden layers."""
    bottleneck_dim: int = 256
    """Width of the head before the prototypes."""
    norm_last_layer: bool = True
    """Prototypes of length 1: stable. false is what DINO used for ViT-S."""
    freeze_last_layer: float = 1.0
    """Epochs at the start in which the last layer of the head has learning rate 0 (DINO drops its gradient: the
    same, but that the optimizer's moments start later)."""
    momentum_teacher: float = 0.996
    """Momentum of the teacher at the start; it rises to 1 by half a cosine. Lower it (0.99) for short runs."""
    student_temp: float = 0.1
    """Temperature of the student's softmax."""
    teacher_temp: float = 0.04
    """Temperature of the teacher's softmax after its warm-up. Long runs raise it to 0.07."""
    warmup_teacher_temp: float = 0.04
    """Temperature of the teacher's softmax in the first epoch."""
    warmup_teacher_temp_epochs: int = 0
    """Epochs over which the teacher's temperature changes linearly."""
    balancing: Literal["center", "sinkhorn"] = "center"
    """How collapse is avoided: centring (DINO) or Sinkhorn-Knopp (DINOv2)."""
    center_momentum: float = 0.9
    """Momentum of the centre."""


@dataclass
class Settings:
    """Everything a run depends on."""

    data: DataSettings
    out: str
    """Folder of the run: settings, metrics, checkpoints, and the backbone at the end."""
    model: ModelSettings = field(default_factory=ModelSettings)
    crops: Crops = field(default_factory=Crops)
    dino: DINOSettings = field(default_factory=DINOSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    monitor: MonitorSettings = field(default_factory=MonitorSettings)
    epochs: int = 100
    """Passes over the images."""
    batch_size: int = 256
    """Images per optimizer step, over all processes and micro-batches. The learning rate scales with it."""
    accumulate: int = 1
    """Micro-batches per step: the same result with a fraction of the memory. Teacher and centre move once a step."""
    clip_grad: float = 3.0
    """Gradients whose norm over all parameters is larger are scaled down to it; 0 turns this off. (DINO clips each
    parameter's gradient by itself, which is weaker.)"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto is bf16 where it is fast: on GPUs from Ampere on, and on CPUs with AMX (Xeons since 2023), where it is
    the products of linear layers alone; fp32 elsewhere. Parameters are float32 in both."""
    compile: bool = False
    """Compile student and teacher (torch.compile), for GPUs: minutes at the start, fewer and larger kernels after.
    Attention is then torch's. (It has not run on a GPU yet.)"""
    shard: bool = False
    """Shard parameters, gradients, optimizer state and teacher over all processes (FSDP2), for models that crowd or do
    not fit one GPU, as ViT-g does; smaller ones are better off without. Under torchrun. The
    loss curve is the same, checkpoints are folders; docs/scaling.md says when it pays."""
    seed: int = 0
    """Of initialization, order of the images and crops."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    resume: bool = False
    """Continue from the last checkpoint in `out`, where there is one: bit by bit on a CPU."""
    save_every_epochs: int = 1
    """Epochs between two checkpoints; one is also written at the end and on SIGTERM or SIGUSR1."""
    keep: int = 2
    """Checkpoints kept; older ones are deleted."""
    log_every: int = 10
    """Steps between two lines of metrics. Between them the host does not wait for the GPU (but in soap's first
    step, for the eigenbases)."""
    wandb: bool = False
    """Log to Weights & Biases too (pip install wandb)."""


def initialization_of(model: ModelSettings) -> str:
    """Name of the initialization: "default" for ViT's usual one, or one of `PRESETS`."""
    return model.init or ("default" if model.residual else "small")


def embedding_of(model: ModelSettings) -> tuple[Literal["default", "whitened"], Literal["default", "sines"]]:
    """How patch embedding and positions start; where the settings do not say, as the initialization has it."""
    small = initialization_of(model) == "small"
    return model.patches or ("whitened" if small else "default"), model.positions or ("sines" if small else "default")


def changed_initialization(model: ModelSettings) -> dict[str, Any]:
    """What the settings change of their initialization, as arguments of `skipless_init_`."""
    changes = {name: value for name in ("alpha", "beta", "c", "mlp") if (value := getattr(model, name)) is not None}
    if model.mlp == "default":
        changes["mlp"] = None
    if model.depth_scale != 1:
        changes["depth_scale"] = model.depth_scale
    return changes | {name: False for name in ("value_output", "query_key") if not getattr(model, name)}
