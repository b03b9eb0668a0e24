"""Archives from a server that drops connections, knows no Range or lies."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import serving

from skipless.datasets.public import downloads
from skipless.datasets.public.downloads import Archive, DamagedArchive, download, verify

CONTENT = np.random.default_rng(0).integers(0, 256, 3_000_000, dtype=np.uint8).tobytes()
NAME = "some.zip"


@dataclass
class Site:
    """A web server with one file at every path, and its faults."""

    content: bytes = CONTENT
    ranges: bool = True
    """Whether it knows Range."""
    drop_after: list[int] = field(default_factory=list)
    """For each of the first requests, after how many bytes the connection breaks."""
    chunked: bool = False
    """Whether it keeps the length to itself."""
    seconds_per_block: float = 0
    asked: list[str | None] = field(default_factory=list)
    """The Range header of each request."""
    url: str = ""


@contextmanager
def serve(site: Site) -> Iterator[Site]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers["Range"]
            site.asked.append(wanted)
            start = 0
            if wanted and site.ranges:
                start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])  # type: ignore[index]
                if start >= len(site.content):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(site.content)}")
                    self.end_headers()
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(site.content) - 1}/{len(site.content)}")
            else:
                self.send_response(200)
            body = site.content[start:]
            if not site.chunked:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if len(site.asked) <= len(site.drop_after):
                body = body[: site.drop_after[len(site.asked) - 1]]
            for position in range(0, len(body), 100_000):
                try:
                    self.wfile.write(body[position : position + 100_000])
                except OSError:
                    return
                time.sleep(site.seconds_per_block)

        def log_message(self, *arguments: object) -> None:
            pass

    with serving(Handler) as site.url:
        yield site


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "PAUSE", 0.0)


def archive(*urls: str, content: bytes = CONTENT) -> Archive:
    return Archive(
        NAME, len(content), tuple(f"{url}/x/{NAME}" for url in urls), f"md5:{hashlib.md5(content).hexdigest()}"
    )


def unreachable() -> str:
    """An address of this machine at which nothing listens."""
    with serve(Site()) as site:
        return site.url


HALF = CONTENT[:1_000_001]
CASES: dict[str, tuple[bytes | None, dict[str, Any], bool, list[str | None]]] = {
    "nothing is there": (None, {}, True, [None]),
    "connections drop": (None, {"drop_after": [1_500_000, 500_000]}, True, [None, "bytes=1500000-", "bytes=2000000-"]),
    "part of an earlier run": (HALF, {}, True, ["bytes=1000001-"]),
    # Of a run that was killed between the last byte and the new name.
    "all of an earlier run": (CONTENT, {}, True, []),
    "all, of unknown size": (CONTENT, {}, False, ["bytes=3000000-"]),
    "too long": (CONTENT + b"more", {}, True, [None]),
    "too long, of unknown size": (CONTENT + b"more", {}, False, ["bytes=3000004-", None]),
    "no Range": (b"x" * 1_000_000, {"ranges": False}, True, ["bytes=1000000-"]),  # would be kept by appending
}


@pytest.mark.parametrize("case", CASES)
def test_a_download_starts_or_goes_on_and_is_whole(tmp_path: Path, case: str) -> None:
    partial, faults, exact, asked = CASES[case]
    folder = tmp_path / "new"
    if partial is not None:
        folder.mkdir()
        (folder / f"{NAME}.partial").write_bytes(partial)
    with serve(Site(**faults)) as site:
        path = download(replace(archive(site.url), exact=exact), folder)
    assert path == folder / NAME
    assert path.read_bytes() == CONTENT
    assert os.listdir(folder) == [NAME]
    assert site.asked == asked


def test_server_that_gets_no_further_is_given_up(tmp_path: Path) -> None:
    with serve(Site(ranges=False, drop_after=[1_000_000] * 9)) as site:
        with pytest.raises(ValueError, match=r"sent 1,000,000 of 3,000,000 bytes"):
            download(archive(site.url), tmp_path)
        assert len(site.asked) == 2


def test_length_unknown_and_cut_off_is_found_by_size(tmp_path: Path) -> None:
    with (
        serve(Site(chunked=True, drop_after=[2_000_000])) as site,
        pytest.raises(ValueError, match="has 2,000,000 byte"),
    ):
        download(archive(site.url), tmp_path)


def test_mirrors_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serve(Site(content=b"an error page")) as wrong, serve(Site()) as right, serve(Site()) as last:
        path = download(archive(wrong.url, right.url, last.url), tmp_path, mirror=unreachable())
        assert path.read_bytes() == CONTENT
        assert [len(site.asked) for site in (wrong, right, last)] == [1, 1, 0]
    said = capsys.readouterr().err
    assert "refused" in said
    assert f"has 13 bytes, and {NAME} has 3,000,000" in said


def test_mirror_is_a_folder_with_the_archive(tmp_path: Path) -> None:
    with serve(Site()) as site:
        assert download(archive(unreachable()), tmp_path, mirror=f"{site.url}/pub/").read_bytes() == CONTENT


def test_all_unreachable_says_what_to_do(tmp_path: Path) -> None:
    first, second = unreachable(), unreachable()
    with pytest.raises(ValueError, match=r"--archives FOLDER") as caught:
        download(archive(first, second), tmp_path)
    text = str(caught.value)
    assert "\n" not in text
    assert f"fetch {first}/x/{NAME} by other means" in text
    assert f"{second}/x/{NAME}: " in text
    assert os.listdir(tmp_path) == []


def test_404_and_other_kinds_of_address(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(CONTENT)
    with pytest.raises(ValueError, match="no http or https address"):
        download(replace(archive(), urls=((tmp_path / "secret").as_uri(),)), tmp_path)
    with serve(Site(content=b"")) as site:
        (tmp_path / f"{NAME}.partial").write_bytes(b"abc")
        with pytest.raises(ValueError, match="has 0 bytes"):  # 416 and another length: begins again, and sees
            download(archive(site.url), tmp_path)


def test_wrong_checksum_is_removed_and_the_next_site_asked(tmp_path: Path) -> None:
    other = bytes(len(CONTENT))
    with serve(Site(content=other)) as wrong, serve(Site()) as right:
        with pytest.raises(ValueError, match=r"its md5 is \w+, and \w+ was published; it was removed"):
            download(archive(wrong.url), tmp_path)
        assert os.listdir(tmp_path) == []
        assert download(archive(wrong.url, right.url), tmp_path).read_bytes() == CONTENT


def test_verify(tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.write_bytes(CONTENT)
    sha256 = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
    verify(replace(archive(), checksum=sha256), path)
    verify(replace(archive(), checksum=None), path)
    verify(replace(archive(), size=5, exact=False), path)
    with pytest.raises(DamagedArchive, match=r"has 3,000,000 bytes, and some\.zip has 5"):
        verify(replace(archive(), size=5), path)
    with pytest.raises(DamagedArchive, match="sha256"):
        verify(replace(archive(), checksum=sha256[:-1] + ("0" if sha256[-1] != "0" else "1")), path)


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL])
def test_killed_download_can_be_continued(tmp_path: Path, kill: signal.Signals) -> None:
    # A shell that starts the tests in the background makes them ignore SIGINT, and their processes inherit that.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pathlib import Path; from skipless.datasets.public.downloads import Archive, download\n"
        "download(Archive(sys.argv[1], 3_000_000, (sys.argv[2],)), Path(sys.argv[3]))"
    )
    partial = tmp_path / f"{NAME}.partial"
    with serve(Site(seconds_per_block=0.1)) as site:  # 3 s
        words = [sys.executable, "-P", "-c", code, NAME, f"{site.url}/{NAME}", str(tmp_path)]
        process = subprocess.Popen(words, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 30
        while not (partial.exists() and partial.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(kill)
        process.communicate(timeout=30)
        assert process.returncode != 0
        assert os.listdir(tmp_path) == [partial.name]
        have = partial.stat().st_size
        assert 0 < have < len(CONTENT)
        assert CONTENT.startswith(partial.read_bytes())
        site.seconds_per_block = 0
        assert download(archive(site.url), tmp_path).read_bytes() == CONTENT
        assert site.asked == [None, f"bytes={have}-"]
