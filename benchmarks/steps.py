"""One training step of any recipe on random crops: the library's, or DINO's written plainly."""

from pathlib import Path
from typing import Any

import torch
from plain_dino import PlainLoss, plain_clip, plain_logits, plain_update_teacher
from torch import Tensor, nn

from skipless.common import cli
from skipless.common.precision import autocast
from skipless.ssl.config import Settings
from skipless.ssl.dino import DINOLoss, DINOModel, build_dino, make_teacher, update_teacher
from skipless.ssl.model.build import build_backbone
from skipless.ssl.optim.optimizers import make_optimizer, set_rates

COMPILED = ("compiled", "compiled, CUDA graphs")
LR, WEIGHT_DECAY, TEMPERATURE, MOMENTUM = 1e-4, 0.04, 0.04, 0.996


def read_recipe(
    recipe: Path, batch_size: int | None, residual: bool, optimizer: str, size: str | None = None
) -> Settings:
    """A recipe with another model and optimizer; initialization follows the model."""
    words = [f"--config={recipe}", "--data.path=none", "--out=none", f"--model.residual={str(residual).lower()}"]
    words += [f"--optimizer.name={optimizer}"] + ([f"--batch_size={batch_size}"] if batch_size else [])
    words += [f"--model.size={size}"] if size else []
    words += [f"--model.init={'default' if residual else 'small'}"]
    return cli.parse(Settings, words)


def build_model(settings: Settings) -> DINOModel:
    """The student at its start; patches are not whitened."""
    backbone = build_backbone(settings.model, settings.crops.global_crops_size, settings.seed)
    return build_dino(backbone, settings.dino, settings.model.pool)


def random_crops(settings: Settings, device: torch.device, seed: int = 0) -> list[Tensor]:
    """Random normalized crops of a batch, globals and locals."""
    generator = torch.Generator().manual_seed(seed)
    crops, batch = settings.crops, settings.batch_size
    shapes = [(2 * batch, crops.global_crops_size)] + (
        [(crops.local_crops_number * batch, crops.local_crops_size)] * bool(crops.local_crops_number)
    )
    return [torch.randn(count, 3, size, size, generator=generator).to(device) for count, size in shapes]


class Step:
    """One case: a student, its teacher and an optimizer; each call is one training step and returns the loss."""

    def __init__(self, settings: Settings, device: torch.device, bf16: bool, way: str, clip_by: Any = "parameter"):
        torch.manual_seed(0)
        self.student: DINOModel = build_model(settings).to(device)
        self.teacher = make_teacher(self.student)
        self.optimizer = make_optimizer(self.student, settings.optimizer)
        dino = settings.dino
        loss = (dino.out_dim, dino.student_temp, dino.center_momentum)
        self.fast, self.clip_by, self.views = way != "plain", clip_by, 2 + settings.crops.local_crops_number
        self.objective: nn.Module = (DINOLoss(*loss) if self.fast else PlainLoss(*loss)).to(device)
        self.autocast = autocast(device, bf16)
        self.clip = settings.clip_grad
        if way in COMPILED:
            self.student.backbone.attention = self.teacher.backbone.attention = "sdpa"
        self.student_outputs, self.teacher_outputs = (
            torch.compile(network, dynamic=False) if way == "compiled" else network
            for network in (self.student, self.teacher)
        )
        if way == "compiled, CUDA graphs":
            self.student_outputs = torch.compile(self.student, dynamic=False, mode="reduce-overhead")
            self.teacher_outputs = torch.compile(self.teacher, dynamic=False, mode="reduce-overhead")

    def __call__(self, crops: list[Tensor]) -> Tensor:
        set_rates(self.optimizer, LR, WEIGHT_DECAY, freeze_last_layer=False)
        torch.compiler.cudagraph_mark_step_begin()  # without effect where there are no CUDA graphs
        with self.autocast:
            with torch.no_grad():
                targets = self.teacher_outputs(crops[:1]).logits if self.fast else plain_logits(self.teacher, crops[:1])
            logits = self.student_outputs(crops).logits if self.fast else plain_logits(self.student, crops)
            result = self.objective(logits, targets, self.views, TEMPERATURE)
        loss = result.loss if self.fast else result
        loss.backward()
        if self.fast:
            nn.utils.clip_grad_norm_(self.student.parameters(), self.clip)
        else:
            plain_clip(self.student, self.clip, self.clip_by)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.fast:
            self.objective.update_center()
            update_teacher(self.teacher, self.student, MOMENTUM)
        else:
            plain_update_teacher(self.teacher, self.student, MOMENTUM)
        return loss.detach()


def flops_per_image(model: DINOModel, settings: Settings) -> float:
    """Of one training step: thrice the forward pass of the student (forward, and two products backward) on all crops,
    once the teacher's on the global ones; of backbones and heads, matrix products alone."""
    crops = settings.crops
    large, small = (model.backbone.flops(side, side) for side in (crops.global_crops_size, crops.local_crops_size))
    head = 2 * sum(p.numel() for p in model.head.parameters() if p.ndim == 2)
    student = 2 * large + crops.local_crops_number * small + (2 + crops.local_crops_number) * head
    return 3 * student + 2 * large + 2 * head
