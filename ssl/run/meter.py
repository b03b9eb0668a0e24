"""What a run measures of itself: averages between two log lines, speed, memory, and signs of trouble."""

import math
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from skipless.common import distributed
from skipless.common.files import write_text
from skipless.datasets.images import ImageSource
from skipless.ssl.config import Settings
from skipless.ssl.dino import DINOOutput, diagnose_collapse
from skipless.ssl.model.vit import VisionTransformer
from skipless.ssl.optim.schedules import Rates
from skipless.ssl.run.logging import RunLog

Batch = TypeVar("Batch")


class Meter:
    """Averages over the steps between two log lines, kept on the device until then."""

    NAMES = ("loss", "teacher_entropy", "kl", "usage_entropy")
    PATIENCE = 5  # log lines in a row that look like collapse before it is called so

    def __init__(
        self, settings: Settings, backbone: VisionTransformer, device: torch.device, steps_per_epoch: int, log: RunLog
    ):
        self.settings, self.device, self.steps_per_epoch, self.log = settings, device, steps_per_epoch, log
        self.sums = torch.zeros(len(self.NAMES), device=device)
        self.micro_batches = self.images = self.suspicions = 0
        self.unreadable: set[str] = set()  # on this process
        self.unreadable_everywhere: set[str] = set()
        self.seconds_from, self.waited = time.perf_counter(), 0.0
        crops = settings.crops
        global_view, local_view = (
            backbone.flops(side, side) for side in (crops.global_crops_size, crops.local_crops_size)
        )
        # Forward of the teacher; forward and backward (twice the forward) of the student.
        self.flops_per_image = 2 * global_view + 3 * (2 * global_view + crops.local_crops_number * local_view)

    def timed(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """The loader's batches; the time it takes to get them counts as waiting for data."""
        batches = iter(loader)
        while True:
            asked = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.waited += time.perf_counter() - asked
            yield batch

    def add(self, result: DINOOutput, unreadable: list[str]) -> None:
        """Count one micro-batch."""
        self.sums += torch.stack([getattr(result, name).detach().float() for name in self.NAMES])
        self.micro_batches += 1
        self.images += self.settings.batch_size // self.settings.accumulate
        self.unreadable.update(unreadable)

    def restart_clock(self) -> None:
        """Leave the time up to now out of images/s and of the wait for data."""
        self.seconds_from, self.images, self.waited = time.perf_counter(), 0, 0.0

    def report(self, step: int, gradient_norm: Tensor, rates: Rates, images: ImageSource) -> None:
        """Write one line of metrics, warn of collapse, and stop where going on is pointless."""
        self._check_unreadable(images)
        if not self.micro_batches:
            return
        means = distributed.all_reduce_mean(self.sums / self.micro_batches).tolist()
        values: dict[str, float] = dict(zip(self.NAMES, means, strict=True))
        ceiling = math.log(self.settings.dino.out_dim)
        seconds = time.perf_counter() - self.seconds_from
        speed = self.images / seconds
        values |= {
            "below_ln_k": ceiling - values["loss"],
            "gradient_norm": gradient_norm.item(),
            "lr": rates.lr(step - 1),
            "weight_decay": rates.weight_decay(step - 1),
            "momentum": rates.momentum(step - 1),
            "teacher_temperature": rates.teacher_temperature(step - 1),
            "images_per_second": speed,
            "data_share": self.waited / seconds,
            "memory_gb": memory_gb(self.device),
        }
        peak = peak_flops(self.device)
        if peak:
            values["model_flops_utilisation"] = speed * self.flops_per_image / (peak * distributed.world_size())
        sentence = diagnose_collapse(prototypes=self.settings.dino.out_dim, **dict(zip(self.NAMES, means, strict=True)))
        if not math.isfinite(values["loss"]) or not math.isfinite(values["gradient_norm"]):
            raise ValueError(
                f"stopped at step {step}: the loss is {values['loss']:g} and the gradient's norm "
                f"{values['gradient_norm']:g}; lower the learning rate (--optimizer.lr) or clip gradients harder "
                "(--clip_grad); the last checkpoint is from before"
            )
        self.log.metrics(step, step / self.steps_per_epoch, values)
        self.log.progress(
            step,
            f"loss {values['loss']:.3f} (ln K {ceiling:.2f}), {speed:.0f} images/s, "
            f"data {100 * values['data_share']:.0f} %, {values['memory_gb']:.1f} GB"
            + (f", {100 * values['model_flops_utilisation']:.0f} % of peak FLOPs" if peak else ""),
        )
        self.suspicions = self.suspicions + 1 if sentence and step > rates.warmup else 0
        if sentence and self.suspicions == self.PATIENCE:
            self.log.say(f"WARNING at step {step}: {sentence}")
        self.sums.zero_()
        self.micro_batches = 0
        self.restart_clock()

    def _check_unreadable(self, images: ImageSource) -> None:
        everywhere = set().union(*distributed.gather_objects(self.unreadable))
        if everywhere == self.unreadable_everywhere:
            return
        self.unreadable_everywhere = everywhere
        if self.log.active:
            write_text(Path(self.settings.out) / "unreadable.txt", "".join(f"{line}\n" for line in sorted(everywhere)))
        if len(everywhere) > self.settings.data.max_unreadable * len(images):
            shown = "; ".join(sorted(everywhere)[:5])
            raise ValueError(
                f"{len(everywhere)} of {len(images)} images in {images.origin} cannot be read, more than "
                f"data.max_unreadable ({self.settings.data.max_unreadable:g}) allows: {shown}; "
                f"{self.settings.out}/unreadable.txt has all"
            )


def memory_gb(device: torch.device) -> float:
    """Most memory held so far: of the device on CUDA, of this process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / (2**30 if sys.platform == "darwin" else 2**20)


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of the GPU by its data sheet, in FLOP/s; None for a CPU and for GPUs not listed."""
    if device.type != "cuda":
        return None
    peaks = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in peaks.items() if part in name), None)
