"""Vectors of a folder: the same in every kind of file, and those of the backbone."""

import csv
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import call, error_line, refusal

from skipless.common.pixels import center_crop
from skipless.datasets.images import open_images
from skipless.eval import embed
from skipless.eval.backbones import load_backbone


def expected(run: Path, images: Path) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Names and vectors, by the backbone itself; squares of 32 pixels out of a short side of 8/7 of that."""
    source, backbone = open_images(images), load_backbone(run)
    pictures = np.stack([center_crop(source.read(index), 32, 37) for index in range(len(source))])
    (last,) = backbone.features(backbone.normalize(pictures))
    return list(source.names), {"cls": last.cls, "mean": last.patches.mean((1, 2)), "patches": last.patches}


@pytest.mark.parametrize("ending", [".npz", ".parquet", ".csv"])
def test_vectors_of_a_folder(tiny_run: Path, photos: Path, tmp_path: Path, ending: str) -> None:
    names, vectors = expected(tiny_run, photos)
    out = tmp_path / f"vectors{ending}"
    words = [photos, "--ckpt", tiny_run, "--out", out, "--size", 35, "--cache", tmp_path / "cache"]
    kinds = ["cls", "mean"] if ending == ".csv" else ["mean", "patches", "cls"]
    done = call(embed.main, [*words, "--vectors", *kinds])
    assert done.returncode == 0, done.stderr
    if ending == ".npz":
        with np.load(out) as file:
            found = dict(file)
    elif ending == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
        found = {name: np.array(column) for name, column in parquet.read_table(out).to_pydict().items()}
        found["names"] = found.pop("name")
        found["patches"] = found["patches"].reshape(len(names), 4, 4, -1)
    else:
        with open(out, newline="") as text:
            head, *rows = csv.reader(text)
        assert head == ["name", *(f"{kind}_{channel}" for kind in kinds for channel in range(24))]
        values = np.array([row[1:] for row in rows], np.float32)
        found = {"names": np.array([row[0] for row in rows]), "cls": values[:, :24], "mean": values[:, 24:]}
    assert found.pop("names").tolist() == names
    assert found.keys() == {*kinds}
    for kind, array in found.items():
        torch.testing.assert_close(torch.from_numpy(array.astype(np.float32)), vectors[kind], atol=4e-3, rtol=0)
    assert "is there already" in error_line(call(embed.main, words).stderr)


def test_it_goes_on_where_it_was_interrupted(
    tiny_run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [photos, "--ckpt", tiny_run, "--size", 32, "--cache", tmp_path / "cache", "--vectors", "patches"]
    with monkeypatch.context() as patch:
        patch.setitem(embed.WRITERS, ".npz", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
        assert "the disk is full" in error_line(call(embed.main, [*words, "--out", tmp_path / "a.npz"]).stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    first, *_ = sorted((tmp_path / "cache").rglob("00000.npy"))
    before = first.stat().st_mtime_ns
    sorted((tmp_path / "cache").rglob("00001.npy"))[0].unlink()
    assert call(embed.main, [*words, "--out", tmp_path / "a.npz"]).returncode == 0
    assert first.stat().st_mtime_ns == before
    with np.load(tmp_path / "a.npz") as file:
        assert file["patches"].shape == (40, 4, 4, 24)


@pytest.mark.parametrize("ending", [".npz", ".csv"])
def test_unreadable_images_are_left_out_and_named(tiny_run: Path, photos: Path, tmp_path: Path, ending: str) -> None:
    names, vectors = expected(tiny_run, photos)
    shutil.copytree(photos, tmp_path / "photos")
    broken = [names[0], names[7], names[-1]]
    for name in broken:
        (tmp_path / "photos" / name).write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    words = [tmp_path / "photos", "--ckpt", tiny_run, "--size", 32, "--cache", tmp_path / "cache", "--vectors", "mean"]
    for out in (tmp_path / f"a{ending}", tmp_path / f"b{ending}"):  # the second out of the cache
        done = call(embed.main, [*words, "--out", out])
        assert done.returncode == 0, done.stderr
        assert "mean of 37 images" in done.stdout
        (line,) = [line for line in done.stdout.splitlines() if "left out" in line]
        assert line.startswith("3 of 40 images could not be read and are left out: ")
        assert all(f"{name}: " in line for name in broken)
        if ending == ".npz":
            with np.load(out) as file:
                found, values = file["names"].tolist(), file["mean"].astype(np.float32)
        else:
            _, *rows = csv.reader(out.read_text().splitlines())
            found, values = [row[0] for row in rows], np.array([row[1:] for row in rows], np.float32)
        kept = [index for index, name in enumerate(names) if name not in broken]
        assert found == [names[index] for index in kept]
        torch.testing.assert_close(torch.from_numpy(values), vectors["mean"][kept], atol=4e-3, rtol=0)
    for name in names:
        (tmp_path / "photos" / name).write_bytes(b"")
    refused = error_line(call(embed.main, [*words, "--out", tmp_path / f"c{ending}"]).stderr)
    assert "none of its 40 images can be read (" in refused
    assert names[0] in refused
    assert not (tmp_path / f"c{ending}").exists()


def test_refusals(
    tiny_run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*words: object) -> str:
        return refusal(embed.main, [photos, "--cache", tmp_path / "cache", *words], capsys)

    ckpt = ("--ckpt", tiny_run, "--out")
    assert refused("--out", "a.npz").startswith("--ckpt is missing")
    assert "must end in .npz, .csv, .parquet" in refused(*ckpt, "a.txt")
    assert "too many for .csv" in refused(*ckpt, "a.csv", "--vectors", "patches")
    assert "once" in refused(*ckpt, "a.csv", "--vectors", "cls", "cls")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in refused(*ckpt, "a.parquet")
    assert list(tmp_path.iterdir()) == []
