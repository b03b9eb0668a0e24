"""Backbones as programs: the computation itself in a file, for any number of images of any size."""

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


def example(loaded: Loaded, batch: int = 2, more: tuple[int, int] = (0, 0)) -> Tensor:
    """Images [batch, 3, H, W] for tracing and for comparing, of the size that the grid of positions fits, and so many
    patches more."""
    side, patch = loaded.model.architecture["image_size"], loaded.model.patch
    size = (side + more[0] * patch, side + more[1] * patch)
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(batch))


SIZES = "any B; H and W are multiples of {patch}, from {least} on"

PROGRAM = f"""import torch

model = torch.export.load("FOLDER/model.pt2").module()
cls, patches = model(images)  # [B, 3, H, W] -> [B, D] and [B, h, w, D]; {SIZES}"""

ONNX = f"""import onnxruntime

session = onnxruntime.InferenceSession("FOLDER/model.onnx")
cls, patches = session.run(None, {{{{"images": images}}}})  # float32 [B, 3, H, W]; {SIZES}"""


def traced(loaded: Loaded) -> torch.export.ExportedProgram:
    """The program, for any number of images of any size."""
    dim, patch = torch.export.Dim, loaded.model.patch
    shapes = {"images": {0: dim("batch"), 2: patch * dim("rows"), 3: patch * dim("columns")}}
    # Sizes of one patch would be taken for constants.
    images = example(loaded, more=(1, 2))
    return torch.export.export(plain_model(loaded), (images,), dynamic_shapes=shapes)


def write_program(folder: Path, loaded: Loaded) -> Written:
    """model.pt2, a program of torch.export."""
    file, patch = folder / "model.pt2", loaded.model.patch
    torch.export.save(traced(loaded), file)
    load = PROGRAM.format(patch=patch, least=2 * patch)
    return Written(lambda: torch.export.load(file).module(), load, "pytorch", any_size=True)


def write_onnx(folder: Path, loaded: Loaded) -> Written:
    """model.onnx, with its weights inside, or in model.onnx.data beside it where they are large.

    Raises:
        ValueError: a package is missing.
    """
    file, patch = folder / "model.onnx", loaded.model.patch
    large = sum(p.numel() for p in loaded.model.parameters()) * 4 > LARGEST
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--to onnx needs the package {error.name}: pip install 'skipless[onnx]'") from None
    torch.onnx.export(
        traced(loaded),
        f=file,
        input_names=["images"],
        output_names=["cls", "patches"],
        dynamic_shapes={"images": {0: "batch", 2: "height", 3: "width"}},
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

    return Written(reload, ONNX.format(patch=patch, least=patch), "onnx", any_size=True)
