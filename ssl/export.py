"""Export a backbone for others: a folder of weights or a program, with a model card, that needs no skipless.

    python ssl/export.py --ckpt runs/photos --to safetensors --out photos-vit      # weights and the module to read them
    python ssl/export.py --ckpt runs/photos --to hf --out photos-hf                # for Hugging Face's AutoModel
    python ssl/export.py --ckpt runs/photos --to timm --out photos-timm
    python ssl/export.py --ckpt runs/photos --to onnx --out photos-onnx
    python ssl/export.py --ckpt runs/photos --to torch-export --out photos-program

What was written is read back, and its features are compared with the backbone's, before the folder appears.
"""

import skipless.common.interruption  # noqa: F401

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from skipless.common import cli
from skipless.common.files import whole_folder, write_text
from skipless.ssl.formats.card import model_card
from skipless.ssl.formats.layouts import Written, write_hugging_face, write_own, write_timm
from skipless.ssl.formats.programs import example, write_onnx, write_program
from skipless.ssl.model.files import Weights
from skipless.ssl.model.load import Loaded, load_vit
from skipless.ssl.model.resize import at_size

TOLERANCE = 1e-4  # between features, in units of their standard deviation

Form = Literal["safetensors", "hf", "timm", "onnx", "torch-export"]
WRITERS: dict[Form, Callable[[Path, Loaded], Written]] = {
    "safetensors": write_own,
    "hf": write_hugging_face,
    "timm": write_timm,
    "onnx": write_onnx,
    "torch-export": write_program,
}


@dataclass
class Settings:
    """What to export, and how."""

    ckpt: str
    """Backbone: the folder of a run, a checkpoint's file, a folder of Hugging Face's, hf:NAME or timm:NAME."""
    to: Form
    """safetensors: weights, and modeling_skipless.py, which reads them with torch alone. hf: Dinov2Model's layout for
    Hugging Face's AutoModel, and for networks that it cannot have the same as safetensors. timm: timm's layout, for
    networks with skip connections. onnx and torch-export: a program for any number of images of any size."""
    out: str
    """Folder to write; it must not be there yet."""
    size: int | None = None
    """Side in pixels that positions are made for, a multiple of the patch; by default that of training. From there timm
    and hf interpolate to other sizes by rules of their own, all others as the backbone does."""
    license: str = "unknown"
    """Of the weights, for the model card: apache-2.0, cc-by-nc-4.0 or another of Hugging Face's identifiers."""
    results: tuple[str, ...] = ()
    """Files or folders that evaluations wrote with --out: their figures of these weights go into the card."""
    weights: Weights = "teacher"
    """Which half of a training checkpoint that holds a teacher and a student."""


def export(cfg: Settings) -> Path:
    """Write the folder that the settings ask for, and return it.

    Raises:
        ValueError, OSError: a checkpoint or results that cannot be read, a folder that is there already, or features
            that differ from the backbone's; nothing is left behind then.
    """
    out = Path(cfg.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already: delete it, or give another --out")
    loaded = load_vit(cfg.ckpt, cfg.weights)
    if cfg.size is not None:
        loaded = replace(loaded, model=at_size(loaded.model, cfg.size))
    with whole_folder(out) as folder:
        written = WRITERS[cfg.to](folder, loaded)
        compared = compare(loaded, written)
        results = [Path(path).expanduser() for path in cfg.results]
        write_text(folder / "README.md", model_card(loaded, out.name, written, cfg.license, results))
    print(f"{out}: {compared}")
    return out


@torch.no_grad()
def compare(loaded: Loaded, written: Written) -> str:
    """Read back what was written, and compare its features with the backbone's; a sentence about the difference.

    Raises:
        ValueError: it is above `TOLERANCE`.
    """
    try:
        reloaded = written.reload()
    except ImportError as error:
        return f"not read back, for {error.name} is not installed"
    largest = 0.0
    for batch, more in ((1, (0, 0)), (3, (0, 0)), *([(2, (1, 2))] if written.any_size else [])):
        images = example(loaded, batch, more)
        (expected,), (cls, patches) = loaded.model.features(images), reloaded(images)
        for ours, theirs in ((expected.cls, cls), (expected.patches, patches)):
            largest = max(largest, ((ours - theirs).abs().max() / ours.std()).item())
    if not largest <= TOLERANCE:  # NaN too
        raise ValueError(f"{loaded.path}: what was written computes other features, by {largest:.2g} of their spread")
    return f"read back, features differ by {largest:.1g} of their standard deviation at most"


main = partial(cli.run, export, Settings, __doc__)

if __name__ == "__main__":
    main()
