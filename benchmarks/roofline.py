"""What a training step costs a GPU at least, computed from the shapes of its operations, by kind of operation.

    python benchmarks/roofline.py --sizes small --out results/speed/roofline_small
    python benchmarks/roofline.py --sizes base --out results/speed/roofline_base

It needs no fast GPU, only one on which torch runs: tests/nullgpu/build.py makes one that does nothing. Nothing is
timed. Each operation of a step takes the longest of a launch, the bytes of its tensors at BANDWIDTH, and its
floating-point operations (torch's own counting; 8/3 n^3 for QR) at PEAK: assumed parts of an H100's data sheet. That
operations share a cache is left out, and so is that QR is bound by latency: the truth may lie on either side.

The steps are those of the recipe for ViT-S/16 with 128 images and ViT-B/16 with 64, skipless, bf16, torch's own
attention; with AdamW, and with SOAP as the mean of one period. Each eager with weights cast in every call, by autocast
alone ("before"), eager with copies made once a step ("after"), and compiled, as ssl/pretrain.py has it by default. A
kernel that the compiler made reads or writes each of its tensors once, and does both where it changes one. MFU is the
model's floating-point operations over the time, by the data sheet's dense bf16 peak.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from measuring import markdown, on_device, publish
from steps import Step, flops_per_image, random_crops, read_recipe
from torch import Tensor
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from skipless.common import cli
from skipless.ssl.dino import cross_entropy
from skipless.ssl.run.compiling import Compiler
from skipless.ssl.run.parallel import parallelize

SHEET = 989e12  # FLOP/s, dense bf16
PEAK = {torch.bfloat16: 550e12, torch.float32: 45e12, torch.float64: 40e12}
BANDWIDTH, LAUNCH = 2.6e12, 2.5e-6
KINDS = {
    "attention": ("scaled_dot_product", "flash", "efficient_attention", "memory_efficient", "varlen"),
    "QR": ("qr",),
    "products": ("addmm", "mm", "bmm", "baddbmm", "convolution", "linear"),
    "LayerNorm": ("layer_norm",),
    "GELU": ("gelu",),
    "optimizer, clipping, teacher": ("foreach", "fused_adam", "lerp", "addcmul"),
    "copies and casts": ("copy", "cat", "clone", "stack", "scatter", "gather", "fill", "zero"),
    "softmax and sums": ("softmax", "logsumexp", "exp", "sum", "mean"),
}
# Of which no number is touched.
VIEWS = ("empty", "detach", "view", "lift_fresh", "split", "record_stream", "resize", "is_pinned", "alias", "unbind")


@dataclass(kw_only=True)
class Settings:
    """The least that a training step takes."""

    recipe: Path = Path("configs/vits16_skipless_soap.yaml")
    """A recipe of configs/."""
    device: Literal["cuda"] = "cuda"
    """Where it runs."""
    sizes: tuple[str, ...] = ("small", "base")
    """Of the model."""
    batch_size: int | None = None
    """Images a step; by default 128 for small, 64 for others."""
    out: Path | None = None
    """Where to write OUT.json and OUT.md; by default nowhere."""


class Roofline(TorchDispatchMode):
    """Counts the operations on tensors under it: {kind: [number, bytes, floating-point operations, seconds]}."""

    def __init__(self, varlen: dict[int, float] | None = None) -> None:
        super().__init__()
        self.rows: dict[str, list[float]] = defaultdict(lambda: [0.0] * 4)
        self.varlen = varlen or {}  # floating-point operations of torch's varlen attention, by the number of tokens

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """What is compiled runs compiled under it, too."""
        return True

    def add(self, kind: str, moved: float, flops: float, dtype: torch.dtype) -> None:
        """One operation."""
        seconds = max(LAUNCH, moved / BANDWIDTH, flops / PEAK.get(dtype, PEAK[torch.float32]))
        for index, value in enumerate((1, moved, flops, seconds)):
            self.rows[kind][index] += value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[-1]
        inputs, outputs = ([x for x in tree_leaves(t) if isinstance(x, Tensor)] for t in ((args, kwargs), out))
        tensors = [x for x in inputs + outputs if x.is_cuda]
        if func.is_view or name.strip("_").startswith(VIEWS) or not tensors:
            return out
        own = [x for x in outputs if not any(x is other for other in inputs)]
        moved = sum(map(_bytes, inputs)) + sum(map(_bytes, own))
        if name.endswith("_") and name not in ("zero_", "fill_", "copy_"):
            moved += _bytes(inputs[0]) if not name.startswith("_foreach") else sum(map(_bytes, args[0]))
        count = flop_registry.get(func._overloadpacket)
        flops = count(*args, **(kwargs or {}), out_val=out) if count else 0
        if name == "linalg_qr":
            flops = 8 / 3 * math.prod(inputs[0].shape) * inputs[0].shape[-1]
        dtype = torch.bfloat16 if any(x.dtype == torch.bfloat16 for x in tensors) else tensors[0].dtype
        if "varlen" in name:  # five products for two
            flops = self.varlen[inputs[0].shape[0]] * (2.5 if "backward" in name else 1)
        kind = next((k for k, parts in KINDS.items() if any(part in name for part in parts)), "the rest")
        self.add(kind, moved, flops, dtype)
        return out


def _bytes(x: Tensor) -> int:
    """Of the numbers that are there: what is expanded is read once."""
    return x.element_size() * math.prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride)


@contextmanager
def with_fused_kernels(counted: Roofline) -> Iterator[None]:
    """Count the kernels that torch's compiler has made, which no dispatcher sees."""
    run = CachingAutotuner.run

    def counting(kernel: Any, *args: Any, **more: Any) -> Any:
        tensors = [x for x in args if isinstance(x, Tensor)]
        again = [x for name, x in zip(kernel.fn.arg_names, args, strict=False) if name in kernel.mutated_arg_names]
        moved = sum(map(_bytes, tensors)) + sum(_bytes(x) for x in again if isinstance(x, Tensor))
        counted.add("fused by the compiler", moved, 0, torch.float32)
        return run(kernel, *args, **more)

    CachingAutotuner.run = counting  # type: ignore[method-assign]
    try:
        yield
    finally:
        CachingAutotuner.run = run  # type: ignore[method-assign]


