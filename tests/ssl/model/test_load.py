"""Checkpoints of every family against the classes of Hugging Face and timm, and the wrappers that they come in."""

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny_vit
from safetensors.torch import save_file
from torch import Tensor

from skipless.ssl.model.load import Loaded, load_vit

# So small that everything is fast, and wide enough that heads cannot be taken for usual ones.
SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
SIZES = [(32, 32), (40, 24), (64, 48)]


def noisy(model: torch.nn.Module) -> Any:
    """With biases, norms, scales and positions that matter."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tokens(loaded: Loaded, images: Tensor) -> Tensor:
    with torch.no_grad():
        return loaded.model([images])[0]


def same_at_three_sizes(loaded: Loaded, reference: Callable[[Tensor], Tensor]) -> None:
    for height, width in SIZES:
        images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected = reference(images)
        torch.testing.assert_close(tokens(loaded, images), expected, atol=1e-4, rtol=0)


HUGGING_FACE = {
    "ViTModel": ("ViT", {}, "ViT (Hugging Face)"),
    "ViTMSNModel": ("ViTMSN", {}, "ViT (Hugging Face)"),
    "ViTMAEModel": ("ViTMAE", {"mask_ratio": 0.0}, "ViT (Hugging Face)"),
    "Dinov2Model": ("Dinov2", {"mlp_ratio": 2}, "DINOv2 (Hugging Face)"),
    "Dinov2Model, SwiGLU": ("Dinov2", {"use_swiglu_ffn": True}, "DINOv2 (Hugging Face)"),
    "Dinov2WithRegistersModel": ("Dinov2WithRegisters", {"num_register_tokens": 4}, "DINOv2 with registers"),
    "DINOv3ViTModel": ("DINOv3ViT", {"num_register_tokens": 4}, "DINOv3"),
    "DINOv3ViTModel, other periods": ("DINOv3ViT", {"rope_theta": 50.0, "layer_norm_eps": 1e-3}, "DINOv3"),
    "DINOv3ViTModel, SwiGLU": ("DINOv3ViT", {"use_gated_mlp": True, "hidden_act": "silu"}, "DINOv3"),
}


def hugging_face(case: str) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """Hugging Face's model, and a function that gives its tokens."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    name, more, _ = HUGGING_FACE[case]
    config = getattr(transformers, f"{name}Config")(**SMALL, image_size=32, patch_size=8, **more)
    model = noisy(getattr(transformers, f"{name}Model")(config))

    def reference(images: Tensor) -> Tensor:
        options: dict[str, Any] = {}
        if name in ("ViT", "ViTMSN", "ViTMAE"):
            options["interpolate_pos_encoding"] = True
        if name == "ViTMAE":  # whose order of patches would be random
            patches = images.shape[2] * images.shape[3] // 64
            options["noise"] = torch.arange(patches).expand(len(images), -1) / patches
        return model(images, **options).last_hidden_state

    return model, reference


@pytest.mark.parametrize("case", HUGGING_FACE)
def test_folders_of_hugging_face(case: str, tmp_path: Path) -> None:
    model, reference = hugging_face(case)
    model.save_pretrained(tmp_path)
    pictures = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pictures))
    for ckpt in (tmp_path, tmp_path / "model.safetensors"):
        loaded = load_vit(ckpt)
        assert loaded.family == HUGGING_FACE[case][2]
        assert not loaded.assumed_heads
        assert (loaded.mean, loaded.std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
        same_at_three_sizes(loaded, reference)


def test_hugging_face_by_name_in_several_files_and_as_a_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    model, reference = hugging_face("Dinov2Model")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **_: str(tmp_path / name.removeprefix("facebook/")))
    same_at_three_sizes(load_vit("hf:facebook/"), reference)
    state = {"module." + name: tensor for name, tensor in model.state_dict().items()}
    for file in tmp_path.glob("model*"):
        file.unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    same_at_three_sizes(load_vit(tmp_path), reference)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"has a config\.json, but neither"):
        load_vit(tmp_path)


