"""bf16 arithmetic where it is fast: all of it on a GPU, the products of linear layers on a CPU.

    with autocast(device, bf16=True):
        loss = model(crops)
    loss.backward()

On a GPU this is torch's autocast. On a CPU that is slower than float32: LayerNorm, GELU, attention and the casts cost
more than the products save. Here only `linear` rounds its factors to bf16, forward and backward, and adds up in
float32, which is what the matrix units of newer Xeons (AMX) do at several times the speed of float32; tensors stay
float32, and nothing else changes. oneDNN does it. Processors without these units stay with float32.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 is fast on it: GPUs from Ampere on, CPUs with AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_amx_tile_supported()


def autocast(device: torch.device, bf16: bool) -> AbstractContextManager[Any]:
    """What a forward pass runs in. It may be entered many times; the backward pass belongs outside.

    Without `bf16` it changes nothing. Tensors that are not float32 are left alone on a CPU.
    """
    if not bf16:
        return nullcontext()
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16)
    return _Bf16Products() if has_bf16(device) else nullcontext()


def describe(device: torch.device, bf16: bool) -> str:
    """The precision in a few words, for the lines at the start of a run."""
    if bf16 and device.type == "cpu":
        return "fp32, products of linear layers in bf16" if has_bf16(device) else "fp32, as this CPU is slow in bf16"
    return "bf16" if bf16 else "fp32"


def for_checkpoint() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """`context_fn` of torch.utils.checkpoint: what is computed again in the backward pass is computed as before."""
    return nullcontext(), _Bf16Products() if _Bf16Products.entered else nullcontext()


class _Bf16Products(TorchFunctionMode):
    entered = 0

    def __enter__(self) -> "_Bf16Products":
        _Bf16Products.entered += 1
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        _Bf16Products.entered -= 1
        super().__exit__(*exception)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and not kwargs and len(args) == 3 and args[0].dtype == args[1].dtype == torch.float32:
            return _Linear.apply(*args)
        return func(*args, **(kwargs or {}))


class _Linear(torch.autograd.Function):
    """F.linear whose products are bf16's.

    A function of its own, since oneDNN's switch is global: left on, it would reach attention, whose small products it
    makes ten times slower, and SOAP, whose eigenbases need float32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        with _onednn_in_bf16():
            return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        with _onednn_in_bf16():
            return (
                gradient @ weight if needs_x else None,
                rows.T @ x.flatten(0, -2) if needs_weight else None,
                rows.sum(0) if needs_bias else None,
            )


@contextmanager
def _onednn_in_bf16() -> Iterator[None]:
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
