"""iBOT's loss against a double loop, its center by hand, and what student and teacher see of a hidden patch."""

import math

import numpy as np
import pytest
import torch
from helpers import make_objective, tiny_vit

from skipless.ssl.data.masks import Masks, collate_masks
from skipless.ssl.dino import DINOHead, DINOModel, DINOSettings, build_dino, make_teacher
from skipless.ssl.objectives import ibot
from skipless.ssl.objectives.ibot import IBOTLoss, IBOTSettings


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


@pytest.mark.parametrize("values", [2**27, 14])  # the second: two rows of the logits at a time
def test_loss_equals_a_double_loop_over_crops_and_their_hidden_patches(
    monkeypatch: pytest.MonkeyPatch, values: int
) -> None:
    monkeypatch.setattr(ibot, "VALUES", values)
    rng = np.random.default_rng(0)
    masks = rng.random((3, 2, 9)) < 0.4  # images, crops, patches
    masks[1, 0] = False
    center, student, teacher = rng.normal(size=7), rng.normal(size=(2, 3, 9, 7)), rng.normal(size=(2, 3, 9, 7))
    loss, entropies = 0.0, 0.0
    for crop in range(2):
        for image in range(3):
            hidden = [patch for patch in range(9) if masks[image, crop, patch]]
            for patch in hidden:
                p = softmax((teacher[crop, image, patch] - center) / 0.05)
                q = softmax(student[crop, image, patch] / 0.1)
                loss -= sum(a * math.log(b) for a, b in zip(p, q, strict=True)) / len(hidden) / 6
                entropies -= sum(a * math.log(a) for a in p if a > 0) / len(hidden) / 6

    given = collate_masks(list(masks))
    assert given.read is not None
    assert given.weights is not None
    objective = IBOTLoss(7, student_temperature=0.1)
    objective.center.copy_(torch.from_numpy(center))
    logits = torch.from_numpy(student.reshape(-1, 7)[given.read]).float().requires_grad_()
    targets = torch.from_numpy(teacher.reshape(-1, 7)[given.read]).float()
    found, kl = objective(logits, targets, given.weights, 0.05)
    assert found.item() == pytest.approx(loss, rel=1e-4)
    assert kl.item() == pytest.approx(loss - entropies, rel=1e-3)

    found.backward()
    p = ((targets - objective.center) / 0.05).softmax(1)
    again = logits.detach().double().requires_grad_()
    each = torch.nn.functional.cross_entropy(again / 0.1, p.double(), reduction="none")
    (expected,) = torch.autograd.grad((each * given.weights).sum(), again)
    torch.testing.assert_close(logits.grad, expected.float(), atol=1e-6, rtol=1e-4)


def test_center_is_the_mean_over_all_hidden_patches_of_a_step_and_stays_where_there_are_none() -> None:
    objective = IBOTLoss(2, center_momentum=0.9)
    for logits in ([[1.0, 0.0]], [[4.0, 3.0], [7.0, 3.0]], []):
        objective(torch.zeros(len(logits), 2), torch.tensor(logits).view(-1, 2), torch.ones(len(logits)), 0.04)
    objective.update_center()  # 0.1 * mean (4, 2)
    torch.testing.assert_close(objective.center, torch.tensor([0.4, 0.2]))
    objective.update_center()
    torch.testing.assert_close(objective.center, torch.tensor([0.4, 0.2]))


def test_sinkhorn_balances_hidden_patches() -> None:
    """Student and teacher alike, and one patch for each prototype: nothing is left to learn but the temperature's."""
    logits, weights = 10 * torch.eye(4), torch.full((4,), 0.25)
    loss, _ = IBOTLoss(4, student_temperature=0.1, balancing="sinkhorn")(logits, logits, weights, 0.1)
    assert loss.item() == pytest.approx(0, abs=1e-4)
    empty, kl = IBOTLoss(4, balancing="sinkhorn")(logits[:0], logits[:0], weights[:0], 0.1)
    assert empty.item() == kl.item() == 0


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("own_head", [False, True])
def test_student_does_not_see_hidden_patches_and_the_teacher_does(registers: int, own_head: bool) -> None:
    backbone = tiny_vit(registers=registers)
    model = DINOModel(backbone, DINOHead(24, 5, 8, 4), "mean", True, DINOHead(24, 6, 8, 4) if own_head else None)
    hidden = torch.zeros(2, 16, dtype=torch.bool)
    hidden[0, 3] = hidden[1, 7] = hidden[1, 8] = True
    read = torch.tensor([3, 16 + 7, 16 + 8])
    images = torch.randn(2, 3, 32, 32)
    other = images.clone()
    other[0, :, :8, 24:] += 1  # patch 3
    other[1, :, 8:16, 24:] += 1  # patch 7
    other[1, :, 16:24, :8] += 1  # patch 8
    small = torch.randn(4, 3, 16, 16)
    one, two = model([images, small], read, hidden), model([other, small], read, hidden)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b)
    assert one.logits.shape == (6, 5)
    assert one.patch_logits is not None
    assert one.patch_logits.shape == (3, 6 if own_head else 5)

    seen = make_teacher(model)([images], read)
    patches = backbone([images])[0][:, 1 + registers :]
    head = model.patch_head if own_head else model.head
    torch.testing.assert_close(seen.patch_logits, head(patches[[0, 1, 1], [3, 7, 8]]))
    assert not torch.allclose(seen.patch_logits, one.patch_logits)  # type: ignore[arg-type]


def test_hidden_patches_get_the_mask_token_and_their_own_position() -> None:
    backbone = tiny_vit()
    hidden, token = torch.tensor([[True] + [False] * 15]), torch.randn(1, 1, 24)
    images = torch.randn(1, 3, 32, 32)
    embedded, usual = backbone.embed(images, (hidden, token)), backbone.embed(images)
    torch.testing.assert_close(embedded[0, 1], token[0, 0] + backbone.pos_embed[0, 1])
    torch.testing.assert_close(embedded[0, 2:], usual[0, 2:])


def test_a_step_without_any_mask_is_dinos() -> None:
    """And every parameter has a gradient, as DistributedDataParallel demands."""
    settings = DINOSettings(out_dim=5, hidden_dim=8, bottleneck_dim=4)
    student = build_dino(tiny_vit(), settings, "mean", masks=True, patch_prototypes=6)
    crops = [torch.randn(4, 3, 32, 32), torch.randn(4, 3, 16, 16)]
    none = collate_masks([np.zeros((2, 16), bool)] * 2)
    objective = make_objective(dino=settings, ibot=IBOTSettings(loss_weight=1.0, out_dim=6))
    targets = make_teacher(student)(crops[:1], none.read)
    loss, *values = objective(student(crops, none.read, none.patches), targets, none, crops[0], 0.04)
    alone = make_objective(dino=settings)
    assert loss == alone(student(crops), targets, Masks(), crops[0], 0.04)[0]
    assert dict(zip(objective.names, values, strict=True))["ibot"] == 0
    loss.backward()
    assert all(p.grad is not None for p in student.parameters() if p.requires_grad)
    objective.end_step()
    assert not objective.ibot.center.any()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "wrong", [{"loss_weight": -1.0}, {"out_dim": 0}, {"mask_sample_probability": 0.0}, {"from_epoch": -1},
              {"mask_ratio_min_max": (0.5, 0.1)}]
)  # fmt: skip
def test_settings_out_of_range_are_named(wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"ibot.{next(iter(wrong))} is"):
        IBOTSettings(**wrong)
