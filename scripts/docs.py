"""Write the files, or parts of them, that repeat what the code knows; with ``--check`` only compare them."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from acmix_deploy.cli import EXIT_CODES, commands
from acmix_deploy.device.check import DeviceDocument
from acmix_deploy.device.registry import DevicesDocument
from acmix_deploy.doctor.faults import FAULTS
from acmix_deploy.doctor.messages import MESSAGES, Message
from acmix_deploy.doctor.pasted import PastedDocument, groups_in
from acmix_deploy.document import Document, written
from acmix_deploy.errors import AcmixDeployError
from acmix_deploy.gate.samples import GateSamples
from acmix_deploy.operators import OPERATORS
from acmix_deploy.operators.native import native_sources
from acmix_deploy.operators.spec import Operator
from acmix_deploy.profile import ProfileDocument
from acmix_deploy.report.documents import (
    AdoptDocument,
    BuildDocument,
    DoctorDocument,
    Fp16Document,
    FuseDocument,
    GateDocument,
    HistoryDocument,
    HtmlDocument,
    InspectDocument,
    PluginDocument,
    QuantizeDocument,
    VerifyDocument,
)
from acmix_deploy.report.model import ExportReport
from acmix_deploy.serving.app import DetectResponse, ModelResponse
from acmix_deploy.serving.deepstream.folder import DeepStreamDocument
from acmix_deploy.serving.end_to_end import EndToEndDocument
from acmix_deploy.serving.path import DetectStats
from acmix_deploy.serving.server import ServeDocument
from acmix_deploy.serving.sources import DetectDocument
from acmix_deploy.serving.triton.repository import PackageDocument
from acmix_deploy.targets import RUNTIMES, TARGETS, Target
from acmix_deploy.verify.limits import DETECTION_LIMITS, FILE_TOLERANCES, tolerance_of
from scripts import instructions, kernel_model, measured, terminal
from scripts.measured import table as _table

ROOT = Path(__file__).resolve().parents[1]

DOCUMENTS: tuple[type[Document], ...] = (
    AdoptDocument,
    BuildDocument,
    DeepStreamDocument,
    DetectDocument,
    DetectResponse,
    DetectStats,
    DeviceDocument,
    DevicesDocument,
    DoctorDocument,
    EndToEndDocument,
    ExportReport,
    Fp16Document,
    FuseDocument,
    GateDocument,
    GateSamples,
    HistoryDocument,
    HtmlDocument,
    InspectDocument,
    ModelResponse,
    PackageDocument,
    PastedDocument,
    PluginDocument,
    ProfileDocument,
    QuantizeDocument,
    ServeDocument,
    VerifyDocument,
)
"""What the verbs print with ``--json`` and servers answer."""


def generated() -> dict[Path, str]:
    """What every file with generated parts has to hold.

    A part stands between ``<!-- name:begin -->`` and ``<!-- name:end -->``.
    """
    schemas = {written(document): document.model_json_schema(mode="serialization") for document in DOCUMENTS}
    parts = {
        "docs/benchmarks.md": {"instructions": _instructions(), "model": _model()},
        "docs/cli.md": {"cli": "\n".join(_verb(name, command) for name, command in commands().items())},
        "docs/errors.md": {"exit-codes": _exit_codes()},
        "docs/schemas.md": {"documents": _documents(schemas)},
        "docs/operator.md": {operator.name: _operator(operator) for operator in OPERATORS},
        "docs/doctor.md": {"faults": _faults(), "messages": _messages()},
        "docs/pipeline.md": {"output": terminal.block()},
        "docs/targets.md": {"targets": _targets()},
        "docs/verify.md": {"limits": _verify_limits()},
    }
    for page, contents in measured.parts().items():
        parts.setdefault(page, {}).update(contents)
    files = {
        f"docs/schemas/{name.replace(' ', '-')}.json": json.dumps(schema, indent=2) + "\n"
        for name, schema in schemas.items()
    }
    files |= {f"plugins/{name}": text for name, text in native_sources().items()}
    files |= {f"docs/{name}": picture for name, picture in terminal.pictures().items()}
    for page, contents in parts.items():
        files[page] = _read(page)
        for name, content in contents.items():
            before, _, after = _around(files[page], name)
            files[page] = f"{before}\n\n{content.strip()}\n\n{after}"
    return {ROOT / name: text for name, text in files.items()}


def _read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def _around(text: str, name: str) -> tuple[str, str, str]:
    """A text up to a part, the part, and the rest. Raises ValueError where the markers are missing."""
    begin_marker = f"<!-- {name}:begin -->"
    begin, end = text.index(begin_marker) + len(begin_marker), text.index(f"<!-- {name}:end -->")
    return text[:begin], text[begin:end], text[end:]


def _documents(schemas: Mapping[str, dict[str, Any]]) -> str:
    """Every document with its fields, and behind them the objects that are in their fields."""
    objects: dict[str, dict[str, Any]] = {}
    pages = []
    for name, schema in sorted(schemas.items()):
        names: dict[str, str] = {}
        for key, content in schema.get("$defs", {}).items():
            word = key.rpartition("__")[2]
            namesakes = [other for other in objects if other.partition(" ")[0] == word]
            alike = [other for other in namesakes if _fields_of(objects[other]).keys() == _fields_of(content).keys()]
            names[key] = next(iter(alike), f"{word} of {name}" if namesakes else word)
            objects[names[key]] = content
        objects |= {names[key]: _renamed(content, names) for key, content in schema.get("$defs", {}).items()}
        head = f"## {name}\n\n{_plain(schema['description'])} [JSON Schema](schemas/{name.replace(' ', '-')}.json).\n"
        pages += [head, _typed(_renamed(schema, names))]
    pages.append("## Objects\n\nWhat stands in the fields above.\n")
    for name, content in sorted(objects.items(), key=lambda item: item[0].lower()):
        pages += [f"### Object {name}\n\n{_plain(content['description'])}\n", _typed(content)]
    return "\n".join(pages)


def _renamed(schema: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A schema that calls objects by other names."""
    text = re.sub(r'"#/\$defs/(\w+)"', lambda match: json.dumps(names[match[1]]), json.dumps(schema))
    renamed: dict[str, Any] = json.loads(text)
    return renamed


