"""One of two processes that share the bases of SOAP, for test_soap.py."""

from collections.abc import Callable

import torch
from torch import Tensor

from skipless.common import distributed
from skipless.ssl.optim.soap import SOAP

# Twins with sides of a multiple of four: every matrix of their stacks is aligned in memory as it is alone, on which
# LAPACK's last bits depend on some CPUs, and with them the eigenvectors of the null space.
SHAPES = [(8, 4), (8, 4), (5, 5), (20, 3), (7,), (6, 3, 2, 2), (1, 4, 6), (12, 8), (12, 8), (12, 8)]


def run(spread: bool) -> tuple[Tensor, int]:
    """All parameters after some steps, and how many matrices this process has decomposed."""
    solved = 0

    def counting(solve: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def counted(matrices: Tensor) -> Tensor:
            nonlocal solved
            solved += matrices.shape[:-2].numel()
            return solve(matrices)

        return counted

    qr, eigh = torch.linalg.qr, torch.linalg.eigh
    torch.linalg.qr, torch.linalg.eigh = counting(qr), counting(eigh)
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    groups = [{"params": parameters[::2]}, {"params": parameters[1::2], "lr": 1e-2}]
    optimizer = SOAP(groups, precondition_frequency=4, max_precondition_dim=14, spread=spread)
    for step in range(14):
        for number, parameter in enumerate(parameters):
            gradient = torch.randn(parameter.shape)
            parameter.grad = None if (step + number) % 6 == 3 else gradient
        optimizer.step()
    torch.linalg.qr, torch.linalg.eigh = qr, eigh
    return torch.cat([p.detach().flatten() for p in parameters]), solved


def main(words: list[str]) -> None:
    """The same steps alone, and as one of the group."""
    alone = [run(spread) for spread in (False, True)]
    distributed.start("cpu")
    together = [run(spread) for spread in (False, True)]
    for (one, all_solved), (many, solved) in zip(alone, together, strict=True):
        assert torch.equal(one, many)
        assert all(torch.equal(many, other) for other in distributed.gather_objects(many))
        shares = distributed.gather_objects(solved)
        assert sum(shares) == all_solved > 40
        assert min(shares) > 0.2 * all_solved, (shares, all_solved)
    distributed.wait_for_all()
    distributed.stop()
    print("equal")
