"""What a pasted message means, for a person."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from acmix_deploy.doctor.pasted import Explanation, PastedDocument


def show_pasted(document: PastedDocument, console: Console) -> None:
    """Print each known message with what it means and what mends it, or where to look where none is known."""
    if document.cut:
        console.print("Note: the text is long, so that its beginning was left out", style="yellow")
    for found in document.messages:
        console.print(Text(_title(found), style="bold"))
        named = (f"{name.replace('_', ' ')}: {', '.join(values)}" for name, values in found.named.items())
        lines = [found.quoted, *named, f"{found.means[0].upper()}{found.means[1:]}.", found.remedy]
        console.print(Padding("\n".join(lines), (0, 0, 1, 2), expand=False))
    if not document.messages:
        console.print(
            "No message in this text is known; those that are stand in docs/doctor.md. To have a checkpoint, an ONNX "
            "file, an engine or a plugin itself examined: acmix-deploy doctor FILE."
        )


def _title(found: Explanation) -> str:
    times = f", {found.times} times" if found.times > 1 else ""
    harmless = ", harmless" if found.harmless else ""
    return f"Line {found.line}{times}: {found.said_by}, {found.message}{harmless}"
