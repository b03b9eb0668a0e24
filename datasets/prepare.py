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

import argparse
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from skipless.datasets.public.downloads import Archive, DamagedArchive, download, verify
from skipless.datasets.public.sets import DATA_SETS, IMAGENET_TERMS, DataSet, Part

FETCHED = ".fetched"
"""File in ROOT/downloads that lists what was fetched: nothing else there is ever removed."""
RATE = 20e6
"""Bytes a second that the estimate of time assumes."""


def prepare(
    name: str,
    root: str | Path,
    archives: str | Path | None = None,
    mirror: str | None = None,
    dry_run: bool = False,
    keep_archives: bool = False,
    table: Mapping[str, DataSet] = DATA_SETS,
) -> None:
    """Bring a data set to ROOT, say what is done on stdout; see the docstring of this file.

    Args:
        name: in `table`.
        archives: folder of archives that are there already. Nothing is changed in it.
        mirror: address of a folder with the archives, asked before the sites of `table`.
        dry_run: print the plan alone.
        keep_archives: leave what was downloaded in ROOT/downloads.

    Raises ValueError for too small a disk, sites that give nothing, damaged archives, an incomplete copy in the place
    of a part, and for what the reader refuses; OSError for folders that cannot be written.
    """
    data, root = table[name], Path(root).expanduser()
    if root.exists() and not root.is_dir():
        raise ValueError(f"{root} is a file: give a folder as --root")
    if mirror is not None and "://" not in mirror:
        raise ValueError(f"mirror is {mirror!r}: give an address, as in https://host/archives")
    own = Path(archives).expanduser() if archives else None
    if own is not None and not own.is_dir():
        raise FileNotFoundError(f"{own}: no such folder of archives")
    downloads = root / "downloads"
    missing = [part for part in data.parts if not _is_there(part, root)]
    if not missing:
        print(f"{name} is in {root}: {_describe(data.parts)}. Nothing to do.")
        print(f"next: {data.next.format(root=shlex.quote(str(root)))}")
        return
    _plan(name, data, missing, root, own, downloads, mirror, keep_archives)
    if dry_run:
        return

    for part in missing:
        paths = [_obtain(archive, own, downloads, mirror) for archive in part.archives]
        # What this command did not fetch, in ROOT/downloads too, may be its user's only copy.
        fetched = _fetched(downloads)
        ours = [path for path in paths if path.parent == downloads and path.name in fetched]
        _build(part, paths, [path for path in ours if not _has_checksum(path, part)], root)
        if not keep_archives:
            for path in ours:
                path.unlink()
    if downloads.is_dir() and {path.name for path in downloads.iterdir()} <= {FETCHED}:
        shutil.rmtree(downloads)
    data.read(root)
    print(f"{name} is in {root}: {_describe(data.parts)}.")
    print(f"next: {data.next.format(root=shlex.quote(str(root)))}")


def _is_there(part: Part, root: Path) -> bool:
    place = root / part.place
    if not place.exists():
        return False
    found = part.count(place, root)
    for split, expected in part.expected.items():
        if found[split] < expected:
            raise ValueError(
                f"{place}: an incomplete copy, with {found[split]:,} of {expected:,} ({split}), is left as it is; move "
                "it away, or give another --root"
            )
    return True


