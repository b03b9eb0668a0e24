"""Divergence and spikes, by injection into the figures of a healthy run; what is healthy is not warned of."""

import math

import pytest

from skipless.ssl.run.watch import Watch

HEALTHY = [(10 - 0.02 * i + 0.1 * math.sin(5 * i), 3 * 4 ** math.sin(i)) for i in range(60)]


def said(lines: list[tuple[float, float]]) -> tuple[dict[int, list[str]], Watch]:
    """What is said at which line."""
    watch = Watch()
    return {i: found for i, line in enumerate(lines) if (found := watch(*line))}, watch


def test_a_healthy_run_is_left_alone() -> None:
    assert said(HEALTHY)[0] == {}
    assert said([(11.09, 3.0**-i) for i in range(12)])[0] == {}  # as in a first epoch: a third from line to line


@pytest.mark.parametrize(
    ("loss", "norm", "words"),
    [
        (8.0, 1e12, "the gradient's norm is 1e+12, and was usually"),
        (8.0, 0.0, "the gradient's norm is 0, and was usually"),
        (8.0, math.inf, "the gradient's norm is inf, and was usually"),
        (11.09, 3.0, "the loss is 11.090, and was usually 9."),
    ],
)
def test_a_jump_is_named_at_its_line_and_once_until_it_is_over(loss: float, norm: float, words: str) -> None:
    found, watch = said([*HEALTHY[:20], *[(loss, norm)] * 40])
    assert list(found) == [20]
    assert found[20][0].startswith(words)
    assert watch.doubtful
    found, watch = said([*HEALTHY[:20], (loss, norm), *HEALTHY[20:40], (loss, norm), *HEALTHY[40:]])
    assert list(found) == [20, 41]
    assert not watch.doubtful


def test_a_moment_in_which_all_looks_usual_does_not_end_the_doubt() -> None:
    found, watch = said([*HEALTHY[:20], (8.0, 1e12), *HEALTHY[20:23], (8.0, 0.0), *HEALTHY[23:27]])
    assert list(found) == [20]
    assert watch.doubtful