def makers_dinov3(case: str) -> tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]:
    """DINOv3's tensors under the names and in the form of its makers (facebookresearch/dinov3)."""
    model, reference = hugging_face(case)
    state, made = model.state_dict(), {}
    plain = {"cls_token": "cls_token", "register_tokens": "storage_tokens", "mask_token": "mask_token"}
    for theirs, ours in plain.items():
        made[ours] = state[f"embeddings.{theirs}"]
    for kind in ("weight", "bias"):
        made[f"patch_embed.proj.{kind}"] = state[f"embeddings.patch_embeddings.{kind}"]
        made[f"norm.{kind}"] = state[f"norm.{kind}"]
        made[f"local_cls_norm.{kind}"] = torch.ones(48)
    made["rope_embed.periods"] = model.config.rope_theta ** (torch.arange(0, 6, 2) / 6)
    for block in range(2):
        here, there = f"blocks.{block}.", f"model.layer.{block}."
        made[f"{here}attn.qkv.weight"] = torch.cat([state[f"{there}attention.{p}_proj.weight"] for p in "qkv"])
        q, v = state[f"{there}attention.q_proj.bias"], state[f"{there}attention.v_proj.bias"]
        made[f"{here}attn.qkv.bias"] = torch.cat([q, torch.full((48,), 7.0), v])
        made[f"{here}attn.qkv.bias_mask"] = torch.cat([torch.ones(48), torch.zeros(48), torch.ones(48)])
        for number in (1, 2):
            made[f"{here}ls{number}.gamma"] = state[f"{there}layer_scale{number}.lambda1"]
        gated = "SwiGLU" in case
        mlp = (
            {"gate_proj": "w1", "up_proj": "w2", "down_proj": "w3"} if gated else {"up_proj": "fc1", "down_proj": "fc2"}
        )
        for kind in ("weight", "bias"):
            made[f"{here}attn.proj.{kind}"] = state[f"{there}attention.o_proj.{kind}"]
            for number in (1, 2):
                made[f"{here}norm{number}.{kind}"] = state[f"{there}norm{number}.{kind}"]
            for theirs, ours in mlp.items():
                made[f"{here}mlp.{ours}.{kind}"] = state[f"{there}mlp.{theirs}.{kind}"]
    return made, reference


@pytest.mark.parametrize("case", ["DINOv3ViTModel", "DINOv3ViTModel, SwiGLU"])
@pytest.mark.parametrize("wrapper", ["", "teacher.backbone."])
def test_dinov3_of_its_makers(case: str, wrapper: str, tmp_path: Path) -> None:
    state, reference = makers_dinov3(case)
    state["blocks.0.attn.qkv.bias"][48:96] = torch.nan  # what nobody trains may be anything
    if "SwiGLU" in case:
        del state["storage_tokens"]
    torch.save({wrapper + name: tensor for name, tensor in state.items()}, tmp_path / "dinov3_sat493m.pth")
    loaded = load_vit(tmp_path / "dinov3_sat493m.pth")
    assert loaded.family == "DINOv3"
    assert not loaded.assumed_heads
    assert loaded.mean == (0.430, 0.411, 0.296)
    same_at_three_sizes(loaded, reference)


# timm's own models, small; SigLIP has no CLS, CLIP a norm before its blocks, and both other activations.
TIMM = {
    "vit_small_patch16_dinov3": "DINOv3",
    "vit_small_plus_patch16_dinov3": "DINOv3",
    "vit_small_patch16_dinov3_qkvb": "DINOv3",
    "vit_giant_patch14_dinov2": "DINOv2",
    "vit_giant_patch14_reg4_dinov2": "DINOv2 with registers",
    "vit_base_patch16_siglip_224": "timm",
    "vit_base_patch16_siglip_gap_224": "timm",
    "vit_base_patch32_clip_quickgelu_224": "timm",
    "vit_base_patch16_224.mae": "timm",
    "vit_base_patch16_clip_224.openai": "timm",
}


