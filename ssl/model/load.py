"""Any Vision Transformer by the name that a user gives: ours, DINO's to DINOv3's, Hugging Face's, timm's.

    loaded = load_vit("runs/photos")      # or a file, a folder of Hugging Face's, hf:NAME, timm:NAME
    loaded.model, loaded.mean, loaded.std

The architecture is read from the tensors: width, depth, patch, registers, layer scale, gates, native grid. What tensors
cannot tell comes from the family they belong to, see `families`, or from a file beside them: a .json of the
checkpoint's name ({"heads": 12}), or Hugging Face's config.json and preprocessor_config.json.
"""

import contextlib
import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skipless.common.pixels import MEAN, STD
from skipless.ssl.model.build import filled_backbone, listed
from skipless.ssl.model.families import (
    TOWERS,
    Triple,
    architecture_of,
    canonical,
    family_of,
    heads_beside,
    normalization,
)
from skipless.ssl.model.files import ENDINGS, OTHERS, Weights, description, file_sha256, first_line, read_checkpoint
from skipless.ssl.model.vit import VisionTransformer
from skipless.ssl.run.folder import last_checkpoint

SHIPPED = Path(__file__).with_name("shipped")  # weights that come with the package: NAME.safetensors, NAME.json

# Files that tell what else a folder is, and what to do.
FOLDERS = {
    "adapter_config.json": "an adapter without its network (LoRA): merge it into the network, and save that",
    ".metadata": "a distributed checkpoint of torch: make one file of it by "
    "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE.pth",
}
TIMM_TOLERANCE = 1e-3  # of the difference to timm's own features, relative to their standard deviation
ACTIVATIONS_THERE = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}
HEAD_FILES = ["config.json", "preprocessor_config.json", "model*.safetensors", "model.safetensors.index.json"]


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model with what belongs to it."""

    model: VisionTransformer
    """In evaluation mode, on the CPU, in float32, without gradients."""
    path: str
    """Where it came from, as given."""
    family: str
    """"skipless", or a name in `families.FAMILIES`."""
    sha256: str
    """Of the checkpoint's file (of the weights, for timm:NAME)."""
    mean: Triple = MEAN
    std: Triple = STD
    """Of RGB in [0, 1], which the network expects to be normalized by."""
    pool: str | None = None
    """What the head read in training, "cls" or "mean" (of the patches); None where the checkpoint does not say."""
    assumed_heads: bool = False
    """Whether the number of attention heads is the usual one for the width, for want of anything that tells it."""
    heads: dict[str, Tensor] = field(default_factory=dict)
    """What a training checkpoint holds beside the backbone, see `families.heads_beside`."""


def load_vit(ckpt: str | Path, weights: Weights = "teacher") -> Loaded:
    """A Vision Transformer with its weights.

    Args:
        ckpt: the folder of a pretraining run; a file (`files.ENDINGS`) of a family in `families`, bare, or a training
            checkpoint behind any prefixes; a folder as Hugging Face's save_pretrained leaves it; hf:NAME, which
            fetches one; timm:NAME, which lets timm fetch weights; skipless:NAME, which come with this package.
        weights: which half of a training checkpoint that holds both.

    Raises:
        ValueError: the file is damaged, would run code, or is no ViT of these families: what it looks like instead.
        FileNotFoundError: there is no such file or folder.
    """
    name = str(ckpt)
    if name.startswith("timm:"):
        return _load_timm(name)
    if name.startswith("hf:"):
        return _load_folder(name, _fetch(name))
    path = shipped_file(name) if name.startswith("skipless:") else Path(ckpt).expanduser()
    if path.is_dir():
        for sign, looks in FOLDERS.items():
            if (path / sign).exists() and not (path / "backbone.json").exists():  # sharded runs leave both
                raise ValueError(f"{path} looks like {looks}")
        if not (path / "backbone.safetensors").exists() and (path / "config.json").exists():
            return _load_folder(name, path)
        path = _export(path, weights)
    if path.name == "last.pt":
        path = last_checkpoint(path.parent) or path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; give a file, the folder of a run, hf:NAME or timm:NAME")
    if path.suffix in OTHERS:
        raise ValueError(f"{path} looks like {OTHERS[path.suffix]}")
    if not path.name.endswith(ENDINGS):
        raise ValueError(f"{path}: a checkpoint ends in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}")
    beside = description(path.with_suffix(".json"))
    contents = read_checkpoint(path, weights, beside)
    if path.name == "adapter_model.safetensors":
        raise ValueError(f"{path} looks like an adapter without its network (LoRA): merge it into the network")
    return _load(name, path, contents.tensors, contents.architecture, contents.pool, beside, weights)


