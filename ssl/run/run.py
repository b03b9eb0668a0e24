"""A training run on disk: its folder, log and checkpoints, and the signals that end it. It sees no loss or gradient."""

import math
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
import yaml
from torch import nn

from skipless.common import cli, distributed
from skipless.common.files import write_text
from skipless.common.precision import describe
from skipless.common.progress import rate
from skipless.common.provenance import provenance
from skipless.common.settings import LATER, flat, plain
from skipless.ssl.config import RunSettings
from skipless.ssl.model.attention import choose_backend
from skipless.ssl.model.vit import Attention, VisionTransformer
from skipless.ssl.optim.schedules import Schedule
from skipless.ssl.run.checkpoints import export_backbone, load_checkpoint, load_shards, save_checkpoint, save_shards
from skipless.ssl.run.folder import in_place_of_last, last_checkpoint, last_in_words, lock_folder
from skipless.ssl.run.learning import read_metrics, verdict
from skipless.ssl.run.logging import RunLog
from skipless.ssl.run.parallel import is_sharded
from skipless.ssl.run.watch import Watch

Batch = TypeVar("Batch")

# Settings, and groups of them, that a resumed run may have others of.
FREE = ("out", "device", "log_to", "keep", "log_every", "save_every_epochs", "accumulate")
FREE_GROUPS = ("data.", "model.attention", "model.checkpoint", "model.from")
# Settings that an extended run has to share: the shapes of networks and of the optimizer's state depend on them.
SHAPING = (
    "model.pool", "dino.out_dim", "dino.hidden_dim", "dino.bottleneck_dim", "dino.norm_last_layer", "ibot.out_dim",
    "optimizer.name", "optimizer.max_precondition_dim", "shard",
)  # fmt: skip
# What of the images may be other in a resumed run, and is said.
SAID = ("names", "content")


