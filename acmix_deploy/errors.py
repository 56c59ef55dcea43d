"""What a user is told when something is wrong, and the exit code that goes with it."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class AcmixDeployError(Exception):
    """Base of every error that ends a command in one sentence instead of a traceback.

    Args:
        message: what was found and what was expected.
        hint: what to do about it; printed on a line of its own.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class CheckFailed(AcmixDeployError):
    """A comparison, a count or a limit was not met (exit code 1)."""

    exit_code = 1


class UserError(AcmixDeployError):
    """The command line or an input file cannot be used as it is (exit code 2)."""

    exit_code = 2


class MissingComponent(AcmixDeployError):
    """A package, library or device that the request needs is not there (exit code 3)."""

    exit_code = 3


class Inconclusive(AcmixDeployError):
    """What was measured does not tell, or cannot be compared (exit code 4)."""

    exit_code = 4


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A question that names what a word is nearly; nothing where it is near nothing that is known."""
    return "".join(f"Did you mean {near}?" for near in get_close_matches(word, list(known), n=1))
