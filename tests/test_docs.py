"""What the documents say can be typed can be typed: every command line is accepted by the command that it names."""

import ast
import importlib
import importlib.util
import inspect
import pydoc
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers import ROOT, call

import skipless.__main__
from skipless.common import cli
from skipless.common.settings import OLD_NAMES, OLD_VALUES
from skipless.datasets.public import places
from skipless.eval import defaults

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("**/*.md"))]
TUTORIALS = [page for page in PAGES if page.parent.name == "tutorials"]
RECIPES = sorted([*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("experiments/*.yaml")])
SCRIPTS = [
    path
    for room in ("ssl", "eval", "datasets", "benchmarks", "experiments", "examples")
    for path in sorted((ROOT / room).glob("*.py"))
]
SCRIPT = re.compile(r"(?:ssl|eval|datasets|benchmarks|experiments|examples)/\w+\.py")
STARTERS = ("python", "torchrun", "skipless", "make")


class Accepted(Exception):
    """A command has read its command line, and shall not do what it says."""


def parts(page: Path) -> tuple[str, list[tuple[str, str]]]:
    """A page in Markdown: its prose, and (language, text) of its fenced blocks."""
    pieces = re.split(r"^```(\w*)$", page.read_text(), flags=re.MULTILINE)  # prose, language, block, "", prose, ...
    return "\n".join(pieces[::4]), list(zip(pieces[1::4], pieces[2::4], strict=True))


def lines_of_commands(path: Path) -> list[str]:
    """The lines of a file that may hold commands."""
    text = path.read_text()
    if path.suffix == ".md":
        prose, blocks = parts(path)
        quoted = re.findall(rf"`((?:{'|'.join(STARTERS)}) [^`]+)`", prose)
        text = "\n".join([block for language, block in blocks if not language] + [" ".join(q.split()) for q in quoted])
    elif path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
        text = "\n".join(line for line in text.replace("\\\n", " ").splitlines() if line.startswith("    "))
    else:
        text = "\n".join(line.removeprefix("#") for line in text.splitlines() if line.startswith("#  "))
    return text.replace("\\\n", " ").splitlines()


def words_of_command(line: str) -> list[str]:
    """The words of the command in a line, from its starter on; none where there is no command."""
    match = re.search(rf"(?:^|[:;] |exec |srun )\s*((?:{'|'.join(STARTERS)}) [\w-].*)", line)
    if not match:
        return []
    quoted = "'" in line[: match.start(1)] and "exec" in line  # inside of bash -c '...'
    words = shlex.split(match[1].partition("'")[0] if quoted else match[1], comments=True)
    return [word.strip("[]") for word in words if word != "..."]


def command_lines() -> Iterator[tuple[str, tuple[str, ...]]]:
    """(file, words) of every command line of the documents, recipes and commands."""
    for path in [*PAGES, *RECIPES, *SCRIPTS]:
        for line in lines_of_commands(path):
            words = words_of_command(line)
            if words:
                yield str(path.relative_to(ROOT)), tuple(words)
            else:
                assert not SCRIPT.search(line) or "python" not in line, f"{path.name}: not read as a command: {line}"


COMMANDS = list(dict.fromkeys(command_lines()))


@cache
def module_of(script: str) -> ModuleType:
    """A command's module: of the package, or from its file."""
    if script.startswith(("ssl/", "eval/", "datasets/")):
        return importlib.import_module(f"skipless.{script.removesuffix('.py').replace('/', '.')}")
    name = script.removesuffix(".py").replace("/", "_of_")
    spec = importlib.util.spec_from_file_location(name, ROOT / script)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(module: ModuleType, words: list[str]) -> None:
    """What the file does as a command, up to the moment when it has read `words`."""
    sys.argv = [str(module.__file__), *words]
    if inspect.signature(module.main).parameters:
        module.main(words)
    else:
        module.main()


@pytest.fixture
def only_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands read their command lines in the repository's folder, and do nothing; an error is not caught."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["command"])
    parse = cli.parse

    def parse_and_stop(*arguments: Any, **options: Any) -> None:
        parse(*arguments, **options)
        raise Accepted

    monkeypatch.setattr(cli, "parse", parse_and_stop)
    monkeypatch.setattr(cli, "guard", lambda command: command())
    monkeypatch.setattr(places, "write_scenes", lambda *arguments, **options: None)
    monkeypatch.setattr(defaults, "choose_ckpt", lambda: "runs/newest")
    for room in ("benchmarks", "experiments", "examples"):
        monkeypatch.syspath_prepend(ROOT / room)


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) > 150


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize(("page", "words"), COMMANDS)
@pytest.mark.usefixtures("only_parsed")
def test_command_is_accepted(page: str, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    if words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word]
        assert [t for t in targets if not re.search(rf"^{t}:", (ROOT / "Makefile").read_text(), re.MULTILINE)] == []
        return
    if words[0] == "skipless":
        name, *rest = words[1:]
        command = module_of("src/skipless/__main__.py").COMMANDS[name][0].replace(".", "/") + ".py"
    else:
        command = next(word for word in words if word.endswith(".py"))
        rest = list(words[words.index(command) + 1 :])
    assert (ROOT / command).exists(), f"{page} names {command}"
    if command == "ssl/pretrain.py" and "photos.yaml" in rest:  # what ssl/recipe.py writes; the images stand in it
        rest = [word.replace("photos.yaml", "configs/imagenette_cpu.yaml") for word in rest] + ["--data.path=photos"]
    if not rest:  # `python ssl/pretrain.py` in a sentence: its name
        return
    with pytest.raises((Accepted, SystemExit)) as end:
        start(module_of(command), rest)
    assert end.type is Accepted or end.value.code in (0, None)  # of --help


