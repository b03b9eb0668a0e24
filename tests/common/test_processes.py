"""Work for several processes: results in order, few ahead, and errors that arrive; the devices that there are."""

from collections.abc import Iterator

import pytest
import torch
from threadpoolctl import threadpool_info

from skipless.common import distributed
from skipless.common.processes import one_thread, spread


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


def test_one_thread_holds_inside_alone() -> None:
    """For torch and for every library of linear algebra, also after an error."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    libraries = threadpool_info()
    inside: list[int] = []

    def fail() -> None:
        with one_thread():
            inside.extend([torch.get_num_threads(), *(library["num_threads"] for library in threadpool_info())])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert len(inside) > 1
    assert set(inside) == {1}
    assert torch.get_num_threads() == 2
    assert threadpool_info() == libraries
    torch.set_num_threads(before)


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="there is no GPU 2 here, of 2"):
        distributed.start("cuda:2")


@pytest.mark.parametrize(("torchrun", "visible", "device"), [(False, 1, 0), (False, 4, 3), (True, 4, 3)])
def test_a_task_of_srun_may_see_one_gpu_alone(
    monkeypatch: pytest.MonkeyPatch, torchrun: bool, visible: int, device: int
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setenv("LOCAL_RANK", "3")
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert distributed.start("cuda") == torch.device("cuda", device)
