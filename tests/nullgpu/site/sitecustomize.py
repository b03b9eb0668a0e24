"""Python runs this at its start: torch without what the null GPU lacks, and without doubts about its zeros."""

import os
from typing import Any

import torch
import torch.nn.parallel.distributed

torch.backends.cudnn.enabled = False
torch.backends.cuda.enable_cudnn_sdp(False)
if os.environ.get("WORLD_SIZE", "1") != "1":  # what the other processes said would be zeros
    torch.nn.parallel.distributed._verify_param_shape_across_processes = lambda *_, **__: True

_all = torch.Tensor.all


def _always(self: torch.Tensor, *arguments: Any, **more: Any) -> torch.Tensor:
    """Whether all values are finite, say, which zeros would deny."""
    answer = _all(self, *arguments, **more)
    return torch.ones(answer.shape, dtype=torch.bool) if self.is_cuda else answer


torch.Tensor.all = _always  # type: ignore[method-assign,assignment]
