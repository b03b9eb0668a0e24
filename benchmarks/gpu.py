"""Everything that only a GPU can show, in one command: correctness against float64 first, then speed, then a whole run.

    python benchmarks/gpu.py --out results/gpu.json

1. Attention through xformers and through SDPA, in bf16, against float64, forward and backward, residual and skipless.
2. Images per second, model FLOPs utilisation and memory of a ViT-S/16 training step (2 x 224 + 8 x 96 pixels,
   K = 65,536), data on the device; backends interleaved, medians of seven.
3. `ssl/pretrain.py` on synthetic scenes in bf16: trains, is monitored, is interrupted and resumed.
4. Segmentation (quick) and object discovery (LOST, TokenCut) with the trained backbone, on the GPU and on the CPU: the
   figures must agree; segmentation by mmseg with a short schedule, on the GPU.

The speed of TokenCut on a GPU is measured by benchmarks/discovery.py --device cuda.
"""

import argparse
import copy
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skipless.datasets.scenes import write_scenes
from skipless.ssl.attention import Backend, choose_backend
from skipless.ssl.checkpoints import write_text
from skipless.ssl.dino import DINOHead, DINOLoss, DINOModel, make_teacher, update_teacher
from skipless.ssl.initialization import PRESETS, skipless_init_
from skipless.ssl.meter import peak_flops
from skipless.ssl.optimizers import OptimizerSettings, make_optimizer
from skipless.ssl.provenance import provenance
from skipless.ssl.vit import VisionTransformer, vit_small

ROOT = Path(__file__).resolve().parent.parent


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
        found = torch.cat([t.flatten() for t in model(images)])
    (found.double() * weights).mean().backward()
    exact_gradient, gradient = (m.blocks[0].attn.qkv.weight.grad.double() for m in (reference, model))
    return {
        "tokens": ((found - exact).norm() / exact.norm()).item(),
        "gradient": ((gradient - exact_gradient).norm() / exact_gradient.norm()).item(),
    }


class Step:
    """One training step on random crops, for timing."""

    def __init__(self, residual: bool, backend: Backend, optimizer: str, batch: int):
        backbone = make(residual)
        backbone.attention = backend
        self.student = DINOModel(backbone, DINOHead(backbone.dim, 65536)).cuda()
        self.teacher = make_teacher(self.student)
        self.objective = DINOLoss(65536).cuda()
        self.optimizer = make_optimizer(self.student, OptimizerSettings(name=optimizer))  # type: ignore[arg-type]
        self.crops, self.batch = crops(batch), batch
        views = 2 * backbone.flops(224, 224)
        self.flops = batch * (views + 3 * (views + 8 * backbone.flops(96, 96)))

    def __call__(self) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            with torch.no_grad():
                targets = self.teacher(self.crops[:1])
            result = self.objective(self.student(self.crops), targets, 10, 0.04)
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 3.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.objective.update_centre()
        update_teacher(self.teacher, self.student, 0.996)


def time_steps(batch: int, rounds: int = 7, steps: int = 10) -> list[dict[str, Any]]:
    """Each combination of model, backend and optimizer; interleaved, so that all see the same state of the machine."""
    peak = peak_flops(torch.device("cuda"))
    backends: list[Backend] = ["sdpa"]
    if choose_backend("cuda")[0] == "xformers":
        backends.append("xformers")
    cases = [(r, b, o) for r in (True, False) for b in backends for o in ("adamw", "soap")]
    built = {case: Step(*case, batch) for case in cases}
    seconds: dict[tuple, list[float]] = {case: [] for case in cases}
    memory: dict[tuple, float] = {}
    for round_number in range(rounds + 1):
        for case, step in built.items():
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(steps):
                step()
            torch.cuda.synchronize()
            if round_number:  # the first round warms up
                seconds[case].append((time.perf_counter() - began) / steps)
                memory[case] = torch.cuda.max_memory_allocated() / 2**30
    rows = []
    for residual, backend, optimizer in cases:
        median = statistics.median(seconds[residual, backend, optimizer])
        flops = built[residual, backend, optimizer].flops
        rows.append(
            {
                "model": "residual" if residual else "skipless",
                "attention": backend,
                "optimizer": optimizer,
                "images_per_second": batch / median,
                "model_flops_utilisation": flops / median / peak if peak else None,
                "peak_allocated_gb_with_all_cases_resident": memory[residual, backend, optimizer],
            }
        )
    return rows


