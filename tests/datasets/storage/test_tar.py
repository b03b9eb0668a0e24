"""Tars of others, without an index: what is found in them, against Python's tarfile."""

import gzip
import io
import os
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import write_archive
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from skipless.datasets.images import open_images
from skipless.datasets.storage.tar import expand_braces, header_number, members, scan_shards


def png(number: int) -> bytes:
    return cv2.imencode(".png", np.full((4, 5, 3), number, np.uint8))[1].tobytes()


PART = st.text(st.sampled_from("ab.é "), min_size=1, max_size=60).filter(lambda part: part.strip(". ") != "")


@given(
    st.lists(st.tuples(st.lists(PART, min_size=1, max_size=5).map("/".join), st.integers(0, 1500)), max_size=6),
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT]),
    st.lists(st.sampled_from(["folder", "link", "file"]), min_size=6, max_size=6),
)
@example([("a" * 99 + "/" + "b" * 100, 600)], tarfile.USTAR_FORMAT, ["file"] * 6)
@example([("é" * 150 + "/" + "b" * 100, 600), ("short", 3)], tarfile.GNU_FORMAT, ["link"] + ["file"] * 5)
@example([("é" * 150 + "/" + "b" * 100, 600), ("short", 3)], tarfile.PAX_FORMAT, ["folder"] + ["file"] * 5)
@settings(max_examples=60)
def test_headers_are_read_as_pythons_tarfile_reads_them(
    files: list[tuple[str, int]], form: int, kinds: list[str]
) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for (name, size), kind in zip(files, kinds, strict=False):
            entry = tarfile.TarInfo(name)
            entry.type = {"folder": tarfile.DIRTYPE, "link": tarfile.SYMTYPE, "file": tarfile.REGTYPE}[kind]
            entry.linkname = "z" * 150 if kind == "link" and form != tarfile.USTAR_FORMAT else "z"
            entry.size = size if kind == "file" else 0
            try:
                archive.addfile(entry, io.BytesIO(bytes(size)))
            except ValueError:  # USTAR cannot hold every long name
                assert form == tarfile.USTAR_FORMAT
    buffer.seek(0)
    with tarfile.open(fileobj=buffer) as archive:
        expected = [(os.fsencode(m.name), m.offset_data, m.size) for m in archive if m.isreg()]
    found = [(name.rstrip(b"/"), *place) for name, *place in members(buffer, "a.tar")]
    assert found == expected


def test_sizes_beyond_octal_digits_are_read() -> None:
    """GNU's base 256, of which no test can write the data: 8 GiB and more."""
    header = bytearray(tarfile.TarInfo("a").tobuf(tarfile.GNU_FORMAT))
    assert header_number(bytes(header[124:136])) == 0
    entry = tarfile.TarInfo("a")
    entry.size = 9 * 2**30
    assert header_number(entry.tobuf(tarfile.GNU_FORMAT)[124:136]) == 9 * 2**30


