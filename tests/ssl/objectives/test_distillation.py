"""Targets and losses of distillation, by hand and by torch's own layers."""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_vit

from skipless.datasets.images import open_images
from skipless.ssl.data.teacher_views import StudentViews, TeacherFeatures, Views, collate
from skipless.ssl.model.teacher import Teacher, TeacherSettings
from skipless.ssl.objectives.distillation import DistillationSettings, Student, grid_in_boxes

MEAN, STD = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
WHOLE = torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.0]])


def test_whole_grid_keeps_its_cells_and_is_averaged_where_it_is_finer() -> None:
    fine = torch.randn(1, 36, 5)
    torch.testing.assert_close(grid_in_boxes(fine, WHOLE, 6), fine)
    means = fine.view(3, 2, 3, 2, 5).mean((1, 3)).view(1, 9, 5)
    torch.testing.assert_close(grid_in_boxes(fine, WHOLE, 3), means)
    flipped = torch.tensor([[0.0, 0.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(grid_in_boxes(fine, flipped, 3), means.view(1, 3, 3, 5).flip(2).view(1, 9, 5))


def test_boxes_cut_cells_out() -> None:
    """On a grid linear in rows and columns the samples of a cell average to the value at its center."""
    linear = torch.stack(torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij"), -1).view(1, 16, 2)
    inner = torch.tensor([[0.25, 0.25, 0.5, 0.5, 0.0], [0.125, 0.25, 0.5, 0.5, 1.0]])
    expected = torch.tensor([[[1.0, 1], [1, 2], [2, 1], [2, 2]], [[0.5, 2], [0.5, 1], [1.5, 2], [1.5, 1]]])
    torch.testing.assert_close(grid_in_boxes(linear.expand(2, -1, -1), inner, 2), expected)


def test_targets_are_standardized_by_channel() -> None:
    student = Student(tiny_vit(), 7, DistillationSettings(), "mean")
    tokens = 3 + 5 * torch.randn(40, 17, 7) * torch.arange(1, 8)
    student.standardize(tokens)
    patches, cls = student.targets(tokens, WHOLE.expand(40, -1), 4)
    for part in (patches.flatten(0, 1), cls):
        torch.testing.assert_close(part.mean(0), torch.zeros(7), atol=1e-4, rtol=0)
        torch.testing.assert_close(part.std(0), torch.ones(7), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["smooth-l1", "cosine"])
def test_loss_by_hand(kind: str) -> None:
    student = Student(tiny_vit(), 4, DistillationSettings(loss=kind, cls_loss_weight=0.3), "mean")  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    said, target = 2 * rng.normal(size=(2, 3, 9, 4)), rng.normal(size=(3, 9, 4))
    cls, cls_target = rng.normal(size=(3, 4)), 3 * rng.normal(size=(3, 4))

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return np.mean([x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(a, b, strict=True)])

    def one(a: np.ndarray, b: np.ndarray) -> float:
        if kind == "cosine":
            return 1 - cosine(a.reshape(-1, 4), b.reshape(-1, 4))
        return np.mean([0.5 * x**2 if abs(x) < 1 else abs(x) - 0.5 for x in (a - b).ravel()])

    tensors = [torch.from_numpy(x).float() for x in (said[0], cls, target, cls_target)]
    loss, similarity = student.loss((tensors[0], tensors[1]), (tensors[2], tensors[3]))
    assert loss.item() == pytest.approx(one(said[0], target) + 0.3 * one(cls, cls_target), rel=1e-5)
    assert similarity.item() == pytest.approx(cosine(said[0].reshape(-1, 4), target.reshape(-1, 4)), rel=1e-5)


def test_heads_learn_as_if_their_rate_were_larger() -> None:
    """One step of AdamW moves the output by the same as one with a rate larger by head_speed."""
    moved = []
    for speed, rate in ((4.0, 1e-4), (1.0, 4e-4)):
        torch.manual_seed(0)
        student = Student(tiny_vit(), 5, DistillationSettings(head_speed=speed), "mean")
        tokens = torch.randn(2, 6, 24)
        optimizer = torch.optim.AdamW(student.head.parameters(), lr=rate, weight_decay=0, eps=1e-20)
        before = speed * student.head(tokens)
        before.square().sum().backward()
        optimizer.step()
        moved.append((before, speed * student.head(tokens) - before))
    torch.testing.assert_close(moved[0][0], moved[1][0])
    torch.testing.assert_close(moved[0][1], moved[1][1])


def test_cached_features_are_those_of_the_central_square(photos: Path, tiny_run: Path, tmp_path: Path) -> None:
    images = open_images(str(photos))
    teacher = Teacher(TeacherSettings(str(tiny_run), size=40), 2)
    features = TeacherFeatures(tmp_path, teacher, images, bf16=False)
    features.compute(nullcontext(), torch.device("cpu"), 0)
    row = StudentViews(images, Views(size=40, scale=(1, 1)), 0, 40, features)[(0, 7)]
    # A picture of 48 x 40: its square is 40 wide, so it is cut, and not resized.
    square = torch.from_numpy(images.read(7)[:, 4:44].copy())
    expected = teacher(square[None])[0]
    torch.testing.assert_close(torch.from_numpy(row["teacher"]).float(), expected, atol=5e-3, rtol=5e-3)
    tokens = tiny_vit(registers=2)([(square.permute(2, 0, 1)[None] / 255 - MEAN) / STD])[0][0]
    torch.testing.assert_close(expected, tokens[[0, *range(3, 28)]], atol=1e-4, rtol=1e-4)


def test_views_depend_on_seed_epoch_and_index_alone_and_boxes_say_where_they_lie(photos: Path) -> None:
    images = open_images(str(photos))
    views = StudentViews(images, Views(size=16, scale=(0.2, 0.6), jitter_probability=0.5), 3, 24)
    rows = [views[(1, index)] for index in range(6)]
    again = [views[(1, index)] for index in range(6)]
    for a, b in zip(rows, again, strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in ("view", "teacher", "box"))
    assert not np.array_equal(rows[0]["view"], views[(2, 0)]["view"])
    batch = collate(rows)
    assert batch["view"].shape == (6, 16, 16, 3)
    assert batch["teacher"].shape == (6, 24, 24, 3)
    assert torch.equal(batch["box"], WHOLE.expand(6, -1))
