import copy

import pytest
import torch
from torch import Tensor, nn

from skipless.common.precision import autocast, has_bf16
from skipless.ssl.model.vit import VisionTransformer

CPU = torch.device("cpu")


def relative(output: Tensor | None, exact: Tensor | None) -> float:
    assert output is not None
    assert exact is not None
    return ((output.double() - exact.double()).norm() / exact.double().norm()).item()


def test_linear_layers_equal_products_of_rounded_factors() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 48), torch.randn(3, 40, 64, requires_grad=True)
    weights = torch.randn(3, 40, 48)
    with autocast(CPU, bf16=True):
        output = layer(x)
    (output * weights).sum().backward()
    assert output.dtype == torch.float32

    def rounded(values: Tensor) -> Tensor:
        # Where the processor has no bf16 of its own, oneDNN multiplies in float32.
        return (values.bfloat16() if rounds else values).detach().double()

    exact = x.detach() @ layer.weight.detach().T + layer.bias.detach()
    rounds = relative(output, exact) > 1e-5
    assert rounds or not has_bf16(CPU)
    torch.testing.assert_close(
        output.double(), rounded(x) @ rounded(layer.weight).T + layer.bias.double(), atol=1e-5, rtol=1e-5
    )
    gradient = rounded(weights)
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert layer.bias.grad is not None
    torch.testing.assert_close(x.grad.double(), gradient @ rounded(layer.weight), atol=1e-4, rtol=1e-5)
    of_weight = gradient.flatten(0, 1).T @ rounded(x).flatten(0, 1)
    torch.testing.assert_close(layer.weight.grad.double(), of_weight, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(layer.bias.grad, weights.sum((0, 1)), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_network_trains_in_it_as_outside(checkpointed: bool) -> None:
    torch.manual_seed(0)
    exact = VisionTransformer(64, 3, 2, patch=8, image_size=32, checkpoint_activations=checkpointed).train()
    rounded = copy.deepcopy(exact)
    images, weights = torch.randn(4, 3, 32, 32), torch.randn(4, 17, 64)
    context = autocast(CPU, bf16=True)
    with context, context:  # may be nested, and entered again
        output = rounded([images])[0]
    (output * weights).sum().backward()
    expected = exact([images])[0]
    (expected * weights).sum().backward()
    assert relative(output, expected) < 0.01
    for (name, one), other in zip(rounded.named_parameters(), exact.parameters(), strict=True):
        assert relative(one.grad, other.grad) < 0.03, name


def test_nothing_else_is_touched() -> None:
    layer, x = nn.Linear(64, 64).double(), torch.randn(5, 64, dtype=torch.float64)
    query = torch.randn(2, 3, 40, 16)
    alone = layer(x), nn.functional.scaled_dot_product_attention(query, query, query)
    with autocast(CPU, bf16=True):
        within = layer(x), nn.functional.scaled_dot_product_attention(query, query, query)
    with autocast(CPU, bf16=False):
        off = nn.Linear(64, 8)(x.float())
    assert all(torch.equal(*pair) for pair in zip(alone, within, strict=True))
    assert off.dtype == torch.float32
    float_layer, y = nn.Linear(64, 64), torch.randn(5, 64)
    before = float_layer(y)
    with autocast(CPU, bf16=True):
        float_layer(y)
    assert torch.equal(float_layer(y), before), "the switch was left on"
