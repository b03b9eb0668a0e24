"""The commands on a GPU that does nothing (tests/nullgpu/build.py): torch's CUDA code runs, figures mean nothing."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import NullGPU, logged
from PIL import Image

from skipless.datasets.synthetic.moving import write_moving_scenes

TINY = [
    "--device=cuda", "--batch_size=8", "--epochs=2", "--log_every=3", "--model.dim=64", "--model.depth=2",
    "--model.heads=1", "--model.patch=8", "--optimizer.warmup_epochs=1", "--data.workers=0",
]  # fmt: skip
CROPS = ["--crops.global_crops_size=32", "--crops.local_crops_size=16", "--crops.local_crops_number=2"]
# The monitor's eigenvalues would be checked for convergence, against memory as it happens to be.
DINO = [*TINY, *CROPS, "--monitor.every_epochs=0", "--dino.out_dim=32", "--dino.freeze_last_layer=1"]
EAGER = "--compile=false"  # compiling takes as long as all of these together
HAS_XFORMERS = importlib.util.find_spec("xformers") is not None
# Of bf16, so that attention is what it is in a training run: xformers where it is installed.
RUNS = {
    "adamw": ["--optimizer.name=adamw", "--accumulate=2"],
    "soap": ["--optimizer.name=soap", "--crops.device=cpu"],
    "muon": ["--optimizer.name=muon", "--model.residual=true", "--dino.balancing=sinkhorn"],
    "varlen": ["--model.attention=varlen"],
    "sdpa, fp32": ["--model.attention=sdpa", "--precision=fp32"],
}
# As many blocks, views and images as the recipes have on a GPU; their sizes do not change how much is launched.
RECIPE = [
    "--device=cuda", "--batch_size=128", "--epochs=2", "--data.workers=0", "--model.dim=96", "--model.depth=12",
    "--model.heads=3", "--optimizer.name=adamw", "--optimizer.warmup_epochs=1", "--dino.out_dim=64",
    "--dino.hidden_dim=64", "--dino.freeze_last_layer=1", "--monitor.every_epochs=0", "--crops.device=device", EAGER,
]  # fmt: skip
CLASSES = ["--data.name=arrays", "--size=32"]
DENSE = ["--data.name=voc12", "--size=64"]
EVALUATIONS = {
    "knn": [*CLASSES, "--k=[5,3]"],
    "linear": [*CLASSES, "--epochs=2", "--images-per-step=13"],
    "segmentation": [*DENSE[:1], "--protocol=quick", "--quick.size=64", "--quick.epochs=2"],
    "retrieval": [*DENSE, "--data.train_split=train", "--k=5"],
    "clustering": [*DENSE, "--seeds=2"],
    "discovery": ["--data.name=folder", "--method=tokencut"],
    "video": ["--size=64"],
    "depth": ["--data.name=depth", "--size=32", "--head.epochs=1"],
}


def pretraining(photos: Path, out: Path, *more: str) -> list[str]:
    return ["skipless.ssl.pretrain", f"--data.path={photos}", f"--out={out}", *DINO, *more]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("null")


@pytest.fixture(scope="module")
def alone(
    null_gpu: NullGPU, folder: Path, photos: Path, color_classes: Path, tiny_run: Path, tiny_voc: Path, tiny_ckpt: Path
) -> dict[str, Any]:
    """What every command of one process did; they run one after the other in the same one."""
    commands = {name: pretraining(photos, folder / name, EAGER, *more) for name, more in RUNS.items()}
    compiled = pretraining(photos, folder / "compiled", *RUNS["adamw"])
    commands |= {"compiled": compiled, "goes on": [*compiled, EAGER, "--resume=true"]}
    supervised = [f"--data.root={color_classes}", "--data.name=arrays", "--augmentation.size=16", *TINY]
    commands["supervised"] = ["skipless.ssl.supervised", f"--out={folder / 'supervised'}", *supervised]
    many = folder / "many"
    many.mkdir()
    for i in range(128):
        Image.new("RGB", (32, 32), (i, 2 * i, 255 - i)).save(many / f"{i}.bmp")
    for name, more in {"recipe": [], "ibot": ["--ibot.loss_weight=1", "--dino.koleo_loss_weight=0.1"]}.items():
        commands[name] = ["skipless.ssl.pretrain", f"--data.path={many}", f"--out={folder / name}", *RECIPE, *more]
    distillation = [f"--data.path={photos}", f"--teacher.ckpt={tiny_run}", "--views.size=32"]
    commands["distill"] = ["skipless.ssl.distill", f"--out={folder / 'distill'}", *distillation, *TINY]
    commands["distill"] += ["--monitor.every_epochs=0", "--optimizer.name=soap"]
    data = dict.fromkeys(EVALUATIONS, tiny_voc) | {"knn": color_classes, "linear": color_classes, "discovery": photos}
    data |= {"video": folder / "videos", "depth": folder / "rooms"}
    write_moving_scenes(data["video"], videos=1, frames=4, size=64)
    for place in ("images", "depth"):
        (data["depth"] / place).mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (40, 32), (60 * i, 99, 99)).save(data["depth"] / f"images/{i}.png")
        np.save(data["depth"] / f"depth/{i}.npy", np.full((32, 40), 1.0 + i))
    for task, more in EVALUATIONS.items():
        where = [f"--ckpt={tiny_ckpt}", f"--data.root={data[task]}", f"--out={folder / task}", *more]
        where += [] if task in ("discovery", "video") else [f"--cache={folder / 'cache'}"]
        commands[task] = [f"skipless.eval.{task}", "--device=cuda", "--workers=0", *where]
    commands["pca"] = ["skipless.eval.pca", f"--ckpt={tiny_ckpt}", f"--images={photos}", "--size=64", "--device=cuda"]
    commands["pca"] += [f"--out={folder / 'pca.png'}"]
    return null_gpu.run(commands, folder)[0]


@pytest.mark.parametrize("name", [*RUNS, "supervised", "distill"])
def test_training_on_one_gpu_never_waits_within_a_step(name: str, alone: dict[str, Any], folder: Path) -> None:
    done = alone[name]
    assert done["status"] == 0, done["printed"]
    assert done["kernels"] > 500
    assert done["products"] > 50
    assert done["step"]["waits"] == 0
    assert logged(folder / name, "loss")
    assert (folder / name / "backbone.safetensors").exists()


def test_a_step_launches_no_more_than_it_may(alone: dict[str, Any]) -> None:
    assert alone["recipe"]["status"] == 0, alone["recipe"]["printed"]
    step = alone["recipe"]["step"]
    assert 100 < step["aside"] <= 1200  # crops, on a stream of their own
    assert 500 < step["kernels"] - step["aside"] + step["products"] <= 900
    assert step["memsets"] + step["on_device"] + step["to_device"] <= 200


def test_masked_patches_cost_at_most_half_of_the_step_again(alone: dict[str, Any]) -> None:
    assert alone["ibot"]["status"] == 0, alone["ibot"]["printed"]
    steps = {name: alone[name]["step"] for name in ("recipe", "ibot")}
    assert steps["ibot"]["waits"] == 0
    launches = {name: step["kernels"] - step["aside"] + step["products"] for name, step in steps.items()}
    assert launches["recipe"] < launches["ibot"] <= 1.5 * launches["recipe"]


def test_training_is_compiled_by_default_and_goes_on_without(alone: dict[str, Any], folder: Path) -> None:
    compiled = alone["compiled"]
    assert compiled["status"] == 0, compiled["printed"]
    assert "not compiled" not in compiled["printed"]
    assert "attention: torch's varlen attention" in compiled["printed"]
    launches = {
        name: alone[name]["step"]["kernels"] + alone[name]["step"]["products"] for name in ("compiled", "adamw")
    }
    assert 200 < launches["compiled"] <= min(560, 0.8 * launches["adamw"])  # two micro-batches through two blocks
    assert compiled["step"]["waits"] == 0
    assert alone["goes on"]["status"] == 0, alone["goes on"]["printed"]
    paths = (folder / name / "checkpoints/last.pt" for name in ("compiled", "adamw"))
    ours, eager = (torch.load(path, map_location="cpu", weights_only=True) for path in paths)
    for part in ("student", "teacher", "objective"):
        assert ours[part].keys() == eager[part].keys()


def test_the_log_says_which_attention_runs_and_why(alone: dict[str, Any]) -> None:
    packed = "one call for all crop sizes"
    chosen = (
        f"xformers, {packed}; " if HAS_XFORMERS else f"torch's varlen attention, {packed}: xformers is not installed"
    )
    assert f"attention: {chosen}" in alone["adamw"]["printed"]
    assert f"attention: torch's varlen attention, {packed}; " in alone["varlen"]["printed"]


def test_attention_is_chosen_by_trying(null_gpu: NullGPU, folder: Path) -> None:
    if not HAS_XFORMERS:
        pytest.skip("xformers is not installed: pip install -c constraints.txt xformers nvidia-cuda-runtime-cu12")
    done = null_gpu.run({"backends": ["backends", str(folder / "chosen.json")]}, folder)[0]["backends"]
    assert done["status"] == 0, done["printed"]
    chosen = json.loads((folder / "chosen.json").read_text())
    assert chosen["no runtime"][0] == "varlen"
    assert "xformers does not load (libcudart.so.12" in chosen["no runtime"][1]
    assert chosen["bf16"] == ["xformers", "xformers, one call for all crop sizes"]
    for name, kind, channels in (("bf16, 20", "bfloat16", 20), ("fp64", "float64", 64)):
        assert chosen[name][0] == "sdpa"
        refused = f"does not take {kind} with {channels} channels a head on compute capability 9.0"
        assert f"xformers {refused}" in chosen[name][1]
        assert f"torch's varlen attention {refused}" in chosen[name][1]


@pytest.mark.parametrize("task", [*EVALUATIONS, "pca"])
def test_evaluations_end_with_a_figure(task: str, alone: dict[str, Any], folder: Path) -> None:
    done = alone[task]
    assert done["status"] == 0, done["printed"]
    assert task == "clustering" or done["kernels"] > 5  # its features are those that segmentation has kept
    assert done["to_device"] > 5
    assert not done["tf32"]
    if task == "pca":
        assert (folder / "pca.png").exists()
        return
    value = json.loads((folder / task / f"{task}.json").read_text())["value"]
    assert value is None if task == "discovery" else 0 <= value <= 1


@pytest.mark.parametrize("task", ["segmentation", "retrieval"])
def test_predictions_are_scored_without_a_wait(task: str, alone: dict[str, Any]) -> None:
    assert alone[task]["step"]["kernels"] > 20
    assert alone[task]["step"]["waits"] == 0


@pytest.mark.parametrize("way", ["ddp", "shard", "compiled"])
def test_two_gpus(way: str, null_gpu: NullGPU, folder: Path, photos: Path) -> None:
    more = [EAGER, "--optimizer.name=soap", *(["--shard=true"] if way == "shard" else [])]
    if way == "compiled":  # the checks of soap's eigenvalues would see what compiling left in memory
        more = ["--optimizer.name=adamw", "--shard=true", "--compile=true"]
    folder = folder / "two"
    folder.mkdir(exist_ok=True)
    for done in null_gpu.run({way: pretraining(photos, folder / way, *more)}, folder, processes=2):
        assert done[way]["status"] == 0, done[way]["printed"]
        assert done[way]["collectives"] > 10
        assert "not compiled" not in done[way]["printed"]
    assert logged(folder / way, "loss")
    assert (folder / way / "backbone.safetensors").exists()


def test_an_error_ends_its_process_though_others_wait_and_waiting_is_gloos(null_gpu: NullGPU, folder: Path) -> None:
    done = [folder / f"ending.{rank}.json" for rank in range(2)]
    null_gpu.run_script(Path(__file__).parent / "nullgpu/site/ending.py", 2, 100, [], done)
    failed, left = (json.loads(path.read_text()) for path in done)
    assert (failed["status"], left["status"]) == (2, 2)
    for ended in (failed, left):
        assert ended["before"] > 0
        assert ended["after"] == ended["before"]
