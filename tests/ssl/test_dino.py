"""The objective against loops, hand-computed values and its definition."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skipless.ssl.dino import (
    DINOHead,
    DINOLoss,
    DINOModel,
    Outputs,
    diagnose_collapse,
    make_teacher,
    sinkhorn_knopp,
    update_teacher,
)
from skipless.ssl.model.vit import VisionTransformer


@settings(max_examples=25)
@given(views=st.integers(2, 6), batch=st.integers(1, 4), prototypes=st.integers(2, 9), seed=st.integers(0, 10**6))
def test_loss_equals_a_double_loop_over_pairs(views: int, batch: int, prototypes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    student, teacher = rng.normal(size=(views, batch, prototypes)), rng.normal(size=(2, batch, prototypes))
    center = rng.normal(size=prototypes)
    objective = DINOLoss(prototypes, student_temperature=0.1)
    objective.center.copy_(torch.from_numpy(center))
    logits = torch.from_numpy(student).float().flatten(0, 1).requires_grad_()
    found = objective(logits, torch.from_numpy(teacher).float().flatten(0, 1), views, temperature=0.05)

    def softmax(x: np.ndarray) -> np.ndarray:
        e = np.exp(x - x.max())
        return e / e.sum()

    terms, entropies = [], []
    for b in range(batch):
        for t in range(2):
            p = softmax((teacher[t, b] - center) / 0.05)
            entropies.append(-sum(x * math.log(x) for x in p if x > 0))
            for s in range(views):
                if s != t:
                    terms.append(-np.sum(p * np.log(softmax(student[s, b] / 0.1))))
    assert found.loss.item() == pytest.approx(np.mean(terms), rel=1e-4, abs=1e-4)
    assert found.teacher_entropy.item() == pytest.approx(np.mean(entropies), rel=1e-3, abs=1e-4)
    assert found.kl.item() == pytest.approx(np.mean(terms) - np.mean(entropies), rel=1e-3, abs=2e-3)
    found.loss.backward()
    assert logits.grad is not None
    # The gradient of a cross-entropy with respect to logits sums to zero over the classes.
    torch.testing.assert_close(logits.grad.sum(1), torch.zeros(views * batch), atol=1e-5, rtol=0)


def test_gradient_equals_that_of_the_double_loop() -> None:
    torch.manual_seed(0)
    student = torch.randn(5 * 3, 7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2 * 3, 7, dtype=torch.float64)
    loss = torch.zeros((), dtype=torch.float64)
    for t in range(2):
        for s in range(5):
            if s != t:
                p = (teacher.view(2, 3, 7)[t] / 0.04).softmax(-1)
                loss = loss + torch.nn.functional.cross_entropy(student.view(5, 3, 7)[s] / 0.1, p) / 8
    (expected,) = torch.autograd.grad(loss, student)
    found = DINOLoss(7)(student, teacher, 5, 0.04)
    (gradient,) = torch.autograd.grad(found.loss, student)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)


def test_loss_keeps_no_more_than_one_copy_of_the_logits() -> None:
    saved: list[int] = []

    def weigh(x: torch.Tensor) -> torch.Tensor:
        saved.append(x.numel() * x.element_size())
        return x

    logits = torch.randn(6 * 4, 1000).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(weigh, lambda x: x):
        loss = DINOLoss(1000)(logits, torch.randn(2 * 4, 1000), 6, 0.04).loss
    assert sum(saved) <= logits.numel() * 2
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


def test_gradient_in_bf16_is_scaled_without_rounding_the_factor() -> None:
    torch.manual_seed(0)
    logits, teacher = torch.randn(4 * 2, 500).bfloat16().requires_grad_(), torch.randn(2 * 2, 500)
    gradients = []
    for micro_batches in (1, 3):
        loss = DINOLoss(500)(logits, teacher, 4, 0.04).loss / micro_batches
        gradients.append(torch.autograd.grad(loss, logits)[0].double())
    ratio = (gradients[0] * gradients[1]).sum() / gradients[0].square().sum()
    assert ratio.item() == pytest.approx(1 / 3, rel=2e-4)  # 1 / 3 in bf16 is 0.2 % more


def test_center_moves_once_per_step_over_all_micro_batches() -> None:
    objective = DINOLoss(2, center_momentum=0.9)
    for teacher in ([[1.0, 0.0], [3.0, 0.0]], [[5.0, 2.0], [7.0, 2.0]]):
        objective(torch.zeros(4, 2), torch.tensor(teacher), 4, 0.04)
    assert objective.center.tolist() == [0.0, 0.0]
    objective.update_center()  # 0.9 * 0 + 0.1 * mean (4, 1)
    torch.testing.assert_close(objective.center, torch.tensor([0.4, 0.1]))
    objective(torch.zeros(4, 2), torch.tensor([[10.0, 0.0], [10.0, 0.0]]), 4, 0.04)
    objective.update_center()  # 0.9 * (0.4, 0.1) + 0.1 * (10, 0)
    torch.testing.assert_close(objective.center, torch.tensor([1.36, 0.09]))


def test_teacher_is_an_exponential_moving_average() -> None:
    student, teacher = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    torch.nn.init.constant_(teacher.weight, 1.0)
    torch.nn.init.constant_(student.weight, 2.0)
    update_teacher(teacher, student, 0.9)  # 0.9 * 1 + 0.1 * 2
    assert teacher.weight.item() == pytest.approx(1.1)
    update_teacher(teacher, student, 0.5)  # 0.5 * 1.1 + 0.5 * 2
    assert teacher.weight.item() == pytest.approx(1.55)


def test_sinkhorn_knopp_balances_and_stays_near_the_softmax_where_it_is_balanced() -> None:
    torch.manual_seed(0)
    q = sinkhorn_knopp(torch.randn(64, 8), temperature=1.0, iterations=50)
    torch.testing.assert_close(q.sum(1), torch.ones(64))
    torch.testing.assert_close(q.sum(0), torch.full((8,), 8.0), atol=1e-3, rtol=0)
    balanced = torch.eye(4)
    torch.testing.assert_close(sinkhorn_knopp(balanced, 0.5), (balanced / 0.5).softmax(-1))


def test_sinkhorn_knopp_equals_the_alternating_scaling_of_the_paper() -> None:
    """Rows and columns scaled in turn from exp(logits / temperature), three times, as in SwAV's algorithm 1."""
    logits = np.random.default_rng(0).normal(size=(6, 3))
    q = np.exp(logits / 0.5).T
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(1, keepdims=True) * 3
        q /= q.sum(0, keepdims=True) * 6
    np.testing.assert_allclose(sinkhorn_knopp(torch.from_numpy(logits), 0.5).numpy(), (q * 6).T, rtol=1e-5)


