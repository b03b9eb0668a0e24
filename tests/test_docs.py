"""Commands in the README and in docs/ are commands that their scripts accept."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from skipless.common import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[tuple[str, str, tuple[str, ...]]]:
    """(page, script, its words) for every line of a code block that runs a script of ssl/ or eval/."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```\w*\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removeprefix("srun "), comments=True)
                script = next((word for word in words if re.fullmatch(r"(ssl|eval)/\w+\.py", word)), None)
                if script and words[0] in ("python", "torchrun"):
                    found.append((page.name, script, tuple(words[words.index(script) + 1 :])))
    return found


def test_there_are_commands_to_check() -> None:
    assert len(commands()) > 20


@pytest.mark.parametrize(("page", "script", "words"), commands())
def test_command_is_accepted(page: str, script: str, words: tuple[str, ...]) -> None:
    assert (ROOT / script).exists(), f"{page} names {script}"
    module = importlib.import_module(f"skipless.{script.removesuffix('.py').replace('/', '.')}")
    if hasattr(module, "Settings"):
        cli.parse(module.Settings, list(words), recipe=getattr(module, "recipe", None))
