"""Schedules against hand-computed values, groups against DINO's rule."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from skipless.ssl.dino import DINOHead, DINOModel
from skipless.ssl.model.vit import VisionTransformer
from skipless.ssl.optim.optimizers import (
    OptimizerSettings,
    make_optimizer,
    muon_groups,
    orthogonalize,
    parameter_groups,
    set_rates,
)
from skipless.ssl.optim.schedules import cosine, ramp


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


@pytest.mark.parametrize("name", ["adamw", "soap", "muon"])
def test_frozen_last_layer_stays_and_the_rest_moves(name: str) -> None:
    student = model()
    optimizer = make_optimizer(student, OptimizerSettings(name=name))  # type: ignore[arg-type]
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    for step in range(3):
        set_rates(optimizer, 1e-2, 0.1, freeze_last_layer=True)
        torch.manual_seed(step)
        student([torch.randn(4, 3, 8, 8)]).logits.square().sum().backward()
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


def test_muon_groups_hold_the_matrices_of_the_blocks_and_everything_else_once() -> None:
    student = model()
    names = {parameter: name for name, parameter in student.named_parameters()}
    matrices, *others = muon_groups(student)
    cut = {names[parameter]: parts for parameter, parts in zip(matrices["params"], matrices["parts"], strict=True)}
    layers = {"attn.qkv": 3, "attn.proj": 1, "mlp.fc1": 1, "mlp.fc2": 1}
    assert cut == {f"backbone.blocks.{b}.{layer}.weight": n for b in (0, 1) for layer, n in layers.items()}
    rest = [names[parameter] for group in others for parameter in group["params"]]
    assert sorted([*cut, *rest]) == sorted(n for n, p in student.named_parameters() if p.requires_grad)
    for group in others:
        assert not group["matrices"]
        assert all((parameter.ndim > 1) == group["decays"] for parameter in group["params"])


def newton_schulz(gradient: np.ndarray) -> np.ndarray:
    """As on Muon's page: x <- a x + b (x x^T) x + c (x x^T)^2 x, five times, in float64."""
    x = gradient / np.linalg.norm(gradient)
    for _ in range(5):
        x = 3.4445 * x - 4.775 * (x @ x.T) @ x + 2.0315 * (x @ x.T) @ (x @ x.T) @ x
    return x


def test_muon_steps_equal_a_reference() -> None:
    """Matrices against numpy; the rest against torch's AdamW."""
    lr, decay = 0.02, 0.1
    torch.manual_seed(0)
    block = VisionTransformer(8, 1, 2, patch=4, image_size=8)
    start = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    gradients = [
        {name: torch.randn(tensor.shape, generator=generator) for name, tensor in start.items()} for _ in range(4)
    ]

    optimizer = make_optimizer(block, OptimizerSettings(name="muon"))
    for step in gradients:
        set_rates(optimizer, lr, decay, freeze_last_layer=False)
        for name, parameter in block.named_parameters():
            parameter.grad = step[name].clone()
        optimizer.step()

    matrices = {"blocks.0.attn.qkv.weight": 3, "blocks.0.attn.proj.weight": 1, "blocks.0.mlp.fc1.weight": 1}
    for name, parts in matrices.items():
        expected = start[name].double().numpy()
        momentum = np.zeros_like(expected)
        for step in gradients:
            gradient = step[name].double().numpy()
            momentum = 0.95 * momentum + 0.05 * gradient
            nesterov = np.split(0.05 * gradient + 0.95 * momentum, parts)
            update = np.concatenate([0.2 * np.sqrt(max(m.shape)) * newton_schulz(m) for m in nesterov])
            expected = (1 - lr * decay) * expected - lr * update
        np.testing.assert_allclose(dict(block.named_parameters())[name].detach(), expected, rtol=1e-4, atol=1e-5)

    reference = VisionTransformer(8, 1, 2, patch=4, image_size=8)
    reference.load_state_dict(start)
    adamw = make_optimizer(reference, OptimizerSettings())
    for step in gradients:
        set_rates(adamw, lr, decay, freeze_last_layer=False)
        for name, parameter in reference.named_parameters():
            parameter.grad = step[name].clone()
        adamw.step()
    for (name, moved), (_, expected_) in zip(block.named_parameters(), reference.named_parameters(), strict=True):
        if name not in (*matrices, "blocks.0.mlp.fc2.weight"):
            torch.testing.assert_close(moved, expected_, msg=name)


def test_muon_update_has_the_size_of_adamws() -> None:
    """Root mean square 0.2 (arXiv 2502.16982), whatever the shape and the gradient's scale."""
    for shape in ((32, 32), (32, 128), (128, 32)):
        torch.manual_seed(0)
        update = 0.2 * max(shape) ** 0.5 * orthogonalize(1e-3 * torch.randn(shape))
        assert update.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.2)
    assert not orthogonalize(torch.zeros(4, 6)).any()


def test_muon_agrees_with_torchs_on_one_matrix() -> None:
    """torch.optim.Muon computes in bf16, so to a percent of the update."""
    torch.manual_seed(0)
    backbone = VisionTransformer(16, 1, 2, patch=4, image_size=8)
    weight = dict(backbone.named_parameters())["blocks.0.mlp.fc1.weight"]
    twin = torch.nn.Parameter(weight.detach().clone())
    ours = make_optimizer(backbone, OptimizerSettings(name="muon"))
    library = torch.optim.Muon([twin], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        before = twin.detach().clone()
        twin.grad = torch.randn(twin.shape)
        weight.grad = twin.grad.clone()
        set_rates(ours, 0.02, 0.1, freeze_last_layer=False)
        ours.step()
        library.step()
        assert (weight - twin).norm() < 0.02 * (twin - before).norm()
        twin.data.copy_(weight.data)


def test_muon_takes_all_matrices_of_a_shape_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries, keys, values and projections; both layers of the MLPs."""
    shapes: list[tuple[int, ...]] = []

    def watched(matrices: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(matrices.shape))
        return orthogonalize(matrices)

    monkeypatch.setattr("skipless.ssl.optim.optimizers.orthogonalize", watched)
    backbone = VisionTransformer(16, 3, 2, patch=8, image_size=16)
    for parameter in backbone.parameters():
        parameter.grad = torch.randn_like(parameter)
    make_optimizer(backbone, OptimizerSettings(name="muon")).step()
    assert sorted(shapes) == [(3, 16, 64), (3, 64, 16), (12, 16, 16)]


def test_muon_state_goes_through_a_file(tmp_path: Path) -> None:
    def steps(student: torch.nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            torch.manual_seed(step)
            set_rates(optimizer, 1e-2, 0.1, freeze_last_layer=False)
            student([torch.randn(4, 3, 8, 8)]).logits.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    whole = model()
    steps(whole, make_optimizer(whole, OptimizerSettings(name="muon")), 0, 4)
    first = model()
    optimizer = make_optimizer(first, OptimizerSettings(name="muon"))
    steps(first, optimizer, 0, 2)
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    second = model()
    second.load_state_dict(state["model"])
    optimizer = make_optimizer(second, OptimizerSettings(name="muon"))
    optimizer.load_state_dict(state["optimizer"])
    steps(second, optimizer, 2, 4)
    for (name, a), (_, b) in zip(whole.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(a, b), name
