"""Tar shards: what is written, that others can read it, and that any image comes back, from disk and over a network."""

import io
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from helpers import ROOT, refusal, serving, write_archive
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from skipless.datasets.images import ImageSource, UnreadableImage, open_images
from skipless.datasets.labels.classes import class_folders
from skipless.datasets.shard import main, parse_size
from skipless.datasets.storage import packing, remote
from skipless.datasets.storage.names import Names
from skipless.datasets.storage.packing import write_shards
from skipless.datasets.storage.shards import INDEX, Shards, read_index, write_index
from skipless.datasets.storage.tar import scan_shards

LONG = "x" * 90 + "/" + "y" * 120


def save(path: Path, number: int, side: int = 6) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side + 2), (number, 255 - number, 7)).save(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes, with every kind of name that a tar or WebDataset could stumble over."""
    names = [
        "cat/1.jpg", "cat/1.png", "cat/1.5.jpg", "cat/1_5.jpg", "cat/deep.er/2.JPEG", "cat/é 3.webp", f"cat/{LONG}.bmp",
        "dog.s/a.jpg", "dog.s/b.jpg", "dog.s/b~1.png",
    ]  # fmt: skip
    for number, name in enumerate(names):
        save(tmp_path / "photos" / name, 20 * number)
    if sys.platform == "linux":
        os.rename(tmp_path / "photos/dog.s/b.jpg", os.fsencode(tmp_path / "photos/dog.s") + b"/caf\xe9.jpg")
    return tmp_path / "photos"


def pack(photos: Path, out: Path, **options: Any) -> ImageSource:
    write_shards(open_images(photos), out, **options)
    return open_images(out)


def assert_same(found: ImageSource, expected: ImageSource) -> None:
    assert list(found.names) == list(expected.names)
    assert found.classes == expected.classes
    assert np.array_equal(found.labels, expected.labels)
    for index in range(len(expected)):
        assert found.read_bytes(index) == expected.read_bytes(index)
        assert np.array_equal(found.read(index, 3), expected.read(index, 3))


def webdataset_samples(tars: list[Path]) -> list[dict[str, bytes]]:
    """Samples as the format's text has them, by Python's tarfile: neighbors of one key, path up to the first dot."""
    samples: list[dict[str, bytes]] = []
    for tar in tars:
        previous = None
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                matched = re.fullmatch(r"((?:.*/|)[^./][^./]*)\.([^/]*)", member.name)
                assert matched, member.name
                if matched[1] != previous:
                    previous = matched[1]
                    samples.append({"__key__": os.fsencode(matched[1])})
                assert matched[2] not in samples[-1]
                opened = archive.extractfile(member)
                samples[-1][matched[2]] = opened.read() if opened else b""
    return samples


def test_others_read_the_shards_as_webdataset(photos: Path, tmp_path: Path) -> None:
    source = open_images(photos)
    write_shards(source, tmp_path / "out", shard_size=4096)
    tars = sorted((tmp_path / "out").glob("*.tar"))
    assert len(tars) > 2
    samples = webdataset_samples(tars)
    assert len({sample["__key__"] for sample in samples}) == len(samples) == len(source)
    for sample, name, label in zip(samples, source.names, source.labels, strict=True):
        extension = {"jpeg": "jpg"}.get(kind := name.rpartition(".")[2].lower(), kind)
        assert sample[extension] == (photos / name).read_bytes()
        assert sample["cls"] == str(label).encode()
        assert len(sample) == 3
        assert os.fsdecode(sample["__key__"]).startswith(name.rpartition("/")[0] + "/")


def test_shards_read_as_the_folder_they_were_made_of(photos: Path, tmp_path: Path) -> None:
    for size in (1, 4096, 10**9):
        found = pack(photos, tmp_path / str(size), shard_size=size)
        assert_same(found, open_images(photos))
        assert_same(pickle.loads(pickle.dumps(found)), open_images(photos))
    assert len(list((tmp_path / "1").glob("*.tar"))) == len(found)


def test_labeled_sets_read_shards_as_they_read_class_folders(photos: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path / "packed")
    folder, packed = class_folders(tmp_path, "photos"), class_folders(tmp_path, "packed")
    assert (packed.labels.tolist(), packed.classes) == (folder.labels.tolist(), folder.classes)
    assert packed.identity is not None  # since its places are no files
    for index in range(len(folder)):
        assert np.array_equal(packed.read(index), folder.read(index))


def test_without_classes_there_are_no_labels(tmp_path: Path) -> None:
    save(tmp_path / "photos/a.jpg", 1)
    save(tmp_path / "photos/b/a.jpg", 2)
    found = pack(tmp_path / "photos", tmp_path / "out")
    assert (found.labels, found.classes) == (None, ())
    with tarfile.open(tmp_path / "out/shard-000000.tar") as archive:
        assert archive.getnames() == ["a.jpg", "b/a.jpg"]


def test_shards_without_their_index_hold_the_same_images(photos: Path, tmp_path: Path) -> None:
    indexed = pack(photos, tmp_path / "out", shard_size=4096)
    (tmp_path / "out" / INDEX).unlink()
    found = open_images(tmp_path / "out")
    assert found.classes == ("0", "1")
    assert np.array_equal(found.labels, indexed.labels)
    assert all(re.match(r"shard-\d{6}\.tar/(cat|dog\.s)/", name) for name in found.names)
    assert [found.read_bytes(i) for i in range(len(found))] == [indexed.read_bytes(i) for i in range(len(indexed))]


def test_extensions_are_those_of_the_content(tmp_path: Path) -> None:
    save(tmp_path / "photos/a.png", 1)
    os.rename(tmp_path / "photos/a.png", tmp_path / "photos/a.jpg")
    pack(tmp_path / "photos", tmp_path / "out")
    with tarfile.open(tmp_path / "out/shard-000000.tar") as archive:
        assert archive.getnames() == ["a.png"]


def test_larger_images_are_resized_upright_and_smaller_ones_copied(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    exif = Image.Exif()
    exif[274] = 6  # what is stored as the left side is the top
    wide = np.zeros((100, 201, 3), np.uint8)
    wide[:, :100] = 255
    Image.fromarray(wide).save(root / "turned.png", exif=exif)
    stripes = np.repeat((np.arange(240) % 2 * 255).astype(np.uint8)[:, None], 160, axis=1)  # too fine to be kept
    Image.fromarray(np.dstack([stripes] * 3)).save(root / "stripes.png")
    save(root / "small.png", 9, side=50)
    found = pack(root, tmp_path / "out", short_side=50)
    small, fine, turned = (found.read(index) for index in range(3))
    assert found.read_bytes(0) == (root / "small.png").read_bytes()
    assert [small.shape, fine.shape, turned.shape] == [(52, 50, 3), (75, 50, 3), (100, 50, 3)]
    assert np.abs(fine.astype(int) - 127).max() < 60  # the stripes' mean, and not one of them
    assert abs(fine.mean() - 127.5) < 3
    assert turned[:45].mean() > 250
    assert turned[55:].mean() < 5
    assert found.read_bytes(1).startswith(b"\xff\xd8")
    fewer = pack(root, tmp_path / "worse", short_side=50, quality=10)
    assert len(fewer.read_bytes(1)) < len(found.read_bytes(1))


def test_the_same_bytes_whatever_the_number_of_workers(tmp_path: Path) -> None:
    for number in range(150):
        save(tmp_path / f"photos/{number % 3}/{number}.png", number, side=20)
    (tmp_path / "photos/1/zero.png").write_bytes(b"")
    for workers in (1, 2):
        write_shards(open_images(tmp_path / "photos"), tmp_path / str(workers), 12, shard_size=50_000, workers=workers)
    one, two = (sorted((tmp_path / name).iterdir()) for name in ("1", "2"))
    assert [path.name for path in one] == [path.name for path in two]
    assert len(one) > 3
    for left, right in zip(one, two, strict=True):
        assert left.read_bytes() == right.read_bytes()


def test_unreadable_images_are_left_out_and_listed(photos: Path, tmp_path: Path) -> None:
    (photos / "cat/1.jpg").write_bytes((photos / "cat/1.jpg").read_bytes()[:-9])
    (photos / "dog.s/zz.png").write_bytes(b"<html>")
    source = open_images(photos)
    count, unreadable = write_shards(source, tmp_path / "out")
    assert count == len(source) - 2
    assert [line.partition(": ")[0] for line in unreadable] == [str(photos / "cat/1.jpg"), str(photos / "dog.s/zz.png")]
    assert (tmp_path / "out/unreadable.txt").read_text().splitlines() == unreadable
    found = open_images(tmp_path / "out")
    kept = [index for index, name in enumerate(source.names) if name not in ("cat/1.jpg", "dog.s/zz.png")]
    assert list(found.names) == [source.names[index] for index in kept]
    assert found.labels is not None
    assert source.labels is not None
    assert found.labels.tolist() == source.labels[kept].tolist()
    assert [found.read_bytes(i) for i in range(count)] == [source.read_bytes(i) for i in kept]


def test_a_pack_is_whole_or_not_there(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for place, name in ((packing, "_close"), (packing, "write_index")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, full)
            with pytest.raises(OSError, match="No space left"):
                write_shards(open_images(photos), tmp_path / "out")
        assert sorted(tmp_path.iterdir()) == [photos]
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="none of its images can be read, the first being"):
        write_shards(open_images(tmp_path / "bad"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_packs_are_not_mixed(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is fine
    (photos / "cat/bad.png").write_bytes(b"")
    first = write_shards(open_images(photos), out)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert write_shards(open_images(photos), out) == first
    assert "already holds this pack" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"already holds shards with short_side None \(asked for: 9\), quality None"):
        write_shards(open_images(photos), out, short_side=9)
    save(photos / "cat/new.jpg", 3)
    with pytest.raises(ValueError, match=r"already holds shards with images 11 \(asked for: 12\)"):
        write_shards(open_images(photos), out)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(ValueError, match="photos holds other files: choose a new or an empty folder"):
        write_shards(open_images(photos), photos)
    with pytest.raises(ValueError, match="is a file: shards are written as a folder"):
        write_shards(open_images(photos), out / INDEX)


def test_other_images_of_the_same_names_are_another_pack(tmp_path: Path) -> None:
    for name, value in (("a", 10), ("b", 200)):
        (tmp_path / name).mkdir()
        pixels = np.random.default_rng(value).integers(0, 255, (20, value + 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name / "1.png")
    write_shards(open_images(tmp_path / "a"), tmp_path / "out", workers=1)
    with pytest.raises(ValueError, match="already holds shards with content"):
        write_shards(open_images(tmp_path / "b"), tmp_path / "out", workers=1)


def test_a_disk_that_fails_makes_no_pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(40):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{number}.png")
    source = open_images(tmp_path)
    for number in range(11):
        (tmp_path / f"{number}.png").unlink()
    with pytest.raises(ValueError, match="11 of 40 images cannot be read, more than 1 %"):
        write_shards(source, tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


def test_the_command(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (photos / "dog.s/zz.png").write_bytes(b"")
    main([str(photos), str(tmp_path / "out"), "--short-side", "4", "--quality", "80", "--shard-size", "4KB"])
    said = capsys.readouterr().out
    assert re.search(r"out: 10 images in \d+ shards", said)
    assert "left out 1 unreadable images" in said
    assert "zz.png: the file is empty" in said
    assert min(open_images(tmp_path / "out").read(0).shape[:2]) == 4


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nowhere", "OUT"], "nowhere: no such folder"),
        (["PHOTOS", "PHOTOS"], "holds other files"),
        (["PHOTOS", "OUT", "--quality", "80"], "--quality is for resized images"),
        (["PHOTOS", "OUT", "--short-side", "9", "--quality", "101"], "quality is 101: choose 1 to 100"),
        (["PHOTOS", "OUT", "--short-side", "0"], "short_side is 0: choose 1 or more"),
        (["PHOTOS", "OUT", "--shard-size", "some"], "--shard-size is 'some': write it as 500MB or 2GB"),
        (["PHOTOS", "OUT", "--shard-size", "0"], "shard_size is 0: choose 1 or more"),
        (["PHOTOS", "OUT", "--workers", "0"], "workers is 0: choose 1 or more"),
    ],
)
def test_user_errors_are_one_sentence(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture, words: list[str], sentence: str
) -> None:
    places = {"PHOTOS": str(photos), "OUT": str(tmp_path / "out")}
    assert sentence in refusal(main, [places.get(word, word) for word in words], capsys)
    assert sorted(tmp_path.iterdir()) == [photos]


def test_the_script_runs_and_explains_itself() -> None:
    run = subprocess.run(
        [sys.executable, ROOT / "datasets/shard.py", "--help"], capture_output=True, text=True, check=True
    )
    for word in ("--short_side", "--quality", "--shard_size", "--workers", "shards.npz", "unreadable.txt"):
        assert word in run.stdout


def test_sizes() -> None:
    sizes = {"500MB": 500_000_000, "2 gb": 2_000_000_000, "1.5K": 1500, "7": 7, "7B": 7}
    assert {text: parse_size(text) for text in sizes} == sizes


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
RAW = st.binary(max_size=20).map(os.fsdecode)


@given(st.lists(TEXT | RAW, max_size=9), st.lists(RAW, unique=True, max_size=4), st.data())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_index_comes_back_as_it_was(
    tmp_path: Path, names: list[str], classes: list[str], data: st.DataObject
) -> None:
    (tmp_path / "a.tar").write_bytes(b"12345")
    row = st.tuples(st.just(0), st.integers(0, 2), st.integers(0, 3), st.integers(-1, 2**32 - 1))
    table = np.array([data.draw(row) for _ in names], np.int64).reshape(-1, 4)
    labels = np.array([data.draw(st.integers(0, len(classes) - 1)) for _ in names], np.int64) if classes else None
    write_index(tmp_path, Shards(("elsewhere/a.tar",), Names(names), labels, tuple(classes), table), {"a": [1, None]})
    found, about = read_index(str(tmp_path))
    assert found.files == (str(tmp_path / "a.tar"),)
    assert (list(found.names), found.classes, about) == (names, tuple(classes), {"a": [1, None]})
    assert np.array_equal(found.table, table)
    assert found.labels is None if labels is None else np.array_equal(found.labels, labels)


def test_an_index_that_does_not_fit_its_shards_says_so(photos: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path / "out", shard_size=4096)
    tar = tmp_path / "out/shard-000001.tar"
    data = tar.read_bytes()
    tar.write_bytes(data[:-10])
    with pytest.raises(ValueError, match=r"shard-000001\.tar has [\d,]+ bytes, and shards\.npz beside it says"):
        open_images(tmp_path / "out")
    tar.unlink()
    with pytest.raises(ValueError, match=r"shard-000001\.tar is missing, and shards\.npz lists it"):
        open_images(tmp_path / "out")
    tar.write_bytes(bytes(len(data)))  # of the same size, but other content
    found = open_images(tmp_path / "out")
    bad = 0
    for index, name in enumerate(found.names):
        assert found.members is not None
        if found.members[index, 0] == 1:
            bad += 1
            with pytest.raises(
                UnreadableImage, match=r"shard-000001\.tar is damaged, or the index is of other shards"
            ) as e:
                found.read(index)
            assert Path(e.value.path) == Path(UnreadableImage(tmp_path / "out" / name, "").path)
        else:
            found.read(index)
    assert bad
    tar.write_bytes(data[:-10])  # truncated while it is in use
    os.truncate(tmp_path / "out/shard-000000.tar", 600)
    with pytest.raises(UnreadableImage, match=r"shard-000000\.tar is truncated"):
        found.read(0)


def test_a_damaged_index_is_a_sentence(photos: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path / "out")
    path = tmp_path / "out" / INDEX
    data = path.read_bytes()
    np.savez(path, a=np.zeros(3))
    foreign = path.read_bytes()
    for wrong in (b"", data[:-20], data[:100], b"no zip" * 99, foreign):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"shards\.npz: damaged index, or none of shards .*pack the images again"):
            open_images(tmp_path / "out")
    with np.load(io.BytesIO(data)) as arrays:
        content = dict(arrays)
    for change in (
        {"version": np.array(99)},
        {"table": content["table"][1:]},
        {"table": content["table"] + [[1, 0, 0, 0]]},
        {"table": content["table"] - [[0, 10**9, 0, 0]]},
        {"table": content["table"] + [[0, 0, 10**12, 0]]},
        {"table": content["table"] + [[0, 2**62, 2**62, 0]]},
        {"file_sizes": content["file_sizes"] - 20480},
        {"filling": np.zeros(10**9, np.uint8)},
        {"labels": content["labels"] + 1},
        {"name_ends": content["name_ends"][::-1]},
        {"file_bytes": np.frombuffer(b"../../../../etc/../a", np.uint8), "file_ends": np.array([0, 20])},
    ):
        np.savez_compressed(path, **{**content, **change})
        with pytest.raises(ValueError, match=r"shards\.npz: damaged index"):
            open_images(tmp_path / "out")


class Server(SimpleHTTPRequestHandler):
    """Files with range requests, which Python's own server lacks. `sent` counts bytes; `failures` come first."""

    ranges = True
    sent: list[int]
    failures: list[int]

    def do_GET(self) -> None:
        if self.failures:
            self.send_error(self.failures.pop())
            return
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data, wanted = path.read_bytes(), re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        partial_answer = bool(wanted) and self.ranges
        if wanted and partial_answer:
            data = data[int(wanted[1]) : int(wanted[2]) + 1]
        self.send_response(206 if partial_answer else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.sent.append(len(data))  # before whoever waits for the data can ask
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, type[Server]]]:
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    handler = type("Handler", (Server,), {"sent": [], "failures": [], "ranges": True})
    with serving(partial(handler, directory=tmp_path)) as url:
        yield url, handler


