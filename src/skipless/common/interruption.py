"""Ctrl-C while a command is still importing its modules, which takes seconds: each command imports this file first."""

import multiprocessing
import os
import signal
import sys
from pathlib import Path

SENTENCE = "interrupted before anything was begun"


def end(*_: object) -> None:
    """End at once. A KeyboardInterrupt would be a traceback, or be lost: torch goes on where NumPy cannot be had."""
    os.write(2, f"{SENTENCE}\n".encode())
    os._exit(130)


def begin() -> None:
    """Leave Ctrl-C to the command, which is about to begin."""
    if signal.getsignal(signal.SIGINT) == end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


_program = Path(sys.argv[0])
_is_console = _program.name == "skipless" or _program.parts[-2:] == ("skipless", "__main__.py")
_is_command = _is_console or _program.parent.name in ("ssl", "eval", "datasets")
# Not in a test or a notebook that imports a command, nor where Ctrl-C is ignored. Workers leave it to their parent.
if _is_command and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, end if multiprocessing.parent_process() is None else signal.SIG_IGN)