def test_a_size_below_zero_is_no_tar(tmp_path: Path) -> None:
    """It would have the listing go round for ever."""
    entry = tarfile.TarInfo("a.jpg")
    header = bytearray(entry.tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = b"-0000001000\0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "x.tar").write_bytes(bytes(header) + b"\0" * 1024)
    with pytest.raises(ValueError, match="no tar header at byte 0"):
        scan_shards([str(tmp_path / "x.tar")])


def test_foreign_shards(tmp_path: Path) -> None:
    """Masks, captions and metadata beside the image, classes before and after it, names that come again."""
    root = tmp_path / "data"
    write_archive(root / "007.tar", {
        "./a/1.cls": b"7\n", "./a/1.png": png(1), "./a/1.seg.png": png(99), "./a/1.txt": b"a cat",
        "./a/2.b.png": png(98), "./a/2.png": png(2), "./a/2.cls": b"12", "./a/._2.png": b"mac",
    })  # fmt: skip
    write_archive(root / "008.tar", {"a/1.PNG": png(3), "a/1.webp": png(97), "a/1.cls": b"7"})
    for place in (root, f"{root}/{{007..008}}.tar"):
        found = open_images(place)
        assert list(found.names) == ["007.tar/a/1.png", "007.tar/a/2.png", "008.tar/a/1.PNG"]
        assert [int(found.read(index)[0, 0, 0]) for index in range(3)] == [1, 2, 3]
        assert found.classes == ("7", "12")
        assert found.labels is not None
        assert found.labels.tolist() == [0, 1, 0]
        assert found.remarks[0].startswith("3 images belong to another image by WebDataset's naming")
    one = open_images(root / "008.tar")
    assert (list(one.names), one.labels) == (["008.tar/a/1.PNG"], None)
    assert one.place(0) == str(root / "008.tar/a/1.PNG")
    with pytest.raises(FileNotFoundError, match=r"009\.tar: no such tar"):
        open_images(f"{root}/{{007..009}}.tar")


def test_names_with_dots_are_images(tmp_path: Path) -> None:
    """By WebDataset's rule the key of all of these is IMG, or v1."""
    names = ["IMG.2020.1.png", "IMG.2020.2.png", "v1.a.png", "v1.b.PNG"]
    write_archive(tmp_path / "a.tar", {name: png(number) for number, name in enumerate(names)} | {"v1.cls": b"3"})
    found = open_images(tmp_path / "a.tar")
    assert list(found.names) == [f"a.tar/{name}" for name in names]
    assert [int(found.read(index)[0, 0, 0]) for index in range(4)] == [0, 1, 2, 3]
    assert found.remarks == ()


def test_folders_in_tars_are_classes_where_no_numbers_are(tmp_path: Path) -> None:
    files = {"dog/1.png": png(1), "cat/1.png": png(2), "cat/2.png": png(2), "cat/2.cls": b"3"}
    write_archive(tmp_path / "a.tar", files)
    found = open_images(tmp_path)
    assert found.classes == ("cat", "dog")
    assert found.labels is not None
    assert found.labels.tolist() == [1, 0, 0]


def test_images_of_a_folder_come_before_tars_that_lie_beside_them(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.png").write_bytes(png(1))
    write_archive(tmp_path / "b.tar", {"2.png": png(2)})
    assert list(open_images(tmp_path).names) == ["a/1.png"]


def test_what_is_no_tar_or_a_part_of_one(tmp_path: Path) -> None:
    write_archive(tmp_path / "a.tar", {"1.png": png(1), "2.png": bytes(5000)})
    data = (tmp_path / "a.tar").read_bytes()
    for wrong in (data[:700], data[:1100], data[:3000], gzip.compress(data), b"<html>" * 200, data[:600] + data[601:]):
        (tmp_path / "a.tar").write_bytes(wrong)
        with pytest.raises(ValueError, match=r"a\.tar: (truncated at byte|no tar header at byte)"):
            open_images(tmp_path)
    for content in ({}, {"a.txt": b"x", "1.seg.txt": b"x"}):
        write_archive(tmp_path / "a.tar", content)
        with pytest.raises(ValueError, match=r"no image found in these tars \(looked for KEY\.jpg"):
            open_images(tmp_path)


@given(st.binary(min_size=1, max_size=40), st.integers(0, 3000))
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_scrambled_tar_gives_images_or_one_of_our_errors(tmp_path: Path, junk: bytes, place: int) -> None:
    write_archive(tmp_path / "a.tar", {"1.png": png(1), "é" * 60 + ".png": png(2)})
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[place : place + len(junk)] = junk
    (tmp_path / "a.tar").write_bytes(data)
    try:
        images = open_images(tmp_path)
        for index in range(len(images)):
            images.read(index)
    except ValueError:
        pass


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{008..011}.tar", ["a-008.tar", "a-009.tar", "a-010.tar", "a-011.tar"]),
        ("{0..1}/{1..2}", ["0/1", "0/2", "1/1", "1/2"]),
        ("{a..b}", ["{a..b}"]),
    ],
)
def test_braces(pattern: str, names: list[str]) -> None:
    assert expand_braces(pattern) == names


@pytest.mark.parametrize("pattern", ["{000000000..999999999}.tar", "{0..9999}/{0..9999}.tar"])
def test_a_range_without_end_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"names [\d,]+ tars: at most 100,000 are opened"):
        open_images(pattern)
