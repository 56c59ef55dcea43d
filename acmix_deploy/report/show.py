"""The report of an export, for a person."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from acmix_deploy.doctor.faults import FAULTS
from acmix_deploy.engine.build import BuildReport
from acmix_deploy.profile import compare
from acmix_deploy.report.model import ExportReport
from acmix_deploy.report.show_verification import detections, worst_image
from acmix_deploy.report.show_verification import notes as verification_notes
from acmix_deploy.report.tables import (
    device,
    engine,
    errors,
    fp16_notes,
    fusion_notes,
    graph_blocks,
    half,
    module_blocks,
    quantized_layers,
    table,
    worst_layers,
)
from acmix_deploy.report.target import plugin_notes
from acmix_deploy.verify import LayerErrors, Verification

_WORST = 5  # layers in INT8 that are shown


def show_export(report: ExportReport, console: Console) -> None:
    """Print everything of an export that a person wants to see."""
    console.print(
        Group(
            *_titled("Blocks in the model", module_blocks(report.blocks)),
            *_titled("Blocks in the graph", graph_blocks(report.fusion)),
            *(_titled("Layers in INT8", quantized_layers(report.int8, most=_WORST)) if report.int8 else ()),
            *(line for role, built in report.engines.items() for line in _engine(report, role, built)),
            *_titled("Files", files(report)),
            *(_titled(f"On {report.device.name}", device(report.device)) if report.device else ()),
            *_titled(f"Error against {report.reference}, worst over all inputs", errors(report.verification)),
            *(_titled("Magnitudes in float16", half(report.verification)) if report.verification.half else ()),
            *_detections(report.verification),
            *(line for along in report.verification.layers for line in _layers(along)),
        )
    )
    for note in notes(report):
        console.print(f"Note: {note}", style="yellow")
    if report.passed is not False:
        verdict = "Passed" if report.passed else "Passed as far as it was judged"
        console.print(f"\n{verdict}: {_compared(report)} what {report.reference} does")
    console.print(f"\nFiles and report.json are in {_folder(report)}")
    console.print("Next:")
    for step in report.next_steps:
        console.print(f"  {step}", soft_wrap=True)


def _compared(report: ExportReport) -> str:
    left = " and ".join(report.uncompared)
    return f"every file but {left}, not compared, computes" if left else "every file computes"


def _engine(report: ExportReport, role: str, built: BuildReport) -> list[RenderableType]:
    return _titled(f"Engine {report.files[role].artifact.path.name}", engine(built.manifest))


def _detections(verification: Verification) -> list[RenderableType]:
    if not verification.detections:
        return []
    worst = [line for found in verification.detections for line in worst_image(found)]
    return [*_titled(f"Detections against {verification.reference}", detections(verification)), *worst]


def _layers(found: LayerErrors) -> list[RenderableType]:
    return _titled(f"Along {found.candidate}, the worst of {len(found.layers)} tensors", worst_layers(found))


def notes(report: ExportReport) -> list[str]:
    """What the tables of an export do not say."""
    faults = [FAULTS[fault].of_block for fault in report.reference.repaired]
    repaired = (f"repaired, so that the model runs here: {fault}" for fault in faults)
    there = report.device.notes if report.device else ()
    found = [*report.notes, *there, *repaired, *report.export.notes, *fusion_notes(report.fusion)]
    if not report.fusion.fused and not report.fusion.already:
        fused = report.files["fused"].artifact.path.name
        found.append(f"nothing was fused, so {fused} gains nothing; docs/families.md lists the blocks that can be")
    found += report.int8.notes if report.int8 else []
    if report.int8 and report.int8.skipped:
        skipped = report.int8.skipped
        found.append(f"{len(skipped)} calibration images could not be read: {'; '.join(skipped)}")
    for typed in (report.fp16, report.int8.fp16 if report.int8 else None):
        found += fp16_notes(typed) if typed else []
    if report.target:
        found += plugin_notes(report.target)
        if report.target.form == "plugin":
            found.append(
                f"{report.target.file} needs the plugin, so ONNX Runtime verified it with the definitions that were "
                "taken out"
            )
    for role, built in report.engines.items():
        name = report.files[role].artifact.path.name
        found.append(f"{len(built.plugin_layers)} of the {built.layers} layers of {name} are computed by the plugin")
        found += [f"{name}: {node} has {why}, which the plugin does not take" for node, why in built.inlined.items()]
        found += built.notes
    found += compare([file.profile for role, file in report.files.items() if file.profile and role.endswith("engine")])
    return [*found, *verification_notes(report.verification), *_latency_notes(report)]


def files(report: ExportReport) -> Table:
    """The files with their sizes and latencies."""
    rows = table("file", "nodes", "MB", "median ms", "p99 ms", "times faster", numeric=(1, 2, 3, 4, 5))
    plain = report.files["plain"].profile
    for file in report.files.values():
        row = [file.artifact.path.name, str(file.nodes or ""), f"{file.size_bytes / 1e6:.2f}"]
        if file.profile and plain:
            ratio = "" if file.profile is plain else f"{plain.median_ms / file.profile.median_ms:.2f}"
            row += [f"{file.profile.median_ms:.1f}", f"{file.profile.p99_ms:.1f}", ratio]
        rows.add_row(*row)
    return rows


def _latency_notes(report: ExportReport) -> list[str]:
    profiles = [file.profile for file in report.files.values() if file.profile]
    where = (f"latency on {profile.where}" for profile in profiles)
    return [*dict.fromkeys((*where, *(note for profile in profiles for note in profile.notes)))]


def _folder(report: ExportReport) -> str:
    return str(next(iter(report.files.values())).artifact.path.parent)


def _titled(title: str, table: Table) -> list[RenderableType]:
    return [Text(f"\n{title}", style="bold"), table if table.row_count else Text("  none")]
