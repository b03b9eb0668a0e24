"""Optimizers (AdamW, SOAP, Muon) and parameter groups of DINO's recipe."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from skipless.ssl.optim.sharded import ShardedOptimizer
from skipless.ssl.optim.soap import SOAP, STACK

Optimizer = torch.optim.Optimizer | ShardedOptimizer


@dataclass
class OptimizerSettings:
    """How the network learns."""

    name: Literal["adamw", "soap", "muon"] = "adamw"
    """adamw; soap (Shampoo's eigenbasis with Adam in it, arXiv 2409.11321): slower per step, and what keeps a skipless
    model well conditioned through training; or muon (orthogonalized momentum) for the matrices of the blocks, with
    adamw for everything else."""
    lr: float = 5e-4
    """Peak learning rate for a batch of 256 images; scaled by batch_size / 256. DINO: 5e-4 with adamw; soap takes 1e-3
    to 3e-3; muon takes adamw's, since its updates are scaled to the size of adamw's."""
    min_lr: float = 1e-6
    """Learning rate at the end of the cosine; not scaled."""
    warmup_epochs: float = 10.0
    """Epochs over which the learning rate grows linearly from 0 to its peak."""
    weight_decay: float = 0.04
    """Decoupled weight decay at the start; none on biases, norms and layer scales."""
    weight_decay_end: float = 0.4
    """Decoupled weight decay at the end of its cosine. Keep it at weight_decay for short runs."""
    betas: tuple[float, float] | None = None
    """Decay rates of the moments; by default (0.9, 0.999) for adamw and (0.95, 0.95) for soap. For muon, those of its
    adamw part, by default (0.9, 0.999)."""
    precondition_every: int = 10
    """soap only: steps between two refreshes of a matrix's eigenbasis. The matrices take turns, so all steps take about
    the same time; only the first, which finds all eigenbases, is slow."""
    max_precondition_dim: int = 10000
    """soap only: longer sides of a matrix stay without a preconditioner. Lower it to save time on CPU."""

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.min_lr < 0:
            raise ValueError(f"optimizer.lr is {self.lr} and optimizer.min_lr {self.min_lr}; they must be positive")
        if self.warmup_epochs < 0:
            raise ValueError(f"optimizer.warmup_epochs is {self.warmup_epochs}; it cannot be negative")
        if self.weight_decay < 0 or self.weight_decay_end < 0:
            raise ValueError("optimizer.weight_decay and weight_decay_end cannot be negative")
        if self.precondition_every < 1 or self.max_precondition_dim < 1:
            raise ValueError("optimizer.precondition_every and max_precondition_dim must be at least 1")


def parameter_groups(model: nn.Module) -> list[dict]:
    """DINO's groups: weight decay on matrices only, and the head's last layer apart, so that it can be frozen.

    Biases, norms and layer scales have no weight decay. CLS, registers, positions and the prototypes' lengths (where
    they are learned) have: their tensors have more than one dimension, which is DINO's rule.

    Returns:
        Groups with the keys `params`, `decays` (bool) and `last_layer` (bool); no group is empty.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            last_layer = ".last_layer." in f".{name}"
            groups.setdefault((parameter.ndim > 1, last_layer), []).append(parameter)
    return [{"params": p, "decays": decays, "last_layer": last} for (decays, last), p in groups.items()]


def muon_groups(model: nn.Module) -> list[dict]:
    """`parameter_groups` for Muon: the matrices of the blocks (query-key-value, projection, MLP) form a first group.

    Returns:
        Groups with the additional keys `matrices` (bool) and, in the first, `parts`: into how many matrices of equal
        height each parameter is to be cut (3 for the fused query-key-value layers, else 1).
    """
    parts = {
        parameter: 3 if name.endswith("attn.qkv.weight") else 1
        for name, parameter in model.named_parameters()
        if ".blocks." in f".{name}" and parameter.ndim == 2 and parameter.requires_grad
    }
    matrices = {"params": list(parts), "decays": True, "last_layer": False, "matrices": True}
    others = [
        {**group, "params": [p for p in group["params"] if p not in parts], "matrices": False}
        for group in parameter_groups(model)
    ]
    return [group for group in ({**matrices, "parts": list(parts.values())}, *others) if group["params"]]


