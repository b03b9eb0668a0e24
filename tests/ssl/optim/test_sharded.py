"""SOAP and Muon over sharded parameters: what one process with whole parameters computes, on any number of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from skipless.ssl.optim.sharded import owners_of

# In float64, so that nothing but a mistake tells the two apart. Sides are not divisible by the number of processes, one
# is shorter than it, and one tensor is cut along its last axis. The twins' sides are multiples of four: alone and in a
# stack they are then aligned alike in memory, on which LAPACK's last bits depend on some CPUs, and with them the
# eigenvectors of the null space.
SCRIPT = """
import os, sys
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from skipless.ssl.optim.optimizers import Muon
from skipless.ssl.optim.sharded import ShardedOptimizer
from skipless.ssl.optim.soap import SOAP

name, processes, folder, first, last = sys.argv[1], *map(int, sys.argv[2:3]), sys.argv[3], *map(int, sys.argv[4:])
SHAPES = {"a": (8, 4), "b": (8, 4), "wide": (3, 12), "token": (1, 2, 8), "bias": (5,), "one": (1,), "long": (20, 3)}
MUON = {"a": 1, "b": 1, "wide": 3}


def groups(parameters):
    if name == "soap":
        kinds = {True: [p for p in parameters.values() if p.ndim > 1]}
        kinds[False] = [p for p in parameters.values() if p.ndim == 1]
        return [{"params": p, "decays": decays} for decays, p in kinds.items()]
    matrices = {"params": [parameters[n] for n in MUON], "decays": True, "matrices": True, "parts": [*MUON.values()]}
    others = [parameter for n, parameter in parameters.items() if n not in MUON]
    return [matrices, {"params": others, "decays": False, "matrices": False}]


def make(replicated):
    if name == "muon":
        return lambda groups: Muon(groups, lr=0.01, betas=(0.9, 0.99))
    return lambda groups: SOAP(groups, precondition_frequency=3, max_precondition_dim=15, replicated=replicated)


def gradients(step):
    generator = torch.Generator().manual_seed(step)
    found = {n: torch.randn(s, dtype=torch.float64, generator=generator) for n, s in SHAPES.items()}
    if step == 2:
        del found["b"], found["bias"]
    return found


def rates(optimizer, step):
    for group in optimizer.param_groups:
        group["lr"] = 0.01 * (1 + step % 3)
        group["weight_decay"] = 0.1 if group["decays"] else 0.0


def run(rank):
    meeting = f"file://{folder}/meet-{processes}-{first}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes)
    mesh = init_device_mesh("cpu", (processes,))
    torch.manual_seed(0)
    start = {n: torch.randn(s, dtype=torch.float64) for n, s in SHAPES.items()}
    cut = lambda n, t: distribute_tensor(t.clone(), mesh, [Shard(2 if n == "token" else 0)])
    whole = {n: nn.Parameter(t.clone()) for n, t in start.items()}
    parts = {n: nn.Parameter(cut(n, t)) for n, t in start.items()}
    reference, sharded = make(False)(groups(whole)), ShardedOptimizer(groups(parts), make(False), 15)
    if first:  # go on from the checkpoint of another number of processes
        for parameter in parts.values():
            parameter.grad = torch.zeros_like(parameter)
        rates(sharded, 0)
        for group in sharded.param_groups:
            group["lr"] = 0.0
        sharded.step()
        sharded.zero_grad()
        state = {"model": parts, "optimizer": sharded.state_dict()["state"]}
        dcp.load(state, checkpoint_id=f"{folder}/checkpoint")
        sharded.load_state_dict({"state": state["optimizer"]})
    for step in range(last):
        for optimizer in (reference, sharded):
            rates(optimizer, step)
        found = gradients(step)
        for n in SHAPES:
            whole[n].grad = found.get(n)
            if step >= first:
                parts[n].grad = cut(n, found[n]) if n in found else None
        reference.step()
        if step >= first:
            sharded.step()
            sharded.zero_grad()
            assert all(p.grad is None for p in parts.values())
            for n in SHAPES:
                found = parts[n].full_tensor()
                torch.testing.assert_close(found, whole[n].data, rtol=1e-9, atol=1e-11, msg=f"{n} {step}")
                assert not torch.equal(whole[n].data, start[n]) or step == 0
    dcp.save({"model": parts, "optimizer": sharded.state_dict()["state"]}, checkpoint_id=f"{folder}/checkpoint")
    state = sharded.state_dict()["state"]
    del state["steps"]
    held = sum(tensor.numel() for s in state.values() for tensor in s.values() if not hasattr(tensor, "to_local"))
    gathered = [None] * processes
    dist.all_gather_object(gathered, (held, len(state)))
    if rank == 0:
        print([[held for held, _ in gathered], sum(entries for _, entries in gathered)])
    sys.stdout.flush()
    os._exit(0)


children = []
for rank in range(processes):
    children.append(os.fork())
    if not children[-1]:
        try:
            run(rank)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
"""


def run(name: str, processes: int, folder: Path, first: int, last: int) -> str:
    command = [sys.executable, "-c", SCRIPT, name, processes, folder, first, last]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=180, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("name", ["soap", "muon"])
def test_equal_to_whole_parameters_on_three_processes_and_resumed_on_two(name: str, tmp_path: Path) -> None:
    run(name, 3, tmp_path, 0, 8)
    run(name, 2, tmp_path, 8, 14)


def test_every_matrix_has_one_owner_and_all_have_about_the_same(tmp_path: Path) -> None:
    """Two moments, and for every side of 2 to 15 a mean of products and a basis: 224 numbers for each of the matrices
    of 8 x 4, 378 for 3 x 12, 168 for 2 x 8, and 138 for 20 x 3. By cubes of sides the
    third is one process's share, the second has 8 x 4 and 2 x 8, and the last the rest. Vectors are with all three."""
    held, entries = json.loads(run("soap", 3, tmp_path, 0, 2))
    assert sum(held) == 224 + 224 + 378 + 168 + 138
    assert max(held) == 224 + 168
    assert entries == 5 + 3 * 2


def test_matrices_whose_sides_are_all_too_long_are_divided_as_well() -> None:
    assert sorted(owners_of([(40, 30)] * 8, 4, longest_side=10)) == [0, 0, 1, 1, 2, 2, 3, 3]
