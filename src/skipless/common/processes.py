"""Work for several processes."""

import functools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

from threadpoolctl import ThreadpoolController

T = TypeVar("T")
R = TypeVar("R")

_task: Callable[[Any], Any]


def spread(task: Callable[[T], R], items: Iterable[T], processes: int) -> Iterator[R]:
    """`task` of every item, in order, computed here or, with `processes` > 1, in others, which are a few items ahead.
    What a task raises comes here. `task` must be picklable, and goes to each process once."""
    if processes == 1:
        yield from map(task, items)
        return
    # Spawned, not forked: the caller may hold threads or a GPU.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, _start, (task,))
    left = iter(items)
    waiting: deque[Future[R]] = deque()
    try:
        while True:
            waiting += [pool.submit(_call, item) for item in islice(left, 4 * processes - len(waiting))]
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start(task: Callable[[Any], Any]) -> None:
    global _task
    _task = task
    import cv2

    cv2.setNumThreads(1)
    # Ctrl-C reaches every process of the terminal: only the parent answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed tells nobody, and its workers would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(item: Any) -> Any:
    return _task(item)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch and for BLAS: on small matrices several take 2 to 30 times longer than one, as they wait for
    each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _libraries().limit(limits=1):
            yield
    finally:
        torch.set_num_threads(before)


@functools.cache  # looking for the loaded libraries takes longer than a small product
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()


def available_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
