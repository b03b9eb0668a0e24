"""Memory and communication of large runs, computed: which model needs how many GPUs, and by which parallelism.

    python benchmarks/scaling.py --out results/speed/scaling

NOTHING HERE IS MEASURED. Parameters and FLOPs are counted on the models themselves (on the meta device); all else
follows from them and from the assumptions below, which the result repeats. A step is one of DINO's: 2 views of 224
pixels and 8 of 96, a head with 65,536 prototypes, bf16, parameters in float32. Sizes in GB of 1e9 bytes.

Memory of a GPU: what training keeps (parameters, gradients, the optimizer's state, the teacher), what it gathers for a
while, and the activations that wait for the backward pass. Workspaces and fragmentation are not in it: a tenth of the
GPU is left for them.

Communication is what each GPU sends, in rings. A ring of several nodes passes through the eight GPUs of each, and eight
rings use a node's eight network cards at once. Latency is left out, which at hundreds of GPUs it is not in practice.
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measuring import markdown, publish

from skipless.common import cli
from skipless.ssl.dino import DINOHead, DINOModel
from skipless.ssl.model.vit import SIZES, VisionTransformer
from skipless.ssl.optim.sharded import owners_of

MODELS = {"ViT-S/16": "small", "ViT-B/16": "base", "ViT-L/16": "large", "ViT-g/16": "giant"}
GPUS = (8, 64, 512)
ASSUMED: dict[str, float] = {
    "images_per_step": 2048,
    "prototypes": 65536,
    "gpu_gb": 80,
    "gpu_share_used": 0.9,
    "peak_flops": 989e12,  # H100, dense bf16, data sheet
    "utilisation": 0.4,
    "gpus_per_node": 8,
    "nvlink_gb_per_second": 450,
    "network_gb_per_second_and_gpu": 50,
    "soap_longest_side": 10000,  # the default of optimizer.max_precondition_dim
}
GB = 1e9


class Model(NamedTuple):
    """What a model brings with it. Bytes, unless said otherwise."""

    backbone: int  # parameters
    head: int  # parameters
    blocks: int  # parameters of all blocks
    depth: int  # blocks
    soap: int  # state of SOAP
    sharded_soap: dict[int, dict[str, int]]  # by the number of GPUs, see `sharded_soap`
    activations: float  # kept for the backward pass, for one image
    checkpointed: float  # the same with model.checkpoint_activations
    flops: float  # of teacher and student for one image, floating-point operations
    forward: float  # of the student's forward pass alone: what checkpointing repeats


def count(size: str) -> Model:
    """Count a model of `SIZES` with DINO's head."""
    with torch.device("meta"):
        backbone = VisionTransformer(**SIZES[size], residual=False)
        model = DINOModel(backbone, DINOHead(backbone.dim, int(ASSUMED["prototypes"])), "mean")
    tokens = 2 * (1 + 14**2) + 8 * (1 + 6**2)
    # Under autocast a block keeps, in bytes a token: both norms' inputs in float32 (8 D), the inputs of its four linear
    # layers in bf16 (2 D + 2 D + 2 D + 2 r D), queries, keys and values (6 D), and GELU's input (2 r D), where r is the
    # MLP's ratio.
    per_block = tokens * backbone.dim * (20 + 4 * SIZES[size].get("mlp_ratio", 4.0))
    logits = 4 * (2 + 8) * ASSUMED["prototypes"]  # and their gradient, both in bf16
    big, small = backbone.flops(224, 224), backbone.flops(96, 96)
    return Model(
        backbone=sum(p.numel() for p in backbone.parameters()),
        head=sum(p.numel() for p in model.head.parameters()),
        blocks=sum(p.numel() for p in backbone.blocks.parameters()),
        depth=backbone.depth,
        soap=sum(soap_state(tuple(p.shape)) for p in model.parameters()),
        sharded_soap={gpus: sharded_soap([tuple(p.shape) for p in model.parameters()], gpus) for gpus in GPUS},
        activations=per_block * backbone.depth + logits,
        checkpointed=per_block + 4 * tokens * backbone.dim * backbone.depth + logits,
        flops=2 * big + 3 * (2 * big + 8 * small),
        forward=2 * big + 8 * small,
    )


def soap_state(shape: tuple[int, ...]) -> int:
    """Bytes of SOAP's state for one parameter: two moments, and for each side of a matrix, unless it is too long, the
    average of the gradient's products and their eigenvectors."""
    moments = 8 * torch.Size(shape).numel()
    sides = [side for side in shape if side <= ASSUMED["soap_longest_side"]] if len(shape) > 1 else []
    return moments + sum(2 * 4 * side**2 for side in sides)


