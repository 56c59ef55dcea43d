"""What a file is, for a person."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, Group, RenderableType
from rich.text import Text

from acmix_deploy.onnx_file import OnnxFile
from acmix_deploy.report.inspection import Inspection
from acmix_deploy.report.tables import Cell, creators, engine, kernels, table

_LONGEST = 60  # characters of a property


def show_inspection(found: Inspection, console: Console) -> None:
    """Print an inspection."""
    parts: list[RenderableType] = [
        f"{found.path}: {found.kind}, {found.size_bytes / 1e6:.2f} MB, SHA-256 {found.sha256}"
    ]
    if found.onnx:
        parts += _onnx(found.onnx)
    if found.manifest:
        parts += ["", engine(found.manifest)]
    if found.plugin:
        parts += ["", creators(found.plugin), "", kernels(found.plugin)]
    if found.told:
        parts += ["", _pairs(found.told.items())]
    if found.artifact:
        parts += ["", Text("Made from", style="bold"), _origin(found)]
        made = {**found.artifact.versions, **({} if found.manifest else found.artifact.settings)}
        parts += ["", Text("Made with", style="bold"), _pairs((name, str(value)) for name, value in made.items())]
    else:
        parts.append("It has no sidecar, so nothing tells what it was made from.")
    console.print(Group(*parts))
    for note in found.notes:
        console.print(f"Note: {note}", style="yellow")


def _onnx(file: OnnxFile) -> list[RenderableType]:
    facts = {
        "opset": f"{file.opset}, IR version {file.ir_version}",
        "written by": file.producer or "unknown",
        "precision": file.precision,
        "form": file.form,
        **{f"input {tensor.name}": f"{tensor.dtype} {_shape(tensor.shape)}" for tensor in file.inputs},
        **{f"output {tensor.name}": f"{tensor.dtype} {_shape(tensor.shape)}" for tensor in file.outputs},
        "operators": ", ".join(f"{count} {name}" for name, count in file.operators.items()),
        **{name: value[:_LONGEST] for name, value in file.metadata.entries.items()},
    }
    blocks = table("fused block", "operator", "attributes")
    for node in file.fused:
        shown = [
            f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in node.attributes.items()
            if not name.startswith("plugin")
        ]
        blocks.add_row(node.name, node.operator, ", ".join(shown))
    parts: list[RenderableType] = ["", _pairs(facts.items())]
    return [*parts, "", blocks] if file.fused else parts


def _origin(found: Inspection) -> RenderableType:
    rows = table("file", "kind", "for", "in this folder")
    for ancestor in found.ancestors:
        state = Cell(ancestor.state, "bad" if ancestor.state == "changed" else "")
        rows.add_row(ancestor.name, ancestor.kind, ancestor.made, state)
    return rows if found.ancestors else "nothing that was told"


def _pairs(pairs: Iterable[tuple[str, str]]) -> RenderableType:
    rows = table("", "")
    rows.show_header = False
    for name, value in pairs:
        rows.add_row(name, value)
    return rows


def _shape(shape: Iterable[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"
