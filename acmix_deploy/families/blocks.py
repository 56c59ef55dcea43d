"""Blocks in an ONNX graph: those that were fused, known by their names, and those that may be. No PyTorch here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import count

import onnx_graphsurgeon as gs

from acmix_deploy.families import FAMILIES
from acmix_deploy.families.family import Family, M
from acmix_deploy.graph import NoMatch

FUSED_NODE = re.compile(rf"(({'|'.join(family.name for family in FAMILIES)})_(\d+))\.")
"""Start of the name of every node of a fused block, ``acmix_0.attention``; its groups are block, family and number."""


def find(family: Family[M], graph: gs.Graph) -> Iterator[tuple[gs.Node, M | NoMatch]]:
    """Each anchor of a family that is in no fused block, with the block around it or why there is none."""
    for node in graph.nodes:
        if node.op in family.anchors and not FUSED_NODE.match(node.name):
            try:
                yield node, family.match(graph, node)
            except NoMatch as reason:
                yield node, reason


def free_names(family: Family[M], graph: gs.Graph) -> Iterator[str]:
    """Names for blocks of a family that none has in a graph that was fused before, in the order of ``find``."""
    fused = (found for node in graph.nodes if (found := FUSED_NODE.match(node.name)) and found[2] == family.name)
    return (f"{family.name}_{number}" for number in count(max((int(found[3]) + 1 for found in fused), default=0)))
