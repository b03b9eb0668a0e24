"""Everything that only a GPU can show, in one command: correctness against float64 first, then speed, then whole runs.

    python benchmarks/gpu.py --images VOC2012/JPEGImages --out results/speed/gpu

1. Attention through xformers and through SDPA, in bf16, against float64, forward and backward, residual and skipless.
2. The tests of the step, the loss, SOAP and the crops, of which some need a GPU. `ssl/pretrain.py` on synthetic scenes
   in bf16, as it is, compiled, compiled with accumulation and checkpointed activations, and sharded over one process
   with AdamW and with SOAP: trains, is monitored, interrupted and resumed.
3. The other benchmarks with --device cuda, each leaving its own result beside this one's: the training step of ViT-S/16
   and ViT-B/16 against DINO's written plainly, packed and compiled, with AdamW and SOAP, and 200 steps of loss in
   float32; its profile; SOAP; attention.
4. With --images, a folder of JPEGs: the loader; and `ssl/pretrain.py` on them, compiled, whose images a second are to
   be compared with the step's alone.
5. Segmentation (quick) and object discovery (LOST, TokenCut) with the trained backbone, on the GPU and on the CPU: the
   figures must agree; segmentation in bf16; segmentation by mmseg with a short schedule, on the GPU.

OUT.json is written after every part, so that a time limit loses nothing but the part it falls in; --parts chooses some.
The speed of TokenCut on a GPU is measured by benchmarks/discovery.py --device cuda.
"""

import copy
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from measuring import on_device
from torch import Tensor

from skipless.common import cli
from skipless.common.files import write_text
from skipless.common.provenance import provenance
from skipless.datasets.synthetic.dataset import write_scenes
from skipless.ssl.model.attention import Backend, choose_backend
from skipless.ssl.model.initialization import PRESETS, skipless_init_
from skipless.ssl.model.vit import VisionTransformer, vit_small

ROOT = Path(__file__).resolve().parent.parent
Part = Literal["attention", "runs", "benchmarks", "images", "evaluations"]


@dataclass
class Settings:
    """Everything that only a GPU can show."""

    out: Path = Path("results/speed/gpu")
    """OUT.json, and others that begin so."""
    images: Path | None = None
    """A folder of JPEGs, of some 500 x 375 pixels."""
    parts: tuple[Part, ...] = ("attention", "runs", "benchmarks", "images", "evaluations")
    """Which."""


def run(script: str, *words: object) -> dict[str, Any]:
    """Run a script of the repository; its exit code and seconds."""
    began = time.perf_counter()
    code = subprocess.run([sys.executable, ROOT / script, *map(str, words)], cwd=ROOT).returncode
    return {"exit_code": code, "seconds": time.perf_counter() - began}


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def make(residual: bool) -> VisionTransformer:
    """A ViT-S/16 on the GPU, initialized for what it is."""
    torch.manual_seed(0)
    model = vit_small(residual=residual)
    return (model if residual else skipless_init_(model, **PRESETS["paper-dino"])).cuda()  # type: ignore[return-value]


def crops(batch: int) -> list[Tensor]:
    """Random global and local crops of `batch` images, on the GPU."""
    torch.manual_seed(1)
    return [torch.randn(2 * batch, 3, 224, 224).cuda(), torch.randn(8 * batch, 3, 96, 96).cuda()]


def check_backend(residual: bool, backend: Backend) -> dict[str, float]:
    """Relative error of tokens and of the gradient of the first block's qkv, against float64 SDPA."""
    reference = copy.deepcopy(make(residual)).double()
    reference.attention = "sdpa"
    model = make(residual)
    model.attention = backend
    images = crops(2)
    exact = torch.cat([t.flatten() for t in reference([c.double() for c in images])])
    weights = torch.randn_like(exact)
    (exact * weights).mean().backward()
    with torch.autocast("cuda", torch.bfloat16):
        computed = torch.cat([t.flatten() for t in model(images)])
    (computed.double() * weights).mean().backward()
    exact_gradient, gradient = (m.blocks[0].attn.qkv.weight.grad.double() for m in (reference, model))
    return {
        "tokens": ((computed - exact).norm() / exact.norm()).item(),
        "gradient": ((gradient - exact_gradient).norm() / exact_gradient.norm()).item(),
    }


