"""The linear head of the published protocols, its batch norm against torch's, in one process and in two."""

from pathlib import Path

import pytest
import torch
from helpers import run_group
from torch import nn

from skipless.common import distributed
from skipless.eval.dense.heads import FrozenInputBatchNorm, HeadSettings, LinearHead


def test_head_is_dropout_batch_norm_convolution() -> None:
    torch.manual_seed(0)
    head = LinearHead(192, 21, HeadSettings(dropout=0.1))
    assert [type(layer) for layer in head] == [nn.Dropout2d, FrozenInputBatchNorm, nn.Conv2d]
    conv = head[2]
    assert isinstance(conv, nn.Conv2d)
    assert conv.weight.shape == (21, 192, 1, 1)
    assert float(conv.weight.detach().std()) == pytest.approx(0.01, rel=0.05)
    assert conv.bias is not None
    assert not conv.bias.any()
    bare = LinearHead(192, 21, HeadSettings(batch_norm=False, init_std=None)).train()
    x = torch.randn(2, 192, 3, 3)
    torch.testing.assert_close(bare(x), bare[2](x))


def test_batch_norm_is_torchs_in_one_process() -> None:
    ours, theirs = FrozenInputBatchNorm(5), nn.BatchNorm2d(5)
    for _ in range(3):
        x = torch.randn(4, 5, 3, 2) * 3 + 1
        torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def batch() -> torch.Tensor:
    return torch.randn(6, 5, 3, 2, generator=torch.Generator().manual_seed(0)) * 3 + 1


def main(words: list[str]) -> None:
    """In one of two processes: a norm on its half of the batch."""
    distributed.start("cpu")
    norm, x = FrozenInputBatchNorm(5), batch()[distributed.rank() :: 2]
    y = norm(x)
    (y * x).sum().backward()
    assert norm.weight.grad is not None
    assert norm.bias.grad is not None
    grads = torch.stack([norm.weight.grad, norm.bias.grad])
    torch.save({"y": y.detach(), "grads": grads, **norm.state_dict()}, f"{words[0]}/norm{distributed.rank()}.pt")
    distributed.wait_for_all()
    distributed.stop()


def test_batch_norm_of_two_processes_is_torchs_of_one(tmp_path: Path) -> None:
    run_group("eval.dense.test_heads", [tmp_path])
    norms = [torch.load(tmp_path / f"norm{rank}.pt", weights_only=True) for rank in range(2)]
    reference, x = nn.BatchNorm2d(5), batch()
    y = reference(x)
    (y * x).sum().backward()
    for rank, norm in enumerate(norms):
        torch.testing.assert_close(norm.pop("y"), y[rank::2].detach())
    grads = norms[0].pop("grads") + norms[1].pop("grads")
    assert reference.weight.grad is not None
    assert reference.bias.grad is not None
    torch.testing.assert_close(grads, torch.stack([reference.weight.grad, reference.bias.grad]), rtol=1e-4, atol=1e-4)
    for norm in norms:
        torch.testing.assert_close(norm, dict(reference.state_dict()))
