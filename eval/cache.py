"""What the evaluations keep of features: a list of it, or an empty cache.

    python eval/cache.py
    python eval/cache.py --clear

Features that were computed once are kept on the disk for later evaluations of the same weights and images. A cache
stays below 100 GB and half of the disk that it could have: what was not used for a day goes, the longest unused first,
when there are new features to keep. Deleting all of them costs nothing but the time to compute them again.
"""

import skipless.common.interruption  # noqa: F401

import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from skipless.common import cli
from skipless.common.files import printable
from skipless.common.progress import duration
from skipless.eval.features import default_cache, kept_features


@dataclass
class Settings:
    """The cache of features."""

    cache: str | None = None
    """Its folder; by default ~/.cache/skipless/features."""
    clear: bool = False
    """Delete the features in it. Evaluations that run now may need them."""


def show(settings: Settings) -> None:
    """Print what is kept, the longest unused first, or delete it."""
    cache = Path(settings.cache) if settings.cache else default_cache()
    kept = kept_features(cache)
    for entry in kept:
        about, since = entry.about, duration(time.time() - entry.used)
        images = f"{about['images']:,} images at {about['size']} pixels"
        print(f"{entry.bytes / 1e9:8.2f} GB  {printable(about['path'])}, {images}, used {since} ago")
        if settings.clear:
            shutil.rmtree(entry.folder)
    total = f"{sum(entry.bytes for entry in kept) / 1e9:.2f} GB in {cache}"
    print(f"deleted: {total}" if settings.clear else f"{total}; --clear deletes them")


main = partial(cli.run, show, Settings, __doc__)

if __name__ == "__main__":
    main()
