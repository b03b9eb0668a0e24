"""Settings that nobody means, for every command: each is refused in one sentence, or is fit to be begun.

    python benchmarks/fuzzing.py --draws 5000
    python benchmarks/fuzzing.py --commands pretrain knn --draws 200 --seed 3

A draw is a command on miniatures with one to three flags more. The command runs up to where it has checked everything
and the work begins. A finding is a traceback, a hang, a refusal of more than one line, or nonsense that was accepted:
numbers that are not finite or are negative where that means nothing, empty texts, addresses as places to write to.
"""

import contextlib
import importlib
import io
import math
import os
import re
import resource
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints
from unittest.mock import patch

import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings, strategies
from measuring import markdown, publish
from miniatures import command_lines, write_data

from skipless.__main__ import COMMANDS
from skipless.common import cli

# Where the work of a command begins: a function that it calls then, of its own module if nothing else is said.
WORK = {
    name: "announce" for name in ("segmentation", "discovery", "retrieval", "clustering", "knn", "linear", "saliency")
}
WORK |= {"pretrain": "Run", "distill": "Run", "supervised": "Run", "report": "run_quietly", "quantization": "announce"}
WORK |= {"pca": "save_figure", "attention-maps": "save_figure", "similarity": "save_figure", "conditioning": "measure"}
WORK |= {"recipe": "measure", "export": "whole_folder"}
WORK |= {"match": "save_figure", "correspondence": "announce", "video": "announce", "depth": "announce"}
WORK |= {"crop-sheet": "write_atomically", "summarize": "write_result", "watch": "page_of"}
WORK |= {"shard": "skipless.datasets.storage.packing.spread", "scenes": "skipless.datasets.synthetic.dataset.spread"}

NUMBERS = (
    "0", "-1", "1", "2", "3", "4", "7", "8", "16", "32", "48", "500", "1000000", "1e9", "1e30", "1e400", "nan", ".nan",
    "inf", "-.inf", "-0.5", "0.5", "0.1", "1e-320", "9223372036854775808", "-9223372036854775809", "0x10",
    "1_000", "1,5", "1.0", "true", "null",
)  # fmt: skip
TEXTS = (
    "", " ", "~nosuchuser", "~", "s3://bucket/folder", "gs://bucket", "..", "/dev/null", "/dev/zero", "/proc/self/mem",
    "-", "--", "null", "[]", "{}", "[1", "{a: 1}", "a" * 5000, "{000000000..999999999}", "%s", "\n", "é日本\u202e",
    "none.zip", "hf:none", "timm:none", "nothing:more", "last9", "0", "-1", "1,1", "3,6,9,12",
)  # fmt: skip
LISTS = (
    "[]", "[1]", "[0.1,0.5]", "[0.5,0.1]", "[.nan,.nan]", "[-1,-2]", "[inf,1]", "[[1]]", "[null]", "[1,2,3,4]", "[0,0]",
    "[0,0,0]", "[a,b]", '["a","a"]', "[1e9,1e9]", "[9223372036854775808]",
)  # fmt: skip
# Numbers that may be negative: a cosine.
SIGNED = ("tau",)
PLACES = ("out", "cache", "figure")  # that are written to
SECONDS = 30  # that a check may take
MEMORY = 6 * 2**30  # bytes of addresses that a draw may ask for beside what is there


@dataclass
class Settings:
    """Fuzzing of settings."""

    commands: tuple[str, ...] = tuple(COMMANDS)
    """Which."""
    draws: int = 5000
    """Over all of them."""
    seed: int = 0
    """Of the draws."""
    out: Path | None = None
    """Where to write OUT.json and OUT.md; by default nowhere."""


class Checked(BaseException):
    """The command would begin to work."""


class Hang(BaseException):
    """The command takes too long."""


def stop(*_: Any, **__: Any) -> None:
    """In place of work."""
    raise Checked


def hung(*_: Any) -> None:
    """At an alarm."""
    raise Hang


