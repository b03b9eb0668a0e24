"""Whitened patches against scikit-learn, positions against sines computed one by one, and both in a run."""

import math

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor, nn

from skipless.ssl.model.embedding import sine_positions_, whiten_patches_
from skipless.ssl.model.vit import VisionTransformer, vit_tiny


def photographs(count: int = 80, size: int = 16, seed: int = 0) -> Tensor:
    """Smooth noise [count, 3, size, size]: like photographs, mostly brightness."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, size // 4, size // 4, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")
    return smooth + smooth.mean(1, keepdim=True) + 0.1 * torch.randn(smooth.shape, generator=generator) + 0.3


def patches_of(images: Tensor, side: int) -> np.ndarray:
    """[patches, 3 * side * side], cut out one by one."""
    rows = [
        image[:, y : y + side, x : x + side].flatten()
        for image in images
        for y in range(0, image.shape[1] - side + 1, side)
        for x in range(0, image.shape[2] - side + 1, side)
    ]
    return torch.stack(rows).double().numpy()


def test_outputs_are_scikit_learns_whitened_components_but_for_a_rotation() -> None:
    images, proj = photographs(), nn.Conv2d(3, 10, 4, 4)
    whiten_patches_(proj, images, ridge=0)
    with torch.no_grad():
        ours = proj.double()(images.double()).flatten(2).mT.flatten(0, 1).numpy()
    patches = patches_of(images, 4)
    reference = PCA(10, whiten=True, svd_solver="full").fit_transform(patches)
    turn, *_ = np.linalg.lstsq(reference, ours, rcond=None)
    np.testing.assert_allclose(reference @ turn, ours, atol=1e-4)
    np.testing.assert_allclose(turn.T @ turn, np.eye(10), atol=2e-3)  # the reference divides by N - 1
    np.testing.assert_allclose(ours.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(np.cov(ours.T, bias=True), np.eye(10), atol=1e-4)


def test_more_channels_than_a_patch_has_values() -> None:
    images, proj = photographs(), nn.Conv2d(3, 30, 2, 2)
    whiten_patches_(proj, images, ridge=0)
    with torch.no_grad():
        tokens = proj(images).flatten(2).mT.flatten(0, 1)
    variances = torch.linalg.svdvals(tokens) ** 2 / len(tokens)
    torch.testing.assert_close(variances[:12], torch.full((12,), 30 / 12), rtol=1e-3, atol=0)
    assert (variances[12:] < 1e-6).all()


def test_what_hardly_occurs_is_not_blown_up() -> None:
    small = photographs(size=8)
    enlarged = nn.functional.interpolate(small, scale_factor=4, mode="bilinear")  # no fine detail at all
    proj = whiten_patches_(nn.Conv2d(3, 64, 8, 8), enlarged)
    gains = torch.linalg.svdvals(proj.weight.detach().flatten(1).double())
    variances = np.linalg.eigvalsh(np.cov(patches_of(enlarged, 8).T, bias=True))[::-1]
    # By hand: gains are as 1 / sqrt(variance + ridge), so no two are further apart than this.
    limit = math.sqrt((variances[0] + 0.01 * variances.mean()) / (0.01 * variances.mean()))
    assert variances[0] / variances[63] > 100 * limit**2  # without the ridge they would be
    assert gains[0] / gains[-1] < 1.001 * limit
    with torch.no_grad():
        assert proj(enlarged).square().mean().item() == pytest.approx(1, rel=1e-3)


def test_seed_decides_and_the_global_state_does_not() -> None:
    layers = [nn.Conv2d(3, 8, 4, 4) for _ in range(3)]
    before = torch.get_rng_state()
    a, b, c = (whiten_patches_(layer, photographs(), seed) for layer, seed in zip(layers, (3, 3, 4), strict=True))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a.weight, b.weight)
    assert not torch.allclose(a.weight, c.weight, atol=1e-2)
    torch.testing.assert_close(a.weight.flatten(1).T @ a.weight.flatten(1), c.weight.flatten(1).T @ c.weight.flatten(1))


@pytest.mark.parametrize(
    ("layer", "images", "message"),
    [
        (nn.Conv2d(3, 8, 4, 4), torch.ones(4, 3, 8, 8), "the 16 patches of 4 images are all the same"),
        (nn.Conv2d(3, 8, 4, 4), torch.ones(4, 3, 8, 8, dtype=torch.uint8), "images are torch.uint8"),
        (nn.Conv2d(3, 8, 4, 2), photographs(4), "is no patch embedding"),
        (nn.Conv2d(3, 8, 4, 4, padding=1), photographs(4), "is no patch embedding"),
        (nn.Conv2d(3, 8, 4, 4, bias=False), photographs(4), "is no patch embedding with a bias"),
        (nn.Conv2d(1, 8, 4, 4), photographs(4), "is no patch embedding"),
        (nn.Conv2d(3, 8, 4, 4, dilation=2), photographs(4), "is no patch embedding"),
        (nn.Conv2d(3, 8, 4, 4), photographs(4)[:, :, :3], "hold no patch of 4 x 4 pixels"),
        (nn.Conv2d(3, 8, 4, 4), photographs(4) / 0, "all values finite"),
        (nn.Conv2d(3, 8, 4, 4), photographs(4)[:0], "hold no patch of 4 x 4 pixels"),
    ],
)
def test_what_cannot_be_whitened_is_named(layer: nn.Conv2d, images: Tensor, message: str) -> None:
    before = layer.weight.clone()
    with pytest.raises(ValueError, match=message):
        whiten_patches_(layer, images)
    assert torch.equal(layer.weight, before)


def test_a_model_in_place_of_its_layer_is_refused() -> None:
    model = VisionTransformer(8, 1, 2, patch=4, image_size=8)
    with pytest.raises(ValueError, match="is no patch embedding"):
        whiten_patches_(model, torch.rand(4, 3, 8, 8))  # type: ignore[arg-type]


def test_gray_images_have_fewer_components_and_no_infinite_weights() -> None:
    gray = photographs().mean(1, keepdim=True).expand(-1, 3, -1, -1)
    proj = whiten_patches_(nn.Conv2d(3, 30, 4, 4), gray, ridge=0)
    assert torch.linalg.matrix_rank(proj.weight.flatten(1), tol=1e-4) == 16  # 4 x 4 values instead of 48


def test_tokens_of_whitened_patches_differ_in_more_directions() -> None:
    images = photographs(size=32)
    torch.manual_seed(0)
    model = VisionTransformer(32, 1, 2, patch=4, residual=False, image_size=32)

    def participation() -> float:
        tokens = model.embed(images)[:, 1:].flatten(0, 1)
        variances = torch.linalg.svdvals(tokens - tokens.mean(0)) ** 2
        return (variances.sum() ** 2 / variances.square().sum()).item()

    with torch.no_grad():
        usual = participation()
        whiten_patches_(model.patch_embed.proj, images)
        assert participation() > 3 * usual


def test_positions_are_the_sines_and_cosines_of_row_and_column_less_their_mean() -> None:
    model = VisionTransformer(8, 1, 2, patch=4, residual=False, image_size=12)
    cls = model.pos_embed[:, 0].clone()
    sine_positions_(model)
    assert torch.equal(model.pos_embed[:, 0], cls)
    expected = np.array(
        [
            [f(place * frequency) for place in (row, column) for f in (math.sin, math.cos) for frequency in (1, 1e-2)]
            for row in range(3)
            for column in range(3)
        ]
    )
    expected -= expected.mean(0)
    got = model.pos_embed[0, 1:].detach().numpy()
    np.testing.assert_allclose(got, expected * 0.5 / np.sqrt((expected**2).mean()), atol=1e-6)


def test_positions_have_the_size_asked_for() -> None:
    model = sine_positions_(vit_tiny(depth=1, residual=False), std=0.5)
    assert model.pos_embed[0, 1:].square().mean().sqrt().item() == pytest.approx(0.5, rel=1e-5)
    one = sine_positions_(VisionTransformer(8, 1, 2, patch=4, image_size=4))
    assert (one.pos_embed[0, 1:] == 0).all()
    with pytest.raises(ValueError, match="dim is 6"):
        sine_positions_(VisionTransformer(6, 1, 2, patch=4, image_size=8))
