"""Measures of conditioning against automatic differentiation, NumPy, SciPy and calculations by hand."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from skipless.eval import spectra as jacobians
from skipless.eval.spectra import (
    AttentionJacobian,
    attention_singular_values,
    estimate_singular_values,
    golub_kahan,
    inverse_of_square,
    jacobian_conditioning,
    mlp_singular_values,
    share_below,
    smallest_singular_value,
)
from skipless.ssl.model.initialization import PRESETS, skipless_init_
from skipless.ssl.model.statistics import (
    attention_entropy,
    attention_logits,
    branch_inputs,
    cheap_conditioning,
    diagonal_gap,
    diagonal_margin,
    diagonal_share,
    excess_kurtosis,
    gradient_norms,
    token_statistics,
    value_output_singular_values,
)
from skipless.ssl.model.vit import Block, VisionTransformer

D, HEADS, TOKENS = 24, 3, 10


def small_model(
    residual: bool = False, preset: str | None = None, diagonal: float | None = None, **kwargs: object
) -> VisionTransformer:
    """24 wide, 3 heads, two blocks, 9 patches and CLS; biases are not zero, as after training.

    `diagonal`: W_Q = W_K = so many times the identity, which makes attention diagonal.
    """
    torch.manual_seed(0)
    model = VisionTransformer(D, 2, HEADS, patch=4, residual=residual, image_size=12, **kwargs)  # type: ignore[arg-type]
    if preset:
        skipless_init_(model, **PRESETS[preset])
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
        if diagonal and name.endswith("qkv.weight"):
            parameter.data[: 2 * D] = diagonal * torch.eye(D).repeat(2, 1)
    return model.eval().double().requires_grad_(False)


def normalized_tokens(count: int = TOKENS, spread: float = 1.0) -> Tensor:
    """Tokens as a LayerNorm leaves them; with a small spread they are alike."""
    generator = torch.Generator().manual_seed(1)
    common, own = (torch.randn(n, D, generator=generator, dtype=torch.float64) for n in (1, count))
    return torch.nn.functional.layer_norm(common + spread * own, (D,))


def first_block(model: VisionTransformer) -> Block:
    block = model.blocks[0]
    assert isinstance(block, Block)
    return block


def branch_jacobian(block: Block, tokens: Tensor, branch: str) -> np.ndarray:
    """By torch's reverse mode through the model's own attention or MLP: [N * D, N * D]."""

    def attention(x: Tensor) -> Tensor:
        return block.ls1(block.attn(x, ((1, len(x)),), "sdpa"))

    def mlp(x: Tensor) -> Tensor:
        return block.ls2(block.mlp(x))

    jacobian = torch.autograd.functional.jacobian(attention if branch == "attention" else mlp, tokens)
    return jacobian.reshape(tokens.numel(), tokens.numel()).numpy()  # type: ignore[union-attr]


def estimate(monkeypatch: pytest.MonkeyPatch, factorized: int = 0) -> None:
    """No Jacobian is decomposed; those of up to `factorized` rows are factorized."""
    monkeypatch.setattr(jacobians, "DECOMPOSED", 0)
    monkeypatch.setattr(jacobians, "FACTORIZED", factorized)


MODELS = {
    "attention diagonal": ({"preset": "small", "diagonal": 2.0}, 100.0),
    "ours": ({"preset": "small"}, 1.0),
    "paper's": ({"preset": "paper-dino"}, 1.0),
    "shaped": ({"preset": "small", "shaped": True}, 1.0),
    "default, residual": ({"residual": True}, 1.0),
    "layer scale": ({"residual": True, "layer_scale": 0.1}, 1.0),
    "tokens alike": ({"preset": "paper-dino"}, 0.03),
}


@pytest.mark.parametrize("name", MODELS)
def test_attention_jacobian_is_that_of_the_model(name: str) -> None:
    arguments, spread = MODELS[name]
    block, tokens = first_block(small_model(**arguments)), normalized_tokens(spread=spread)  # type: ignore[arg-type]
    expected = branch_jacobian(block, tokens, "attention")
    jacobian = AttentionJacobian(block, tokens)
    np.testing.assert_allclose(jacobian.whole(), expected, atol=1e-12)
    y = torch.randn(tokens.numel(), dtype=torch.float64)
    np.testing.assert_allclose(jacobian.transposed(y), expected.T @ y.numpy(), atol=1e-11)
    with_skip = AttentionJacobian(block, tokens, skip=True)
    np.testing.assert_allclose(with_skip.whole(), expected + np.eye(len(expected)), atol=1e-12)
    np.testing.assert_allclose(with_skip.transposed(y), expected.T @ y.numpy() + y.numpy(), atol=1e-11)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("steps", "factorized"), [(240, 0), (60, 240)])
def test_estimated_singular_values_are_the_exact_ones(
    steps: int, factorized: int, name: str, skip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For condition numbers of 1.1 to 10^7: with as many steps as there are singular values, or with the inverse."""
    estimate(monkeypatch, factorized)
    arguments, spread = MODELS[name]
    block, tokens = first_block(small_model(**arguments)), normalized_tokens(spread=spread)  # type: ignore[arg-type]
    matrix = branch_jacobian(block, tokens, "attention") + skip * np.eye(tokens.numel())
    exact = np.linalg.svd(matrix, compute_uv=False)
    result = attention_singular_values(block, tokens, skip, steps)
    assert result.largest == pytest.approx(exact[0], rel=1e-3)
    assert result.smallest == pytest.approx(exact[-1], rel=0.05)
    assert result.condition == pytest.approx(exact[0] / exact[-1], rel=0.05)
    assert not result.bound
    assert result.small_share == pytest.approx((exact < 0.01 * exact[0]).mean(), abs=result.share_error)
    assert result.share_error < 0.2


