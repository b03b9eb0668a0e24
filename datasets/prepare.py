"""Download public data sets, check them, and lay them out as the other commands of this project read them.

    python datasets/prepare.py voc12 --dry-run              # what it would fetch, how much, and under which terms
    python datasets/prepare.py voc12                        # data/VOCdevkit/VOC2012
    python datasets/prepare.py coco20k --root /data --keep-archives
    python datasets/prepare.py imagenet --archives ~/Downloads

    voc07          PASCAL VOC 2007, trainval and test               object discovery
    voc12          PASCAL VOC 2012 with SBD's masks (trainaug)      segmentation, object discovery
    coco20k        the 19,817 images of COCO's train2014            object discovery
    coco-val2017   COCO's 5,000 validation images of 2017           object discovery
    coco-stuff     COCO-Stuff on the images of 2017                 segmentation
    ade20k         ADE20K, scene parsing benchmark                  segmentation
    cityscapes     Cityscapes, from the archives you have           segmentation
    pascal-context Pascal Context, 59 classes, on VOC 2010          segmentation
    davis17        DAVIS 2017, train and val, 480p                  video
    nyuv2          NYUv2's 1,449 labeled images                     depth
    spair          SPair-71k                                        correspondence
    ecssd          ECSSD                                            saliency
    duts-te        DUTS, test                                       saliency
    imagenette     10 classes of ImageNet, short side 320           pretraining, classification
    tiny-imagenet  200 classes of ImageNet, 64 x 64 pixels          pretraining, classification
    imagenet       ILSVRC 2012, from the archives you have          pretraining, classification

First it says what is missing, how much it fetches, how long that may take and how much disk it needs; it stops there
with --dry-run, and where the disk is too small. An interrupted download goes on where it stopped, with the same
command. Archives are compared with published checksums, unpacked beside and moved to their place once every image is
counted; what is there already is left as it is. Archives that you have are used where they lie (--archives) and never
changed. Without access to a site, fetch its archive by other means and do the same.

The last line is the command to run next. The images belong to others: read the terms that the plan names.
"""

import skipless.common.interruption  # noqa: F401

import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from skipless.common import cli
from skipless.datasets.public.downloads import Archive, DamagedArchive, download, verify
from skipless.datasets.public.sets import DATA_SETS, DataSet, Part

FETCHED = ".fetched"
"""File in ROOT/downloads that lists what was fetched: nothing else there is ever removed."""
RATE = 20e6
"""Bytes a second that the estimate of time assumes."""


@dataclass
class Settings:
    """Which data set, and where to."""

    name: str
    """Data set: one of the list above."""
    root: Path = Path("data")
    """Where data sets go."""
    archives: Path | None = None
    """Folder of archives that are there already; used and never changed."""
    mirror: str | None = None
    """Folder on the web that is asked first, for URL/ARCHIVE."""
    dry_run: bool = False
    """Say what would be done, and do nothing."""
    keep_archives: bool = False
    """Leave downloaded archives in ROOT/downloads; else they go."""

    @property
    def downloads(self) -> Path:
        """Where downloaded archives go."""
        return self.root / "downloads"


def prepare(settings: Settings, table: Mapping[str, DataSet] = DATA_SETS) -> None:
    """Bring a data set to ROOT, and say on stdout what is done; see the docstring of this file.

    Raises ValueError for too small a disk, sites that give nothing, damaged archives, an incomplete copy in the place
    of a part, and for what the reader refuses; OSError for folders that cannot be written.
    """
    name, root, downloads = settings.name, settings.root, settings.downloads
    if name not in table:
        raise ValueError(f"there is no data set {name}: choose one of {', '.join(table)}")
    if root.exists() and not root.is_dir():
        raise ValueError(f"{root} is a file: give a folder as --root")
    if settings.mirror is not None and "://" not in settings.mirror:
        raise ValueError(f"mirror is {settings.mirror!r}: give an address, as in https://host/archives")
    if settings.archives is not None and not settings.archives.is_dir():
        raise FileNotFoundError(f"{settings.archives}: no such folder of archives")
    data = table[name]
    next_command = f"next: {data.next.format(root=shlex.quote(str(root)))}"
    missing = [part for part in data.parts if not _is_there(part, root)]
    if not missing:
        print(f"{name} is in {root}: {_describe(data.parts)}. Nothing to do.\n{next_command}")
        return
    print(f"{name} to {root}: {_describe(missing)}\nterms: {data.terms}")
    _plan(settings, missing, data.terms)
    if settings.dry_run:
        return

    for part in missing:
        paths = [_obtain(archive, settings) for archive in part.archives]
        # What this command did not fetch, in ROOT/downloads too, may be its user's only copy.
        fetched = _fetched(downloads)
        ours = [path for path in paths if path.parent == downloads and path.name in fetched]
        _build(part, paths, [path for path in ours if not _has_checksum(path, part)], root)
        if not settings.keep_archives:
            for path in ours:
                path.unlink()
    if downloads.is_dir() and {path.name for path in downloads.iterdir()} <= {FETCHED}:
        shutil.rmtree(downloads)
    data.read(root)
    print(f"{name} is in {root}: {_describe(data.parts)}.\n{next_command}")


def _is_there(part: Part, root: Path) -> bool:
    place = root / part.place
    if not place.exists():
        return False
    lack = _lack(part, place, root)
    if lack:
        raise ValueError(
            f"{place}: an incomplete copy, with {lack}, is left as it is; move it away, or give another --root"
        )
    return True


