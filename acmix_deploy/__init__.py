"""From a detector checkpoint with ACmix blocks to a verified, fused ONNX file.

What :data:`__all__` names is the interface; all else is the package's own and may change. A name is imported when it is
first used, so that ``import acmix_deploy`` takes neither PyTorch nor ONNX.
"""

import sys
from importlib import import_module
from types import ModuleType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from acmix_deploy.artifacts import Artifact, StageResult, read_artifact
    from acmix_deploy.checkpoint.source import Source, load_source
    from acmix_deploy.detection.boxes import Detections
    from acmix_deploy.detection.images import Letterbox
    from acmix_deploy.detection.metadata import ModelMetadata
    from acmix_deploy.detection.suppression import Suppression
    from acmix_deploy.device.session import DeviceSession
    from acmix_deploy.device.stages import RemoteStages
    from acmix_deploy.doctor.diagnosis import Examination
    from acmix_deploy.doctor.files import examine
    from acmix_deploy.doctor.pasted import Explanation, explain
    from acmix_deploy.engine.adopt import AdoptReport, adopt
    from acmix_deploy.engine.build import BuildReport, build
    from acmix_deploy.errors import AcmixDeployError, CheckFailed, Inconclusive, MissingComponent, UserError
    from acmix_deploy.export import export
    from acmix_deploy.exported import ExportResult
    from acmix_deploy.families.acmix.module import ACmix
    from acmix_deploy.families.cafm.module import CAFM
    from acmix_deploy.families.carafe.module import Carafe
    from acmix_deploy.families.gated_acmix.module import GatedACmix
    from acmix_deploy.families.involution.module import Involution
    from acmix_deploy.families.local_attention.module import LocalAttention
    from acmix_deploy.families.outlook.module import OutlookAttention
    from acmix_deploy.families.shift_conv.module import ShiftConv
    from acmix_deploy.families.swin_acmix.module import SwinACmix
    from acmix_deploy.families.windowed_acmix.module import WindowedACmix
    from acmix_deploy.fusion.fuse import FusionReport, fuse
    from acmix_deploy.gate.history import GateHistory
    from acmix_deploy.gate.history import read_history as gate_history
    from acmix_deploy.gate.measure import measure as gate_run
    from acmix_deploy.gate.samples import GateSamples
    from acmix_deploy.gate.verdict import Verdict
    from acmix_deploy.gate.verdict import judge as gate_check
    from acmix_deploy.operators.neighborhood_attention import Border
    from acmix_deploy.operators.spec import Tolerance
    from acmix_deploy.pipeline import deploy
    from acmix_deploy.plan import Plan
    from acmix_deploy.plugin.build import build as build_plugin
    from acmix_deploy.plugin.library import PluginLibrary
    from acmix_deploy.precision import Fp16Report, Goal, Int8Report, quantize, to_fp16
    from acmix_deploy.processing import Processing
    from acmix_deploy.profile import Profile, profile
    from acmix_deploy.profile.subjects import RunSettings
    from acmix_deploy.report.documents import HtmlDocument
    from acmix_deploy.report.html import write_html as write_report
    from acmix_deploy.report.inspection import Inspection, inspect
    from acmix_deploy.report.model import ExportReport
    from acmix_deploy.runtime.inputs import random_images
    from acmix_deploy.runtime.models import Model, open_model
    from acmix_deploy.runtime.onnxruntime import OnnxRunner, onnx_runner
    from acmix_deploy.runtime.tensorrt import EngineRunner
    from acmix_deploy.runtime.torch import TorchRunner
    from acmix_deploy.serving.deepstream.folder import DeepStreamDocument
    from acmix_deploy.serving.deepstream.folder import package as package_deepstream
    from acmix_deploy.serving.detector import Detector
    from acmix_deploy.serving.end_to_end import EndToEndDocument
    from acmix_deploy.serving.end_to_end import end_to_end as profile_end_to_end
    from acmix_deploy.serving.triton.repository import PackageDocument
    from acmix_deploy.serving.triton.repository import package as package_triton
    from acmix_deploy.verify import (
        Candidate,
        LayerErrors,
        Scenes,
        Verification,
        compare_files,
        compare_layers,
        inputs_for,
        verify,
    )
    from acmix_deploy.verify.judges import ByDetections, ByLabels
    from acmix_deploy.yolo import build as yolo_model
    from acmix_deploy.yolo import model_yaml as yolo_yaml
    from acmix_deploy.yolo import register as register_acmix

__version__ = "0.2.0"

__all__ = [
    "CAFM",
    "ACmix",
    "AcmixDeployError",
    "AdoptReport",
    "Artifact",
    "Border",
    "BuildReport",
    "ByDetections",
    "ByLabels",
    "Candidate",
    "Carafe",
    "CheckFailed",
    "DeepStreamDocument",
    "Detections",
    "Detector",
    "DeviceSession",
    "EndToEndDocument",
    "EngineRunner",
    "Examination",
    "Explanation",
    "ExportReport",
    "ExportResult",
    "Fp16Report",
    "FusionReport",
    "GateHistory",
    "GateSamples",
    "GatedACmix",
    "Goal",
    "HtmlDocument",
    "Inconclusive",
    "Inspection",
    "Int8Report",
    "Involution",
    "LayerErrors",
    "Letterbox",
    "LocalAttention",
    "MissingComponent",
    "Model",
    "ModelMetadata",
    "OnnxRunner",
    "OutlookAttention",
    "PackageDocument",
    "Plan",
    "PluginLibrary",
    "Processing",
    "Profile",
    "RemoteStages",
    "RunSettings",
    "Scenes",
    "ShiftConv",
    "Source",
    "StageResult",
    "Suppression",
    "SwinACmix",
    "Tolerance",
    "TorchRunner",
    "UserError",
    "Verdict",
    "Verification",
    "WindowedACmix",
    "__version__",
    "adopt",
    "build",
    "build_plugin",
    "compare_files",
    "compare_layers",
    "deploy",
    "examine",
    "explain",
    "export",
    "fuse",
    "gate_check",
    "gate_history",
    "gate_run",
    "inputs_for",
    "inspect",
    "load_source",
    "onnx_runner",
    "open_model",
    "package_deepstream",
    "package_triton",
    "profile",
    "profile_end_to_end",
    "quantize",
    "random_images",
    "read_artifact",
    "register_acmix",
    "to_fp16",
    "verify",
    "write_report",
    "yolo_model",
    "yolo_yaml",
]

