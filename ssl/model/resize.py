"""A Vision Transformer's positions for images of another size."""

import torch

from skipless.ssl.model.vit import VisionTransformer


@torch.no_grad()
def at_size(model: VisionTransformer, image_size: int) -> VisionTransformer:
    """A copy whose grid of positions fits images of `image_size` pixels, interpolated as the model itself would.

    Its features at that size are the model's; at further sizes they differ a little. Rotary positions fit any size.

    Raises:
        ValueError: a size that is no multiple of the patch.
    """
    if image_size < model.patch or image_size % model.patch:
        raise ValueError(f"size is {image_size}, which is no multiple of the patch, {model.patch} pixels")
    copy = VisionTransformer(**(model.architecture | {"image_size": image_size}), attention=model.attention)
    tensors = model.state_dict()
    if "pos_embed" in tensors:
        side = image_size // model.patch
        tensors["pos_embed"] = torch.cat([tensors["pos_embed"][:, :1], model.positions(side, side)[None]], dim=1)
    copy.load_state_dict(tensors)
    return copy.train(model.training).requires_grad_(next(model.parameters()).requires_grad)
