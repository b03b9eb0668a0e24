"""What all evaluations do alike: flags, results that are kept, blocks one by one, several processes, errors."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import Evaluation, run_group
from PIL import Image

from skipless.common.precision import has_bf16
from skipless.eval.backbones import load_backbone

CLASSES = ["--data.name=arrays", "--size=32"]
DENSE = ["--data.name=voc12", "--size=64"]
# Flags that make each of them a matter of a second.
FLAGS = {
    "knn": [*CLASSES, "--k=[5,3]"],
    "linear": [*CLASSES, "--epochs=20", "--images-per-step=13"],
    "segmentation": [
        "--data.name=voc12", "--protocol=quick", "--quick.size=64", "--quick.epochs=5", "--quick.images_per_step=4",
    ],
    "retrieval": [*DENSE, "--data.train_split=train", "--k=5"],
    "clustering": [*DENSE, "--seeds=2"],
}  # fmt: skip


Evaluations = Callable[[str], Evaluation]


@pytest.fixture
def evaluation_of(
    color_classes: Path, tiny_run: Path, tiny_voc: Path, tiny_ckpt: Path, cache: Path, request: pytest.FixtureRequest
) -> Evaluations:
    def make(task: str) -> Evaluation:
        data, weights = (color_classes, tiny_run) if task in ("knn", "linear") else (tiny_voc, tiny_ckpt)
        words = [f"--ckpt={weights}", f"--data.root={data}", f"--cache={cache}", "--device=cpu"]
        return Evaluation(importlib.import_module(f"skipless.eval.{task}"), [*words, *FLAGS[task]], request)

    return make


@pytest.fixture(params=list(FLAGS))
def evaluation(request: pytest.FixtureRequest, evaluation_of: Evaluations) -> Evaluation:
    return evaluation_of(request.param)


@pytest.fixture
def knn(evaluation_of: Evaluations) -> Evaluation:
    return evaluation_of("knn")


def test_result_table_and_pictures(evaluation: Evaluation, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task, dense = evaluation.task, "--data.name=voc12" in evaluation.words
    result = evaluation.written(tmp_path / "out", "--seed=7", "--batch-size=3", "--workers=1")
    files = {f"{task}.json", f"{task}.md"} | ({f"{task}.png"} if dense else set())
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    assert (result["task"], result["split"], result["images"]) == (task, "val", 4 if dense else 9)
    assert result["metric"] == ("mIoU" if dense else "top-1")
    assert (result["seed"], result["processes"], result["settings"]["batch_size"]) == (7, 1, 3)
    checkpoint = result["checkpoint"]
    assert checkpoint["path"] == evaluation.words[0].removeprefix("--ckpt=")
    assert checkpoint["sha256"] == load_backbone(checkpoint["path"]).sha256
    assert {"seconds", "hardware", "versions", "commit"} <= set(result)
    table = (tmp_path / "out" / f"{task}.md").read_text()
    assert f"**{result['protocol']}** {100 * result['value']:.1f} " in table
    assert table.strip() in capsys.readouterr().out
    if dense:
        with Image.open(tmp_path / "out" / f"{task}.png") as sheet:
            sheet.load()
            assert min(sheet.size) > 200


def test_every_block_gives_what_each_block_gives_alone(evaluation: Evaluation, tmp_path: Path) -> None:
    together = evaluation.written(tmp_path / "together", "--every-block")
    entries = together["details"]["every_block"]
    assert [entry["block"] for entry in entries] == [1, 2]
    assert together["details"]["blocks"] == [2]
    for entry in entries:
        alone = evaluation.written(tmp_path / str(entry["block"]), f"--blocks={entry['block']}")
        assert alone["details"]["blocks"] == [entry["block"]]
        assert alone["value"] == pytest.approx(entry.get("miou", entry.get("top1")), abs=1e-9)
    assert together["value"] == pytest.approx(alone["value"], abs=1e-9)


def test_other_results_are_kept_and_the_same_is_made_again(evaluation: Evaluation, tmp_path: Path) -> None:
    first = evaluation.written(tmp_path / "out", "--blocks=1,2")
    file = tmp_path / "out" / f"{evaluation.task}.json"
    before = file.read_bytes()
    for changed in ("--seed=1", "--blocks=1"):
        line = evaluation.refused("--out", file.parent, "--blocks=1,2", changed)
        assert f"holds another result ({first['protocol']} of {first['checkpoint']['path']})" in line
        assert f"differs in {changed[2:].partition('=')[0]}: give another --out" in line
    assert file.read_bytes() == before
    # A result of the first version: of before a setting existed, with the others in another order.
    old = {**first, "settings": dict(reversed(first["settings"].items()))}
    del old["settings"]["precision"], old["precision"]
    file.write_text(json.dumps(old))
    again = evaluation.written(file.parent, "--blocks=1,2", "--batch-size=3", "--workers=1")
    assert again["value"] == pytest.approx(first["value"], abs=2e-3)


def test_two_processes_are_as_good_as_one(evaluation: Evaluation, tmp_path: Path) -> None:
    cache = f"--cache={tmp_path / 'cache'}"
    run_group(f"skipless.eval.{evaluation.task}", [*evaluation.words, cache, f"--out={tmp_path / 'two'}"])
    two = json.loads((tmp_path / "two" / f"{evaluation.task}.json").read_text())
    one = evaluation.written(tmp_path / "one")
    assert (two["processes"], one["processes"]) == (2, 1)
    assert two["value"] == pytest.approx(one["value"], abs=2e-3)
    for name in {"pixel_accuracy", "by_k", "held_out_top1", "learning_rate"} & {*one["details"]}:
        assert two["details"][name] == pytest.approx(one["details"][name], abs=2e-3)


def test_untrained_weights_are_others(knn: Evaluation, tiny_run: Path, tmp_path: Path) -> None:
    result = knn.written(tmp_path, "--untrained", "--seed=3")
    assert result["checkpoint"]["path"] == f"untrained twin of {tiny_run}"
    assert result["checkpoint"]["sha256"] != load_backbone(tiny_run).sha256


@pytest.mark.skipif(not has_bf16(torch.device("cpu")), reason="bf16 would be fp32 here")
def test_the_precision_is_part_of_a_result(knn: Evaluation, tmp_path: Path) -> None:
    exact = knn.written(tmp_path / "out")
    assert exact["settings"]["precision"] == exact["precision"] == "fp32"
    line = knn.refused("--out", tmp_path / "out", "--precision=bf16")
    assert "which differs in precision: give another --out" in line
    low = knn.written(tmp_path / "low", "--precision=bf16")
    assert (low["settings"]["precision"], low["precision"]) == ("bf16", "fp32, products of linear layers in bf16")
    assert low["protocol"] == exact["protocol"] + "/bf16"


def test_wrong_values_of_shared_flags_end_with_one_sentence(evaluation: Evaluation, tmp_path: Path) -> None:
    for flags, *expected in (
        (["--ckpt=/nowhere/vit.pth"], "/nowhere/vit.pth", "no such checkpoint"),
        (["--data.root=/nowhere"], "/nowhere", "no such f"),
        (["--data.name=imagenet"], "data.name", "imagenet"),
        (["--workers=-1"], "workers and seed 0 or more"),
        (["--seed=-1"], "workers and seed 0 or more"),
        (["--batch-size=0"], "batch-size must be 1 or more"),
        (["--blocks=3"], "block 3 does not exist", "1 to 2"),
        (["--blocks=first"], "'first'", "last4"),
        (["--blocks=1,2,1"], "names a block twice"),
        (["--blocks=1", "--every-block"], "every-block", "leave out blocks"),
        (["--device=tpu"], "device is 'tpu'"),
        (["--sise=3"], "sise"),
    ):
        places = [f"--cache={tmp_path / 'cache'}", f"--out={tmp_path / 'out'}"]
        line = evaluation.refused(*places, *flags)
        assert all(words in line for words in expected), line
    assert not list(tmp_path.iterdir())


BAD = [
    ("knn", "--data.name=folder --data.split=tset", "tset: no such split", "holds train, val"),
    ("knn", "--data.split=tset", "tset.npz: no such file"),
    ("knn", "--data.name=cifar10", "CIFAR-10's Python version is not there"),
    ("knn", "--data.name=huggingface", "datasets cannot load this"),
    ("knn", "--k=[31]", "k is 31, and", "train has 30 images", "--k 20"),
    ("knn", "--k=[]", "k and size must be 1 or more"),
    ("knn", "--k=[5,0]", "k and size must be 1 or more"),
    ("knn", "--size=0", "k and size must be 1 or more"),
    ("knn", "--temperature=0", "temperature above 0"),
    ("knn", "--temperature=.nan", "temperature above 0"),
    ("knn", "--pool=max", "pool", "max"),
    ("linear", "--data.name=folder --data.train_split=trian", "trian: no such split", "holds train, val"),
    ("linear", "--protocol=dinov2", "protocol", "dinov2"),
    ("linear", "--epochs=0", "epochs, images-per-step and size must be 1 or more"),
    ("linear", "--images-per-step=0", "epochs, images-per-step and size must be 1 or more"),
    ("linear", "--learning-rates=[]", "learning-rates must be above 0"),
    ("linear", "--learning-rates=[0.1,0]", "learning-rates must be above 0"),
    ("linear", "--learning-rates=[0.1,.nan]", "learning-rates must be above 0"),
    ("linear", "--learning-rates=[.inf]", "learning-rates must be above 0"),
    ("segmentation", "--data.root=/nowhere/VOCdevkit", "/nowhere/VOCdevkit", "no such folder"),
    ("segmentation", "--data.root={empty}", "{empty}", "holds no PASCAL VOC 2012"),
    ("segmentation", "--data.split=tset", "tset.txt", "train, val"),
    ("segmentation", "--protocol=mmsg", "protocol", "mmsg", "neco"),
    ("segmentation", "--blocks=0", "block 0 does not exist"),
    ("segmentation", "--quick.sise=64", "sise"),
    ("segmentation", "--quick.size=0", "quick.size"),
    ("segmentation", "--training.inference.stride=999", "training.inference.stride is 999"),
    ("segmentation", "--training.head.dropout=0.1", "training.head.dropout has no effect on the protocol quick"),
    ("retrieval", "--data.split=tset", "tset.txt", "train, val"),
    ("retrieval", "--data.train_split=trainaug", "trainaug needs SBD's masks"),
    ("retrieval", "--k=0", "k 1 to 2048"),
    ("retrieval", "--k=4096", "k 1 to 2048"),
    ("retrieval", "--temperature=0", "temperature above 0"),
    ("retrieval", "--temperature=.inf", "temperature above 0"),
    ("retrieval", "--size=0", "size and memory-size must be 1 or more"),
    ("retrieval", "--memory-size=5", "memory-size is 5", "each of 12 images"),
    ("retrieval", "--index=hnsw", "index", "hnsw", "ivf"),
    ("clustering", "--data.split=tset", "tset.txt", "lists that are there: train, val"),
    ("clustering", "--clusters=2", "clusters is 2, fewer than the 21 classes of voc12"),
    ("clustering", "--clusters=257", "clusters is 257", "voc12 val has 256 patches of 64 pixels"),
    ("clustering", "--seeds=0", "size and seeds must be 1 or more"),
    ("clustering", "--data.train_split=train", "train_split"),
]


@pytest.mark.parametrize("case", BAD, ids=" ".join)
def test_wrong_values_of_own_flags_end_with_one_sentence(
    case: tuple[str, ...], evaluation_of: Evaluations, tmp_path: Path
) -> None:
    task, flags, *expected = case
    (tmp_path / "empty").mkdir()
    evaluation, empty = evaluation_of(task), tmp_path / "empty"
    places = [f"--cache={tmp_path / 'cache'}", f"--out={tmp_path / 'out'}"]
    line = evaluation.refused(*places, *flags.format(empty=empty).split(" "))
    assert all(part.format(empty=empty) in line for part in expected), line
    assert list(tmp_path.iterdir()) == [empty]


@pytest.mark.parametrize(("task", "flags"), [("retrieval", ["--index=ivf"]), ("clustering", [])])
def test_without_faiss_a_sentence_says_what_to_install(
    task: str, flags: list[str], evaluation_of: Evaluations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before features are computed."""
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert "pip install faiss-cpu" in evaluation_of(task).refused("--cache", tmp_path / "cache", *flags)
    assert not list(tmp_path.iterdir())


WORDS = {
    "knn": ["exp(similarity / 0.07)", "train/CLASS/*.jpg", "save_to_disk", "20 10"],
    "linear": ["python eval/linear.py --protocol dino", "never on those", "0.001 0.01", "head.pt", "held out"],
}


@pytest.mark.parametrize("task", list(FLAGS))
def test_help_says_what_is_wanted_first(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"skipless.eval.{task}").main(["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    usage, _, flags = text.partition("options:")
    assert f"python eval/{task}.py" in usage
    places = [flags.index(flag) for flag in ("--ckpt CKPT", "--out OUT", "--seed SEED")]
    assert places == sorted(places)
    for words in WORDS.get(task, ()):
        assert words in text
