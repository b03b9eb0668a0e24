"""Everything that only a GPU can show, in one command: correctness against float64 first, then speed, then whole runs.

    python benchmarks/gpu.py --images VOC2012/JPEGImages --out results/speed/gpu
    python benchmarks/gpu.py --parts "[correctness,attention]" --out results/speed/gpu

1. `correctness`: attention by every backend that works here, in bf16, against float64, forward and backward, residual
   and skipless. `tests`: those of the step, the loss, SOAP, the crops and precision, of which some need a GPU.
2. The other benchmarks, each leaving its own result beside this one's: attention; the training step of ViT-S/16 and
   ViT-B/16 against DINO's written plainly, packed and compiled, with AdamW and SOAP; its profile; SOAP alone.
3. Whole runs (whole_run.py) on synthetic scenes in bf16, interrupted and resumed: as they are, compiled, with
   accumulation and checkpointed activations, and sharded over one process with AdamW and with SOAP.
4. With --images, a folder of JPEGs: the loader; and ViT-S/16's training on them, whose images a second are to be
   compared with the step's alone.
5. Segmentation (quick) and object discovery (LOST, TokenCut) with the trained backbone, on the GPU and on the CPU: the
   figures must agree; segmentation in bf16; segmentation by mmseg with a short schedule.

Every part is a process of its own with at most --minutes. One that fails, hangs or breaks the device costs itself
alone. OUT.json and OUT.md are written after every part. The same command again goes on: parts that ended well are not
repeated. What the parts printed, the scenes and the runs are in --work. The speed of TokenCut on a GPU is measured by
benchmarks/discovery.py --device cuda.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from measuring import markdown, on_device

from skipless.common import cli
from skipless.common.files import write_result
from skipless.common.provenance import provenance

ROOT = Path(__file__).resolve().parent.parent
SAME = ("hardware", "versions", "commit")  # for all parts of one result


@dataclass
class Settings:
    """Everything that only a GPU can show."""

    out: Path = Path("results/speed/gpu")
    """OUT.json and OUT.md, and others that begin so."""
    work: Path = Path("build/gpu")
    """Folder of scenes, runs and what the parts print; keep it until all parts are done."""
    images: Path | None = None
    """A folder of JPEGs, of some 500 x 375 pixels."""
    parts: list[str] | None = None
    """Which; by default all."""
    minutes: float = 9.0
    """Of each part at most."""
    trial: bool = False
    """Everything as small as it goes, only to see that it runs."""


class Part(NamedTuple):
    """A script of the repository with its flags, and the JSON that it leaves."""

    words: list[Any]
    report: Path | None = None


def all_parts(settings: Settings) -> dict[str, Part]:
    """By name, in their order."""
    out, work = settings.out.resolve(), settings.work.resolve()
    trial, scenes = settings.trial, work / "scenes"
    recipe = "--recipe=configs/demo.yaml" if trial else "--recipe=configs/vits16_skipless_soap.yaml"
    names = ("step", "dino", "soap", "device_crops", "precision")
    tests = [
        path for name in names[: 1 if trial else None] for path in sorted((ROOT / "tests").rglob(f"test_{name}.py"))
    ]
    parts = {"correctness": Part(["benchmarks/correctness.py"]), "tests": Part(["-P", "-m", "pytest", "-q", *tests])}

    short = ["--rounds=1"] * trial
    parts["attention"] = Part(["benchmarks/attention.py", "--batch=2" if trial else "--batch=64", *short])
    for size, batch in (("small", 128), ("base", 64)):
        for optimizer in ("adamw", "soap"):
            sizes = [f"--batch_size={batch}", f"--size={size}"]
            sizes = ["--batch_size=2", "--steps=1", *short] if trial else sizes
            step = ["benchmarks/train_step.py", recipe, *sizes, f"--optimizers=[{optimizer}]"]
            checked = (size, optimizer) == ("small", "adamw")
            parts[f"train_step_{size}_{optimizer}"] = Part([*step, *([] if checked and not trial else ["--check=1"])])
    parts["profile"] = Part(["benchmarks/step_profile.py", recipe, f"--batch_size={2 if trial else 128}", *short])
    parts["soap"] = Part(["benchmarks/soap.py", f"--model={'tiny' if trial else 'small'}", *short])

    size = ["--train=40", "--val=20"] if trial else ["--train=2000", "--val=400"]
    parts["scenes"] = Part(["datasets/scenes.py", f"--out={scenes}", *size])
    runs = {
        "run": ["--compile=false"],
        "compiled": ["--compile=true"],
        "pieces": ["--compile=false", "--accumulate=2", "--model.checkpoint_activations=true"],
        "sharded_adamw": ["--shard=true", "--optimizer.name=adamw"],
        "sharded_soap": ["--shard=true", "--optimizer.name=soap"],
    }
    for name, more in runs.items():
        more = [*more, "--epochs=2", "--dino.freeze_last_layer=1", "--optimizer.warmup_epochs=1"] if trial else more
        words = ["benchmarks/whole_run.py", f"--data={scenes / 'train'}", f"--run={work / name}", f"--flags={more}"]
        parts[name] = Part([*words, f"--launch={str('--shard=true' in more).lower()}"])
    for name, part in parts.items():
        if part.words[0].startswith("benchmarks"):
            parts[name] = Part([*part.words, "--device=cuda", f"--out={out}_{name}"], Path(f"{out}_{name}.json"))
    return parts | (_of_images(settings, out, work) if settings.images else {}) | _evaluations(work, scenes, trial)


def _of_images(settings: Settings, out: Path, work: Path) -> dict[str, Part]:
    assert settings.images is not None
    images, report = settings.images.resolve(), partial("{}_{}".format, out)
    loader = [
        "benchmarks/loader.py",
        f"--images={images}",
        "--workers=14",
        "--device=cuda",
        f"--out={report('loader')}",
    ]
    parts = {"loader": Part(loader, Path(report("loader") + ".json"))}
    for crops in ("auto", "device"):
        name = f"images_{crops}"
        flags = ["--batch_size=128", "--epochs=4", "--optimizer.warmup_epochs=1", "--log_every=10"]
        flags += ["--monitor.every_epochs=0", f"--crops.device={crops}"]
        words = ["benchmarks/whole_run.py", "--recipe=configs/vits16_skipless_soap.yaml", "--interrupt=false"]
        words += [f"--data={images}", f"--run={work / name}", f"--flags={flags}", "--device=cuda"]
        parts[name] = Part([*words, f"--out={report(name)}"], Path(report(name) + ".json"))
    return parts


def _evaluations(work: Path, scenes: Path, trial: bool) -> dict[str, Part]:
    quick = ["eval/segmentation.py", "--protocol=quick", f"--quick.size={32 if trial else 128}"]
    commands: dict[str, list[str]] = {}
    for device in ("cuda", "cpu"):
        cached = [*quick, f"--cache={work / 'cache' / device}", f"--device={device}"]
        commands[f"quick_{device}"] = cached
        if device == "cuda":
            commands["quick_bf16"] = [*cached, "--precision=bf16"]
        for method in ("lost", "tokencut"):
            commands[f"{method}_{device}"] = ["eval/discovery.py", f"--method={method}", f"--device={device}"]
    length = ["--training.optimizer.iterations=20" if trial else "--training.optimizer.iterations=300"]
    commands["mmseg"] = ["eval/segmentation.py", *length, "--training.optimizer.warmup=10", "--device=cuda"]
    where = [f"--ckpt={work / 'run'}", "--data.name=scenes", f"--data.root={scenes}"]
    return {
        name: Part([*words, *where, f"--out={work / name}"], work / name / f"{Path(words[0]).stem}.json")
        for name, words in commands.items()
    }


def run_part(part: Part, log: Path, minutes: float) -> dict[str, Any]:
    """Run a part in a group of processes of its own, of which none is left. Its exit code (None: out of time), its
    seconds, the last lines of what it printed where it failed, and the figure of an evaluation."""
    began = time.perf_counter()
    with log.open("w") as printed:
        process = subprocess.Popen(
            [sys.executable, *map(str, part.words)], cwd=ROOT, stdout=printed, stderr=printed, start_new_session=True
        )
        try:
            code: int | None = process.wait(60 * minutes)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    done: dict[str, Any] = {"exit_code": code, "seconds": time.perf_counter() - began}
    if code != 0:
        return done | {"printed": log.read_text(errors="replace").splitlines()[-15:]}
    if part.report is not None:
        written = json.loads(part.report.read_text())
        done |= {key: written[key] for key in ("metric", "value") if key in written}
    return done


def measure(settings: Settings) -> None:
    """All parts that were asked for and are not done yet, one after the other.

    Raises:
        ValueError: no such part; OUT.json is of another machine or commit.
    """
    on_device("cuda")
    parts = all_parts(settings)
    unknown = [name for name in settings.parts or [] if name not in parts]
    if unknown:
        raise ValueError(f"parts has {unknown[0]}, which is none of {', '.join(parts)}")
    about = provenance("cuda")
    file = Path(f"{settings.out}.json")
    result: dict[str, Any] = {"task": "cuda", "trial": settings.trial, **about, "parts": {}}
    if file.exists():
        result = json.loads(file.read_text())
        other = [key for key in SAME if result.get(key) != about[key]]
        if other:
            raise ValueError(f"{file} is of another {other[0]}: give another --out, or delete it to begin anew")
    settings.work.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part's processes end too
    for name, part in parts.items():
        if (settings.parts is not None and name not in settings.parts) or _ended_well(result, name):
            continue
        print(f"{name}: python {' '.join(map(str, part.words))}", flush=True)
        result["parts"][name] = done = run_part(part, settings.work / f"{name}.log", settings.minutes)
        rows = [{"part": key, **_row(value)} for key, value in result["parts"].items()]
        lines = [f"On {about['hardware']}, commit {about['commit']}.", "", *markdown(rows), ""]
        write_result(settings.out, result, "\n".join(lines))
        print(json.dumps(done, indent=1), flush=True)


def _ended_well(result: dict[str, Any], name: str) -> bool:
    return result["parts"].get(name, {}).get("exit_code") == 0


def _row(done: dict[str, Any]) -> dict[str, Any]:
    ended = {0: "well", None: "out of time"}.get(done["exit_code"], f"status {done['exit_code']}")
    return {"ended": ended, "seconds": done["seconds"], "metric": done.get("metric", ""), "value": done.get("value")}


main = partial(cli.run, measure, Settings, __doc__)

if __name__ == "__main__":
    main()
