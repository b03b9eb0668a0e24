"""Images of folders and archives: what is found, in which order, with which classes."""

import io
import os
import pickle
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers import write_archive
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from skipless.datasets.images import UnreadableImage, open_images
from skipless.datasets.storage.names import Names

RGB = (np.arange(48 * 64 * 3) % 251).reshape(48, 64, 3).astype(np.uint8)


def encode(image: np.ndarray, form: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, form)
    return buffer.getvalue()


PNG = encode(RGB, "PNG")


def save(path: Path, color: tuple[int, int, int] = (10, 20, 30), side: int = 6) -> None:
    """A flat image; the format follows the extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), color).save(path)


def test_unreadable_image_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(UnreadableImage("a/b.jpg", "it is broken")))
    assert (error.path, error.reason, str(error)) == ("a/b.jpg", "it is broken", "a/b.jpg: it is broken")


def test_a_file_that_vanished_is_unreadable(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    images = open_images(tmp_path)
    (tmp_path / "a.png").unlink()
    with pytest.raises(UnreadableImage, match="No such file"):
        images.read(0)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_pipes_devices_and_files_without_end_are_unreadable(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "images").mkdir()
    for name, target in (("a", tmp_path / "pipe"), ("b", "/dev/zero"), ("c", tmp_path)):
        (tmp_path / f"images/{name}.png").symlink_to(target)
    with open(tmp_path / "images/d.png", "wb") as file:
        file.truncate(2**40)
    images = open_images(tmp_path / "images")
    reasons = []
    for index in range(len(images)):
        with pytest.raises(UnreadableImage) as error:
            images.read(index)
        reasons.append(error.value.reason)
    assert list(images.names) == ["a.png", "b.png", "d.png"]
    assert reasons == ["not a regular file"] * 2 + ["the file has 1,100 GB, too many for an image"]


def test_folders_linked_crosswise_are_refused(tmp_path: Path) -> None:
    """Twelve that hold links to all the others: 12! ways through them."""
    folders = [tmp_path / f"{number:02}" for number in range(12)]
    for folder in folders:
        save(folder / "a.png")
    for folder in folders:
        for other in folders:
            if other != folder:
                (folder / other.name).symlink_to(other)
    with pytest.raises(ValueError, match="links lead to the same folders again and again"):
        open_images(tmp_path)


def test_a_zip_bomb_takes_no_memory(tmp_path: Path) -> None:
    """200 MB of zeros, for which the directory states another size: too small, then too large."""
    path = write_archive(tmp_path / "a.zip", {"a.png": bytes(200_000_000)})
    data = path.read_bytes()
    place = data.index(b"PK\x01\x02") + 24  # the directory's size of the member
    for size, reason in ((1000, "its checksum does not match"), (2**32 - 2, r"it has 4\.3 GB by the archive's")):
        path.write_bytes(data[:place] + size.to_bytes(4, "little") + data[place + 4 :])
        images = open_images(path)
        tracemalloc.start()
        with pytest.raises(UnreadableImage, match=reason):
            images.read(0)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
        tracemalloc.stop()


def test_what_may_not_be_meant_is_said(tmp_path: Path) -> None:
    for name in ("train/a.png", "train/b.tif", "val/c.GIF"):
        save(tmp_path / "splits" / name)
    for name in ("d.heic", "e.HEIC", "f.avif"):
        (tmp_path / "splits" / "train" / name).touch()
    images = open_images(tmp_path / "splits")
    assert list(images.names) == ["train/a.png", "train/b.tif", "val/c.GIF"]
    assert images.remarks == (
        "left out, as these kinds are not read: 1 .avif, 2 .heic; convert them to JPEG or PNG",
        "2 images of train/ and 1 images of val/ are all taken, what others measure on among them: for one alone give "
        "its folder",
    )
    members = {path.relative_to(tmp_path / "splits").as_posix(): path for path in (tmp_path / "splits").rglob("*.*")}
    write_archive(tmp_path / "splits.zip", {name: path.read_bytes() for name, path in members.items()})
    assert open_images(tmp_path / "splits.zip").remarks == images.remarks
    assert open_images(tmp_path / "splits/val").remarks == ()
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone" / "a.heic").touch()
    with pytest.raises(ValueError, match=r"no image found .*1 files of kinds that are not read: \.heic"):
        open_images(tmp_path / "phone")


def test_label_masks_beside_images_are_no_images(tmp_path: Path) -> None:
    """VOC's folder: the monitor would take the folders for classes, and tell them apart."""
    for name in ("JPEGImages/a.jpg", "SegmentationClass/a.png", "SegmentationObject/a.png", "annotations/b.jpg"):
        save(tmp_path / "VOC2012" / name)
    for root, folder in ((tmp_path, "VOC2012/"), (tmp_path / "VOC2012", "")):
        images = open_images(root)
        assert list(images.names) == [f"{folder}JPEGImages/a.jpg", f"{folder}annotations/b.jpg"]
        assert images.remarks == ("2 label masks in SegmentationClass, SegmentationObject are left out",)
    names = {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*.*g")}
    archive = open_images(write_archive(tmp_path / "a.zip", names))
    assert list(archive.names) == ["VOC2012/JPEGImages/a.jpg", "VOC2012/annotations/b.jpg"]
    assert archive.read(1).shape == (6, 6, 3)
    assert len(open_images(tmp_path / "VOC2012/SegmentationClass")) == 1


def test_images_at_any_depth_sorted_whatever_the_case(tmp_path: Path) -> None:
    wanted = ["B.JPG", "a.jpeg", "deep/er/c.WebP", "deep/z.Png", "deep/é 1.bmp", "z.jpg"]
    for name in reversed(wanted):
        save(tmp_path / name)
    save(tmp_path / "deep" / ".hidden.jpg")
    save(tmp_path / ".cache" / "a.jpg")
    save(tmp_path / "__MACOSX" / "a.jpg")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "jpg").write_text("no image")
    (tmp_path / "folder.jpg").mkdir()
    images = open_images(tmp_path)
    assert list(images.names) == wanted
    assert len(images) == 6
    assert images.labels is None
    assert images.classes == ()


