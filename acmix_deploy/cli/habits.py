"""What people write who come from other tools: other names of options, ``key=value``, words that are nearly right."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from acmix_deploy.errors import did_you_mean
from acmix_deploy.targets import RUNTIMES, TARGETS

ALIASES = {
    "--imgsz": ("--image-size",),
    "--half": ("--fp16",),
    "--data": ("--calibration", "--images"),
    "--device": ("--provider",),
    "-o": ("--out",),
    "--output": ("--out",),
}
"""Other names of options, wherever one of those is; --help shows the options alone."""

_ELSEWHERE = {
    "--imgsz": ("--input-shape", "Sizes of free axes are given by --input-shape B,C,H,W."),
    "--batch": ("--input-shape", "Sizes of free axes are given by --input-shape B,C,H,W."),
    "--device": ("", "An engine runs on the GPU that is there, everything else on the CPU."),
    "--save": ("--decoder", "Drawn pictures go to -o OUT."),
    "--format": ("--no-engine", "ONNX files are always written, and an engine where TensorRT is."),
    "--fp32": ("--no-engine", "The file in float32 is always written."),
    **dict.fromkeys(("--model", "--weights", "--source"), ("", "Files are named without an option.")),
}
"""Options that a verb lacks: the option that it has to have for the sentence to be true, and the sentence."""

_VERBS_ELSEWHERE = {
    "predict": "detect",
    "infer": "detect",
    "convert": "export",
    "val": "verify",
    "compare": "verify",
    "benchmark": "profile",
    "help": "--help",
    "version": "--version",
}
"""What other tools call a verb."""

_KEY_VALUE = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)


class Help(argparse.HelpFormatter):
    """Breaks sentences where the terminal ends, and keeps the lines of what is indented, such as examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip("\n").split("\n\n")
        return "\n\n".join(
            each if "\n " in each else super(Help, self)._fill_text(each, width, indent) for each in paragraphs
        )


class Parser(argparse.ArgumentParser):
    """Names what a word that is no choice was probably meant to be."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            meant = did_you_mean(str(value), map(str, action.choices or ()))
            if action.metavar == "VERB" and (verb := _VERBS_ELSEWHERE.get(str(value))):
                meant = f"Did you mean {verb}?"
            if "--target" in action.option_strings and re.match("jetpack|tensorrt|onnxruntime|openvino", str(value)):
                newest = [target for target in TARGETS | RUNTIMES if target.startswith(str(value))][-1:] or [value]
                meant = f"Did you mean --for {newest[0]}?"
            raise argparse.ArgumentError(action, " ".join(filter(None, (error.message, meant)))) from None

    def error(self, message: str) -> NoReturn:
        """What is wrong, an example and where the rest stands, in place of all options: they would hide it."""
        if message.endswith("required: VERB"):
            self.print_help(sys.stderr)
            self.exit(2)
        examples = [line.strip() for line in (self.epilog or "").splitlines() if line.startswith("  acmix-deploy")]
        example = f"Example: {examples[0]}\n" if examples else ""
        self.exit(2, f"error: {message}\n{example}More: {self.prog} --help\n")


def add_aliases(command: argparse.ArgumentParser) -> None:
    """Let a verb take the aliases of the options that it has."""
    for alias, names in ALIASES.items():
        for name in names:
            if action := _options(command).get(name):
                _options(command).setdefault(alias, action)


def unrecognized(command: argparse.ArgumentParser, arguments: Sequence[str]) -> str:
    """What to say of arguments that a verb does not take."""
    hints = dict.fromkeys(filter(None, (_meant(command, argument) for argument in arguments)))
    said = f"unrecognized arguments: {' '.join(arguments)}"
    return " ".join([f"{said}.", *hints]) if hints else said


def _meant(command: argparse.ArgumentParser, argument: str) -> str:
    name = argument.partition("=")[0]
    if not name.startswith("--"):
        images = next((each for each in ("--images", "--calibration") if each in _options(command)), "")
        return f"Did you mean {images} {argument}?" if images and os.path.isdir(argument) else ""  # noqa: PTH112
    needed, sentence = _ELSEWHERE.get(name, ("", ""))
    if sentence and (not needed or needed in _options(command)):
        return sentence
    return did_you_mean(name, _options(command))


def keys_and_values(name: str, command: argparse.ArgumentParser, arguments: Sequence[str]) -> str:
    """What to say of arguments ``key=value``, as Ultralytics takes them; nothing where there are none.

    Args:
        name: of the verb.
        command: its parser.
        arguments: behind the verb.
    """
    places = [action.dest for action in command._actions if not action.option_strings]
    first: list[str] = []
    rest: list[str] = []
    found, unknown = [], []
    value_follows = False
    for argument in arguments:
        option = _options(command).get(argument)
        there = os.path.exists(argument)  # noqa: PTH110, Path raises where a name is too long for one
        pair = None if value_follows or there else _KEY_VALUE.fullmatch(argument)
        value_follows = option is not None and option.nargs != 0
        if not pair:
            rest.append(argument)
            continue
        found.append(argument)
        key, value = pair.groups()
        action = _options(command).get(f"--{key.replace('_', '-')}")
        if places and (key in places or key == "model"):
            first.append(value)
        elif action is None:
            unknown.append(argument)
        elif action.nargs == 0:
            rest += [action.option_strings[-1]] * (value.lower() in ("true", "1"))
        else:
            rest += [action.option_strings[-1], value]
    if not found:
        return ""
    without = f"; {' and '.join(unknown)} {'has' if len(unknown) == 1 else 'have'} no counterpart" if unknown else ""
    written = shlex.join(["acmix-deploy", *name.split(), *first, *rest])
    return f"options are not written key=value: {' '.join(found)}. Write: {written}{without}"


def _options(command: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    found: dict[str, argparse.Action] = command._option_string_actions
    return found