def make_optimizer(model: nn.Module, settings: OptimizerSettings) -> Optimizer:
    """The optimizer over the model's parameters. Learning rate and weight decay are set each step by `set_rates`."""
    sharded = any(hasattr(parameter, "to_local") for parameter in model.parameters())

    def muon(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return Muon(groups, lr=settings.lr, betas=settings.betas or (0.9, 0.999))

    def soap(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return SOAP(
            groups,
            lr=settings.lr,
            betas=settings.betas or (0.95, 0.95),
            precondition_frequency=settings.precondition_every,
            max_precondition_dim=settings.max_precondition_dim,
            spread=True,
            replicated=not sharded,
        )

    if settings.name == "adamw":  # element-wise, so it takes parameters whole or in parts
        betas, fused = settings.betas or (0.9, 0.999), next(model.parameters()).device.type == "cuda"
        return torch.optim.AdamW(parameter_groups(model), lr=settings.lr, betas=betas, fused=fused)
    if settings.name == "muon":
        return ShardedOptimizer(muon_groups(model), muon) if sharded else muon(muon_groups(model))
    groups = parameter_groups(model)
    return ShardedOptimizer(groups, soap, settings.max_precondition_dim) if sharded else soap(groups)


def set_rates(optimizer: Optimizer, lr: float, weight_decay: float, freeze_last_layer: bool) -> None:
    """Set this step's learning rate and weight decay; a frozen last layer has learning rate 0."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if group["last_layer"] and freeze_last_layer else lr
        group["weight_decay"] = weight_decay if group["decays"] else 0.0


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., https://kellerjordan.github.io/posts/muon/) on matrices, AdamW on everything else.

    A matrix moves along its Nesterov momentum, orthogonalized, times 0.2 sqrt(max(height, width)): so an update has the
    size of an AdamW update, and learning rate and weight decay mean the same for all parameters (Liu et al.,
    arXiv 2502.16982). Unlike torch.optim.Muon it is one optimizer for the whole model, and cuts the fused layer of
    queries, keys and values into its three matrices: taken as one, the largest of the three gradients would set the
    scale of the others.

    Args:
        groups: of `muon_groups`.
        lr, betas: learning rate, and decay rates of AdamW's moments. Weight decay is that of each group.
    """

    MOMENTUM, EPS = 0.95, 1e-8

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float]):
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Move all parameters that have a gradient."""
        for group in self.param_groups:
            parts = group["parts"] if group["matrices"] else [0] * len(group["params"])
            moved = [(p, cut) for p, cut in zip(group["params"], parts, strict=True) if p.grad is not None]
            if not moved:
                continue
            parameters = [parameter for parameter, _ in moved]
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            if group["matrices"]:
                updates = self._orthogonal(parameters, [cut for _, cut in moved])
            else:
                updates = self._adam(parameters, *group["betas"])
            torch._foreach_add_(parameters, updates, alpha=-group["lr"])

    def _orthogonal(self, parameters: list[Tensor], parts: list[int]) -> list[Tensor]:
        """All matrices of one shape are orthogonalized together."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        momenta = [self._state(parameter, "momentum")["momentum"] for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - self.MOMENTUM)
        updates = torch._foreach_lerp(gradients, momenta, self.MOMENTUM)
        alike: dict[torch.Size, list[Tensor]] = {}
        for update, cut in zip(updates, parts, strict=True):
            for matrix in update.chunk(cut):  # views, which become what is orthogonal
                alike.setdefault(matrix.shape, []).append(matrix)
        for shape, matrices in alike.items():
            most = max(1, STACK // shape.numel())
            for few in (matrices[i : i + most] for i in range(0, len(matrices), most)):
                stack = orthogonalize(torch.stack(few)).mul_(0.2 * max(shape) ** 0.5)
                torch._foreach_copy_(few, stack.unbind())
        return list(updates)

    def _adam(self, parameters: list[Tensor], beta1: float, beta2: float) -> list[Tensor]:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        states = [self._state(parameter, "mean", "square") for parameter in parameters]
        means, squares = ([state[name] for state in states] for name in ("mean", "square"))
        steps = []
        for state in states:
            state.setdefault("step", torch.tensor(0.0)).add_(1)
            steps.append(float(state["step"]))  # a tensor for the sake of checkpoints in parts, on the CPU
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_lerp_(squares, torch._foreach_mul(gradients, gradients), 1 - beta2)
        roots = torch._foreach_div(squares, [1 - beta2**step for step in steps])
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, self.EPS)
        torch._foreach_mul_(roots, [1 - beta1**step for step in steps])
        return list(torch._foreach_div(means, roots))

    def _state(self, parameter: Tensor, *names: str) -> dict[str, Tensor]:
        """A parameter's state; in its first step, zeros under these names."""
        state = self.state[parameter]
        for name in names:
            if name not in state:
                state[name] = torch.zeros_like(parameter)
        return state


def orthogonalize(matrices: Tensor) -> Tensor:
    """Roughly U V^T of matrices with the singular value decomposition U S V^T: five Newton-Schulz steps, whose
    coefficients bring most singular values to 0.7..1.2 fast, rather than all to 1 (Jordan et al., see `Muon`).

    [..., height, width] -> the same shape and dtype; computed in bf16 on CUDA. Zero stays zero.
    """
    x = matrices.reshape(-1, *matrices.shape[-2:])
    x = x.bfloat16() if x.is_cuda else x
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.mT if tall else x).to(matrices.dtype).reshape(matrices.shape)
