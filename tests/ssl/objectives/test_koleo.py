"""KoLeo against SciPy's distances."""

import numpy as np
import pytest
import torch
from helpers import make_objective
from scipy.spatial.distance import pdist, squareform

from skipless.ssl.data.masks import Masks
from skipless.ssl.dino import DINOSettings, Outputs
from skipless.ssl.objectives.koleo import koleo


def by_scipy(x: np.ndarray) -> float:
    distances = squareform(pdist(x / np.linalg.norm(x, axis=1, keepdims=True)))
    np.fill_diagonal(distances, np.inf)
    return -np.log(distances.min(1)).mean()


def test_equals_scipys_distances_and_pushes_neighbors_apart() -> None:
    x = np.random.default_rng(0).normal(size=(9, 5))
    given = torch.from_numpy(x).requires_grad_()
    loss = koleo(given)
    assert loss.item() == pytest.approx(by_scipy(x), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, given)
    assert koleo(given - 0.05 * gradient) < loss
    same = torch.ones(3, 4, requires_grad=True)
    koleo(same).backward()
    assert torch.isfinite(same.grad).all()  # type: ignore[arg-type]


def test_is_added_for_each_of_the_two_global_views() -> None:
    rng = np.random.default_rng(1)
    pooled = rng.normal(size=(4 * 6, 5))  # two global and two local views of six images
    objective = make_objective(dino=DINOSettings(out_dim=3, koleo_loss_weight=0.5))
    student = Outputs(torch.randn(24, 3), torch.from_numpy(pooled))
    total, *values = objective(student, Outputs(torch.randn(12, 3), torch.randn(12, 5)), Masks(), torch.empty(0), 0.04)
    named = dict(zip(objective.names, values, strict=True))
    assert named["koleo"].item() == pytest.approx(by_scipy(pooled[:6]) + by_scipy(pooled[6:12]), rel=1e-5)
    assert total.item() == pytest.approx((named["loss"] + 0.5 * named["koleo"]).item())
