"""Involution in an ONNX graph: the weighted sum of neighbours as one node; what predicts the weights stays."""

from __future__ import annotations

from functools import partial

from acmix_deploy.families import reassembly
from acmix_deploy.families.family import Family
from acmix_deploy.operators.reassembly import REASSEMBLY
from acmix_deploy.operators.reassembly.body import function_body

INVOLUTION = Family(
    name="involution",
    anchors=("Pad",),
    match=partial(reassembly.match, upsamples=False),
    reduce=partial(reassembly.reduce, upsamples=False),
    operators=((REASSEMBLY, function_body),),
    tolerances=REASSEMBLY.tolerances,
)
