"""The command line of every command: what its words mean, and how mistakes end."""

import errno
import os
import pwd
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
from helpers import ROOT

from skipless.__main__ import COMMANDS
from skipless.common import cli, interruption
from skipless.common.settings import OLD_NAMES, OLD_VALUES, flat, plain, renamed
from skipless.ssl.pretrain import Settings as Pretraining


@dataclass
class Data:
    """What is measured."""

    root: str
    """Its folder."""
    name: Literal["folder", "voc12"] = "folder"
    """What it is."""
    train_split: str = "train"
    """The split to learn from."""


@dataclass
class Settings:
    """A command."""

    ckpt: str
    """The backbone."""
    data: Data
    k: tuple[int, ...] = (20, 10)
    """Neighbors."""
    scale: tuple[float, float] | None = None
    """A range."""
    names: tuple[str, ...] = ()
    """Words."""
    every_block: bool = False
    """Each block by itself."""
    out: str | None = None
    """Folder of the result."""
    speed: float | Literal["auto", "slow"] | None = None
    """How fast."""


@dataclass
class Packing:
    """A command whose required settings stand without flags."""

    runs: list[Path]
    """Folders."""
    out: Path = field(default_factory=lambda: Path("here"))
    """Where to."""
    dry_run: bool = False
    """Do nothing."""


NEEDED = ["--ckpt=x", "--data.root=y"]


def read(*words: str) -> Settings:
    return cli.parse(Settings, [*NEEDED, *words])


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--k", "5", "7"], "k", (5, 7)),
        (["--k", "[5,7]"], "k", (5, 7)),
        (["--k=[5,7]"], "k", (5, 7)),
        (["--k=5"], "k", (5,)),
        (["--scale", "0.3", "1"], "scale", (0.3, 1.0)),
        (["--scale=null"], "scale", None),
        (["--names", "a b", "c"], "names", ("a b", "c")),
        (["--names", "7"], "names", ("7",)),
        (["--every-block"], "every_block", True),
        (["--every_block", "--out", "o"], "every_block", True),
        (["--every-block", "false"], "every_block", False),
        (["--every-block=true"], "every_block", True),
        (["--data.train-split", "trainaug"], "data.train_split", "trainaug"),
        (["--data.train_split=train-aug"], "data.train_split", "train-aug"),
    ],
)
def test_flags(words: list[str], name: str, value: object) -> None:
    settings = read(*words)
    for part in name.split("."):
        settings = getattr(settings, part)
    assert settings == value


