"""The command line of every command: settings from flags and files, errors as one sentence.

A command is a function of one dataclass, whose fields' docstrings are its help:

    main = partial(cli.run, evaluate, Settings, __doc__)  # of the words given, or of the program's own

Any field is a flag (`--optimizer.lr 1e-3`), and any of them can stand in a YAML file given as `--config`; what comes
later wins. In flag names - and _ are the same; `--flag` alone sets a true-or-false field; lists are `--k 20 10` or
`--k [20,10]`; ~ is the home folder; settings by the names of earlier versions are understood.
"""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import functools
import inspect
import io
import json
import multiprocessing
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from skipless.common import interruption
from skipless.common.settings import OLD_VALUES, SWITCHES, TODAY, flat, refuse_nonsense, refuse_unwritable, renamed

T = TypeVar("T")

Fill = Callable[[list[str], list[str]], list[str]]

LISTS = (tuple, list)
PARSERS_OWN = ("help", "print_config")
TYPES = {"int": "a whole number", "float": "a number", "bool": "true or false"}

HELP = "In flag names - and _ are the same. A YAML file given as --config can hold any of the settings."
MORE = "--help {first} tells all of one group, --help-all everything."


def run(
    command: Callable[[T], object],
    settings: type[T],
    description: str | None,
    arguments: Sequence[str] | None = None,
    *,
    positional: bool = False,
    recipe: Callable[[Any], Path] | None = None,
    fill: Fill | None = None,
    part: str | None = None,
) -> None:
    """Call `command` with the settings of the command line; whatever the user can mend ends in a sentence.

    Args:
        settings: the dataclass of settings; description: for --help.
        arguments: of the command line; by default the program's.
        positional: fields without a default are given without a flag, in their order.
        recipe: from what was parsed, the file of settings that comes before the user's own.
        fill: from the names of the required settings that are missing, and the words of the command line, words with
            some of them.
        part: the group of settings that is taken from files of other commands.

    Exits with status 2 after an error, 130 after an interruption, 128 + its number after a signal on which a run saved
    itself, 141 when nobody reads its output any more.
    """
    file = "/".join(Path(inspect.getsourcefile(command) or "command").parts[-2:])
    prog = sys.argv[0] if sys.argv[0].startswith("skipless ") else file  # the console command sets its own
    read = functools.partial(parse, positional=positional, recipe=recipe, fill=fill, part=part)
    guard(lambda: command(read(settings, arguments, prog, description)))


