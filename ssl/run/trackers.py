"""Where a run may log to beside its own folder: Weights & Biases, MLflow, trackio. Each is a package of its own."""

import importlib
import re
import secrets
from pathlib import Path
from typing import Any, Literal

import numpy as np

from skipless.common.files import write_text

TrackerName = Literal["wandb", "mlflow", "trackio"]
PROJECT = "skipless"


class Tracker:
    """A run in one of them, called like its folder; a resumed run goes on in the same.

    Addresses, keys and offline modes are those packages' own, by their environment variables.

    Args:
        folder: of the run; settings: plain values; resumed: whether the run goes on from a checkpoint.

    Raises:
        ValueError: it does not begin, for reasons of its own.
    """

    def __init__(self, name: TrackerName, folder: Path, settings: dict[str, Any], resumed: bool):
        self.name = name
        try:
            self.package = self._begin(folder.resolve(), settings, resumed)
        except Exception as error:  # a server that is away, a key that is missing: each has errors of its own
            raise ValueError(f"log_to is {name}, which does not begin: {error}") from None

    def _begin(self, folder: Path, settings: dict[str, Any], resumed: bool) -> Any:
        package: Any = importlib.import_module(self.name)
        if self.name == "mlflow":
            experiment = package.set_experiment(PROJECT).experiment_id
            place = str(folder).replace("'", "")
            earlier = package.MlflowClient().search_runs([experiment], f"tags.folder = '{place}'") if resumed else []
            package.start_run(earlier[0].info.run_id if earlier else None, run_name=folder.name)
            package.set_tag("folder", place)
            package.log_dict(settings, "settings.yaml")
        elif self.name == "trackio":
            package.init(project=PROJECT, name=own_name(folder, resumed), config=settings, resume="allow")
        else:
            own = re.sub("[:;,#?/']", "-", own_name(folder, resumed))
            package.init(project=PROJECT, id=own, name=folder.name, dir=folder, config=settings, resume="allow")
        return package

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Record numbers at a step."""
        if self.name == "mlflow":
            self.package.log_metrics(values, step=step)
        else:
            self.package.log(values, step=step)

    def picture(self, tag: str, picture: np.ndarray, step: int) -> None:
        """Record a picture, uint8 [H, W, 3]."""
        if self.name == "mlflow":
            self.package.log_image(picture, key=tag, step=step)
        else:
            self.package.log({tag: self.package.Image(picture)}, step=step)

    def close(self) -> None:
        """Bring all to where it belongs."""
        if self.name == "mlflow":
            self.package.end_run()
        else:
            self.package.finish()


def own_name(folder: Path, resumed: bool) -> str:
    """The name of a run among all of a tracker's: its folder's and a random end, kept in the folder for when the run is
    resumed. Runs that began before there was an end have none."""
    kept = folder / ".tracker"
    if resumed and not kept.exists():
        return folder.name
    if not resumed:
        write_text(kept, f"{folder.name}-{secrets.token_hex(4)}")
    return kept.read_text()
