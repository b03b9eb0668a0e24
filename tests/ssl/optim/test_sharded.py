"""SOAP and Muon over sharded parameters: what one process with whole parameters computes, on any number of them."""

import json
from pathlib import Path

from helpers import run_group

from skipless.ssl.optim.sharded import owners_of


def test_equal_to_whole_parameters_on_three_processes_and_resumed_on_two(tmp_path: Path) -> None:
    """And every matrix has one owner, and all owners have about the same: with SOAP two moments, and for every side of
    2 to 15 a mean of products and a basis. That is 224 numbers for each of the matrices of 8 x 4, 378 for 3 x 12, 168
    for 2 x 8, and 138 for 20 x 3. By cubes of sides the third is one process's share, the second has 8 x 4 and 2 x 8,
    and the last the rest. Vectors are with all three."""
    first, *_ = run_group("processes.sharded", [tmp_path, 0, 8], processes=3)
    held, entries = json.loads(first.stdout.splitlines()[0])
    assert sum(held) == 224 + 224 + 378 + 168 + 138
    assert max(held) == 224 + 168
    assert entries == 5 + 3 * 2
    run_group("processes.sharded", [tmp_path, 8, 14])


def test_matrices_whose_sides_are_all_too_long_are_divided_as_well() -> None:
    assert sorted(owners_of([(40, 30)] * 8, 4, longest_side=10)) == [0, 0, 1, 1, 2, 2, 3, 3]
