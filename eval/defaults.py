"""What an evaluation does that was not told: data, checkpoint and folder, with a sentence on each."""

from collections.abc import Mapping

from skipless.common.files import new_path
from skipless.datasets.public.places import DATA, first_there, say, scenes_instead
from skipless.ssl.model.load import shipped_file
from skipless.ssl.run.folder import RUNS, newest_run

SHIPPED = "skipless:tiny"


def fill(
    task: str,
    places: Mapping[str, tuple[str, str]],
    name: str,
    on_scenes: list[str],
    missing: list[str],
    words: list[str],
) -> list[str]:
    """Words for the checkpoint and for the data where they are missing, and for a new folder then; see `cli.run`.

    Args:
        places: of files or folders in `DATA`, each with the name and the root of the set that it belongs to.
        name: of a set of datasets/prepare.py that would do; on_scenes: more words, where there is none of them.
    """
    added: list[str] = []
    ckpt = choose_ckpt() if "ckpt" in missing else ""  # before anything is written
    if {"data.name", "data.root"} <= set(missing):
        if there := first_there(places):
            data, root = places[there]
            added += [f"--data.name={data}", f"--data.root={DATA / root}"]
            say(f"data: {data} in {DATA / root}")
        else:
            added += [*on_scenes, "--data.name=scenes", f"--data.root={scenes_instead(name)}"]
    if ckpt:
        added.append(f"--ckpt={ckpt}")
        say_ckpt(ckpt)
    if added:
        added.append(f"--out={new_path(RUNS / task)}")
    return added


def choose_ckpt() -> str:
    """The run in `RUNS` that was finished last, else the weights that come with the package.

    Raises FileNotFoundError where there are neither.
    """
    if run := newest_run():
        return str(run)
    shipped_file(SHIPPED)
    return SHIPPED


def say_ckpt(ckpt: str) -> None:
    """Say which checkpoint was chosen, and why."""
    say(f"checkpoint: {ckpt}, {f'as {RUNS} has no finished run' if ckpt == SHIPPED else f'the newest in {RUNS}'}")