def whole_run(folder: Path) -> dict[str, Any]:
    """Pretrain on scenes, interrupt by SIGUSR1, resume to the end; the monitor's accuracy and the time."""
    write_scenes(folder / "scenes", train=2000, val=400, size=128)
    command = [
        sys.executable, ROOT / "ssl" / "pretrain.py", "--config", ROOT / "configs" / "demo.yaml",
        "--data.path", folder / "scenes" / "train", "--out", folder / "run", "--device=cuda", "--resume",
    ]  # fmt: skip
    began = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)))
    while process.poll() is None and not list((folder / "run" / "checkpoints").glob("step-*.pt")):
        time.sleep(0.2)
    process.send_signal(signal.SIGUSR1)
    first = process.wait()
    second = subprocess.run(list(map(str, command))).returncode
    entries = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    knn = [entry["monitor/knn"][-1] for entry in entries if "monitor/knn" in entry]
    speed = [entry["images_per_second"] for entry in entries if "loss" in entry]
    return {
        "exit_codes": [first, second],
        "knn_untrained": knn[0],
        "knn_trained": knn[-1],
        "images_per_second": statistics.median(speed),
        "seconds": time.perf_counter() - began,
    }


def evaluations(folder: Path) -> dict[str, Any]:
    """Figure and seconds of evaluations of the run in `folder`, by name."""
    short = ["--training.optimizer.iterations=300", "--training.optimizer.warmup=10", "--workers=8"]
    commands: dict[str, list[str]] = {}
    for device in ("cuda", "cpu"):
        quick = ["segmentation.py", "--protocol=quick", "--quick.size=128", f"--cache={folder / 'cache' / device}"]
        commands[f"segmentation quick, {device}"] = [*quick, f"--device={device}"]
        for method in ("lost", "tokencut"):
            commands[f"{method}, {device}"] = ["discovery.py", f"--method={method}", f"--device={device}"]
    commands["segmentation mmseg, 300 steps, cuda"] = ["segmentation.py", *short, "--device=cuda"]
    found = {}
    for name, (script, *flags) in commands.items():
        out = folder / name.replace(" ", "-").replace(",", "")
        data = ["--data.name=scenes", f"--data.root={folder / 'scenes'}"]
        command = [
            sys.executable,
            str(ROOT / "eval" / script),
            f"--ckpt={folder / 'run'}",
            *data,
            f"--out={out}",
            *flags,
        ]
        status = subprocess.run(command).returncode
        if status:
            found[name] = {"exit_code": status}
            continue
        result = json.loads((out / script.replace(".py", ".json")).read_text())
        found[name] = {key: result[key] for key in ("protocol", "metric", "value", "seconds")}
    return found


def main() -> None:
    """Command line: see the docstring of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/gpu.json"), help="Result file.")
    parser.add_argument("--batch", type=int, default=64, help="Images per training step (default: 64).")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: torch finds no CUDA here; this benchmark needs a GPU", file=sys.stderr)
        sys.exit(2)
    backends: list[Backend] = ["sdpa"]
    if choose_backend("cuda")[0] == "xformers":
        backends.append("xformers")
    result: dict[str, Any] = {"task": "cuda", **provenance("cuda"), "attention": choose_backend("cuda")[1]}
    result["relative_errors"] = {
        f"{'residual' if residual else 'skipless'}, {backend}": check_backend(residual, backend)
        for residual in (True, False)
        for backend in backends
    }
    print(json.dumps(result, indent=1), flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    result["steps"] = time_steps(arguments.batch)
    print(json.dumps(result["steps"], indent=1), flush=True)
    write_text(arguments.out, json.dumps(result, indent=1) + "\n")
    with tempfile.TemporaryDirectory() as folder:
        result["whole_run"] = whole_run(Path(folder))
        print(json.dumps(result["whole_run"], indent=1), flush=True)
        write_text(arguments.out, json.dumps(result, indent=1) + "\n")
        result["evaluations"] = evaluations(Path(folder))
    print(json.dumps(result["evaluations"], indent=1))
    write_text(arguments.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
