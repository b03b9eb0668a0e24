"""Progress: a bar on a terminal, a line now and then in a log; times and rates in words."""

import io

import pytest

from skipless.common import progress
from skipless.common.progress import Progress, duration, rate


@pytest.mark.parametrize("counted", [False, True])
def test_a_log_gets_a_line_now_and_then_and_none_for_what_is_short(
    counted: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    seconds = iter(range(0, 1000, 10))  # of a clock that is looked at when it begins and at every step
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    if counted:
        with Progress(total=10, initial=2, desc="heads") as bar:
            for _ in range(4):
                bar.update(2)
    else:
        assert list(Progress("abcd", desc="heads")) == [*"abcd"]
    lines = capfd.readouterr().err.splitlines()
    # After 30 of 40 seconds: 6 of 8 steps from the second on, 3 of 4 letters.
    assert lines == [f"heads: {80 if counted else 75} %, 10 s left"]


def test_a_terminal_gets_a_bar_and_inactive_processes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", terminal)
    list(Progress("abc", desc="labels", active=False))
    assert terminal.getvalue() == ""
    list(Progress("abc", desc="labels"))
    assert "\rlabels: 100%" in terminal.getvalue()
    assert "3/3" in terminal.getvalue()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "1 s"), (9.8, "10 s"), (59.4, "59 s"), (59.6, "1 min"), (3569, "59 min"),
        (3571, "1 h 0 min"), (27900, "7 h 45 min"), (172_700, "47 h 58 min"), (27910 * 60, "19 d 9 h"),
    ],
)  # fmt: skip
def test_durations_are_told_as_people_do(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_slow_rates_are_not_zero() -> None:
    assert [rate(value) for value in (0.0357, 7.12, 9.99, 12.4, 1240)] == ["0.036", "7.1", "10", "12", "1,240"]