_WHERE = {
    "Artifact": "artifacts:Artifact",
    "StageResult": "artifacts:StageResult",
    "read_artifact": "artifacts:read_artifact",
    "Source": "checkpoint.source:Source",
    "load_source": "checkpoint.source:load_source",
    "Detections": "detection.boxes:Detections",
    "Letterbox": "detection.images:Letterbox",
    "ModelMetadata": "detection.metadata:ModelMetadata",
    "Suppression": "detection.suppression:Suppression",
    "DeviceSession": "device.session:DeviceSession",
    "RemoteStages": "device.stages:RemoteStages",
    "Examination": "doctor.diagnosis:Examination",
    "examine": "doctor.files:examine",
    "Explanation": "doctor.pasted:Explanation",
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
    "export": "export:export",
    "ExportResult": "exported:ExportResult",
    "ACmix": "families.acmix.module:ACmix",
    "CAFM": "families.cafm.module:CAFM",
    "Carafe": "families.carafe.module:Carafe",
    "GatedACmix": "families.gated_acmix.module:GatedACmix",
    "Involution": "families.involution.module:Involution",
    "LocalAttention": "families.local_attention.module:LocalAttention",
    "OutlookAttention": "families.outlook.module:OutlookAttention",
    "ShiftConv": "families.shift_conv.module:ShiftConv",
    "SwinACmix": "families.swin_acmix.module:SwinACmix",
    "WindowedACmix": "families.windowed_acmix.module:WindowedACmix",
    "FusionReport": "fusion.fuse:FusionReport",
    "fuse": "fusion.fuse:fuse",
    "GateHistory": "gate.history:GateHistory",
    "gate_history": "gate.history:read_history",
    "gate_run": "gate.measure:measure",
    "GateSamples": "gate.samples:GateSamples",
    "Verdict": "gate.verdict:Verdict",
    "gate_check": "gate.verdict:judge",
    "Border": "operators.neighborhood_attention:Border",
    "Tolerance": "operators.spec:Tolerance",
    "deploy": "pipeline:deploy",
    "Plan": "plan:Plan",
    "build_plugin": "plugin.build:build",
    "PluginLibrary": "plugin.library:PluginLibrary",
    "Fp16Report": "precision:Fp16Report",
    "Goal": "precision:Goal",
    "Int8Report": "precision:Int8Report",
    "quantize": "precision:quantize",
    "to_fp16": "precision:to_fp16",
    "Processing": "processing:Processing",
    "Profile": "profile:Profile",
    "profile": "profile:profile",
    "RunSettings": "profile.subjects:RunSettings",
    "HtmlDocument": "report.documents:HtmlDocument",
    "write_report": "report.html:write_html",
    "Inspection": "report.inspection:Inspection",
    "inspect": "report.inspection:inspect",
    "ExportReport": "report.model:ExportReport",
    "random_images": "runtime.inputs:random_images",
    "Model": "runtime.models:Model",
    "open_model": "runtime.models:open_model",
    "OnnxRunner": "runtime.onnxruntime:OnnxRunner",
    "onnx_runner": "runtime.onnxruntime:onnx_runner",
    "EngineRunner": "runtime.tensorrt:EngineRunner",
    "TorchRunner": "runtime.torch:TorchRunner",
    "DeepStreamDocument": "serving.deepstream.folder:DeepStreamDocument",
    "package_deepstream": "serving.deepstream.folder:package",
    "Detector": "serving.detector:Detector",
    "EndToEndDocument": "serving.end_to_end:EndToEndDocument",
    "profile_end_to_end": "serving.end_to_end:end_to_end",
    "PackageDocument": "serving.triton.repository:PackageDocument",
    "package_triton": "serving.triton.repository:package",
    "Candidate": "verify:Candidate",
    "LayerErrors": "verify:LayerErrors",
    "Scenes": "verify:Scenes",
    "Verification": "verify:Verification",
    "compare_files": "verify:compare_files",
    "compare_layers": "verify:compare_layers",
    "inputs_for": "verify:inputs_for",
    "verify": "verify:verify",
    "ByDetections": "verify.judges:ByDetections",
    "ByLabels": "verify.judges:ByLabels",
    "yolo_model": "yolo:build",
    "yolo_yaml": "yolo:model_yaml",
    "register_acmix": "yolo:register",
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
        try:
            value = getattr(import_module(f"{__name__}.{module}"), original)
        except ModuleNotFoundError as error:
            if str(error.name).partition(".")[0] != "torch":
                raise
            hints = import_module(f"{__name__}.runtime.hints")
            raise ModuleNotFoundError(
                f"{__name__}.{name} needs PyTorch, which is not installed. {hints.NO_TORCH}", name=error.name
            ) from None
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
