"""The command line of every command: settings from flags and files, errors as one sentence.

A command is a function of one dataclass, whose fields' docstrings are its help:

    def main(arguments: Sequence[str] | None = None) -> None:
        cli.run(evaluate, Settings, __doc__, arguments)

Any field is a flag (`--optimizer.lr 1e-3`), and any of them can stand in a YAML file given as `--config`; what comes
later wins. In flag names - and _ are the same; `--flag` alone sets a true-or-false field; lists are `--k 20 10` or
`--k [20,10]`; ~ is the home folder; settings by the names of earlier versions are understood.
"""

import argparse
import dataclasses
import functools
import inspect
import json
import multiprocessing
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from skipless.common.settings import OLD_NAMES, OLD_VALUES, renamed

T = TypeVar("T")

LISTS = (tuple, list)
TYPES = {"int": "a whole number", "float": "a number", "bool": "true or false"}

HELP = "In flag names - and _ are the same. A YAML file given as --config can hold any of the settings."


def run(
    command: Callable[[T], object],
    settings: type[T],
    description: str | None,
    arguments: Sequence[str] | None = None,
    *,
    positional: bool = False,
    recipe: Callable[[Any], Path] | None = None,
) -> None:
    """Call `command` with the settings of the command line; whatever the user can mend ends in a sentence.

    Args:
        settings: the dataclass of settings; description: for --help.
        arguments: of the command line; by default the program's.
        positional: fields without a default are given without a flag, in their order.
        recipe: from what was parsed, the file of settings that comes before the user's own.

    Exits with status 2 after an error, 130 after an interruption, 141 when nobody reads its output any more.
    """
    file = "/".join(Path(inspect.getsourcefile(command) or "command").parts[-2:])
    prog = sys.argv[0] if sys.argv[0].startswith("skipless ") else file  # the console command sets its own
    guard(lambda: command(parse(settings, arguments, prog, description, positional=positional, recipe=recipe)))


def parse(
    settings: type[T],
    arguments: Sequence[str] | None = None,
    prog: str | None = None,
    description: str | None = None,
    *,
    positional: bool = False,
    recipe: Callable[[Any], Path] | None = None,
) -> T:
    """The settings that a command line means; see `run`.

    Raises:
        jsonargparse.ArgumentError: an unknown flag or a value of the wrong type.
        ValueError: values that contradict each other.
    """
    parser = _parser(settings, prog, description, positional)  # type: ignore[arg-type]  # types are hashable
    words = canonical(settings, sys.argv[1:] if arguments is None else arguments, positional)
    if recipe is not None:  # which one, the words say; they are then read over it
        quiet = [word for word in words if not word.startswith("--print_config")]
        words = [f"--config={recipe(parser.parse_args(quiet))}", *words]
    values = parser.instantiate(parser.parse_args(words)).as_dict()
    values.pop("config", None)
    return _expand_home(settings(**values))


def guard(command: Callable[[], object]) -> None:
    """Run a command: a sentence and exit code 2 for whatever the user can mend."""
    from jsonargparse import ArgumentError

    # Imported by whoever works with tensors; a command that does not shall not wait seconds for torch.
    distributed: Any = sys.modules.get("skipless.common.distributed")
    try:
        command()
        if distributed:
            distributed.wait_for_all()
    except BrokenPipeError:  # whoever read the output has read enough
        sys.stderr.close()
        sys.exit(141)
    except (ValueError, OSError, ArgumentError) as error:
        who = f" (process {distributed.rank()})" if distributed and distributed.rank() else ""
        print(f"error{who}: {sentence(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from what was saved; for training, with --resume", file=sys.stderr)
        sys.exit(130)
    finally:
        _end_loader_workers()
        if distributed:
            distributed.stop()


def sentence(error: BaseException) -> str:
    """An error's message in one line, without the traceback that one from inside a loader's worker carries."""
    text = str(error).strip()
    if "Traceback" in text:
        return text.splitlines()[-1].partition("Error: ")[2] or text.splitlines()[-1]
    text = " ".join(text.split())
    # jsonargparse tells the types that a value may have by their classes in Python.
    wrong = re.fullmatch(r'Parser key "([\w.]+)": (.*)(?:Got|Given) value: (.*)', text)
    if wrong is None:
        return text
    wanted = [TYPES[kind] for kind in re.findall(r"Expected a <class '(\w+)'>", wrong[2]) if kind in TYPES]
    return f"{wrong[1]} is {wrong[3]!r}; give {' or '.join(wanted)}" if wanted else text