class Run:
    """A run from its settings to its last file. All processes make one and call the same methods together.

    Args:
        source: where the images lie, for messages.
        data: what of the data a resumed run must share: `images`, their number, and maybe more. Of what is in `SAID`,
            as digests, it is said where they are others.
        parts: what a checkpoint holds under these names: networks, loss and optimizer. `student` has the backbone.
    """

    def __init__(
        self,
        settings: RunSettings,
        schedule: Schedule,
        device: torch.device,
        source: str,
        data: dict[str, Any],
        parts: dict[str, Any],
    ):
        self.settings, self.schedule, self.device, self.source = settings, schedule, device, source
        self.data, self.parts = data, parts
        self.folder = Path(settings.out)
        self.sharded = is_sharded(parts["student"])
        self.first_process = distributed.rank() == 0
        self.start = self.done = 0  # steps, before this process and with its own
        self.seconds_before, self.began = 0.0, time.perf_counter()
        self.signaled = self.ended_by = 0  # numbers of signals: that here, that of all processes
        self.watch = Watch()
        self.saved: int | None = None  # step of the newest checkpoint
        self.spared: int | None = None  # step of the last checkpoint before loss or gradient left the usual
        self.remarks: list[str] = []  # of what was found before the log was open

    # Where it starts --------------------------------------------------------------------------------------------------

    def resume(self, may_change: Sequence[str] = (), extend: str | None = None) -> int:
        """Load the last checkpoint, if the run is to be resumed and has one, and return the step to go on from.

        Args:
            may_change: settings, or groups of them ending in a dot, that a resumed run may have others of.
            extend: folder of another run, whose last checkpoint is loaded where this one has none; the step is then 0.

        Raises:
            ValueError: the checkpoint is damaged, or of another architecture, other images or other settings.
        """
        path = self.settings.last_checkpoint
        if path is not None:
            state = load_checkpoint(path)
            self._check_architecture(path, state)
            self._check_same(path, state, may_change)
            self._load(path, state)
            self.remarks += in_place_of_last(path)
            others = [name for name in SAID if state.get(name, self.data.get(name)) != self.data.get(name)]
            if others:  # a run of an earlier version does not tell
                self.remarks.append(f"{self.source} has other images than before, by their {others[0]}, though as many")
            self.seconds_before = state["seconds"]
            self.saved, self.spared = state["step"], state.get("spared")
            return state["step"]
        if extend is not None:
            path = last_checkpoint(Path(extend) / "checkpoints")
            if path is None:
                raise ValueError(f"extend is {extend}, which has no checkpoint: give the folder of a finished run")
            state = load_checkpoint(path)
            self._check_architecture(path, state)
            old, new = LATER | flat(state["settings"]), flat(plain(self.settings))
            if differing := _differing(old, {name: new[name] for name in SHAPING}):
                raise ValueError(f"{path} cannot be extended with other settings: {differing}; use its own")
            if (old["ibot.loss_weight"] > 0) != (new["ibot.loss_weight"] > 0):
                raise ValueError(
                    f"{path} cannot be extended with ibot.loss_weight {new['ibot.loss_weight']:g}, as it is of a run "
                    f"with {old['ibot.loss_weight']:g}: the mask token is there from the start of a run, or not at all"
                )
            self._load(path, state)
        return 0

    def _load(self, path: Path, state: dict[str, Any]) -> None:
        whole = self.parts.keys() & state.keys()
        if self.sharded:
            load_shards(path, self.parts["student"], self.parts["teacher"], self.parts["optimizer"])
        for name in whole:
            self.parts[name].load_state_dict(state[name])

    def _check_architecture(self, path: Path, state: dict[str, Any]) -> None:
        architecture = self.parts["student"].backbone.architecture
        if differing := _differing(state["architecture"], architecture):
            raise ValueError(f"{path} is of another architecture: {differing}; use its settings or another --out")

    def _check_same(self, path: Path, state: dict[str, Any], may_change: Sequence[str]) -> None:
        if state["images"] != self.data["images"]:
            raise ValueError(
                f"{path} is of a run on {state['images']:,} images, and {self.source} has {self.data['images']:,}; "
                "give the same images, or another --out"
            )
        if other := [name for name, value in self.data.items() if name not in SAID and state[name] != value]:
            raise ValueError(f"{path} is of a run with other {other[0]} than {self.source} has; give another --out")
        old, new = LATER | flat(state["settings"]), flat(plain(self.settings))
        if old["precision"] == "auto":  # as runs of earlier versions left it
            old["precision"] = new["precision"]
        groups = (*FREE_GROUPS, *(name for name in may_change if name.endswith(".")))
        fixed = {k: v for k, v in new.items() if k not in (*FREE, *may_change) and not k.startswith(groups)}
        if differing := _differing(old, fixed):
            raise ValueError(f"{path} is of a run with other settings: {differing}; use its own, or another --out")

    def open(self, start: int, images: str, network: nn.Module, more: str = "") -> None:
        """Write the settings, begin the log, and say what is about to happen.

        Args:
            start: the step to go on from; images: those to train on, in words.
            network: whose parameters are counted; more: at the end of the line about the machine.
        """
        settings, written = self.settings, plain(self.settings)
        for number in (signal.SIGTERM, signal.SIGUSR1):  # which schedulers send before they end a job
            signal.signal(number, self._note_signal)
        for number in (signal.SIGINT, signal.SIGHUP):  # ignored in the background and under nohup
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note_signal)
        if self.first_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = lock_folder(self.folder)
            for folder in (self.folder, self.folder / "checkpoints", self.folder / "pictures"):
                for unfinished in folder.glob(".*.*.[0-9]*"):  # of a process that was killed while it wrote
                    unfinished.unlink()
            write_text(self.folder / "settings.yaml", yaml.safe_dump(written, sort_keys=False))
        self.start = self.done = start
        steps = self.schedule.steps
        self.log = RunLog(self.folder, written, start, steps, active=self.first_process, tracker=settings.log_to)
        parameters = sum(p.numel() for p in network.parameters())
        millions = f"{parameters / 1e6:.1f} M" if parameters >= 1e5 else f"{parameters:,}"
        kind = "residual" if settings.model.residual else "skipless"
        self.say(
            f"{images}; {kind} ViT, {millions} parameters; {steps:,} steps of {settings.batch_size} images"
            + (f", from step {start:,}" if start else "")
        )
        processes = distributed.world_size()
        precision = describe(self.device, settings.precision == "bf16")
        layer = next(module for module in network.modules() if isinstance(module, Attention))
        dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        channels = layer.qkv.in_features // layer.num_heads
        attention = choose_backend(self.device, settings.model.attention, dtype, channels)[1]
        self.say(
            f"{processes} process{'es' if processes > 1 else ''} on {self.device}; {precision}; "
            f"attention: {attention}{more}"
        )
        self.say(*self.remarks, *self.log.remarks)

    def _note_signal(self, number: int, _frame: Any) -> None:
        if number == self.signaled == signal.SIGINT:  # whoever presses Ctrl-C twice does not want to wait
            raise KeyboardInterrupt
        self.signaled = number

    # While it trains --------------------------------------------------------------------------------------------------

    def interrupted(self) -> bool:
        """Count a step, and tell whether any process was asked to end."""
        self.done += 1
        self.log.advance()
        self.ended_by = int(distributed.all_reduce_max(torch.tensor(float(self.signaled))).item())
        return self.ended_by > 0

    def saving_where_data_ends(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; where one process fails to get its next, all save what is done, and end.

        Raises:
            ValueError: in this process, or in another.
        """
        while True:
            failure = None
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (OSError, ValueError) as error:
                failure = cli.sentence(error)
            if distributed.any_process(failure is not None):
                reason = failure or "another process cannot read its images"
                if self.done == self.start:
                    raise ValueError(reason)
                self.save(self.done)
                raise ValueError(f"{reason}; step {self.done} is saved: go on with --resume")
            yield batch

    def save_due(self, step: int) -> bool:
        """Whether a checkpoint is due after so many steps."""
        return step == self.schedule.steps or self._ends_epochs(step, self.settings.save_every_epochs)

    def measure_due(self, step: int, every_epochs: int, metric: str | None) -> bool:
        """Whether something is to be measured after so many steps: every so many epochs and at the end, unless the run
        that is resumed has logged this metric of it."""
        due = step == self.schedule.steps or self._ends_epochs(step, every_epochs)
        return due and metric is not None and not self.has(step, metric)

    def has(self, step: int, metric: str) -> bool:
        """Whether the run that is resumed has logged this metric at this step."""
        return distributed.any_process(self.log.has(step, metric))

    def _ends_epochs(self, step: int, epochs: int) -> bool:
        return step % (self.schedule.steps_per_epoch * max(1, epochs)) == 0

    def log_step(self, step: int, values: Mapping[str, float], text: str) -> None:
        """Write a line of metrics.

        Args:
            values: by name, `loss` and all that `Meter.read` gives besides among them.
            text: the line on the screen, before the speed.

        Raises:
            ValueError: loss or gradient are not finite.
        """
        if not math.isfinite(values["loss"]) or not math.isfinite(values["gradient_norm"]):
            raise ValueError(
                f"stopped at step {step}: the loss is {values['loss']:g} and the gradient's norm "
                f"{values['gradient_norm']:g}; lower the learning rate (--optimizer.lr) or clip gradients harder "
                "(--clip_grad); the last checkpoint is from before"
            )
        self.log_values(step, values)
        utilization = values.get("model_flops_utilisation")
        self.log.progress(
            step,
            f"{text}, {rate(values['images_per_second'])} images/s, data {100 * values['data_share']:.0f} %, "
            f"{values['memory_gb']:.1f} GB"
            + (f", {100 * utilization:.0f} % of peak FLOPs" if utilization is not None else ""),
        )
        self._name_trouble(step, values)

    def _name_trouble(self, step: int, values: Mapping[str, float]) -> None:
        """Say what has left the usual, and spare the checkpoint from before until it has come back."""
        doubtful = self.watch.doubtful
        found = self.watch(values["loss"], values["gradient_norm_max"])
        if self.watch.doubtful != doubtful:
            self.spared = None if doubtful else self.saved
        kept = f" The checkpoint of step {self.spared}, from before, is kept." if self.spared is not None else ""
        for trouble in found:
            self.say(
                f"WARNING at step {step}: {trouble}. If it does not come back, start again with a lower learning rate "
                f"(--optimizer.lr) or harder clipping (--clip_grad).{kept}"
            )

    def log_values(
        self,
        step: int,
        values: Mapping[str, Any],
        text: str | None = None,
        pictures: Mapping[str, np.ndarray] = MappingProxyType({}),
    ) -> None:
        """Write metrics, if there are any: numbers, and lists with one number a block. Say `text` with the epoch before
        it. Pictures by name are uint8 [H, W, 3]."""
        epoch = step / self.schedule.steps_per_epoch
        if values:
            self.log.metrics(step, epoch, dict(values))
        self.log.pictures(step, pictures)
        if text:
            self.say(f"epoch {epoch:g}: {text}")
            if step < self.schedule.steps:
                self.say(*verdict(read_metrics(self.folder / "metrics.jsonl")))

    def say(self, *lines: str) -> None:
        """Lines for people, from the first process."""
        for line in lines:
            self.log.say(line)

    # What it leaves ---------------------------------------------------------------------------------------------------

    @property
    def seconds(self) -> float:
        """Since its start, with those before it was resumed."""
        return self.seconds_before + time.perf_counter() - self.began

    def save(self, step: int) -> None:
        """Write a checkpoint.

        Raises:
            ValueError: weights are not finite; nothing is written.
            OSError: the disk refuses it; says what the last checkpoint is.
        """
        self._check_finite(step)
        if not (self.first_process or self.sharded):
            return
        state = {
            "step": step,
            "seconds": self.seconds,
            "spared": self.spared,
            **{name: part.state_dict() for name, part in self.parts.items()},
            "architecture": self.parts["student"].backbone.architecture,
            "settings": plain(self.settings),
            **self.data,
        }
        write = save_shards if self.sharded else save_checkpoint
        with self._saying_what_is_left(step):
            write(self.folder / "checkpoints", step, state, self.settings.keep)
        self.saved = step

    @contextmanager
    def _saying_what_is_left(self, step: int) -> Iterator[None]:
        checkpoints = self.folder / "checkpoints"
        try:
            yield
        except OSError as error:
            shutil.rmtree(checkpoints / f".step-{step}", ignore_errors=True)
            raise OSError(f"stopped at step {step}: {error}; {last_in_words(checkpoints)}") from None

    def _close(self) -> None:
        self.log.close()
        if self.first_process:
            self.lock.close()

    def _check_finite(self, step: int) -> None:
        """The loss and the gradient were finite before the update; its result may not be."""
        tensors = [t for part in self.parts.values() if isinstance(part, nn.Module) for t in part.state_dict().values()]
        parts = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
        finite = torch.stack([part.isfinite().all() for part in parts]).all()
        if distributed.any_process(not finite.item()):
            raise ValueError(
                f"stopped at step {step}: weights are NaN or infinite after the update, and were not saved; lower the "
                "learning rate (--optimizer.lr), or clip gradients harder (--clip_grad); the last checkpoint is from "
                "before"
            )

    def stop(self, step: int) -> NoReturn:
        """End an interrupted run."""
        self.say(f"interrupted after step {step}: checkpoint written; continue with --resume")
        self._close()
        raise cli.Interrupted(self.ended_by)

    def finish(
        self, backbone: VisionTransformer, name: str, about: dict[str, Any], remarks: Sequence[str] = ()
    ) -> Path:
        """Write backbone.safetensors and backbone.json, with `about` in it; the run's folder."""
        if self.first_process:
            facts = {
                **about,
                "step": self.schedule.steps,
                "seconds": round(self.seconds, 1),
                "processes": distributed.world_size(),
                **provenance(self.device),
                "settings": plain(self.settings),
            }
            with self._saying_what_is_left(self.schedule.steps):
                export_backbone(self.folder, backbone, facts)
        remarks = [*remarks, *verdict(read_metrics(self.folder / "metrics.jsonl"))]
        self.say(*remarks, f"done: {name} is {self.folder / 'backbone.safetensors'}")
        self._close()
        return self.folder


def _differing(there: dict[str, Any], here: dict[str, Any]) -> str:
    """The entries of `here` that are others than those there, in words."""
    differing = [name for name, value in here.items() if there.get(name) != value]
    return ", ".join(f"{name} is {there.get(name)!r} there and {here[name]!r} here" for name in differing)
