"""Export a backbone for others: a folder of weights or a program, with a model card, that needs no skipless.

    python ssl/export.py --ckpt runs/photos --to safetensors --out exported      # weights and the module to read them
    python ssl/export.py --ckpt runs/photos --to torch-export --out program      # a program of torch.export

What was written is read back, and its features are compared with the backbone's, before the folder appears.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from skipless.common import cli
from skipless.common.files import whole_folder, write_text
from skipless.ssl.formats.card import model_card
from skipless.ssl.formats.layouts import Reloaded, write_own
from skipless.ssl.formats.programs import example, write_program
from skipless.ssl.model.files import Weights
from skipless.ssl.model.load import Loaded, load_vit

TOLERANCE = 1e-4  # between features, in units of their standard deviation

Form = Literal["safetensors", "torch-export"]
WRITERS: dict[Form, Callable[[Path, Loaded], Reloaded]] = {"safetensors": write_own, "torch-export": write_program}


@dataclass
class Settings:
    """What to export, and how."""

    ckpt: str
    """Backbone: the folder of a run, a checkpoint's file, a folder of Hugging Face's, hf:NAME or timm:NAME."""
    to: Form
    """safetensors: weights, and modeling_skipless.py, which reads them with torch alone. torch-export: model.pt2, a
    program for any number of images of one size."""
    out: str
    """Folder to write; it must not be there yet."""
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
    card = model_card(loaded, out.name, cfg.to, cfg.license, [Path(path).expanduser() for path in cfg.results])
    with whole_folder(out) as folder:
        largest = compare(loaded, WRITERS[cfg.to](folder, loaded))
        write_text(folder / "README.md", card)
    print(f"{out}: read back, features differ by {largest:.1g} of their standard deviation at most")
    return out


@torch.no_grad()
def compare(loaded: Loaded, reloaded: Reloaded) -> float:
    """The largest difference between features of the backbone and of what was written, over their standard deviation.

    Raises:
        ValueError: it is above `TOLERANCE`.
    """
    largest = 0.0
    for batch in (1, 3):
        images = example(loaded, batch)
        (expected,), (cls, patches) = loaded.model.features(images), reloaded(images)
        for ours, theirs in ((expected.cls, cls), (expected.patches, patches)):
            largest = max(largest, ((ours - theirs).abs().max() / ours.std()).item())
    if not largest <= TOLERANCE:  # NaN too
        raise ValueError(f"{loaded.path}: what was written computes other features, by {largest:.2g} of their spread")
    return largest


main = partial(cli.run, export, Settings, __doc__)

if __name__ == "__main__":
    main()
