"""The Vision Transformer against timm's, and its own promises: packing, positions, features."""

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skipless.ssl.model.attention import attention, choose_backend
from skipless.ssl.model.vit import SIZES, VisionTransformer, vit_small, vit_tiny


@pytest.fixture(scope="module")
def timm_vit() -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True).eval()
    for parameter in model.parameters():  # so that biases, norms and positions matter
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def ours(timm_vit: torch.nn.Module) -> VisionTransformer:
    model = vit_tiny(patch=16, residual=True).eval()
    model.load_state_dict(timm_vit.state_dict())
    return model


def cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel with a = -0.75."""
    x, a = abs(x), -0.75
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def bicubic(grid: np.ndarray, h: int, w: int, scale_h: float, scale_w: float) -> np.ndarray:
    """Bicubic interpolation of [n, m, D] with half-pixel centers, edges repeated, at a given scale factor."""

    def matrix(size: int, n: int, scale: float) -> np.ndarray:
        weights = np.zeros((size, n))
        for i in range(size):
            center = (i + 0.5) / scale - 0.5
            for j in range(int(np.floor(center)) - 1, int(np.floor(center)) + 3):
                weights[i, min(max(j, 0), n - 1)] += cubic(np.array(center - j))
        return weights

    rows, columns = matrix(h, grid.shape[0], scale_h), matrix(w, grid.shape[1], scale_w)
    return np.einsum("in,jm,nmd->ijd", rows, columns, grid)


def test_residual_model_equals_timm_at_native_size(timm_vit: torch.nn.Module, ours: VisionTransformer) -> None:
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours([images])[0], timm_vit.forward_features(images), atol=1e-5, rtol=0)


def test_names_that_others_use_give_what_theirs_give(timm_vit: torch.nn.Module, ours: VisionTransformer) -> None:
    images = torch.randn(2, 3, 224, 224)
    assert ours.embed_dim == timm_vit.embed_dim == 192
    with torch.no_grad():
        for tokens in (ours(images), ours.forward_features(images)):
            torch.testing.assert_close(tokens, timm_vit.forward_features(images), atol=1e-5, rtol=0)
        for n, reshape, norm in ((2, False, True), ([0, 5], True, False)):
            layers = ours.get_intermediate_layers(images, n, reshape, norm=norm)
            theirs = timm_vit.get_intermediate_layers(images, n, reshape, norm=norm)
            for layer, expected in zip(layers, theirs, strict=True):
                torch.testing.assert_close(layer, expected, atol=1e-5, rtol=1e-5)
        ((patches, cls),) = ours.get_intermediate_layers(images, return_class_token=True)
        torch.testing.assert_close(
            torch.cat([cls[:, None], patches], 1), timm_vit.forward_features(images), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize(("height", "width"), [(96, 96), (160, 272)])
def test_other_sizes_interpolate_as_dino_and_equal_timm_given_those_positions(
    timm_vit: torch.nn.Module, ours: VisionTransformer, height: int, width: int
) -> None:
    h, w, n = height // 16, width // 16, 14
    native = ours.pos_embed[0, 1:].detach().double().numpy().reshape(n, n, -1)
    expected = bicubic(native, h, w, (h + 0.1) / n, (w + 0.1) / n)
    positions = ours.positions(h, w).detach()
    np.testing.assert_allclose(positions.numpy(), expected.reshape(h * w, -1), atol=1e-5)

    images = torch.randn(2, 3, height, width)
    other = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=(height, width)).eval()
    state = dict(timm_vit.state_dict())
    state["pos_embed"] = torch.cat([ours.pos_embed[:, :1], positions[None]], dim=1)
    other.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(ours([images])[0], other.forward_features(images), atol=1e-5, rtol=0)


def test_antialiased_positions_have_the_exact_size() -> None:
    """DINOv2 with registers: the same grid as torch's antialiased bicubic resize."""
    model = VisionTransformer(32, 1, 2, patch=4, image_size=32, position_offset=0.0, position_antialias=True)
    torch.nn.init.normal_(model.pos_embed)
    grid = model.pos_embed[0, 1:].detach().unflatten(0, (8, 8)).permute(2, 0, 1)
    import torchvision.transforms.v2.functional as tv

    expected = tv.resize(grid, [5, 3], tv.InterpolationMode.BICUBIC, antialias=True)
    torch.testing.assert_close(model.positions(5, 3).detach(), expected.flatten(1).T, atol=1e-5, rtol=0)


