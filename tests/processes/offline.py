"""Every command where no socket to another machine can be made; sockets within this one carry loader workers' data."""

import json
import socket
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers import ROOT, call, load

from skipless import __main__ as skipless


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook; it stays in this process and in those forked from it."""
    families = (socket.AF_INET, socket.AF_INET6)
    if (event == "socket.__new__" and arguments[1] in families) or event in ("socket.getaddrinfo", "socket.sendto"):
        raise RuntimeError(f"{event} is blocked")


def main(words: Sequence[str]) -> None:
    """Write to the file OUT what became of every command: {name: its error, or ""}."""
    folder, out = Path(words[0]), Path(words[1])
    miniatures = load(ROOT / "benchmarks/miniatures.py")
    miniatures.write_data(folder)
    lines = miniatures.command_lines(folder, folder / "out")
    lines["pretrain from a URL"] = ["--data.path=http://127.0.0.1:9/", f"--out={folder}/url", *miniatures.PRETRAINING]
    sys.addaudithook(refuse)
    ended = {}
    for name, line in lines.items():
        try:
            done = call(skipless.main, [name.split()[0], *line])
            ended[name] = done.stderr if done.returncode else ""
        except Exception:
            ended[name] = traceback.format_exc()
    out.write_text(json.dumps(ended))
