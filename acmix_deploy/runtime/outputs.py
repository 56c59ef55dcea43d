"""Outputs of a model for inputs in files, where neither stays in memory of one process.

A program too: ``python -m acmix_deploy.runtime.outputs MODEL INPUTS OUTPUTS``, with errors and exit codes as those of
the verbs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from polygraphy.comparator import Comparator
from polygraphy.logger import G_LOGGER

from acmix_deploy.errors import AcmixDeployError
from acmix_deploy.runtime.models import open_model


def write_outputs(model: Path, inputs: Path, outputs: Path) -> None:
    """Run a model on every ``.npz`` of a folder and write what it gives under the same name into another one.

    Raises:
        AcmixDeployError: it cannot be run, see :func:`acmix_deploy.runtime.models.open_model` and its runner.
    """
    outputs.mkdir(parents=True, exist_ok=True)
    files = sorted(inputs.glob("*.npz"))
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        ((_, found),) = Comparator.run([open_model(model).runner], data_loader=[dict(np.load(file)) for file in files])
    for file, arrays in zip(files, found, strict=True):
        np.savez(outputs / file.name, **{name: arrays[name] for name in arrays})


def main() -> int:
    try:
        write_outputs(*map(Path, sys.argv[1:]))
    except AcmixDeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
