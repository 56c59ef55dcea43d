"""How far each file is from the model, and whether that is near enough."""

from acmix_deploy.verify.detections import DetectionComparison, Scenes
from acmix_deploy.verify.layers import LayerErrors, compare_layers
from acmix_deploy.verify.run import Candidate, compare_borders, compare_files, failing_first, inputs_for, verify
from acmix_deploy.verify.verification import Comparison, Verification, read_verification

__all__ = [
    "Candidate",
    "Comparison",
    "DetectionComparison",
    "LayerErrors",
    "Scenes",
    "Verification",
    "compare_borders",
    "compare_files",
    "compare_layers",
    "failing_first",
    "inputs_for",
    "read_verification",
    "verify",
]
