"""Backbones as programs: the computation itself in a file, for any number of images of one size."""

from pathlib import Path

import torch
from torch import Tensor

from skipless.ssl.formats.layouts import Reloaded
from skipless.ssl.formats.modeling_skipless import SkiplessViT
from skipless.ssl.model.load import Loaded


def plain_model(loaded: Loaded) -> SkiplessViT:
    """The same network without what training needs of it, which exporters cannot follow."""
    model = SkiplessViT(loaded.model.architecture)
    model.load_state_dict(loaded.model.state_dict())
    return model.eval().requires_grad_(False)


def example(loaded: Loaded, batch: int = 2) -> Tensor:
    """Images [batch, 3, side, side] of the size that the grid of positions fits, for tracing and for comparing."""
    side = loaded.model.architecture["image_size"]
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(batch))


def write_program(folder: Path, loaded: Loaded) -> Reloaded:
    """model.pt2, a program of torch.export."""
    batch = torch.export.Dim("batch")
    program = torch.export.export(plain_model(loaded), (example(loaded),), dynamic_shapes={"images": {0: batch}})
    torch.export.save(program, folder / "model.pt2")
    return torch.export.load(folder / "model.pt2").module()
