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
from helpers import sines
from safetensors.torch import save_file
from torch import Tensor

from skipless.ssl.model.load import Loaded, load_vit

# So small that everything is fast, and wide enough that heads cannot be taken for usual ones.
SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
SMALL |= {"image_size": 32, "patch_size": 8}
SIZES = [(4, 4), (5, 3), (8, 6)]  # in patches; the first is the native one


def noisy(model: torch.nn.Module, seed: int = 0) -> Any:
    """With biases, norms, scales and positions that matter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tokens(loaded: Loaded, images: Tensor) -> Tensor:
    with torch.no_grad():
        return loaded.model([images])[0]


def same_at_three_sizes(loaded: Loaded, reference: Callable[[Tensor], Tensor]) -> None:
    for h, w in SIZES:
        images = torch.randn(
            2, 3, h * loaded.model.patch, w * loaded.model.patch, generator=torch.Generator().manual_seed(1)
        )
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
    "Dinov2WithRegistersModel, SwiGLU": (
        "Dinov2WithRegisters",
        {"use_swiglu_ffn": True, "num_register_tokens": 4},
        "DINOv2 with registers",
    ),
    "DINOv3ViTModel": ("DINOv3ViT", {"num_register_tokens": 4}, "DINOv3"),
    "DINOv3ViTModel, other periods": ("DINOv3ViT", {"rope_theta": 50.0, "layer_norm_eps": 1e-3}, "DINOv3"),
    "DINOv3ViTModel, SwiGLU": ("DINOv3ViT", {"use_gated_mlp": True, "hidden_act": "silu"}, "DINOv3"),
}


def hugging_face(name: str, settings: dict[str, Any]) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """Hugging Face's model, and a function that gives its tokens."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = getattr(transformers, f"{name}Config")(**settings)
    model = noisy(getattr(transformers, f"{name}Model")(config))

    def reference(images: Tensor) -> Tensor:
        options: dict[str, Any] = {}
        if name in ("ViT", "ViTMSN", "ViTMAE"):
            options["interpolate_pos_encoding"] = True
        if name == "ViTMAE":  # whose order of patches would be random
            patches = images.shape[2] * images.shape[3] // config.patch_size**2
            options["noise"] = torch.arange(patches).expand(len(images), -1) / patches
        return model(images, **options).last_hidden_state

    return model, reference


@pytest.mark.parametrize("case", HUGGING_FACE)
def test_folders_of_hugging_face(case: str, tmp_path: Path) -> None:
    model, reference = hugging_face(HUGGING_FACE[case][0], SMALL | HUGGING_FACE[case][1])
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
    model, reference = hugging_face("Dinov2", SMALL)
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


# Shapes as their makers have them, one block deep: class, width, heads, hidden width, what else, and family.
DINOV3 = {f"DINOv3 {size}{', SwiGLU' if gated else ''}": ("DINOv3ViT", *shape, more, "DINOv3")
          for size, shape in {"S": (384, 6, 1536), "B": (768, 12, 3072), "L": (1024, 16, 4096)}.items()
          for gated, more in {False: {"num_register_tokens": 4},
                              True: {"use_gated_mlp": True, "hidden_act": "silu"}}.items()}  # fmt: skip
GIANT: dict[str, Any] = {"use_swiglu_ffn": True, "num_register_tokens": 4, "patch_size": 14, "image_size": 56}
MAKERS: dict[str, tuple[str, int, int, int, dict[str, Any], str]] = DINOV3 | {
    "DINOv2 g with registers": ("Dinov2WithRegisters", 1536, 24, 4096, GIANT, "DINOv2 with registers"),
    "MAE B": ("ViTMAE", 768, 12, 3072, {"mask_ratio": 0.0, "layer_norm_eps": 1e-6}, "MAE, MoCo v3"),
    "MoCo v3 S": ("ViT", 384, 12, 1536, {"layer_norm_eps": 1e-6}, "MAE, MoCo v3"),
    "MoCo v3 B": ("ViT", 768, 12, 3072, {"layer_norm_eps": 1e-6}, "MAE, MoCo v3"),
}
# Hugging Face's names as the makers'.
RENAMED = {
    "embeddings.patch_embeddings.": "patch_embed.proj.", "projection.": "", "position_embeddings": "pos_embed",
    "embeddings.": "", "encoder.layer.": "blocks.", "model.layer.": "blocks.", "layers.": "blocks.",
    "layernorm_before": "norm1", "layernorm_after": "norm2", "layernorm": "norm", "attention.o_proj": "attn.proj",
    "attention.": "attn.", "layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma",
}  # fmt: skip


