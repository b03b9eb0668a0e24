"""Backbones as folders of weights that others read: our own layout with the module that reads it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from skipless.common.files import write_text
from skipless.ssl.formats import modeling_skipless
from skipless.ssl.model.load import Loaded

Reloaded = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Images to CLS [B, D] and patches [B, h, w, D], by the model as it was read back from a folder."""


def write_tensors(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """model.safetensors, in float32."""
    plain = {name: tensor.detach().float().contiguous().clone() for name, tensor in tensors.items()}
    save_file(plain, folder / "model.safetensors", {"format": "pt", **metadata})
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)  # it is made for its owner alone


def write_own(folder: Path, loaded: Loaded) -> Reloaded:
    """Weights under our names, and modeling_skipless.py, which reads them without this package."""
    architecture = loaded.model.architecture
    config = {
        "model_type": "skipless",
        "architecture": architecture,
        "pool": loaded.pool,
        "architectures": ["SkiplessModel"],
        "auto_map": {
            "AutoConfig": "modeling_skipless.SkiplessConfig",
            "AutoModel": "modeling_skipless.SkiplessModel",
        },
    }
    write_json(folder / "config.json", config)
    write_tensors(folder, loaded.model.state_dict(), {"architecture": json.dumps(architecture)})
    write_preprocessing(folder, loaded)
    shutil.copyfile(str(modeling_skipless.__file__), folder / "modeling_skipless.py")
    return modeling_skipless.load(folder)


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
