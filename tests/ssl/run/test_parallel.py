"""How a model runs on one process."""

import copy

import pytest
import torch

from skipless.ssl.dino import DINOHead, DINOModel
from skipless.ssl.model.vit import VisionTransformer
from skipless.ssl.run.parallel import Bf16Weights


@pytest.mark.parametrize("residual", [True, False])
def test_bf16_weights_give_the_numbers_of_autocast(residual: bool) -> None:
    torch.manual_seed(0)
    backbone = VisionTransformer(32, 3, 2, patch=8, image_size=16, residual=residual, attention="sdpa")
    network = DINOModel(backbone, DINOHead(32, 24, hidden=16, bottleneck=8), "mean")
    other = copy.deepcopy(network)
    crops = [torch.randn(2, 3, 16, 16), torch.randn(3, 3, 8, 8)]
    found = []
    for forward in (network, Bf16Weights(other)):
        with torch.autocast("cpu", torch.bfloat16):
            logits = forward(crops).logits
        logits.float().square().sum().backward()
        found.append(logits)
    assert torch.equal(*found)
    for (name, parameter), same in zip(network.named_parameters(), other.parameters(), strict=True):
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert same.grad.dtype == torch.float32, name
            assert torch.equal(parameter.grad, same.grad), name
