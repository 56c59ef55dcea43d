"""Known messages in a text that somebody pastes: one message, or the log that it stands in."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from functools import cache
from string import Formatter
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from acmix_deploy.doctor.messages import MESSAGES, Message, Speaker
from acmix_deploy.document import Document

LONGEST = 2 << 20
"""Characters that are searched; of a longer log the last ones, since it ends where it went wrong."""

_LONGEST_LINE = 4000
_LONGEST_QUOTE = 300

_ESCAPES = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[()][A-Z0-9])")
_TIME = r"(?:\d{4}[-/]\d\d[-/]\d\d|\d\d/\d\d/\d{4})[-T ,]\d\d:\d\d:\d\d[\d.,:Z+]*|\d\d:\d\d:\d\d[\d.,]*"
_PREFIX = re.compile(rf"^(?:[ \t>|]+|\[?(?:{_TIME})\]?:?|\[[A-Z]\]|\[TRT\]|\[TensorRT\])+", re.MULTILINE)
_FOLDERS = re.compile(
    r"(?:\b[A-Za-z]:)?(?:[\\/][^\s\\/'\":]{1,200}){1,20}?[\\/]"
    r"(?=[^\s\\/'\":]{1,200}\.(?:cc|cpp|h|py|so|onnx|engine|plan|pt|pth|whl|ya?ml)\b)"
)
_LONG_LINE = re.compile(rf"[^\n]{{{_LONGEST_LINE}}}")


class Explanation(BaseModel):
    """A known message that stands in a text."""

    model_config = ConfigDict(frozen=True)

    message: str = Field(description="its name in docs/doctor.md")
    said_by: Speaker = Field(description="program that says it")
    line: int = Field(description="where it stands first, from 1, in what is searched")
    times: int = Field(description="how often it stands there")
    quoted: str = Field(description="the words by which it is known")
    named: dict[str, tuple[str, ...]] = Field(description="what it names, such as nodes, operators and versions")
    means: str = Field(description="what it means")
    remedy: str = Field(description="what mends it")
    harmless: bool = Field(description="whether all goes on after it, and right")


class PastedDocument(Document):
    """Result of ``acmix-deploy doctor --error``."""

    document: Literal["doctor error"] = "doctor error"
    messages: tuple[Explanation, ...] = Field(
        description="in the order of the text, each once; empty where none is known"
    )
    cut: bool = Field(description="whether the text is longer than what is searched, so that its beginning is left out")


def explain(text: str) -> tuple[Explanation, ...]:
    """Which known messages of other programs stand in a text, and what they mean.

    A line is explained by one message, the first of the table that fits; escape sequences, times and folders do not
    count.

    Args:
        text: a message, or a whole log.

    Returns:
        The messages in the order of the text, each once; none where none is known.
    """
    cleaned = _cleaned(text)
    ends = [match.start() for match in re.finditer("\n", cleaned)]
    taken: set[int] = set()
    found = []
    for name, message in MESSAGES.items():
        matches: list[tuple[int, re.Match[str]]] = []
        for words in compiled(message):
            for match in words.finditer(cleaned):
                first, last = bisect_right(ends, match.start()), bisect_right(ends, match.end() - 1)
                if not taken & {first, last}:
                    matches.append((first, match))
                    taken |= {first, last}
        if matches:
            found.append(_found(name, message, sorted(matches, key=lambda entry: entry[1].start())))
    return tuple(sorted(found, key=lambda entry: entry.line))


@cache
def compiled(message: Message) -> tuple[re.Pattern[str], ...]:
    """Its wordings as patterns."""
    return tuple(re.compile(words.replace(" ", r"\s+")) for words in message.words)


def _cleaned(text: str) -> str:
    """A text without what says nothing, its lines where they were."""
    text = _ESCAPES.sub("", text.replace("\0", "").replace("\r\n", "\n")).replace("\r", " ")
    return _LONG_LINE.sub(lambda match: f"{match[0]}\n", _FOLDERS.sub("", _PREFIX.sub("", text)))


def _found(name: str, message: Message, matches: list[tuple[int, re.Match[str]]]) -> Explanation:
    line, first = matches[0]
    named: dict[str, dict[str, None]] = {}
    for _, match in matches:
        for group, value in match.groupdict().items():
            if value:
                named.setdefault(group, {})[" ".join(value.split())] = None
    words = {group: ", ".join(values) for group, values in named.items()}
    quoted = " ".join(first[0].split())
    return Explanation(
        message=name,
        said_by=message.said_by,
        line=line + 1,
        times=len(matches),
        quoted=quoted if len(quoted) <= _LONGEST_QUOTE else f"{quoted[: _LONGEST_QUOTE - 4]} ...",
        named={group: tuple(values) for group, values in named.items()},
        means=message.means.format_map(words),
        remedy=message.remedy.format_map(words),
        harmless=message.harmless,
    )


def groups_in(sentence: str) -> Iterator[str]:
    """The names in braces."""
    return (name for _, name, _, _ in Formatter().parse(sentence) if name)