def parse(
    settings: type[T],
    arguments: Sequence[str] | None = None,
    prog: str | None = None,
    description: str | None = None,
    *,
    positional: bool = False,
    recipe: Callable[[Any], Path] | None = None,
    fill: Fill | None = None,
    part: str | None = None,
) -> T:
    """The settings that a command line means; see `run`.

    Raises:
        jsonargparse.ArgumentError: an unknown flag or a value of the wrong type.
        ValueError: values that contradict each other.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in ("-h", "--help", "--help-all"):
        print(_help(settings, prog, description, positional, words))
        sys.exit(0)
    parser = _parser(settings, prog, description, positional)  # type: ignore[arg-type]  # types are hashable
    words = canonical(settings, words, positional, part)
    quiet = [word for word in words if not word.startswith("--print_config")]
    if fill is not None and quiet == words:
        try:
            _parsed(parser, words, positional)
        except _MissingError as missing:
            words = quiet = [*fill(missing.names, words), *words]
    if recipe is not None:  # which one, the words say; they are then read over it
        words = [f"--config={recipe(_parsed(parser, quiet, positional))}", *words]
    values = parser.instantiate(_parsed(parser, words, positional)).as_dict()
    values.pop("config", None)
    given = settings(**values)
    refuse_nonsense(given)
    _expand_home(given)
    refuse_unwritable(given)
    return given


class Interrupted(Exception):
    """A signal asked a command to end, and it has saved what it needs to go on; all processes raise it together."""

    def __init__(self, number: int):
        self.number = number


def guard(command: Callable[[], object]) -> None:
    """Run a command: a sentence and exit code 2 for whatever the user can mend."""
    # Imported by whoever works with tensors; a command that does not shall not wait seconds for torch.
    distributed: Any = sys.modules.get("skipless.common.distributed")
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed; takes the number that else the next file would get
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # of file names that are no text
    status = interrupted = 0
    try:
        try:
            interruption.begin()
            command()
        except Interrupted as ending:
            interrupted = 128 + ending.number  # as shells count
        except SystemExit:  # of --help
            sys.stdout.flush()
            raise
        sys.stdout.flush()  # Python's own at the end comes too late for the next lines
        if distributed:
            distributed.wait_for_all()
    except BrokenPipeError:  # whoever read the output has read enough
        sys.stderr.close()
        status = 141
    except KeyboardInterrupt:
        _tell("interrupted: the same command goes on from what was saved; for training, with --resume")
        status = 130
    except Exception as error:
        from jsonargparse import ArgumentError

        if isinstance(error, MemoryError):
            error.with_traceback(None)  # whose frames hold what filled the memory
        ours = isinstance(error, ValueError | OSError | ArgumentError)
        if ours or lacks_memory(error) or _lost_worker(error) or _lost_process(error):
            who = f" (process {distributed.rank()})" if distributed and distributed.rank() else ""
            _tell(f"error{who}: {sentence(error)}")
            status = 2
        elif distributed and distributed.world_size() > 1:
            traceback.print_exc()
            status = 1
        else:
            raise
    finally:
        _end_loader_workers()
        _leave_streams()
    if distributed and status and distributed.world_size() > 1:
        # The others may wait for this process in a collective, and leaving the group would then wait for them.
        with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads it
            sys.stdout.flush()
        os._exit(status)
    if distributed:
        distributed.stop()
    if status or interrupted:
        sys.exit(status or interrupted)


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that memory is not enough: of Python, NumPy, torch or OpenCV."""
    said = r"(allocate|enough|out of|Insufficient) memory|shared memory\(shm\)|Storage size calculation overflow"
    return isinstance(error, MemoryError) or re.search(said, str(error)) is not None


def _lost_worker(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error)


def _lost_process(error: BaseException) -> bool:
    """Whether an error says that another process of the group is gone: of gloo, of NCCL, or of the store."""
    gone = r"gloo/transport/.*(by peer|Timed out|Broken pipe)|waiting for clients|remote process exited|likely closed"
    return isinstance(error, RuntimeError) and re.search(gone, str(error)) is not None


def sentence(error: BaseException) -> str:
    """An error's message in one line, without the traceback that one from inside a loader's worker carries."""
    text = str(error).strip()
    if _lost_worker(error):
        where = "shared memory (/dev/shm; Docker: --ipc=host or --shm-size)" if "shared memory" in text else "memory"
        return (
            f"a process that loads images was killed, most likely for want of {where}: take fewer (workers), or more "
            "memory; training goes on with --resume"
        )
    if _lost_process(error):
        return (
            "another process of this job has ended, or does not answer: its own messages say why; training goes on "
            "from the last checkpoint with --resume"
        )
    if "shared memory(shm)" in text:
        return (
            "/dev/shm is full, through which loader workers hand over images (Docker makes it 64 MB large): start the "
            "container with --ipc=host, or lower workers or batch-size"
        )
    if lacks_memory(error):
        bytes_asked = re.search(r"allocate ([\d.]+ \w+)", text)
        asked = f" ({bytes_asked[1]} more were wanted)" if bytes_asked else ""
        return f"there is not enough memory{asked}: lower batch-size, sizes or workers"
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) and error.filename:
        return f"{error.filename}: {str(error.strerror).lower()}; give another place, or change what is allowed there"
    if "Traceback" in text:
        return text.splitlines()[-1].partition("Error: ")[2] or text.splitlines()[-1]
    text = re.sub(r"\S{500,}", lambda word: f"{word[0][:80]}...", " ".join(text.split()))
    # jsonargparse tells the types that a value may have by their classes in Python.
    wrong = re.fullmatch(r'Parser key "([\w.]+)": (.*)(?:Got|Given) value: (.*)', text)
    if wrong is None:
        return text
    wanted = [TYPES[kind] for kind in re.findall(r"Expected a <class '(\w+)'>", wrong[2]) if kind in TYPES]
    wanted += re.findall(r"'(\w+)'", "".join(re.findall(r"Expected a typing.Literal\[.*?\]", wrong[2])))
    return f"{wrong[1]} is {wrong[3]!r}; give {' or '.join(wanted)}" if wanted else text


