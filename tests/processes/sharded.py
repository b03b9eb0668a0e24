"""One of several processes that hold parts of parameters: SOAP and Muon against whole parameters, for test_sharded.py.

In float64, so that nothing but a mistake tells the two apart. Sides are not divisible by the number of processes, one
is shorter than it, and one tensor is cut along its last axis. The twins' sides are multiples of four: alone and in a
stack they are then aligned alike in memory, on which LAPACK's last bits depend on some CPUs, and with them the
eigenvectors of the null space.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from skipless.common import distributed
from skipless.ssl.optim.optimizers import Muon
from skipless.ssl.optim.sharded import ShardedOptimizer
from skipless.ssl.optim.soap import SOAP

SHAPES = {"a": (8, 4), "b": (8, 4), "wide": (3, 12), "token": (1, 2, 8), "bias": (5,), "one": (1,), "long": (20, 3)}
MUON = {"a": 1, "b": 1, "wide": 3}


def groups(rule: str, parameters: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    if rule == "soap":
        decaying = [p for p in parameters.values() if p.ndim > 1]
        others = [p for p in parameters.values() if p.ndim == 1]
        return [{"params": decaying, "decays": True}, {"params": others, "decays": False}]
    matrices = {"params": [parameters[n] for n in MUON], "decays": True, "matrices": True, "parts": [*MUON.values()]}
    others = [parameter for n, parameter in parameters.items() if n not in MUON]
    return [matrices, {"params": others, "decays": False, "matrices": False}]


def make(rule: str, replicated: bool) -> Callable[..., torch.optim.Optimizer]:
    if rule == "muon":
        return lambda groups: Muon(groups, lr=0.01, betas=(0.9, 0.99))
    return lambda groups: SOAP(groups, precondition_frequency=3, max_precondition_dim=15, replicated=replicated)


def gradients(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    drawn = {n: torch.randn(s, dtype=torch.float64, generator=generator) for n, s in SHAPES.items()}
    return {n: g for n, g in drawn.items() if step != 2 or n not in ("b", "bias")}


def set_rates(optimizer: torch.optim.Optimizer, step: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 0.01 * (1 + step % 3)
        group["weight_decay"] = 0.1 if group["decays"] else 0.0


def load(parts: dict[str, nn.Parameter], optimizer: ShardedOptimizer, folder: str) -> None:
    """Go on from a checkpoint: a step of rate 0 makes the state, which it then fills."""
    for parameter in parts.values():
        parameter.grad = torch.zeros_like(parameter)
    set_rates(optimizer, 0)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    optimizer.zero_grad()
    state = {"model": parts, "optimizer": optimizer.state_dict()["state"]}
    dcp.load(state, checkpoint_id=folder)
    optimizer.load_state_dict({"state": state["optimizer"]})


def run(rule: str, folder: str, first: int, last: int) -> None:
    """Steps `first` to `last`, compared after each; from a checkpoint unless `first` is 0, and to one."""
    mesh = init_device_mesh("cpu", (distributed.world_size(),))

    def cut(name: str, tensor: Tensor) -> Tensor:
        return distribute_tensor(tensor.clone(), mesh, [Shard(2 if name == "token" else 0)])

    torch.manual_seed(0)
    start = {n: torch.randn(s, dtype=torch.float64) for n, s in SHAPES.items()}
    whole = {n: nn.Parameter(t.clone()) for n, t in start.items()}
    parts = {n: nn.Parameter(cut(n, t)) for n, t in start.items()}
    reference = make(rule, False)(groups(rule, whole))
    sharded = ShardedOptimizer(groups(rule, parts), make(rule, False), 15)
    if first:
        load(parts, sharded, folder)
    for step in range(last):
        set_rates(reference, step)
        set_rates(sharded, step)
        given = gradients(step)
        for name in SHAPES:
            whole[name].grad = given.get(name)
        reference.step()
        if step < first:
            continue
        for name in SHAPES:
            parts[name].grad = cut(name, given[name]) if name in given else None
        sharded.step()
        sharded.zero_grad()
        assert all(p.grad is None for p in parts.values())
        for name in SHAPES:
            together = parts[name].full_tensor()  # type: ignore[attr-defined]
            torch.testing.assert_close(together, whole[name].data, rtol=1e-9, atol=1e-11, msg=f"{rule} {name} {step}")
            assert not torch.equal(whole[name].data, start[name]) or step == 0
    dcp.save({"model": parts, "optimizer": sharded.state_dict()["state"]}, checkpoint_id=folder)
    state = sharded.state_dict()["state"]
    del state["steps"]
    held = sum(tensor.numel() for s in state.values() for tensor in s.values() if not hasattr(tensor, "to_local"))
    counts = distributed.gather_objects((held, len(state)))
    if distributed.rank() == 0:
        print([[numbers for numbers, _ in counts], sum(entries for _, entries in counts)], flush=True)


def main(words: list[str]) -> None:
    """Words: folder, first and last step."""
    folder, first, last = words[0], int(words[1]), int(words[2])
    distributed.start("cpu")
    for rule in ("soap", "muon"):
        run(rule, os.path.join(folder, rule), first, last)
    distributed.wait_for_all()
    distributed.stop()
