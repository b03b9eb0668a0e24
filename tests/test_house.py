"""The rules of the house: who imports whom, what is private, how long and how deep a function may be."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A file may import from its own floor and from those below it.
FLOORS = ("common", "datasets", "ssl", "eval")
OUTSIDE = ("benchmarks", "experiments", "examples")
LONGEST, DEEPEST = 80, 4
NESTS = (ast.For, ast.While, ast.If, ast.With, ast.Try, ast.Match)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
# A command that others may import, as it runs other commands and is their sum.
LIBRARY_TOO = {"skipless.eval.report"}


def folder(floor: str) -> Path:
    return ROOT / "src/skipless/common" if floor == "common" else ROOT / floor


FILES = {file: floor for floor in (*FLOORS, *OUTSIDE) for file in sorted(folder(floor).rglob("*.py"))}


def module_name(file: Path) -> str:
    """`ssl/model/vit.py` -> `skipless.ssl.model.vit`; `benchmarks/soap.py` -> `soap`, as commands beside it say."""
    if FILES[file] in OUTSIDE:
        return file.stem
    start = ROOT / "src/skipless" if FILES[file] == "common" else ROOT
    return ".".join(("skipless", *file.relative_to(start).with_suffix("").parts))


MODULES = {module_name(file): file for file in FILES}


@functools.cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def short(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


@functools.cache
def imports(file: Path) -> tuple[tuple[str, str | None, str], ...]:
    """(module, name taken from it or None, name here) for every import of a file, inside functions too."""
    taken: list[tuple[str, str | None, str]] = []
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            taken += [(alias.name, None, alias.asname or alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            for alias in node.names:
                whole = f"{module}.{alias.name}"
                name = None if whole in MODULES else alias.name
                taken.append((whole if name is None else module, name, alias.asname or alias.name))
    return tuple(taken)


def of_ours(file: Path) -> set[str]:
    """The modules of the project that a file imports."""
    return {module for module, _, _ in imports(file) if module in MODULES}


def commands() -> set[str]:
    """Files at the top of a folder that run `main`."""
    tops = [file for file, floor in FILES.items() if file.parent == folder(floor) and floor != "common"]
    return {module_name(file) for file in tops if file.read_text().endswith("\n    main()\n")}


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_are_absolute_and_run_one_way(floor: str) -> None:
    below = FLOORS[: FLOORS.index(floor) + 1]
    wrong = []
    for file in (file for file, where in FILES.items() if where == floor):
        for module, name, _ in imports(file):
            first, _, rest = module.partition(".")
            without_prefix = first != "skipless" and f"skipless.{module}" in MODULES
            upward = first == "skipless" and (rest.partition(".")[0] or name) in {*FLOORS} - {*below}
            outside = module in MODULES and FILES[MODULES[module]] in OUTSIDE
            if module.startswith(".") or without_prefix or upward or outside:
                wrong.append(f"{short(file)} imports {module}")
    assert wrong == [], f"files in {floor}/ import from {', '.join(below)} only, as skipless.FOLDER.FILE"


def test_no_circle() -> None:
    circles = set()
    ended: set[str] = set()

    def follow(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            circles.add(" -> ".join((*path[path.index(module) :], module)))
        if module in path or module in ended:
            return
        for other in sorted(of_ours(MODULES[module]) - {module}):
            follow(other, (*path, module))
        ended.add(module)

    for module in MODULES:
        follow(module, ())
    assert circles == set()


def test_no_import_for_type_checking_alone() -> None:
    assert {short(file) for file in FILES if "TYPE_CHECKING" in file.read_text()} == set()


def test_nobody_imports_a_command() -> None:
    wrong = {
        f"{short(file)}: {module}"
        for file in FILES
        for module in (of_ours(file) & commands()) - LIBRARY_TOO
        if short(file) != "eval/report.py"
    }
    assert wrong == set()


def private(name: str | None) -> bool:
    return bool(name) and str(name).startswith("_") and not str(name).endswith("__")


@functools.cache
def defined(file: Path) -> frozenset[str]:
    """Private names that a file defines: functions, classes, variables, attributes."""
    names: set[str] = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return frozenset(name for name in names if private(name))


def test_no_file_takes_a_private_name_of_another() -> None:
    ours = {name for file in FILES for name in defined(file)}
    wrong = set()
    for file in FILES:
        names = {str(name) for module, name, _ in imports(file) if module.startswith("skipless") or module in MODULES}
        names |= {node.attr for node in ast.walk(tree(file)) if isinstance(node, ast.Attribute)} & ours
        wrong |= {f"{short(file)}: {name}" for name in names if private(name) and name not in defined(file)}
    assert not wrong


def functions(file: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function with its name, Class.method for methods."""

    def inside(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        for child in ast.iter_child_nodes(node):
            name = prefix + getattr(child, "name", "") if isinstance(child, (*FUNCTIONS, ast.ClassDef)) else prefix
            if isinstance(child, FUNCTIONS):
                yield name, child
            yield from inside(child, f"{name}." if name != prefix else prefix)

    return inside(tree(file), "")


def depth(node: ast.AST) -> int:
    """How many loops, conditions, with and try statements stand inside each other; elif is no new level."""
    deepest = 0
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, (*FUNCTIONS, ast.ClassDef, ast.Lambda)):
                continue
            elif_ = isinstance(node, ast.If) and field == "orelse" and value == [child] and isinstance(child, ast.If)
            deepest = max(deepest, depth(child) + (isinstance(child, NESTS) and not elif_))
    return deepest


def test_functions_are_neither_long_nor_deep() -> None:
    wrong = set()
    for file in FILES:
        for name, node in functions(file):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines > LONGEST or depth(node) > DEEPEST:
                wrong.add(f"{short(file)}: {name}")
    assert wrong == set()