def sharded_soap(shapes: list[tuple[int, ...]], gpus: int) -> dict[str, int]:
    """What SOAP adds when every matrix has an owner and all else is divided (ssl/optim/sharded.py), on the GPU that
    has most of it: bytes of state; bytes that exist during a step alone, as matrices and gradients are whole with their
    owner, and so are the messages they came in; bytes sent, which are a GPU's parts of both, and what becomes of the
    matrices. And how many GPUs own none."""
    matrices = [shape for shape in shapes if len(shape) > 1]
    state, numbers = [0] * gpus, [0] * gpus
    for shape, owner in zip(matrices, owners_of(matrices, gpus, ASSUMED["soap_longest_side"]), strict=True):
        state[owner] += soap_state(shape)
        numbers[owner] += math.prod(shape)
    return {
        "state": max(state) + sum(soap_state(shape) for shape in shapes if len(shape) == 1) // gpus,
        "during_a_step": 16 * max(numbers),
        "sent": 4 * (gpus - 1) * (2 * sum(numbers) // gpus + max(numbers)) // gpus,
        "gpus_without_a_matrix": numbers.count(0),
    }


def memory_ddp(model: Model, soap: bool = False) -> float:
    """Bytes on each GPU without activations: 4 a parameter for parameters, gradients and the teacher each, the state of
    the optimizer (8 with AdamW), and 2 for autocast's bf16 copies."""
    parameters = model.backbone + model.head
    return (12 + 2) * parameters + (model.soap if soap else 8 * parameters)


def memory_fsdp(model: Model, gpus: int, accumulate: int, soap: bool = False) -> float:
    """Bytes on each GPU without activations: 12 a parameter and the state of the optimizer (8 with AdamW) over all
    GPUs, and what is gathered for a while.

    That is two blocks in bf16 (the one that runs, the next one), a block's gradient in bf16 and, to be reduced, in
    float32, and of what is no block parameters, gradients and what is reduced, in float32. Micro-batches before the
    last leave whole gradients in float32 on each GPU.
    """
    parameters = model.backbone + model.head
    block, rest = model.blocks / model.depth, parameters - model.blocks
    held = 4 * parameters if accumulate > 1 else 0
    state = model.sharded_soap[gpus]["state"] if soap else 8 * parameters / gpus
    return 12 * parameters / gpus + state + (2 * 2 + 2 + 4) * block + 12 * rest + held


def micro_batches(model: Model, gpus: int, fsdp: bool, checkpointed: bool) -> tuple[int, float] | None:
    """The fewest micro-batches (a power of two) with which a step fits, and the bytes it then takes on each GPU; None
    where not even one image at a time does."""
    images = int(ASSUMED["images_per_step"]) // gpus
    accumulate = 1
    while accumulate <= images:
        activations = images // accumulate * (model.checkpointed if checkpointed else model.activations)
        total = activations + (memory_fsdp(model, gpus, accumulate) if fsdp else memory_ddp(model))
        if total <= ASSUMED["gpu_gb"] * ASSUMED["gpu_share_used"] * GB:
            return accumulate, total
        accumulate *= 2
    return None


def sent_ddp(model: Model, gpus: int) -> float:
    """Bytes each GPU sends in a step: gradients in float32, once around the ring to add them up and once to hand out
    the sum."""
    return 2 * (gpus - 1) / gpus * 4 * (model.backbone + model.head)


def sent_fsdp(model: Model, gpus: int, accumulate: int) -> float:
    """Bytes each GPU sends in a step: for each micro-batch the blocks in bf16, for the teacher, the student's forward
    and its backward pass, and the rest in float32, for teacher and student; at the end gradients in float32."""
    parameters = model.backbone + model.head
    gathered = 3 * 2 * model.blocks + 2 * 4 * (parameters - model.blocks)
    return (gpus - 1) / gpus * (accumulate * gathered + 4 * parameters)


def seconds(sent: float, gpus: int) -> float:
    """Time to send that much, at the slower of NVLink and, with several nodes, a node's network cards together."""
    inside = ASSUMED["nvlink_gb_per_second"]
    between = ASSUMED["network_gb_per_second_and_gpu"] * ASSUMED["gpus_per_node"]
    return sent / (min(inside, between) if gpus > ASSUMED["gpus_per_node"] else inside) / GB


def compute() -> dict[str, Any]:
    """All figures, by model and number of GPUs."""
    result: dict[str, Any] = {"assumed": ASSUMED, "models": {}}
    for name, size in MODELS.items():
        model = count(size)
        row: dict[str, Any] = {"counted": model._asdict(), "steps": {}}
        row["state_bytes"] = {"ddp_adamw": memory_ddp(model), "ddp_soap": memory_ddp(model, soap=True)} | {
            f"fsdp_{gpus}{'_soap' if soap else ''}": memory_fsdp(model, gpus, accumulate=1, soap=soap)
            for gpus in GPUS
            for soap in (False, True)
        }
        for gpus in GPUS:
            images = ASSUMED["images_per_step"] / gpus
            speed = ASSUMED["peak_flops"] * ASSUMED["utilisation"]
            step: dict[str, Any] = {"images_per_gpu": images, "compute_seconds": images * model.flops / speed}
            step["checkpointing_seconds"] = images * model.forward / speed
            for kind in ("ddp", "fsdp"):
                fits = micro_batches(model, gpus, kind == "fsdp", checkpointed=False)
                checkpointed = micro_batches(model, gpus, kind == "fsdp", checkpointed=True)
                accumulate = fits[0] if fits else 1
                sent = sent_fsdp(model, gpus, accumulate) if kind == "fsdp" else sent_ddp(model, gpus)
                step[kind] = {
                    "accumulate": fits and fits[0],
                    "memory_bytes": fits and fits[1],
                    "accumulate_checkpointed": checkpointed and checkpointed[0],
                    "sent_bytes": sent,
                    "sent_seconds": seconds(sent, gpus),
                }
            row["steps"][str(gpus)] = step
        result["models"][name] = row
    return result


def memory_table(models: dict[str, Any]) -> list[str]:
    """GB on each GPU by model, without activations, and activations of an image."""
    head = ["model", "parameters: backbone, head (M)", "DDP, AdamW", "DDP, SOAP"]
    head += [f"FSDP2, {gpus} GPUs: AdamW, SOAP" for gpus in GPUS] + ["activations of an image", "with checkpointing"]
    rows = []
    for name, row in models.items():
        counted, state = row["counted"], row["state_bytes"]
        cells = [name, f"{counted['backbone'] / 1e6:.0f}, {counted['head'] / 1e6:.0f}"]
        cells += [f"{state[kind] / GB:.1f}" for kind in ("ddp_adamw", "ddp_soap")]
        cells += [f"{state[f'fsdp_{gpus}'] / GB:.1f}, {state[f'fsdp_{gpus}_soap'] / GB:.1f}" for gpus in GPUS]
        cells += [f"{counted[kind] / GB:.2f}" for kind in ("activations", "checkpointed")]
        rows.append(dict(zip(head, cells, strict=True)))
    return markdown(rows)


def step_table(models: dict[str, Any]) -> list[str]:
    """Computing and sending of a step, by model and number of GPUs."""
    rows = []
    for name, model in models.items():
        for gpus, step in model["steps"].items():
            row = {"model": name, "GPUs": gpus, "images a GPU": f"{step['images_per_gpu']:.0f}"}
            row["computing, ms"] = f"{1000 * step['compute_seconds']:,.1f}"
            for kind, sent in (("DDP", step["ddp"]), ("FSDP2", step["fsdp"])):
                row[f"{kind}: micro-batches"] = str(sent["accumulate"] or "does not fit")
                row[f"{kind}: GB sent"] = f"{sent['sent_bytes'] / GB:.1f}"
                row[f"{kind}: ms"] = f"{1000 * sent['sent_seconds']:.1f}"
            rows.append(row)
    return markdown(rows)


@dataclass
class Settings:
    """Memory and communication, computed."""

    out: Path = Path("results/speed/scaling")
    """Result, without the ending."""


def write(settings: Settings) -> None:
    """Compute, and publish."""
    result = {"task": "scaling", "measured": False, **compute()}
    lines = [
        "# Memory and communication of large runs: computed, not measured",
        "",
        "Written by `python benchmarks/scaling.py`, whose head states what is counted. GB of 1e9 bytes.",
        "",
        "GB on each GPU without activations, and activations of one image (ten crops):",
        "",
        *memory_table(result["models"]),
        "",
        f"A step of {ASSUMED['images_per_step']:,} images with AdamW, without checkpointing, on GPUs of "
        f"{ASSUMED['gpu_gb']} GB that reach {100 * ASSUMED['utilisation']:.0f} % of {ASSUMED['peak_flops'] / 1e12:.0f} "
        f"TFLOP/s, an assumption; {ASSUMED['nvlink_gb_per_second']} GB/s a GPU in a node and "
        f"{ASSUMED['network_gb_per_second_and_gpu']} GB/s a GPU between nodes. Micro-batches are the fewest with which "
        "it fits; sending is without overlap and without latency:",
        "",
        *step_table(result["models"]),
    ]
    publish(settings.out, result, lines, "cpu")


main = partial(cli.run, write, Settings, __doc__)

if __name__ == "__main__":
    main()