@pytest.mark.parametrize("diagonal", [2.0, 3.0, 4.0])
def test_a_few_steps_are_enough_where_attention_is_diagonal(diagonal: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """50 and 25 steps for 240 singular values, at condition numbers of 5,000 to 60,000: the preconditioner's doing."""
    estimate(monkeypatch)
    block, tokens = first_block(small_model(preset="small", diagonal=diagonal)), normalized_tokens(spread=100)
    exact = np.linalg.svd(branch_jacobian(block, tokens, "attention"), compute_uv=False)
    result = attention_singular_values(block, tokens, steps=50)
    assert not result.bound
    assert result.smallest == pytest.approx(exact[-1], rel=0.05)
    assert result.largest == pytest.approx(exact[0], rel=1e-3)


def test_what_too_few_steps_leave_unknown_is_called_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    estimate(monkeypatch)
    block, tokens = first_block(small_model(residual=True)), normalized_tokens()
    exact = np.linalg.svd(branch_jacobian(block, tokens, "attention"), compute_uv=False)
    result = attention_singular_values(block, tokens, steps=12)
    assert result.bound
    assert exact[-1] < result.smallest
    assert result.condition < exact[0] / exact[-1]
    assert result.largest <= exact[0] * (1 + 1e-9)
    assert exact[0] <= result.largest * (1 + result.largest_error)
    whole = (exact < 0.01 * exact[0]).mean()
    assert result.small_share == pytest.approx(whole, abs=result.share_error)


def test_small_jacobians_are_computed_whole() -> None:
    block, tokens = first_block(small_model(preset="small")), normalized_tokens()
    exact = np.linalg.svd(branch_jacobian(block, tokens, "attention"), compute_uv=False)
    result = attention_singular_values(block, tokens, steps=1)
    assert (result.smallest, result.largest) == pytest.approx((exact[-1], exact[0]), rel=1e-9)
    assert result.small_share == (exact < 0.01 * exact[0]).mean()


@settings(max_examples=25)
@given(st.lists(st.floats(-8, 2), min_size=12, max_size=60), st.integers(0, 10**6), st.integers(4, 40))
@example(exponents=[0.0] * 12, seed=0, steps=4)  # an orthogonal matrix: the first direction is all there is to see
def test_the_ends_of_any_spectrum_are_bounded_as_stated(exponents: list[float], seed: int, steps: int) -> None:
    """A matrix made of random orthogonal ones and given singular values, over up to ten decades."""
    rng = np.random.default_rng(seed)
    values = 10.0 ** np.array(exponents)
    u, v = (scipy.stats.ortho_group.rvs(len(values), random_state=rng) for _ in range(2))
    matrix = torch.from_numpy(u @ np.diag(values) @ v)
    start = torch.from_numpy(rng.normal(size=len(values)))
    result = estimate_singular_values(lambda x: matrix @ x, lambda y: matrix.T @ y, lambda x: x, start, steps)
    exact = np.linalg.svd(matrix.numpy(), compute_uv=False)
    rounding = 1e-13 * exact[0]
    assert result.smallest >= exact[-1] - rounding
    assert result.largest <= exact[0] + rounding
    if not result.bound:  # a singular value is where it is said to be
        nearest = np.abs(exact - result.smallest).min()
        assert nearest <= result.smallest_error * result.smallest + rounding


@settings(max_examples=25)
@given(st.lists(st.floats(-3, 0), min_size=12, max_size=60), st.integers(0, 10**6), st.integers(2, 30))
def test_the_share_that_a_start_sees_is_bounded(exponents: list[float], seed: int, steps: int) -> None:
    """The weights of a start's components, squared, below any threshold: known here, as the matrix is diagonal."""
    values = 10 * torch.tensor(exponents, dtype=torch.float64).exp()
    start = torch.from_numpy(np.random.default_rng(seed).normal(size=len(values)))
    bidiagonal, rest, _ = golub_kahan(lambda x: values * x, lambda y: values * y, start, steps)
    weights = start.square() / start.square().sum()
    for threshold in (1.0, 3.0, 7.0):
        share, error = share_below(threshold, bidiagonal, rest)
        assert share == pytest.approx(weights[values < threshold].sum().item(), abs=error + 1e-6)


def test_a_good_preconditioner_finds_a_singular_value_of_1e_minus_10() -> None:
    rng = np.random.default_rng(0)
    values = np.geomspace(1, 1e-10, 300)
    u, v = (scipy.linalg.qr(rng.normal(size=(300, 300)))[0] for _ in range(2))
    matrix = torch.from_numpy(u @ np.diag(values) @ v.T)
    inverse = torch.from_numpy(v @ np.diag(rng.uniform(0.5, 2, 300) / values) @ u.T)
    smallest, _ = smallest_singular_value(
        lambda x: matrix @ x,
        lambda y: matrix.T @ y,
        lambda x: inverse @ (inverse.T @ x),
        [torch.from_numpy(rng.normal(size=300))],
        1.0,
        steps=60,
    )
    assert smallest == pytest.approx(np.linalg.svd(matrix.numpy(), compute_uv=False)[-1], rel=0.05)


def test_a_singular_value_of_zero_is_a_bound() -> None:
    values = torch.linspace(0, 1, 40, dtype=torch.float64)
    result = estimate_singular_values(
        lambda x: values * x, lambda y: values * y, lambda x: x, torch.randn(40, dtype=torch.float64), steps=40
    )
    assert result.bound
    assert (result.smallest, result.condition) == pytest.approx((1e-14, 1e14), rel=1e-6, abs=0)
    singular = inverse_of_square(torch.ones(4, 4, dtype=torch.float64))
    assert singular(torch.arange(4.0, dtype=torch.float64)).isfinite().all()


def test_few_different_singular_values_need_few_steps() -> None:
    """Three hundred singular values, all 5 or 0.01: two steps see them all, and the shares to the draw's precision."""
    values = torch.tensor([5.0] * 240 + [0.01] * 60, dtype=torch.float64)
    start = torch.randn(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = estimate_singular_values(lambda x: values * x, lambda y: values * y, lambda x: x, start, steps=50)
    assert (result.smallest, result.largest) == pytest.approx((0.01, 5))
    assert not result.bound
    assert result.largest_error == 0
    assert result.small_share == pytest.approx(0.2, abs=0.1)


@pytest.mark.parametrize(("decomposed", "factorized"), [(240, 0), (0, 240), (0, 0)])
def test_singular_jacobians_are_told_from_others(
    decomposed: int, factorized: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tokens the same: attention passes on nothing but their mean, and D of N * D singular values are not 0."""
    monkeypatch.setattr(jacobians, "DECOMPOSED", decomposed)
    monkeypatch.setattr(jacobians, "FACTORIZED", factorized)
    block = first_block(small_model(preset="small"))
    tokens = normalized_tokens(1).expand(TOKENS, D)
    result = attention_singular_values(block, tokens)
    assert result.bound
    assert result.condition == pytest.approx(1e14, rel=0.9)
    assert result.small_share == pytest.approx(1 - 1 / TOKENS, abs=max(result.share_error, 1e-9))
    assert result.share_error < 0.1


def test_nothing_comes_out_of_a_branch_of_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(residual=True, layer_scale=0.0)
    for whole in (10**6, 0):
        monkeypatch.setattr(jacobians, "DECOMPOSED", whole)
        result = attention_singular_values(first_block(model), normalized_tokens())
        assert (result.largest, result.smallest, result.bound) == (0, 0, True)
        assert math.isfinite(result.condition)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_mlp_singular_values_are_the_exact_ones(name: str, skip: bool) -> None:
    block, tokens = first_block(small_model(**MODELS[name][0])), normalized_tokens()  # type: ignore[arg-type]
    matrix = branch_jacobian(block, tokens, "mlp") + skip * np.eye(tokens.numel())
    exact = np.linalg.svd(matrix, compute_uv=False)
    result = mlp_singular_values(block, tokens, skip)
    assert (result.smallest, result.largest) == pytest.approx((exact[-1], exact[0]), rel=1e-6)
    assert result.small_share == pytest.approx((exact < 0.01 * exact[0]).mean())
    assert not result.bound


@pytest.mark.parametrize("preset", ["paper-dino", "paper-supervised", "small"])
def test_value_output_product_is_perfectly_conditioned_at_the_start(preset: str) -> None:
    for block in small_model(preset=preset).blocks:
        assert isinstance(block, Block)
        values = value_output_singular_values(block)
        assert (values[0] / values[-1]).item() == pytest.approx(1, abs=1e-5)
        assert values[0].item() == pytest.approx(9, rel=1e-5)  # c^2


def test_value_output_product_is_summed_over_the_heads() -> None:
    block = first_block(small_model(residual=True, layer_scale=1.0))
    torch.nn.init.uniform_(block.ls1.gamma, 0.1, 2)  # type: ignore[arg-type]
    w_v, w_o = block.attn.qkv.weight[2 * D :].T.numpy(), block.attn.proj.weight.T.numpy()
    head = D // HEADS
    product = sum(w_v[:, h * head : (h + 1) * head] @ w_o[h * head : (h + 1) * head] for h in range(HEADS))
    expected = np.linalg.svd(product * block.ls1.gamma.numpy(), compute_uv=False)  # type: ignore[operator]
    np.testing.assert_allclose(value_output_singular_values(block), expected, atol=1e-12)


def test_attention_of_queries_and_keys_made_by_hand() -> None:
    """Tokens along the axes. Without queries attention is uniform; with large equal ones it is the identity."""
    block, n = first_block(small_model()), 8
    tokens = torch.eye(n, D, dtype=torch.float64)[None] * D**0.5
    uniform, identity, opposite = (1 / n, 1.0, 0.0), (1.0, 0.0), (0.0, 1.0)
    block.attn.qkv.bias.zero_()
    query, key, _ = block.attn.qkv.weight.view(3, HEADS, D // HEADS, D).unbind()
    query.zero_()
    maps = attention_logits(block, tokens).softmax(-1)
    assert attention_entropy(maps).numpy() == pytest.approx(np.ones((1, HEADS)))
    assert diagonal_share(maps).numpy() == pytest.approx(np.full((1, HEADS), uniform[0]))
    for factor, (share, entropy) in ((10.0, identity), (-10.0, opposite)):
        query[:], key[:] = factor * torch.eye(D // HEADS, D), 10 * torch.eye(D // HEADS, D)
        maps = attention_logits(block, tokens).softmax(-1)
        assert diagonal_share(maps).numpy() == pytest.approx(np.full((1, HEADS), share), abs=1e-9)
        expected = entropy * math.log(n - 1) / math.log(n)  # all others alike, nothing on itself
        assert attention_entropy(maps).numpy() == pytest.approx(np.full((1, HEADS), expected), abs=1e-9)


def test_attention_logits_are_those_of_the_model() -> None:
    """softmax(logits) V W_O is the attention's output."""
    block, tokens = first_block(small_model(preset="small")), normalized_tokens()
    maps = attention_logits(block, tokens[None]).softmax(-1)[0]
    _, _, v = block.attn.split(tokens)
    output = block.attn.proj((maps @ v.transpose(0, 1)).transpose(0, 1).flatten(1))
    torch.testing.assert_close(output, block.attn(tokens, ((1, TOKENS),), "sdpa"))


def test_diagonal_dominance_by_hand() -> None:
    logits = torch.tensor([[3.0, -1, -2], [0, 2, 4], [1, 1, 1]])
    assert diagonal_gap(logits).item() == pytest.approx((4.5 + 0 + 0) / 3)
    assert diagonal_margin(logits).item() == pytest.approx((4 - 2 + 0) / 3)


def test_kurtosis_is_scipys() -> None:
    tokens = torch.from_numpy(np.random.default_rng(0).standard_t(5, size=(3, 17, 24)))
    tokens[0, 3, 5] = 100.0
    expected = scipy.stats.kurtosis(tokens.flatten(1).numpy(), axis=1)
    np.testing.assert_allclose(excess_kurtosis(tokens), expected, rtol=1e-10)
    assert expected[0] > 10


def test_diagonal_share_of_shaped_attention_is_that_of_its_whole_map() -> None:
    model = small_model(preset="small", shaped=True)
    for block in model.blocks:
        block.attn.qkv.bias.zero_()  # as at the start
    (first, _) = cheap_conditioning(model, torch.randn(2, 3, 12, 12, dtype=torch.float64))["diagonal_share"]
    assert first == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("arguments", [{"preset": "small", "registers": 2}, {"residual": True, "layer_scale": 0.3}])
def test_walk_goes_the_way_of_the_model(arguments: dict[str, object]) -> None:
    model = small_model(**arguments)  # type: ignore[arg-type]
    images = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    tokens = model.embed(images)
    for block, before, after in model.walk(tokens):
        torch.testing.assert_close(before, tokens, rtol=0, atol=0)
        attention_inputs, mlp_inputs = branch_inputs(block, before)
        torch.testing.assert_close(attention_inputs, block.norm1(before))
        groups = ((2, before.shape[1]),)
        branch = block.ls1(block.attn(attention_inputs.flatten(0, 1), groups, "sdpa")).view_as(before)
        attended = before + branch if block.residual else branch
        torch.testing.assert_close(mlp_inputs, block.norm2(attended))
        branch = block.ls2(block.mlp(mlp_inputs))
        torch.testing.assert_close(after, attended + branch if block.residual else branch)
        tokens = after
    torch.testing.assert_close(model.norm(tokens), model([images])[0])


def test_cheap_measures_are_averages_over_images() -> None:
    model = small_model(preset="paper-dino", registers=2)
    images = torch.randn(5, 3, 12, 12, dtype=torch.float64)
    result = cheap_conditioning(model, images)
    assert all(len(values) == 2 and all(map(math.isfinite, values)) for values in result.values())
    for name, values in token_statistics(model, images).items():
        assert result[name] == pytest.approx(values)
    outputs = [after for _, _, after in model.walk(model.embed(images))]
    kurtosis = [scipy.stats.kurtosis(x.flatten(1).numpy(), axis=1).mean() for x in outputs]
    assert result["kurtosis"] == pytest.approx(kurtosis)
    assert result["value_output_condition"] == pytest.approx([1, 1], abs=1e-5)
    assert all(0 < entropy < 1 for entropy in result["attention_entropy"])


def test_gradient_norms_are_autograds() -> None:
    model = small_model(preset="small", registers=1)
    images = torch.randn(3, 3, 12, 12, dtype=torch.float64)
    direction = torch.randn(11, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    direction /= direction.norm()
    result = gradient_norms(model, images, seed=5)
    assert not any(parameter.requires_grad for parameter in model.parameters())

    model.requires_grad_(True)
    entering: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, arguments: entering.append(arguments[0]))
    parameters, tokens = np.zeros(2), np.zeros(2)
    for image in images.split(1):
        entering.clear()
        value = (model([image])[0][0] * direction).sum()
        tokens += [gradient.norm().item() for gradient in torch.autograd.grad(value, entering, retain_graph=True)]
        model.zero_grad()
        value.backward()
        for number, block in enumerate(model.blocks):
            squares = [parameter.grad.square().sum().item() for parameter in block.parameters()]  # type: ignore[union-attr]
            parameters[number] += sum(squares) ** 0.5
    assert result["parameter_gradient"] == pytest.approx(parameters / 3)
    assert result["token_gradient"] == pytest.approx(tokens / 3)


def test_jacobians_of_all_blocks() -> None:
    """Two images: geometric means. K + I for residual models alone. The model stays in float32."""
    images = torch.randn(2, 3, 12, 12)
    model = small_model(residual=True).float()
    blocks: list[int] = []
    result = jacobian_conditioning(model, images, mlp_tokens=20, done=lambda: blocks.append(1))
    assert len(blocks) == 2
    assert next(model.parameters()).dtype == torch.float32
    model, images = model.double(), images.double()
    for number, (block, before, _) in enumerate(model.walk(model.embed(images))):
        attention_inputs, mlp_inputs = branch_inputs(block, before)
        for name, skip in (("attention", False), ("attention_skip", True)):
            ends = []
            for image in attention_inputs:
                matrix = branch_jacobian(block, image, "attention") + skip * np.eye(image.numel())
                values = np.linalg.svd(matrix, compute_uv=False)
                ends.append((values[0], values[-1]))
            largest, smallest = np.exp(np.log(ends).mean(0))
            assert result[f"{name}_largest"][number] == pytest.approx(largest)
            assert result[f"{name}_smallest"][number] == pytest.approx(smallest, rel=1e-3)
            assert result[f"{name}_condition"][number] == pytest.approx(largest / smallest, rel=1e-3)
        exact = np.linalg.svd(branch_jacobian(block, mlp_inputs.flatten(0, 1), "mlp"), compute_uv=False)
        assert result["mlp_smallest"][number] == pytest.approx(exact[-1], rel=1e-6)  # all 20 tokens were drawn
        assert result["mlp_largest"][number] == pytest.approx(exact[0])
    assert not any("skip" in name for name in jacobian_conditioning(small_model(preset="small"), images.float(), 2))