def _load(
    name: str, path: Path, tensors: dict[str, Tensor], architecture: dict[str, Any] | None, pool: str | None,
    beside: dict[str, Any], weights: Weights,
) -> Loaded:  # fmt: skip
    about = _about(path, beside)
    names = set(tensors)
    family, assumed, heads = "skipless", False, heads_beside(tensors, weights)
    tensors = canonical(path, tensors, weights)
    if architecture is None:
        family = family_of(names, tensors)
        if about["activation"] is None and any(TOWERS.search(name) for name in names):
            raise ValueError(
                f"{path} looks like a vision tower of CLIP or SigLIP, and nothing tells its activation: give timm's "
                "name of it, as in timm:vit_base_patch16_clip_224.openai or timm:vit_base_patch16_siglip_224"
            )
        architecture, assumed = architecture_of(path, tensors, family, about)
    mean, std = normalization(path, about)
    model = _build(path, tensors, architecture)
    pool = pool if pool in ("cls", "mean") else None
    return Loaded(model, name, family, file_sha256(path), mean, std, pool, assumed, heads)


def _build(path: str | Path, tensors: dict[str, Tensor], architecture: dict[str, Any]) -> VisionTransformer:
    # Batches of one size need no packing, and torch's attention runs everywhere in float32.
    try:
        return filled_backbone(architecture, tensors, "sdpa").requires_grad_(False)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None


def _export(folder: Path, weights: Weights) -> Path:
    """The backbone in a run's folder."""
    last = folder / "checkpoints" / "last.pt"
    if not (folder / "backbone.safetensors").exists():
        advice = f"give {last} for its last checkpoint" if last.exists() else "is it a run's folder?"
        raise FileNotFoundError(f"{folder} has no backbone.safetensors, which a finished run leaves: {advice}")
    if weights != "teacher":
        raise ValueError(f"{folder} exports its teacher; give {last} for its {weights}")
    return folder / "backbone.safetensors"


def shipped_file(name: str) -> Path:
    """The file of skipless:NAME. Raises FileNotFoundError, naming those that there are."""
    path = SHIPPED / f"{name.removeprefix('skipless:')}.safetensors"
    if not path.is_file():
        there = ", ".join(f"skipless:{file.stem}" for file in sorted(SHIPPED.glob("*.safetensors")))
        raise FileNotFoundError(
            f"{name}: no such weights come with this version ({there or 'none do yet'}); train a model "
            "(skipless pretrain), or give a file, hf:NAME or timm:NAME"
        )
    return path


def _about(path: Path, beside: dict[str, Any]) -> dict[str, Any]:
    """What files beside a checkpoint say: heads, norm_eps, activation, rope_base, mean, std; see `architecture_of`."""
    config, pictures = (
        description(path.with_name("config.json")),
        description(path.with_name("preprocessor_config.json")),
    )
    timm, arguments = config.get("pretrained_cfg"), config.get("model_args")
    arguments = arguments if isinstance(arguments, dict) else {}  # timm's
    if isinstance(timm, dict):
        pictures = {"image_mean": timm.get("mean"), "image_std": timm.get("std")}
    about = {
        "heads": beside.get("heads", config.get("num_attention_heads", arguments.get("num_heads"))),
        "norm_eps": config.get("layer_norm_eps"),
        "rope_base": config.get("rope_theta"),
    }
    heads = about["heads"]
    if heads is not None and not (isinstance(heads, int) and heads > 0):
        raise ValueError(f"{path.with_suffix('.json')}: heads is {heads!r}; give the number of attention heads")
    activation = config.get("hidden_act", arguments.get("act_layer"))
    if (
        activation is not None
        and activation not in ACTIVATIONS_THERE
        and not (activation == "silu" and config.get("use_gated_mlp"))
    ):
        raise ValueError(f"{path.with_name('config.json')}: hidden_act is {activation!r}, which no ViT here has")
    about["activation"] = ACTIVATIONS_THERE.get(str(activation))
    return about | {"mean": pictures.get("image_mean"), "std": pictures.get("image_std")}


