"""What a run says of the time it will take."""

from pathlib import Path

import pytest

from skipless.ssl.run import logging
from skipless.ssl.run.logging import RunLog


def test_the_time_that_is_left_does_not_count_what_the_first_steps_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(logging.time, "monotonic", lambda: now[0])
    log = RunLog(tmp_path, {}, 0, 1000, active=True)
    for step, now[0] in ((10, 600.0), (20, 640.0), (30, 645.0), (1000, 9000.0)):
        log.progress(step, "loss 1")
    log.close()
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("step")]
    # Ten minutes for ten steps, then four seconds a step.
    assert lines == ["step 10 of 1,000; loss 1", "step 20 of 1,000, 1 h 5 min left; loss 1"]
