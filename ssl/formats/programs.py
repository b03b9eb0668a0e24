"""Backbones as programs: the computation itself in a file, for any number of images of one size."""

from pathlib import Path

import torch
from torch import Tensor

from skipless.ssl.formats.layouts import Reloaded, Written
from skipless.ssl.formats.modeling_skipless import SkiplessViT
from skipless.ssl.model.load import Loaded

LARGEST = 1_500_000_000  # bytes of weights within one file; protobuf ends at 2 GB


def plain_model(loaded: Loaded) -> SkiplessViT:
    """The same network without what training needs of it, which exporters cannot follow."""
    model = SkiplessViT(loaded.model.architecture)
    model.load_state_dict(loaded.model.state_dict())
    return model.eval().requires_grad_(False)


def example(loaded: Loaded, batch: int = 2) -> Tensor:
    """Images [batch, 3, side, side] of the size that the grid of positions fits, for tracing and for comparing."""
    side = loaded.model.architecture["image_size"]
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(batch))


PROGRAM = """import torch

model = torch.export.load("FOLDER/model.pt2").module()
cls, patches = model(images)  # [B, D] and [B, h, w, D]; any B, images of {side} x {side} pixels"""

ONNX = """import onnxruntime

session = onnxruntime.InferenceSession("FOLDER/model.onnx")
cls, patches = session.run(None, {{"images": images}})  # float32 [B, 3, {side}, {side}] with any B"""


def write_program(folder: Path, loaded: Loaded) -> Written:
    """model.pt2, a program of torch.export."""
    file, images = folder / "model.pt2", example(loaded)
    batch = {"images": {0: torch.export.Dim("batch")}}
    torch.export.save(torch.export.export(plain_model(loaded), (images,), dynamic_shapes=batch), file)
    return Written(lambda: torch.export.load(file).module(), PROGRAM.format(side=images.shape[2]), "pytorch")


def write_onnx(folder: Path, loaded: Loaded) -> Written:
    """model.onnx, with its weights inside, or in model.onnx.data beside it where they are large.

    Raises:
        ValueError: a package is missing.
    """
    file, images = folder / "model.onnx", example(loaded)
    large = sum(p.numel() for p in loaded.model.parameters()) * 4 > LARGEST
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--to onnx needs the package {error.name}: pip install 'skipless[onnx]'") from None
    torch.onnx.export(
        plain_model(loaded),
        (images,),
        file,
        input_names=["images"],
        output_names=["cls", "patches"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        external_data=large,
        dynamo=True,
        verbose=False,
    )

    def reload() -> Reloaded:
        import onnxruntime

        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

        def compute(images: Tensor) -> tuple[Tensor, Tensor]:
            cls, patches = map(torch.from_numpy, session.run(None, {"images": images.numpy()}))
            return cls, patches

        return compute

    return Written(reload, ONNX.format(side=images.shape[2]), "onnx")
