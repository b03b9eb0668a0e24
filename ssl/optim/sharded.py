"""SOAP and Muon, which need whole matrices, for parameters that are cut over the processes (ssl/run/parallel.py).

Every matrix has an owner, the process that keeps its optimizer state and moves it. In each step all processes send
their parts of a matrix and of its gradient to the owner, and get back their part of what becomes of it. Everything else
(biases, norms, and what Muon leaves to AdamW) is moved element by element, each part where it is.

A process sends its parts twice and what it owns once, in float32: little beside the gathering of parameters, which
sends all parts to everybody, and several times.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import compress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from skipless.common import distributed
from skipless.ssl.optim.soap import balance


class ShardedOptimizer:
    """An optimizer of whole matrices over parameters that FSDP2 has cut, each along one axis.

    To the caller it is a torch.optim.Optimizer, with `param_groups`, whose rates may be set before every step, `step`,
    `zero_grad` and `state_dict`. Groups keep their keys, but hold what this process moves: whole matrices, parts of
    the rest. All processes must call everything together, and the same parameters must lack a gradient.

    The owners are chosen so that all have about the same work. With few, large matrices some processes own none.

    Args:
        groups: parameter groups of DTensors. Those of a group are matrices if it has the key `matrices` and that is
            true; without the key, all tensors with two or more axes are. `parts`, where it is there, has a number for
            each parameter.
        make: from such groups, of plain tensors, the optimizer itself. A group may be empty.
        longest_side: longer sides of a matrix cost nothing.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        longest_side: float = math.inf,
    ):
        self._parameters: list[Any] = [parameter for group in groups for parameter in group["params"]]
        matrices = [p for group in groups for p in group["params"] if group.get("matrices", p.ndim > 1)]
        owners = owners_of([matrix.shape for matrix in matrices], distributed.world_size(), longest_side)
        self._owner: dict[Any, int] = dict(zip(matrices, owners, strict=True))
        # By parameter, what this process moves in its place. The numbers are there during a step alone.
        self._moved = {
            parameter: nn.Parameter(parameter.to_local().new_empty(1).expand(self._shape(parameter)))
            for parameter in self._parameters
            if self._owner.get(parameter, distributed.rank()) == distributed.rank()
        }
        mine = []
        for group in groups:
            moved = [parameter in self._moved for parameter in group["params"]]
            params = {"params": [self._moved[parameter] for parameter in compress(group["params"], moved)]}
            mine.append(group | params | ({"parts": [*compress(group["parts"], moved)]} if "parts" in group else {}))
        self._optimizer = make(mine)
        self.param_groups = self._optimizer.param_groups

    @torch.no_grad()
    def step(self) -> None:
        """Move all parameters that have a gradient."""
        with_gradient = [parameter for parameter in self._parameters if parameter.grad is not None]
        matrices = [matrix for matrix in with_gradient if matrix in self._owner]
        for moved, whole in zip(self._owned(matrices), self._to_owners(matrices, lambda m: m), strict=True):
            moved.data = whole
        for moved, whole in zip(self._owned(matrices), self._to_owners(matrices, lambda m: m.grad), strict=True):
            moved.grad = whole
        for parameter in with_gradient:
            if parameter not in self._owner:
                self._moved[parameter].data = parameter.to_local()
                self._moved[parameter].grad = parameter.grad.to_local()
        self._optimizer.step()
        for moved in self._moved.values():
            moved.grad = None
        self._from_owners(matrices)
        for moved in self._moved.values():
            moved.data = moved.new_empty(1).expand(moved.shape)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, whatever the argument, which torch's optimizers have."""
        for parameter in self._parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """For torch.distributed.checkpoint, which fills these tensors in place when it loads.

        `state` has, by the parameter's number, the tensors of what this process moves: of matrices whole ones, of all
        else parts, as DTensors. So any other number of processes finds the matrices that it will own. Its entry `steps`
        has the step of each group.
        """
        steps = torch.tensor([float(group.get("step", 0)) for group in self.param_groups])
        state: dict[Any, dict[str, Tensor]] = {"steps": {"of_groups": steps}}
        for number, parameter in enumerate(self._parameters):
            if parameter in self._moved:
                saved = self._optimizer.state.get(self._moved[parameter], {})
                is_matrix = parameter in self._owner
                state[number] = {name: t if is_matrix else _as_part(t, parameter) for name, t in _flat(saved)}
        return {"state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a `state_dict()`, of as many processes: its tensors are copied into those that a first step has
        made, unless they are the same."""
        mine = self.state_dict()["state"]
        for number, tensors in state_dict["state"].items():
            for name, tensor in tensors.items():
                mine[number][name].copy_(tensor)
        for group, step in zip(self.param_groups, state_dict["state"]["steps"]["of_groups"].tolist(), strict=True):
            if "step" in group:
                group["step"] = int(step)

    def _shape(self, parameter: Any) -> torch.Size:
        return parameter.shape if parameter in self._owner else parameter.to_local().shape

    def _owned(self, matrices: list[Any]) -> list[nn.Parameter]:
        return [self._moved[matrix] for matrix in matrices if matrix in self._moved]

    def _to_owners(self, matrices: list[Any], of: Callable[[Any], Any]) -> list[Tensor]:
        """Of the matrices this process owns, `of` the whole matrix."""
        parts: list[list[Tensor]] = [[] for _ in range(distributed.world_size())]
        for matrix in matrices:
            parts[self._owner[matrix]].append(of(matrix).to_local())
        owned = [matrix for matrix in matrices if matrix in self._moved]
        shapes = [[_part_shape(matrix, rank) for matrix in owned] for rank in range(distributed.world_size())]
        received = _exchange(parts, shapes, self._parameters[0].to_local())
        return [torch.cat(pieces, _axis(matrix)) for matrix, *pieces in zip(owned, *received, strict=True)]

    def _from_owners(self, matrices: list[Any]) -> None:
        """Write what has become of the matrices into everybody's parts of them."""
        ranks = range(distributed.world_size())
        parts: list[list[Tensor]] = [[] for _ in ranks]
        for matrix in matrices:
            if matrix in self._moved:
                sizes = [_part_shape(matrix, rank)[_axis(matrix)] for rank in ranks]
                for rank, piece in enumerate(self._moved[matrix].split(sizes, _axis(matrix))):
                    parts[rank].append(piece)
        by_owner = [[matrix for matrix in matrices if self._owner[matrix] == rank] for rank in ranks]
        shapes = [[matrix.to_local().shape for matrix in owned] for owned in by_owner]
        received = _exchange(parts, shapes, self._parameters[0].to_local())
        for owned, pieces in zip(by_owner, received, strict=True):
            for matrix, piece in zip(owned, pieces, strict=True):
                matrix.to_local().copy_(piece)


def owners_of(shapes: Sequence[Sequence[int]], processes: int, longest_side: float = math.inf) -> list[int]:
    """The rank that owns each matrix: all have about the same work, a product with each side that is not too long."""
    costs = [math.prod(shape) * (1 + sum(side for side in shape if side <= longest_side)) for shape in shapes]
    return [owner for (owner,) in balance([(1, cost) for cost in costs], processes)]


def _axis(parameter: Any) -> int:
    return parameter.placements[0].dim


def _part_shape(parameter: Any, rank: int) -> torch.Size:
    """Of the part that a process has. As torch.chunk cuts, the first are of one size, and the last may be empty."""
    axis, length = _axis(parameter), parameter.shape[_axis(parameter)]
    size = -(-length // distributed.world_size())
    mine = min(max(length - rank * size, 0), size)
    return torch.Size([*parameter.shape[:axis], mine, *parameter.shape[axis + 1 :]])


def _exchange(sent: list[list[Tensor]], shapes: list[list[torch.Size]], like: Tensor) -> list[list[Tensor]]:
    """Tensors for every process to tensors from every process, which have these shapes, and dtype and device of
    `like`."""
    sizes_sent = [sum(tensor.numel() for tensor in to_rank) for to_rank in sent]
    sizes = [[shape.numel() for shape in from_rank] for from_rank in shapes]
    outgoing = torch.cat([like.new_empty(0), *(tensor.flatten() for to_rank in sent for tensor in to_rank)])
    incoming = like.new_empty(sum(map(sum, sizes)))
    dist.all_to_all_single(incoming, outgoing, [sum(from_rank) for from_rank in sizes], sizes_sent)
    pieces = iter(incoming.split([size for from_rank in sizes for size in from_rank]))
    return [[next(pieces).view(shape) for shape in from_rank] for from_rank in shapes]


def _flat(state: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a parameter's state, those of a list under numbered names."""
    for name, value in state.items():
        if isinstance(value, list):
            yield from ((f"{name}.{i}", tensor) for i, tensor in enumerate(value) if isinstance(tensor, Tensor))
        else:
            yield name, value


def _as_part(tensor: Tensor, parameter: Any) -> Tensor:
    """A part's state as a part of the whole parameter's; its step count as it is."""
    from torch.distributed.tensor import DTensor

    if tensor.ndim == 0:
        return tensor
    mesh, shape = parameter.device_mesh, parameter.shape
    return DTensor.from_local(
        tensor, mesh, parameter.placements, run_check=False, shape=shape, stride=parameter.stride()
    )
