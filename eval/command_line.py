"""What the commands of the evaluations share: settings from flags and files, errors as one sentence, row labels."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from skipless.common import distributed

T = TypeVar("T")


def parse_settings(
    settings: type[T],
    prog: str,
    description: str | None,
    switches: dict[str, str],
    arguments: Sequence[str] | None = None,
    recipe: Callable[[Any], Path] | None = None,
) -> T:
    """A dataclass of settings from the command line and the files it names with --config; later ones win.

    Args:
        settings: the dataclass; help comes from its fields' docstrings.
        prog, description: for --help.
        switches: boolean fields that are flags without a value, and their help.
        arguments: of the command line; by default the program's. In flag names - and _ are the same.
        recipe: from what was parsed, the file of settings that comes before the user's own.

    Raises:
        jsonargparse.ArgumentError: an unknown flag or a value of the wrong type.
    """
    from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

    class HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
        """Keeps the lines of the description."""

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False, formatter_class=HelpFormatter)
    parser.add_argument("--config", action="config", help="YAML file of settings; flags after it win.")
    parser.add_class_arguments(settings, skip=set(switches))
    for name, explanation in switches.items():
        parser.add_argument(f"--{name}", action="store_true", help=explanation)
    words = [_underscores(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    if recipe is not None:  # which one, the words say; they are then read over it
        quiet = [word for word in words if not word.startswith("--print_config")]
        words = [f"--config={recipe(parser.parse_args(quiet))}", *words]
    parsed = parser.parse_args(words)
    values = parser.instantiate(parsed).as_dict()
    values.pop("config", None)
    return settings(**values)


def run(command: Callable[[], object]) -> None:
    """Run a command: a sentence and exit code 2 for whatever the user can mend, 130 when it is interrupted."""
    from jsonargparse import ArgumentError

    try:
        command()
        distributed.wait_for_all()
    except BrokenPipeError:  # whoever read the output has read enough
        sys.stderr.close()
        sys.exit(141)
    except (ValueError, OSError, ArgumentError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from what was saved in --cache or --out", file=sys.stderr)
        sys.exit(130)
    finally:
        distributed.stop()


def join_list(flag: str, arguments: Sequence[str] | None = None, numbers: bool = False) -> list[str]:
    """The command line, by default the program's, with `--flag A B` as the one word that a list is among settings."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if flag in words:
        at = words.index(flag)
        end = next((i for i in range(at + 1, len(words)) if words[i].startswith("--")), len(words))
        values = words[at + 1 : end]
        if len(values) != 1 or not values[0].startswith("["):  # which is a list already
            words[at:end] = [f"{flag}=" + (f"[{','.join(values)}]" if numbers else json.dumps(values))]
    return words


def label_row(axis: Any, text: str) -> None:
    """Write the name of a row of pictures up its left side."""
    axis.text(-0.03, 0.5, text, rotation=90, ha="right", va="center", fontsize=9, transform=axis.transAxes)


def _underscores(word: str) -> str:
    name, equals, value = word.partition("=")
    return (name[:2] + name[2:].replace("-", "_") if name.startswith("--") else name) + equals + value