def _plain(text: str) -> str:
    """The first paragraph of a docstring, or a description, without markup, and with null as JSON has it."""
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", " ".join(text.partition("\n\n")[0].split()))
    return re.sub(r"\bNone\b", "null", text.replace("``", "`"))


def _typed(schema: Mapping[str, Any]) -> str:
    """The fields of an object with their types; of a document those that not every one has."""
    fields = _fields_of(schema)
    left_out = ("document", "schema") if "document" in fields else ()
    rows = [
        (f"`{name}`", _type(fields[name]), _plain(fields[name]["description"]))
        for name in fields
        if name not in left_out
    ]
    return _table(("field", "type", "meaning"), *rows) if rows else "A map to string.\n"


def _fields_of(schema: Mapping[str, Any]) -> dict[str, Any]:
    """By their names; none of an object whose names are not fixed."""
    fields: dict[str, Any] = schema.get("properties", {})
    return fields


def _type(field: Mapping[str, Any]) -> str:
    """A type of JSON Schema in words."""
    if "const" in field:
        return f"`{json.dumps(field['const'])}`"
    if "enum" in field:
        return ", ".join(f"`{json.dumps(value)}`" for value in field["enum"])
    if "$ref" in field:
        return f"[{field['$ref']}](#object-{field['$ref'].lower().replace(' ', '-')})"
    if "anyOf" in field:
        return " or ".join(map(_type, field["anyOf"]))
    if "prefixItems" in field:
        return f"[{', '.join(map(_type, field['prefixItems']))}]"
    if field.get("type") == "array":
        return f"list of {_type(field['items'])}"
    if "additionalProperties" in field:
        values = field["additionalProperties"]
        return "object" if isinstance(values, bool) else f"map to {_type(values)}"
    return str(field.get("format", field.get("type", "any")))


