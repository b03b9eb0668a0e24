"""SOAP (Vyas et al., arXiv 2409.11321): Adam in the slowly refreshed eigenbasis of Shampoo's preconditioner.

Parameters of one shape are one stack, so that a Vision Transformer takes few, large products; the refreshes of the
eigenbases take turns, so that no step waits for all of them; and several processes divide the refreshes among them.
"""

import heapq
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from skipless.common import distributed

# Elements of a stack at most: bounds the temporary copies (64 MiB each in float32).
STACK = 2**24


@dataclass
class Side:
    """The preconditioner of one dimension of the n parameters of a stack, seen as [n, before, length, after]."""

    dimension: int
    before: int
    length: int
    after: int
    gram: Tensor  # [n, length, length]: running means of G G^T
    basis: Tensor  # [n, length, length]: their eigenvectors, as columns
    turns: list[int]  # of each row, ascending: in which steps, modulo the period, it is refreshed

    def rotate(self, x: Tensor, basis: Tensor) -> Tensor:
        """basis^T along this dimension of x, [k, ...] -> the same shape, contiguous if x is."""
        if self.before == 1:
            return torch.bmm(basis.mT, x.reshape(-1, self.length, self.after)).view(x.shape)
        if self.after == 1:
            return torch.bmm(x.reshape(-1, self.before, self.length), basis).view(x.shape)
        last = x.reshape(-1, self.before, self.length, self.after).transpose(2, 3)
        turned = torch.bmm(last.reshape(len(x), -1, self.length), basis).view(last.shape)
        return turned.transpose(2, 3).reshape(x.shape)

    def unfold(self, x: Tensor) -> Tensor:
        """x [k, ...] as matrices [k, length, before * after]; a view where that is possible."""
        split = x.reshape(-1, self.before, self.length, self.after)
        return split.transpose(1, 2).reshape(-1, self.length, self.before * self.after)

    def new_basis(self, rows: slice, first: bool) -> Tensor:
        """Eigenvectors of the Gram matrices [k, length, length], in the dtype of the state.

        The first ones are exact. Later ones are one power iteration from the last, made orthogonal by QR in float32 in
        descending order of the eigenvalues; each vector then goes back to the column where the second moments of its
        coordinate are.
        """
        gram, basis = self.gram[rows], self.basis[rows]
        if first:
            regular = gram + 1e-30 * torch.eye(self.length, dtype=gram.dtype, device=gram.device)
            try:
                vectors = torch.linalg.eigh(regular).eigenvectors
            except RuntimeError:  # did not converge, or is not implemented for a short dtype
                vectors = torch.linalg.eigh(regular.double()).eigenvectors
            return vectors.flip(-1).to(gram.dtype)
        product = torch.bmm(gram, basis)
        order = (basis * product).sum(1).argsort(-1, descending=True)[:, None].expand_as(product)
        vectors = torch.linalg.qr(product.gather(2, order).float()).Q
        return torch.empty_like(product).scatter_(2, order, vectors.to(product.dtype))


@dataclass
class Stack:
    """Parameters of one group, shape, dtype and device; row i of every buffer belongs to parameter i."""

    group: dict[str, Any]
    parameters: list[Tensor]
    mean: Tensor  # [n, ...]: first moments of the gradient
    square: Tensor  # [n, ...]: second moments of the rotated gradient
    sides: list[Side]

    def runs(self, chosen: Callable[[Tensor], bool]) -> Iterator[slice]:
        """The maximal slices of rows whose parameters are all chosen."""
        start = 0
        for row, parameter in enumerate([*self.parameters, None]):
            if parameter is None or not chosen(parameter):
                if row > start:
                    yield slice(start, row)
                start = row + 1

    def gradients(self, rows: slice) -> Tensor:
        """[k, ...]; not to be written to."""
        gradients = [parameter.grad for parameter in self.parameters[rows] if parameter.grad is not None]
        return torch.stack(gradients) if len(gradients) > 1 else gradients[0][None]

    def rotate(self, x: Tensor, rows: slice, back: bool = False) -> Tensor:
        """x [k, ...] into the eigenbases of its rows, or back; x itself where there is none."""
        for side in self.sides:
            basis = side.basis[rows]
            x = side.rotate(x, basis.mT if back else basis)
        return x

    def state(self, row: int) -> dict[str, Any]:
        """What a checkpoint holds of a parameter, as views of the buffers; [] for sides without preconditioner."""
        by_dimension = {side.dimension: side for side in self.sides}
        sides = [by_dimension.get(d) for d in range(self.mean.ndim - 1)]
        return {
            "exp_avg": self.mean[row],
            "exp_avg_sq": self.square[row],
            "GG": [side.gram[row] if side else [] for side in sides],
            "Q": [side.basis[row] if side else [] for side in sides],
        }


