"""Whether a run learns, in words, from lines of metrics."""

import json
from pathlib import Path

import pytest

from skipless.ssl.run.learning import read_metrics, verdict

DINO = [
    {"loss": 6.47, "usage_entropy": 6.0, "teacher_entropy": 5.9},
    {"loss": 6.65, "usage_entropy": 6.5, "teacher_entropy": 4.0},
]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (DINO, ["it learns, as far as can be told without labels: its teacher tells images apart by 2.50 nats, and by "
                "0.10 at the start; that its loss rose from 6.47 to 6.65 is normal then"]),
        (DINO[::-1], ["it has not learned yet: its teacher tells images apart by 0.10 nats, and by 2.50 at the start"]),
        ([{"monitor/knn": [0.1, 0.312]}, *DINO, {"monitor/knn": [0.2, 0.54]}],
         ["it learns: k-NN of the last block is 54.0 %, and was 31.2 % at the start"]),
        ([{"monitor/knn": [0.1, 0.312]}, {"monitor/knn": [0.9, 0.32]}],
         ["it has not learned yet: k-NN of the last block is 32.0 %, and was 31.2 % at the start"]),
        ([{"monitor/knn": [0.5]}, DINO[0]], []),
    ],
)  # fmt: skip
def test_a_run_says_whether_it_learns(lines: list[dict], words: list[str], tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"loss": 7')
    assert verdict(read_metrics(tmp_path / "metrics.jsonl")) == words
