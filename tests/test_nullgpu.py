"""The commands on a GPU that does nothing (tests/nullgpu/build.py): torch's CUDA code runs, figures mean nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import NullGPU, logged

TINY = [
    "--device=cuda", "--batch_size=8", "--epochs=2", "--log_every=3", "--model.dim=64", "--model.depth=2",
    "--model.heads=1", "--model.patch=8", "--optimizer.warmup_epochs=1", "--data.workers=0",
]  # fmt: skip
CROPS = ["--crops.global_crops_size=32", "--crops.local_crops_size=16", "--crops.local_crops_number=2"]
# The monitor's eigenvalues would be checked for convergence, against memory as it happens to be.
DINO = [*TINY, *CROPS, "--monitor.every_epochs=0", "--dino.out_dim=32", "--dino.freeze_last_layer=1"]
# Of bf16, so that attention is what it is in a training run.
RUNS = {
    "adamw": ["--optimizer.name=adamw", "--accumulate=2"],
    "soap": ["--optimizer.name=soap", "--crops.device=cpu"],
    "muon": ["--optimizer.name=muon", "--model.residual=true", "--dino.balancing=sinkhorn"],
    "sdpa, fp32": ["--model.attention=sdpa", "--precision=fp32"],
}
FAST = ["--device=cuda", "--workers=0"]
# Those of dense features check their predictions, which a kernel that does nothing leaves as memory happens to be.
EVALUATIONS = {
    "knn": ["--data.name=arrays", "--size=32", "--k=[5,3]"],
    "linear": ["--data.name=arrays", "--size=32", "--epochs=2", "--images-per-step=13"],
}


def pretraining(photos: Path, out: Path, *more: str) -> list[str]:
    return ["skipless.ssl.pretrain", f"--data.path={photos}", f"--out={out}", *DINO, *more]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("null")


@pytest.fixture(scope="module")
def alone(null_gpu: NullGPU, folder: Path, photos: Path, color_classes: Path, tiny_run: Path) -> dict[str, Any]:
    """What every command of one process did; they run one after the other in the same one."""
    commands = {name: pretraining(photos, folder / name, *more) for name, more in RUNS.items()}
    supervised = [f"--data.root={color_classes}", "--data.name=arrays", "--augmentation.size=16", *TINY]
    commands["supervised"] = ["skipless.ssl.supervised", f"--out={folder / 'supervised'}", *supervised]
    for task, more in EVALUATIONS.items():
        where = [f"--ckpt={tiny_run}", f"--data.root={color_classes}", f"--out={folder / task}"]
        where += [f"--cache={folder / 'cache'}"]
        commands[task] = [f"skipless.eval.{task}", *where, *FAST, *more]
    return null_gpu.run(commands, folder)[0]


@pytest.mark.parametrize("name", [*RUNS, "supervised"])
def test_training_on_one_gpu_never_waits_within_a_step(name: str, alone: dict[str, Any], folder: Path) -> None:
    done = alone[name]
    assert done["status"] == 0, done["printed"]
    assert done["kernels"] > 500
    assert done["products"] > 50
    assert logged(folder / name, "loss")
    assert (folder / name / "backbone.safetensors").exists()


@pytest.mark.parametrize("task", list(EVALUATIONS))
def test_evaluations_end_with_a_figure(task: str, alone: dict[str, Any], folder: Path) -> None:
    done = alone[task]
    assert done["status"] == 0, done["printed"]
    assert done["kernels"] > 5
    assert 0 <= json.loads((folder / task / f"{task}.json").read_text())["value"] <= 1


@pytest.mark.parametrize("way", ["ddp", "shard"])
def test_two_gpus(way: str, null_gpu: NullGPU, folder: Path, photos: Path) -> None:
    more = ["--optimizer.name=soap", *(["--shard=true"] if way == "shard" else [])]
    for done in null_gpu.run({way: pretraining(photos, folder / way, *more)}, folder, processes=2):
        assert done[way]["status"] == 0, done[way]["printed"]
        assert done[way]["collectives"] > 10
    assert logged(folder / way, "loss")
    assert (folder / way / "backbone.safetensors").exists()