def backbone() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(16, 2, 2, patch=4, image_size=8)


def test_head_output_is_cosine_similarity_to_the_prototypes() -> None:
    torch.manual_seed(0)
    head = DINOHead(16, prototypes=10, hidden=12, bottleneck=6)
    x = torch.randn(4, 16)
    weight = head.last_layer.weight
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(10))
    cosine = torch.nn.functional.cosine_similarity(head.mlp(x)[:, None], weight[None], dim=-1)
    torch.testing.assert_close(head(x), cosine, atol=1e-5, rtol=1e-4)
    assert sum(p.requires_grad for p in head.last_layer.parameters()) == 1
    assert all(p.requires_grad for p in DINOHead(16, 10, 12, 6, norm_last_layer=False).parameters())


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_head_reads_what_pool_says(pool: str) -> None:
    model = DINOModel(backbone(), DINOHead(16, 5, 8, 4), pool)  # type: ignore[arg-type]
    crops = [torch.randn(2, 3, 8, 8), torch.randn(3, 3, 4, 4)]
    tokens = model.backbone(crops)
    pooled = torch.cat([t[:, 0] if pool == "cls" else t[:, 1:].mean(1) for t in tokens])
    torch.testing.assert_close(model(crops), Outputs(model.head(pooled), pooled))


def test_teacher_starts_as_the_student_and_gets_no_gradient() -> None:
    student = DINOModel(backbone(), DINOHead(16, 5, 8, 4))
    teacher = make_teacher(student)
    for a, b in zip(teacher.parameters(), student.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not a.requires_grad
        assert a is not b
    assert not teacher.training


def test_collapse_is_named_with_a_remedy() -> None:
    k = 1024
    uniform = math.log(k)
    assert "--model.pool mean" in (diagnose_collapse(uniform, uniform, 0.0, uniform, k) or "")
    assert "sinkhorn" in (diagnose_collapse(0.01, 0.0, 0.01, 0.02, k) or "")
    assert "says the same of all images" in (diagnose_collapse(5.0, 3.0, 2.0, 3.001, k) or "")
    assert diagnose_collapse(5.0, 3.0, 2.0, 6.0, k) is None


def test_usage_entropy_is_zero_when_all_images_share_a_prototype_and_ln_k_when_they_spread() -> None:
    objective = DINOLoss(4)
    same = torch.tensor([[10.0, 0, 0, 0]] * 4)
    assert objective(torch.zeros(8, 4), same, 4, 0.04).usage_entropy.item() == pytest.approx(0, abs=1e-4)
    spread = 10 * torch.eye(4)
    assert objective(torch.zeros(4, 4), spread, 2, 0.04).usage_entropy.item() == pytest.approx(math.log(4), abs=1e-4)