def _plan(
    name: str,
    data: DataSet,
    missing: Sequence[Part],
    root: Path,
    own: Path | None,
    downloads: Path,
    mirror: str | None,
    keep: bool,
) -> None:
    """Print what will be done. Raises ValueError where the disk is too small, or where an archive must come from the
    user."""
    print(f"{name} to {root}: {_describe(missing)}\nterms: {data.terms}")
    fetched = peak = used = 0.0
    absent = []
    for part in missing:
        here = 0.0
        for archive in part.archives:
            found = _find(archive, own, downloads)
            partial = downloads / f"{archive.name}.partial"
            have = partial.stat().st_size if partial.exists() else 0
            checked = "" if archive.checksum else ", no published checksum: compared by size alone"
            if not archive.checksum and not archive.exact:
                checked = ", neither checksum nor exact size are published: compared with what the server says"
            if found:
                print(f"  {archive.name}: is in {found.parent}{checked}")
            elif not archive.urls and not mirror:
                print(f"  {archive.name}: {_bytes(archive.size)}, not there")
                absent.append(archive.name)
            else:
                left = max(archive.size - have, 0)
                site = mirror or archive.urls[0]
                print(
                    f"  {archive.name}: {_bytes(left)}{f' left of {_bytes(archive.size)}' if have else ''} from "
                    f"{site.split('/')[2] if '://' in site else site}{checked}"
                )
                here += left
        fetched += here
        peak = max(peak, used + here + part.disk)
        used += part.disk + (here if keep else 0)
    existing = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    minutes = fetched / RATE / 60
    time = f"about {minutes:.0f} min" if minutes >= 1 else "less than a minute"
    if fetched:
        print(f"download: {_bytes(fetched)}, {time} at {RATE / 1e6:.0f} MB/s, then unpacking")
    print(f"disk: {_bytes(peak)} while it works, {_bytes(used)} in the end; {_bytes(free)} are free")
    if absent:
        raise ValueError(
            f"{', '.join(absent)}: to be had from {IMAGENET_TERMS} once you have agreed to the terms there; put what "
            "you download into one folder and run the same command with --archives FOLDER"
        )
    if peak > free:
        raise ValueError(
            f"{existing}: {_bytes(free)} are free and {_bytes(peak)} needed; make room or give another --root"
        )
    sys.stdout.flush()


def _find(archive: Archive, own: Path | None, downloads: Path) -> Path | None:
    """The archive as its user has it, or as it was downloaded before."""
    return next((f / archive.name for f in (own, downloads) if f is not None and (f / archive.name).is_file()), None)


def _fetched(downloads: Path) -> list[str]:
    """Names of the archives in ROOT/downloads that this command fetched, now or before it was interrupted."""
    record = downloads / FETCHED
    return record.read_text(encoding="utf-8").splitlines() if record.exists() else []


def _obtain(archive: Archive, own: Path | None, downloads: Path, mirror: str | None) -> Path:
    found = _find(archive, own, downloads)
    if found is None:
        path = download(archive, downloads, mirror)
        with open(downloads / FETCHED, "a", encoding="utf-8") as file:
            file.write(f"{path.name}\n")
        return path
    try:
        verify(archive, found)
    except DamagedArchive as error:
        raise DamagedArchive(f"{error}; remove or replace it, and run the same command again") from error
    return found


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
        found = part.count(result, root)
        for split, expected in part.expected.items():
            if found[split] < expected:
                raise DamagedArchive(
                    f"{_names(paths) or part.place}: gives {found[split]:,} of {expected:,} for {part.place} ({split})"
                )
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


def _hyphens(word: str) -> str:
    """In flag names - and _ are the same, as in the other commands."""
    name, equals, value = word.partition("=")
    return (name.replace("_", "-") if name.startswith("--") else name) + equals + value


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: see the docstring of this file."""
    parser = argparse.ArgumentParser(
        prog="datasets/prepare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=list(DATA_SETS), metavar="NAME", help="data set: one of the list above")
    parser.add_argument(
        "--root", type=Path, default=Path("data"), metavar="FOLDER", help="where data sets go; by default data"
    )
    parser.add_argument(
        "--archives", type=Path, metavar="FOLDER", help="archives that are there already; used and never changed"
    )
    parser.add_argument("--mirror", metavar="URL", help="folder on the web that is asked first, for URL/ARCHIVE")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    parser.add_argument(
        "--keep-archives", action="store_true", help="leave downloaded archives in ROOT/downloads; else they go"
    )
    words = [_hyphens(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    chosen = parser.parse_args(words)
    try:
        prepare(chosen.name, chosen.root, chosen.archives, chosen.mirror, chosen.dry_run, chosen.keep_archives)
    except KeyboardInterrupt:
        print(
            "\ninterrupted: the same command goes on; what was downloaded is kept in a .partial file", file=sys.stderr
        )
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
