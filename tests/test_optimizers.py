"""Schedules against hand-computed values, groups against DINO's rule."""

import math

import pytest
import torch

from skipless.ssl.dino import DINOHead, DINOModel
from skipless.ssl.optimizers import OptimizerSettings, make_optimizer, parameter_groups, set_rates
from skipless.ssl.schedules import cosine, ramp
from skipless.ssl.vit import VisionTransformer


def model() -> DINOModel:
    torch.manual_seed(0)
    return DINOModel(VisionTransformer(16, 2, 2, patch=4, image_size=8), DINOHead(16, 5, 8, 4))


def test_learning_rate_schedule_by_hand() -> None:
    # linspace(0, 0.5, 3), then 0.1 + 0.2 (1 + cos(pi i / 4)) for i = 0..3
    expected = [0.0, 0.25, 0.5, 0.5, 0.1 + 0.2 * (1 + math.sqrt(0.5)), 0.3, 0.1 + 0.2 * (1 - math.sqrt(0.5))]
    assert [cosine(s, 7, 0.5, 0.1, warmup=3) for s in range(7)] == pytest.approx(expected)


def test_momentum_and_weight_decay_schedule_by_hand() -> None:
    assert [cosine(s, 2, 0.996, 1.0) for s in range(2)] == pytest.approx([0.996, 0.998])
    assert [cosine(s, 4, 0.04, 0.4) for s in range(4)] == pytest.approx([0.04, 0.0927207793864, 0.22, 0.3472792206136])


def test_teacher_temperature_by_hand() -> None:
    """DINO: 0.04 to 0.07 over 30 epochs, end included."""
    assert ramp(0, 0.04, 0.07, 30) == pytest.approx(0.04)
    assert ramp(1, 0.04, 0.07, 30) == pytest.approx(0.04 + 0.03 / 29)
    assert ramp(29, 0.04, 0.07, 30) == pytest.approx(0.07)
    assert ramp(200, 0.04, 0.07, 30) == pytest.approx(0.07)
    assert ramp(0, 0.04, 0.05, 0) == pytest.approx(0.05)
    assert ramp(0, 0.04, 0.07, 1) == pytest.approx(0.04)  # linspace over one epoch is its start


def test_groups_decay_matrices_only_and_hold_every_parameter_once() -> None:
    student = model()
    groups = parameter_groups(student)
    names = {id(p): n for n, p in student.named_parameters()}
    decayed = {names[id(p)] for g in groups if g["decays"] for p in g["params"]}
    plain = {names[id(p)] for g in groups if not g["decays"] for p in g["params"]}
    assert all(name.endswith("bias") or "norm" in name for name in plain)
    assert {"backbone.pos_embed", "backbone.blocks.0.attn.qkv.weight"} <= decayed
    assert not any(name.endswith("bias") for name in decayed)
    assert sorted(decayed | plain) == sorted(n for n, p in student.named_parameters() if p.requires_grad)
    last = [names[id(p)] for g in groups if g["last_layer"] for p in g["params"]]
    assert last == ["head.last_layer.parametrizations.weight.original1"]


@pytest.mark.parametrize("name", ["adamw", "soap"])
def test_frozen_last_layer_stays_and_the_rest_moves(name: str) -> None:
    student = model()
    optimizer = make_optimizer(student, OptimizerSettings(name=name))  # type: ignore[arg-type]
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    for step in range(3):
        set_rates(optimizer, 1e-2, 0.1, freeze_last_layer=True)
        torch.manual_seed(step)
        student([torch.randn(4, 3, 8, 8)]).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {n for n, p in student.named_parameters() if not torch.equal(p, before[n])}
    assert not any("last_layer" in n for n in moved)
    assert "backbone.blocks.1.mlp.fc1.weight" in moved


def test_adamw_step_by_hand() -> None:
    """First step of AdamW: w (1 - lr wd) - lr sign(gradient)."""
    layer = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(layer.weight, 2.0)
    torch.nn.init.constant_(layer.bias, 2.0)
    optimizer = make_optimizer(layer, OptimizerSettings())
    set_rates(optimizer, 0.1, 0.5, freeze_last_layer=False)
    layer(torch.ones(1, 1)).sum().backward()
    optimizer.step()
    assert layer.weight.item() == pytest.approx(2.0 * (1 - 0.05) - 0.1, rel=1e-5)
    assert layer.bias.item() == pytest.approx(2.0 - 0.1, rel=1e-5)


@pytest.mark.parametrize("field", ["lr", "warmup_epochs", "weight_decay"])
def test_negative_settings_are_named(field: str) -> None:
    with pytest.raises(ValueError, match=f"optimizer.{field}"):
        OptimizerSettings(**{field: -1.0})
