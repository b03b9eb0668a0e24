"""Optimizers and parameter groups of DINO's recipe."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn


@dataclass
class OptimizerSettings:
    """How the student learns."""

    name: Literal["adamw", "soap"] = "adamw"
    """adamw, or soap (Shampoo's eigenbasis with Adam in it, arXiv 2409.11321): slower per step, and what keeps a
    skipless model well conditioned through training."""
    lr: float = 5e-4
    """Peak learning rate for a batch of 256 images; scaled by batch_size / 256. DINO: 5e-4 with adamw; soap takes 1e-3
    to 3e-3."""
    min_lr: float = 1e-6
    """Learning rate at the end of the cosine; not scaled."""
    warmup_epochs: float = 10.0
    """Epochs over which the learning rate grows linearly from 0 to its peak."""
    weight_decay: float = 0.04
    """Decoupled weight decay at the start; none on biases, norms and layer scales."""
    weight_decay_end: float = 0.4
    """Decoupled weight decay at the end of its cosine. Keep it at weight_decay for short runs."""
    betas: tuple[float, float] | None = None
    """Decay rates of the moments; by default (0.9, 0.999) for adamw and (0.95, 0.95) for soap."""
    precondition_every: int = 10
    """soap only: steps between refreshes of the eigenbasis."""
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


def make_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimizer over `parameter_groups(model)`. Learning rate and weight decay are set each step by `set_rates`."""
    groups = parameter_groups(model)
    if settings.name == "soap":
        from pytorch_optimizer import SOAP  # takes seconds to import

        return SOAP(
            groups,
            lr=settings.lr,
            betas=settings.betas or (0.95, 0.95),
            precondition_frequency=settings.precondition_every,
            max_precondition_dim=settings.max_precondition_dim,
        )
    fused = next(model.parameters()).device.type == "cuda"
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas or (0.9, 0.999), fused=fused)


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float, freeze_last_layer: bool) -> None:
    """Set this step's learning rate and weight decay; a frozen last layer has learning rate 0."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if group["last_layer"] and freeze_last_layer else lr
        group["weight_decay"] = weight_decay if group["decays"] else 0.0