def attention() -> dict[str, Any]:
    """Relative errors of every backend, residual and skipless."""
    backends: list[Backend] = ["sdpa"]
    if choose_backend("cuda")[0] == "xformers":
        backends.append("xformers")
    kinds = {"residual": True, "skipless": False}
    return {f"{kind}, {b}": check_backend(residual, b) for kind, residual in kinds.items() for b in backends}


def benchmarks(out: Path) -> dict[str, Any]:
    """Exit codes and seconds of the other benchmarks, whose results lie beside `out`."""
    recipe = "--recipe=configs/vits16_skipless_soap.yaml"
    commands = {
        "train_step_vits16": ["train_step.py", recipe, "--batch_size=128"],
        "train_step_vitb16": ["train_step.py", recipe, "--size=base", "--batch_size=64", "--check=0"],
        "profile_vits16": ["step_profile.py", recipe, "--batch_size=128"],
        "soap_vits16": ["soap.py", "--model=small"],
        "attention": ["attention.py", "--batch=64"],
    }
    return {
        name: run(f"benchmarks/{script}", *words, "--device=cuda", f"--out={out}_{name}")
        for name, (script, *words) in commands.items()
    }


def tests() -> dict[str, Any]:
    """Exit code of the tests that have parts for a GPU."""
    names = ("step", "dino", "soap", "device_crops", "precision")
    files = [path for name in names for path in (ROOT / "tests").rglob(f"test_{name}.py")]
    return {"exit_code": subprocess.run([sys.executable, "-P", "-m", "pytest", "-q", *files], cwd=ROOT).returncode}


def real_images(images: Path, out: Path, folder: Path) -> dict[str, Any]:
    """The loader alone, and images a second of ViT-S/16's training on a folder of JPEGs."""
    loader = run("benchmarks/loader.py", f"--images={images}", "--device=cuda", "--workers=16", f"--out={out}_loader")
    result: dict[str, Any] = {"loader": loader}
    for crops in ("auto", "device"):
        folder_of_run = folder / f"jpegs-{crops}"
        done = run(
            "ssl/pretrain.py", "--config", ROOT / "configs" / "vits16_skipless_soap.yaml", "--data.path", images,
            "--out", folder_of_run, "--device=cuda", "--batch_size=128", "--epochs=8", "--log_every=10",
            "--optimizer.warmup_epochs=1", "--monitor.every_epochs=0", "--compile=true", f"--crops.device={crops}",
        )  # fmt: skip
        entries = log_of(folder_of_run) if not done["exit_code"] else []
        steady = entries[len(entries) // 2 :]
        names = ("images_per_second", "data_share", "model_flops_utilisation")
        values = {name: [entry[name] for entry in steady if name in entry] for name in names}
        medians = {name: statistics.median(logged) for name, logged in values.items() if logged}
        result[f"pretraining, crops {crops}"] = {"exit_code": done["exit_code"], **medians}
    return result


def whole_run(folder: Path, name: str, more: Sequence[str] = (), launcher: Sequence[str] = ()) -> dict[str, Any]:
    """Pretrain on scenes, interrupt by SIGUSR1, resume to the end; the monitor's accuracy and the time."""
    if not (folder / "scenes").exists():
        write_scenes(folder / "scenes", train=2000, val=400, size=128)
    out = folder / name
    command = [
        sys.executable, *launcher, ROOT / "ssl" / "pretrain.py", "--config", ROOT / "configs" / "demo.yaml",
        "--data.path", folder / "scenes" / "train", "--out", out, "--device=cuda", "--resume", *more,
    ]  # fmt: skip
    began = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)))
    while process.poll() is None and not list((out / "checkpoints").glob("step-*.pt")):
        time.sleep(0.2)
    process.send_signal(signal.SIGUSR1)
    codes = [process.wait(), subprocess.run(list(map(str, command))).returncode]
    entries = log_of(out)
    knn = [entry["monitor/knn"][-1] for entry in entries if "monitor/knn" in entry]
    return {
        "exit_codes": codes,
        "knn_untrained": knn[0],
        "knn_trained": knn[-1],
        "images_per_second": statistics.median(e["images_per_second"] for e in entries if "loss" in e),
        "seconds": time.perf_counter() - began,
    }


