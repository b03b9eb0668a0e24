"""Backbones as folders of weights: ours with the module that reads it, timm's, Hugging Face's."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from skipless.common.files import write_text
from skipless.ssl.formats import modeling_skipless
from skipless.ssl.model.load import Loaded

Reloaded = Callable[[Tensor], tuple[Tensor, Tensor]]


class Written(NamedTuple):
    """What a writer left in a folder."""

    reload: Callable[[], Reloaded]
    """Reads it back: images to CLS [B, D] and patches [B, h, w, D]. Raises ImportError where that needs a package that
    is not installed."""
    load: str
    """The lines of Python that load it, for the model card."""
    library: str
    """Whose format it is, by Hugging Face's identifier."""
    any_size: bool = False
    """Whether it has the backbone's features at every size, not at that of its positions alone."""


def write_own(folder: Path, loaded: Loaded, automodel: bool = False) -> Written:
    """Weights under our names, and modeling_skipless.py, which reads them without this package.

    Args:
        automodel: whether the card shows how Hugging Face's AutoModel reads them; it can in any case.
    """
    architecture = loaded.model.architecture
    config = {**modeling_skipless.CONFIG, "architecture": architecture, "pool": loaded.pool}
    write_json(folder / "config.json", config)
    write_tensors(folder, loaded.model.state_dict(), {"architecture": json.dumps(architecture)})
    write_preprocessing(folder, loaded)
    shutil.copyfile(str(modeling_skipless.__file__), folder / "modeling_skipless.py")
    return Written(
        lambda: modeling_skipless.load(folder),
        AUTOMODEL.format(", trust_remote_code=True") if automodel else OWN,
        "transformers" if automodel else "pytorch",
        any_size=True,
    )


OWN = """from modeling_skipless import load  # the file beside the weights; it needs torch and safetensors

model = load("FOLDER")
cls, patches = model(images)  # [B, D] and [B, h, w, D]"""

AUTOMODEL = """from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained("FOLDER"{}).eval()
images = AutoImageProcessor.from_pretrained("FOLDER")(picture, return_tensors="pt")
tokens = model(**images).last_hidden_state  # class token, registers, patches"""

TIMM = """import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
tokens = model.forward_features(images)  # class token, registers, patches
vectors = model(images)"""


def write_hugging_face(folder: Path, loaded: Loaded) -> Written:
    """Dinov2Model's or Dinov2WithRegistersModel's layout, where the network is one of them; else ours, which AutoModel
    reads too. A network without layer scale gets one of 1."""
    ratio = hugging_face_ratio(loaded.model.architecture)
    if ratio is None:
        return write_own(folder, loaded, automodel=True)
    a, prefix = loaded.model.architecture, loaded.model.prefix
    name = "Dinov2WithRegisters" if a["registers"] else "Dinov2"
    activations = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}
    config = {
        "architectures": [f"{name}Model"],
        "model_type": "dinov2_with_registers" if a["registers"] else "dinov2",
        "hidden_size": a["dim"],
        "num_hidden_layers": a["depth"],
        "num_attention_heads": a["heads"],
        "mlp_ratio": ratio,
        "hidden_act": activations[a.get("activation", "gelu")],
        "layer_norm_eps": a.get("norm_eps", 1e-6),
        "image_size": a["image_size"],
        "patch_size": a["patch"],
        "use_swiglu_ffn": a.get("swiglu", False),
    } | ({"num_register_tokens": a["registers"]} if a["registers"] else {})
    write_json(folder / "config.json", config)
    write_tensors(folder, hugging_face_tensors(loaded), {})
    write_preprocessing(folder, loaded)

    def reload() -> Reloaded:
        from transformers import AutoModel

        model = AutoModel.from_pretrained(folder).eval()
        return lambda images: split(model(pixel_values=images).last_hidden_state, prefix, images, a["patch"])

    same_rule = not a["position_offset"] and a["position_antialias"] == bool(a["registers"])
    return Written(reload, AUTOMODEL.format(""), "transformers", any_size=same_rule)


