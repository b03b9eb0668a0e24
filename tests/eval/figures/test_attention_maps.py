"""Attention maps against the formula and timm."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import run
from PIL import Image
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor

from skipless.eval.attention_maps import main
from skipless.eval.backbones import Backbone, load_backbone
from skipless.eval.figures.attention_maps import attention_maps
from skipless.eval.figures.pictures import fit
from skipless.ssl.model.vit import VisionTransformer
from skipless.ssl.run.checkpoints import export_backbone


def make_backbone(residual: bool = True, registers: int = 2) -> Backbone:
    """Three blocks of three heads, with weights large enough for attention to be uneven."""
    torch.manual_seed(0)
    model = VisionTransformer(24, 3, 3, patch=8, residual=residual, registers=registers, image_size=32)
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return Backbone(model.eval().requires_grad_(False), "tiny", "skipless", "")


def attention_by_hand(model: VisionTransformer, images: Tensor, number: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) of one block, all tokens: [B, heads, T, T], head by head."""
    x = model.embed(images)
    groups = ((x.shape[0], x.shape[1]),)
    for block in model.blocks[:number]:
        x = block(x.flatten(0, 1), groups, "sdpa").unflatten(0, groups[0])
    weights = {name.removeprefix(f"blocks.{number}."): tensor for name, tensor in model.state_dict().items()}
    x = F.layer_norm(x, (24,), weights["norm1.weight"], weights["norm1.bias"], 1e-6)
    heads = []
    for head in range(3):
        rows_q, rows_k = (slice(24 * part + 8 * head, 24 * part + 8 * head + 8) for part in (0, 1))
        q = x @ weights["attn.qkv.weight"][rows_q].T + weights["attn.qkv.bias"][rows_q]
        k = x @ weights["attn.qkv.weight"][rows_k].T + weights["attn.qkv.bias"][rows_k]
        scores = torch.einsum("bid,bjd->bij", q, k) / 8**0.5
        heads.append(scores.exp() / scores.exp().sum(2, keepdim=True))
    return torch.stack(heads, dim=1)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("registers", [0, 2])
def test_attention_is_the_formula(residual: bool, registers: int) -> None:
    """For two images that are not square; with CLS and registers it adds up to 1."""
    backbone = make_backbone(residual, registers)
    images = torch.randn(2, 3, 16, 24)
    for block, maps in zip((2, 0, -2, 2), attention_maps(backbone, images, (2, 0, -2, 2)), strict=True):
        assert (maps.patches.shape, maps.cls.shape) == ((2, 3, 2, 3), (2, 3))
        assert maps.patches.dtype == maps.cls.dtype == torch.float32
        expected = attention_by_hand(backbone.model, images, block % 3)[:, :, 0]
        torch.testing.assert_close(maps.cls, expected[..., 0])
        torch.testing.assert_close(maps.patches.flatten(2), expected[..., 1 + registers :])
        to_registers = expected[..., 1 : 1 + registers].sum(2)
        torch.testing.assert_close(maps.cls + to_registers + maps.patches.sum((2, 3)), torch.ones(2, 3))
        assert maps.patches.std() > 0.01


def test_patches_can_be_the_query() -> None:
    """One of them, or all on the mean."""
    backbone, images = make_backbone(), torch.randn(2, 3, 16, 24)
    expected = attention_by_hand(backbone.model, images, 1)[:, :, 3:]  # CLS and two registers come first
    (mean,), (patch,) = (attention_maps(backbone, images, (1,), query) for query in ("mean", (1, 2)))
    torch.testing.assert_close(mean.patches.flatten(2), expected[..., 3:].mean(2))
    torch.testing.assert_close(mean.cls, expected[..., 0].mean(2))
    torch.testing.assert_close(patch.patches.flatten(2), expected[:, :, 5, 3:])