def evaluations(folder: Path) -> dict[str, Any]:
    """Figure and seconds of evaluations of the run in `folder`, by name."""
    short = ["--training.optimizer.iterations=300", "--training.optimizer.warmup=10"]
    quick = ["segmentation", "--protocol=quick", "--quick.size=128"]
    commands: dict[str, list[str]] = {}
    for device in ("cuda", "cpu"):
        cached = [*quick, f"--cache={folder / 'cache' / device}", f"--device={device}"]
        commands[f"segmentation quick, {device}"] = cached
        if device == "cuda":
            commands["segmentation quick, cuda, bf16"] = [*cached, "--precision=bf16"]
        for method in ("lost", "tokencut"):
            commands[f"{method}, {device}"] = ["discovery", f"--method={method}", f"--device={device}"]
    commands["segmentation mmseg, 300 steps, cuda"] = ["segmentation", *short, "--device=cuda"]
    result = {}
    for name, (task, *flags) in commands.items():
        out = folder / name.replace(" ", "-").replace(",", "")
        words = [f"--ckpt={folder / 'run'}", "--data.name=scenes", f"--data.root={folder / 'scenes'}", f"--out={out}"]
        done = run(f"eval/{task}.py", *words, *flags)
        if done["exit_code"]:
            result[name] = done
            continue
        written = json.loads((out / f"{task}.json").read_text())
        result[name] = {key: written[key] for key in ("protocol", "metric", "value", "seconds")}
    return result


def measure(settings: Settings) -> None:
    """All parts that were asked for, one after the other."""
    on_device("cuda")
    result: dict[str, Any] = {"task": "cuda", **provenance("cuda"), "attention": choose_backend("cuda")[1]}
    out = settings.out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)

    def part(name: str, work: Callable[..., Any], *arguments: Any) -> None:
        try:
            result[name] = work(*arguments)
        except Exception as error:  # the other parts are worth having
            result[name] = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(result[name], indent=1), flush=True)
        write_text(Path(f"{out}.json"), json.dumps(result, indent=1) + "\n")

    parts = settings.parts
    if "attention" in parts:
        part("relative_errors", attention)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if {"runs", "evaluations"} & set(parts):
            part("whole_run", whole_run, folder, "run")
        if "runs" in parts:
            part("tests", tests)
            one = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
            pieces = ["--compile=true", "--accumulate=2", "--model.checkpoint_activations=true"]
            part("whole_run_compiled", whole_run, folder, "compiled", ["--compile=true"])
            part("whole_run_pieces", whole_run, folder, "pieces", pieces, one)
            for optimizer, run_name in (("adamw", "sharded"), ("soap", "sharded_soap")):
                flags = ["--shard=true", f"--optimizer.name={optimizer}"]
                part(f"whole_run_{run_name}", whole_run, folder, run_name, flags, one)
        if "benchmarks" in parts:
            part("benchmarks", benchmarks, out)
        if "images" in parts and settings.images:
            part("real_images", real_images, settings.images.resolve(), out, folder)
        if "evaluations" in parts:
            part("evaluations", evaluations, folder)


main = partial(cli.run, measure, Settings, __doc__)

if __name__ == "__main__":
    main()
