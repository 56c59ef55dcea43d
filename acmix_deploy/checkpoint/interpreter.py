"""A checkpoint that another Python loads, runs and exports, with packages of its own: ``--python``."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from acmix_deploy import yolo
from acmix_deploy.checkpoint import elsewhere
from acmix_deploy.checkpoint.load import LoadedModel
from acmix_deploy.detection.metadata import ModelMetadata
from acmix_deploy.errors import MissingComponent, UserError
from acmix_deploy.files import expect
from acmix_deploy.options import check_code, check_python
from acmix_deploy.process import ending

_NEWEST_OPSET = 17
"""That the TorchScript exporter is asked for; newer files are made of it here."""


class ModelElsewhere(nn.Module):
    """The model of a checkpoint in another process, which runs ``elsewhere.py``; it ends with this object.

    Args:
        python: the interpreter; it needs PyTorch and what the checkpoint needs.
        checkpoint: the file. Its code is run.
        code: the folder of its code; the current directory is searched too.

    Raises:
        UserError: the checkpoint cannot be loaded there.
        MissingComponent: the interpreter does not run.
    """

    def __init__(self, python: Path, checkpoint: Path, code: Path | None = None) -> None:
        super().__init__()
        self._python, self._checkpoint = python, checkpoint
        self._folder = tempfile.TemporaryDirectory()
        self._words = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        own = ("PYTHONPATH", "PYTHONHOME")  # of the packages here
        try:
            self._process = subprocess.Popen(
                [python, elsewhere.__file__],
                env={name: value for name, value in os.environ.items() if name not in own},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._words,
                text=True,
            )
        except OSError as error:
            raise MissingComponent(
                f"--python {python} does not run: {error.strerror}", "Name an interpreter, such as venv/bin/python."
            ) from error
        weakref.finalize(self, _end, self._process)
        told = self._ask("load", checkpoint=str(checkpoint.resolve()), code=str(code.resolve()) if code else None)
        self._versions, self._notes, self._told = told["versions"], told["notes"], told["told"]
        self._head: dict[str, Any] | None = told["head"]
        self._kept: list[int] | None = None
        if "ultralytics" in self._versions:
            self.saved_by = f"ultralytics {self._versions['ultralytics']}"

    def __deepcopy__(self, memo: object) -> ModelElsewhere:
        return self

    @property
    def loaded(self) -> LoadedModel:
        """What :func:`acmix_deploy.checkpoint.load` says of a file."""
        told = dict(self._told)
        if rows := self._rows:
            assert self._head
            told |= yolo.told_of(rows, **{name: self._head[name] for name in ("names", "stride", "channels")})
        with_versions = ", ".join(f"{name} {version}" for name, version in self._versions.items())
        notes = (*self._notes, f"loaded, run and exported by {self._python} with {with_versions}")
        return LoadedModel(self, metadata_of(told), notes)

    def forward(self, image: Tensor) -> list[Tensor]:
        """[B, C, H, W] float32 to the model's own results, as far as its export gives them, in that order.

        Raises:
            UserError: the model does not run.
        """
        own = self._run(image, prepared=False)
        if self._kept is None:
            if rows := self._rows:
                self._kept = yolo.kept(rows, own)
            else:
                self._kept = [yolo.place_of(wanted, own) for wanted in self._run(image, prepared=True)]
        return [own[index] for index in self._kept]

    def export(
        self, file: Path, shape: Sequence[int], names: list[str], axes: Mapping[str, Mapping[int, str]], opset: int
    ) -> None:
        """Write an ONNX file of the model's form for exports, with free axes, in opset 17 or less.

        Args:
            file: where it goes.
            shape: [B, C, H, W] of the example.
            names: of the outputs that :meth:`forward` gives.
            axes: names of free axes, by tensor.
            opset: at most.

        Raises:
            UserError: PyTorch cannot export it there.
        """
        # Models of repositories give all tensors; the others, in their form for exports, what is wanted.
        kept = self._kept if self._rows else [*range(len(names))]
        wanted = {"file": str(file), "shape": [*shape], "names": names, "kept": kept, "dynamic_axes": axes}
        self._ask("export", opset=min(opset, _NEWEST_OPSET), **wanted)

    @property
    def _rows(self) -> yolo.Rows | None:
        head = self._head
        return yolo.rows_of(len(head["names"]), *head["numbers"], anchors=head["anchors"]) if head else None

    def _run(self, image: Tensor, *, prepared: bool) -> list[Tensor]:
        given, found = (Path(self._folder.name, f"{name}.npz") for name in ("image", "outputs"))
        np.savez(given, image=image.numpy())
        count = self._ask("run", image=str(given), outputs=str(found), prepared=prepared)["count"]
        with np.load(found) as arrays:
            return [torch.from_numpy(arrays[str(index)]) for index in range(count)]

    def _ask(self, request: str, **arguments: Any) -> dict[str, Any]:
        assert self._process.stdin
        assert self._process.stdout
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps([request, arguments]) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._words.seek(0)
            last = next((line for line in reversed(self._words.read().splitlines()) if line.strip()), "no message")
            raise UserError(f"{self._python} ended with {ending(code)} on {self._checkpoint}: {last[:300]}")
        answer: dict[str, Any] = json.loads(line)
        if said := answer.get("error"):
            where = f" ({answer['where']})" if answer["where"] else ""
            raise UserError(
                f"{self._checkpoint} cannot be {_DONE[request]} by {self._python}: {said[:500]}{where}",
                "The interpreter of --python needs PyTorch, NumPy and what the checkpoint was trained with, and --code "
                "names the folder of its code.",
            )
        found: dict[str, Any] = answer["found"]
        return found


def metadata_of(told: Mapping[str, Any]) -> ModelMetadata:
    """The entries that ``elsewhere.py`` tells, as they are spelt here."""
    entries = {name: value for name, value in told.items() if name != "letterbox"}
    if "names" in told:
        entries["names"] = {int(index): name for index, name in told["names"].items()}
    metadata = ModelMetadata().updated(**entries)
    if "letterbox" not in told:
        return metadata
    return metadata.updated(letterbox=metadata.letterbox.model_copy(update=told["letterbox"]))


_DONE = {"load": "loaded", "run": "run", "export": "exported"}


def _end(process: subprocess.Popen[str]) -> None:
    """The script ends where there are no more requests."""
    for stream in (process.stdin, process.stdout):
        if stream:
            with suppress(OSError):
                stream.close()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def load_elsewhere(path: Path, python: Path, *, trust: bool, code: Path | None = None) -> LoadedModel:
    """What another Python loads; the module runs there.

    Args:
        path, code: see :func:`acmix_deploy.checkpoint.load`.
        python: see :class:`ModelElsewhere`, which tells what is raised.
        trust: has to be given, since code of the file is run.
    """
    check_python(python, trust)
    check_code(code, trust)
    expect(path, "checkpoint")
    return ModelElsewhere(python, path, code).loaded