def makers(case: str, model: Any) -> dict[str, Tensor]:
    """A model's tensors under the names and in the form of facebookresearch's dinov3, dinov2, mae and moco-v3."""
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        for theirs, ours in RENAMED.items():
            name = name.replace(theirs, ours)
        state[name] = tensor
    third, v3 = model.config.hidden_size, case.startswith("DINOv3")
    for kind in ("weight", "bias"):
        parts = [state.pop(f"blocks.0.attn.{p}_proj.{kind}", torch.full((third,), torch.nan)) for p in "qkv"]
        state[f"blocks.0.attn.qkv.{kind}"] = torch.cat(parts)  # a bias of keys that nobody trains may be anything
        halves = [f"blocks.0.mlp.{half}_proj.{kind}" for half in ("gate", "up", "down")]
        names = ("w1", "w2", "w3") if halves[0] in state else ("", "fc1", "fc2")
        for theirs, own in zip(halves, names, strict=True):
            if theirs in state:
                state[f"blocks.0.mlp.{own}.{kind}"] = state.pop(theirs)
        if case.startswith("DINOv2"):
            gates = [state.pop(f"blocks.0.mlp.w{n}.{kind}") for n in (1, 2)]
            state[f"blocks.0.mlp.w12.{kind}"] = torch.cat(gates)
        if v3:
            state[f"local_cls_norm.{kind}"] = torch.ones(third)
        if case.startswith("MAE"):
            state[f"decoder_blocks.0.norm1.{kind}"] = torch.ones(512)
    if v3:
        state["blocks.0.attn.qkv.bias_mask"] = torch.cat([torch.full((third,), x) for x in (1.0, 0.0, 1.0)])
        state["rope_embed.periods"] = 100 ** (torch.arange(0, 32, 2) / 32)
        if (registers := state.pop("register_tokens")).numel():
            state["storage_tokens"] = registers
    return state


@pytest.mark.parametrize("case", MAKERS)
def test_files_of_their_makers(case: str, tmp_path: Path) -> None:
    """Nothing lies beside them: heads, epsilons, periods and how positions are interpolated must be known."""
    name, dim, heads, hidden, more, family = MAKERS[case]
    shape = {"hidden_size": dim, "num_hidden_layers": 1, "num_attention_heads": heads, "intermediate_size": hidden}
    model, reference = hugging_face(name, {"image_size": 64, "patch_size": 16} | shape | more)
    if case.startswith("MoCo"):
        model.embeddings.position_embeddings.data = sines(dim, 4)
    wrapper = {"DINOv3 S": "teacher.backbone.", "MoCo v3 S": "module.base_encoder."}.get(case, "")
    state = below(wrapper, makers(case, model))
    satellites = case == "DINOv3 L"
    path = tmp_path / f"{'dinov3_vitl16_pretrain_sat493m' if satellites else 'vit'}.pth"
    torch.save({"model": state}, path)
    loaded = load_vit(path)
    assert loaded.family == family
    assert loaded.assumed_heads != case.startswith("DINOv3")
    assert loaded.mean == ((0.430, 0.411, 0.296) if satellites else (0.485, 0.456, 0.406))
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
    for h, w in SIZES:
        images = torch.randn(2, 3, h * patch, w * patch, generator=torch.Generator().manual_seed(1))
        reference = copy.deepcopy(made[0])
        if TIMM[name] != "DINOv2":  # whose makers interpolate positions in their own way
            reference.set_input_size(img_size=images.shape[2:])
        elif (h, w) != (4, 4):
            continue
        with torch.no_grad():
            torch.testing.assert_close(tokens(loaded, images), reference.forward_features(images), atol=1e-4, rtol=0)


