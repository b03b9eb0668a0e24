"""What a user trusts every command with."""

import json
from pathlib import Path

from helpers import run

from skipless.__main__ import COMMANDS


def test_no_command_opens_a_socket_unless_a_url_is_named(tmp_path: Path) -> None:
    done = run("tests/processes/offline.py", [tmp_path, tmp_path / "ended.json"])
    assert done.returncode == 0, done.stderr
    ended = json.loads((tmp_path / "ended.json").read_text())
    assert "is blocked" in ended.pop("pretrain from a URL")
    assert ended.keys() == COMMANDS.keys()
    assert {name: error for name, error in ended.items() if error} == {}
