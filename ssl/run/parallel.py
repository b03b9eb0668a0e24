"""How a model runs: on one process, as copies on several (DDP), in parts (FSDP2); compiled; in which precision.

Sharded training (FSDP2) is for models that are too large for one GPU with all that training adds. Every process keeps
one part of each parameter, of its gradient and of the optimizer's state, for the student and for the teacher. A block's
parameters are gathered when it runs and let go of after it. What is element-wise (AdamW, the teacher's moving average)
then works on the parts as they are; what is not is in `clip_grad_norm` and `full_backbone`, in checkpoints.py, and in
ssl/optim/sharded.py: SOAP and Muon. docs/scaling.md says when this pays.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from skipless.common import distributed
from skipless.common.hardware import keep_freed_memory
from skipless.common.precision import autocast
from skipless.ssl.dino import DINOModel
from skipless.ssl.model.attention import Backend
from skipless.ssl.model.vit import VisionTransformer

# torch's modules for sharding are imported where they are needed: they take a second, at every start of every run.


@dataclass
class Parallel:
    """A network as it trains. Checkpoints and measurements use the network itself."""

    network: Any
    """What reduces gradients: the network, its DistributedDataParallel, or the sharded network."""
    forward: Callable[..., Any]
    """The forward pass of training."""
    autocast: AbstractContextManager[Any]
    """What forward passes run in; it may be entered many times."""

    def sync_gradients(self, last: bool) -> AbstractContextManager[None]:
        """Unless it is the step's last micro-batch, backward passes within leave their gradients on this process. With
        FSDP2 a process then holds the gradients of the whole network."""
        if is_sharded(self.network):
            self.network.set_requires_gradient_sync(last)
        ddp = isinstance(self.network, DistributedDataParallel)
        return self.network.no_sync() if ddp and not last else nullcontext()


def parallelize(
    network: nn.Module,
    device: torch.device,
    precision: str,
    shard: bool = False,
    compile: Callable[[Any], Any] = lambda network: network,
) -> Parallel:
    """Prepare a network, which all processes have with the same numbers, for training on all of them.

    Args:
        network: on `device`. A network that needs no gradients is never wrapped, as there is nothing to reduce.
        precision: "bf16" or "fp32".
        shard: cut the network, a `DINOModel`, in place: each block is gathered by itself, the rest with the head. With
            bf16 on CUDA the blocks are gathered in bf16. Parameters stay float32 where they are updated, and gradients
            are reduced in float32. The rest is gathered in float32, so that embeddings, the final norm and prototypes
            are what they are without sharding.
        compile: a `Compiler`: the forward pass becomes one graph (with DistributedDataParallel one for each bucket of
            gradients, which are sent while the next is computed; with `shard` one for each block). The network stays as
            it is, for checkpoints, and for measurements on images of other sizes, each of which would have to be
            compiled anew.
    """
    if device.type == "cpu":
        keep_freed_memory()
    trains = any(parameter.requires_grad for parameter in network.parameters())
    wrapped = network
    if device.type == "cuda" and precision == "bf16" and not shard:
        wrapped = Bf16Weights(network)
    if shard:
        _shard(network, precision == "bf16", trains, compile)
    elif trains and distributed.world_size() > 1:
        devices = [device] if device.type == "cuda" else None
        wrapped = DistributedDataParallel(wrapped, devices, gradient_as_bucket_view=True)
    return Parallel(wrapped, wrapped if shard else compile(wrapped), autocast(device, precision == "bf16"))


class Bf16Weights(nn.Module):
    """A network whose linear layers read bf16 copies of their weights, made a block at a time in one kernel.

    The numbers are those of autocast, which makes the same copies one by one, in every call, and as many casts of their
    gradients: 300 launches of a step. Block by block, so that DistributedDataParallel has a block's gradients as soon
    as its backward pass is done; all at once where there is none.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.groups: dict[str, list[str]] = {}
        trains = any(parameter.requires_grad for parameter in network.parameters())
        for name, module in network.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                block = name.split(".blocks.")[-1].split(".")[0] if ".blocks." in name and trains else ""
                own = [f"{name}.{kind}" for kind, _ in module.named_parameters(recurse=False)]
                self.groups.setdefault(block, []).extend(own)

    def forward(self, *inputs: Any) -> Any:
        """What the network gives."""
        parameters: dict[str, Tensor] = dict(self.network.named_parameters())
        copies: dict[str, Tensor] = {}
        for names in self.groups.values():
            copies.update(zip(names, _Bf16Copies.apply(*(parameters[name] for name in names)), strict=True))
        return torch.func.functional_call(self.network, copies, inputs)