def test_shards_on_a_web_server(photos: Path, tmp_path: Path, server: tuple[str, type[Server]]) -> None:
    url, handler = server
    pack(photos, tmp_path / "out", shard_size=4096)
    found = open_images(f"{url}/out/")
    source = open_images(photos)
    handler.sent.clear()
    assert len(found.read_bytes(2)) == sum(handler.sent)  # no byte more than the image
    assert_same(found, source)
    assert_same(pickle.loads(pickle.dumps(found)), source)
    assert found.place(0) == f"{url}/out/cat/1.5.jpg"


def test_a_web_server_that_fails(photos: Path, tmp_path: Path, server: tuple[str, type[Server]]) -> None:
    url, handler = server
    pack(photos, tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"/nowhere/shards\.npz: cannot read this index \(HTTP 404: not there\): shards"
    ):
        open_images(f"{url}/nowhere")
    handler.failures[:] = [503, 429]
    found = open_images(f"{url}/out")
    handler.failures[:] = [500, 500]
    found.read(0)
    handler.failures[:] = [503] * 9
    with pytest.raises(UnreadableImage, match=r"/out/cat/1\.5\.jpg: HTTP 503"):
        found.read(0)
    handler.failures[:] = [403] * 9
    with pytest.raises(UnreadableImage, match="HTTP 403"):
        found.read(0)
    assert len(handler.failures) == 8  # asking again would not help
    handler.failures.clear()
    handler.ranges = False
    with pytest.raises(UnreadableImage, match="must support range requests"):
        found.read(0)
    handler.ranges = True
    os.truncate(tmp_path / "out/shard-000000.tar", 700)
    with pytest.raises(UnreadableImage, match=r"shard-000000\.tar is truncated"):
        found.read(0)


