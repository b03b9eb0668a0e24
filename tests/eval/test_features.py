"""Extraction over a data set: the values, what is computed again and what is not, and endings that are not planned."""

import itertools
import os
import pwd
import shutil
import signal
import tempfile
import time
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import run_group, start
from PIL import Image

from skipless.common.pixels import center_crop, resample
from skipless.datasets.images import read_image
from skipless.eval import features as module
from skipless.eval.backbones import Backbone
from skipless.eval.cache import main as main_of_cache
from skipless.eval.features import Features, default_cache, extract, kept_features
from skipless.ssl.data.loader import loader_workers
from skipless.ssl.model.vit import VisionTransformer

DIM = 32


def make_backbone(seed: int = 0) -> Backbone:
    torch.manual_seed(seed)
    model = VisionTransformer(DIM, 3, 2, patch=8, registers=1, image_size=16, attention="sdpa")
    for parameter in model.parameters():  # large enough for tokens to differ
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return Backbone(model.eval().requires_grad_(False), "tiny.pt", "skipless", "")


@pytest.fixture
def backbone() -> Backbone:
    return make_backbone()


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Ten pictures of 20 x 28 pixels."""
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    paths = [folder / f"{i}.png" for i in range(10)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((28, 20)).save(path)
    return paths


@pytest.fixture(autouse=True)
def shards_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that ten images are shards of 4, 4 and 2."""
    monkeypatch.setattr(module, "SHARD", 4)
    monkeypatch.setattr(module, "POOLED_SHARD", 4)


class Stop(Exception):
    pass


class Reader:
    """Reads pictures and remembers which; refuses after `most`."""

    def __init__(self, paths: list[Path], most: int = 10**9):
        self.paths, self.most, self.seen = paths, most, list[int]()

    def __call__(self, index: int) -> np.ndarray:
        if len(self.seen) >= self.most:
            raise Stop
        self.seen.append(index)
        return read_image(self.paths[index])


def run(
    backbone: Backbone, paths: list[Path], cache: Path, blocks: tuple[int, ...] = (2,), size: int = 24, **more: Any
) -> Features:
    return extract(backbone, paths, more.pop("read", Reader(paths)), size, blocks, cache, **more)


def count_images(backbone: Backbone) -> list[int]:
    """A list to which every forward pass adds the images in it."""
    seen: list[int] = []
    backbone.model.patch_embed.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    return seen