class _Bf16Copies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> tuple[Tensor, ...]:
        return _cast_together(weights, torch.bfloat16)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return _cast_together(gradients, torch.float32)


def _cast_together(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    cast = tuple(torch.empty_like(tensor, dtype=dtype) for tensor in tensors)
    torch._foreach_copy_(cast, tensors)
    return cast


def _shard(model: Any, bf16: bool, trains: bool, compile: Callable[[Any], Any]) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    device = model.backbone.norm.weight.device.type
    mesh = init_device_mesh(device, (distributed.world_size(),))
    blocks_policy = MixedPrecisionPolicy()
    if bf16 and device == "cuda":
        # Autocast casts what enters a layer; cast for the whole block, the residual stream would lose its float32.
        blocks_policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in model.backbone.blocks:
        block.forward = compile(block.forward)  # between the hooks that gather its parameters and let go of them
        fully_shard(
            block, mesh=mesh, reshard_after_forward=True, shard_placement_fn=_placement, mp_policy=blocks_policy
        )
    # A backward pass would let go of what is kept after the forward pass. The teacher has none, and would go on with
    # the parameters of its first step.
    fully_shard(model, mesh=mesh, reshard_after_forward=not trains, shard_placement_fn=_placement)


def is_sharded(model: nn.Module) -> bool:
    """Whether its parameters are cut over the processes."""
    return hasattr(model, "set_requires_gradient_sync")


def _placement(parameter: nn.Parameter) -> Any:
    """The axis to cut, None for the first one.

    Of an axis of length 1 (tokens, positions) all processes but one would get padding, as large as the whole and sent
    around like it. Another axis must be divisible.
    """
    from torch.distributed.tensor import Shard

    last_divides = parameter.shape[-1] % distributed.world_size() == 0
    return Shard(parameter.ndim - 1) if parameter.ndim > 2 and parameter.shape[0] == 1 and last_divides else None


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """`nn.utils.clip_grad_norm_`, over the parts on all processes where gradients are sharded.

    Returns:
        float32 []: the norm over all gradients before they were scaled down to at most `limit`.
    """
    parameters = list(parameters)
    shards = [p.grad.to_local() for p in parameters if p.grad is not None and hasattr(p.grad, "to_local")]
    if not shards:
        return nn.utils.clip_grad_norm_(parameters, limit)
    norm = distributed.all_reduce_sum(nn.utils.get_total_norm(shards).square()).sqrt()
    torch._foreach_mul_(shards, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


def full_backbone(teacher: DINOModel) -> VisionTransformer:
    """The backbone with whole parameters on this process, in evaluation mode: a copy of a sharded one, in float32,
    otherwise the model's own. All processes must call it."""
    if not is_sharded(teacher):
        return teacher.backbone
    return assemble(teacher.backbone.architecture, teacher.backbone.state_dict(), teacher.backbone.attention)


def assemble(
    architecture: dict[str, Any], tensors: Mapping[str, Tensor], attention: Backend = "auto"
) -> VisionTransformer:
    """A backbone from its architecture and tensors, whole or parts of this process and others; in evaluation mode."""
    with torch.device("meta"):
        backbone = VisionTransformer(**architecture, attention=attention)
    whole = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in tensors.items()}
    backbone.load_state_dict(whole, assign=True)
    return backbone.requires_grad_(False).eval()
