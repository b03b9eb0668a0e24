"""Archives unpacked: what is wanted, and nothing of archives that were made to do harm."""

import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers import write_archive

from skipless.datasets.public.downloads import DamagedArchive
from skipless.datasets.public.unpack import unpack

CONTENT = np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8).tobytes()


def link(target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, target
    return info


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["a.tar", "a.tgz", "a.zip"])
def test_unpack_what_is_wanted(tmp_path: Path, name: str) -> None:
    inside = {"in/a.txt": b"A" * 9000, "in/deep/b.txt": b"B"}
    path = write_archive(tmp_path / name, {**inside, "c.txt": b"C"})
    unpack(path, tmp_path / "all")
    assert contents(tmp_path / "all") == {**inside, "c.txt": b"C"}
    unpack(path, tmp_path / "some", keep=lambda member: member.startswith("in/"))
    assert contents(tmp_path / "some") == inside


EVIL = ["../evil.txt", "a/../../evil.txt", "/evil.txt", "..\\evil.txt", "C:\\evil.txt", "//host/evil.txt"]


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("name", EVIL)
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_members_outside_are_refused(tmp_path: Path, kind: str, name: str, wanted: bool) -> None:
    path = write_archive(tmp_path / f"evil.{kind}", {"good.txt": b"good", name: b"evil"})
    with pytest.raises(DamagedArchive, match="leads out of the folder"):
        unpack(path, tmp_path / "in" / "folder", keep=lambda member: wanted)
    assert not list(tmp_path.rglob("*evil.txt"))


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("/etc/passwd", tarfile.SYMTYPE),
        ("../secret", tarfile.SYMTYPE),
        ("a/../../secret", tarfile.SYMTYPE),
        ("../secret", tarfile.LNKTYPE),
        ("/etc/passwd", tarfile.LNKTYPE),
    ],
)
@pytest.mark.parametrize("wanted", [True, False])
def test_links_outside_are_refused(tmp_path: Path, target: str, kind: bytes, wanted: bool) -> None:
    (tmp_path / "secret").write_text("secret")
    path = write_archive(tmp_path / "evil.tar", {"link": link(target, kind)})
    with pytest.raises(DamagedArchive, match="not unpacked"):
        unpack(path, tmp_path / "folder", keep=lambda member: wanted)
    assert not list((tmp_path / "folder").rglob("link"))


def test_writing_through_a_link_is_refused(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "evil.tar", {"out": link(".."), "out/evil.txt": b"evil"})
    with pytest.raises(DamagedArchive):
        unpack(path, tmp_path / "folder")
    assert not (tmp_path / "evil.txt").exists()


def test_links_inside_and_devices(tmp_path: Path) -> None:
    unpack(write_archive(tmp_path / "a.tar", {"a.txt": b"A", "b.txt": link("a.txt")}), tmp_path / "folder")
    assert (tmp_path / "folder" / "b.txt").read_bytes() == b"A"
    path = write_archive(tmp_path / "evil.tar", {"pipe": link("", tarfile.FIFOTYPE)})
    with pytest.raises(DamagedArchive, match="device or pipe"):
        unpack(path, tmp_path / "other", keep=lambda member: False)


def test_links_in_zip_are_refused(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("link")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as file:
        file.writestr(info, "../secret")
    with pytest.raises(DamagedArchive, match="is a link"):
        unpack(tmp_path / "evil.zip", tmp_path / "folder")
    assert contents(tmp_path / "folder") == {}


@pytest.mark.parametrize("name", ["a.tar", "a.tgz", "a.zip"])
def test_cut_off_archives_and_other_files(tmp_path: Path, name: str) -> None:
    path = write_archive(tmp_path / name, {"a.bin": CONTENT})
    whole = path.read_bytes()
    for content in (b"", whole[:100], whole[: len(whole) // 2], CONTENT, b"<html>not found</html>"):
        path.write_bytes(content)
        with pytest.raises(DamagedArchive, match="damaged or cut off"):
            unpack(path, tmp_path / "folder")