def stored(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.npy"))}


@pytest.mark.parametrize(("kind", "workers"), [("tokens", 0), ("keys", 2), ("keys_without_bias", 0)])
def test_values_are_those_of_the_backbone(
    backbone: Backbone, photos: list[Path], tmp_path: Path, kind: Any, workers: int
) -> None:
    found = run(backbone, photos, tmp_path / "cache", (0, -1), kind=kind, batch_size=3, workers=workers)
    assert (found.images, found.blocks, found.grid, found.dim) == (10, (0, 2), (3, 3), DIM)
    rows = [9, 0, 4, 4]
    images = backbone.normalize(np.stack([resample(read_image(photos[row]), 24, 24) for row in rows]))
    last, first = backbone.features(images, (2, 0), kind)
    patches, cls = found.read(rows, (2, 0)), found.read_cls(np.array(rows), (2, 0))
    assert patches.dtype == cls.dtype == torch.float16
    half = {"atol": 2e-3, "rtol": 2e-3}
    torch.testing.assert_close(patches.float(), torch.cat([last.patches, first.patches], dim=3), **half)
    torch.testing.assert_close(cls.float(), torch.cat([last.cls, first.cls], dim=1), **half)
    torch.testing.assert_close(found.read([3], (0,))[0], found.read(range(10), (0,))[3])


def test_pooled_features_are_class_tokens_and_means(backbone: Backbone, photos: list[Path], tmp_path: Path) -> None:
    """Of central crops: the short side becomes 28, and 24 x 24 pixels are cut out."""
    found = run(backbone, photos, tmp_path / "cache", (0, -1), resize=28, pooled=True, batch_size=3, workers=1)
    assert (found.images, found.blocks, found.grid, found.dim) == (10, (0, 2), (1, 1), DIM)
    rows = [9, 0, 4, 4]
    images = backbone.normalize(np.stack([center_crop(read_image(photos[row]), 24, 28) for row in rows]))
    last, first = backbone.features(images, (2, 0))
    means = [f.patches.reshape(4, 9, DIM).sum(1) / 9 for f in (last, first)]
    patches, cls = found.read(rows, (2, 0)), found.read_cls(rows, (2, 0))
    half = {"atol": 2e-3, "rtol": 2e-3}
    assert patches.shape == (4, 1, 1, 2 * DIM)
    torch.testing.assert_close(patches[:, 0, 0].float(), torch.cat(means, dim=1), **half)
    torch.testing.assert_close(cls.float(), torch.cat([last.cls, first.cls], dim=1), **half)
    # Two vectors an image and block, in three files a block.
    assert [np.load(path).shape for path in sorted(found.folder.rglob("*.npy"))] == [
        (count, 2, DIM) for _ in range(2) for count in (4, 4, 2)
    ]


def test_central_crops_keep_their_patches_where_nothing_is_pooled(
    backbone: Backbone, photos: list[Path], tmp_path: Path
) -> None:
    found = run(backbone, photos, tmp_path / "cache", resize=28)
    images = backbone.normalize(np.stack([center_crop(read_image(photos[row]), 24, 28) for row in (3, 8)]))
    (expected,) = backbone.features(images, (2,))
    torch.testing.assert_close(found.read([3, 8], (2,)).float(), expected.patches, atol=2e-3, rtol=2e-3)


def test_files_are_mapped_and_few_are_open(
    backbone: Backbone, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHARD", 1)
    many = photos * 20
    found = run(backbone, many, tmp_path / "cache", size=8, read=Reader(many))
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("no /proc here")
    found.read(range(200), (2,))
    open_files = [os.readlink(path) for path in descriptors.iterdir() if path.is_symlink()]
    assert 1 <= sum(name.startswith(str(found.folder)) for name in open_files) <= 128
    assert isinstance(module._open_shard(next(found.folder.rglob("*.npy"))), np.memmap)


def test_blocks_share_one_pass_and_are_not_computed_again(
    backbone: Backbone, photos: list[Path], tmp_path: Path
) -> None:
    seen = count_images(backbone)
    both = run(backbone, photos, tmp_path, (0, 2))
    assert sum(seen) == 10
    reader = Reader(photos)
    for blocks, positive in [((0,), (0,)), ((2,), (2,)), ((2, 0), (2, 0)), ((-1, -3, 0), (2, 0, 0))]:
        again = run(backbone, photos, tmp_path, blocks, read=reader)
        assert torch.equal(again.read(range(10), positive), both.read(range(10), positive))
    assert sum(seen) == 10
    assert reader.seen == []
    before = stored(both.folder)
    run(backbone, photos, tmp_path, (0, 1, 2), read=reader)
    assert sum(seen) == 20
    assert sorted(reader.seen) == list(range(10))
    assert before.items() < stored(both.folder).items()


def _weights(backbone: Backbone, paths: list[Path]) -> dict[str, Any]:
    backbone.model.blocks[0].mlp.fc2.weight[3, 5] += 0.5  # type: ignore[union-attr, index, operator]
    return {}


def _image(backbone: Backbone, paths: list[Path]) -> dict[str, Any]:
    Image.new("RGB", (28, 20), (9, 8, 7)).save(paths[5])
    return {}


def _time(backbone: Backbone, paths: list[Path]) -> dict[str, Any]:
    status = paths[5].stat()
    os.utime(paths[5], ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    return {}


def _elsewhere(backbone: Backbone, paths: list[Path]) -> dict[str, Any]:
    """Same names, sizes and times."""
    shutil.copytree(paths[0].parent, paths[0].parent.parent / "other")
    return {"paths": [paths[0].parent.parent / "other" / path.name for path in paths]}


CHANGES: dict[str, Callable[[Backbone, list[Path]], dict[str, Any]]] = {
    "weights": _weights,
    "normalization": lambda backbone, _: {"backbone": replace(backbone, mean=(0.5, 0.5, 0.5))},
    "size": lambda *_: {"size": 32},
    "kind": lambda *_: {"kind": "keys"},
    "content of an image": _image,
    "time of an image": _time,
    "place of the images": _elsewhere,
    "order": lambda _, paths: {"paths": paths[::-1]},
    "fewer": lambda _, paths: {"paths": paths[:9]},
    "pooled": lambda *_: {"pooled": True},
    "center": lambda *_: {"resize": 24},
    "identity": lambda *_: {"identity": "arrays"},
    "precision": lambda backbone, _: {"backbone": replace(backbone, precision="bf16")},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_never_meets_a_stale_cache(
    backbone: Backbone, photos: list[Path], tmp_path: Path, change: str
) -> None:
    cache = tmp_path / "cache"
    run(backbone, photos, cache)
    arguments: dict[str, Any] = {"backbone": backbone, "paths": photos} | CHANGES[change](backbone, photos)
    reader = Reader(arguments["paths"])
    found = run(**arguments, cache=cache, read=reader)
    assert sorted(reader.seen) == list(range(len(arguments["paths"])))
    fresh = run(**arguments, cache=tmp_path / "fresh")
    assert stored(found.folder) == stored(fresh.folder)


def test_pooled_and_full_features_lie_side_by_side(backbone: Backbone, photos: list[Path], tmp_path: Path) -> None:
    """Also of images of a single patch, where both have the same shape, and of two sizes before the crop."""
    for size in (8, 24):
        folders = {
            run(backbone, photos, tmp_path, size=size, resize=resize, pooled=pooled).folder
            for resize in (None, 28, 29)
            for pooled in (False, True)
        }
        assert len(folders) == 6


@pytest.mark.parametrize("pooled", [False, True])
def test_images_without_files_are_told_apart_by_their_identity(
    backbone: Backbone, tmp_path: Path, pooled: bool
) -> None:
    """`paths` are names for messages alone."""
    images = np.random.default_rng(0).integers(0, 256, (2, 10, 20, 28, 3), dtype=np.uint8)
    paths = [Path(f"train.npz[{row}]") for row in range(10)]
    seen = count_images(backbone)
    found = [
        run(backbone, paths, tmp_path, read=images[i].__getitem__, identity=name, pooled=pooled, resize=28)
        for i, name in ((0, "one"), (1, "other"), (0, "one"))
    ]
    assert sum(seen) == 20
    assert found[0].folder == found[2].folder
    stacked = backbone.normalize(np.stack([center_crop(image, 24, 28) for image in images[1]]))
    (expected,) = backbone.features(stacked, (2,))
    torch.testing.assert_close(found[1].read_cls(range(10), (2,)).float(), expected.cls, atol=2e-3, rtol=2e-3)
    elsewhere = [Path(f"moved.npz[{row}]") for row in range(10)]
    assert run(backbone, elsewhere, tmp_path, identity="one", pooled=pooled, resize=28).folder == found[0].folder


def test_without_a_change_nothing_is_read(photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(make_backbone(), photos, tmp_path / "cache")
    reader = Reader(photos, most=0)
    monkeypatch.chdir(photos[0].parent)
    relative = [Path(path.name) for path in photos]
    # Loaded from elsewhere, named otherwise, in other batches: the same features.
    run(replace(make_backbone(), path="copy.pt"), relative, tmp_path / "cache", batch_size=2, read=reader)
    assert reader.seen == []


def test_images_are_read_batch_by_batch(backbone: Backbone, photos: list[Path], tmp_path: Path) -> None:
    """Not a shard of four at a time, on which a GPU would wait."""
    seen = count_images(backbone)
    with pytest.raises(Stop):
        run(backbone, photos, tmp_path, batch_size=3, read=Reader(photos, most=7))
    assert seen == [3, 1, 3]


def test_a_gpu_gets_the_cores_to_read_and_a_cpu_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten cores among the processes of a machine, of which each keeps two."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(10)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [loader_workers(None, device) for device in (cpu, gpu)] == [0, 8]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert loader_workers(None, gpu) == 1
    assert [loader_workers(3, device) for device in (cpu, gpu)] == [3, 3]
    assert loader_workers(0, gpu) == 0


@pytest.mark.parametrize(("after", "pooled"), [(0, False), (3, True), (4, False), (9, True)])
def test_interrupted_extraction_goes_on_where_it_stopped(
    backbone: Backbone, photos: list[Path], tmp_path: Path, after: int, pooled: bool
) -> None:
    more: dict[str, Any] = {"pooled": pooled, "resize": 28 if pooled else None}
    with pytest.raises(Stop):
        run(backbone, photos, tmp_path / "cache", (0, 2), read=Reader(photos, most=after), **more)
    reader, seen = Reader(photos), count_images(backbone)
    found = run(backbone, photos, tmp_path / "cache", (0, 2), read=reader, **more)
    whole = after // 4 * 4
    assert reader.seen == list(range(whole, 10))
    assert sum(seen) == 10 - whole
    assert stored(found.folder) == stored(run(backbone, photos, tmp_path / "whole", (0, 2), **more).folder)


CHILD = """
import time
from pathlib import Path
import numpy as np
from skipless.datasets.images import read_image
from skipless.eval import features
from skipless.eval.backbones import load_backbone
from skipless.common import distributed

def main(words):
    checkpoint, photos, cache, log = map(Path, words[:4])
    paths = [photos / f"{i}.png" for i in range(10)]
    save, saved = np.save, []

    def slow_save(file, array):
        saved.append(array)
        if len(saved) == int(words[4]):
            file.write(b"half of a file")
            file.flush()
            Path(f"{log}.hangs").touch()
            time.sleep(60)
        save(file, array)

    def read(index):
        with open(f"{log}.{distributed.rank()}", "a") as file:
            file.write(f"{index}\\n")
        return read_image(paths[index])

    features.SHARD, np.save = 4, slow_save
    distributed.start("cpu")
    features.extract(load_backbone(checkpoint), paths, read, 24, (0, 2), cache)
    distributed.stop()
"""


@pytest.fixture
def child(backbone: Backbone, photos: list[Path], tmp_path: Path) -> tuple[str, list[object]]:
    """A script that extracts blocks 0 and 2 of the photos, and its words but for the write during which it hangs."""
    (tmp_path / "child.py").write_text(CHILD)
    state = {"teacher": backbone.model.state_dict(), "architecture": backbone.model.architecture}
    torch.save(state, tmp_path / "tiny.pt")
    return str(tmp_path / "child.py"), [tmp_path / "tiny.pt", photos[0].parent, tmp_path / "cache", tmp_path / "log"]


def read_by(rank: int, tmp_path: Path) -> list[int]:
    return [int(line) for line in (tmp_path / f"log.{rank}").read_text().split()]


def test_killed_extraction_goes_on_where_it_stopped(
    backbone: Backbone, photos: list[Path], tmp_path: Path, child: tuple[str, list[object]]
) -> None:
    """Killed with half of the second shard's second block written."""
    script, words = child
    running = start(script, [*words, 4])
    deadline = time.monotonic() + 60
    while not (tmp_path / "log.hangs").exists() and running.process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    running.process.kill()
    assert running.wait().returncode == -signal.SIGKILL
    assert read_by(0, tmp_path) == list(range(8))
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.npy")}
    assert len(written) == 3

    reader = Reader(photos)
    found = run(backbone, photos, tmp_path / "cache", (0, 2), read=reader)
    assert reader.seen == list(range(4, 10))  # the first shard was whole
    assert written == {path: path.stat().st_mtime_ns for path in written}
    fresh = run(make_backbone(), photos, tmp_path / "fresh", (0, 2))
    assert found.folder.name == fresh.folder.name
    for block in (0, 2):
        torch.testing.assert_close(
            found.read(range(10), (block,)), fresh.read(range(10), (block,)), atol=2e-3, rtol=2e-3
        )


def test_two_processes_share_the_work_and_leave_the_same_cache(
    backbone: Backbone, photos: list[Path], tmp_path: Path, child: tuple[str, list[object]]
) -> None:
    script, words = child
    run_group(script, [*words, 0])
    assert sorted(read_by(0, tmp_path)) == [0, 1, 2, 3, 8, 9]
    assert sorted(read_by(1, tmp_path)) == [4, 5, 6, 7]
    one = run(backbone, photos, tmp_path / "one", (0, 2))
    (two,) = (tmp_path / "cache").iterdir()
    assert two.name == one.folder.name
    assert stored(two).keys() == stored(one.folder).keys()
    shared = replace(one, folder=two)
    torch.testing.assert_close(shared.read(range(10), (0, 2)), one.read(range(10), (0, 2)), atol=2e-3, rtol=2e-3)
    reader = Reader(photos)
    run(backbone, photos, tmp_path / "cache", (0, 2), read=reader)
    assert reader.seen == []


def fails(words: str, *arguments: Any, **more: Any) -> str:
    with pytest.raises(ValueError, match=words) as error:
        run(*arguments, **more)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_truncated_jpeg_is_named(backbone: Backbone, photos: list[Path], tmp_path: Path, workers: int) -> None:
    cut = tmp_path / "photos" / "cut.jpg"
    Image.open(photos[0]).save(cut)
    cut.write_bytes(cut.read_bytes()[:-40])
    paths = [*photos[:5], cut, *photos[5:]]
    message = fails("truncated", backbone, paths, tmp_path / "cache", read=Reader(paths), workers=workers)
    assert message.count(str(cut)) == 1
    assert len(stored(tmp_path / "cache")) == 1


def test_image_is_named_where_its_reader_does_not_name_it(
    backbone: Backbone, photos: list[Path], tmp_path: Path
) -> None:
    def read(index: int) -> np.ndarray:
        if index == 6:
            raise OSError("image file is truncated")
        return read_image(photos[index])

    assert fails("truncated", backbone, photos, tmp_path / "cache", read=read).startswith(str(photos[6]))


def test_missing_image_is_named(backbone: Backbone, photos: list[Path], tmp_path: Path) -> None:
    photos[7].unlink()
    with pytest.raises(ValueError, match=r"7\.png: No such file"):
        run(backbone, photos, tmp_path / "cache")


@pytest.mark.parametrize(
    ("value", "words"), [(torch.nan, "NaN or infinite"), (torch.inf, "NaN or infinite"), (7e4, "beyond half precision")]
)
def test_features_that_are_no_numbers_name_image_and_block(
    backbone: Backbone, photos: list[Path], tmp_path: Path, value: float, words: str
) -> None:
    """One image has them, the seventh, the third of its shard and the first of its batch."""
    original = Backbone.features
    seen = itertools.count()

    def poisoned(self: Backbone, images: torch.Tensor, *arguments: Any) -> Any:
        found = original(self, images, *arguments)
        if next(seen) == 3:
            found[1].patches[0, 1, 2, 5] = value
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Backbone, "features", poisoned)
        message = fails(words, backbone, photos, tmp_path / "cache", (0, 1), batch_size=2)
    assert str(photos[6]) in message
    assert "block 2 of tiny.pt" in message
    assert len(stored(tmp_path / "cache")) == 2  # the first shard of both blocks
    run(backbone, photos, tmp_path / "cache", (0, 1))


def test_images_that_are_no_files_are_named_in_errors(backbone: Backbone, tmp_path: Path) -> None:
    """And a crop that is larger than what it is cut out of is refused."""
    paths = [Path(f"train.npz[{row}]") for row in range(6)]
    white = np.full((20, 28, 3), 255, np.uint8)

    def read(index: int) -> np.ndarray:
        if index == 5:
            raise ValueError("row of another shape")
        return white

    for more, words in (
        ({"resize": 28}, r"^train\.npz\[5\]: row of another shape$"),
        ({"resize": 23}, r"^train\.npz\[0\]: cannot cut 24 pixels out of a short side of 23"),
    ):
        fails(words, backbone, paths, tmp_path / "cache", read=read, identity="x", pooled=True, **more)


def test_largest_half_number_is_kept(backbone: Backbone, photos: list[Path], tmp_path: Path) -> None:
    backbone.model.norm.weight.zero_()
    backbone.model.norm.bias.fill_(65504.0)
    assert (run(backbone, photos, tmp_path / "cache").read([0], (2,)) == 65504).all()


def test_size_block_and_disk_that_do_not_do(
    backbone: Backbone, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    fails("size 30 is no multiple of the patch, 8 pixels; use 24 or 32", backbone, photos, cache, size=30)
    fails("size 5 is no multiple of the patch, 8 pixels; use 8", backbone, photos, cache, size=5)
    fails("size 0 .* use 8", backbone, photos, cache, size=0)
    fails("block 3 does not exist: this model has blocks 0 to 2", backbone, photos, cache, (3,))
    fails("block -4 does not exist", backbone, photos, cache, (-4,))
    assert not cache.exists()

    # 10 images of 1 + 3 x 3 tokens of 32 numbers of 2 bytes, two blocks.
    usage, need = namedtuple("usage", "free"), 10 * 10 * 32 * 2 * 2
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(need - 1))
    fails("the features need .* free", backbone, photos, cache, (0, 2))
    assert not list(cache.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(need))
    found = run(backbone, photos, cache, (0, 2))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0))
    run(backbone, photos, cache, (0, 2))  # nothing to write
    with pytest.raises(ValueError, match="block 1 was not extracted, only 0, 2"):
        found.read([0], (1,))


def test_a_user_without_a_home_has_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda _: {}["uid not found"])
    assert Path(tempfile.gettempdir()) in default_cache().parents


def test_a_cache_is_bounded_listed_and_cleared(
    backbone: Backbone,
    photos: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    cache = tmp_path / "cache"
    (cache / "mine").mkdir(parents=True)

    def extracted(size: int, days_ago: float) -> Path:
        folder = run(backbone, photos, cache, (0,), size=size).folder
        os.utime(folder / "about.json", 2 * (time.time() - 86_400 * days_ago,))
        return folder

    used, unused, today = extracted(8, 20), extracted(16, 10), extracted(24, 0.5)
    run(backbone, photos, cache, (0,), size=8)  # which is a use
    assert [entry.folder for entry in kept_features(cache)] == [unused, today, used]
    monkeypatch.setattr(module, "LIMIT", sum(entry.bytes for entry in kept_features(cache)))
    new = extracted(32, 0)
    assert [folder.exists() for folder in (used, unused, today, new)] == [True, False, True, True]
    newer = extracted(40, 0)  # nothing else may go: all of it was used today
    assert all(folder.exists() for folder in (used, today, new, newer))

    capsys.readouterr()
    main_of_cache(["--cache", str(cache)])
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 5
    assert "10 images at 24 pixels, used " in listed[0] + listed[1] + listed[2]
    main_of_cache(["--cache", str(cache), "--clear"])
    assert capsys.readouterr().out.splitlines()[-1].startswith("deleted: ")
    assert [path.name for path in cache.iterdir()] == ["mine"]