def _operator(operator: Operator) -> str:
    tensors = [
        (kind, f"`{tensor.name}`", f"`[{', '.join(tensor.axes)}]`", tensor.meaning)
        for kind, group in (("input", operator.inputs), ("output", operator.outputs))
        for tensor in group
    ]
    letters = {name: f"{letter}, " for letter, name in operator.axes.items()}
    attributes = [
        (
            f"`{a.name}`",
            a.kind,
            f"`{json.dumps(a.default)}`",
            "" if a.minimum is None else f"at least {a.minimum}",
            letters.get(a.name, "") + a.meaning,
        )
        for a in operator.attributes
    ]
    limits = [(f"`{name}`", ", ".join(map(str, values))) for name, values in operator.kernel_limits.items()]
    limits += [(f"`{name}`", f"at most {most:,}") for name, most in operator.kernel_maxima.items()]
    kernels = [
        (kernel.name, ", ".join(" ".join(f) for f in kernel.formats), f"sm_{kernel.min_sm}" if kernel.min_sm else "any")
        for kernel in operator.kernels
    ]
    tolerances = [
        (name, f"{t.floor:g}", f"{t.factor:g} times", f"{max(t.floor, t.most):g}")
        for name, t in operator.tolerances.items()
    ]
    named = ", ".join(f"{letter} is {name}" for letter, name in operator.axes.items())
    smallest = " and ".join(f"{letter} >= {size}" for letter, size in operator.minima.items())
    if operator.minima_where:
        letter, value = operator.minima_where
        smallest += f" where {letter} is {int(value)}"
    return "\n".join(
        [
            f"Domain `{operator.domain}`, type `{operator.op_type}`, version {operator.version}.\n",
            f"```text\n{operator.formula.replace('; ', chr(10))}\n```\n",
            f"{named}.{f' It is defined for {smallest}.' if smallest else ''}\n",
            _table(("", "name", "axes", "meaning"), *tensors),
            _table(("attribute", "type", "default", "limits", "meaning"), *attributes),
            _table(("native kernel", "element types and layouts", "GPU from"), *kernels),
            _table(("the native kernels take", ""), *limits),
            _table(("element type", "error accepted", "plus PyTorch's own", "but at most"), *tolerances),
        ]
    )


def _instructions() -> str:
    """Warp instructions for 16 queries, by architecture."""
    totals: dict[tuple[str, str], list[str]] = {}
    for row in instructions.read_table()[1]:
        totals.setdefault((row.kernel, row.shape), []).append(f"{row.total:,.0f}")
    head = ("kernel", "map", *(f"sm_{architecture}" for architecture in instructions.ARCHITECTURES))
    return _table(head, *((*key, *cells) for key, cells in totals.items()))


def _model() -> str:
    """Microseconds by the model, and the unit that needs them."""
    rows = []
    for device in kernel_model.DEVICES:
        found = kernel_model.rows_of(device, kernel_model.KERNEL)
        for batch in kernel_model.BATCHES:
            slowest = (kernel_model.largest(kernel_model.bounds(device, row, batch)) for row in found)
            rows.append((device.name, batch, *(f"{time:.1f} {unit}" for unit, time in slowest)))
    return _table(("device", "batch", *map(str, instructions.SHAPES)), *rows)


def _targets() -> str:
    def row(target: Target) -> tuple[str, ...]:
        types = "the file" if target.strongly_typed else "flags"
        sm = ", ".join(map(str, target.sm))
        return (f"`{target.name}`", target.version, target.cuda, sm, str(target.opset), f"`{target.form}`", types)

    head = ("target", "TensorRT", "CUDA", "sm", "opset at most", "form", "types from")
    return _table(head, *map(row, (TARGETS | RUNTIMES).values()))


