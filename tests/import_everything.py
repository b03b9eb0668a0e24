"""Imports every module of the package in a process where nothing of it, and no optional package, has been imported."""

import importlib
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> None:
    """Two words, each with commas: modules to import, and modules that are missing. Prints what fails."""
    names, missing = (word.split(",") for word in arguments)
    for loaded in [*sys.modules]:
        if loaded.partition(".")[0] in {"skipless", *missing}:
            del sys.modules[loaded]
    sys.modules.update(dict.fromkeys(missing))
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:
            print(name, repr(error))
