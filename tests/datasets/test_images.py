"""Reading images from folders and archives: what is found, in which order, and which pixels come out."""

import io
import os
import pickle
import struct
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from skipless.datasets.images import UnreadableImage, open_images, read_image
from skipless.datasets.storage.decode import decode
from skipless.datasets.storage.names import Names

HEIGHT, WIDTH = 48, 64


def picture(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Smooth, so that lossy formats keep it, and without any symmetry: red grows to the right, green downwards."""
    down, right = np.mgrid[0:height, 0:width]
    return np.dstack([right * 255 // width, down * 255 // height, 255 - right * 120 // width]).astype(np.uint8)


def encode(image: Image.Image | np.ndarray, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, form, **options)
    return buffer.getvalue()


def luma(rgb: np.ndarray) -> np.ndarray:
    """ITU-R BT.601, repeated in three channels."""
    return np.repeat((rgb @ np.array([0.299, 0.587, 0.114]))[..., None], 3, axis=2)


def assert_near(image: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    assert image.dtype == np.uint8
    assert image.shape == expected.shape
    assert np.abs(image.astype(float) - expected).max() <= tolerance


def save(path: Path, color: tuple[int, int, int] = (10, 20, 30), side: int = 6) -> None:
    """A flat image; the format follows the extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), color).save(path)


# Pixels ---------------------------------------------------------------------------------------------------------------

