"""The command line: parse, call, print. One file a verb; what a verb needs is imported when it runs.

A verb in two words is a file in the package of its first word, whose VERBS it is among.
"""

from __future__ import annotations

import argparse
import errno
import re
import signal
import sys
import traceback
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType

from acmix_deploy import __version__
from acmix_deploy.cli import (
    adopt,
    build,
    detect,
    device,
    doctor,
    export,
    fp16,
    fuse,
    gate,
    inspect,
    package,
    plugin,
    profile,
    quantize,
    report,
    serve,
    verify,
)
from acmix_deploy.cli.common import FILES, add_common, be_quiet
from acmix_deploy.cli.habits import Help, Parser, add_aliases, keys_and_values, unrecognized
from acmix_deploy.cli.on import check_on
from acmix_deploy.errors import AcmixDeployError, MissingComponent, UserError

VERBS = (
    export,
    fuse,
    fp16,
    quantize,
    build,
    adopt,
    verify,
    profile,
    gate,
    report,
    detect,
    serve,
    package,
    inspect,
    doctor,
    device,
    plugin,
)

EXIT_CODES = """exit codes:
  0  done
  1  a check failed: too large an error, another number of blocks than expected
  2  the command line or an input file cannot be used
  3  a package, library, compiler or device is missing
  4  gate: what was measured is inconclusive, or cannot be compared
  130  interrupted, as by Ctrl-C
  143  ended by SIGTERM
"""


def parser() -> argparse.ArgumentParser:
    """The command line of ``acmix-deploy``."""
    top = Parser(
        prog="acmix-deploy",
        description="Takes detectors with ACmix blocks from a checkpoint to verified, fused ONNX files and engines.",
        epilog=EXIT_CODES,
        formatter_class=Help,
    )
    top.add_argument("--version", action="version", version=f"acmix-deploy {__version__}")
    _add_verbs(top, VERBS)
    return top


def commands(top: argparse.ArgumentParser | None = None) -> dict[str, argparse.ArgumentParser]:
    """The parser of every verb by its name: ``export``, ``plugin build``."""
    found = {}
    for action in (top or parser())._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                inner = commands(command)
                found.update({f"{name} {word}": leaf for word, leaf in inner.items()} or {name: command})
    return found


def _add_verbs(parent: argparse.ArgumentParser, modules: Iterable[ModuleType]) -> None:
    verbs = parent.add_subparsers(metavar="VERB", required=True, help="one of those below, with its own --help")
    for verb in modules:
        summary, _, example = (verb.__doc__ or "").partition("\n\n")
        command = verbs.add_parser(
            verb.__name__.rsplit(".", 1)[-1],
            help=summary,
            description=summary,
            epilog=example,
            formatter_class=Help,
        )
        if hasattr(verb, "VERBS"):
            _add_verbs(command, verb.VERBS)
            continue
        verb.add_arguments(command)
        add_common(command)
        add_aliases(command)
        for action in command._actions:
            if action.type is Path:
                action.complete = FILES  # type: ignore[attr-defined]
        command.set_defaults(run=verb.run, command=command)


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    top = parser()
    for name, command in commands(top).items():
        words = name.split()
        if [*arguments[: len(words)]] == words and (said := keys_and_values(name, command, arguments[len(words) :])):
            command.error(said)
    options, unknown = top.parse_known_args(arguments)
    if unknown:
        options.command.error(unrecognized(options.command, unknown))
    return options


def _outside(error: Exception) -> AcmixDeployError | None:
    """An exception that whoever runs the program caused, as an error; None where it is a fault of the program."""
    if isinstance(error, ModuleNotFoundError) and (way := _way_to(str(error.name))):
        return MissingComponent(f"{error.name} is not installed, or not whole", way)
    if isinstance(error, OSError) and error.filename and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f"{error.filename}: {error.strerror}", "Choose files and folders that you may read and write.")
    if "surrogates not allowed" in str(error):
        return UserError("the name of a file is not in UTF-8", "Rename it, or set LANG=C.UTF-8.")
    return None


def _way_to(module: str) -> str:
    """How a module is installed that this package or one of its extras for users needs; nothing for others."""
    name = module.partition(".")[0].replace("_", "-")
    for needed in metadata.requires("acmix-deploy") or ():
        if name != "acmix-deploy" and re.match(rf"{re.escape(name)}\b(?![-.])", needed):
            extra = re.search(r"extra == ['\"]([\w-]+)", needed)
            if not extra:
                return f"Run: pip install --force-reinstall {name}"
            if extra[1] not in ("test", "site", "dev"):
                return f"Run: pip install 'acmix-deploy[{extra[1]}]'"
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code; see EXIT_CODES."""
    options = _parsed(sys.argv[1:] if arguments is None else arguments)
    be_quiet(options.quiet)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that temporary files are removed
    try:
        if hasattr(options, "on"):
            check_on(options)
        return int(options.run(options))
    except AcmixDeployError as error:
        if options.debug:
            traceback.print_exc()
        else:
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except Exception as error:
        if options.debug:
            raise
        if outside := _outside(error):
            print(f"error: {outside}", file=sys.stderr)
            return outside.exit_code
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        print("This is a fault of acmix-deploy; run again with --debug and report what it prints.", file=sys.stderr)
        return 1