@pytest.mark.parametrize("name", TIMM)
def test_models_of_timm(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    create, made = timm.create_model, []
    patch = 14 if "patch14" in name else 32 if "patch32" in name else 16
    options = {"embed_dim": 48, "depth": 2, "num_heads": 4, "img_size": 4 * patch}

    def fake(name: str, pretrained: bool, **kwargs: Any) -> Any:
        made.append(noisy(create(name, pretrained=False, **kwargs, **options)))
        return made[-1]

    monkeypatch.setattr(timm, "create_model", fake)
    loaded = load_vit(f"timm:{name}")
    assert loaded.family == TIMM[name]
    for h, w in ((4, 4), (5, 3), (8, 6)):
        images = torch.randn(2, 3, h * patch, w * patch, generator=torch.Generator().manual_seed(1))
        reference = copy.deepcopy(made[0])
        if TIMM[name] != "DINOv2":  # whose makers interpolate positions in their own way
            reference.set_input_size(img_size=images.shape[2:])
        elif (h, w) != (4, 4):
            continue
        with torch.no_grad():
            torch.testing.assert_close(tokens(loaded, images), reference.forward_features(images), atol=1e-4, rtol=0)


def vit(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = tiny_vit(192, depth=1).state_dict()
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}


def below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


HEAD = {"head.mlp.0.weight": torch.zeros(8, 192), "fc.fc1.weight": torch.zeros(8, 192)}
WRAPPED: dict[str, Callable[[dict[str, Tensor], dict[str, Tensor]], Any]] = {
    "module.": lambda s, _: below("module.", s),
    "model.": lambda s, _: below("model.", s),
    "state_dict": lambda s, _: {"state_dict": below("module.", s), "epoch": 3, "arch": "vit_small"},
    "backbone.": lambda s, _: below("backbone.", s) | HEAD,
    "teacher.backbone.": lambda s, other: {"model": below("teacher.backbone.", s) | below("student.backbone.", other)},
    "student_backbone.": lambda s, _: {"state_dict": below("student_backbone.", s) | HEAD},
    "encoder.": lambda s, _: below("encoder.", s) | HEAD,
    "trunk.": lambda s, _: below("visual.trunk.", s),
    "base_encoder.": lambda s, other: {
        "state_dict": below("module.base_encoder.", s | HEAD) | below("module.momentum_encoder.", other)
    },
    "target_encoder": lambda s, other: {"target_encoder": below("module.", s), "encoder": below("module.", other)},
    "Lightning": lambda s, _: {
        "state_dict": below("model.backbone.", s), "pytorch-lightning_version": "2.4", "global_step": 7,
        "hyper_parameters": {"lr": 1e-3, "data": Path("/data")}, "loops": {}, "callbacks": {}, "lr_schedulers": [],
    },
    "MAE": lambda s, _: {"model": s | below("decoder_blocks.0.", s) | {"decoder_pos_embed": torch.ones(1, 5, 8),
                                                                       "mask_token": torch.ones(1, 1, 8)}},
    "fc_norm": lambda s, _: {"model": {name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: t
                                       for name, t in s.items()}},
    "iBOT": lambda s, other: {"teacher": below("backbone.", s | {"masked_embed": torch.ones(1, 192)}),
                              "student": below("module.backbone.", other), "args": argparse.Namespace(lr=1.0)},
    "numpy": lambda s, _: {"model": s, "best": np.float64(0.7), "step": np.int64(3), "acc": np.float32(1.5)},
    "no key bias": lambda s, _: {name: t for name, t in s.items() if name != "blocks.0.attn.qkv.bias"} | {
        f"blocks.0.attn.{part}_bias": s["blocks.0.attn.qkv.bias"][start : start + 192]
        for part, start in (("q", 0), ("v", 384))
    },
}  # fmt: skip


@pytest.mark.parametrize("ending", [".pth", ".ckpt", ".bin", ".pth.tar"])
@pytest.mark.parametrize("case", WRAPPED)
def test_wrappers(case: str, ending: str, tmp_path: Path) -> None:
    state, other = vit(), vit(1)
    torch.save(WRAPPED[case](state, other), tmp_path / f"a{ending}")
    if case == "no key bias":
        state["blocks.0.attn.qkv.bias"][192:384] = 0
    found = load_vit(tmp_path / f"a{ending}").model.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["base_model.model.blocks.0.attn.qkv.lora_A.weight"], "adapter.*merge it"),
        (["blocks.0.attn.relative_position_bias_table"], "BEiT or data2vec.*relative position bias"),
        (["vision_model.embeddings.patch_embedding.weight"], "tower of CLIP or SigLIP: give timm's name"),
        (["visual.transformer.resblocks.0.ln_1.weight"], "tower of CLIP or SigLIP: give timm's name"),
        (["layers.0.blocks.0.norm1.weight"], "Swin Transformer"),
        (["layer1.0.conv1.weight", "conv1.weight"], "convolutional network"),
        (["stages.0.blocks.0.conv_dw.weight"], "convolutional network"),
        (["blocks.0.attn.q_norm.weight"], "normalized queries and keys"),
    ],
)
def test_what_is_refused_says_what_it_looks_like(names: list[str], words: str, tmp_path: Path) -> None:
    save_file({name: torch.ones(2, 2) for name in names}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=rf"other\.safetensors looks like .*{words}"):
        load_vit(tmp_path / "other.safetensors")


def test_programs_and_names_that_are_not_there_are_refused(tmp_path: Path) -> None:
    torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(str(tmp_path / "scripted.pt"))
    with pytest.raises(ValueError, match=r"TorchScript archive.*state_dict"):
        load_vit(tmp_path / "scripted.pt")
    with pytest.raises(
        FileNotFoundError, match=r"skipless:huge: no such weights come with this version .*skipless:tiny"
    ):
        load_vit("skipless:huge")
