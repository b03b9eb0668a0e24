"""The initialization against its definition, on our models and on timm's; and the choice of beta."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.linalg
import timm
import torch

from skipless.common.settings import LATER
from skipless.ssl.model.build import ModelSettings, build_backbone
from skipless.ssl.model.initialization import PRESETS, choose_beta, query_key_matrices, rank_kept, skipless_init_
from skipless.ssl.model.vit import VisionTransformer, vit_tiny

D, HEADS, HEAD = 96, 3, 32


def fresh(**kwargs: object) -> VisionTransformer:
    torch.manual_seed(0)
    return skipless_init_(  # type: ignore[return-value]
        VisionTransformer(D, 2, HEADS, patch=4, residual=False, image_size=16),
        **kwargs,  # type: ignore[arg-type]
    )


def split_qkv(weight: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """W_Q, W_K, W_V in the row-vector convention (y = x W) from a fused `qkv.weight`."""
    q, k, v = weight.detach().double().numpy().reshape(3, -1, weight.shape[1])
    return q.T, k.T, v.T


@pytest.mark.parametrize("make", ["ours", "timm"])
def test_value_output_product_over_all_heads_has_condition_number_one(make: str) -> None:
    model = fresh(c=3.0) if make == "ours" else skipless_init_(timm.create_model("vit_tiny_patch16_224"), c=3.0)
    for block in model.blocks:
        w_v = split_qkv(block.attn.qkv.weight)[2]
        w_o = block.attn.proj.weight.detach().double().numpy().T
        d, heads = len(w_v), block.attn.num_heads
        # The sum over the heads, as attention computes it: columns of W_V with rows of W_O, head by head.
        product = sum(
            w_v[:, h * d // heads : (h + 1) * d // heads] @ w_o[h * d // heads : (h + 1) * d // heads]
            for h in range(heads)
        )
        assert np.linalg.cond(product) == pytest.approx(1, abs=1e-3)
        np.testing.assert_allclose(np.linalg.norm(product, 2), 9.0, rtol=1e-4)


def test_query_key_product_is_the_best_approximation_of_its_rank() -> None:
    """Eckart-Young: against SciPy's singular value decomposition of the same alpha Z + beta I."""
    alpha, beta = 1.8, 1.0
    w_q, w_k = query_key_matrices(D, HEADS, alpha, beta, torch.Generator().manual_seed(5))
    z = torch.randn(HEADS, D, D, generator=torch.Generator().manual_seed(5)).double().numpy() / D**0.5
    assert z.std() == pytest.approx(D**-0.5, rel=0.02)
    for head in range(HEADS):
        u, s, v_t = scipy.linalg.svd(alpha * z[head] + beta * np.eye(D))
        best = (u[:, :HEAD] * s[:HEAD]) @ v_t[:HEAD]
        columns = slice(head * HEAD, (head + 1) * HEAD)
        q, k = w_q[:, columns].double().numpy(), w_k[:, columns].double().numpy()
        np.testing.assert_allclose(q @ k.T, best, atol=1e-4)
        np.testing.assert_allclose(q.T @ q, np.diag(s[:HEAD]), atol=1e-3)  # both factors carry S^(1/2)
        np.testing.assert_allclose(k.T @ k, np.diag(s[:HEAD]), atol=1e-3)


def test_query_key_of_the_model_is_diagonally_dominant_with_beta() -> None:
    for beta, lowest, highest in ((0.0, -0.2, 0.2), (4.0, 0.8, 3.0)):
        w_q, w_k, _ = split_qkv(fresh(alpha=1.8, beta=beta).blocks[0].attn.qkv.weight)
        product = w_q[:, :HEAD] @ w_k[:, :HEAD].T
        assert lowest < np.trace(product) / D < highest


