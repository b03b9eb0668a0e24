"""The images of a step and their views are a function of (seed, step): a resumed run, on another number of processes,
sees what the uninterrupted one would have seen."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from skipless.common import distributed
from skipless.datasets.images import ImageSource, open_images
from skipless.datasets.storage.packing import write_shards
from skipless.ssl.data.crops import CropDataset, Crops, collate
from skipless.ssl.data.loader import StepBatches

IMAGES, BATCH, TOTAL, SEED = 23, 8, 7, 3  # two steps an epoch, and seven images left over in each
CROPS = Crops(global_crops_size=16, local_crops_size=8, local_crops_number=2)

Step = Counter[tuple[int, bytes]]


def run(
    images: ImageSource,
    monkeypatch: pytest.MonkeyPatch,
    processes: int,
    start: int,
    stop: int,
    accumulate: int = 1,
    workers: int = 0,
) -> list[Step]:
    """Of each step the images and the bytes of their views, over all processes, one after the other."""
    steps: list[Step] = [Counter() for _ in range(start, stop)]
    for rank in range(processes):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: processes)
        batches = StepBatches(len(images), BATCH, accumulate, SEED, start, TOTAL)
        loader = DataLoader(
            CropDataset(images, CROPS, SEED), batch_sampler=batches, collate_fn=collate, num_workers=workers
        )
        for number, batch in enumerate(loader):
            if number >= len(steps) * accumulate:  # where the run was killed, with batches under way
                break
            assert len(batch["index"]) == BATCH // (processes * accumulate)
            for position, index in enumerate(batch["index"].tolist()):
                views = batch["global"][:, position].numpy().tobytes() + batch["local"][:, position].numpy().tobytes()
                steps[number // accumulate][index, views] += 1
    return steps


@pytest.fixture(params=["folder", "shards", "shards without index"])
def images(request: pytest.FixtureRequest, tmp_path: Path) -> ImageSource:
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        path = tmp_path / f"photos/{number % 2}/{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(path)
    if request.param == "folder":
        (tmp_path / "photos/0/04.png").write_bytes(b"")  # its neighbor is seen in its place
        return open_images(tmp_path / "photos")
    write_shards(open_images(tmp_path / "photos"), tmp_path / "shards", shard_size=9000)
    if request.param == "shards without index":
        (tmp_path / "shards/shards.npz").unlink()
    return open_images(tmp_path / "shards")


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 2), (2, 1), (2, 4)])
@pytest.mark.parametrize("stopped", [1, 4])  # in the middle of an epoch, and at the end of one
def test_a_resume_sees_what_the_uninterrupted_run_would_have_seen(
    images: ImageSource, monkeypatch: pytest.MonkeyPatch, before: int, after: int, stopped: int
) -> None:
    whole = run(images, monkeypatch, 1, 0, TOTAL)
    resumed = run(images, monkeypatch, before, 0, stopped) + run(images, monkeypatch, after, stopped, TOTAL)
    assert resumed == whole
    assert all(step.total() == BATCH for step in whole)


def test_neither_micro_batches_nor_workers_change_a_step(images: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(images, monkeypatch, 2, 0, TOTAL)
    assert (
        run(images, monkeypatch, 1, 0, 2, accumulate=4) + run(images, monkeypatch, 2, 2, TOTAL, accumulate=2) == whole
    )
    assert run(images, monkeypatch, 2, 3, TOTAL, workers=2) == whole[3:]


def test_an_epoch_shows_no_image_twice_and_differs_from_the_last(
    images: ImageSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the tests above cannot pass on an order or on views that are always the same."""
    steps = run(images, monkeypatch, 2, 0, TOTAL)
    keys = [key for rank in range(2) for key in keys_of(monkeypatch, rank)]
    first, second = ({index for epoch, index in keys if epoch == wanted} for wanted in (0, 1))
    assert len(first) == len(second) == 2 * BATCH
    assert first != second
    assert len({views for step in steps for _, views in step}) == TOTAL * BATCH


def keys_of(monkeypatch: pytest.MonkeyPatch, rank: int) -> list[tuple[int, int]]:
    """Of two processes, over two epochs."""
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    return [key for batch in StepBatches(IMAGES, BATCH, 1, SEED, 0, 4) for key in batch]


@pytest.mark.parametrize("images", ["folder"], indirect=True)
def test_shards_give_the_views_of_their_folder(
    images: ImageSource, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "photos/0/04.png").write_bytes((tmp_path / "photos/0/06.png").read_bytes())
    write_shards(images, tmp_path / "shards", shard_size=9000)
    assert run(open_images(tmp_path / "shards"), monkeypatch, 2, 0, 4) == run(images, monkeypatch, 1, 0, 4)
