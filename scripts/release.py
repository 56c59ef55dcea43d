"""usage: python -m scripts.release TAG: what the changelog says of a release, once tag, version and changelog agree."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from acmix_deploy import __version__

CHANGELOG = Path(__file__).parents[1] / "CHANGELOG.md"


def notes(tag: str, changelog: str, version: str = __version__) -> str:
    """The section of a version, without its heading.

    Raises:
        ValueError: the tag is not that of the version, or the version has no section with a date.
    """
    if tag != f"v{version}":
        raise ValueError(f"the tag is {tag}, and the version in acmix_deploy/__init__.py is {version}")
    for section in re.split(r"^(?=## )", changelog, flags=re.MULTILINE):
        heading, _, text = section.partition("\n")
        if re.fullmatch(rf"## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d", heading):
            return text.strip()
    raise ValueError(f"CHANGELOG.md has no heading ## [{version}] - YYYY-MM-DD")


def main(arguments: list[str]) -> int:
    """Print the notes. Exit code 2: there are none."""
    try:
        (tag,) = arguments
        print(notes(tag, CHANGELOG.read_text(encoding="utf-8")))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