@pytest.mark.skipif(sys.platform == "win32", reason="links need privileges on Windows")
def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    save(elsewhere / "inside" / "a.png", (255, 0, 0))
    save(root / "b.png")
    (root / "linked").symlink_to(elsewhere, target_is_directory=True)
    (root / "c.png").symlink_to(elsewhere / "inside" / "a.png")
    (root / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (elsewhere / "inside" / "back").symlink_to(root, target_is_directory=True)
    (root / "self").symlink_to(root, target_is_directory=True)
    images = open_images(root)
    assert list(images.names) == ["b.png", "c.png", "gone.png", "linked/inside/a.png"]
    for index in (1, 3):
        assert images.read(index)[0, 0].tolist() == [255, 0, 0]
    with pytest.raises(UnreadableImage, match=r"gone\.png: No such file"):
        images.read(2)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow only Unicode in file names")
def test_names_that_are_not_utf8_are_read_and_printable(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/caf\xe9.png"
    save(tmp_path / "a.png", (1, 2, 3))
    os.rename(tmp_path / "a.png", raw)
    images = open_images(tmp_path)
    assert images.read(0)[0, 0].tolist() == [1, 2, 3]
    Path(os.fsdecode(raw)).write_bytes(b"")
    with pytest.raises(UnreadableImage) as caught:
        images.read(0)
    str(caught.value).encode()  # a log in UTF-8 can hold it


def test_class_folders_give_labels(tmp_path: Path) -> None:
    for name in ("dog/1.png", "cat/2.png", "dog/more/0.png", "ant/x.png"):
        save(tmp_path / name)
    (tmp_path / "empty").mkdir()
    images = open_images(tmp_path)
    assert images.classes == ("ant", "cat", "dog")
    assert images.labels is not None
    assert images.labels.dtype == np.int64
    assert [(name.split("/")[0], label) for name, label in zip(images.names, images.labels, strict=True)] == [
        ("ant", 0),
        ("cat", 1),
        ("dog", 2),
        ("dog", 2),
    ]


def test_no_labels_from_one_folder_or_with_stray_images(tmp_path: Path) -> None:
    save(tmp_path / "dog/1.png")
    assert open_images(tmp_path).labels is None
    save(tmp_path / "cat/1.png")
    assert open_images(tmp_path).labels is not None
    save(tmp_path / "stray.png")
    assert open_images(tmp_path).labels is None


@given(st.lists(st.text(st.characters(blacklist_categories=["Cs"]), max_size=12)), st.data())
@settings(max_examples=60)
def test_names_behave_as_a_list(names: list[str], data: st.DataObject) -> None:
    packed = pickle.loads(pickle.dumps(Names(names)))
    assert len(packed) == len(names)
    assert list(packed) == names
    chosen = data.draw(st.slices(len(names)))
    assert packed[chosen] == names[chosen]
    for index in range(-len(names), len(names)):
        assert packed[index] == names[index]
    for index in (len(names), -len(names) - 1):
        with pytest.raises(IndexError):
            packed[index]


def fill(root: Path) -> None:
    for number, name in enumerate(["a/1.png", "a/2.jpg", "b/c/3.webp", "b/4.bmp", "b/é.png"]):
        save(root / name, (40 * number, 255 - 40 * number, 7))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_archive_reads_as_the_folder_it_holds(tmp_path: Path, method: int) -> None:
    root = tmp_path / "root"
    fill(root)
    (root / "b" / "notes.txt").write_text("no image")
    save(root / "__MACOSX" / "a" / "1.png")
    save(root / "a" / "._1.png")
    files = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    write_archive(tmp_path / "images.zip", files | {"b/": b""}, method)
    folder, packed = open_images(root), open_images(str(tmp_path / "images.zip"))
    assert list(packed.names) == list(folder.names) == ["a/1.png", "a/2.jpg", "b/4.bmp", "b/c/3.webp", "b/é.png"]
    assert packed.classes == folder.classes == ("a", "b")
    assert np.array_equal(packed.labels, folder.labels)
    for index in range(len(folder)):
        assert np.array_equal(packed.read(index), folder.read(index))


def test_an_archive_written_on_windows_has_the_same_names(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for name in ("a\\1.png", "./b/2.png"):
            info = zipfile.ZipInfo("x")
            info.filename = name  # past the constructor, which would normalize it
            archive.writestr(info, PNG)
    images = open_images(tmp_path / "images.zip")
    assert list(images.names) == ["a/1.png", "b/2.png"]
    assert np.array_equal(images.read(0), RGB)
    assert images.classes == ("a", "b")


def test_a_damaged_member_is_unreadable_and_its_neighbors_are_not(tmp_path: Path) -> None:
    path = tmp_path / "images.zip"
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        write_archive(path, {f"{number}.bmp": encode(RGB, "BMP") for number in (1, 2, 3)}, method)
        offset = zipfile.ZipFile(path).getinfo("2.bmp").header_offset + 30 + 5
        data = bytearray(path.read_bytes())
        data[offset + 200 : offset + 210] = bytes(10)
        path.write_bytes(data)
        images = open_images(path)
        with pytest.raises(UnreadableImage, match=r"images\.zip/2\.bmp: damaged zip archive"):
            images.read(1)
        for index in (0, 2):
            assert np.array_equal(images.read(index), RGB)


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder or zip archive"):
        open_images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="path of the images is empty"):
        open_images("")


def test_a_folder_without_images_names_the_extensions(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no image found \(looked for \.jpg, \.jpeg, \.png, \.webp, \.bmp"):
        open_images(tmp_path)
    write_archive(tmp_path / "a.zip", {"a.txt": b""})
    with pytest.raises(ValueError, match=r"a\.zip: no image found"):
        open_images(tmp_path / "a.zip")


def test_a_file_that_is_no_archive_and_a_damaged_archive(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png: is a file, but not a zip archive"):
        open_images(tmp_path / "a.png")
    path = write_archive(tmp_path / "a.zip", {"a.png": PNG})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"a\.zip: damaged zip archive"):
        open_images(tmp_path / "a.zip")


@given(st.binary(max_size=40), st.integers(0, 400))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_scrambled_archive_gives_an_image_or_one_of_our_errors(tmp_path: Path, junk: bytes, place: int) -> None:
    path = write_archive(tmp_path / "images.zip", {"a.png": encode(RGB[:4, :4], "PNG")}, zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    data[place : place + len(junk)] = junk
    path.write_bytes(data)
    try:
        images = open_images(path)
        images.read(0)
    except (ValueError, FileNotFoundError):
        pass


def test_archives_with_other_compression_or_a_password_are_refused(tmp_path: Path) -> None:
    write_archive(tmp_path / "a.zip", {"a.png": PNG}, zipfile.ZIP_BZIP2)
    with pytest.raises(ValueError, match=r"a\.zip: a\.png is encrypted or compressed by a method other than deflate"):
        open_images(tmp_path / "a.zip")
    path = write_archive(tmp_path / "b.zip", {"b.png": PNG})
    data = path.read_bytes()
    directory = data.index(b"PK\x01\x02")
    path.write_bytes(data[: directory + 8] + b"\x01" + data[directory + 9 :])  # flag bit 0: encrypted
    with pytest.raises(ValueError, match=r"b\.zip: b\.png is encrypted"):
        open_images(tmp_path / "b.zip")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_forbidden_folder_is_named(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "locked").mkdir(mode=0)
    with pytest.raises(ValueError, match=r"locked: cannot list this folder \(Permission denied\)"):
        open_images(tmp_path)


@pytest.mark.skipif("SKIPLESS_TEST_DATA" not in os.environ, reason="SKIPLESS_TEST_DATA names no folder of real images")
def test_real_photographs_decode_as_pillow_decodes_them() -> None:
    images = open_images(os.environ["SKIPLESS_TEST_DATA"])
    for index in range(0, len(images), max(1, len(images) // 50)):
        path = images.root / images.names[index]
        if path.suffix.lower() in (".jpg", ".jpeg"):
            with Image.open(path) as reference:
                expected = np.asarray(reference.convert("RGB"), int)
            assert np.abs(images.read(index) - expected).max() <= 3
