"""A verb on a device: its files go there, it runs there, and its document and what it writes come back."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from acmix_deploy.artifacts import sidecar
from acmix_deploy.cli.common import print_step, progress, tell
from acmix_deploy.device.session import WAIT_S, DeviceSession
from acmix_deploy.document import D, write_document
from acmix_deploy.errors import MissingComponent, UserError
from acmix_deploy.files import kind_of, not_there
from acmix_deploy.options import not_negative


def add_on(parser: argparse.ArgumentParser, *writes: str) -> None:
    """Options of the verbs that a device can run. ``writes`` are those whose files come from there."""
    parser.add_argument(
        "--on",
        type=_named,
        metavar="DEVICE",
        help="run on another machine: a name of `device add`, or a host as ssh takes it",
    )
    parser.add_argument(
        "--detach",
        action="store_true",
        help="with --on: what runs there goes on when this command ends before it; the same command takes its result",
    )
    parser.add_argument(
        "--wait",
        type=not_negative,
        default=WAIT_S,
        metavar="S",
        help=f"with --on: how long to wait while the device is in use (default: {WAIT_S:.0f})",
    )
    parser.set_defaults(writes=writes)


def _named(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("it names no device")
    return text


def check_on(options: argparse.Namespace) -> None:
    """Raises UserError: an option is for a device, and none is named; or it is for what runs here alone."""
    for name, default in {"detach": False, "wait": WAIT_S, "fetch": False}.items():
        if not options.on and getattr(options, name, default) != default:
            raise UserError(f"--{name} is for a device, and none is named", "Add --on DEVICE.")
    if options.on and getattr(options, "error", None) is not None:
        raise UserError("--error explains a message here, wherever it comes from", "Leave out --on.")


@contextmanager
def connected(options: argparse.Namespace) -> Iterator[DeviceSession]:
    """The device that ``--on`` names. In the terminal while it connects: ssh may ask for a passphrase."""
    session = DeviceSession(
        options.on,
        detach=options.detach,
        wait=options.wait,
        progress=print_step,
    )
    with session, progress() as session.progress:
        yield session
    for note in session.notes:
        tell(f"note: {note}")


def run_on(
    options: argparse.Namespace, kind: type[D], session: DeviceSession | None = None, *, alone: bool = True
) -> D:
    """The document of a verb that ran on a device with the same options.

    Args:
        options: the verb's.
        kind: of its document.
        session: the device, where it is connected already.
        alone: see :meth:`acmix_deploy.device.session.DeviceSession.run`.

    Raises:
        AcmixDeployError: what the verb ended with there, or kept it from being run, see
            :meth:`acmix_deploy.device.session.DeviceSession.run`.
    """
    command = options.command
    words = command.prog.split()[1:]
    arguments, reads, writes, places = _spelt(options)
    with nullcontext(session) if session else connected(options) as device:
        device.need_package()
        device.progress(f"running {' '.join(words)} on {device.name}")
        done = device.run(
            " ".join(words),
            [[*device.command, *words, "--json", *arguments]],
            files=reads,
            writes=writes,
            alone=alone,
        )
    try:
        found = kind.model_validate(_as_here(json.loads(done.stdout), places))
        if done.code in (0, 1):  # what failed is in the document
            if getattr(options, "output", None):
                write_document(found, options.output)
            return found
        raise ValueError(done.code)
    except ValueError as error:
        device.check(done._replace(said=_as_here(done.said, places)))
        raise MissingComponent(f"{device.name} answered with something else than {words[0]} does") from error


_ELSEWHERE = "_"
_NOT_THERE = ("help", "json", "quiet", "debug", "on", "detach", "wait")


def _as_here(content: Any, places: Mapping[str, Path]) -> Any:
    """What a device says, with files called as they were here."""
    if isinstance(content, str):
        for place, path in places.items():
            content = re.sub(rf"(?<!\w){re.escape(place)}(?!\w)", str(path).replace("\\", r"\\"), content)
        return content
    if isinstance(content, list):
        return [_as_here(one, places) for one in content]
    if isinstance(content, dict):
        return {key: _as_here(one, places) for key, one in content.items()}
    return content


def _spelt(options: argparse.Namespace) -> tuple[list[str], dict[str, Path], dict[str, Path], dict[str, Path]]:
    """The options as a command line for the device; the files that it reads there, those that it writes, and what it
    calls otherwise than they are called here."""
    flags: list[str] = []
    positional: list[str] = []
    reads: dict[str, Path] = {}
    writes: dict[str, Path] = {}
    places: dict[str, Path] = {}
    for action in options.command._actions:
        value = getattr(options, action.dest, None)
        if action.dest in _NOT_THERE or value is None or value == action.default:
            continue
        texts = []
        for one in value if isinstance(value, list) else [value]:
            if not isinstance(one, Path):
                texts.append(",".join(map(str, one)) if isinstance(one, tuple) else str(one))
                continue
            name = _place(one, len(reads) + len(writes))
            texts.append(str(name))
            if name != one:
                places[str(name)] = one
            if action.dest in options.writes:
                writes |= {str(name): one, str(sidecar(name)): sidecar(one)}
            else:
                reads |= {str(place): file for place, file in _files(one, name)} | _beside(one, name)
        if not action.option_strings:
            positional += texts
        elif action.nargs == 0:
            flags.append(action.option_strings[0])
        else:
            flags += [f"{action.option_strings[0]}={text}" for text in texts]
    return [*flags, "--", *positional] if positional else flags, reads, writes, places


def _place(path: Path, index: int) -> Path:
    """Where a file is on the device: as it is called here, where that is beneath the folder of the command."""
    elsewhere = path.is_absolute() or {"..", _ELSEWHERE} & {*path.parts}
    return Path(_ELSEWHERE, str(index), path.name) if elsewhere else path


def _files(path: Path, name: Path) -> list[tuple[Path, Path]]:
    """The file by its place on the device, or the images of a folder or a data set with their labels."""
    if not path.is_dir() and path.suffix not in (".yaml", ".yml"):
        return [(name, path)]
    from acmix_deploy.detection.images import find
    from acmix_deploy.verify.accuracy import label_file

    images = find(path).paths
    base = Path(os.path.commonpath([image.parent for image in images]))
    found = [(name / image.relative_to(base), image) for image in images]
    labels = [(label_file(place), label_file(image)) for place, image in found]
    return found + [(place, file) for place, file in labels if file.is_file()]


def _weights(model: Path) -> list[Path]:
    """The files beside an ONNX file that its weights lie in; none where it is broken, which the device will say."""
    from acmix_deploy.graph import with_weights

    try:
        found = [Path(os.path.relpath(path, model.parent)) for path in with_weights(model)[1:]]
    except Exception:  # protobuf's DecodeError
        return []
    return [path for path in found if ".." not in path.parts]  # ONNX does not read those elsewhere either


def _beside(path: Path, name: Path) -> dict[str, Path]:
    """What belongs to a model: its sidecar, its weights where they are files of their own, the report of `export`."""
    found = {str(sidecar(name)): sidecar(path)} if sidecar(path).is_file() else {}
    if not path.is_file():
        if not found and not path.is_dir():
            raise not_there(path)
        return found
    kind = kind_of(path)
    if kind in ("checkpoint", "program"):
        raise UserError(
            f"{path} is a checkpoint, and there is no PyTorch on a device",
            f"Export it to the device: acmix-deploy export {path} --on DEVICE",
        )
    if kind == "onnx":
        found |= {str(name.parent / weights): path.parent / weights for weights in _weights(path)}
        if (report := path.with_name("report.json")).is_file():
            found[str(name.with_name(report.name))] = report
    return found
