"""Exported folders: read back by what they are for, they compute what the backbone computes."""

import ast
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import call, error_line, load, tiny_vit
from safetensors.torch import load_file
from torch import Tensor

from skipless.ssl import export
from skipless.ssl.formats.layouts import Written
from skipless.ssl.formats.modeling_skipless import SkiplessViT
from skipless.ssl.model.load import load_vit
from skipless.ssl.model.vit import VisionTransformer
from skipless.ssl.run.checkpoints import export_backbone

SETTINGS = {"epochs": 3, "batch_size": 8, "out": "runs/a", "data": {"path": "somewhere/photos", "workers": 2}}
ABOUT = {"settings": SETTINGS, "pool": "mean", "hardware": "an abacus", "commit": "c0ffee"}
MODELS: dict[str, dict[str, Any]] = {
    "skipless": {"residual": False},
    "shaped": {"residual": False, "shaped": True},
    "residual": {"registers": 2, "layer_scale": 0.5, "position_offset": 0.0, "position_antialias": True},
    "gates and rotary positions": {"swiglu": True, "rope_base": 100.0, "registers": 1, "norm_eps": 1e-3},
    "without a class token": {"class_token": False, "pre_norm": True, "activation": "quick_gelu"},
}

SIZES = [(32, 32, 1), (32, 32, 5), (48, 24, 2), (16, 88, 1)]  # of images, and how many; the grid is that of 32


def make_run(folder: Path, **options: Any) -> Path:
    """A run's folder whose backbone has biases, norms, scales and positions that matter."""
    model = tiny_vit(dim=48, **options)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    folder.mkdir()
    export_backbone(folder, model, ABOUT)
    (folder / "metrics.jsonl").write_text(
        '{"monitor/knn": [0.1, 0.25]}\n{"loss": 2.0}\n{"monitor/knn": [0.2, 0.375]}\n'
    )
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {name: make_run(folder / name, **options) for name, options in MODELS.items()}


def exported(run: Path, out: Path, to: str, *more: object) -> Path:
    done = call(export.main, ["--ckpt", run, "--to", to, "--out", out, *more])
    assert done.returncode == 0, done.stderr
    assert [path.name for path in out.parent.iterdir() if "unfinished" in path.name] == []
    return out


