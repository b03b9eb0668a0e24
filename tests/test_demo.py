"""The demo's last part: what it measures can be opened."""

from pathlib import Path
from typing import Any

from helpers import ROOT, call, load

from skipless.datasets.labels.videos import davis
from skipless.datasets.scenes import main
from skipless.eval.dense.data import open_split
from skipless.eval.objects.data import open_data


def test_the_page_measures_the_demos_scenes(tmp_path: Path) -> None:
    call(main, ["--out", tmp_path / "scenes", "--train=2", "--val=2", "--size=32"])
    demo: Any = load(ROOT / "examples" / "demo.py")
    asked: list[Any] = []
    demo.make_report = asked.append
    demo.make_page(tmp_path, tmp_path / "run")
    (settings,) = asked
    assert settings.ckpt == (str(tmp_path / "untrained"), str(tmp_path / "run"))
    assert len(open_split(settings.segmentation, settings.segmentation.split)) == 2
    boxes, _ = open_data(settings.discovery)
    assert len(boxes) == 2
    assert len(davis(settings.video.root)) == 4