def canonical(settings: type, words: Sequence[str], positional: bool = False) -> list[str]:
    """A command line as the parser takes it: today's names, and one word for each flag with its value or values."""
    kinds = dict(_leaves(settings))
    required = [field.name for field in dataclasses.fields(settings) if _required(field)] if positional else []
    out: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            name = required.pop(0) if required else ""
            if _is_list(kinds.get(name)):
                rest, values = _split(rest)
                word = json.dumps([word, *values])
            out.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        name = OLD_NAMES.get(name, name)
        kind = kinds.get(name)
        if not equals and name == "config" and rest:
            value, equals = rest.pop(0), "="
        if not equals and kind is bool:
            value, equals = rest.pop(0) if rest and rest[0].lower() in ("true", "false") else "true", "="
        if not equals and _is_list(kind):
            rest, values = _split(rest)
            value, equals = values[0] if len(values) == 1 else _listed(values, kind), "="
        if not equals and kind is not None and rest:
            value, equals = rest.pop(0), "="
        if _is_list(kind) and value[:1] not in ("[", "") and value not in ("null", "None"):
            value = _listed([value], kind)
        if name == "config":
            value = _with_names_of_today(value)
        value = OLD_VALUES.get((name, value), value)
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        if equals and choices and value not in map(str, choices):
            raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(str, choices))}")
        out.append(f"--{name}{equals}{value}")
    return out


@functools.cache  # building one takes longer than reading a command line
def _parser(settings: type, prog: str | None, description: str | None, positional: bool) -> Any:
    from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

    class HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
        """Keeps the lines of the description."""

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=prog, description=description, epilog=HELP, exit_on_error=False, formatter_class=HelpFormatter
    )
    parser.add_argument("--config", action="config", help="YAML file of settings; flags after it win.")
    parser.add_class_arguments(settings, as_positional=positional)
    for action in parser._actions:
        if not action.option_strings:
            action.metavar = action.dest.upper() + (" ..." if _is_list(dict(_leaves(settings))[action.dest]) else "")
    return parser


def _leaves(settings: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, type) of every field that is no group."""
    for name, kind in get_type_hints(settings).items():
        if dataclasses.is_dataclass(kind):
            yield from _leaves(kind, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            yield f"{prefix}{name}", kind


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _is_list(kind: Any) -> bool:
    if get_origin(kind) in (UnionType, Union):
        return any(_is_list(part) for part in get_args(kind))
    return get_origin(kind) in LISTS


def _listed(values: list[str], kind: Any) -> str:
    """`--names A B` as one word; numbers stay numbers."""
    numbers = not {int, float}.isdisjoint(get_args(next(k for k in (kind, *get_args(kind)) if get_origin(k) in LISTS)))
    return f"[{','.join(values)}]" if numbers else json.dumps(values)


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """What follows from the next flag on, and the values before it."""
    end = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
    return words[end:], words[:end]


def _with_names_of_today(path: str) -> str:
    """A file of settings; its content instead, where it has names or values of earlier versions."""
    import yaml

    try:
        tree = yaml.safe_load(Path(path).expanduser().read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return path  # for the parser to complain of
    if not isinstance(tree, dict) or renamed(tree) == tree:
        return str(Path(path).expanduser())
    return json.dumps(renamed(tree))


def _expand_home(settings: T) -> T:
    """The same settings with ~ and ~user at the start of texts and paths replaced, in place."""

    def expanded(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return _expand_home(value)
        if isinstance(value, tuple | list):
            return type(value)(expanded(part) for part in value)
        if isinstance(value, str | Path) and str(value).startswith("~"):
            try:
                return type(value)(Path(value).expanduser())
            except RuntimeError:
                raise ValueError(f"{value} names a user that this machine does not know") from None
        return value

    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        value = getattr(settings, field.name)
        if (new := expanded(value)) is not value:
            object.__setattr__(settings, field.name, new)
    return settings


def _end_loader_workers() -> None:
    """Kill the workers that an error left behind. They ignore SIGTERM (`leave_signals_to_main`), so Python, which sends
    them one at its end, would wait for them forever."""
    workers = multiprocessing.active_children()
    if workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the loader's handler would raise another error
    for worker in workers:
        worker.kill()
        worker.join()
