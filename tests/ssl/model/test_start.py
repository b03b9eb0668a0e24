"""A backbone with somebody's weights computes what they computed; patches, grids and pixels are made to fit."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import call, error_line, tiny_vit
from safetensors.torch import load_file
from torch import Tensor, nn

from skipless.ssl import distill, pretrain, supervised
from skipless.ssl.dino import DINOHead, DINOModel
from skipless.ssl.model.build import ModelSettings
from skipless.ssl.model.load import Loaded, load_vit
from skipless.ssl.model.start import fill_, resample_patches, start_heads
from skipless.ssl.run.checkpoints import export_backbone


def source(**options: Any) -> Loaded:
    model = tiny_vit(**options).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    return Loaded(model, "theirs.pth", "DINOv2", "0")


def features(model: Any, images: Tensor) -> Tensor:
    with torch.no_grad():
        tokens = model.eval()(images)
    return torch.cat([tokens[:, :1], tokens[:, 1 + model.registers :]], dim=1)


@pytest.mark.parametrize(("theirs", "ours"), [(0.5, None), (None, 1e-5), (0.5, 1e-5), (None, None)])
def test_features_are_the_same_with_and_without_layer_scale(theirs: float | None, ours: float | None) -> None:
    loaded = source(layer_scale=theirs, registers=2)
    model = fill_(tiny_vit(layer_scale=ours, registers=2), loaded)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(features(model, images), features(loaded.model, images), atol=1e-5, rtol=0)


def test_features_are_the_same_of_pixels_that_are_normalized_otherwise() -> None:
    loaded = replace(source(residual=False), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    model = fill_(tiny_vit(residual=False), loaded)
    pixels = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    other_mean, other_std = (torch.tensor(x)[:, None, None] for x in (loaded.mean, loaded.std))
    expected = features(loaded.model, (pixels - other_mean) / other_std)
    torch.testing.assert_close(features(model, (pixels - mean) / std), expected, atol=1e-4, rtol=0)


def test_positions_are_those_that_the_model_has_at_the_new_size() -> None:
    loaded = source(registers=1)
    model = fill_(tiny_vit(image_size=48), loaded)
    torch.testing.assert_close(model.pos_embed[0, 1:], loaded.model.positions(6, 6))
    torch.testing.assert_close(model.pos_embed[0, 0], loaded.model.pos_embed[0, 0])


def test_an_enlarged_patch_gives_the_same_token() -> None:
    weight, patches = torch.randn(5, 3, 8, 8), torch.randn(7, 3, 8, 8)
    enlarged = F.interpolate(patches, size=(16, 16), mode="bicubic", antialias=True)
    torch.testing.assert_close(
        F.conv2d(enlarged, resample_patches(weight, 16)), F.conv2d(patches, weight), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("patch", [6, 14, 16])
def test_patches_are_resampled_as_in_timm(patch: int) -> None:
    embed = pytest.importorskip("timm.layers", reason="timm is not installed").patch_embed
    weight = torch.randn(5, 3, 8, 8)
    expected = embed.resample_patch_embed(weight, [patch, patch])
    torch.testing.assert_close(resample_patches(weight, patch), expected, atol=1e-4, rtol=1e-4)


STILL = ["--epochs=1", "--batch_size=20", "--device=cpu", "--optimizer.lr=1e-12", "--optimizer.min_lr=1e-13"]
STILL += ["--optimizer.warmup_epochs=0", "--optimizer.weight_decay=0", "--optimizer.weight_decay_end=0"]
MODEL = ["--model.size=tiny", "--model.dim=24", "--model.depth=2", "--model.heads=2", "--model.patch=8"]
COMMANDS: dict[str, tuple[Any, list[str]]] = {
    "pretrain": (pretrain, ["--crops.global_crops_size=32", "--crops.local_crops_number=0", "--dino.out_dim=16",
                            "--dino.hidden_dim=16", "--dino.bottleneck_dim=8", "--dino.freeze_last_layer=0",
                            "--dino.warmup_teacher_temp_epochs=0"]),
    "supervised": (supervised, ["--augmentation.size=32"]),
    "distill": (distill, ["--views.size=32", "--monitor.every_epochs=0"]),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_runs_start_from_weights_and_resume_without_them(name: str, photos: Path, tmp_path: Path) -> None:
    loaded = source()
    (tmp_path / "theirs").mkdir()
    export_backbone(tmp_path / "theirs", loaded.model, {})
    (tmp_path / "data").mkdir()
    for split in ("train", "val"):
        (tmp_path / "data" / split).symlink_to(photos)
    module, more = COMMANDS[name]
    data = ["--data.root", tmp_path / "data"] if name == "supervised" else ["--data.path", photos]
    teacher = ["--teacher.ckpt", tmp_path / "theirs"] if name == "distill" else []
    out = tmp_path / "out"
    still = [*STILL, *MODEL, *more, *data, *teacher, "--model.residual=true"]
    words = [*still, "--out", out]
    done = call(module.main, [*words, "--model.from", tmp_path / "theirs"])
    assert done.returncode == 0, done.stderr
    assert f"starts from {tmp_path / 'theirs'} (skipless), with skip connections" in done.stdout + done.stderr
    assert "it has no head: this run's starts fresh" in done.stdout + done.stderr
    state = loaded.model.state_dict()
    for file in (out / "backbone.safetensors",):
        written = load_file(file)
        assert written.keys() == state.keys()
        for key, tensor in state.items():
            torch.testing.assert_close(written[key], tensor, msg=key)
    heads = []
    for number, ckpt in enumerate((out / "checkpoints/last.pt", out)):
        done = call(module.main, [*still, "--seed=5", "--out", tmp_path / f"{number}", "--model.from", ckpt])
        assert done.returncode == 0, done.stderr
        assert "its head is kept" in done.stdout + done.stderr
        heads += [load_vit(folder / "checkpoints/last.pt").heads for folder in (out, tmp_path / f"{number}")]
    assert heads[0]
    for others in heads[1:]:
        assert others.keys() == heads[0].keys()
        for key, tensor in heads[0].items():
            torch.testing.assert_close(others[key], tensor, msg=key, atol=1e-6, rtol=0)
    (out / "backbone.json").unlink()
    again = call(
        module.main, [*words, "--resume", *(["--model.from", tmp_path / "gone"] if name == "pretrain" else [])]
    )
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(
    ("head", "change", "words"),
    [
        (DINOHead(24, 16, 8, 8), lambda s: s, "its head is kept"),
        (DINOHead(24, 16, 8, 8), lambda s: {n.replace("head.", "dino_head."): t for n, t in s.items()}, "is kept"),
        (DINOHead(24, 16, 8, 8), lambda s: {"module." + n: t for n, t in s.items()}, "its head is kept"),
        (DINOHead(24, 32, 8, 8), lambda s: s, r"original1 is \[32, 8\] there, and \[16, 8\] here"),
        (nn.Linear(24, 16), lambda s: s, r"dropped: head.bias is \[16\] there, and none here"),
        (nn.Identity(), lambda s: s, "it has no head: this run's starts fresh"),
    ],
)
def test_heads_that_fit_are_kept(head: Any, change: Callable[[Any], Any], words: str, tmp_path: Path) -> None:
    """Those of DINO's own files have torch's older names of weight norm; a length that stays 1 does."""
    theirs = DINOModel(source().model, head, "mean")
    state = {name: torch.randn_like(x) for name, x in head.state_dict().items()}
    names = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    old = {f"head.{name}": x for name, x in state.items()}
    for new, before in names.items():
        old = {name.replace(new, before): x for name, x in old.items()}
    content = change(theirs.state_dict() | old)
    content = {name: x for name, x in content.items() if "parametrizations" not in name}
    architecture = theirs.backbone.architecture
    torch.save({"teacher": content, "args": None, "architecture": architecture}, tmp_path / "theirs.pt")
    ours = DINOModel(tiny_vit(), DINOHead(24, 16, 8, 8), "mean")
    before = {name: x.clone() for name, x in ours.head.state_dict().items()}
    (line,) = start_heads(ours, ModelSettings(from_ckpt=str(tmp_path / "theirs.pt")))
    assert re.search(words, line)
    expected = state | {"last_layer.parametrizations.weight.original0": torch.ones(16, 1)}
    for name, x in ours.head.state_dict().items():
        assert torch.equal(x, expected[name] if "kept" in words else before[name]), name


def test_what_does_not_fit_is_refused_before_anything_is_written(photos: Path, tmp_path: Path) -> None:
    words = [*STILL, *MODEL, *COMMANDS["pretrain"][1], "--data.path", photos, "--out", tmp_path / "out"]

    def refused(loaded: Loaded, *more: object) -> str:
        folder = tmp_path / "theirs"
        folder.mkdir(exist_ok=True)
        export_backbone(folder, loaded.model, {})
        done = call(pretrain.main, [*words, "--model.from", folder, *more])
        assert not (tmp_path / "out").exists()
        return error_line(done.stderr)

    assert "is 36 wide and 3 heads" in refused(source(dim=36))
    assert "--model.dim 36 --model.depth 2 --model.heads 3" in refused(source(dim=36))
    assert "has gated MLPs" in refused(source(swiglu=True))
    assert "has shaped attention: give --model.shaped true" in refused(source(shaped=True))
    assert "has no shaped attention: give --model.shaped false" in refused(source(), "--model.shaped=true")
    assert "has rotary positions" in refused(source(rope_base=100.0))
    assert "model.beta has no effect with model.from" in refused(source(), "--model.beta=0.5")
    assert "no such checkpoint" in error_line(call(pretrain.main, [*words, "--model.from", tmp_path / "x"]).stderr)


def test_weights_that_were_trained_with_skips_are_warned_of(photos: Path, tmp_path: Path) -> None:
    export_backbone(tmp_path, source(layer_scale=0.1).model, {})
    words = [*STILL, *MODEL, *COMMANDS["pretrain"][1], "--data.path", photos, "--out", tmp_path / "out"]
    done = call(pretrain.main, [*words, "--model.from", tmp_path, "--model.residual=false"])
    assert done.returncode == 0, done.stderr
    assert "was trained with skip connections, and this model is built without them" in done.stdout + done.stderr
    assert not load_vit(tmp_path / "out").model.architecture["residual"]