def test_suo_singular_values() -> None:
    """Orthogonal times max(1, sqrt(out / in)): 2 for the first layer (ratio 4), 1 for the second."""
    for block in fresh(mlp="suo").blocks:
        np.testing.assert_allclose(np.linalg.svd(block.mlp.fc1.weight.detach().numpy())[1], 2.0, rtol=1e-4)
        np.testing.assert_allclose(np.linalg.svd(block.mlp.fc2.weight.detach().numpy())[1], 1.0, rtol=1e-4)


def test_mirrored_mlp_is_an_orthogonal_map() -> None:
    for block in fresh(mlp="mirrored").blocks:
        with torch.no_grad():
            image_of_basis = block.mlp(torch.eye(D)).double().numpy()
            x = torch.randn(50, D)
            mapped = block.mlp(x).double().numpy()
        np.testing.assert_allclose(image_of_basis @ image_of_basis.T, np.eye(D), atol=1e-5)
        np.testing.assert_allclose(mapped, x.double().numpy() @ image_of_basis, atol=1e-5)  # linear


def test_each_part_can_be_left_out() -> None:
    torch.manual_seed(0)
    untouched = VisionTransformer(D, 2, HEADS, patch=4, residual=False, image_size=16)
    for parameter in untouched.parameters():
        torch.nn.init.normal_(parameter)
    state = {name: tensor.clone() for name, tensor in untouched.state_dict().items()}
    parts = {
        "value_output": {"attn.qkv.weight": slice(2 * D, 3 * D), "attn.proj.weight": slice(None)},
        "query_key": {"attn.qkv.weight": slice(0, 2 * D)},
        "mlp": {"mlp.fc1.weight": slice(None), "mlp.fc2.weight": slice(None)},
    }
    for part, changed in parts.items():
        untouched.load_state_dict(state)
        only = {"value_output": False, "query_key": False, "mlp": None} | {part: "suo" if part == "mlp" else True}
        skipless_init_(untouched, **only)  # type: ignore[arg-type]
        for name, tensor in untouched.state_dict().items():
            rows = next((rows for end, rows in changed.items() if name == f"blocks.1.{end}"), None)
            bias_of = name.removesuffix("bias") + "weight"
            if rows is None and name.endswith("bias"):
                rows = next((rows for end, rows in changed.items() if bias_of == f"blocks.1.{end}"), None)
                if rows is not None:
                    assert (tensor[rows] == 0).all()
            if "blocks.1" not in name:
                continue
            differs = (tensor != state[name]).flatten(1).any(1) if tensor.ndim > 1 else tensor != state[name]
            expected = torch.zeros_like(differs)
            if rows is not None:
                expected[rows] = True
            assert torch.equal(differs, expected), name


def test_shaped_attention_begins_as_the_identity_and_learns() -> None:
    model = skipless_init_(VisionTransformer(D, 2, HEADS, patch=4, residual=False, image_size=16, shaped=True))
    block, tokens = model.blocks[0], torch.randn(17, D)
    expected = block.attn.proj(block.attn.qkv(tokens).chunk(3, dim=1)[2])
    gathered = block.attn(tokens, ((1, 17),), "sdpa")
    assert (gathered - expected).norm() < 0.02 * expected.norm()
    (gathered * torch.randn(17, D)).sum().backward()
    of_queries, of_keys, of_values = (part.norm() for part in block.attn.qkv.weight.grad.chunk(3))
    assert min(of_queries, of_keys) > 0.001 * of_values  # attention that a large beta makes diagonal has next to none


def test_settings_that_came_later_say_what_earlier_runs_had() -> None:
    earlier = {
        "size", "dim", "depth", "heads", "patch", "residual", "init", "alpha", "beta", "c", "mlp", "pool", "registers",
        "layer_scale", "drop_path", "attention", "checkpoint_activations",
    }  # fmt: skip
    names = {field.name for field in dataclasses.fields(ModelSettings)} - earlier
    assert names == {name.removeprefix("model.") for name in LATER if name.startswith("model.")}


