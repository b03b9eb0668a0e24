"""A group whose first process ends with an error while the others wait: python ending.py DONE.json

To leave the group then takes forever, as where a peer sits in a collective (NULL_STUCK).
"""

import json
import os
import signal
import sys
from pathlib import Path

import nullgpu
import torch

from skipless.common import cli, distributed


def work(done: Path) -> None:
    """Say how many collectives the wait for all processes took; then an error here and a wait there."""
    device = distributed.start("cuda")
    distributed.all_reduce_sum(torch.ones(2, device=device))
    before = nullgpu.counts()["collectives"]
    distributed.wait_for_all()
    done.write_text(json.dumps({"before": before, "after": nullgpu.counts()["collectives"]}))
    if distributed.rank() == 0:
        raise ValueError("here")
    distributed.wait_for_all()


if __name__ == "__main__":
    done = Path(sys.argv[1])
    child = os.fork()
    if not child:
        os.environ["NULL_STUCK"] = "1"
        signal.alarm(60)
        cli.guard(lambda: work(done))
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    done.write_text(json.dumps(json.loads(done.read_text()) | {"status": status}))