def small_model(residual: bool, **kwargs: object) -> VisionTransformer:
    torch.manual_seed(1)
    model = VisionTransformer(32, 3, 4, patch=4, residual=residual, image_size=16, **kwargs)  # type: ignore[arg-type]
    for parameter in model.parameters():  # large enough for tokens to differ
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize(("residual", "shaped"), [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize("registers", [0, 2])
def test_packed_forward_and_backward_equal_one_size_at_a_time(residual: bool, shaped: bool, registers: int) -> None:
    model = small_model(residual, registers=registers, shaped=shaped)
    crops = [torch.randn(2, 3, 16, 16), torch.randn(3, 3, 8, 8), torch.randn(1, 3, 8, 20)]
    weights = [torch.randn(b, 1 + registers + n, 32) for b, n in ((2, 16), (3, 4), (1, 10))]

    def run(outputs: list[torch.Tensor]) -> list[torch.Tensor]:
        model.zero_grad()
        sum((o * w).sum() for o, w in zip(outputs, weights, strict=True)).backward()  # type: ignore[union-attr]
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    packed = model(crops)
    packed_gradients = run(packed)
    separate = [model([c])[0] for c in crops]
    for a, b in zip(packed, separate, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    for a, b in zip(packed_gradients, run(separate), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 6)), min_size=1, max_size=4), st.integers(1, 3))
