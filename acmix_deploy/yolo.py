"""Ultralytics detectors: ACmix in their YAML files, YOLOv8 with ACmix, and what an export needs of them.

Ultralytics (AGPL-3.0) is an optional extra, imported only when something here is used.
"""

from __future__ import annotations

import copy
import inspect
import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, get_args

from acmix_deploy.detection.images import Letterbox
from acmix_deploy.errors import MissingComponent, UserError
from acmix_deploy.runtime.reason import raised, reason

if TYPE_CHECKING:
    from torch import nn

Variant = Literal["p3p4p5", "p5"]
Scale = Literal["n", "s", "m", "l", "x"]


def ultralytics(module: str) -> ModuleType:
    """The submodule of Ultralytics with this name, e.g. ``nn.tasks``.

    Raises:
        MissingComponent: Ultralytics, or what it imports, is not installed.
        UserError: the one that is found cannot be imported.
    """
    try:
        import_module("ultralytics")
        return import_module(f"ultralytics.{module}")
    except ModuleNotFoundError as error:
        if error.name == "ultralytics":
            raise MissingComponent(
                "Ultralytics is needed here and is not installed",
                "Run: pip install 'acmix-deploy[ultralytics]' (the licence of Ultralytics is AGPL-3.0)",
            ) from error
        if error.name and error.name.startswith("ultralytics."):
            raise UserError(
                f"the Ultralytics that is found has no {error.name}",
                "docs/checkpoints.md#ultralytics names releases that were tried.",
            ) from error
        raise MissingComponent(
            f"Ultralytics is installed and lacks what it imports: {reason(error)}", f"Run: pip install {error.name}"
        ) from error
    except Exception as error:  # a changed copy may raise anything
        raise UserError(
            f"the Ultralytics that is found cannot be imported: {raised(error)}", "Mend that line or install it again."
        ) from error


def register() -> None:
    """Let Ultralytics' model YAML files name ``ACmix``, with the arguments ``[out_planes, kernel_att, head, ...]``.

    As with its own convolutions, the input channels are those of the layer that is read, and ``out_planes`` is scaled
    by the model's width. May be called again; an ``ACmix`` that the installed Ultralytics already knows stays.

    Raises:
        MissingComponent: Ultralytics is not installed.
    """
    tasks: Any = ultralytics("nn.tasks")
    if not hasattr(tasks, "ACmix"):
        tasks.ACmix = _yaml_layer(tasks.Conv)


def _yaml_layer(convolution: type[nn.Module]) -> type[nn.Module]:
    """A class that ``parse_model`` takes for ``convolution`` and that makes an ACmix when it is called.

    Which layers get input channels and scaled output channels is a set of classes inside ``parse_model``, and what
    asks a set is equality.
    """
    from torch import nn

    from acmix_deploy.families.acmix.module import ACmix

    class EqualToConvolution(type):
        def __eq__(cls, other: object) -> bool:
            return other is cls or other is convolution

        def __hash__(cls) -> int:
            return hash(convolution)

    class Layer(nn.Module, metaclass=EqualToConvolution):
        __module__, __qualname__ = ACmix.__module__, ACmix.__qualname__

        def __new__(cls, *args: Any) -> ACmix:  # type: ignore[misc]
            return ACmix(*args)

    return Layer


def model_yaml(variant: Variant, scale: Scale = "n", num_classes: int = 80) -> dict[str, Any]:
    """The installed package's YOLOv8 with an ACmix after some of the feature maps that its head detects on.

    Args:
        variant: after P3, P4 and P5, or after P5 only. What read such a map, detection or not, reads the ACmix.
        scale: width and depth of the model.
        num_classes: classes to detect.

    Returns:
        What Ultralytics reads from a YAML file; name it to ``DetectionModel`` after :func:`register`.

    Raises:
        UserError: an unknown variant or scale.
        MissingComponent: Ultralytics is not installed.
    """
    if variant not in get_args(Variant) or scale not in get_args(Scale):
        raise UserError(
            f"there is no variant {variant!r} of scale {scale!r}",
            f"Variants are {', '.join(get_args(Variant))}; scales are {', '.join(get_args(Scale))}.",
        )
    utils: Any = ultralytics("utils")
    read = utils.YAML.load if hasattr(utils, "YAML") else utils.yaml_load
    model: dict[str, Any] = read(Path(utils.ROOT) / "cfg/models/v8/yolov8.yaml")
    layers = model["backbone"] + model["head"]
    maps = layers[-1][0] if variant == "p3p4p5" else layers[-1][0][-1:]

    def moved(source: int) -> int:
        return source if source < 0 else source + sum(index <= source for index in maps)

    result = []
    for index, (sources, *layer) in enumerate(layers):
        result.append([[moved(source) for source in sources] if isinstance(sources, list) else moved(sources), *layer])
        if index in maps:
            out_planes = layer[-1][0]
            result.append([-1, 1, "ACmix", [out_planes]])
    backbone = len(model["backbone"])
    return model | {
        "nc": num_classes,
        "scale": scale,
        "yaml_file": f"yolov8{scale}-acmix-{variant}.yaml",
        "backbone": result[:backbone],
        "head": result[backbone:],
    }