def test_where_cls_sees_itself_alone_the_maps_are_the_mean_over_patches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_backbone(residual=False, registers=0).model
    with torch.no_grad():  # CLS differs from all patches, and the query is the key
        model.cls_token.copy_(torch.tensor([300.0, -300.0]).repeat(12))
        q, k = model.blocks[0].attn.qkv.weight[:24], model.blocks[0].attn.qkv.weight[24:48]  # type: ignore[index, union-attr]
        q.copy_(3 * torch.eye(24))
        k.copy_(3 * torch.eye(24))
    export_backbone(tmp_path, model, {})
    Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)).save(tmp_path / "a.png")
    words = [f"--ckpt={tmp_path}", f"--images={tmp_path}/a.png", "--size=32", "--block=1", f"--out={tmp_path}/a.svg"]
    main(words)
    assert re.search(r"note: \d+ % of CLS's attention goes to itself", capsys.readouterr().out)
    assert "mean of patches" in (tmp_path / "a.svg").read_text()
    main([*words, "--query=cls"])
    assert min(cls_shares(tmp_path / "a.svg")) > 90
    main([*words, "--query=9,9"])
    assert "<!-- patch -->" in (tmp_path / "a.svg").read_text()


def test_attention_is_timms(tmp_path: Path) -> None:
    torch.manual_seed(0)
    reference = TimmVisionTransformer(
        img_size=32, patch_size=8, embed_dim=192, depth=2, num_heads=3, num_classes=5
    ).eval()
    for parameter in reference.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    torch.save(reference.state_dict(), tmp_path / "timm.pth")
    seen: list[Tensor] = []
    for block in reference.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        reference(images)
    attention = attention_maps(load_backbone(tmp_path / "timm.pth"), images, (0, 1))
    for ours, expected in zip(attention, seen, strict=True):
        torch.testing.assert_close(ours.patches.flatten(2), expected[:, :, 0, 1:], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours.cls, expected[:, :, 0, 0], atol=1e-5, rtol=1e-4)


def test_sizes_and_blocks_that_do_not_exist_are_errors() -> None:
    backbone = make_backbone()
    with pytest.raises(ValueError, match="cannot be cut into patches of 8"):
        attention_maps(backbone, torch.randn(1, 3, 16, 20), (0, 1))
    for block in (3, -4):
        with pytest.raises(IndexError):
            attention_maps(backbone, torch.randn(1, 3, 16, 16), (0, block))


def test_it_leaves_no_gradients_no_hooks_and_the_model_as_it_was() -> None:
    backbone = make_backbone()
    backbone.model.requires_grad_(True)
    images = torch.randn(1, 3, 16, 16)
    before = backbone.features(images)[0].patches
    assert not attention_maps(backbone, images)[0].patches.requires_grad
    torch.testing.assert_close(backbone.features(images)[0].patches, before, rtol=0, atol=0)
    assert not any(module._forward_hooks for module in backbone.model.modules())


def cls_shares(svg: Path) -> list[int]:
    """Percentages in the titles, which matplotlib leaves in an SVG as comments."""
    return [int(share) for share in re.findall(r"(\d+) % to CLS", svg.read_text())]


def test_the_figure_has_every_head(tmp_path: Path) -> None:
    """Drawn by the command, started from another folder; the titles are means over the images."""
    export_backbone(tmp_path, make_backbone().model, {})
    rng, pictures = np.random.default_rng(0), []
    (tmp_path / "photos").mkdir()
    for number in range(5):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
        coarse.resize((56, 40)).save(tmp_path / "photos" / f"{number}.png")
        pictures.append(np.asarray(coarse.resize((56, 40))))
    words = ["--ckpt=.", "--images=photos", "--count=2", "--size=32", "--block=2", "--device=cpu"]
    done = run("eval/attention_maps.py", [*words, "--out=figures/heads.svg"], cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "written: figures/heads.svg\n"), done.stderr
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["heads.svg"]
    backbone = load_backbone(tmp_path)
    shares = []
    for picture in (pictures[0], pictures[4]):  # the first and the last
        images = backbone.normalize(fit(picture, 32, backbone)[None])
        shares.append(100 * attention_by_hand(backbone.model, images, 1)[0, :, 0, 0])
    assert len(cls_shares(tmp_path / "figures/heads.svg")) == 3
    np.testing.assert_allclose(cls_shares(tmp_path / "figures/heads.svg"), torch.stack(shares).mean(0), atol=0.51)
    main([*words, "--count=5", f"--ckpt={tmp_path}", f"--images={tmp_path}/photos", f"--out={tmp_path}/all.svg"])
    assert cls_shares(tmp_path / "all.svg") != cls_shares(tmp_path / "figures/heads.svg")
