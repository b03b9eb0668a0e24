"""Gram's loss by hand, when its teacher is taken, and what that one sees."""

import pytest
import torch
from helpers import make_objective, tiny_vit

from skipless.ssl.data.masks import Masks
from skipless.ssl.dino import DINOSettings, Outputs
from skipless.ssl.objectives.gram import GramSettings, gram_loss


def test_by_hand() -> None:
    """Two patches at 60 degrees, and the anchor's at 90: of four similarities two differ, by 1/2."""
    student = torch.tensor([[[2.0, 0.0], [1.0, 3**0.5]]], requires_grad=True)
    loss = gram_loss(student, torch.tensor([[[0.0, 5.0], [3.0, 0.0]]]))
    assert loss.item() == pytest.approx(2 / 4 * 0.5**2)
    loss.backward()
    assert student.grad is not None
    turned = student.detach() @ torch.tensor([[0.6, 0.8], [-0.8, 0.6]])
    assert gram_loss(turned, student.detach()).item() == pytest.approx(0, abs=1e-12)


def test_the_teacher_is_the_one_of_the_epoch_and_renewed() -> None:
    gram = make_objective(gram=GramSettings(loss_weight=2.0, from_epoch=1, every_epochs=2)).gram
    models = {}
    for step in range(4 * 4):
        torch.manual_seed(step)
        models[step] = tiny_vit()
        torch.nn.init.normal_(models[step].norm.bias)
        gram.start_step(step, lambda: models[step])  # noqa: B023
        taken = max((n for n in (4, 12) if n <= step), default=None)
        assert gram.on == (taken is not None)
        if taken is not None:
            assert torch.equal(gram.teacher.norm.bias, models[taken].norm.bias)


def test_is_added_and_sees_larger_crops_at_the_students_grid() -> None:
    objective = make_objective(dino=DINOSettings(out_dim=3), gram=GramSettings(loss_weight=2.0))
    assert list(objective.parts) == ["objective", "gram"]
    student, larger = torch.randn(4, 16, 24), torch.randn(4, 3, 64, 64)
    teacher = tiny_vit()
    objective.start_step(0, lambda: teacher)
    logits = Outputs(torch.randn(8, 3), torch.randn(8, 24), None, student)
    total, *values = objective(logits, Outputs(torch.randn(4, 3), torch.randn(4, 24)), Masks(), larger, 0.04)
    tokens = teacher([larger])[0][:, 1:].mT.reshape(4, 24, 8, 8)
    smaller = torch.nn.functional.interpolate(tokens, (4, 4), mode="bicubic").flatten(2).mT
    expected = gram_loss(student, smaller)
    torch.testing.assert_close(values[-1], expected)
    torch.testing.assert_close(total, values[0] + 2 * expected)
