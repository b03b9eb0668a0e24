"""What several test files share."""

import os
import socket
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

# A machine may be as busy as it likes.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

RunTwo = Callable[[Sequence[object]], list[tuple[str, str]]]


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty noisy pictures in two class folders."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(40):
        folder = root / ("stripes" if i % 2 else "blobs")
        folder.mkdir(exist_ok=True)
        base = rng.integers(0, 255, (6, 1 if i % 2 else 6, 3), dtype=np.uint8)
        Image.fromarray(base).resize((48, 40)).save(folder / f"{i:02}.png")
    return root


@pytest.fixture
def run_two() -> RunTwo:
    """Runs a command in two processes of one group, which both must succeed; output and errors of each."""

    def run(words: Sequence[object]) -> list[tuple[str, str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # What torchrun sets, without its own start.
        common = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        processes = [
            subprocess.Popen(
                list(map(str, words)),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=common | {"RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": str(port)},
            )
            for rank in ("0", "1")
        ]
        printed = [process.communicate(timeout=240) for process in processes]
        for process, (_, errors) in zip(processes, printed, strict=True):
            assert process.returncode == 0, errors
        return printed

    return run