def canonical(settings: type, words: Sequence[str], positional: bool = False, part: str | None = None) -> list[str]:
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
        switch, name = name in SWITCHES, TODAY.get(name, name)
        kind = kinds.get(name)
        if not equals and name == "config" and rest:
            value, equals = rest.pop(0), "="
        if not equals and (kind is bool or switch):
            value, equals = rest.pop(0) if rest and rest[0].lower() in ("true", "false") else "true", "="
        if not equals and _is_list(kind):
            rest, values = _split(rest)
            value, equals = values[0] if len(values) == 1 else _listed(values, kind), "="
        if not equals and kind is not None:
            if not rest or rest[0].startswith("--"):
                raise ValueError(f"--{name} has no value: give it one, as in --{name}=VALUE")
            value, equals = rest.pop(0), "="
        if _is_list(kind) and value[:1] not in ("[", "") and value not in ("null", "None"):
            value = _listed([value], kind)
        if name == "config":
            value = _with_names_of_today(value, kinds, part)
        elif not _is_setting(name, kinds) and name not in PARSERS_OWN:
            raise ValueError(f"there is no setting --{name}: {_nearest(name, kinds)}--help-all lists them all")
        if equals and not value.strip() and Path in (kind, *get_args(kind)):  # which would be the current folder
            raise ValueError(f"{name} is empty: give it a value, or leave it out")
        new = OLD_VALUES.get((name, {"true": True, "false": False}.get(value.lower(), value)), value)
        value = "null" if new is None else new
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        if equals and choices and value not in map(str, choices):
            raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(str, choices))}")
        out.append(f"--{name}{equals}{value}")
    return out


def _new_parser(settings: type, prog: str | None, description: str | None, positional: bool) -> Any:
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


_parser = functools.cache(_new_parser)  # building one takes longer than reading a command line


def _help(settings: type, prog: str | None, description: str | None, positional: bool, words: list[str]) -> str:
    """--help: the settings at the top, the required ones with their group, and one line for each other group."""
    parser = _new_parser(settings, prog, description, positional)
    kinds = get_type_hints(settings)
    groups = {name: kind for name, kind in kinds.items() if dataclasses.is_dataclass(kind)}
    asked = words[1].replace("-", "_") if len(words) > 1 else None
    everything = words[0] == "--help-all" or not groups
    if asked in groups:
        shown = {asked}
    else:
        needed = {name.partition(".")[0] for name, field in _single_fields(settings) if _required(field)}
        shown = {name for name in kinds if everything or name not in groups or name in needed}
    for action in parser._actions:
        name = action.dest.partition(".")[0]
        if action.dest in groups or (name in kinds and name not in shown):
            action.help = argparse.SUPPRESS
        elif action.dest == "print_config":
            action.help = "Print the settings that the other flags mean, as a YAML file, and exit."
    for group in parser._action_groups:
        if all(action.help == argparse.SUPPRESS for action in group._group_actions):
            group.title = group.description = None
    names = " ".join(action.metavar for action in parser._actions if not action.option_strings)
    parser.usage = " ".join(["%(prog)s", *([names] if names else []), "[--config FILE] [--SETTING VALUE ...]"])
    if asked in groups:
        parser.description = None
    text = parser.format_help().removesuffix(f"{HELP}\n")
    hidden = [name for name in groups if name not in shown]
    if hidden and asked not in groups:
        width = max(map(len, hidden))
        lines = [
            f"  --{name + '.*':{width + 2}}  {inspect.getdoc(groups[name]) or ''}".split("\n")[0] for name in hidden
        ]
        text += "\n".join(["groups of settings:", *lines, "", MORE.format(first=hidden[0]), ""])
    return f"{text}{HELP}"