def vit(seed: int = 0) -> Any:
    """timm's, one block deep."""
    from timm.models.vision_transformer import VisionTransformer

    size = {"img_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 1, "num_heads": 3, "num_classes": 0}
    return noisy(VisionTransformer(**size), seed)


def below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def renamed(state: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {name.replace(old, new): tensor for name, tensor in state.items()}


def without_key_bias(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """BEiT's form of it; the bias of keys changes nothing."""
    bias = state["blocks.0.attn.qkv.bias"]
    parts = {"blocks.0.attn.q_bias": bias[:192], "blocks.0.attn.v_bias": bias[384:]}
    return {name: tensor for name, tensor in state.items() if not name.endswith("qkv.bias")} | parts


HEAD = {"head.mlp.0.weight": torch.zeros(8, 192), "fc.fc1.weight": torch.zeros(8, 192)}
DECODER = {"decoder_pos_embed": torch.ones(1, 17, 8), "mask_token": torch.ones(1, 1, 8)}
# What a training script of each project leaves: the file's name, and its content out of the state dicts of the
# network that is wanted and of another.
FORMS: dict[str, tuple[str, Callable[[dict[str, Tensor], dict[str, Tensor]], Any]]] = {
    "bare, under a name of .bin": ("pytorch_model.bin", lambda s, _: s),
    "module., by DistributedDataParallel": ("a.pth", lambda s, _: below("module.", s)),
    "model.": ("a.pt", lambda s, _: below("model.", s)),
    "state_dict beside an epoch, .pth.tar": (
        "a.pth.tar", lambda s, _: {"state_dict": below("module.", s), "epoch": 3, "arch": "vit_small"}),
    "backbone. beside a head": ("a.pth", lambda s, _: below("backbone.", s | HEAD)),
    "teacher.backbone., by DINOv2": (
        "a.pth", lambda s, o: {"model": below("student.backbone.", o) | below("teacher.backbone.", s)}),
    "student_backbone., by lightly": ("a.ckpt", lambda s, _: {"state_dict": below("student_backbone.", s) | HEAD}),
    "encoder.": ("a.pth", lambda s, _: below("encoder.", s) | HEAD),
    "visual.trunk., by open_clip": ("open_clip_pytorch_model.bin", lambda s, _: below("visual.trunk.", s)),
    "base_encoder., by MoCo v3": (
        "a.pth.tar", lambda s, o: {"state_dict": below("module.momentum_encoder.", o)
                                   | below("module.base_encoder.", s | HEAD)}),
    "target_encoder, by MSN and I-JEPA": (
        "a.pth.tar", lambda s, o: {"encoder": below("module.", o), "target_encoder": below("module.", s)}),
    "Lightning": (
        "a.ckpt", lambda s, _: {"state_dict": below("model.backbone.", s), "pytorch-lightning_version": "2.4",
                                "hyper_parameters": {"lr": 1e-3, "data": Path("/data")}, "callbacks": {}}),
    "MAE with its decoder": ("a.pth", lambda s, _: {"model": s | below("decoder_blocks.0.", s) | DECODER}),
    "MAE, fine-tuned, with fc_norm": (
        "a.pth", lambda s, _: {"model": {n if n[:5] != "norm." else f"fc_{n}": t for n, t in s.items()}}),
    "iBOT, with a Namespace": (
        "a.pth", lambda s, o: {"teacher": below("backbone.", s | {"masked_embed": torch.ones(1, 192)}),
                               "student": below("module.backbone.", o), "args": argparse.Namespace(lr=1.0)}),
    "numbers of NumPy": (
        "a.pt", lambda s, _: {"model": s, "best": np.float64(0.7), "step": np.int64(3), "acc": np.float32(1.5)}),
    "no bias of keys, by BEiT": ("a.pth", lambda s, _: {"module": without_key_bias(s)}),
    "_orig_mod., by torch.compile": ("a.pt", lambda s, _: renamed(s, "blocks.0.", "_orig_mod.blocks.0._orig_mod.")),
    "_fsdp_wrapped_module., by FSDP": (
        "a.pt", lambda s, _: below("_fsdp_wrapped_module.", renamed(s, "s.0.", "s.0._fsdp_wrapped_module."))),
    "state_dict_ema": ("a.pth.tar", lambda s, o: {"epoch": 1, "state_dict_ema": s}),
    "teacher within model": ("a.pth", lambda s, o: {"model": {"student": o, "teacher": {"backbone": s}}}),
    "parameters": ("a.pth", lambda s, _: {name: torch.nn.Parameter(tensor) for name, tensor in s.items()}),
    "half precision": ("a.pth", lambda s, _: {name: tensor.half() for name, tensor in s.items()}),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_checkpoints(form: str, tmp_path: Path) -> None:
    name, content = FORMS[form]
    model = vit()
    if form == "half precision":
        model = model.half().float()
    torch.save(content(model.state_dict(), vit(1).state_dict()), tmp_path / name)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model.forward_features(images)
    torch.testing.assert_close(tokens(load_vit(tmp_path / name), images), expected, atol=1e-4, rtol=0)


# Folders of Hugging Face's that are no ViT of ours.
TOWER = r"a vision tower of CLIP or SigLIP: give timm's name of it, as in timm:vit_base"
BIAS = "BEiT or data2vec.* relative position bias to attention: .*take a DINOv2"
FOLDERS: dict[str, tuple[dict[str, Any], str]] = {
    "Data2VecVision": ({"use_relative_position_bias": True}, BIAS),
    "Beit": ({"use_relative_position_bias": True}, BIAS),
    "CLIPVision": ({}, TOWER),
    "SiglipVision": ({}, TOWER),
    "DeiT": ({}, "a distilled DeiT, .*: take one without"),
    "DINOv3ConvNext": ({"hidden_sizes": [8, 16], "depths": [1, 1]}, "a convolutional network: only ViTs"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_of_other_networks_are_refused(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    settings = SMALL | {"num_hidden_layers": 1} | FOLDERS[name][0]
    getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**settings)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"model\.safetensors looks like {FOLDERS[name][1]}"):
        load_vit(tmp_path)


VIT = {"embed_dim": 192, "depth": 1, "num_heads": 3, "img_size": 56}
OF_TIMM: dict[str, tuple[dict[str, Any], str]] = {
    "vit_base_patch16_siglip_224": (VIT | {"img_size": 32}, "a vision tower of CLIP or SigLIP, and nothing tells"),
    "vit_base_patch16_clip_224": (VIT | {"img_size": 32}, "a vision tower of CLIP or SigLIP, and nothing tells"),
    "deit_tiny_distilled_patch16_224": (VIT | {"img_size": 32}, "a distilled DeiT, .*: take one without"),
    "eva02_tiny_patch14_224": (VIT, "EVA-02, with learned and rotary positions"),
    "eva02_base_patch14_224": (VIT, "EVA-02, with learned and rotary positions"),
    "vit_small_patch16_rope_224": (VIT | {"img_size": 32}, "a ViT with rotary positions of its own"),
    "vit_base_patch16_rope_reg1_gap_256": (VIT | {"img_size": 32}, "a ViT with rotary positions of its own"),
    "swin_tiny_patch4_window7_224": ({"embed_dim": 24, "depths": (1, 1, 1, 1)}, "a Swin Transformer: only plain"),
    "resnet18": ({}, "a convolutional network: only ViTs are supported"),
    "convnext_atto": ({"dims": (8, 8, 8, 8)}, "a convolutional network: only ViTs are supported"),
}


@pytest.mark.parametrize("name", OF_TIMM)
def test_files_of_other_networks_of_timm_are_refused(name: str, tmp_path: Path) -> None:
    """Nothing beside these files says what they are."""
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.save(timm.create_model(name, **OF_TIMM[name][0]).state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=rf"other\.pth looks like {OF_TIMM[name][1]}"):
        load_vit(tmp_path / "other.pth")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["base_model.model.blocks.0.attn.qkv.lora_A.weight"], "adapter.*merge it"),
        (["visual.transformer.resblocks.0.ln_1.weight"], TOWER),
        (["module.base_encoder.patch_embed.proj.0.weight"], "MoCo v3's vit_conv: take one whose patch embedding"),
        (["blocks.0.attn.q_norm.weight"], "normalized queries and keys"),
    ],
)
def test_what_is_refused_says_what_it_looks_like(names: list[str], words: str, tmp_path: Path) -> None:
    save_file({name: torch.ones(2, 2) for name in names}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=rf"other\.safetensors looks like .*{words}"):
        load_vit(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {n: t.to(torch.int8) for n, t in s.items()}, "is quantized, in .*: give the file that it was made"),
        (lambda s: s | {"patch_embed.proj.weight": torch.ones(192, 3, 2, 8, 8)}, "looks like a network for videos"),
        (lambda s: {"teacher": HEAD}, "is not a ViT under .*, and has heads alone; if timm has it, give timm:NAME"),
        (lambda s: {"optimizer": {"param_groups": []}}, "holds no tensors, neither .*: save a model's state_dict"),
    ],
)
def test_files_of_another_kind_are_refused(change: Callable[[Any], Any], words: str, tmp_path: Path) -> None:
    torch.save(change(vit().state_dict()), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=rf"other\.pth {words}"):
        load_vit(tmp_path / "other.pth")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("flax_model.msgpack", "weights of Flax: give the same model's .safetensors"),
        ("ViT-B_16.npz", "weights of JAX: timm has most of them"),
        ("tf_model.h5", "weights of TensorFlow: give the same model's .safetensors"),
        ("model.onnx", "a program: give the checkpoint that it was exported from"),
        ("folder/adapter_config.json", "an adapter without its network .*: merge it"),
        ("folder/.metadata", "a distributed checkpoint of torch: make one file of it by python -m torch"),
    ],
)
def test_other_files_and_folders_are_refused(name: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    with pytest.raises(ValueError, match=f" looks like {words}"):
        load_vit(path.parent if "folder" in name else path)


@pytest.mark.parametrize("name", ["vit_base_patch32_clip_quickgelu_224", "vit_base_patch16_siglip_224"])
def test_a_folder_of_timm_is_what_its_config_names(name: str, tmp_path: Path) -> None:
    """Epsilon and activation of these are neither in the tensors nor in config.json, but in timm's function."""
    timm = pytest.importorskip("timm", reason="timm is not installed")
    patch = 32 if "patch32" in name else 16
    small = {"embed_dim": 48, "depth": 2, "num_heads": 4, "img_size": 4 * patch}
    model = noisy(timm.create_model(name, num_classes=0, **small))
    timm.models.save_for_hf(model, tmp_path, model_args=small, safe_serialization=True)
    loaded = load_vit(tmp_path)
    assert loaded.mean == tuple(model.pretrained_cfg["mean"])
    images = torch.randn(2, 3, 4 * patch, 4 * patch, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(tokens(loaded, images), model.forward_features(images), atol=1e-4, rtol=0)


def test_programs_and_names_that_are_not_there_are_refused(tmp_path: Path) -> None:
    torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(str(tmp_path / "scripted.pt"))
    with pytest.raises(ValueError, match=r"TorchScript archive.*state_dict"):
        load_vit(tmp_path / "scripted.pt")
    with pytest.raises(
        FileNotFoundError, match=r"skipless:huge: no such weights come with this version .*skipless:tiny"
    ):
        load_vit("skipless:huge")