def build(variant: Variant, scale: Scale = "n", num_classes: int = 80) -> nn.Module:
    """An untrained detector of :func:`model_yaml`, an ``ultralytics.nn.tasks.DetectionModel`` in training mode."""
    register()
    model: nn.Module = ultralytics("nn.tasks").DetectionModel(model_yaml(variant, scale, num_classes), verbose=False)
    return model


def smallest() -> nn.Module:
    """The least that is a detector of the installed package, untrained: one convolution and a head of one class."""
    layers = {"backbone": [[-1, 1, "Conv", [8, 3, 2]]], "head": [[[0], 1, "Detect", ["nc"]]], "nc": 1}
    model: nn.Module = ultralytics("nn.tasks").DetectionModel(layers, verbose=False)
    return model


def _is_ultralytics(model: nn.Module) -> bool:
    tasks = sys.modules.get("ultralytics.nn.tasks")
    return tasks is not None and isinstance(model, tasks.BaseModel)


def detection_metadata(model: nn.Module) -> dict[str, str] | None:
    """What serving needs of an Ultralytics model, as entries of an ONNX file's metadata; None for other models.

    ``task``, ``stride``, ``names``, ``channels`` and ``imgsz`` ([height, width] of training, where the model knows
    it) are written as Ultralytics writes them; ``letterbox`` is JSON of the rule by which it fits an image into that
    size: bilinear resize that keeps the aspect ratio, whether centred and enlarged, and the value of the border.
    """
    if not _is_ultralytics(model):
        return None
    tasks = ultralytics("nn.tasks")
    detector: Any = model
    metadata = {
        "task": getattr(detector, "task", None) or tasks.guess_model_task(detector),
        "stride": str(int(max(detector.stride))),
        "names": str(_class_names(detector.names)),
        "channels": str(int(detector.yaml.get("channels", 3))),
        "letterbox": json.dumps(_letterbox().model_dump()),
    }
    arguments = getattr(detector, "args", {})
    size = (arguments if isinstance(arguments, dict) else vars(arguments)).get("imgsz")
    if size is not None:
        metadata["imgsz"] = str([size, size] if isinstance(size, int) else [int(side) for side in size])
    return metadata


def _letterbox() -> Letterbox:
    """The rule of the installed package. What its ``LetterBox`` takes no argument for it does as ours by default."""
    taken = inspect.signature(ultralytics("data.augment").LetterBox.__init__).parameters
    return Letterbox(**{name: taken[name].default for name in Letterbox.model_fields if name in taken})


def _class_names(names: Any) -> dict[int, str]:
    """As Ultralytics keeps them now; older files have a list. What a file says may be of any other form, too."""
    named = dict(names if isinstance(names, dict) else enumerate(names))
    if not all(isinstance(name, (str, int)) for name in named.values()):
        raise TypeError("the names of classes are no text")
    return {int(index): str(name) for index, name in named.items()}


def prepare_for_export(model: nn.Module) -> nn.Module:
    """A copy of an Ultralytics detector that returns one tensor [B, 4 + classes, anchors], for any image size.

    In eval mode, batch normalisation folded into the convolutions, boxes decoded to (x, y, width, height) in pixels
    of the input. Other models come back as they are.
    """
    if not _is_ultralytics(model):
        return model
    detector: Any = copy.deepcopy(model).eval()
    detector = detector.fuse(verbose=False)
    for module in detector.modules():
        if hasattr(module, "forward_split"):  # into parts of given sizes: opset 17 cannot split into a number of parts
            module.forward = module.forward_split
        if isinstance(module, ultralytics("nn.modules").Detect):
            # "dynamic" computes the anchors in the graph instead of keeping those of the last size on the module.
            module.export, module.format, module.dynamic = True, "onnx", True
    prepared: nn.Module = detector
    return prepared
