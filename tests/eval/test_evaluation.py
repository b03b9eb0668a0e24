"""What all evaluations do alike: flags, results that are kept, blocks one by one, several processes, errors."""

import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import refusal, run_group

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


@dataclass
class Evaluation:
    """A command and the words it needs."""

    task: str
    words: list[str]

    @property
    def main(self) -> Callable[[list[str]], None]:
        return importlib.import_module(f"skipless.eval.{self.task}").main

    def run(self, out: Path, *more: object) -> dict[str, Any]:
        """The result, from its file; without anything that JSON lacks."""
        self.main([*self.words, f"--out={out}", *map(str, more)])

        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is not JSON")

        return json.loads((out / f"{self.task}.json").read_text(), parse_constant=refuse)


@pytest.fixture(params=list(FLAGS))
def evaluation(
    request: pytest.FixtureRequest, color_classes: Path, tiny_run: Path, tiny_voc: Path, tiny_ckpt: Path, cache: Path
) -> Evaluation:
    return make_evaluation(request.param, color_classes, tiny_run, tiny_voc, tiny_ckpt, cache)


def make_evaluation(task: str, classes: Path, run: Path, voc: Path, ckpt: Path, cache: Path) -> Evaluation:
    data, weights = (classes, run) if task in ("knn", "linear") else (voc, ckpt)
    words = [f"--ckpt={weights}", f"--data.root={data}", f"--cache={cache}", "--device=cpu"]
    return Evaluation(task, [*words, *FLAGS[task]])


@pytest.fixture
def knn(color_classes: Path, tiny_run: Path, cache: Path) -> Evaluation:
    return make_evaluation("knn", color_classes, tiny_run, color_classes, tiny_run, cache)


def test_every_block_gives_what_each_block_gives_alone(evaluation: Evaluation, tmp_path: Path) -> None:
    together = evaluation.run(tmp_path / "together", "--every-block")
    entries = together["details"]["every_block"]
    assert [entry["block"] for entry in entries] == [1, 2]
    assert together["details"]["blocks"] == [2]
    for entry in entries:
        alone = evaluation.run(tmp_path / str(entry["block"]), f"--blocks={entry['block']}")
        assert alone["details"]["blocks"] == [entry["block"]]
        assert alone["value"] == pytest.approx(entry.get("miou", entry.get("top1")), abs=1e-9)
    assert together["value"] == pytest.approx(alone["value"], abs=1e-9)


def test_other_results_are_kept_and_the_same_is_made_again(
    evaluation: Evaluation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = evaluation.run(tmp_path / "out", "--blocks=1,2")
    file = tmp_path / "out" / f"{evaluation.task}.json"
    before = file.read_bytes()
    for changed in ("--seed=1", "--blocks=1"):
        line = refusal(evaluation.main, [*evaluation.words, f"--out={file.parent}", "--blocks=1,2", changed], capsys)
        assert f"holds another result ({first['protocol']} of {first['checkpoint']['path']})" in line
        assert f"differs in {changed[2:].partition('=')[0]}: give another --out" in line
    assert file.read_bytes() == before
    # A result of the first version: of before a setting existed, with the others in another order.
    old = {**first, "settings": dict(reversed(first["settings"].items()))}
    del old["settings"]["precision"], old["precision"]
    file.write_text(json.dumps(old))
    again = evaluation.run(file.parent, "--blocks=1,2", "--batch-size=3", "--workers=1")
    assert again["value"] == pytest.approx(first["value"], abs=2e-3)


def test_two_processes_are_as_good_as_one(evaluation: Evaluation, tmp_path: Path) -> None:
    cache = f"--cache={tmp_path / 'cache'}"
    run_group(f"skipless.eval.{evaluation.task}", [*evaluation.words, cache, f"--out={tmp_path / 'two'}"])
    two = json.loads((tmp_path / "two" / f"{evaluation.task}.json").read_text())
    one = evaluation.run(tmp_path / "one")
    assert (two["processes"], one["processes"]) == (2, 1)
    assert two["value"] == pytest.approx(one["value"], abs=2e-3)
    for name in {"pixel_accuracy", "by_k", "held_out_top1", "learning_rate"} & {*one["details"]}:
        assert two["details"][name] == pytest.approx(one["details"][name], abs=2e-3)


def test_untrained_weights_are_others(knn: Evaluation, tiny_run: Path, tmp_path: Path) -> None:
    result = knn.run(tmp_path, "--untrained", "--seed=3")
    assert result["checkpoint"]["path"] == f"untrained twin of {tiny_run}"
    assert result["checkpoint"]["sha256"] != load_backbone(tiny_run).sha256


@pytest.mark.skipif(not has_bf16(torch.device("cpu")), reason="bf16 would be fp32 here")
def test_the_precision_is_part_of_a_result(knn: Evaluation, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exact = knn.run(tmp_path / "out")
    assert exact["settings"]["precision"] == exact["precision"] == "fp32"
    line = refusal(knn.main, [*knn.words, f"--out={tmp_path / 'out'}", "--precision=bf16"], capsys)
    assert "which differs in precision: give another --out" in line
    low = knn.run(tmp_path / "low", "--precision=bf16")
    assert (low["settings"]["precision"], low["precision"]) == ("bf16", "fp32, products of linear layers in bf16")
    assert low["protocol"] == exact["protocol"] + "/bf16"


def test_wrong_values_of_shared_flags_end_with_one_sentence(
    evaluation: Evaluation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
        line = refusal(evaluation.main, [*evaluation.words, *places, *flags], capsys)
        assert all(words in line for words in expected), line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("task", ["knn", "retrieval", "clustering"])
def test_without_faiss_a_sentence_says_what_to_install(
    task: str, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before features are computed."""
    monkeypatch.setitem(sys.modules, "faiss", None)
    evaluation = make_evaluation(task, tmp_path, tiny_run, tmp_path, tiny_run, tmp_path / "cache")
    assert "pip install faiss-cpu" in refusal(evaluation.main, evaluation.words, capsys)
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