def test_later_words_and_files_win(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("k: [3]\ndata: {root: z}\n")
    assert cli.parse(Settings, ["--ckpt=x", "--config", str(file)]).data.root == "z"
    assert read("--k=9", f"--config={file}").k == (3,)
    assert read(f"--config={file}", "--k", "9", "--data.root=q").data.root == "q"


def test_home_is_expanded_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    settings = read("--out", "~/o", "--names", "~/a", "b", "--data.root=~")
    assert (settings.out, settings.names, settings.data.root) == ("/somewhere/o", ("/somewhere/a", "b"), "/somewhere")
    packing = cli.parse(Packing, ["~/run"], positional=True)
    assert packing.runs == [Path("/somewhere/run")]


@pytest.mark.parametrize("words", [["--config", "~/x.yaml"], ["--out=~/o"], ["--data.root=~nosuchuser/x"]])
def test_a_user_without_a_home_is_told_so(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda _: {}["uid not found"])
    with pytest.raises(ValueError, match=r"^~\S+ names a user whose home this machine does not know"):
        read(*words)


def test_required_settings_can_stand_without_flags() -> None:
    for words in (["a", "b", "--dry-run"], ["--dry-run", "a", "b"], ["a", "b", "--dry_run", "true"]):
        settings = cli.parse(Packing, words, positional=True)
        assert (settings.runs, settings.out, settings.dry_run) == ([Path("a"), Path("b")], Path("here"), True)


def test_recipe_comes_before_the_words(tmp_path: Path) -> None:
    (tmp_path / "voc12.yaml").write_text("k: [1]\nevery_block: true\n")
    parsed = cli.parse(
        Settings, [*NEEDED, "--data.name=voc12", "--k=2"], recipe=lambda s: tmp_path / f"{s.data.name}.yaml"
    )
    assert (parsed.k, parsed.every_block) == ((2,), True)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--nope", "3"], "there is no setting --nope: --help-all"),
        (["--scael", "1"], "did you mean --scale?"),
        (["--train-splits", "x"], "did you mean --data.train_split?"),
        (["--every", "true"], "there is no setting --every: "),  # a beginning is not enough
        (["--k", "x"], "k is 'x'; give a whole number"),
        (["--speed", "fast"], "speed is 'fast'; give a number or auto or slow"),
        (["--out", "--every-block"], "--out has no value"),
        (["--every-block", "--out"], "--out has no value"),
        (["--data.name=ade"], "data.name is 'ade'; choose one of folder, voc12"),
        (["--every-block=perhaps"], "every_block"),
        (["--config=nowhere.yaml"], "there is no settings file nowhere.yaml"),
    ],
)
def test_mistakes_end_in_one_sentence_and_status_2(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.run(do_nothing, Settings, None, [*NEEDED, *words])
    printed = capsys.readouterr()
    assert (end.value.code, printed.out) == (2, "")
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert sentence in printed.err


@pytest.mark.parametrize(
    ("error", "status", "printed"),
    [
        (ValueError("a\n  b"), 2, "error: a b\n"),
        (
            FileNotFoundError(2, "No such file or directory", "x"),
            2,
            "error: [Errno 2] No such file or directory: 'x'\n",
        ),
        (
            ValueError("Caught ValueError in DataLoader worker 0.\nTraceback (most recent\nValueError: no"),
            2,
            "error: no\n",
        ),
        (
            OSError(errno.EROFS, "Read-only file system", "a/cache"),
            2,
            "error: a/cache: read-only file system; give another place",
        ),
        (RuntimeError("[gloo/transport/tcp/pair.cc:545] Connection reset by peer"), 2, "error: another process"),
        (RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting"), 2, "error: another process"),
        (RuntimeError("Timed out after 7 seconds waiting for clients. 1/2"), 2, "error: another process"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors(error: BaseException, status: int, printed: str, capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise error

    with pytest.raises(SystemExit) as end:
        cli.guard(command)
    assert end.value.code == status
    assert capsys.readouterr().err.startswith(printed)


def test_other_errors_are_bugs_and_keep_their_traceback() -> None:
    def command() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.guard(command)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"data: {rot: y}", "x.yaml: there is no setting data.rot: did you mean --data.root?"),
        (b"a: 1\nk: [1", "x.yaml, line 2 is no valid YAML"),
        (b"- 1", "x.yaml holds no settings"),
        (b"\xff\xfe\x00\xd8", "x.yaml is no text"),
    ],
)
def test_mistakes_in_a_file_of_settings_name_the_file(content: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        read("--config", str(tmp_path / "x.yaml"))


def test_missing_settings_are_named_as_they_are_given() -> None:
    with pytest.raises(ValueError, match=r"^--ckpt and --data\.root are missing;"):
        cli.parse(Settings, [])
    with pytest.raises(ValueError, match=r"^RUNS is missing;"):
        cli.parse(Packing, [], positional=True)


def test_a_command_may_fill_in_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    asked = []

    def fill(missing: list[str], words: list[str]) -> list[str]:
        asked.append((missing, words))
        return ["--ckpt=found", "--data.train_split=train"]

    settings = cli.parse(Settings, ["--data.root", "x", "--data.train_split=val"], fill=fill)
    assert (settings.ckpt, settings.data.root, settings.data.train_split) == ("found", "x", "val")
    assert asked == [(["ckpt"], ["--data.root=x", "--data.train_split=val"])]
    with pytest.raises(ValueError, match=r"^--data\.root is missing;"):
        cli.parse(Settings, [], fill=fill)
    cli.parse(Settings, ["--ckpt=a", "--data.root=b"], fill=fill)
    with pytest.raises(SystemExit):
        cli.parse(Settings, ["--print_config"], fill=fill)
    assert len(asked) == 2
    assert "found" not in capsys.readouterr().out


def test_help_is_short_and_its_groups_are_told_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    def told(*words: str) -> str:
        with pytest.raises(SystemExit):
            cli.parse(Pretraining, words)
        return capsys.readouterr().out

    short, optimizer, everything = told("--help"), told("--help", "optimizer"), told("--help-all")
    for text, shown, hidden in (
        (short, ["--out OUT", "--data.path", "--optimizer.*"], ["--optimizer.lr", "--dino.out_dim"]),
        (optimizer, ["--optimizer.lr", "--optimizer.betas"], ["--out OUT", "--dino.out_dim"]),
        (everything, ["--out OUT", "--data.path", "--optimizer.lr", "--dino.out_dim"], []),
    ):
        assert all(flag in text for flag in shown)
        assert not any(flag in text for flag in hidden)


def test_help_names_every_setting_with_its_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.run(do_nothing, Settings, "What it is for.\n\n    An example.", ["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for part in ("common/test_cli.py", "What it is for.\n\n    An example.", "--data.train_split", "Neighbors."):
        assert part in text


def do_nothing(settings: Settings) -> None:
    """A command."""


def test_old_names_mean_todays_settings(tmp_path: Path) -> None:
    old = {"prototypes": "77", "teacher_temperature": "0.05", "balancing": "centre", "centre_momentum": "0.8"}
    flags = [f"--dino.{name}={value}" for name, value in old.items()]
    needed = ["--data.path=x", "--out=y"]
    by_flags = cli.parse(Pretraining, [*needed, *flags, "--crops.local-count", "3", "--crops.global_scale=[0.3,1]"])
    file = tmp_path / "old.yaml"
    lines = [f"  {name}: {value}" for name, value in old.items()]
    file.write_text("\n".join(["dino:", *lines, "crops:", "  local_count: 3", "  global_scale: [0.3, 1]"]))
    assert cli.parse(Pretraining, [*needed, "--config", str(file)]) == by_flags
    dino, crops = by_flags.dino, by_flags.crops
    assert (dino.out_dim, dino.teacher_temp, dino.balancing, dino.center_momentum) == (77, 0.05, "center", 0.8)
    assert (crops.local_crops_number, crops.global_crops_scale) == (3, (0.3, 1.0))


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--wandb"], "wandb"),
        (["--wandb", "true"], "wandb"),
        (["--wandb=false"], None),
        (["--log-to=mlflow"], "mlflow"),
    ],
)
def test_what_was_a_switch_is_a_choice(words: list[str], value: str | None, tmp_path: Path) -> None:
    assert cli.parse(Pretraining, ["--data.path=x", *words, "--out=y"]).log_to == value
    file = tmp_path / "old.yaml"
    file.write_text(f"wandb: {str(value == 'wandb').lower()}")
    by_file = cli.parse(Pretraining, ["--data.path=x", "--out=y", "--config", str(file)])
    assert by_file.log_to == (value if value == "wandb" else None)


def test_table_of_old_names_fits_the_settings() -> None:
    today: dict[str, Any] = flat(plain(cli.parse(Pretraining, ["--data.path=x", "--out=y"])))
    groups = ("crops.", "dino.")
    for old, new in OLD_NAMES.items():
        if old.startswith(groups):
            assert new in today, old
            assert old not in today, old
    assert {name for name, _ in OLD_VALUES} <= set(today)


def test_renamed_leaves_other_settings_alone() -> None:
    tree = {
        "dino": {"hidden": 3, "balancing": "sinkhorn"},
        "hidden": 4,
        "crops": {"local_size": [1, 2]},
        "x": None,
    }
    expected: dict[str, Any] = {
        "dino": {"hidden_dim": 3, "balancing": "sinkhorn"},
        "hidden": 4,
        "crops": {"local_crops_size": [1, 2]},
        "x": None,
    }
    assert renamed(tree) == expected
    assert renamed(expected) == expected


def test_torch_is_not_needed_to_read_a_command_line() -> None:
    probe = """
import subprocess
import sys
from dataclasses import dataclass
from skipless.common import cli
@dataclass
class Settings:
    '''A command.'''
    name: str = 'x'
    '''A name.'''
cli.run(lambda settings: print(settings.name, 'torch' in sys.modules), Settings, None, ['--name=y'])
"""
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "y False\n"), done.stderr


def test_values_that_look_like_flags_belong_to_theirs() -> None:
    assert cli.canonical(Settings, ["--out", "-1", "--k", "-3"]) == ["--out=-1", "--k=[-3]"]


@pytest.mark.parametrize("words", [["ssl/pretrain.py"], ["-m", "skipless", "knn"]])
def test_ctrl_c_while_modules_are_imported_is_a_sentence(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("""
import os, signal
try: os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt: pass  # as libraries do where others cannot be imported
""")
    noticed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # tests in the background ignore it
    with_this = {"cwd": ROOT, "env": os.environ | {"PYTHONPATH": str(tmp_path)}, "preexec_fn": noticed}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, **with_this)
    assert (done.returncode, done.stderr) == (130, f"{interruption.SENTENCE}\n")


@pytest.mark.parametrize("words", [[], ["--version"], ["scenes", "--help"]], ids=" ".join)
@pytest.mark.parametrize("unbuffered", ["", "1"])  # printed at once, or at the end
def test_a_pipe_that_nobody_reads_ends_a_command_without_a_word(words: list[str], unbuffered: str) -> None:
    read, write = os.pipe()
    os.close(read)
    command, env = [sys.executable, "-m", "skipless", *words], os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=env, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_ready_for_ctrl_c_before_it_imports_anything(name: str) -> None:
    script = ROOT / f"{COMMANDS[name][0].replace('.', '/')}.py"
    first = next(line for line in script.read_text().splitlines() if line.startswith(("import", "from")))
    assert first.startswith("import skipless.common.interruption")
