"""Backbones of every family against timm's and against plain torch, and what is said about files that are none."""

import argparse
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers import sines, tiny_backbone, tiny_vit
from PIL import Image
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import Tensor

from skipless.common.precision import has_bf16
from skipless.eval.backbones import Backbone, load_backbone, pad_to_patch, untrained, usable_precision
from skipless.ssl.dino import DINOHead, DINOModel
from skipless.ssl.model.vit import VisionTransformer
from skipless.ssl.run.checkpoints import export_backbone, load_run_backbone, save_checkpoint

DATA = os.environ.get("SKIPLESS_TEST_DATA")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DIM, DEPTH, HEADS = 192, 2, 3


def refused(ckpt: Path | str, match: str, *weights: Any) -> str:
    """The one line in which a checkpoint is refused."""
    with pytest.raises((ValueError, FileNotFoundError), match=match) as error:
        load_backbone(ckpt, *weights)
    assert "\n" not in str(error.value)
    return str(error.value)


def make_timm(img_size: int | tuple[int, int], **kwargs: Any) -> TimmViT:
    return TimmViT(
        img_size=img_size, **({"embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS, "num_classes": 0} | kwargs)
    ).eval()


def noisy(model: torch.nn.Module, seed: int = 0) -> Any:
    """With biases, norms, scales and positions that matter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


# What timm's class needs to be each family, and the family that must be recognized.
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "DINO": ({"patch_size": 16}, "DINO"),
    "DINOv2": ({"patch_size": 14, "init_values": 0.3}, "DINOv2"),
    "DINOv2 in chunks": ({"patch_size": 14, "init_values": 0.3}, "DINOv2"),
    "DINOv2 with registers": (
        {"patch_size": 14, "init_values": 0.3, "reg_tokens": 4, "no_embed_class": True},
        "DINOv2 with registers",
    ),
    "DINOv2 with registers by timm": (
        {"patch_size": 14, "init_values": 0.3, "reg_tokens": 4, "no_embed_class": True},
        "DINOv2 with registers",
    ),
    "timm": ({"patch_size": 16, "num_classes": 7}, "timm"),
    "timm without a position for CLS": ({"patch_size": 16, "init_values": 0.3, "no_embed_class": True}, "timm"),
}


def official(case: str) -> tuple[TimmViT, dict[str, Tensor]]:
    """timm's model, and its weights under the names and in the form in which the family's authors ship them."""
    kwargs = CASES[case][0]
    model = noisy(make_timm(11 * kwargs["patch_size"], **kwargs))
    state = dict(model.state_dict())
    if case.startswith("DINOv2"):
        state["mask_token"] = torch.zeros(1, DIM)
    if case == "DINOv2 with registers":
        position = torch.randn(1, 1, DIM, generator=torch.Generator().manual_seed(1))
        state["register_tokens"] = state.pop("reg_token")
        state["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
        state["cls_token"] = state["cls_token"] - position
    if case == "DINOv2 in chunks":  # one block a chunk, numbered through
        state = {
            name.replace("blocks.0.", "blocks.0.0.").replace("blocks.1.", "blocks.1.1."): t for name, t in state.items()
        }
    return model, state


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[TimmViT, Backbone]]:
    folder, made = tmp_path_factory.mktemp("official"), {}

    def get(case: str) -> tuple[TimmViT, Backbone]:
        if case not in made:
            model, state = official(case)
            torch.save(state, folder / f"{case}.pth")
            made[case] = (model, load_backbone(folder / f"{case}.pth"))
        return made[case]

    return get


def tokens(backbone: Backbone, images: Tensor) -> Tensor:
    """CLS and patches of the last block, [B, 1 + N, D]."""
    (last,) = backbone.features(images)
    return torch.cat([last.cls[:, None], last.patches.flatten(1, 2)], dim=1)


def timm_tokens(model: TimmViT, images: Tensor) -> Tensor:
    """The same without registers."""
    with torch.no_grad():
        found = model.forward_features(images)
    return torch.cat([found[:, :1], found[:, model.num_prefix_tokens :]], dim=1)


@pytest.mark.parametrize("case", CASES)
def test_features_equal_timms_at_the_native_size(case: str, loaded: Callable[[str], Any]) -> None:
    model, backbone = loaded(case)
    patch = CASES[case][0]["patch_size"]
    registers = ", 4 registers" if "registers" in case else ""
    assert backbone.family == CASES[case][1]
    assert backbone.architecture == f"ViT-Ti/{patch}, 2 blocks, 192 wide{registers}, residual, 3 heads assumed"
    assert (backbone.mean, backbone.std) == IMAGENET
    assert not backbone.model.training
    images = torch.randn(2, 3, *model.patch_embed.img_size)
    torch.testing.assert_close(tokens(backbone, images), timm_tokens(model, images), atol=1e-4, rtol=0)


def keys_cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel with a = -0.75, as OpenCV and torch without antialias have it."""
    x = np.abs(x)
    near, far = 1.25 * x**3 - 2.25 * x**2 + 1, -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def dino_positions(grid: np.ndarray, h: int, w: int) -> np.ndarray:
    """[n, n, D] -> [h, w, D]: bicubic, not antialiased, sampled at the scale (h + 0.1) / n, edges repeated."""

    def weights(size: int, n: int) -> np.ndarray:
        centers = (np.arange(size) + 0.5) * n / (size + 0.1) - 0.5
        padded = keys_cubic(centers[:, None] - np.arange(-3, n + 3))
        padded[:, 3] += padded[:, :3].sum(1)
        padded[:, -4] += padded[:, -3:].sum(1)
        return padded[:, 3:-3]

    return np.einsum("in,jm,nmd->ijd", weights(h, len(grid)), weights(w, len(grid)), grid)


def pillow_positions(grid: np.ndarray, h: int, w: int) -> np.ndarray:
    """[n, n, D] -> [h, w, D]: bicubic, antialiased, to the exact size, by Pillow."""
    channels = [
        Image.fromarray(channel).resize((w, h), Image.Resampling.BICUBIC) for channel in np.moveaxis(grid, 2, 0)
    ]
    return np.stack([np.asarray(channel) for channel in channels], axis=2)


@pytest.mark.parametrize(("h", "w"), [(9, 9), (9, 17), (24, 7)])
@pytest.mark.parametrize("case", CASES)
def test_other_sizes_have_the_familys_positions_and_equal_timm_given_them(
    case: str, h: int, w: int, loaded: Callable[[str], Any]
) -> None:
    model, backbone = loaded(case)
    side = model.patch_embed.grid_size[0]
    native = model.pos_embed[0, -side * side :].detach().numpy().reshape(side, side, DIM)
    interpolate = dino_positions if CASES[case][1] in ("DINO", "DINOv2") else pillow_positions
    expected = interpolate(native, h, w).reshape(h * w, DIM)
    np.testing.assert_allclose(backbone.model.positions(h, w), expected, atol=2e-5)

    kwargs = CASES[case][0]
    other = make_timm((h * kwargs["patch_size"], w * kwargs["patch_size"]), **kwargs)
    positions = torch.cat([model.pos_embed[:, : -side * side], torch.from_numpy(expected)[None].float()], dim=1)
    other.load_state_dict(model.state_dict() | {"pos_embed": positions})
    images = torch.randn(2, 3, *other.patch_embed.img_size)
    torch.testing.assert_close(tokens(backbone, images), timm_tokens(other, images), atol=1e-4, rtol=0)


def test_the_two_interpolations_differ_enough_for_these_tests() -> None:
    grid = np.random.default_rng(0).normal(size=(14, 14, 3)).astype(np.float32)
    assert np.abs(dino_positions(grid, 9, 17) - pillow_positions(grid, 9, 17)).max() > 0.1


def by_hand(model: TimmViT, images: Tensor, wanted: int) -> Tensor:
    """Queries, keys and values [3, B, T, D] of a block, from timm's tensors in plain float64 torch, head by head."""
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    with torch.no_grad():
        x = model.norm_pre(model._pos_embed(model.patch_embed(images))).double()
    for block in range(wanted + 1):
        name = f"blocks.{block}"
        qkv = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv")
        q, k, v = qkv[..., :DIM], qkv[..., DIM : 2 * DIM], qkv[..., 2 * DIM :]
        heads = []
        for head in range(HEADS):
            own = slice(head * 64, (head + 1) * 64)
            attention = (q[..., own] @ k[..., own].mT / 8).softmax(-1)
            heads.append(attention @ v[..., own])
        x = x + linear(torch.cat(heads, -1), f"{name}.attn.proj") * state.get(f"{name}.ls1.gamma", 1)
        hidden = torch.nn.functional.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1"))
        x = x + linear(hidden, f"{name}.mlp.fc2") * state.get(f"{name}.ls2.gamma", 1)
    return torch.stack([q, k, v])


@pytest.mark.parametrize("case", ["DINO", "DINOv2 with registers"])
def test_keys_equal_those_computed_by_hand(case: str, loaded: Callable[[str], Any]) -> None:
    model, backbone = loaded(case)
    images = torch.randn(1, 3, *model.patch_embed.img_size)
    expected = by_hand(model, images, 1)
    for number, kind in enumerate(("queries", "keys", "values")):
        (found,) = backbone.features(images, (1,), kind)  # type: ignore[arg-type]
        torch.testing.assert_close(found.cls.double(), expected[number, :, 0], atol=1e-4, rtol=0)
        patches = expected[number, :, model.num_prefix_tokens :].unflatten(1, model.patch_embed.grid_size)
        torch.testing.assert_close(found.patches.double(), patches, atol=1e-4, rtol=0)


def test_keys_without_bias_lack_the_key_part_of_the_bias(tmp_path: Path) -> None:
    model = noisy(make_timm(32, patch_size=16, depth=3))
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    backbone, images = load_backbone(tmp_path / "vit.pth"), torch.randn(1, 3, 32, 48)
    keys, without_bias = (backbone.features(images, (-1, 0), kind) for kind in ("keys", "keys_without_bias"))
    for block, full, without in zip((2, 0), keys, without_bias, strict=True):
        bias = model.blocks[block].attn.qkv.bias.detach()[DIM : 2 * DIM]
        assert bias.abs().max() > 0.1
        torch.testing.assert_close(full.patches - without.patches, bias.expand(1, 2, 3, DIM), atol=1e-5, rtol=0)
        torch.testing.assert_close(full.cls - without.cls, bias[None], atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def dino() -> dict[str, Tensor]:
    return official("DINO")[1]


def same_weights(backbone: Backbone, state: dict[str, Tensor]) -> bool:
    own = backbone.model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[name], state[name]) for name in own)


@pytest.mark.parametrize("legacy", [False, True])
def test_training_checkpoint_of_dino_gives_its_teacher_or_student(tmp_path: Path, dino: dict, legacy: bool) -> None:
    path = tmp_path / "checkpoint.pth"
    student = {name: tensor + 1 for name, tensor in dino.items()}
    heads = {"head.mlp.0.weight": torch.zeros(8, DIM), "head.last_layer.weight_g": torch.ones(8, 1)}
    content = {
        "teacher": {f"backbone.{name}": tensor for name, tensor in dino.items()} | heads,
        "student": {f"module.backbone.{name}": t for name, t in student.items()}
        | {f"module.{name}": t for name, t in heads.items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "dino_loss": {"center": torch.zeros(1, 8)},
        "args": argparse.Namespace(arch="vit_tiny", lr=0.0005, global_crops_scale=(0.4, 1.0)),
        "epoch": 3,
    }
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)  # DINO's released files are of the old form
    assert same_weights(load_backbone(path), dino)
    assert same_weights(load_backbone(path, "student"), student)
    assert load_backbone(path).family == "DINO"
    assert load_backbone(path).sha256 == load_backbone(path, "student").sha256
    assert load_backbone(path).fingerprint() != load_backbone(path, "student").fingerprint()

    del content["student"]
    torch.save(content, path)
    refused(path, "no student, only a teacher", "student")


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_state_dict_below_a_key_in_half_precision_and_as_safetensors(tmp_path: Path, dino: dict, key: str) -> None:
    half = {f"module._orig_mod.{name}": tensor.half() for name, tensor in dino.items()}
    torch.save({key: half, "epoch": 1}, tmp_path / "a.pt")
    save_file(half, tmp_path / "a.safetensors", {"architecture": "vit_tiny_patch16_224"})  # a name as others store it
    rounded = {name: tensor.half().float() for name, tensor in dino.items()}
    for name in ("a.pt", "a.safetensors"):
        backbone = load_backbone(str(tmp_path / name))
        assert same_weights(backbone, rounded)
        assert backbone.model.pos_embed.dtype == torch.float32
        assert backbone.path == str(tmp_path / name)


def test_normalization_beside_a_file_of_timm(tmp_path: Path, dino: dict) -> None:
    save_file(dino, tmp_path / "model.safetensors")
    about = {
        "architecture": "vit_tiny_patch16_224",
        "pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.25, 0.5]},
    }
    (tmp_path / "config.json").write_text(json.dumps(about))
    backbone = load_backbone(tmp_path / "model.safetensors")
    assert (backbone.mean, backbone.std) == ((0.5, 0.5, 0.5), (0.5, 0.25, 0.5))
    images = np.zeros((1, 2, 3, 3), np.uint8)
    images[0, 1, 2] = (255, 51, 0)
    found = backbone.normalize(images)
    assert found.shape == (1, 3, 2, 3)
    assert found[0, :, 1, 2].tolist() == pytest.approx([1, -1.2, -1])
    assert found[0, :, 0, 0].tolist() == pytest.approx([-1, -2, -1])


@pytest.fixture(scope="module", params=[False, True], ids=["skipless", "residual"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DINOModel, DINOModel]:
    """A run's folder as pretraining leaves it, its teacher and its student."""

    def model(seed: int) -> DINOModel:
        backbone = VisionTransformer(32, 2, 2, patch=8, residual=request.param, registers=1, image_size=32)
        return noisy(DINOModel(backbone, DINOHead(32, 16, 16, 8), "cls"), seed).eval()

    folder, teacher, student = tmp_path_factory.mktemp("runs") / "run", model(1), model(2)
    architecture = student.backbone.architecture
    state = {"step": 9, "student": student.state_dict(), "teacher": teacher.state_dict(), "architecture": architecture}
    save_checkpoint(folder / "checkpoints", 9, state | {"settings": {"epochs": 1}, "images": 4}, keep=1)
    export_backbone(folder, teacher.backbone, {"step": 9})
    return folder, teacher, student


def test_run_checkpoint_and_export_of_ours_give_the_same(
    run: tuple[Path, DINOModel, DINOModel], tmp_path: Path
) -> None:
    folder, teacher, student = run
    skips = "residual" if teacher.backbone.architecture["residual"] else "skipless"
    shutil.copy(folder / "backbone.safetensors", tmp_path / "alone.safetensors")
    images = torch.randn(2, 3, 24, 40)
    with torch.no_grad():
        expected = {"teacher": teacher.backbone([images])[0], "student": student.backbone([images])[0]}
    checkpoint = folder / "checkpoints" / "step-9.pt"
    sources: list[tuple[Path, Any]] = [
        (folder, "teacher"), (tmp_path / "alone.safetensors", "teacher"),
        (checkpoint, "teacher"), (checkpoint, "student"),
    ]  # fmt: skip
    for path, weights in sources:
        backbone = load_backbone(path, weights)
        assert backbone.family == "skipless"
        assert backbone.architecture == f"ViT/8, 2 blocks, 32 wide, 1 registers, {skips}"
        wanted = torch.cat([expected[weights][:, :1], expected[weights][:, 2:]], dim=1)
        torch.testing.assert_close(tokens(backbone, images), wanted, atol=1e-5, rtol=0)
    refused(folder, r"exports its teacher; give .*last\.pt for its student", "student")


def test_architecture_beside_an_export_without_metadata(run: tuple[Path, DINOModel, DINOModel], tmp_path: Path) -> None:
    _, teacher, _ = run
    save_file(teacher.backbone.state_dict(), tmp_path / "b.safetensors")
    refused(tmp_path / "b.safetensors", "32 wide, and the number of attention heads cannot be read")
    (tmp_path / "b.json").write_text(json.dumps({"architecture": teacher.backbone.architecture}))
    assert load_backbone(tmp_path / "b.safetensors").model.architecture == teacher.backbone.architecture
    (tmp_path / "b.json").write_text('{"architecture": {"dim"')
    refused(tmp_path / "b.safetensors", r"b\.json is damaged")
    (tmp_path / "b.json").write_text(json.dumps({"architecture": teacher.backbone.architecture | {"rope": True}}))
    refused(tmp_path / "b.safetensors", r"this version cannot build.*rope")


@pytest.mark.parametrize("kind", ["tokens", "keys", "keys_without_bias"])
def test_bf16_is_near_to_float32_which_stays_what_it_was(loaded: Callable[[str], Any], kind: Any) -> None:
    """The identity of float32 features is that of those made before there was a choice: their caches are found."""
    backbone = loaded("DINO")[1]
    plain = [backbone.to("cpu"), backbone.to("cpu", "bf16").to("cpu", "fp32")]
    low = backbone.to("cpu", "bf16")
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    (expected,) = backbone.model.features(images, (-1,), "tokens" if kind == "tokens" else "keys")
    bias = backbone.model.blocks[-1].attn.qkv.bias.chunk(3)[1] if kind == "keys_without_bias" else None
    exact = expected.patches if bias is None else expected.patches - bias
    for same in plain:
        assert torch.equal(same.features(images, kind=kind)[0].patches, exact)
        assert same.precision == same.described_precision == "fp32"
    found = low.features(images, kind=kind)[0]
    assert found.patches.dtype == found.cls.dtype == torch.float32
    assert (found.patches - exact).norm() < 0.03 * exact.norm()
    if kind == "keys_without_bias":
        assert torch.equal(found.patches, exact)

    digest = hashlib.sha256(json.dumps([backbone.model.architecture, IMAGENET], sort_keys=True).encode())
    for name, tensor in sorted(backbone.model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    assert {same.fingerprint() for same in plain} == {digest.hexdigest()}


@pytest.mark.skipif(not has_bf16(torch.device("cpu")), reason="this CPU has no bf16 products")
def test_bf16_is_computed_where_the_cpu_has_it(loaded: Callable[[str], Any]) -> None:
    backbone = loaded("DINO")[1]
    images = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    low = backbone.to("cpu", "bf16")
    assert not torch.equal(tokens(low, images), tokens(backbone, images))
    assert low.described_precision == "fp32, products of linear layers in bf16"
    assert low.fingerprint() != backbone.fingerprint()
    assert low.to("cpu").precision == "bf16"


def test_bf16_is_used_where_the_device_is_fast_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ampere has capability 8.0, Turing 7.5."""
    gpu = torch.device("cuda")
    for capability, expected in (((8, 0), "bf16"), ((9, 0), "bf16"), ((7, 5), "fp32")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert usable_precision("bf16", gpu) == expected
        assert usable_precision("fp32", gpu) == "fp32"


def test_untrained_twin_keeps_the_precision(loaded: Callable[[str], Any]) -> None:
    backbone = loaded("DINO")[1]
    assert untrained(replace(backbone, precision="bf16")).precision == "bf16"
    assert untrained(backbone).precision == "fp32"


def test_untrained_twin_depends_on_the_seed_alone(run: tuple[Path, DINOModel, DINOModel]) -> None:
    backbone = load_backbone(run[0])
    torch.manual_seed(5)
    one = untrained(backbone, seed=3)
    torch.manual_seed(6)
    before = torch.get_rng_state()
    two, other = untrained(backbone, seed=3), untrained(backbone, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert one.fingerprint() == two.fingerprint() != other.fingerprint()
    assert one.sha256 == two.sha256 != other.sha256
    assert one.model.architecture == backbone.model.architecture
    assert (one.mean, one.std, one.family) == (backbone.mean, backbone.std, backbone.family)
    # The skipless initialization (arXiv 2510.00345): W_V W_O is 9 times an orthogonal matrix.
    attention = one.model.blocks[1].attn
    values = torch.linalg.svdvals(attention.proj.weight @ attention.qkv.weight[64:])  # type: ignore[union-attr, operator, index]
    assert torch.allclose(values, torch.full((32,), 9.0), atol=1e-3) != backbone.model.architecture["residual"]
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(tokens(one, images), tokens(two, images))
    assert (tokens(one, images) - tokens(backbone, images)).abs().max() > 0.1


def without_download(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> list[TimmViT]:
    """timm.create_model makes small noisy models instead of fetching weights; they land in the returned list."""
    create, made = timm.create_model, []

    def fake(name: str, pretrained: bool, **kwargs: Any) -> Any:
        assert pretrained
        made.append(noisy(create(name, pretrained=False, **kwargs, **changes)))
        return made[-1]

    monkeypatch.setattr(timm, "create_model", fake)
    return made


SMALL = {"embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS, "img_size": 112}


@pytest.mark.parametrize(
    ("name", "family", "mean"),
    [
        ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", "timm", (0.5, 0.5, 0.5)),
        ("vit_small_patch16_224.dino", "DINO", IMAGENET[0]),
        ("vit_base_patch16_224.mae", "timm", IMAGENET[0]),
        ("vit_small_patch14_dinov2.lvd142m", "DINOv2", IMAGENET[0]),
        ("vit_small_patch14_reg4_dinov2.lvd142m", "DINOv2 with registers", IMAGENET[0]),
    ],
)
def test_timm_by_name(monkeypatch: pytest.MonkeyPatch, name: str, family: str, mean: tuple[float, ...]) -> None:
    # Unusual heads: they are read from the model here, not guessed from the width.
    made = without_download(monkeypatch, **(SMALL | {"num_heads": 6}))
    backbone = load_backbone(f"timm:{name}")
    assert backbone.family == family
    assert backbone.path == f"timm:{name}"
    assert backbone.mean == mean
    assert backbone.std == (mean if family == "timm" and mean[0] == 0.5 else IMAGENET[1])
    images = torch.randn(1, 3, *made[0].patch_embed.img_size)
    torch.testing.assert_close(tokens(backbone, images), timm_tokens(made[0], images), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("vit_tiny_patch16_224", SMALL | {"qk_norm": True}, "normalized queries and keys"),
        ("vit_tiny_patch16_224", SMALL | {"act_layer": "silu"}, "other features than a plain ViT"),
        ("resnet18", {}, "looks like a convolutional network"),
        ("no_such_model", {}, "timm cannot make this model"),
    ],
)
def test_models_of_timm_that_are_no_plain_vit(
    monkeypatch: pytest.MonkeyPatch, name: str, changes: dict[str, Any], words: str
) -> None:
    without_download(monkeypatch, **changes)
    assert f"timm:{name}" in refused(f"timm:{name}", words)


def changed(state: dict[str, Tensor], **changes: Tensor | None) -> dict[str, Tensor]:
    """With tensors replaced, or left out where None; "__" stands for a dot."""
    new = state | {name.replace("__", "."): t for name, t in changes.items() if t is not None}
    return {name: t for name, t in new.items() if changes.get(name.replace(".", "__"), t) is not None}


def narrow(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.ones([{192: 96}.get(side, side) for side in tensor.shape]) for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: changed(s, blocks__1__norm2__bias=None), ["lacks blocks.1.norm2.bias"]),
        (lambda s: changed(s, cls_token=None, pos_embed=None), ["lacks pos_embed"]),
        (lambda s: changed(s, blocks__0__attn__rope=torch.ones(3)), ["it has blocks.0.attn.rope"]),
        (lambda s: changed(s, norm__weight=torch.ones(5)), ["norm.weight is [5] and not [192]"]),
        (
            lambda s: changed(s, norm__weight=torch.ones(5), norm__bias=None, extra=torch.ones(1)),
            ["lacks norm.bias", "has extra", "norm.weight is [5] and not [192]"],
        ),
        (lambda s: changed(s, pos_embed=torch.ones(DIM)), ["pos_embed is [192]"]),
        (lambda s: changed(s, pos_embed=torch.ones(1, 7, DIM)), ["pos_embed is [1, 7, 192] and not [1, 5, 192]"]),
        (lambda s: changed(s, patch_embed__proj__weight=torch.ones(DIM, 1, 16, 16)), ["[192, 1, 16, 16]", "[D, 3,"]),
        (lambda s: changed(s, norm__weight=torch.full((DIM,), torch.nan)), ["NaN or infinite weights, in norm.weight"]),
        (lambda s: changed(s, norm__bias=torch.full((DIM,), torch.inf)), ["NaN or infinite weights, in norm.bias"]),
        (lambda s: {"other.weight": torch.ones(3)}, ["is not a ViT", "other.weight"]),
        (lambda s: {}, ["holds no tensors"]),
        (lambda s: [torch.ones(3)], ["holds no tensors"]),
        (lambda s: {"epoch": 3, "teacher": {}}, ["holds no tensors"]),
        (narrow, ["96 wide", "heads"]),
    ],
)  # fmt: skip
def test_tensors_out_of_place_are_named(
    tmp_path: Path, dino: dict, change: Callable[[Any], Any], words: list[str]
) -> None:
    path = tmp_path / "vit.pth"
    torch.save(change(dino), path)
    message = refused(path, r"vit\.pth")
    assert all(word in message for word in words), message


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickle_with_code_is_refused_and_not_run(tmp_path: Path, dino: dict, legacy: bool) -> None:
    path, marker = tmp_path / "evil.pth", tmp_path / "marker"
    torch.save(dino | {"args": Trap(marker)}, path, _use_new_zipfile_serialization=not legacy)
    refused(path, r"evil\.pth holds Python objects beside tensors \(\w+\.mkdir\)")
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists(), "the trap was none"


@pytest.mark.parametrize("protocol", [0, 4])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_plain_pickle_with_code_is_refused_and_not_run(tmp_path: Path, protocol: int) -> None:
    path, marker = tmp_path / "evil.pth", tmp_path / "marker"
    path.write_bytes(pickle.dumps({"a": Trap(marker)}, protocol=protocol))
    refused(path, r"evil\.pth .*could run code")
    assert not marker.exists()


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".pth", ".old.pth", ".safetensors"])
def test_truncated_files_are_damaged(tmp_path: Path, dino: dict, suffix: str, share: float) -> None:
    path = tmp_path / f"cut{suffix}"
    if suffix == ".safetensors":
        save_file(dino, path)
    else:
        torch.save(dino, path, _use_new_zipfile_serialization=suffix == ".pth")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    refused(path, r"cut.* is damaged or no")


def test_files_that_are_not_there_or_of_another_kind(tmp_path: Path) -> None:
    refused(tmp_path / "nothing.pt", r"nothing\.pt: no such checkpoint")
    refused(tmp_path, r"has no backbone\.safetensors.*is it a run's folder")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.pt").touch()
    refused(tmp_path, r"give .*last\.pt")
    (tmp_path / "model.onnx").write_bytes(b"x")
    refused(tmp_path / "model.onnx", r"model\.onnx looks like a program")
    (tmp_path / "model.zip").touch()
    refused(tmp_path / "model.zip", r"model\.zip: a checkpoint ends in \.pt")
    for text, reason in (
        ("<html>not found</html>", " web page"),
        ("\n<!DOCTYPE html>", " web page"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "pointer of Git LFS"),
    ):
        for suffix in (".pth", ".safetensors"):
            (tmp_path / f"page{suffix}").write_text(text)
            refused(tmp_path / f"page{suffix}", rf"page\{suffix} is a.*{reason}")


def test_heads_are_those_of_the_family_or_of_a_file_beside(tmp_path: Path) -> None:
    """MoCo v3's ViT-S has twelve heads, where others of its width have six."""
    images = torch.randn(1, 3, 32, 32)
    for heads, prefix in ((12, "module.base_encoder."), (6, ""), (8, "")):
        model = noisy(make_timm(32, patch_size=16, embed_dim=384, num_heads=heads))
        if heads == 12:
            model.pos_embed.data = sines(384, 2)
        path = tmp_path / f"heads{heads}.pth"
        state = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
        if prefix:
            state |= {f"module.momentum_encoder.{name}": torch.zeros(1) for name in model.state_dict()}
        torch.save({"arch": "vit_small", "state_dict": state}, path)
        if heads == 8:
            path.with_suffix(".json").write_text('{"heads": 8}')
        backbone = load_backbone(path)
        torch.testing.assert_close(tokens(backbone, images), timm_tokens(model, images), atol=1e-4, rtol=0)
        assert backbone.architecture.endswith(f"residual, {heads} heads assumed" if heads != 8 else ", residual")
    path.with_suffix(".json").unlink()
    (tmp_path / "config.json").write_text('{"num_attention_heads": 8}')
    assert torch.equal(tokens(load_backbone(path), images), tokens(backbone, images))
    for heads in (0, -1, "6", 1.5):
        path.with_suffix(".json").write_text(json.dumps({"heads": heads}))
        refused(path, r"heads8\.json: heads is")
    path.with_suffix(".json").write_text('{"heads": 7}')
    refused(path, "dim 384 is not divisible by heads 7")


@pytest.mark.parametrize(
    "change",
    [
        {"depth": 10**9}, {"depth": "2"}, {"heads": 10**9}, {"heads": 0}, {"dim": 10**12}, {"mlp_ratio": 1e300},
        {"mlp_ratio": float("nan")}, {"image_size": 8 * 10**9}, {"registers": 10**12}, {"registers": -1},
        {"position_offset": float("inf")}, {"patch": []}, {"unknown": 1}, {"residual": False, "layer_scale": 1.0},
    ],
)  # fmt: skip
def test_an_architecture_that_is_not_that_of_the_weights_is_refused_at_once(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    model = tiny_vit()
    export_backbone(tmp_path, model, {})
    state = model.state_dict()
    save_file(state, tmp_path / "bare.safetensors")
    about = json.dumps({"architecture": model.architecture | change})
    (tmp_path / "bare.json").write_text(about)
    (tmp_path / "backbone.json").write_text(about)
    for load in (lambda: load_backbone(tmp_path / "bare.safetensors"), lambda: load_run_backbone(tmp_path)):
        with pytest.raises(ValueError, match=r"\.safetensors (has an architecture|cannot be loaded)") as error:
            load()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"architecture": 3}', "[" * 200_000, '"' + "x" * 2**23 + '"', ""])
def test_descriptions_that_are_none_are_refused(tmp_path: Path, text: str) -> None:
    export_backbone(tmp_path, tiny_vit(), {})
    (tmp_path / "backbone.json").write_text(text)
    with pytest.raises(ValueError, match=r"backbone") as error:
        load_run_backbone(tmp_path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_a_run_with_broken_weights_is_refused(tmp_path: Path) -> None:
    model = tiny_vit()
    model.norm.weight.data[3] = float("nan")
    export_backbone(tmp_path, model, {})
    with pytest.raises(ValueError, match=r"backbone\.safetensors has NaN or infinite weights, in norm\.weight"):
        load_run_backbone(tmp_path)
    refused(tmp_path, r"backbone\.safetensors has NaN or infinite weights, in norm\.weight")
    (tmp_path / "backbone.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="holds a damaged backbone"):
        load_run_backbone(tmp_path)


def test_unknown_kind_block_and_size(loaded: Callable[[str], Any]) -> None:
    backbone = loaded("DINO")[1]
    with pytest.raises(ValueError, match="block 2 does not exist"):
        backbone.features(torch.zeros(1, 3, 32, 32), (2,), "keys_without_bias")
    with pytest.raises(ValueError, match="'key'; choose"):
        backbone.features(torch.zeros(1, 3, 32, 32), kind="key")
    with pytest.raises(ValueError, match="30 x 32 pixels cannot be cut into patches of 16"):
        backbone.features(torch.zeros(1, 3, 30, 32))


def test_padding_at_the_right_and_bottom_or_centered() -> None:
    image = torch.ones(1, 1, 3, 5)
    corner, centered = torch.zeros(4, 8), torch.zeros(4, 8)
    corner[:3, :5] = 1
    centered[:3, 1:6] = 1  # rows 0 + 1, columns 1 + 2: the odd pixel goes right and down
    assert torch.equal(pad_to_patch(image, 4)[0, 0], corner)
    assert torch.equal(pad_to_patch(image, 4, centered=True)[0, 0], centered)
    assert torch.equal(pad_to_patch(torch.ones(2, 3, 8, 4), 4, centered=True), torch.ones(2, 3, 8, 4))
    two = pad_to_patch(torch.ones(1, 1, 6, 4), 4, centered=True)[0, 0]
    assert two.sum(1).tolist() == [0, 4, 4, 4, 4, 4, 4, 0]


def test_fingerprint_changes_with_weights_architecture_and_normalization(tmp_path: Path, dino: dict) -> None:
    def fingerprint(state: dict[str, Tensor], mean: float = 0.5) -> str:
        save_file(state, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {"mean": [mean] * 3, "std": [1, 1, 1]}}))
        return load_backbone(tmp_path / "model.safetensors").fingerprint()

    weight = dino["blocks.1.mlp.fc2.weight"].clone()
    weight[3, 4] += 1e-3
    prints = [
        fingerprint(dino),
        fingerprint(changed(dino, blocks__1__mlp__fc2__weight=weight)),
        fingerprint(dino, mean=0.4),
        fingerprint(dino | {"head.weight": torch.ones(2, DIM)}),  # timm's positions
    ]
    assert len(set(prints)) == 4
    assert fingerprint(dino) == prints[0]


@pytest.mark.skipif(not DATA, reason="SKIPLESS_TEST_DATA is not set")
def test_loads_a_trained_vit_under_the_names_of_dinov2() -> None:
    backbone = load_backbone(Path(DATA or "", "weights/vit_small_patch14_saliency.safetensors"))
    assert backbone.family == "DINOv2"
    assert backbone.architecture == "ViT-S/14, 12 blocks, 384 wide, residual, 6 heads assumed"
    (found,) = backbone.features(backbone.normalize(np.zeros((1, 56, 84, 3), np.uint8)))
    assert found.patches.shape == (1, 4, 6, 384)
    assert found.patches.isfinite().all()


@pytest.mark.parametrize("pool", ["mean", "cls", None])
def test_a_backbone_gives_the_vector_that_its_head_read(pool: str | None) -> None:
    backbone = replace(tiny_backbone(), pool=pool)
    images = torch.randn(2, 3, 32, 32)
    tokens = backbone.model(images)  # [B, 1 + registers + patches, D], after the final norm
    expected = tokens[:, 1:].mean(1) if pool == "mean" else tokens[:, 0]
    torch.testing.assert_close(backbone(images), expected)
