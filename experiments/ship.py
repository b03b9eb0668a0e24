"""Put a run's backbone among the weights that come with the package, in float16: skipless:NAME.

    python experiments/ship.py --run runs/distill_tiny/skipless-lr0.008-seed0 --name tiny

Writes ssl/model/shipped/NAME.safetensors, and NAME.json with what the run says of itself.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from safetensors.torch import save_file

from skipless.common import cli
from skipless.common.files import write_atomically, write_text
from skipless.datasets.storage.names import dataset_name
from skipless.ssl.model.load import SHIPPED
from skipless.ssl.run.checkpoints import load_run_backbone

LARGEST = 10**7  # bytes, of all files together: nobody waits for a package


@dataclass
class Settings:
    """Weights to come with the package."""

    run: str
    """Folder of a finished run."""
    name: str
    """How they are to be called: skipless:NAME."""


def ship(settings: Settings) -> Path:
    """Write the files; the weights' path.

    Raises:
        FileNotFoundError, ValueError: there is no such run, or the files together would be too large.
    """
    folder = Path(settings.run)
    backbone, about = load_run_backbone(folder)
    tensors = {name: tensor.half().contiguous() for name, tensor in backbone.state_dict().items()}
    path = SHIPPED / f"{settings.name}.safetensors"
    others = sum(file.stat().st_size for file in SHIPPED.glob("*.safetensors") if file != path)
    if (size := others + sum(2 * tensor.numel() for tensor in tensors.values())) > LARGEST:
        raise ValueError(f"with {settings.name} the shipped weights take {size:,} bytes; at most {LARGEST:,} may come")
    about["settings"]["data"]["path"] = dataset_name(Path(about["settings"]["data"]["path"]))
    about["settings"]["out"] = f"runs/{folder.parent.name}/{folder.name}"
    SHIPPED.mkdir(exist_ok=True)
    metadata = {"architecture": json.dumps(about["architecture"])}
    write_atomically(path, lambda beside: save_file(tensors, beside, metadata))
    write_text(path.with_suffix(".json"), json.dumps(about, indent=1) + "\n")
    return path


main = partial(cli.run, ship, Settings, __doc__)

if __name__ == "__main__":
    main()
