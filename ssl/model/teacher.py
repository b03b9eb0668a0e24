"""The frozen network that a student is distilled from."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from skipless.common.pixels import MEAN, STD, normalize
from skipless.ssl.model.load import load_vit


@dataclass
class TeacherSettings:
    """The network to learn from, and what it sees."""

    ckpt: str
    """A Vision Transformer as the evaluations take it: the folder of a run, a checkpoint's file, a folder of Hugging
    Face's, hf:NAME or timm:NAME."""
    size: int | None = None
    """Side of the square it sees in pixels, a multiple of its patch; by default the side that gives it as many patches
    as the student has. Twice that: better features, which are averaged, and four times the work."""
    cache: str | None = None
    """Folder that keeps its features of every image's central square in float16, so that they are computed once, for
    any number of runs; crops are then boxes in them. The log says how large they get. By default they are computed
    along, of the very crop that the student sees."""

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise ValueError(f"teacher.size is {self.size}; it must be at least 1 pixel")


class Teacher(nn.Module):
    """A frozen Vision Transformer.

    Args:
        settings: whose `size` may be None.
        patches: along a side of the student's grid.

    Raises:
        ValueError, FileNotFoundError: there is no such network, or `settings.size` is no multiple of its patch.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, settings: TeacherSettings, patches: int):
        super().__init__()
        loaded = load_vit(settings.ckpt)
        self.model, self.name, self.sha256 = loaded.model, loaded.path, loaded.sha256
        self.size = settings.size or patches * self.model.patch
        if self.size % self.model.patch:
            below = self.size // self.model.patch * self.model.patch
            near = " or ".join(str(size) for size in (below, below + self.model.patch) if size)
            raise ValueError(
                f"teacher.size is {self.size}, which is no multiple of the teacher's patch {self.model.patch}; "
                f"use {near}"
            )
        scale = [ours / theirs for ours, theirs in zip(STD, loaded.std, strict=True)]
        shift = [(a - b) / std for a, b, std in zip(MEAN, loaded.mean, loaded.std, strict=True)]
        self.register_buffer("scale", torch.tensor(scale)[:, None, None])
        self.register_buffer("shift", torch.tensor(shift)[:, None, None])

    @property
    def side(self) -> int:
        """Patches along a side of what it sees."""
        return self.size // self.model.patch

    @torch.no_grad()
    def forward(self, squares: Tensor) -> Tensor:
        """uint8 [B, size, size, 3] -> CLS and patches after the final norm, [B, 1 + side * side, D]."""
        tokens = self.model(normalize(squares[None]) * self.scale + self.shift)
        return torch.cat([tokens[:, :1], tokens[:, 1 + self.model.registers :]], dim=1)
