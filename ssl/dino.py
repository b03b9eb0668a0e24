"""The DINO objective (arXiv 2104.14294): projection head, student and teacher, loss, and measures of collapse."""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from skipless.common.distributed import all_reduce_max, all_reduce_mean, all_reduce_sum
from skipless.ssl.model.vit import VisionTransformer

Pool = Literal["cls", "mean"]


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
    """How collapse is avoided: centering (DINO) or Sinkhorn-Knopp (DINOv2)."""
    center_momentum: float = 0.9
    """Momentum of the center."""
    koleo_loss_weight: float = 0.0
    """Weight of KoLeo, which keeps the images of a micro-batch apart; 0 for none, 0.1 in DINOv2."""

    def __post_init__(self) -> None:
        for name in ("out_dim", "hidden_dim", "bottleneck_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"dino.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("student_temp", "teacher_temp", "warmup_teacher_temp"):
            if getattr(self, name) <= 0:
                raise ValueError(f"dino.{name} is {getattr(self, name)}; it must be positive")
        for name in ("momentum_teacher", "center_momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"dino.{name} is {getattr(self, name)}; it must be in [0, 1]")
        if self.koleo_loss_weight < 0:
            raise ValueError(f"dino.koleo_loss_weight is {self.koleo_loss_weight}; it must be 0 or more")


class DINOHead(nn.Module):
    """Projection head: three layers with GELU, l2 normalization, and a weight-normed linear layer onto prototypes.

    Args:
        dim: width of the input; prototypes: number of outputs (K).
        hidden, bottleneck: widths of the first two layers and of the third.
        norm_last_layer: keep every prototype at length 1 (stable), or let its length be learned (DINO's ViT-S).
    """

    def __init__(
        self, dim: int, prototypes: int, hidden: int = 2048, bottleneck: int = 256, norm_last_layer: bool = True
    ):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = weight_norm(nn.Linear(bottleneck, prototypes, bias=False))
        length = self.last_layer.parametrizations.weight.original0
        nn.init.ones_(length)
        length.requires_grad_(not norm_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        """[N, dim] -> logits [N, K]."""
        return self.last_layer(F.normalize(self.mlp(x), dim=-1, eps=1e-6))


class Outputs(NamedTuple):
    """What student and teacher give to the losses."""

    logits: Tensor
    """[N, K] of all crops."""
    pooled: Tensor
    """[N, D], what the head read of them."""
    patch_logits: Tensor | None = None
    """[M, K'] of the patches that were asked for."""
    patches: Tensor | None = None
    """[N_0, n, D], patch tokens of the crops of the first size, where they were asked for."""


class DINOModel(nn.Module):
    """A backbone and a projection head; student and teacher are one each.

    `pool` says what the head reads: "cls", the class token, or "mean", the mean of the patch tokens. Attention that is
    close to the identity at the start, as the skipless initialization makes it, gives a class token nothing but itself:
    every image then has the same one, and training does not start. The mean of the patches avoids that.

    With `masks` there is a mask token, which starts as 0 (DINOv2). Patches are read by `head`, unless there is a
    `patch_head`.
    """

    def __init__(
        self,
        backbone: VisionTransformer,
        head: DINOHead,
        pool: Pool = "cls",
        masks: bool = False,
        patch_head: DINOHead | None = None,
    ):
        super().__init__()
        if pool not in ("cls", "mean"):
            raise ValueError(f"pool is {pool!r}; choose cls or mean")
        self.backbone, self.head, self.pool = backbone, head, pool
        if masks:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, backbone.dim))
        if patch_head is not None:
            self.patch_head = patch_head

    def forward(
        self,
        crops: Sequence[Tensor],
        read: Tensor | None = None,
        hidden: Tensor | None = None,
        patches: bool = False,
    ) -> Outputs:
        """All crops in one pass, and some patches of the largest.

        Args:
            crops: batches [N_i, 3, H_i, W_i], one for each size. Outputs have all N = sum N_i crops, in this order.
            read: int64 [M], of the n patches of each crop of the first size, counted through all N_0 * n of them:
                those that a head reads too.
            hidden: bool [N_0, n], those whose place the mask token takes.
            patches: whether to give the patch tokens, too.
        """
        tokens = self.backbone(crops, None if hidden is None else (hidden, self.mask_token))
        patches_from = 1 + self.backbone.registers
        pooled = torch.cat([t[:, 0] if self.pool == "cls" else t[:, patches_from:].mean(dim=1) for t in tokens])
        of_patches = tokens[0][:, patches_from:] if patches else None
        if read is None:
            return Outputs(self.head(pooled), pooled, None, of_patches)
        crop = read // (tokens[0].shape[1] - patches_from)
        chosen = tokens[0].flatten(0, 1).index_select(0, read + (crop + 1) * patches_from)
        if hasattr(self, "patch_head"):
            return Outputs(self.head(pooled), pooled, self.patch_head(chosen), of_patches)
        logits, patch_logits = self.head(torch.cat([pooled, chosen])).split([len(pooled), len(chosen)])
        return Outputs(logits, pooled, patch_logits, of_patches)


def build_dino(
    backbone: VisionTransformer,
    settings: DINOSettings,
    pool: Pool,
    masks: bool = False,
    patch_prototypes: int | None = None,
) -> DINOModel:
    """A student: the backbone and a fresh head, from torch's global random state; with `masks` and maybe with a head
    for patches, see `DINOModel`."""

    def head(prototypes: int) -> DINOHead:
        return DINOHead(
            backbone.dim, prototypes, settings.hidden_dim, settings.bottleneck_dim, settings.norm_last_layer
        )

    dino_head = head(settings.out_dim)
    return DINOModel(backbone, dino_head, pool, masks, head(patch_prototypes) if masks and patch_prototypes else None)


def make_teacher(student: DINOModel) -> DINOModel:
    """A copy of the student that no gradient reaches, and that drops no paths."""
    return copy.deepcopy(student).requires_grad_(False).eval()


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, for all parameters in a few kernels."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)


class DINOOutput(NamedTuple):
    """The loss of a micro-batch (with gradient) and what tells collapse from learning (without), in nats."""

    loss: Tensor  # mean cross-entropy over the pairs of different views
    teacher_entropy: Tensor  # mean entropy of the teacher's distributions; ln K when they are uniform
    kl: Tensor  # loss - teacher_entropy; 0 when the student has nothing to learn
    usage_entropy: Tensor  # entropy of the teacher's mean distribution; 0 when all images share a prototype


class DINOLoss(nn.Module):
    """Cross-entropy between the teacher's view of a global crop and the student's view of every other crop.

    The teacher's logits are centered (arXiv 2104.14294, eq. 4) or balanced by Sinkhorn-Knopp (arXiv 2006.09882, as in
    DINOv2). The center moves once per optimizer step, in `update_center`, whatever the number of micro-batches.
    Sinkhorn-Knopp balances each micro-batch, over all processes.

    Args:
        prototypes: K.
        student_temperature: of the student's softmax.
        center_momentum: of the moving average of the teacher's mean logits.
        balancing: "center" or "sinkhorn".
    """

    center: Tensor
    _logit_sum: Tensor

    def __init__(
        self,
        prototypes: int,
        student_temperature: float = 0.1,
        center_momentum: float = 0.9,
        balancing: Literal["center", "sinkhorn"] = "center",
    ):
        super().__init__()
        self.student_temperature, self.center_momentum = student_temperature, center_momentum
        self.balancing = balancing
        self.register_buffer("center", torch.zeros(prototypes))
        self.register_buffer("_logit_sum", torch.zeros(prototypes), persistent=False)
        self._logit_count = 0
        self.cross_entropy = cross_entropy
        """In one pass over the logits where it has been compiled."""

    def forward(self, student: Tensor, teacher: Tensor, views: int, temperature: float) -> DINOOutput:
        """The loss of one micro-batch of B images.

        Args:
            student: logits [views * B, K], view by view, the two global views first.
            teacher: logits [2 * B, K] of the global views.
            views: global and local views together.
            temperature: of the teacher's softmax.

        The mean over all pairs (teacher view t, student view s != t) of H(p_t, q_s) = -<p_t, log q_s>, where log q =
        z - logsumexp(z), z = logits / student_temperature.
        """
        p = self._assign(teacher.detach(), temperature).unflatten(0, (2, -1))  # [2, B, K]
        # As H is linear in p, a student view's teachers are summed before they meet it, and no pair is ever formed.
        both, batch = p.sum(0), p.shape[1]
        rows: int | list[int] = batch
        targets: Iterable[tuple[Tensor, int]] = (
            (both - p[view], 1) if view < 2 else (both, 2) for view in range(views)
        )
        if student.is_cuda:  # all globals, then all locals: a GPU has the memory, and wants few, large kernels
            rows, targets = [2 * batch, len(student) - 2 * batch], [(both - p, 1), (both, 2)]
        share = 1 / (2 * (views - 1) * batch)
        loss = CrossEntropy.apply(student, targets, rows, self.student_temperature, share, self.cross_entropy)

        with torch.no_grad():
            self._logit_sum += teacher.float().sum(0)
            self._logit_count += len(teacher)
            entropy = torch.special.entr(p).sum() / len(teacher)
            usage = torch.special.entr(p.mean((0, 1))).sum()
        return DINOOutput(loss, entropy, loss.detach() - entropy, usage)

    @torch.no_grad()
    def _assign(self, logits: Tensor, temperature: float) -> Tensor:
        """The teacher's distributions over prototypes: [N, K] -> [N, K] in float32, rows sum to 1."""
        if self.balancing == "center":
            return ((logits.float() - self.center) / temperature).softmax(dim=-1)
        return sinkhorn_knopp(logits, temperature)

    @torch.no_grad()
    def update_center(self) -> None:
        """Move the center towards the mean teacher logit of all micro-batches since the last call, on all processes."""
        mean = all_reduce_mean(self._logit_sum / self._logit_count)
        self.center.lerp_(mean, 1 - self.center_momentum)
        self._logit_sum.zero_()
        self._logit_count = 0


def cross_entropy(
    logits: Tensor, target: Tensor, total: Tensor | int, temperature: float, weight: float
) -> tuple[Tensor, Tensor]:
    """The sum over all rows of H(target, softmax(logits / temperature)), and `weight` times its gradient.

    Args:
        logits: [..., B, K]; target: [..., B, K] in float32; total: what a row of it adds up to, a number or [B, 1].

    Returns:
        [] and [..., B, K], both in the dtype of `target`.
    """
    z = logits.to(target.dtype) / temperature
    log_norm = z.logsumexp(dim=-1, keepdim=True)
    loss = (total * log_norm).sum() - (target * z).sum()
    # total * softmax(z) - target
    return loss, z.sub_(log_norm).exp_().mul_(total).sub_(target).mul_(weight / temperature)


class CrossEntropy(torch.autograd.Function):
    """A weighted sum of cross-entropies H(target, softmax(logits / temperature)), and its gradient in the same pass.

    Of the size of all logits there is only their gradient, in their own dtype: autograd would hold several copies in
    float32, gigabytes with 65,536 prototypes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Iterable[tuple[Tensor, Tensor | int]],
        rows: int | list[int],
        temperature: float,
        weight: float,
        sum_and_gradient: Callable[..., tuple[Tensor, Tensor]] = cross_entropy,
    ) -> Tensor:
        """Logits [N, K] -> `weight` times the sum over all rows, in float32.

        `targets`: for each `rows` of the logits, one after the other, [..., B, K] in float32, used again and again
        where there are fewer of them than rows, and what each adds up to: a number, or [B, 1].
        `sum_and_gradient`: `cross_entropy`, maybe compiled.
        """
        gradient = torch.empty_like(logits)
        loss = torch.zeros((), device=logits.device)
        for part, of_part, (target, total) in zip(logits.split(rows), gradient.split(rows), targets, strict=True):
            z = part.view(len(part) // max(1, target.shape[-2]), *target.shape[-2:])
            more, slope = sum_and_gradient(z, target, total, temperature, weight)
            loss += more
            of_part.copy_(slope.view_as(of_part))
        ctx.save_for_backward(gradient)
        ctx.rows = rows
        return loss * weight

    @staticmethod
    def backward(ctx: Any, *of_loss: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        scaled = torch.empty_like(gradient)
        for target, part in zip(scaled.split(ctx.rows), gradient.split(ctx.rows), strict=True):
            # In the dtype of the loss: in bf16 a third, of three micro-batches, would be off by 0.2 %.
            target.copy_(part.to(of_loss[0].dtype).mul_(of_loss[0]))
        return scaled, None, None, None, None, None


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Distributions that use all prototypes equally over the batch of all processes (arXiv 2006.09882, section 3.1).

    Args:
        logits: [N, K], this process's share of the batch; N may be 0, and another one elsewhere.

    Returns:
        [N, K] in float32; rows sum to 1, and the more iterations, the closer columns come to equal sums.
    """
    log_q = logits.float() / temperature  # in the log domain, where nothing underflows
    for _ in range(iterations):
        top = all_reduce_max(log_q.amax(dim=0) if len(log_q) else log_q.new_full(log_q.shape[1:], -math.inf))
        log_q = log_q - top - all_reduce_sum((log_q - top).exp().sum(dim=0)).log()
        log_q = log_q.log_softmax(dim=1)
    return log_q.exp()


def diagnose_collapse(
    loss: float, teacher_entropy: float, kl: float, usage_entropy: float, prototypes: int
) -> str | None:
    """One sentence with the likely cause and the remedy when training has collapsed, otherwise None.

    Args:
        loss, teacher_entropy, kl, usage_entropy: averages of `DINOOutput` over the steps since the last log line.
        prototypes: K.
    """
    ceiling = math.log(prototypes)
    if usage_entropy < 0.05 * ceiling:
        return (
            f"all images get the same prototype (usage entropy {usage_entropy:.3f} of at most {ceiling:.2f}): the "
            "teacher is too sharp or the center too slow; raise --dino.teacher_temp, lower "
            "--dino.center_momentum, or set --dino.balancing sinkhorn"
        )
    if teacher_entropy > 0.995 * ceiling and loss > 0.995 * ceiling:
        return (
            f"the teacher is uniform and the loss sits at ln K = {ceiling:.2f}: images look alike to the network; "
            "for a skipless model set --model.pool mean and --model.init small, otherwise lower "
            "--dino.teacher_temp, lengthen the warm-up, or lower the learning rate"
        )
    if usage_entropy - teacher_entropy < 0.002 * ceiling:  # in healthy runs at hand at least 0.028 of it
        return (
            "the teacher says the same of all images: its outputs no longer depend on them; start again with a lower "
            "learning rate (--optimizer.lr) or a longer warm-up"
        )
    return None