def test_seed_decides_and_the_global_state_does_not() -> None:
    a = fresh(seed=3).state_dict()
    model = vit_tiny(residual=False, depth=1)
    before = torch.get_rng_state()
    skipless_init_(model, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    b, c = fresh(seed=3).state_dict(), fresh(seed=4).state_dict()
    name = "blocks.1.mlp.fc1.weight"
    assert torch.equal(a[name], b[name])
    assert not torch.equal(a[name], c[name])


def test_presets_are_the_papers() -> None:
    assert PRESETS["paper-dino"] == {"alpha": 1.8, "beta": 1.0, "c": 3.0, "mlp": "suo"}
    assert PRESETS["paper-supervised"] == {"alpha": 2.0, "beta": 0.6, "c": 3.0, "mlp": "suo"}


def test_depth_scale_multiplies_the_logits_of_block_l_and_nothing_else() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(D, 4, HEADS, patch=4, residual=False, image_size=16)
    state = {name: tensor.clone() for name, tensor in skipless_init_(model).state_dict().items()}
    scaled = skipless_init_(model, depth_scale=8.0).state_dict()
    for block, factor in enumerate((1, 2, 4, 8)):
        name = f"blocks.{block}.attn.qkv.weight"
        q, k, v = split_qkv(state[name])
        scaled_q, scaled_k, scaled_v = split_qkv(scaled[name])
        for head in range(HEADS):
            columns = slice(head * HEAD, (head + 1) * HEAD)
            np.testing.assert_allclose(
                scaled_q[:, columns] @ scaled_k[:, columns].T, factor * q[:, columns] @ k[:, columns].T, atol=1e-3
            )
        np.testing.assert_array_equal(scaled_v, v)
    assert all(torch.equal(scaled[name], state[name]) for name in state if "qkv" not in name)
    for block, factor in ((model.blocks[0], 1.0), (fresh(depth_scale=8.0).blocks[1], 8.0)):  # of 4 blocks, of 2
        plain = fresh().blocks[0 if factor == 1 else 1]
        q, k, _ = split_qkv(block.attn.qkv.weight)
        plain_q, plain_k, _ = split_qkv(plain.attn.qkv.weight)
        np.testing.assert_allclose(
            q[:, :HEAD] @ k[:, :HEAD].T, factor * plain_q[:, :HEAD] @ plain_k[:, :HEAD].T, atol=1e-3
        )


def images(count: int = 6) -> torch.Tensor:
    """Smooth random images: patches that differ, but not as much as noise."""
    coarse = torch.randn(count, 3, 5, 5, generator=torch.Generator().manual_seed(2))
    return torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic")


def narrow(residual: bool = False) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(32, 6, 4, patch=4, residual=residual, image_size=32, attention="sdpa").eval()


def numpy_rank(tokens: torch.Tensor) -> float:
    centered = tokens.double().numpy() - tokens.double().numpy().mean(0)
    energy = np.linalg.svd(centered, compute_uv=False) ** 2
    share = energy[energy > 0] / energy.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


@torch.no_grad()
def numpy_rank_kept(model: VisionTransformer, batch: torch.Tensor) -> float:
    x = model.patch_embed(batch) + model.positions(8, 8)
    x = torch.cat([(model.cls_token + model.pos_embed[:, :1]).expand(len(batch), -1, -1), x], dim=1)
    embedded, lowest = [numpy_rank(tokens[1:]) for tokens in x], [np.inf] * len(batch)
    for block in model.blocks:
        x = block(x.flatten(0, 1), ((len(batch), 65),), "sdpa").unflatten(0, (len(batch), 65))
        lowest = [min(low, numpy_rank(tokens[1:])) for low, tokens in zip(lowest, x, strict=True)]
    return float(np.mean([low / first for low, first in zip(lowest, embedded, strict=True)]))


@pytest.mark.parametrize(("preset", "keep"), [("small", 0.6), ("small", 0.9), ("paper-dino", 0.9)])
def test_choose_beta_is_the_smallest_candidate_that_keeps_the_rank(preset: str, keep: float) -> None:
    """Against every candidate in turn, with an independent effective rank."""
    candidates = (4.0, 8.0, 16.0, 32.0, 64.0)
    kept = [
        numpy_rank_kept(skipless_init_(narrow(), **PRESETS[preset] | {"beta": beta}, seed=3), images())  # type: ignore[arg-type]
        for beta in candidates
    ]
    expected = next(beta for beta, share in zip(candidates, kept, strict=True) if share >= keep)
    assert expected not in (candidates[0], candidates[-1])  # or the test would say little
    model = narrow()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(99)  # of no consequence
    assert choose_beta(model, images(), PRESETS[preset], keep, candidates[::-1], seed=3) == expected
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_rank_kept_against_numpy() -> None:
    model = skipless_init_(narrow(), alpha=1.8, beta=2.0, mlp="mirrored")
    assert isinstance(model, VisionTransformer)
    assert rank_kept(model, images()) == pytest.approx(numpy_rank_kept(model, images()), rel=1e-3)


def test_choose_beta_refuses() -> None:
    with pytest.raises(ValueError, match="the model is residual"):
        choose_beta(narrow(residual=True), images(), PRESETS["small"])
    with pytest.raises(ValueError, match=r"beta 4 keeps 0\.\d\d of the tokens' effective rank, less than keep \(3\)"):
        choose_beta(narrow(), images(), PRESETS["small"], keep=3, betas=(1.0, 4.0))


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="depth_scale is 0; it must be positive"):
        fresh(depth_scale=0.0)
    for beta in (-1.0, math.inf, math.nan, "auto"):
        with pytest.raises(ValueError, match=r"beta is '?-?(1.0|inf|nan|auto)'?; it must be a number, 0 or more"):
            fresh(beta=beta)
    with pytest.raises(ValueError, match="Linear has no blocks"):
        skipless_init_(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="at least 2 x 96, this one has 96"):
        skipless_init_(
            VisionTransformer(D, 1, HEADS, patch=4, residual=False, image_size=16, mlp_ratio=1), mlp="mirrored"
        )
    with pytest.raises(ValueError, match="'sou'; choose suo"):
        fresh(mlp="sou")