def _parsed(parser: Any, words: list[str], positional: bool) -> Any:
    """What the parser makes of the words; what is missing is named as the command line would give it."""
    from jsonargparse import ArgumentError

    try:
        return parser.parse_args(words)
    except ArgumentError as error:
        missing = re.search(r"the following arguments are required: (.*)", str(error))
        if missing is None:
            raise
        raise _MissingError(missing[1].split(", "), positional) from None


class _MissingError(ValueError):
    """Required settings that no word gives."""

    def __init__(self, names: list[str], positional: bool) -> None:
        self.names = names
        shown = [name.upper() if positional else f"--{name}" for name in names]
        are = "is" if len(names) == 1 else "are"
        super().__init__(f"{' and '.join(shown)} {are} missing; --help tells what to give")


def _leaves(settings: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, type) of every field that is no group."""
    for name, kind in get_type_hints(settings).items():
        if dataclasses.is_dataclass(kind):
            yield from _leaves(kind, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            yield f"{prefix}{name}", kind


def _single_fields(settings: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """(dotted name, field) of every field that is no group."""
    kinds = get_type_hints(settings)
    for field in dataclasses.fields(settings):
        if dataclasses.is_dataclass(kinds[field.name]):
            yield from _single_fields(kinds[field.name], f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field


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


def _is_setting(name: str, kinds: dict[str, Any]) -> bool:
    """Whether it is a setting or a group of them. A beginning of its name is not enough."""
    return any(leaf == name or leaf.startswith(f"{name}.") for leaf in kinds)


def _nearest(name: str, kinds: dict[str, Any]) -> str:
    """A question with the setting that may have been meant, if there is one that resembles it."""
    last = {leaf.rpartition(".")[2]: leaf for leaf in kinds}
    close = difflib.get_close_matches(name, kinds, 1, 0.75)
    close = close or [last[leaf] for leaf in difflib.get_close_matches(name.rpartition(".")[2], last, 1, 0.75)]
    return f"did you mean --{close[0]}? " if close else ""


def _with_names_of_today(path: str, kinds: dict[str, Any], part: str | None) -> str:
    """A file of settings, or its content where it has names or values of earlier versions.

    Raises:
        ValueError: it can't be read as YAML, or holds what is no setting of this command.
    """
    import yaml

    if path.startswith("{"):
        return path
    file = _at_home(path)
    try:
        tree = yaml.safe_load(file.read_text())
    except FileNotFoundError:
        raise ValueError(f"there is no settings file {path}: give --config the path of a YAML file") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{line} is no valid YAML: {error.problem}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text: give --config a YAML file of settings") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds no settings: give --config a YAML file with lines like 'epochs: 10'")
    today = renamed(tree)
    if part in today and not all(_is_setting(name, kinds) for name in flat(today)):
        today = {part: today[part]}
    for name in flat(today):
        if not _is_setting(name, kinds):
            raise ValueError(f"{path}: there is no setting {name}: {_nearest(name, kinds)}--help-all lists them all")
    return str(file) if today == tree else json.dumps(today)


def _at_home(path: str | Path) -> Path:
    """A path without ~ and ~user at its start; raises ValueError where there is no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{path} names a user whose home this machine does not know: give the whole path") from None


def _expand_home(settings: T) -> T:
    """The same settings with ~ and ~user at the start of texts and paths replaced, in place."""

    def expanded(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return _expand_home(value)
        if isinstance(value, tuple | list):
            return type(value)(expanded(part) for part in value)
        if isinstance(value, str | Path) and str(value).startswith("~"):
            return type(value)(_at_home(value))
        return value

    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        value = getattr(settings, field.name)
        if (new := expanded(value)) is not value:
            object.__setattr__(settings, field.name, new)
    return settings


def _tell(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody reads it
        print(text, file=sys.stderr)


def _leave_streams() -> None:
    """Let no line that could not be written decide the exit code, nor be told of by Python."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):  # closed
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def _end_loader_workers() -> None:
    """Kill the workers that an error left behind. They ignore SIGTERM (`leave_signals_to_main`), so Python, which sends
    them one at its end, would wait for them forever."""
    workers = multiprocessing.active_children()
    if workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the loader's handler would raise another error
    for worker in workers:
        worker.kill()
        worker.join()