def hugging_face_ratio(a: dict[str, Any]) -> int | None:
    """`mlp_ratio` of Dinov2Model's that gives the MLPs of an architecture; None where it is no Dinov2Model."""
    usual = a.get("class_token", True) and not (a.get("pre_norm") or a.get("shaped"))
    plain = a["residual"] and a.get("rope_base") is None and usual
    hidden = round(a["dim"] * a["mlp_ratio"])
    for ratio in range(1, 13):
        wide: int = a["dim"] * ratio
        if plain and hidden == ((int(wide * 2 / 3) + 7) // 8 * 8 if a.get("swiglu") else wide):
            return ratio
    return None


def hugging_face_tensors(loaded: Loaded) -> dict[str, Tensor]:
    """Under the names that facebook/dinov2-* have."""
    ours, dim = loaded.model.state_dict(), loaded.model.dim
    names: dict[str, str] = {
        "cls_token": "embeddings.cls_token",
        "register_tokens": "embeddings.register_tokens",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "norm": "layernorm",
    }
    theirs = {"embeddings.mask_token": torch.zeros(1, dim)}
    for name, tensor in ours.items():
        start, _, kind = name.rpartition(".")
        if name in names or start in names:
            theirs[names.get(name) or f"{names[start]}.{kind}"] = tensor
            continue
        _, number, part = start.split(".", 2)
        block = f"encoder.layer.{number}"
        if part == "attn.qkv":
            for which, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                theirs[f"{block}.attention.attention.{which}.{kind}"] = third
        elif part in ("ls1", "ls2"):
            theirs[f"{block}.layer_scale{part[-1]}.lambda1"] = tensor
        else:
            renamed = {"attn.proj": "attention.output.dense", "mlp.w12": "mlp.weights_in", "mlp.w3": "mlp.weights_out"}
            theirs[f"{block}.{renamed.get(part, part)}.{kind}"] = tensor
    for index in range(loaded.model.depth):
        for scale in (1, 2):
            theirs.setdefault(f"encoder.layer.{index}.layer_scale{scale}.lambda1", torch.ones(dim))
    return theirs


def write_timm(folder: Path, loaded: Loaded) -> Written:
    """The layout of timm's models on Hugging Face's hub: timm.create_model("local-dir:FOLDER", pretrained=True).

    Raises:
        ValueError: timm's VisionTransformer is another network.
    """
    a = loaded.model.architecture
    hindrances = {
        "no skip connections": not a["residual"],
        "rotary positions": a.get("rope_base") is not None,
        "gated MLPs": a.get("swiglu", False),
        "shaped attention": a.get("shaped", False),
        f"norms with an epsilon of {a.get('norm_eps', 1e-6):g}": a.get("norm_eps", 1e-6) > 1e-6,
    }
    if found := [name for name, there in hindrances.items() if there]:
        raise ValueError(f"{loaded.path} has {found[0]}, which timm's VisionTransformer cannot have: give --to hf")
    tensors, prefix, side = dict(loaded.model.state_dict()), loaded.model.prefix, a["image_size"]
    positions = tensors["pos_embed"]
    tensors["pos_embed"] = positions[:, 1:]
    if loaded.model.class_token:  # timm's newer models have positions for patches alone
        tensors["cls_token"] = tensors["cls_token"] + positions[:, :1]
    if a["registers"]:
        tensors["reg_token"] = tensors.pop("register_tokens")
    pool = "avg" if loaded.pool == "mean" or not loaded.model.class_token else "token"
    arguments = {
        "img_size": side, "patch_size": a["patch"], "embed_dim": a["dim"], "depth": a["depth"],
        "num_heads": a["heads"], "mlp_ratio": a["mlp_ratio"], "init_values": a["layer_scale"],
        "reg_tokens": a["registers"], "class_token": loaded.model.class_token, "no_embed_class": True,
        "dynamic_img_size": True, "pre_norm": a.get("pre_norm", False), "act_layer": a.get("activation", "gelu"),
        "fc_norm": False, "global_pool": pool,
    }  # fmt: skip
    pictures = {
        "input_size": [3, side, side], "fixed_input_size": False, "interpolation": "bicubic", "crop_pct": 0.875,
        "mean": loaded.mean, "std": loaded.std, "num_classes": 0, "pool_size": None, "first_conv": "patch_embed.proj",
    }  # fmt: skip
    config = {
        "architecture": "vit_base_patch16_224", "num_classes": 0, "num_features": a["dim"], "global_pool": pool,
        "model_args": arguments, "pretrained_cfg": pictures,
    }  # fmt: skip
    write_json(folder / "config.json", config)
    write_tensors(folder, tensors, {})

    def reload() -> Reloaded:
        import timm

        model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        return lambda images: split(model.forward_features(images), prefix, images, a["patch"])

    same_rule = not a["position_offset"] and a["position_antialias"]
    return Written(reload, TIMM, "timm", any_size=same_rule)


def split(tokens: Tensor, prefix: int, images: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """CLS [B, D] and patches [B, h, w, D] of tokens [B, prefix + h * w, D]; without CLS, the mean of the patches."""
    patches = tokens[:, prefix:]
    cls = tokens[:, 0] if prefix else patches.mean(1)
    return cls, patches.unflatten(1, (images.shape[2] // patch, images.shape[3] // patch))


def write_tensors(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """model.safetensors, in float32."""
    plain = {name: tensor.detach().float().contiguous().clone() for name, tensor in tensors.items()}
    save_file(plain, folder / "model.safetensors", {"format": "pt", **metadata})
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)  # it is made for its owner alone


def write_preprocessing(folder: Path, loaded: Loaded) -> None:
    """preprocessor_config.json, as Hugging Face's image processors read it."""
    side = loaded.model.architecture["image_size"]
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "BitImageProcessor",
            "do_resize": True,
            "size": {"shortest_edge": round(side * 8 / 7)},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": {"height": side, "width": side},
            "do_rescale": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "image_mean": loaded.mean,
            "image_std": loaded.std,
        },
    )


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A small file in JSON."""
    write_text(path, json.dumps(content, indent=2) + "\n")