def _load_folder(name: str, folder: Path) -> Loaded:
    """A folder as Hugging Face's save_pretrained leaves it: one file of weights, or several with an index."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({folder / Path(str(file)).name for file in description(index).get("weight_map", {}).values()})
    else:
        files = [f for f in (folder / "model.safetensors", folder / "pytorch_model.bin") if f.is_file()][:1]
    if missing := [file for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{name} lacks {listed([file.name for file in missing])}, which its index names")
    if not files:
        raise FileNotFoundError(f"{name} has a config.json, but neither model.safetensors nor pytorch_model.bin")
    if "pretrained_cfg" in description(folder / "config.json") and files[0].suffix == ".safetensors":
        with contextlib.suppress(ImportError):
            import timm  # noqa: F401

            return replace(_load_timm(name, folder), sha256=file_sha256(files[0]))
    tensors: dict[str, Tensor] = {}
    for file in files:
        contents = read_checkpoint(file, "teacher", description(folder / "config.json"))  # ours, if it is an export
        tensors |= contents.tensors
    return _load(name, files[0], tensors, contents.architecture, contents.pool, {}, "teacher")


def _fetch(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(f"{name} needs the package huggingface_hub: pip install huggingface_hub") from None
    repository = name.removeprefix("hf:")
    try:
        folder = Path(snapshot_download(repository, allow_patterns=HEAD_FILES))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(repository, allow_patterns=["*config.json", "pytorch_model.bin"]))
    except Exception as error:  # no such name, no network, no permission: the library has a class for each
        raise ValueError(
            f"{name} cannot be fetched from Hugging Face ({first_line(error)}); gated models (DINOv3) need your "
            "consent on their page and hf auth login"
        ) from None
    return folder


def _load_timm(name: str, folder: Path | None = None) -> Loaded:
    """By timm's name, or out of a folder that timm wrote, whose config.json names the model."""
    try:
        import timm
    except ImportError:
        raise ValueError(f"{name} needs the package timm: pip install timm") from None
    source = name.removeprefix("timm:") if folder is None else f"local-dir:{folder}"
    try:
        reference: Any = timm.create_model(source, pretrained=True, num_classes=0).eval()
    except Exception as error:  # unknown name, no network, no such weights: each library below has its own class
        raise ValueError(f"{name}: timm cannot make this model with pretrained weights ({first_line(error)})") from None
    state = reference.state_dict()
    tensors = canonical(name, state)
    family = family_of(set(state), tensors)
    cfg = reference.pretrained_cfg
    if "dino" not in f"{cfg.get('architecture')}.{cfg.get('tag')}":
        family = "timm"
    about: dict[str, Any] = {}
    with contextlib.suppress(StopIteration):
        about["heads"] = next(m.num_heads for m in reference.blocks.modules() if hasattr(m, "num_heads"))
    about["norm_eps"] = next(m.eps for m in reference.blocks.modules() if isinstance(m, torch.nn.LayerNorm))
    activation = {"QuickGELU": "quick_gelu", "GELUTanh": "gelu_tanh"}
    about["activation"] = activation.get(type(getattr(reference.blocks[0].mlp, "act", None)).__name__)
    model = _build(name, tensors, architecture_of(name, tensors, family, about)[0])
    # What else leaves no trace in the tensors is found by comparing the outcome.
    size = model.architecture["image_size"]
    if family == "DINOv3":
        size = reference.patch_embed.img_size[0]
    probe = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, features = reference.forward_features(probe), model([probe])[0]
        if hasattr(reference, "fc_norm") and not isinstance(reference.fc_norm, torch.nn.Identity):
            expected = reference.fc_norm(expected)  # which timm applies to the mean of the patches
    # Written so that NaN fails.
    same_shape = features.shape == expected.shape
    if not (same_shape and (features - expected).abs().max() <= TIMM_TOLERANCE * expected.std()):
        raise ValueError(f"{name} computes other features than a plain ViT with its weights; it is not supported")
    return Loaded(model, name, family, fingerprint(model, "timm"), tuple(cfg["mean"]), tuple(cfg["std"]))


def fingerprint(model: VisionTransformer, more: Any) -> str:
    """sha256 of a model's architecture and weights and of whatever else JSON can write."""
    digest = hashlib.sha256(json.dumps([model.architecture, more], sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