def test_attention_of_a_packed_batch_is_softmax_within_each_sequence(groups: list[tuple[int, int]], heads: int) -> None:
    total = sum(b * length for b, length in groups)
    q, k, v = torch.randn(3, total, heads, 8, dtype=torch.float64).unbind(0)
    sequence = torch.cat([torch.arange(b * n) // n + 100 * i for i, (b, n) in enumerate(groups)])
    logits = torch.einsum("ihd,jhd->hij", q, k) / 8**0.5
    logits[:, sequence[:, None] != sequence[None, :]] = -torch.inf
    expected = torch.einsum("hij,jhd->ihd", logits.softmax(-1), v).flatten(1)
    torch.testing.assert_close(attention(q, k, v, tuple(groups), "sdpa"), expected)


@pytest.mark.parametrize("shaped", [False, True])
def test_skipless_block_is_attention_then_mlp_and_nothing_else(shaped: bool) -> None:
    block = small_model(residual=False, shaped=shaped).blocks[0].double()
    x = torch.randn(5, 32, dtype=torch.float64)
    q, k, v = block.attn.qkv(block.norm1(x)).view(5, 3, 4, 8).permute(1, 2, 0, 3)
    maps = (q @ k.mT / 8**0.5).softmax(-1) + shaped * (torch.eye(5) - 1 / 5)
    mixed = (maps @ v).transpose(0, 1).reshape(5, 32)
    y = block.attn.proj(mixed)
    hidden = torch.nn.functional.gelu(block.mlp.fc1(block.norm2(y)))
    torch.testing.assert_close(block(x, ((1, 5),), "sdpa"), block.mlp.fc2(hidden))


@pytest.mark.parametrize("residual", [True, False])
def test_features_are_what_the_blocks_compute(residual: bool) -> None:
    model = small_model(residual, registers=1).eval()
    images = torch.randn(2, 3, 16, 24)
    outputs: list[torch.Tensor] = []
    normed: list[torch.Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _m, _i, out: outputs.append(out))
        block.norm1.register_forward_hook(lambda _m, _i, out: normed.append(out))
    with torch.no_grad():
        tokens = model([images])[0]
        outputs_of_forward, normed_of_forward = outputs[:3], normed[:3]
        last, first = model.features(images, blocks=(-1, 0))
        torch.testing.assert_close(last.patches.flatten(1, 2), tokens[:, 2:])
        torch.testing.assert_close(last.cls, tokens[:, 0])
        raw = model.features(images, blocks=(0,), norm=False)[0]
        torch.testing.assert_close(raw.cls, outputs_of_forward[0].unflatten(0, (2, 26))[:, 0])
        torch.testing.assert_close(first.cls, model.norm(raw.cls))
        for number, kind in enumerate(("queries", "keys", "values")):
            weight = model.blocks[1].attn.qkv.weight[32 * number : 32 * (number + 1)]
            bias = model.blocks[1].attn.qkv.bias[32 * number : 32 * (number + 1)]
            by_hand = (normed_of_forward[1] @ weight.T + bias).unflatten(0, (2, 26))[:, 2:]
            features = model.features(images, blocks=(1,), kind=kind)[0]  # type: ignore[arg-type]
            assert features.patches.shape == (2, 4, 6, 32)
            torch.testing.assert_close(features.patches.flatten(1, 2), by_hand)


def test_checkpointed_activations_change_no_gradient() -> None:
    gradients = []
    for flag in (False, True):
        model = small_model(residual=False, checkpoint_activations=flag)
        model([torch.ones(1, 3, 16, 16)])[0].square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_drop_path_drops_whole_crops_and_keeps_the_mean() -> None:
    model = small_model(residual=True, drop_path=0.5)
    assert [round(block.drop_path, 3) for block in model.blocks] == [0.0, 0.25, 0.5]
    torch.manual_seed(0)
    block, x = model.blocks[2], torch.ones(3000, 32)
    kept = block._drop(x, ((500, 4), (1000, 1)))
    per_crop = kept[:2000].unflatten(0, (500, 4))
    assert ((per_crop == 0).all((1, 2)) | (per_crop == 2).all((1, 2))).all()
    assert kept.mean().item() == pytest.approx(1.0, abs=0.1)
    model.eval()
    assert block._drop(x, ((3000, 1),)) is x


def test_flops_equal_torchs_counter() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = VisionTransformer(64, 2, 2, patch=8, image_size=64)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model([torch.randn(1, 3, 48, 32)])
    assert model.flops(48, 32) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_usual_sizes_have_the_published_number_of_parameters() -> None:
    """ViT-Ti, S, B, L, H with 16 (H: 14) pixel patches at 224, in millions, as timm and the papers give them."""
    published = {"tiny": 5.5, "small": 21.7, "base": 85.8, "large": 303.3, "huge": 630.8, "giant": 1011.2}
    for size, millions in published.items():
        with torch.device("meta"):
            model = VisionTransformer(**SIZES[size], patch=14 if size in ("huge", "giant") else 16)
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.005)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"residual": False, "drop_path": 0.1}, ("drop_path", "residual=False")),
        ({"residual": False, "layer_scale": 1e-5}, ("layer_scale", "residual=False")),
        ({"heads": 5}, ("dim 32", "heads 5")),
        ({"image_size": 30}, ("image_size 30", "patch 4")),
        ({"depth": 0}, ("depth is 0",)),
    ],
)
def test_contradicting_settings_are_named(arguments: dict, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        VisionTransformer(**({"dim": 32, "depth": 1, "heads": 4, "patch": 4, "image_size": 32} | arguments))
    assert all(word in str(error.value) for word in words)


def test_bad_input_is_named() -> None:
    model = small_model(residual=True)
    with pytest.raises(ValueError, match="18 x 16 pixels cannot be cut into patches of 4"):
        model([torch.zeros(1, 3, 18, 16)])
    with pytest.raises(ValueError, match="block 3 does not exist: this model has blocks 0 to 2"):
        model.features(torch.zeros(1, 3, 16, 16), blocks=(3,))
    with pytest.raises(ValueError, match="'key'; choose tokens, keys"):
        model.features(torch.zeros(1, 3, 16, 16), kind="key")  # type: ignore[arg-type]


def test_backend_choice_says_why() -> None:
    assert choose_backend("cpu") == (
        "sdpa",
        "torch SDPA, one call per crop size: xformers runs on CUDA only; torch's varlen attention runs on CUDA only",
    )
    assert choose_backend("cuda", "sdpa")[0] == "sdpa"
    with pytest.raises(ValueError, match="xformers runs on CUDA only"):
        choose_backend("cpu", "xformers")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA and xformers")
@pytest.mark.parametrize("residual", [True, False])
def test_xformers_equals_sdpa_within_bf16_rounding(residual: bool) -> None:
    pytest.importorskip("xformers")
    model = vit_small(residual=residual).cuda()
    crops = [torch.randn(4, 3, 224, 224).cuda(), torch.randn(8, 3, 96, 96).cuda()]
    with torch.no_grad():
        reference = [t.double() for t in small_reference(model, crops)]
        for name in ("xformers", "sdpa"):
            model.attention = name  # type: ignore[assignment]
            with torch.autocast("cuda", torch.bfloat16):
                outputs = model(crops)
            for a, b in zip(outputs, reference, strict=True):
                assert (a.double() - b).norm() / b.norm() < 0.02


def small_reference(model: VisionTransformer, crops: list[torch.Tensor]) -> list[torch.Tensor]:
    """The forward pass in float64."""
    import copy

    double = copy.deepcopy(model).double()
    double.attention = "sdpa"
    return double([c.double() for c in crops])
