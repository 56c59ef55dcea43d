"""Programs in processes of their own: what crashes there ends nothing here. And what all threads of this one share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any, NamedTuple

from acmix_deploy.errors import MissingComponent

WHOLE_PROCESS = threading.RLock()
"""Held by who changes for a while what all threads share, so that it becomes what it was: stdout, the environment,
``sys.path``, filters of warnings, verbosity of loggers, threads of PyTorch."""


@contextmanager
def unprinted() -> Iterator[None]:
    """Drop what this thread prints; others go on printing."""
    with WHOLE_PROCESS, redirect_stdout(_OfOthers()):
        yield


@contextmanager
def polygraphy_unlogged() -> Iterator[None]:
    """Let Polygraphy log nothing."""
    from polygraphy.logger import G_LOGGER

    with WHOLE_PROCESS, G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
        yield


class _OfOthers:
    """stdout, without what the thread that made this writes."""

    def __init__(self) -> None:
        self._stdout, self._dropped = sys.stdout, threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._dropped else self._stdout.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stdout, name)


class Ended(NamedTuple):
    """A program that has ended, and what it printed."""

    code: int
    """Its exit code; -9 where SIGKILL ended it."""
    stdout: str
    stderr: str

    @property
    def how(self) -> str:
        """See :func:`ending`."""
        return ending(self.code)

    @property
    def killed(self) -> bool:
        """Whether it was ended as the system does when memory runs out."""
        return self.code == -signal.SIGKILL

    @property
    def last_words(self) -> str:
        """The last line on stderr."""
        return next((line for line in reversed(self.stderr.splitlines()) if line.strip()), "nothing on stderr")


def run(
    command: Sequence[str | Path],
    given: str = "",
    *,
    environment: Mapping[str, str] | None = None,
    timeout: float | None = None,
    each_line: Callable[[str], None] | None = None,
    name: str = "",
) -> Ended:
    """Run a program to its end; it ends when this is interrupted.

    Args:
        command: the program and its arguments.
        given: what it reads on stdin.
        environment: its variables; by default those of this process.
        timeout: seconds that it may take; without ``each_line`` only.
        each_line: told what it prints on stdout while it runs, line by line.
        name: how an error calls it; the program and its first argument by default.

    Raises:
        MissingComponent: it cannot be started, or takes longer.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as stderr:
        try:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                errors="replace",
            )
        except OSError as error:
            raise MissingComponent(f"{command[0]} does not run: {error.strerror}") from error
        with process:
            try:
                if each_line:
                    stdout = "".join(_lines(process, given, each_line))
                else:
                    stdout, _ = process.communicate(given, timeout)
            except subprocess.TimeoutExpired as error:
                process.kill()
                called = name or " ".join(map(str, command[:2]))
                raise MissingComponent(f"{called} did not answer within {error.timeout:.0f} seconds") from error
            except BaseException:
                process.terminate()
                raise
        stderr.seek(0)
        return Ended(process.returncode, stdout, stderr.read())


def _lines(process: subprocess.Popen[str], given: str, each_line: Callable[[str], None]) -> Iterator[str]:
    assert process.stdin
    assert process.stdout
    with suppress(BrokenPipeError), process.stdin:  # it may end without reading
        process.stdin.write(given)
    for line in process.stdout:
        each_line(line)
        yield line


def ending(code: int) -> str:
    """How a process ended, by its code: ``SIGSEGV`` or ``exit code 1``."""
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def importing_here() -> dict[str, str]:
    """Variables with which another Python imports what this one can.

    Start it with a script by its path: with -m a module of the user's folder could stand in for one of the standard
    library.
    """
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
