"""Attention of CLS against the formula and timm, and the figure of it."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor

from skipless.eval.attention_maps import main
from skipless.eval.backbones import Backbone, load_backbone
from skipless.eval.figures.attention_maps import cls_attention
from skipless.eval.figures.pictures import fit
from skipless.ssl.model.vit import VisionTransformer
from skipless.ssl.run.checkpoints import export_backbone

ROOT = Path(__file__).parent.parent.parent


def make_backbone(residual: bool = True, registers: int = 2) -> Backbone:
    """Three blocks of three heads, with weights large enough for attention to be uneven."""
    torch.manual_seed(0)
    model = VisionTransformer(24, 3, 3, patch=8, residual=residual, registers=registers, image_size=32)
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return Backbone(model.eval().requires_grad_(False), "tiny", "skipless", "")


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    export_backbone(folder, make_backbone().model, {})
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures of 40 x 56."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(5):
        Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((56, 40)).save(folder / f"{number}.png")
    return folder


# Values ---------------------------------------------------------------------------------------------------------------


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
        (of_q, of_k) = (slice(24 * part + 8 * head, 24 * part + 8 * head + 8) for part in (0, 1))
        q = x @ weights["attn.qkv.weight"][of_q].T + weights["attn.qkv.bias"][of_q]
        k = x @ weights["attn.qkv.weight"][of_k].T + weights["attn.qkv.bias"][of_k]
        scores = torch.einsum("bid,bjd->bij", q, k) / 8**0.5
        heads.append(scores.exp() / scores.exp().sum(2, keepdim=True))
    return torch.stack(heads, dim=1)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("registers", [0, 2])
def test_attention_is_the_formula(residual: bool, registers: int) -> None:
    """For two images that are not square; with CLS and registers it adds up to 1."""
    backbone = make_backbone(residual, registers)
    images = torch.randn(2, 3, 16, 24)
    for block, found in zip((2, 0, -2, 2), cls_attention(backbone, images, (2, 0, -2, 2)), strict=True):
        assert (found.patches.shape, found.cls.shape) == ((2, 3, 2, 3), (2, 3))
        assert found.patches.dtype == found.cls.dtype == torch.float32
        expected = attention_by_hand(backbone.model, images, block % 3)[:, :, 0]
        torch.testing.assert_close(found.cls, expected[..., 0])
        torch.testing.assert_close(found.patches.flatten(2), expected[..., 1 + registers :])
        to_registers = expected[..., 1 : 1 + registers].sum(2)
        torch.testing.assert_close(found.cls + to_registers + found.patches.sum((2, 3)), torch.ones(2, 3))
        assert found.patches.std() > 0.01


def test_attention_is_timms(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = TimmVisionTransformer(img_size=32, patch_size=8, embed_dim=192, depth=2, num_heads=3, num_classes=5).eval()
    for parameter in theirs.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    seen: list[Tensor] = []
    for block in theirs.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        theirs(images)
    found = cls_attention(load_backbone(tmp_path / "timm.pth"), images, (0, 1))
    for ours, expected in zip(found, seen, strict=True):
        torch.testing.assert_close(ours.patches.flatten(2), expected[:, :, 0, 1:], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours.cls, expected[:, :, 0, 0], atol=1e-5, rtol=1e-4)


def test_sizes_and_blocks_that_do_not_exist_are_errors() -> None:
    backbone = make_backbone()
    with pytest.raises(ValueError, match="cannot be cut into patches of 8"):
        cls_attention(backbone, torch.randn(1, 3, 16, 20), (0, 1))
    for block in (3, -4):
        with pytest.raises(IndexError):
            cls_attention(backbone, torch.randn(1, 3, 16, 16), (0, block))


def test_it_leaves_no_gradients_no_hooks_and_the_model_as_it_was() -> None:
    backbone = make_backbone()
    backbone.model.requires_grad_(True)
    images = torch.randn(1, 3, 16, 16)
    before = backbone.features(images)[0].patches
    assert not cls_attention(backbone, images)[0].patches.requires_grad
    torch.testing.assert_close(backbone.features(images)[0].patches, before, rtol=0, atol=0)
    assert not any(module._forward_hooks for module in backbone.model.modules())


# The figure -----------------------------------------------------------------------------------------------------------


def shares(svg: Path) -> list[int]:
    """Percentages in the titles, which matplotlib leaves in an SVG as comments."""
    return [int(found) for found in re.findall(r"(\d+) % to CLS", svg.read_text())]


def test_command_draws_every_head(ckpt: Path, photos: Path, tmp_path: Path) -> None:
    """Started from another folder; the titles are means over the images."""
    script = [sys.executable, ROOT / "eval" / "attention_maps.py", "--ckpt", ckpt, "--images", photos]
    flags = ["--count=2", "--size=32", "--block=2", "--device=cpu", "--out=figures/heads.svg"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, script + flags)), capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "written: figures/heads.svg\n"
    assert [path.name for path in tmp_path.glob("**/*.*")] == ["heads.svg"]

    backbone = load_backbone(ckpt)
    found = []
    for number in (0, 4):  # the first and the last
        picture = np.asarray(Image.open(photos / f"{number}.png"))
        images = backbone.normalize(fit(picture, 32, 8)[None])
        found.append(attention_by_hand(backbone.model, images, 1)[0, :, 0, 0])
    expected = 100 * torch.stack(found).mean(0)
    assert len(shares(tmp_path / "figures/heads.svg")) == 3
    np.testing.assert_allclose(shares(tmp_path / "figures/heads.svg"), expected, atol=0.51)


def test_figures_of_a_folder_an_archive_and_one_image(
    ckpt: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same images, the same figure, byte for byte."""
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.write(photos / "2.png", "2.png")
    common = ["--ckpt", str(ckpt), "--size=32", "--device=cpu"]
    for ending in ("png", "svg"):
        figures = []
        for images in (photos / "2.png", tmp_path / "photos.zip"):
            out = tmp_path / f"{images.stem}.{ending}"
            main([*common, "--images", str(images), "--out", str(out)])
            assert capsys.readouterr().out == f"written: {out}\n"
            figures.append(out.read_bytes())
        assert figures[0] == figures[1]
    with Image.open(tmp_path / "2.png") as figure:
        figure.load()
        assert min(figure.size) > 200
    main([*common, "--images", str(photos), "--out", str(tmp_path / "all.svg")])
    assert shares(tmp_path / "all.svg") != shares(tmp_path / "2.svg")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--images=/nowhere"], ["/nowhere: no such folder or zip archive"]),
        (["--images=broken.png"], ["broken.png: the content is not that of"]),
        (["--ckpt=/nowhere/vit.pth"], ["/nowhere/vit.pth", "no such checkpoint"]),
        (["--out=heads.jpg"], ["out is heads.jpg; it must end in .png, .pdf, .svg"]),
        (["--block=4"], ["block 4 does not exist", "1 to 3"]),
        (["--block=1,2"], ["block is '1,2'; choose one"]),
        (["--block=last4"], ["block is 'last4'; choose one"]),
        (["--block=first"], ["'first'"]),
        (["--count=0"], ["count and size must be 1 or more"]),
        (["--size=0"], ["count and size must be 1 or more"]),
        (["--device=tpu"], ["device is 'tpu'"]),
        (["--heads=3"], ["heads"]),
    ],
)
def test_bad_input_ends_with_one_sentence_and_exit_code_2(
    ckpt: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(SystemExit) as ended:
        main(["--ckpt", str(ckpt), "--images", str(photos), "--size=32", "--device=cpu", *flags])
    assert ended.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    for word in words:
        assert word in errors
    assert [path.name for path in tmp_path.iterdir()] == ["broken.png"]


def test_help_says_what_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "python eval/attention_maps.py --ckpt",
        "how much of the attention goes to CLS",
        ".png, .pdf or .svg",
    ):
        assert words in text