PARTS = ("q", "k", "v", "attn.proj", "mlp.fc1", "mlp.fc2")


@pytest.mark.parametrize(
    ("changes", "usual"),
    [
        ({"value_output": False}, {"v", "attn.proj"}),
        ({"query_key": False}, {"q", "k"}),
        ({"mlp": "default"}, {"mlp.fc1", "mlp.fc2"}),
        ({"value_output": False, "query_key": False, "mlp": "default"}, set(PARTS)),
    ],
)
def test_settings_switch_parts_off_one_by_one(changes: dict[str, object], usual: set[str]) -> None:
    def weights(settings: ModelSettings) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        block = build_backbone(settings, image_size=16, seed=0).blocks[1]
        attention = dict(zip("qkv", block.attn.qkv.weight.detach().chunk(3), strict=True))
        return attention | {name: block.get_submodule(name).weight.detach() for name in PARTS[3:]}

    size = {"dim": D, "depth": 2, "heads": HEADS, "patch": 4}
    changed = weights(ModelSettings(**size, **changes))  # type: ignore[arg-type]
    plain, ours = weights(ModelSettings(**size, init="default")), weights(ModelSettings(**size))  # type: ignore[arg-type]
    for name, weight in changed.items():
        assert torch.equal(weight, plain[name]) == (name in usual), name
    # Parts are drawn from one stream, so what comes after a missing one differs; its kind does not.
    if "mlp" not in changes:
        assert torch.equal(changed["mlp.fc1"][: 2 * D], -changed["mlp.fc1"][2 * D :])
    assert not torch.equal(plain["q"], ours["q"])
