"""What is compiled, where, and what happens where it cannot be."""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from skipless.common import distributed
from skipless.ssl.config import Settings
from skipless.ssl.model.attention import choose_backend
from skipless.ssl.model.vit import SIZES

F = TypeVar("F", bound=Callable[..., Any])


def resolve_compile(cfg: Settings, device: torch.device) -> None:
    """Put true or false for `compile: auto`; where it is true, an attention in place of auto that a graph can hold.

    Raises:
        ValueError: compile is true, and something is in its way.
    """
    hindrances = {
        "the device is a CPU, where it gains nothing": device.type == "cpu",
        "model.attention is 'xformers', which cannot be compiled": cfg.model.attention == "xformers",
        "ibot.loss_weight is set; the number of masked patches changes from step to step, for which compiled code "
        "would be made anew each time": cfg.ibot.on,
    }
    found = next((hindrance for hindrance, holds in hindrances.items() if holds), None)
    if cfg.compile is True and found:
        raise ValueError(f"compile is true, and {found}: leave it on auto")
    cfg.compile = cfg.compile is True or (cfg.compile == "auto" and not found and not cfg.shard)
    model = cfg.model
    if cfg.compile and model.attention == "auto":
        dim, heads = (getattr(model, name) or SIZES[model.size][name] for name in ("dim", "heads"))
        dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
        try:
            model.attention = choose_backend(device, "varlen", dtype, dim // heads)[0]
        except ValueError:
            model.attention = "sdpa"


class Compiler:
    """Compiles functions at their first call (torch.compile), with their backward passes.

    From the first error of torch's compiler on they run as they were written, and a sentence on the screen says so:
    where a C compiler is missing, say.
    """

    def __init__(self, on: bool):
        self.on = on
        if on:
            from torch._dynamo import config as tracing  # torch has not always imported them by itself
            from torch._functorch import config as lowering

            # The backward pass is compiled in the forward pass, where an error has no consequences yet.
            lowering.force_non_lazy_backward_lowering = True
            tracing.recompile_limit = 64  # compiled block by block, each has a drop path rate of its own

    def __call__(self, function: F) -> F:
        """`function`, compiled for each combination of shapes that it gets."""
        if not self.on:
            return function
        compiled = torch.compile(function, dynamic=False)

        def either(*inputs: Any, **more: Any) -> Any:
            if self.on:
                try:
                    return compiled(*inputs, **more)
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # a missing compiler, Triton, driver: each has an error of its own
                    self.on = False
                    self._say(error)
            return function(*inputs, **more)

        return either  # type: ignore[return-value]

    def _say(self, error: Exception) -> None:
        error = getattr(error, "inner_exception", error)
        why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if distributed.rank() == 0:
            tqdm.write(f"not compiled, as torch.compile fails here ({why}); the run goes on without", file=sys.stderr)