# Rows of a side that need a basis.
Due = tuple[Side, slice]


class SOAP(torch.optim.Optimizer):
    """SOAP with decoupled weight decay, the mathematics of pytorch_optimizer.SOAP (4.1, defaults for what is not named
    here), whose checkpoints it reads.

    A matrix G [m, n] has running means of G G^T and G^T G, with eigenvectors Q_L and Q_R. Adam's second moments are
    those of Q_L^T G Q_R; its first moment M is kept unrotated, and the update is Q_L U Q_R^T, where U is
    Q_L^T M Q_R / (sqrt(second moments) + eps). A tensor with more dimensions has a preconditioner for each; vectors,
    and sides longer than `max_precondition_dim`, have none.

    What the paper leaves open, as that library has it:
    - The first step of a group only finds the bases, by eigendecomposition of the first gradient's products (times
      1 - beta2). It moves nothing, decays nothing, and is not counted by the bias corrections.
    - A step is: rotate by the old basis, both moments, move, then decay the moved weights (by lr * weight_decay), then
      the products of G, then the refresh. Products have the decay rate beta2.
    - The bias corrections scale the learning rate, so eps is added to the second moments' uncorrected root.
    - A refresh does not rotate the second moments into the new basis.
    - Steps are counted by group. A parameter whose first gradient comes later is corrected as if it had been there from
      the start, moves in that step already, and its first gradient enters the products twice; in a step of refreshes
      its basis is refreshed twice, too. One without gradient in a step stays as it is, and misses a refresh due then.

    What differs, without consequence but for rounding: a refresh leaves each eigenvector in its column, where the
    library sorts both them and the second moments; and sides of length 1 have no preconditioner, since it would be 1.

    Of several processes (torch.distributed), each computes a part of the bases that are due and broadcasts it. All
    processes must hold the same parameters, gradients (DistributedDataParallel's, say) and state, and the same
    parameters must lack a gradient; or `replicated` is false, and each process is on its own, with parameters of its
    own (ssl/optim/sharded.py). Only the first step of a parameter makes the host wait for a GPU.

    Args:
        params: parameters or groups of them, dense and real. State has the dtype of its parameter.
        lr: learning rate; like weight_decay it may be changed in the groups before every step.
        betas: decay rates of the first, and of the second moments and the products.
        eps: added to the root of the second moments.
        weight_decay: decoupled, multiplied by lr.
        precondition_frequency: steps between two refreshes of a basis.
        max_precondition_dim: longer sides have no preconditioner.
        spread: let the matrices' refreshes take turns, so that every step has about the same share of the work: sides
            are distributed over the steps of a period by length^3. Otherwise all are refreshed in the same step. It
            depends on the groups and their step counts alone, so a resumed run goes on with the same turns.
        replicated: all processes hold the same, and divide the refreshes.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        precondition_frequency: int = 10,
        max_precondition_dim: int = 10000,
        spread: bool = False,
        replicated: bool = True,
    ):
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas are {betas}; both must be at least 0 and below 1")
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if value < 0:
                raise ValueError(f"{name} is {value}; it cannot be negative")
        for name, count in (
            ("precondition_frequency", precondition_frequency),
            ("max_precondition_dim", max_precondition_dim),
        ):
            if count < 1:
                raise ValueError(f"{name} is {count}; it must be at least 1")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "precondition_frequency": precondition_frequency,
            "max_precondition_dim": max_precondition_dim,
            "step": 0,
        }
        self.spread = spread
        self.replicated = replicated
        self._stacks: list[Stack] = []
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its steps count from now."""
        super().add_param_group(param_group)
        self._stacks = []

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "spread": self.spread, "replicated": self.replicated}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # load_state_dict comes here too: what it read lies in self.state, and the next step stacks it.
        super().__setstate__(state)
        self._stacks = []
        for group in self.param_groups:
            group.setdefault("step", 0)  # which the library sets in its first step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move all parameters that have a gradient; returns what the closure returns, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._stacks = self._stacks or self._stack()

        new: list[Due] = []
        again: list[Due] = []
        for stack in self._stacks:
            for rows in stack.runs(lambda parameter: parameter.grad is not None and parameter not in self.state):
                gradients = stack.gradients(rows)
                for side in stack.sides:
                    unfolded = side.unfold(gradients)
                    side.gram[rows] = torch.bmm(unfolded, unfolded.mT).mul_(1 - stack.group["betas"][1])
                    new.append((side, rows))
                if stack.group["step"] > 0:
                    again += _due(stack, rows)
                for row in range(rows.start, rows.stop):
                    self.state[stack.parameters[row]] = stack.state(row)
        self._find_bases(new, first=True)
        self._find_bases(again, first=False)

        due: list[Due] = []
        for stack in self._stacks:
            if stack.group["step"] > 0:
                for rows in stack.runs(lambda parameter: parameter.grad is not None):
                    _update(stack, rows)
                    due += _due(stack, rows)
        self._find_bases(due, first=False)
        for group in self.param_groups:
            group["step"] += 1
        return loss

    def _find_bases(self, due: list[Due], first: bool) -> None:
        if self.replicated and distributed.world_size() > 1 and due:
            _divide_bases(due, first)
            return
        for side, rows in due:
            side.basis[rows] = side.new_basis(rows, first)

    def _stack(self) -> list[Stack]:
        """Buffers for all parameters, filled with the state that there is, which becomes views of them."""
        stacks = []
        for group in self.param_groups:
            alike: dict[tuple[Any, ...], list[Tensor]] = {}
            for parameter in group["params"]:
                alike.setdefault((parameter.shape, parameter.dtype, parameter.device), []).append(parameter)
            for parameters in alike.values():
                most = max(1, STACK // max(1, parameters[0].numel()))
                for start in range(0, len(parameters), most):
                    stacks.append(_empty_stack(group, parameters[start : start + most]))
        self._give_turns(stacks)
        for stack in stacks:
            for row, parameter in enumerate(stack.parameters):
                if parameter in self.state:
                    saved, views = self.state[parameter], stack.state(row)
                    views["exp_avg"].copy_(saved["exp_avg"])
                    views["exp_avg_sq"].copy_(saved["exp_avg_sq"])
                    for side in stack.sides:
                        side.gram[row].copy_(saved["GG"][side.dimension])
                        side.basis[row].copy_(saved["Q"][side.dimension])
                    self.state[parameter] = views
        return stacks

    def _give_turns(self, stacks: list[Stack]) -> None:
        if not self.spread:
            return
        for period in {stack.group["precondition_frequency"] for stack in stacks}:
            sides = [side for s in stacks if s.group["precondition_frequency"] == period for side in s.sides]
            turns = balance([(len(side.gram), side.length**3) for side in sides], period)
            for side, steps in zip(sides, turns, strict=True):
                side.turns = steps


def balance(jobs: Sequence[tuple[int, float]], bins: int) -> list[list[int]]:
    """Distribute jobs over bins of about the same cost: the longest job first, each to the bin that has least.

    Args:
        jobs: for every kind of job, how many there are, and what one costs.

    Returns:
        For every kind, the bins of its jobs, ascending. The same arguments always give the same result.
    """
    loads = [(0.0, b) for b in range(bins)]
    shares: list[list[int]] = [[] for _ in jobs]
    for kind in sorted(range(len(jobs)), key=lambda k: -jobs[k][1]):
        count, cost = jobs[kind]
        for _ in range(count):
            load, b = loads[0]
            heapq.heapreplace(loads, (load + cost, b))
            shares[kind].append(b)
        shares[kind].sort()
    return shares


def _empty_stack(group: dict[str, Any], parameters: list[Tensor]) -> Stack:
    first, n = parameters[0], len(parameters)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(n, *shape, dtype=first.dtype, device=first.device)

    sides = []
    for d, length in enumerate(first.shape):
        if first.ndim > 1 and 1 < length <= group["max_precondition_dim"]:
            before, after = math.prod(first.shape[:d]), math.prod(first.shape[d + 1 :])
            sides.append(Side(d, before, length, after, zeros(length, length), zeros(length, length), [0] * n))
    return Stack(group, parameters, zeros(*first.shape), zeros(*first.shape), sides)


def _update(stack: Stack, rows: slice) -> None:
    """One step of a slice of parameters, up to the products of G."""
    group, parameters = stack.group, stack.parameters[rows]
    step, lr, (beta1, beta2) = group["step"], group["lr"], group["betas"]
    gradients, mean, square = stack.gradients(rows), stack.mean[rows], stack.square[rows]
    rotated = stack.rotate(gradients, rows)
    mean.lerp_(gradients, 1 - beta1)
    square.mul_(beta2).addcmul_(rotated, rotated, value=1 - beta2)
    update = square.sqrt().add_(group["eps"])
    torch.div(stack.rotate(mean, rows), update, out=update)
    update = stack.rotate(update, rows, back=True)
    size = lr * math.sqrt(1 - beta2**step) / (1 - beta1**step)
    torch._foreach_add_(parameters, update.unbind(), alpha=-size)
    if group["weight_decay"]:
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
    for side in stack.sides:
        unfolded = side.unfold(gradients)
        side.gram[rows].baddbmm_(unfolded, unfolded.mT, beta=beta2, alpha=1 - beta2)


def _due(stack: Stack, rows: slice) -> list[Due]:
    """What is to be refreshed in this step of the rows' sides."""
    due = []
    turn = stack.group["step"] % stack.group["precondition_frequency"]
    for side in stack.sides:
        start = max(rows.start, bisect_left(side.turns, turn))
        stop = min(rows.stop, bisect_right(side.turns, turn))
        if start < stop:
            due.append((side, slice(start, stop)))
    return due


def _divide_bases(due: list[Due], first: bool) -> None:
    """New bases for all that is due: each process computes its share, and all get all of them."""
    world = distributed.world_size()
    owners = balance([(rows.stop - rows.start, side.length**3) for side, rows in due], world)
    parts: list[list[Due]] = [[] for _ in range(world)]
    for (side, rows), ranks in zip(due, owners, strict=True):
        for rank, part in enumerate(parts):
            start, stop = bisect_left(ranks, rank), bisect_right(ranks, rank)
            if start < stop:
                part.append((side, slice(rows.start + start, rows.start + stop)))
    bases = [side.basis for side, _ in due]
    dtype = torch.float64 if any(basis.dtype == torch.float64 for basis in bases) else torch.float32
    sizes = [sum(side.basis[rows].numel() for side, rows in part) for part in parts]
    buffers = [torch.empty(size, dtype=dtype, device=bases[0].device) for size in sizes]
    for target, (side, rows) in _unpack(buffers[distributed.rank()], parts[distributed.rank()]):
        target.copy_(side.new_basis(rows, first))
    sent = [dist.broadcast(buffer, src, async_op=True) for src, buffer in enumerate(buffers) if len(buffer)]
    for work in sent:
        if work:
            work.wait()
    for buffer, part in zip(buffers, parts, strict=True):
        for basis, (side, rows) in _unpack(buffer, part):
            side.basis[rows] = basis


def _unpack(buffer: Tensor, part: list[Due]) -> Iterator[tuple[Tensor, Due]]:
    """The pieces of a flat buffer that hold the bases of `part`, [k, length, length] each."""
    start = 0
    for side, rows in part:
        shape = side.basis[rows].shape
        yield buffer[start : start + shape.numel()].view(shape), (side, rows)
        start += shape.numel()