def _faults() -> str:
    rows = [(f"`{name}`", fault.what, fault.symptom, fault.remedy) for name, fault in FAULTS.items()]
    return _table(("fault", "what it is", "how it shows", "what mends it"), *rows)


def _messages() -> str:
    def row(name: str, message: Message) -> tuple[str, ...]:
        shown = {group: f"*{group}*" for text in (message.means, message.remedy) for group in groups_in(text)}
        means, remedy = (text.format_map(shown) for text in (message.means, message.remedy))
        return f"`{name}`", message.said_by, _code(message.example), means, remedy

    rows = [row(name, message) for name, message in MESSAGES.items()]
    return _table(("message", "of", "how it reads", "what it means", "what mends it"), *rows)


def _code(text: str) -> str:
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def _verify_limits() -> str:
    rows = [
        (
            name,
            *(f"{limit.limit():g}" for part in ("", "scores") if (limit := tolerance_of(FILE_TOLERANCES, name, part))),
            f"{limits.lost:.1%}",
            *(f"{limit:g}" for limit in (limits.score_change, limits.iou, limits.near)),
        )
        for name, limits in DETECTION_LIMITS.items()
    ]
    outputs = ("candidate", "relative L2 of an output", "of scores, or of a channel")
    head = (*outputs, "detections lost, and added", "mean score change", "mean IoU", "near the threshold")
    return _table(head, *rows)


def _exit_codes() -> str:
    errors = {str(error.exit_code): f"`{error.__name__}`" for error in AcmixDeployError.__subclasses__()}
    errors["130"] = "`KeyboardInterrupt`"
    rows = [line.split(maxsplit=1) for line in EXIT_CODES.strip().splitlines()[1:]]
    return _table(("code", "meaning", "in Python"), *((*row, errors.get(row[0], "")) for row in rows))


def _verb(name: str, command: argparse.ArgumentParser) -> str:
    shown = [action for action in command._actions if action.dest != "help"]
    rows = [(f"`{_spelling(action)}`", _marked(action.help or "")) for action in shown]
    prose, _, examples = (command.epilog or "").rpartition("example:\n")
    return "\n".join(
        [
            f"## {name}\n",
            f"{command.description}\n",
            *([f"{_marked(prose.strip())}\n"] if prose else []),
            "```console",
            *(f"$ {example.strip()}" for example in examples.splitlines()),
            "```\n",
            _table(("argument", "meaning"), *rows),
        ]
    )


def _marked(text: str) -> str:
    """A text for a terminal as Markdown: its pages are links, its options code."""
    text = re.sub(r"\bdocs/([a-z-]+\.md(?:#[\w-]+)?)", r"[\g<0>](\1)", text)
    return re.sub(r"`[^`]*`|(?<!\S)--[a-zA-Z][\w-]*", lambda match: f"`{match[0].strip('`')}`", text)


def _spelling(action: argparse.Action) -> str:
    """How an argument is written: ``--out DIR``, ``--fp16``, ``MODEL``."""
    takes_value = action.nargs != 0
    value = action.metavar or "|".join(map(str, action.choices or ())) or action.dest.upper()
    repeated = " ..." if action.nargs == "+" else ""
    if not action.option_strings:
        return f"{value}{repeated}"
    shown = f" [{value}]" if action.nargs == "?" else f" {value}" if takes_value else ""
    return ", ".join(action.option_strings) + shown


def differing() -> dict[Path, str]:
    """The files that do not hold what they have to, with what they have to hold."""
    return {
        path: text
        for path, text in generated().items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    }


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--check", action="store_true", help="write nothing; exit 1 where a file is out of date")
    check = arguments.parse_args().check
    stale = differing()
    for path, text in stale.items():
        print(f"{path.relative_to(ROOT)} {'is out of date, run: make docs' if check else 'written'}")
        if not check:
            path.write_text(text, encoding="utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