def roofline(work: Callable[[], Any], steps: int, varlen: dict[int, float]) -> dict[str, dict[str, float]]:
    """Means of a number of steps by kind, the longest first."""
    with Roofline(varlen) as counted, with_fused_kernels(counted):
        for _ in range(steps):
            work()
    names = ("operations", "gigabytes", "teraflop", "ms")
    scales = (1, 1e-9, 1e-12, 1e3)
    found = {
        kind: {name: value * scale / steps for name, value, scale in zip(names, row, scales, strict=True)}
        for kind, row in counted.rows.items()
    }
    return dict(sorted(found.items(), key=lambda item: -item[1]["ms"]))


def varlen_flops(step: Step, recipe: Any) -> dict[int, float]:
    """Of one layer's attention in the forward pass, by the number of tokens: the teacher's and the student's."""
    backbone, crops, batch = step.student.backbone, recipe.crops, recipe.batch_size
    sides = ((2, crops.global_crops_size), (crops.local_crops_number, crops.local_crops_size))
    lengths = [(count * batch, backbone.prefix + (side // backbone.patch) ** 2) for count, side in sides]
    return {
        sum(n * length for n, length in lengths[:k]): sum(
            4.0 * n * length**2 * backbone.dim for n, length in lengths[:k]
        )
        for k in (1, 2)
    }


def measure(settings: Settings) -> None:
    """Count, and publish."""
    device = on_device(settings.device)
    cases, rows = [], []
    for size in settings.sizes:
        batch = settings.batch_size or (128 if size == "small" else 64)
        for optimizer in ("adamw", "soap"):
            recipe = read_recipe(settings.recipe, batch, False, optimizer, size)
            recipe.model.attention, recipe.model.init = "sdpa", "default"  # values do not matter
            crops = random_crops(recipe, device)
            for way in ("before", "after", "compiled"):
                step = Step(recipe, device, True, "library")
                compiler = Compiler(way == "compiled")
                if way != "before":
                    step.student_outputs = parallelize(step.student, device, "bf16", compile=compiler).forward
                    step.teacher_outputs = parallelize(step.teacher, device, "bf16", compile=compiler).forward
                if way == "compiled":
                    step.student.backbone.attention = step.teacher.backbone.attention = "varlen"
                    step.objective.cross_entropy = compiler(cross_entropy)
                step(crops)
                if compiler.on != (way == "compiled"):
                    raise ValueError("torch.compile fails here, which is needed for the compiled step")
                period = recipe.optimizer.precondition_every if optimizer == "soap" else 1
                kinds = roofline(partial(step, crops), period, varlen_flops(step, recipe))
                total = {name: sum(kind[name] for kind in kinds.values()) for name in next(iter(kinds.values()))}
                mfu = batch * flops_per_image(step.student, recipe) / (total["ms"] / 1e3) / SHEET
                case = {"model": f"ViT-{size[0].upper()}/16", "batch": batch, "optimizer": optimizer, "way": way}
                rows.append({**case, **total, "mfu": mfu})
                cases.append({**case, **total, "mfu": mfu, "kinds": kinds})
                del step
    lines = [
        "Computed for an H100 from the shapes of operations, run on {hardware}; nothing is timed.",
        "",
        *markdown(rows),
    ]
    for case in cases:
        title = f"{case['model']}, {case['optimizer']}, {case['way']}:"
        lines += ["", title, "", *markdown([{"kind": k, **v} for k, v in case["kinds"].items()])]
    constants = {"sheet": SHEET, "bandwidth": BANDWIDTH, "launch": LAUNCH, "peak_bf16": PEAK[torch.bfloat16]}
    result = {"task": "benchmark", "protocol": "roofline", "constants": constants, "details": cases}
    publish(settings.out, result, lines, device)


main = partial(cli.run, measure, Settings, __doc__)

if __name__ == "__main__":
    main()