def images(height: int, width: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def same(model: VisionTransformer, pictures: Tensor, cls: Tensor, patches: Tensor) -> None:
    (expected,) = model.features(pictures)
    torch.testing.assert_close(cls, expected.cls, atol=1e-4, rtol=0)
    torch.testing.assert_close(patches, expected.patches, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_weights_and_the_module_beside_them(runs: dict[str, Path], name: str, tmp_path: Path) -> None:
    out = exported(runs[name], tmp_path / "out", "safetensors")
    file = out / "modeling_skipless.py"
    roots = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    taken = {n.module if isinstance(n, ast.ImportFrom) else n.names[0].name for n in roots}
    needed = {str(module).partition(".")[0] for module in taken} - sys.stdlib_module_names
    # The hub where it is installed, transformers where it is loaded already.
    assert needed == {"torch", "safetensors", "huggingface_hub", "transformers"}
    module = load(file)
    model, again = load_vit(runs[name]).model, load_vit(out)
    assert again.model.architecture == model.architecture
    assert (again.family, again.pool) == ("skipless", "mean")
    with torch.no_grad():
        for size in ((32, 32), (48, 24)):
            same(model, images(*size), *module.load(out)(images(*size)))
            same(model, images(*size), *again.model.features(images(*size))[0][::-1])


@pytest.mark.parametrize("name", ["skipless", "residual"])
def test_the_hub_gets_the_folder(
    runs: dict[str, Path], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    out, there = exported(runs[name], tmp_path / "out", "safetensors"), tmp_path / "hub"
    monkeypatch.setattr(hub.HfApi, "create_repo", lambda *_, repo_id, **__: hub.RepoUrl(f"https://hf.co/{repo_id}"))
    monkeypatch.setattr(
        hub.HfApi, "upload_folder",
        lambda *_, repo_id, folder_path, **__: str(shutil.copytree(folder_path, there / repo_id)),
    )  # fmt: skip
    module = load(out / "modeling_skipless.py")
    model = module.load(out)
    assert model.push_to_hub("me/photos") == str(there / "me/photos")
    model.save_pretrained(out)  # into itself: nothing changes
    assert {path.name for path in out.iterdir()} == {path.name for path in (there / "me/photos").iterdir()}
    for path in out.iterdir():
        if path.suffix == ".safetensors":  # whose metadata come in any order
            kept, sent = load_file(path), load_file(there / "me/photos" / path.name)
            assert kept.keys() == sent.keys()
            assert all(torch.equal(tensor, sent[name]) for name, tensor in kept.items())
        else:
            assert path.read_bytes() == (there / "me/photos" / path.name).read_bytes(), path.name
    fetched = module.SkiplessViT.from_pretrained(there / "me/photos")
    fetched.save_pretrained(tmp_path / "again")
    assert load_vit(tmp_path / "again").pool == fetched.pool == "mean"
    with torch.no_grad():
        for size in ((32, 32), (48, 24)):
            same(load_vit(runs[name]).model, images(*size), *fetched(images(*size)))
            same(load_vit(tmp_path / "again").model, images(*size), *model(images(*size)))


def test_the_module_works_without_the_hub(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = exported(runs["skipless"], tmp_path / "out", "safetensors")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with torch.no_grad():
        same(
            load_vit(runs["skipless"]).model, images(32, 32), *load(out / "modeling_skipless.py").load()(images(32, 32))
        )


@pytest.mark.parametrize("rule", [(0.1, False), (0.0, False), (0.0, True)])
@pytest.mark.parametrize("side", [1, 2, 7])
def test_the_module_interpolates_positions_as_the_backbone(rule: tuple[float, bool], side: int) -> None:
    """By products, which exporters can follow, where the backbone calls torch's function."""
    model = tiny_vit(image_size=8 * side, position_offset=rule[0], position_antialias=rule[1])
    model.pos_embed.data.normal_()
    module = SkiplessViT(model.architecture)
    module.load_state_dict(model.state_dict())
    for h, w in ((side, side), (side, side + 1), (1, 3), (30, 4)):
        torch.testing.assert_close(module.positions(h, w), model.positions(h, w), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["skipless", "residual", "gates and rotary positions"])
def test_automodel_reads_our_own_layout(
    runs: dict[str, Path], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    out = exported(runs[name], tmp_path / "out", "safetensors" if name == "residual" else "hf")
    there = transformers.AutoModel.from_pretrained(out, trust_remote_code=True)
    prefix = 1 + MODELS[name].get("registers", 0)
    with torch.no_grad():
        for h, w in ((4, 4), (6, 3)):
            pictures = images(8 * h, 8 * w)
            said = there(pixel_values=pictures)
            tokens = said.last_hidden_state
            same(load_vit(runs[name]).model, pictures, tokens[:, 0], tokens[:, prefix:].unflatten(1, (h, w)))
            torch.testing.assert_close(said.pooler_output, tokens[:, prefix:].mean(1))
    processor = transformers.AutoImageProcessor.from_pretrained(out)
    assert list(processor.image_mean) == [0.485, 0.456, 0.406]


# Who interpolates positions by the same rule; the others have the same features at the grid's own size.
SAME_RULE = {"timm": ["exact and antialiased", "with registers"], "hf": ["exact", "with registers"]}
RESIDUAL: dict[str, dict[str, Any]] = {
    "plain": {},
    "registers and layer scale": {"registers": 2, "layer_scale": 0.5},
    "exact": {"position_offset": 0.0, "activation": "gelu_tanh"},
    "exact and antialiased": {"position_offset": 0.0, "position_antialias": True},
    "with registers": {"position_offset": 0.0, "position_antialias": True, "registers": 2, "layer_scale": 0.5},
    "gates": {"swiglu": True, "mlp_ratio": 8 / 3, "layer_scale": 1.0},
}


def reread(form: str, out: Path) -> Any:
    """A function from images to tokens, by the library that the folder is for."""
    if form == "timm":
        timm = pytest.importorskip("timm", reason="timm is not installed")
        return timm.create_model(f"local-dir:{out}", pretrained=True).eval().forward_features
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model, report = transformers.AutoModel.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(model).__name__ in ("Dinov2Model", "Dinov2WithRegistersModel")
    return lambda pictures: model.eval()(pixel_values=pictures).last_hidden_state


@pytest.mark.parametrize("form", SAME_RULE)
@pytest.mark.parametrize("name", RESIDUAL)
def test_layouts_of_timm_and_hugging_face(form: str, name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", **RESIDUAL[name])
    if (form, name) == ("timm", "gates"):
        words = ["--ckpt", run, "--to", form, "--out", tmp_path / "out"]
        assert "has gated MLPs, which timm" in error_line(call(export.main, words).stderr)
        return
    model, prefix = load_vit(run).model, 1 + RESIDUAL[name].get("registers", 0)
    for size in (None, 48):
        out = exported(run, tmp_path / f"out {size}", form, *(["--size", size] if size else []))
        compute = reread(form, out)
        side, said = size or 32, (out / "README.md").read_text()
        assert (f"At {side} x {side} pixels features are those of the run" in said) == (name not in SAME_RULE[form])
        sizes = [(side, side), *([(24, 56)] if name in SAME_RULE[form] and not size else [])]
        with torch.no_grad():
            for height, width in sizes:
                pictures = images(height, width)
                tokens = compute(pictures)
                same(model, pictures, tokens[:, 0], tokens[:, prefix:].unflatten(1, (height // 8, width // 8)))
                again = load_vit(out).model(pictures) if name != "gates" or form == "hf" else tokens
                torch.testing.assert_close(again, tokens, atol=1e-4, rtol=0)


def test_pooled_vector_of_timm_is_what_the_head_read(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    out = exported(make_run(tmp_path / "run", registers=1), tmp_path / "out", "timm")
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    with torch.no_grad():
        pictures = images(32, 32)
        torch.testing.assert_close(model(pictures), model.forward_features(pictures)[:, 2:].mean(1))
    assert model.pretrained_cfg["mean"] == [0.485, 0.456, 0.406]


def test_skipless_models_are_for_automodel_and_not_for_timm(runs: dict[str, Path], tmp_path: Path) -> None:
    out = exported(runs["skipless"], tmp_path / "out", "hf")
    assert "trust_remote_code=True" in (out / "README.md").read_text()
    assert (out / "modeling_skipless.py").exists()
    words = ["--ckpt", runs["skipless"], "--to", "timm", "--out", tmp_path / "timm"]
    assert "has no skip connections, which timm" in error_line(call(export.main, words).stderr)
    assert not (tmp_path / "timm").exists()
    words[1] = make_run(tmp_path / "shaped", residual=True, shaped=True)
    assert "has shaped attention, which timm" in error_line(call(export.main, words).stderr)


@pytest.mark.parametrize("name", ["skipless", "residual", "gates and rotary positions"])
def test_onnx_takes_any_number_of_images_of_any_size(runs: dict[str, Path], name: str, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'skipless[onnx]'")
    import onnxruntime

    out = exported(runs[name], tmp_path / "out", "onnx")
    session = onnxruntime.InferenceSession(out / "model.onnx")
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    for size in SIZES:
        pictures = images(*size)
        cls, patches = session.run(None, {"images": pictures.numpy()})
        same(load_vit(runs[name]).model, pictures, torch.from_numpy(cls), torch.from_numpy(patches))


def test_without_a_package_it_is_said(runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("timm", "onnx", "onnxscript"):
        monkeypatch.setitem(sys.modules, package, None)
    words = ["--ckpt", runs["residual"], "--to", "timm", "--out", tmp_path / "out"]
    done = call(export.main, words)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'out'}: not read back, for timm is not installed\n")
    words = ["--ckpt", runs["residual"], "--to", "onnx", "--out", tmp_path / "program"]
    assert "pip install 'skipless[onnx]'" in error_line(call(export.main, words).stderr)
    assert not (tmp_path / "program").exists()


@pytest.mark.parametrize("name", MODELS)
def test_program_of_torch_export(runs: dict[str, Path], name: str, tmp_path: Path) -> None:
    out = exported(runs[name], tmp_path / "out", "torch-export")
    program = torch.export.load(out / "model.pt2").module()
    for size in SIZES:
        same(load_vit(runs[name]).model, images(*size), *program(images(*size)))


def test_card_says_what_the_run_recorded(runs: dict[str, Path], tmp_path: Path) -> None:
    sha256 = load_vit(runs["skipless"]).sha256
    result = {"dataset": "voc12", "split": "val", "images": 1449, "metric": "mIoU", "protocol": "quick", "value": 0.5}
    for number, owner in enumerate((sha256, "another")):
        file = tmp_path / f"results/{number}/segmentation.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({**result, "value": 0.5 + number / 4, "checkpoint": {"sha256": owner}}))
    more = ("--license", "apache-2.0", "--results", tmp_path / "results")
    card = (exported(runs["skipless"], tmp_path / "my model", "safetensors", *more) / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert "# my model\n" in card
    assert "without skip connections" in card
    assert "Do not load the weights into another library's ViT" in card
    assert "| k-NN accuracy in training, last block | its own images by folder | 37.5 % |" in card
    assert "| mIoU (quick) | voc12, val, 1,449 images | 50.0 % |" in card
    assert "75.0" not in card
    assert "On `photos`, 3 epochs of batches of 8, on an abacus; commit c0ffee" in card
    assert "data.path: somewhere/photos" in card
    assert "runs/a" not in card
    assert "mean of the patches" in card
    shipped = (exported(Path("skipless:tiny"), tmp_path / "shipped", "safetensors") / "README.md").read_text()
    assert "On `imagenette128`, 6 epochs of batches of 64, on Intel" in shipped
    other = exported(runs["residual"] / "backbone.safetensors", tmp_path / "other", "torch-export")
    assert "ask whoever trained these weights" in (other / "README.md").read_text()


def test_refusals_leave_nothing_behind(runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--ckpt", runs["skipless"], "--to", "safetensors", "--out", tmp_path / "out"]
    (tmp_path / "figures.json").write_text("[]")
    assert "no multiple of the patch" in error_line(call(export.main, [*words, "--size", 30]).stderr)
    assert "is no result" in error_line(call(export.main, [*words, "--results", tmp_path / "figures.json"]).stderr)
    with monkeypatch.context() as patch:
        wrong = Written(lambda: lambda x: load_vit(runs["skipless"]).model.features(x + 1)[0][::-1], "", "")
        patch.setitem(export.WRITERS, "safetensors", lambda folder, loaded: wrong)
        assert "computes other features" in error_line(call(export.main, words).stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
    exported(runs["skipless"], tmp_path / "out", "safetensors")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert "is there already" in error_line(call(export.main, words).stderr)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
