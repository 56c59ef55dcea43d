"""From a detector checkpoint with ACmix blocks to a verified, fused ONNX file.

What :data:`__all__` names is the interface; all else is the package's own and may change. A name is imported when it is
first used, so that ``import acmix_deploy`` takes neither PyTorch nor ONNX.
"""

import sys
from importlib import import_module
from types import ModuleType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from acmix_deploy.artifacts import Artifact, Made, read_artifact
    from acmix_deploy.checkpoint.source import Source, load_source
    from acmix_deploy.detection.boxes import Detections
    from acmix_deploy.doctor.diagnosis import Examination
    from acmix_deploy.doctor.files import examine
    from acmix_deploy.doctor.pasted import Found as Explanation
    from acmix_deploy.doctor.pasted import explain
    from acmix_deploy.engine.adopt import AdoptReport, adopt
    from acmix_deploy.engine.build import BuildReport, build
    from acmix_deploy.errors import AcmixDeployError, CheckFailed, Inconclusive, MissingComponent, UserError
    from acmix_deploy.export import ExportResult, export
    from acmix_deploy.families.acmix.module import ACmix
    from acmix_deploy.fusion.fuse import FusionReport, fuse
    from acmix_deploy.gate.measure import measure as gate_run
    from acmix_deploy.gate.samples import GateSamples
    from acmix_deploy.gate.verdict import Verdict
    from acmix_deploy.gate.verdict import judge as gate_check
    from acmix_deploy.operators.spec import Tolerance
    from acmix_deploy.pipeline import deploy
    from acmix_deploy.plan import Plan
    from acmix_deploy.precision import Fp16Report, Goal, Int8Report, quantize, to_fp16
    from acmix_deploy.profile import Profile, profile
    from acmix_deploy.report.inspection import Inspection, inspect
    from acmix_deploy.report.model import ExportReport
    from acmix_deploy.runtime.inputs import random_images
    from acmix_deploy.runtime.onnxruntime import onnx_runner
    from acmix_deploy.runtime.torch import TorchRunner
    from acmix_deploy.serving.deepstream.folder import DeepStreamDocument
    from acmix_deploy.serving.deepstream.folder import package as package_deepstream
    from acmix_deploy.serving.detector import Detector
    from acmix_deploy.serving.triton.repository import PackageDocument
    from acmix_deploy.serving.triton.repository import package as package_triton
    from acmix_deploy.verify import Candidate, Verification, compare_files, verify

__version__ = "0.2.0"

__all__ = [
    "ACmix",
    "AcmixDeployError",
    "AdoptReport",
    "Artifact",
    "BuildReport",
    "Candidate",
    "CheckFailed",
    "DeepStreamDocument",
    "Detections",
    "Detector",
    "Examination",
    "Explanation",
    "ExportReport",
    "ExportResult",
    "Fp16Report",
    "FusionReport",
    "GateSamples",
    "Goal",
    "Inconclusive",
    "Inspection",
    "Int8Report",
    "Made",
    "MissingComponent",
    "PackageDocument",
    "Plan",
    "Profile",
    "Source",
    "Tolerance",
    "TorchRunner",
    "UserError",
    "Verdict",
    "Verification",
    "__version__",
    "adopt",
    "build",
    "compare_files",
    "deploy",
    "examine",
    "explain",
    "export",
    "fuse",
    "gate_check",
    "gate_run",
    "inspect",
    "load_source",
    "onnx_runner",
    "package_deepstream",
    "package_triton",
    "profile",
    "quantize",
    "random_images",
    "read_artifact",
    "to_fp16",
    "verify",
]

_WHERE = {
    "Artifact": "artifacts:Artifact",
    "Made": "artifacts:Made",
    "read_artifact": "artifacts:read_artifact",
    "Source": "checkpoint.source:Source",
    "load_source": "checkpoint.source:load_source",
    "Detections": "detection.boxes:Detections",
    "Examination": "doctor.diagnosis:Examination",
    "examine": "doctor.files:examine",
    "Explanation": "doctor.pasted:Found",
    "explain": "doctor.pasted:explain",
    "AdoptReport": "engine.adopt:AdoptReport",
    "adopt": "engine.adopt:adopt",
    "BuildReport": "engine.build:BuildReport",
    "build": "engine.build:build",
    "AcmixDeployError": "errors:AcmixDeployError",
    "CheckFailed": "errors:CheckFailed",
    "Inconclusive": "errors:Inconclusive",
    "MissingComponent": "errors:MissingComponent",
    "UserError": "errors:UserError",
    "ExportResult": "export:ExportResult",
    "export": "export:export",
    "ACmix": "families.acmix.module:ACmix",
    "FusionReport": "fusion.fuse:FusionReport",
    "fuse": "fusion.fuse:fuse",
    "gate_run": "gate.measure:measure",
    "GateSamples": "gate.samples:GateSamples",
    "Verdict": "gate.verdict:Verdict",
    "gate_check": "gate.verdict:judge",
    "Tolerance": "operators.spec:Tolerance",
    "deploy": "pipeline:deploy",
    "Plan": "plan:Plan",
    "Fp16Report": "precision:Fp16Report",
    "Goal": "precision:Goal",
    "Int8Report": "precision:Int8Report",
    "quantize": "precision:quantize",
    "to_fp16": "precision:to_fp16",
    "Profile": "profile:Profile",
    "profile": "profile:profile",
    "Inspection": "report.inspection:Inspection",
    "inspect": "report.inspection:inspect",
    "ExportReport": "report.model:ExportReport",
    "random_images": "runtime.inputs:random_images",
    "onnx_runner": "runtime.onnxruntime:onnx_runner",
    "TorchRunner": "runtime.torch:TorchRunner",
    "DeepStreamDocument": "serving.deepstream.folder:DeepStreamDocument",
    "package_deepstream": "serving.deepstream.folder:package",
    "Detector": "serving.detector:Detector",
    "PackageDocument": "serving.triton.repository:PackageDocument",
    "package_triton": "serving.triton.repository:package",
    "Candidate": "verify:Candidate",
    "Verification": "verify:Verification",
    "compare_files": "verify:compare_files",
    "verify": "verify:verify",
}
"""Module and name there of what is exported; the imports above say the same to type checkers."""


class _Package(ModuleType):
    """Keeps :func:`export`, :func:`profile` and :func:`verify` what they are when the modules of these names are
    imported, which Python would put in their place."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _WHERE and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

if not TYPE_CHECKING:  # a type checker takes a module with a __getattr__ to have every name

    def __getattr__(name: str) -> object:
        if name not in _WHERE:
            raise AttributeError(f"module {__name__} has no attribute {name}")
        module, _, original = _WHERE[name].partition(":")
        globals()[name] = value = getattr(import_module(f"{__name__}.{module}"), original)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
