"""Run commands of skipless one after the other on the null GPU: python commands.py COMMANDS.json DONE.json

A wait for the device within a step of training is an error, from the setting of its learning rate until the question
whether the run is interrupted: outside lie log lines, checkpoints and the monitor. So is it in a command's first steps,
but not in soap's very first, which waits for its eigenbases, nor in that of a compiled run, which tries its kernels.
"""

import contextlib
import importlib
import io
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nullgpu
import torch

from skipless.eval import metrics
from skipless.eval.dense import outcome
from skipless.eval.dense.outcome import Outcome, Tally
from skipless.ssl import distill, pretrain, supervised
from skipless.ssl.run.run import Run

_steps = 0  # that may still wait
_step: dict[str, int] = {}  # what the GPU had done when a step began, and then for that step


def refuse_waits() -> None:
    """Make waits within steps errors."""

    def begin(set_rates: Callable[..., None]) -> Callable[..., None]:
        def began(*arguments: Any, **more: Any) -> None:
            global _steps
            set_rates(*arguments, **more)
            torch.cuda.set_sync_debug_mode("default" if _steps > 0 else "error")
            _steps -= 1
            _step.update(nullgpu.counts())

        return began

    def ended(run: Run) -> bool:
        torch.cuda.set_sync_debug_mode("default")
        _step.update({name: count - _step[name] for name, count in nullgpu.counts().items()})
        return interrupted(run)

    interrupted, Run.interrupted = Run.interrupted, ended  # type: ignore[method-assign]
    for module in (distill, pretrain, supervised):
        module.set_rates = begin(module.set_rates)


def score_segmentation() -> None:
    """Count what is done between the first prediction and the last, and let every class be predicted as every other:
    kernels that do nothing leave what lay there, which may be no class at all."""

    def begun(tally: Tally, *arguments: Any) -> None:
        begin(tally, *arguments)
        _step.update(nullgpu.counts())

    def ended(tally: Tally) -> Outcome:
        _step.update({name: count - _step[name] for name, count in nullgpu.counts().items()})
        return end(tally)

    def every_pair(pairs: torch.Tensor) -> torch.Tensor:
        return torch.ones(pairs.shape, dtype=torch.int64)[..., :-1, :-1]

    for module in (metrics, outcome):
        module.known_pairs = every_pair  # type: ignore[attr-defined]
    begin, end = Tally.__init__, Tally.outcome
    Tally.__init__, Tally.outcome = begun, ended  # type: ignore[method-assign]


def run(module: str, words: list[str]) -> dict[str, Any]:
    """A command's exit code, what it printed, and what the GPU had to do for it and for its last step."""
    global _steps
    compiled = module.endswith("pretrain") and "--compile=false" not in words
    _steps = 2 if "WORLD_SIZE" in os.environ else int("--optimizer.name=soap" in words or compiled)
    printed, status = io.StringIO(), 0
    nullgpu.reset()
    _step.clear()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            importlib.import_module(module).main(words)
    except SystemExit as ending:
        status = int(ending.code or 0)
    except BaseException:
        printed.write(traceback.format_exc())
        status = 1
    torch.cuda.set_sync_debug_mode("default")
    return {
        "status": status,
        "printed": printed.getvalue(),
        **nullgpu.counts(),
        "step": dict(_step),
        "tf32": torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32,
    }


def main(commands: Path, done: Path) -> None:
    """Write what each command did as soon as it has ended."""
    refuse_waits()
    score_segmentation()
    results: dict[str, Any] = {}
    for name, (module, *words) in json.loads(commands.read_text()).items():
        results[name] = run(module, words)
        done.write_text(json.dumps(results))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
