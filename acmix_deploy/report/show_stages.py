"""What the verbs of single stages did, for a person."""

from __future__ import annotations

from rich.console import Console

from acmix_deploy.artifacts import sidecar
from acmix_deploy.plugin.library import PluginLibrary
from acmix_deploy.report.documents import (
    AdoptDocument,
    BuildDocument,
    Fp16Document,
    FuseDocument,
    QuantizeDocument,
)
from acmix_deploy.report.tables import (
    creators,
    engine,
    float_layers,
    fp16_notes,
    fusion_notes,
    graph_blocks,
    inlined,
    int8_notes,
    kept_in_float32,
    kernels,
    output_errors,
    quantized_layers,
    search_steps,
    searched,
)
from acmix_deploy.report.target import obstacles, plugin_notes


def show_fusion(found: FuseDocument, console: Console) -> None:
    """Print what `fuse` fused, what it left alone, and what there is for a target."""
    path = found.artifact.path
    console.print(graph_blocks(found) if found.blocks else "No ACmix block in the graph, nothing was fused.")
    console.print(f"{found.nodes_before} nodes became {found.nodes_after}: {path}")
    for note in fusion_notes(found):
        console.print(f"Note: {note}", style="yellow")
    if target := found.target:
        console.print(f"For {target.name}, form {target.form}: {path.with_name(target.file)}")
        for line in (*plugin_notes(target), *obstacles(target.file, target.unread)):
            console.print(line, soft_wrap=True)


def show_fp16(found: Fp16Document, console: Console) -> None:
    """Print what `fp16` left in float32."""
    console.print(kept_in_float32(found))
    notes = fp16_notes(found)
    if "range" in found.artifact.settings["float32"] and not found.samples:
        notes.append("it could not be run on images here: ranges are those of stored tensors, not of activations")
    for note in notes:
        console.print(f"Note: {note}", style="yellow")
    console.print(f"All else computes in float16: {found.artifact.path}")


def show_int8(found: QuantizeDocument, console: Console) -> None:
    """Print what `quantize` made INT8, what it left alone, and what that costs."""
    console.print(quantized_layers(found))
    console.print("\nIn floating point:")
    console.print(float_layers(found))
    console.print(f"\nError of the whole file, on {found.measured} calibration images:")
    console.print(output_errors(found))
    if found.search:
        console.print("\nSearch for the target:")
        console.print(search_steps(found.search))
        console.print(searched(found.search))
    notes = int8_notes(found)
    if found.skipped:
        notes.append(f"{len(found.skipped)} images could not be read: {'; '.join(found.skipped)}")
    for note in notes:
        console.print(f"Note: {note}", style="yellow")
    console.print(f"{len(found.layers)} layers in INT8, calibrated on {found.images} images")
    console.print(f"{found.int8_share:.1%} of the multiply-adds of all layers are in INT8")
    sizes = f"{found.bytes_before / 1e6:.2f} MB became {found.bytes_after / 1e6:.2f} MB"
    console.print(f"{sizes}: {found.artifact.path}")


def show_engine(found: BuildDocument, console: Console) -> None:
    """Print what `build` built."""
    console.print(engine(found.manifest))
    if found.inlined:
        console.print(inlined(found.inlined))
    for note in found.notes:
        console.print(f"Note: {note}", style="yellow")
    console.print(f"{found.layers} layers, {len(found.plugin_layers)} by the plugin: {found.artifact.path}")


def show_adopted(found: AdoptDocument, console: Console) -> None:
    """Print what `adopt` learnt of an engine."""
    console.print(engine(found.manifest))
    for note in found.notes:
        console.print(f"Note: {note}", style="yellow", soft_wrap=True)
    beside = sidecar(found.artifact.path)
    if found.layers is None:
        console.print(f"By its header alone: {beside}")
    else:
        console.print(f"{found.layers} layers, {len(found.plugin_layers)} described as a plugin's: {beside}")


def show_library(library: PluginLibrary, console: Console) -> None:
    """Print what a plugin holds."""
    console.print(creators(library))
    console.print(kernels(library), "")
    console.print(f"{library.path}: version {library.version}, TensorRT {library.tensorrt}, CUDA {library.cuda}")
    console.print(f"Architectures: {library.architectures}")