RGB = picture()
GRAY16 = (np.arange(HEIGHT * WIDTH, dtype=np.uint32).reshape(HEIGHT, WIDTH) * 65535 // (HEIGHT * WIDTH - 1)).astype(
    np.uint16
)
ALPHA = np.full((HEIGHT, WIDTH, 1), 255, np.uint8)
ALPHA[:, WIDTH // 2 :] = 0
ALPHA[:8] = 128
OVER_WHITE = RGB * (ALPHA / 255) + 255 * (1 - ALPHA / 255)
PALETTE = Image.fromarray(RGB).quantize(32)
INDICES = np.asarray(PALETTE)
CLEAR_ENTRY = int(INDICES[0, 0])
PALETTE_RGB = np.asarray(PALETTE.convert("RGB"))

FORMATS = {
    "JPEG": (encode(RGB, "JPEG", quality=95), RGB, 8),
    "JPEG progressive": (encode(RGB, "JPEG", quality=95, progressive=True), RGB, 8),
    "JPEG gray": (encode(Image.fromarray(RGB).convert("L"), "JPEG", quality=95), luma(RGB), 4),
    "JPEG CMYK": (encode(Image.fromarray(RGB).convert("CMYK"), "JPEG", quality=95), RGB, 8),
    "JPEG stored as RGB": (encode(RGB, "JPEG", quality=95, keep_rgb=True), RGB, 8),
    "PNG": (encode(RGB, "PNG"), RGB, 0),
    "PNG gray": (encode(Image.fromarray(RGB).convert("L"), "PNG"), luma(RGB), 1),
    "PNG 1 bit": (encode(Image.fromarray(RGB[..., 0] > 99), "PNG"), np.dstack([(RGB[..., 0] > 99) * 255] * 3), 0),
    "PNG gray 16 bit": (encode(GRAY16, "PNG"), np.dstack([GRAY16 / 257] * 3), 1),
    "PNG RGB 16 bit": (cv2.imencode(".png", np.dstack([GRAY16] * 3))[1].tobytes(), np.dstack([GRAY16 / 257] * 3), 1),
    "PNG RGBA": (encode(np.dstack([RGB, ALPHA]), "PNG"), OVER_WHITE, 1),
    "PNG gray and alpha": (
        encode(Image.fromarray(np.dstack([RGB, ALPHA])).convert("LA"), "PNG"),
        luma(RGB) * (ALPHA / 255) + 255 * (1 - ALPHA / 255),
        1.5,
    ),
    "PNG palette": (encode(PALETTE, "PNG"), PALETTE_RGB, 0),
    "PNG palette with a transparent entry": (
        encode(PALETTE, "PNG", transparency=CLEAR_ENTRY),
        np.where((INDICES == CLEAR_ENTRY)[..., None], 255, PALETTE_RGB),
        0,
    ),
    "WebP": (encode(RGB, "WEBP", quality=95), RGB, 16),
    "WebP lossless": (encode(RGB, "WEBP", lossless=True), RGB, 0),
    "WebP with alpha": (encode(np.dstack([RGB, ALPHA]), "WEBP", lossless=True, exact=True), OVER_WHITE, 1),
    "BMP": (encode(RGB, "BMP"), RGB, 0),
    "GIF": (encode(PALETTE, "GIF"), PALETTE_RGB, 0),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_becomes_rgb(name: str) -> None:
    data, expected, tolerance = FORMATS[name]
    assert_near(decode(data), expected, tolerance)


def test_the_content_decides_not_the_extension(tmp_path: Path) -> None:
    for name, extension in (("PNG", ".jpg"), ("JPEG", ".png"), ("GIF", ".jpeg"), ("WebP", ".bmp")):
        (tmp_path / f"{name}{extension}").write_bytes(FORMATS[name][0])
        assert_near(read_image(tmp_path / f"{name}{extension}"), *FORMATS[name][1:])


# Where row 0 and column 0 of the stored picture are to be seen (Exif 2.3, tag 274).
ORIENTATIONS = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    row, column = ORIENTATIONS[orientation]
    image = upright if row in ("top", "bottom") else upright.transpose(1, 0, 2)
    image = image[::-1] if row in ("bottom", "right") else image
    return np.ascontiguousarray(image[:, ::-1] if column in ("bottom", "right") else image)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[274] = orientation
    return tags


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize(("form", "mode"), [("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("WEBP", "RGB")])
def test_exif_orientation_is_undone(form: str, mode: str, orientation: int) -> None:
    image = Image.fromarray(stored(RGB, orientation)).convert(mode)
    assert_near(decode(encode(image, form, quality=95, exif=exif(orientation))), RGB, 16)


def test_exif_orientation_is_found_behind_xmp() -> None:
    data = encode(stored(RGB, 6), "JPEG", quality=95, exif=exif(6))
    xmp = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x='adobe:ns:meta/'/>"
    segment = b"\xff\xe1" + struct.pack(">H", len(xmp) + 2) + xmp
    assert_near(decode(data[:2] + segment + data[2:]), RGB, 8)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_and_unknown_orientations_are_ignored() -> None:
    plain = encode(RGB, "JPEG", quality=95)
    for body in (b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff", b"Exif\0\0garbage"):
        segment = b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body
        assert_near(decode(plain[:2] + segment + plain[2:]), RGB, 8)
    assert_near(decode(encode(RGB, "JPEG", quality=95, exif=exif(9))), RGB, 8)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(
    ("min_side", "factor"), [(0, 1), (1, 8), (24, 8), (25, 4), (48, 4), (49, 2), (96, 2), (97, 1), (192, 1), (500, 1)]
)
def test_jpegs_are_decoded_no_smaller_than_needed(min_side: int, factor: int, orientation: int) -> None:
    upright = picture(192, 256)
    image = decode(encode(stored(upright, orientation), "JPEG", quality=95, exif=exif(orientation)), min_side)
    assert_near(image, cv2.resize(upright, (256 // factor, 192 // factor), interpolation=cv2.INTER_AREA), 8)


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 300))
@settings(max_examples=40)
def test_reduced_decoding_keeps_the_short_side(height: int, width: int, min_side: int) -> None:
    image = decode(encode(picture(height, width), "JPEG"), min_side)
    assert min(image.shape[:2]) >= min(min_side, height, width)
    assert image.shape[0] <= height


def test_other_formats_ignore_min_side() -> None:
    assert decode(FORMATS["PNG"][0], min_side=1).shape == RGB.shape
    assert decode(FORMATS["JPEG CMYK"][0], min_side=1).shape == RGB.shape


# Damage ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["JPEG", "JPEG progressive", "JPEG gray", "JPEG CMYK", "PNG", "WebP", "WebP lossless"])
def test_no_half_pictures_from_truncated_files(name: str) -> None:
    data, expected, tolerance = FORMATS[name]
    complete = 0
    for size in range(len(data)):
        try:
            image = decode(data[:size])
        except ValueError:
            continue
        complete += 1
        assert_near(image, expected, tolerance)
    assert complete <= (20 if name == "PNG" else 0)  # a PNG may lack its last checksums and end mark


def test_a_jpeg_without_its_last_bytes_is_truncated() -> None:
    for name in ("JPEG", "JPEG progressive"):
        for missing in (1, 2, 20):
            with pytest.raises(ValueError, match="truncated JPEG"):
                decode(FORMATS[name][0][:-missing])


def test_the_end_of_an_embedded_preview_does_not_hide_a_truncation() -> None:
    preview = b"Exif\0\0" + encode(picture(8, 8), "JPEG")
    data = FORMATS["JPEG"][0]
    data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(preview) + 2) + preview + data[2:]
    assert_near(decode(data), RGB, 8)
    with pytest.raises(ValueError, match="truncated JPEG"):
        decode(data[:-40])


def test_padding_after_the_end_of_a_jpeg_is_harmless() -> None:
    for tail in (b"\0" * 4096, b"\n", os.urandom(100), FORMATS["JPEG"][0]):
        assert_near(decode(FORMATS["JPEG"][0] + tail), RGB, 8)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"<html>404 Not Found</html>", "the content is not that of a JPEG, PNG, WebP, BMP or GIF image"),
        (b"\xff\xd8\xff\xd9", "image"),
        (b"\x89PNG\r\n\x1a\n", "image"),
    ],
)
def test_what_is_no_image_says_so(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.raises(UnreadableImage) as caught:
        open_images(tmp_path).read(0)
    assert caught.value.path == str(tmp_path / "a.jpg")
    assert reason in caught.value.reason
    assert "\n" not in str(caught.value)
    assert " at 0x" not in str(caught.value)


@given(
    st.sampled_from(sorted(FORMATS)),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=8),
)
@settings(max_examples=150)
def test_damage_gives_an_image_or_a_value_error(name: str, changes: list[tuple[float, int]]) -> None:
    data = bytearray(FORMATS[name][0])
    for place, value in changes:
        data[int(place * (len(data) - 1))] = value
    try:
        image = decode(bytes(data), min_side=10)
    except ValueError:
        return
    assert image.dtype == np.uint8
    assert image.ndim == 3
    assert image.shape[2] == 3


def test_unreadable_image_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(UnreadableImage("a/b.jpg", "it is broken")))
    assert (error.path, error.reason, str(error)) == ("a/b.jpg", "it is broken", "a/b.jpg: it is broken")


def test_a_file_that_vanished_is_unreadable(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    images = open_images(tmp_path)
    (tmp_path / "a.png").unlink()
    with pytest.raises(UnreadableImage, match="No such file"):
        images.read(0)


# What is found --------------------------------------------------------------------------------------------------------


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


# Archives -------------------------------------------------------------------------------------------------------------


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
    with zipfile.ZipFile(tmp_path / "images.zip", "w", method) as archive:
        for path in sorted(root.rglob("*"), reverse=True):
            archive.write(path, path.relative_to(root))
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
            archive.writestr(info, FORMATS["PNG"][0])
    images = open_images(tmp_path / "images.zip")
    assert list(images.names) == ["a/1.png", "b/2.png"]
    assert_near(images.read(0), RGB, 0)
    assert images.classes == ("a", "b")


def test_a_damaged_member_is_unreadable_and_its_neighbors_are_not(tmp_path: Path) -> None:
    path = tmp_path / "images.zip"
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(path, "w", method) as archive:
            for name in ("1.bmp", "2.bmp", "3.bmp"):
                archive.writestr(name, FORMATS["BMP"][0])
            offset = archive.getinfo("2.bmp").header_offset + 30 + 5
        data = bytearray(path.read_bytes())
        data[offset + 200 : offset + 210] = bytes(10)
        path.write_bytes(data)
        images = open_images(path)
        with pytest.raises(UnreadableImage, match=r"images\.zip/2\.bmp: damaged zip archive"):
            images.read(1)
        for index in (0, 2):
            assert_near(images.read(index), RGB, 0)


# Hugging Face ---------------------------------------------------------------------------------------------------------


def hugging_face(count: int, labels: list[int] | None, **extra: list[Any]) -> Any:
    """A data set whose image i is flat, of the color (i, 2 i, 3 i), in the class folder of its label."""
    hf = pytest.importorskip("datasets")
    columns: dict[str, Any] = {"photo": [Image.new("RGB", (5, 4), (i, 2 * i, 3 * i)) for i in range(count)], **extra}
    features = {name: hf.Value("string") for name in extra} | {"photo": hf.Image()}
    if labels is not None:
        columns["kind"] = labels
        features["kind"] = hf.ClassLabel(names=["ant", "bee"])
    hf.disable_progress_bars()
    return hf.Dataset.from_dict(columns, features=hf.Features(features))


def test_hugging_face_data_sets_on_disk(tmp_path: Path) -> None:
    hf = pytest.importorskip("datasets")
    train, test = hugging_face(3, [1, 0, 1], text=["a", "b", "c"]), hugging_face(2, [-1, -1])
    hf.DatasetDict(train=train, test=test).save_to_disk(str(tmp_path / "both"))
    train.save_to_disk(str(tmp_path / "one"))
    for place in (tmp_path / "both", f"hf:{tmp_path}/both", f"hf:{tmp_path}/both:train", tmp_path / "one"):
        images = open_images(place)
        assert list(images.names) == ["train[0]", "train[1]", "train[2]"]
        assert images.classes == ("ant", "bee")
        assert images.labels is not None
        assert images.labels.tolist() == [1, 0, 1]
        for source in (images, pickle.loads(pickle.dumps(images))):
            assert [source.read(i)[0, 0].tolist() for i in range(3)] == [[0, 0, 0], [1, 2, 3], [2, 4, 6]]
    secret = open_images(f"hf:{tmp_path}/both:test")
    assert (len(secret), secret.labels, secret.classes) == (2, None, ())
    with pytest.raises(ValueError, match=r"both:val has no split val, only train, test$"):
        open_images(f"hf:{tmp_path}/both:val")
    with pytest.raises(ValueError, match="one:train holds one Dataset without splits, so train cannot"):
        open_images(f"hf:{tmp_path}/one:train")


def test_hugging_face_names_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hub would give, with images that stayed files, and some that are not there."""
    hf = pytest.importorskip("datasets")
    save(tmp_path / "file.png", (9, 8, 7))
    paths = [str(tmp_path / "file.png"), str(tmp_path / "gone.png"), None]
    given = hf.Dataset.from_dict({"image": paths}, features=hf.Features({"image": hf.Image()}))
    asked = []
    monkeypatch.setattr(hf, "load_dataset", lambda name, split: asked.append((name, split)) or given)
    for text in ("hf:someone/insects", "hf:someone/insects:train", "hf:someone/insects:test[:9]"):
        images = open_images(text)
    assert asked == [("someone/insects", "train"), ("someone/insects", "train"), ("someone/insects", "test[:9]")]
    assert images.labels is None
    assert images.read(0)[0, 0].tolist() == [9, 8, 7]
    for row, words in ((1, "No such file"), (2, "there is no image in this row")):
        with pytest.raises(UnreadableImage, match=words) as caught:
            images.read(row)
        assert caught.value.path == f"hf:someone/insects:test[:9]/test[:9][{row}]"


def test_hugging_face_errors_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = pytest.importorskip("datasets")
    hf.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "text"))
    with pytest.raises(ValueError, match=r"text has no column of the feature Image, only text$"):
        open_images(tmp_path / "text")
    with monkeypatch.context() as patch:
        patch.setattr(hf, "load_dataset", lambda *_, **__: hugging_face(0, None))
        with pytest.raises(ValueError, match=r"hf:a/empty: no image found"):
            open_images("hf:a/empty")

    def offline(name: str, split: str) -> None:
        raise ConnectionError("the hub cannot be reached\nand more")

    monkeypatch.setattr(hf, "load_dataset", offline)
    with pytest.raises(ValueError, match=r"^hf:a/b: datasets cannot load this \(the hub cannot be reached\)$"):
        open_images("hf:a/b")


@pytest.mark.parametrize("there", [None, types.ModuleType("datasets")])
def test_without_the_package_a_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, there: types.ModuleType | None
) -> None:
    """Also where this project's own folder is found in its place, an empty namespace."""
    monkeypatch.setitem(sys.modules, "datasets", there)
    with pytest.raises(
        ValueError, match=r"^hf:a/b: Hugging Face data need the package datasets: pip install datasets$"
    ):
        open_images("hf:a/b")


# Errors ---------------------------------------------------------------------------------------------------------------


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder or zip archive"):
        open_images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="path of the images is empty"):
        open_images("")


def test_a_folder_without_images_names_the_extensions(tmp_path: Path) -> None:
    (tmp_path / "a.tiff").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no image found \(looked for \.jpg, \.jpeg, \.png, \.webp, \.bmp"):
        open_images(tmp_path)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.txt", "")
    with pytest.raises(ValueError, match=r"a\.zip: no image found"):
        open_images(tmp_path / "a.zip")


def test_a_file_that_is_no_archive_and_a_damaged_archive(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png: is a file, but not a zip archive"):
        open_images(tmp_path / "a.png")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", FORMATS["PNG"][0])
    (tmp_path / "a.zip").write_bytes((tmp_path / "a.zip").read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"a\.zip: damaged zip archive"):
        open_images(tmp_path / "a.zip")


@given(st.binary(max_size=40), st.integers(0, 400))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_scrambled_archive_gives_an_image_or_one_of_our_errors(tmp_path: Path, junk: bytes, place: int) -> None:
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", encode(picture(4, 4), "PNG"))
    data = bytearray(path.read_bytes())
    data[place : place + len(junk)] = junk
    path.write_bytes(data)
    try:
        images = open_images(path)
        images.read(0)
    except (ValueError, FileNotFoundError):
        pass


def test_archives_with_other_compression_or_a_password_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a.png", FORMATS["PNG"][0])
    with pytest.raises(ValueError, match=r"a\.zip: a\.png is encrypted or compressed by a method other than deflate"):
        open_images(tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("b.png", FORMATS["PNG"][0])
    data = (tmp_path / "b.zip").read_bytes()
    directory = data.index(b"PK\x01\x02")
    (tmp_path / "b.zip").write_bytes(data[: directory + 8] + b"\x01" + data[directory + 9 :])  # flag bit 0: encrypted
    with pytest.raises(ValueError, match=r"b\.zip: b\.png is encrypted"):
        open_images(tmp_path / "b.zip")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_forbidden_folder_is_named(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "locked").mkdir(mode=0)
    with pytest.raises(ValueError, match=r"locked: cannot list this folder \(Permission denied\)"):
        open_images(tmp_path)


# Real photographs -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif("SKIPLESS_TEST_DATA" not in os.environ, reason="SKIPLESS_TEST_DATA names no folder of real images")
def test_real_photographs_decode_as_pillow_decodes_them() -> None:
    images = open_images(os.environ["SKIPLESS_TEST_DATA"])
    for index in range(0, len(images), max(1, len(images) // 50)):
        path = images.root / images.names[index]
        if path.suffix.lower() in (".jpg", ".jpeg"):
            with Image.open(path) as reference:
                assert_near(images.read(index), np.asarray(reference.convert("RGB")), 3)