def leaves(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, type) of every setting."""
    hints = get_type_hints(kind)
    for field in fields(kind):
        if is_dataclass(hints[field.name]):
            yield from leaves(hints[field.name], f"{prefix}{field.name}.")  # type: ignore[arg-type]
        else:
            yield f"{prefix}{field.name}", hints[field.name]


def kinds_of(kind: Any) -> set[Any]:
    """The types that a value may have: those of a union, the elements of a list."""
    inside = [part for part in get_args(kind) if isinstance(part, type) or get_args(part)]
    return {get_origin(kind) or kind}.union(*map(kinds_of, inside))


def values_of(kind: Any) -> strategies.SearchStrategy[str]:
    """What may be given to a setting: mostly of its type, and a bit off."""
    kinds = kinds_of(kind)
    numbers = strategies.sampled_from(NUMBERS) | strategies.integers().map(str) | strategies.floats().map(repr)
    harmless = strategies.characters(exclude_categories=["Cs"], exclude_characters="\0/.")
    texts = strategies.sampled_from(TEXTS) | strategies.text(harmless, max_size=12)
    lists = strategies.sampled_from(LISTS) | strategies.lists(numbers, max_size=4).map(lambda v: f"[{','.join(v)}]")
    likely = numbers if kinds & {int, float} else texts
    if kinds & {tuple, list}:
        likely = lists | likely
    choices = [str(choice) for choice in get_args(kind) if isinstance(choice, str)]
    if choices or bool in kinds:
        likely = strategies.sampled_from(choices or ["true", "false"])
    weights = strategies.integers(0, 9)
    return weights.flatmap(lambda weight: likely if weight < 8 else numbers | texts | lists)


def nonsense(name: str, kind: Any, value: str) -> bool:
    """Whether no command can mean it."""
    kinds, last = kinds_of(kind), name.rpartition(".")[2]
    if kinds & {int, float}:
        with contextlib.suppress(yaml.YAMLError, ValueError, TypeError):
            given = yaml.safe_load(value)
            numbers = [float(number) for number in (given if isinstance(given, list) else [given])]
            return any(not math.isfinite(x) or (x < 0 and last not in SIGNED) for x in numbers)
    return kinds <= {str, Path, type(None)} and last in PLACES and (not value.strip() or "://" in value)


def outcome(main: Callable[[list[str]], object], words: list[str], odd: bool) -> str:
    """`refused` or `accepted`, or what is wrong."""
    printed, errors, status = io.StringIO(), io.StringIO(), 0
    signal.signal(signal.SIGALRM, hung)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
            main(words)
    except Checked:
        pass
    except Hang:
        return " / ".join(["hangs", *(line.strip() for line in traceback.format_exc().splitlines()[-8:])])
    except SystemExit as ending:
        status = int(ending.code or 0)
    except BaseException:
        return " / ".join(line.strip() for line in traceback.format_exc().splitlines()[-4:])
    finally:
        signal.alarm(0)
    if status == 0:
        return "accepted nonsense" if odd else "accepted"
    last = errors.getvalue().rpartition("error: ")
    if status != 2 or not last[1] or last[2].count("\n") != 1 or len(last[2]) > 1500 or "Traceback" in last[2]:
        return f"exit {status}: {errors.getvalue()[-300:]}"
    return "refused"


def fuzz(name: str, lines: list[str], draws: int, number: int, progress: Path) -> tuple[Counter[str], list[str]]:
    """How often a command refused and accepted, and the findings. Leaves the draw that it is at in `progress`."""
    module = importlib.import_module(f"skipless.{COMMANDS[name][0]}")
    counts: Counter[str] = Counter()
    findings: list[str] = []
    kinds = dict(leaves(module.main.args[1]))
    kinds.pop("log_to", None)
    positional = module.main.keywords.get("positional")
    places = [field.name for field in fields(module.main.args[1]) if positional and field.default is MISSING]
    one = strategies.sampled_from(sorted(kinds)).flatmap(
        lambda flag: strategies.tuples(strategies.just(flag), values_of(kinds[flag]))
    )

    @seed(number)
    @settings(
        max_examples=draws, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=[*HealthCheck]
    )
    @given(strategies.lists(one, min_size=1, max_size=3, unique_by=lambda pair: pair[0]))
    def draw(flags: list[tuple[str, str]]) -> None:
        placed = {place: value for place, value in flags if place in places}
        words = [placed.get(place, word) for place, word in zip_longest(places, lines)]
        words += [f"--{flag}={value}" for flag, value in flags if flag not in placed]
        words += ["--dry-run"] * (name == "prepare")
        said = f"{name} {' '.join(f'{flag}={value[:99]!r}' for flag, value in flags)}"
        progress.write_text(said)
        ended = outcome(module.main, words, any(nonsense(flag, kinds[flag], value) for flag, value in flags))
        counts[ended if ended in ("refused", "accepted") else "findings"] += 1
        if ended not in ("refused", "accepted"):
            findings.append(f"{said}: {ended}")

    work = WORK.get(name)
    target = work if work is None or "." in work else f"{module.__name__}.{work}"
    with patch(target, stop) if target else contextlib.nullcontext():
        draw()
    return counts, findings


def measure(given: Settings) -> None:
    """Fuzz every command, and print how often it refused and accepted. Raises ValueError where there are findings."""
    unknown = [name for name in given.commands if name not in COMMANDS]
    if unknown or given.draws < 1:
        raise ValueError(f"commands are {', '.join(COMMANDS)}, and draws 1 or more")
    rows, found = [], []
    began = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        (folder / "in").mkdir()
        os.chdir(folder / "in")  # where relative names are written to
        os.environ |= {"HOME": name, "HF_HUB_OFFLINE": "1"}
        used = int(re.findall(r"VmSize:\s*(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
        lines = command_lines(folder, folder / "out")
        for number, command in enumerate(given.commands):
            # As many each, and those that are left over to the first.
            draws = (given.draws - number - 1) // len(given.commands) + 1
            counts, findings = fuzz(command, lines[command], draws, given.seed, folder / "at")
            rows.append({"command": command, **{what: counts[what] for what in ("refused", "accepted", "findings")}})
            found += findings
            print(f"{command}: {dict(counts)}", file=sys.stderr, flush=True)
        os.chdir(began)
    publish(
        given.out, {"task": "fuzzing", "seed": given.seed, "details": rows, "findings": found}, markdown(rows), "cpu"
    )
    if found:
        print(*found, sep="\n", file=sys.stderr)
        raise ValueError(f"{len(found)} findings, above")


main = partial(cli.run, measure, Settings, __doc__)

if __name__ == "__main__":
    main()
