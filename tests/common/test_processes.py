"""Work for several processes: results in order, few ahead, and errors that arrive; the devices that there are."""

from collections.abc import Iterator

import pytest
import torch

from skipless.common import distributed
from skipless.common.processes import spread


@pytest.mark.parametrize("processes", [1, 2])
def test_results_come_in_order_and_errors_arrive(processes: int) -> None:
    taken = []

    def words() -> Iterator[str]:
        for word in (*map(str, range(20)), "three", *map(str, range(100))):
            taken.append(word)
            yield word

    results = spread(int, words(), processes)
    assert [next(results) for _ in range(20)] == list(range(20))
    assert len(taken) < 40  # images must not pile up
    with pytest.raises(ValueError, match="three"):
        next(results)


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="there is no GPU 2 here, of 2"):
        distributed.start("cuda:2")