def _lack(part: Part, place: Path, root: Path) -> str:
    """As in "2 of 3 (train)", of the first split that is not complete; empty where all are."""
    counts = part.count(place, root)
    for split, expected in part.expected.items():
        if counts[split] < expected:
            return f"{counts[split]:,} of {expected:,} ({split})"
    return ""


def _plan(settings: Settings, missing: Sequence[Part], terms: str) -> None:
    """Print what will be done. Raises ValueError where the disk is too small, or where an archive must come from the
    user."""
    to_fetch = peak = used = 0.0
    absent = [
        archive.name
        for part in missing
        for archive in part.archives
        if not (archive.urls or settings.mirror or _find(archive, settings))
    ]
    for part in missing:
        fetch = sum(_announce(archive, settings) for archive in part.archives)
        to_fetch += fetch
        peak = max(peak, used + fetch + part.disk)
        used += part.disk + (fetch if settings.keep_archives else 0)
    existing = next(folder for folder in (settings.root, *settings.root.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    minutes = to_fetch / RATE / 60
    time = f"about {minutes:.0f} min" if minutes >= 1 else "less than a minute"
    if to_fetch:
        print(f"download: {_bytes(to_fetch)}, {time} at {RATE / 1e6:.0f} MB/s, then unpacking")
    print(f"disk: {_bytes(peak)} while it works, {_bytes(used)} in the end; {_bytes(free)} are free", flush=True)
    if absent:
        raise ValueError(
            f"{', '.join(absent)}: to be had from {terms} once you have agreed to the terms there; put what "
            "you download into one folder and run the same command with --archives FOLDER"
        )
    if peak > free:
        raise ValueError(
            f"{existing}: {_bytes(free)} are free and {_bytes(peak)} needed; make room or give another --root"
        )


def _announce(archive: Archive, settings: Settings) -> float:
    """Print where an archive comes from. Returns how many bytes are to be fetched."""
    checked = "" if archive.checksum else ", no published checksum: compared by size alone"
    if not archive.checksum and not archive.exact:
        checked = ", neither checksum nor exact size are published: compared with what the server says"
    own = _find(archive, settings)
    if own:
        print(f"  {archive.name}: is in {own.parent}{checked}")
        return 0
    if not archive.urls and not settings.mirror:
        print(f"  {archive.name}: {_bytes(archive.size)}, not there")
        return 0
    partial = settings.downloads / f"{archive.name}.partial"
    have = partial.stat().st_size if partial.exists() else 0
    left = max(archive.size - have, 0)
    site = settings.mirror or archive.urls[0]
    rest = f" left of {_bytes(archive.size)}" if have else ""
    print(f"  {archive.name}: {_bytes(left)}{rest} from {site.split('/')[2]}{checked}")
    return left


def _find(archive: Archive, settings: Settings) -> Path | None:
    """The archive as its user has it, or as it was downloaded before."""
    places = [folder / archive.name for folder in (settings.archives, settings.downloads) if folder is not None]
    return next((path for path in places if path.is_file()), None)


def _fetched(downloads: Path) -> list[str]:
    """Names of the archives in ROOT/downloads that this command fetched, now or before it was interrupted."""
    record = downloads / FETCHED
    return record.read_text(encoding="utf-8").splitlines() if record.exists() else []


def _obtain(archive: Archive, settings: Settings) -> Path:
    own = _find(archive, settings)
    if own is None:
        path = download(archive, settings.downloads, settings.mirror)
        with open(settings.downloads / FETCHED, "a", encoding="utf-8") as file:
            file.write(f"{path.name}\n")
        return path
    try:
        verify(archive, own)
    except DamagedArchive as error:
        raise DamagedArchive(f"{error}; remove or replace it, and run the same command again") from error
    return own


def _has_checksum(path: Path, part: Part) -> bool:
    """Whether the archive was compared with a published checksum: fetched again, it would be the same."""
    return any(archive.checksum is not None for archive in part.archives if archive.name == path.name)


def _build(part: Part, paths: Sequence[Path], doubtful: Sequence[Path], root: Path) -> None:
    """Make a part beside its place, and move it there once it is complete. Where it does not become complete, the
    doubtful ones among its archives go."""
    place = root / part.place
    work = place.parent / f".{place.name}.unfinished"
    shutil.rmtree(work, ignore_errors=True)  # of a process that was killed
    work.mkdir(parents=True)
    try:
        result = part.build(paths, work, root)
        lack = _lack(part, result, root)
        if lack:
            raise DamagedArchive(f"{_names(paths) or part.place}: gives {lack} for {part.place}")
        result.rename(place)
    except DamagedArchive as error:
        for path in doubtful:
            path.unlink()
        advice = (
            f"{_names(doubtful)} was removed: run the same command again"
            if doubtful
            else "the archives were left as they are; get them anew if they may be damaged"
        )
        raise ValueError(f"{error}; {advice}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(path.name for path in paths)


def _describe(parts: Sequence[Part]) -> str:
    return ", ".join(
        f"{part.place} ({', '.join(f'{split} {count:,}' for split, count in part.expected.items())})" for part in parts
    )


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.{1 if unit == 'GB' else 0}f} {unit}"
    return f"{count:.0f} bytes"


main = partial(cli.run, prepare, Settings, __doc__, positional=True)

if __name__ == "__main__":
    main()