def test_a_web_server_that_gives_no_images_is_found_out_when_it_is_opened(
    photos: Path, tmp_path: Path, server: tuple[str, type[Server]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, handler = server
    pack(photos, tmp_path / "out")
    waited: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", waited.append)
    index = (tmp_path / "out" / INDEX).read_bytes()
    plain = Server.do_GET

    def only_the_index(status: int) -> Callable[[Any], None]:
        return lambda self: plain(self) if self.path.endswith(INDEX) else self.send_error(status)

    for status in (500, 403):
        monkeypatch.setattr(handler, "do_GET", only_the_index(status))
        with pytest.raises(ValueError, match=rf"shard-000000\.tar: cannot read its first image \(HTTP {status}"):
            open_images(f"{url}/out")
    monkeypatch.setattr(handler, "do_GET", plain)
    handler.ranges = False
    with pytest.raises(ValueError, match=r"cannot read its first image \(the web server gives whole files only"):
        open_images(f"{url}/out")
    handler.ranges = True
    tar = tmp_path / "out/shard-000000.tar"
    tar.write_bytes(b"<html>" * tar.stat().st_size)
    with pytest.raises(
        ValueError, match=r"cannot read its first image \(.*is damaged, or the index is of other shards"
    ):
        open_images(f"{url}/out")
    for content in (b"<html>", index[:-9]):
        (tmp_path / "out" / INDEX).write_bytes(content)
        with pytest.raises(ValueError, match=r"shards\.npz: damaged index"):
            open_images(f"{url}/out")
    assert sum(waited) < 5  # seconds


def test_a_web_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    with pytest.raises(ValueError, match=r"http://127\.0\.0\.1:9/a/shards\.npz: cannot read this index \("):
        open_images("http://127.0.0.1:9/a")


def test_shards_in_any_storage_of_fsspec(photos: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path / "out", shard_size=4096)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "out"), "/bucket/shards", recursive=True)
    try:
        for url in ("memory://bucket/shards", f"file://{tmp_path}/out"):
            assert_same(open_images(url), open_images(photos))
    finally:
        memory.rm("/bucket", recursive=True)
    for url in ("memory://bucket/gone", "nonsense://a"):
        with pytest.raises(ValueError, match=f"{url}/shards.npz: cannot read this index"):
            open_images(url)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_several_processes_read_at_once(
    photos: Path, tmp_path: Path, server: tuple[str, type[Server]], method: str
) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} on this system")
    here = pack(photos, tmp_path / "out")
    files = {f"{number:02}.png": here.read_bytes(number) for number in range(len(here))}
    write_archive(tmp_path / "photos.zip", files)
    sources = [here, open_images(f"{server[0]}/out"), open_images(tmp_path / "photos.zip")]
    expected = [here.read_bytes(index) for index in range(len(here))]
    with ProcessPoolExecutor(2, multiprocessing.get_context(method)) as pool:
        for images in sources:
            images.read(0)  # so that anything kept open would be shared
            assert list(pool.map(images.read_bytes, range(len(here)))) == expected


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files where Linux lists them")
def test_nothing_stays_open(photos: Path, tmp_path: Path) -> None:
    found = pack(photos, tmp_path / "out")
    before = len(os.listdir("/proc/self/fd"))
    for index in range(len(found)):
        found.read(index)
    open_images(tmp_path / "out")
    scan_shards([str(tmp_path / "out/shard-000000.tar")])
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.skipif("SKIPLESS_TEST_DATA" not in os.environ, reason="SKIPLESS_TEST_DATA is not set")
def test_real_photographs_come_back(tmp_path: Path) -> None:
    root = Path(os.environ["SKIPLESS_TEST_DATA"], "imagenette128/val")
    if not root.is_dir():
        pytest.skip(f"no {root.name} of imagenette128 in SKIPLESS_TEST_DATA")
    (tmp_path / "photos").mkdir()
    for folder in sorted(root.iterdir())[:2]:
        (tmp_path / "photos" / folder.name).symlink_to(folder)
    source = open_images(tmp_path / "photos")
    packed = pack(tmp_path / "photos", tmp_path / "out", shard_size=1_000_000, workers=1)
    assert list(packed.names) == list(source.names)
    assert np.array_equal(packed.labels, source.labels)
    for index in range(0, len(source), 37):
        assert np.array_equal(packed.read(index), source.read(index))