EXAMPLES = [(page.name, code) for page in PAGES for language, code in parts(page)[1] if language == "python"]


@pytest.mark.parametrize(("page", "code"), EXAMPLES)
def test_example_in_python(page: str, code: str) -> None:
    """It compiles, and what it imports exists."""
    for node in ast.walk(ast.parse(code, page)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            assert [name.name for name in node.names if not hasattr(module, name.name)] == []
        elif isinstance(node, ast.Import):
            for name in node.names:
                importlib.import_module(name.name)


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_tutorial_runs_as_it_stands(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))  # of the cache
    monkeypatch.setattr(sys, "argv", sys.argv)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    names: dict[str, Any] = {}
    outs = []
    for language, text in parts(page)[1]:
        if language == "python":
            exec(compile(text, page.name, "exec"), names)
            continue
        for line in text.strip().replace("\\\n", " ").splitlines():
            starter, *words = shlex.split(line)
            assert starter == "skipless"
            done = call(skipless.__main__.main, words)
            assert done.returncode == 0, f"{line}\n{done.stderr}"
            outs += [Path(words[words.index("--out") + 1])] if "--out" in words else []
    assert [out for out in outs if not out.exists()] == []


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", parts(page)[0], re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", parts(page)[0]):
        path, _, anchor = link.partition("#")
        if not path.startswith("http"):
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", [*PAGES, *RECIPES, *SCRIPTS], ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    """Our own, in backticks: `ssl/dino.py`, `configs/demo.yaml`, `eval/dense/`."""
    text = page.read_text() if page.suffix == ".md" else "\n".join(lines_of_commands(page))
    if page.name == "CHANGELOG.md":
        text = re.sub(r"^\| `[^|]*\|", "", text, flags=re.MULTILINE)  # what is there no more
    rooms = "ssl|eval|datasets|benchmarks|experiments|examples|configs|results|docs|tests|src"
    named = re.findall(rf"`((?:{rooms})/[\w/.-]*)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


def rows(heading: str) -> list[list[str]]:
    """The cells of a table in the changelog that are in backticks, without them."""
    section = (ROOT / "CHANGELOG.md").read_text().partition(f"### {heading}\n")[2].partition("\n### ")[0]
    return [re.findall(r"`([^`]+)`", line) for line in section.splitlines() if line.startswith("| `")]


def test_changelog_has_all_names_of_settings() -> None:
    values = [[f"{name}: {old}", f"{name}: {new}"] for (name, old), new in OLD_VALUES.items()]
    assert rows("Settings") == [*map(list, OLD_NAMES.items()), *values]


def test_changelog_has_modules_that_exist() -> None:
    assert len(rows("Modules")) > 40
    for old, *new in rows("Modules"):
        for name in new:
            importlib.import_module(f"skipless.{name}")
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(f"skipless.{old}")


def test_changelog_has_functions_that_exist() -> None:
    assert len(rows("Functions")) > 20
    for _, new in rows("Functions"):
        assert pydoc.locate(f"skipless.{new}") is not None, new


def test_slurms_script_leaves_torchrun_the_time_that_slurm_leaves() -> None:
    """Torchrun kills its processes 30 seconds after it was asked to end, if nothing else is said."""
    (script,) = re.findall(r"#!/bin/bash\n(.*?)```", (ROOT / "docs/training.md").read_text(), re.DOTALL)
    (slurm,), (torchrun,) = re.findall(r"--signal=TERM@(\d+)", script), re.findall(r"--shutdown-timeout (\d+)", script)
    assert 100 <= int(torchrun) < int(slurm)
    assert "--resume" in script


def test_every_promise_names_tests_that_exist() -> None:
    sources = "".join(path.read_text() for path in ROOT.glob("tests/**/*.py"))
    tests = set(re.findall(r"^def (test_\w+)", sources, re.MULTILINE))
    page = (ROOT / "docs/reliability.md").read_text()
    promises = re.findall(r"^\| (?!what happens|-).* \| (.*) \|$", page, re.MULTILINE)
    assert len(promises) > 30
    for shown_by in promises:
        named = re.findall(r"`(\w+)`", shown_by)
        assert named, shown_by
        assert [name for name in named if name not in tests] == []


def test_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """Every page and anchor that is linked to is there, and every module of the reference."""
    pytest.importorskip("mkdocs", reason="the site needs mkdocs-material and mkdocstrings")
    words = ["build", "--quiet", f"--config-file={ROOT}/mkdocs.yml", f"--site-dir={tmp_path}"]
    done = subprocess.run([sys.executable, "-m", "mkdocs", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    reference = (tmp_path / "reference" / "index.html").read_text()
    assert 'id="skipless.ssl.model.vit.VisionTransformer"' in reference
    assert "Pretrain Vision Transformers" in (tmp_path / "index.html").read_text()
