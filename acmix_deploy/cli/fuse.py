"""Fuse the ACmix blocks of an ONNX file that any exporter wrote.

example:
  acmix-deploy fuse model.onnx -o model.fused.onnx --expect 3
  acmix-deploy fuse model.onnx -o model.fused.onnx --for jetpack-7.2
"""

from __future__ import annotations

import argparse
from pathlib import Path

from acmix_deploy.cli.common import console, print_json, progress
from acmix_deploy.options import add_options
from acmix_deploy.plan import Plan, check_form


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="ONNX file, opset 13 to 21")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="where the fused file goes")
    add_options(parser, Plan, "conv_branch", "expect", "target", "form")


def run(options: argparse.Namespace) -> int:
    from acmix_deploy import onnx_file
    from acmix_deploy.forms import write_for
    from acmix_deploy.fusion import fuse
    from acmix_deploy.graph import read
    from acmix_deploy.targets import target_named

    target = target_named(options.target) if options.target else None
    check_form(target, options.form)
    if target:
        target.check_opset(onnx_file.opset(read(options.model, weights=False)), str(options.model))
    with progress() as report_progress:
        made = fuse(
            options.model,
            options.output,
            conv_branch=options.conv_branch,
            expect=options.expect,
            progress=report_progress,
        )
    report = made.found
    made_for = write_for(target, options.output, options.form).found if target else None
    if options.json:
        from acmix_deploy.report.documents import FuseDocument

        print_json(FuseDocument.of(made, target=made_for))
    else:
        from acmix_deploy.report.tables import fusion_notes, graph_blocks
        from acmix_deploy.report.target import obstacles, plugin_notes

        out = console()
        out.print(graph_blocks(report) if report.blocks else "No ACmix block in the graph, nothing was fused.")
        out.print(f"{report.nodes_before} nodes became {report.nodes_after}: {options.output}")
        for note in fusion_notes(report):
            out.print(f"Note: {note}", style="yellow", markup=False)
        if made_for:
            out.print(f"For {made_for.name}, form {made_for.form}: {options.output.with_name(made_for.file)}")
            for line in (*plugin_notes(made_for), *obstacles(made_for.file, made_for.unread)):
                out.print(line, soft_wrap=True)
    return 0
